"""LoRA of the DiT: the form in memory, merged into a network, and written for other programs.

A LoRA is a difference of weights, most of it products of two thin factors. lora_files.py reads it.
"""

import dataclasses
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from safetensors import SafetensorError
from safetensors.numpy import save_file

from wan_jax import files, host_memory
from wan_jax.dit import DiT
from wan_jax.layers import QuantizedLinear
from wan_jax.weights import lora_names, trees
from wan_jax.weights.dit import EVERY
from wan_jax.weights.facts import one_line
from wan_jax.weights.rules import Rule, Shape

Array = jax.Array
METADATA = "lora_adapter_metadata"  # in the header: PEFT's configuration as JSON, from Diffusers
RULES = {rule.target: rule for rule in EVERY.rules}


@dataclasses.dataclass(frozen=True)
class Pair:
    """The factors of one product's difference, alpha / rank * down @ up; on the host.

    down: float32 [*d_in, r]; up: float32 [r, d_out]; alpha: float64; rank: int. For a product of
    the stack all four have a leading axis of layers. A layer may have a lower rank than r: the rest
    is zeros; 0 leaves it as it is.
    """

    down: np.ndarray
    up: np.ndarray
    alpha: np.ndarray
    rank: np.ndarray

    @property
    def scale(self) -> np.ndarray:
        """alpha / rank, float64, of each layer."""
        return self.alpha / np.maximum(self.rank, 1)


@dataclasses.dataclass(frozen=True)
class Lora:
    """A difference of the DiT's weights.

    pairs: {path of a product, such as "layers.self_attn.q": Pair}. diffs: {path of a parameter,
    such as "head_proj.bias": float32 array of its shape, added as it is}.
    """

    pairs: Mapping[str, Pair]
    diffs: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, factors: Mapping[str, tuple[Any, Any]], *, alpha: float) -> Self:
        """From {path: (down [*d_in, r], up [r, d_out])}, with layers before them in a stack.

        The ranks are those of the shapes. Raises ValueError for a path that no DiT has, shapes that
        do not belong together and an alpha that is not finite.
        """
        if not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha}; a finite number is needed")
        pairs = {}
        for path, arrays in factors.items():
            _rule(f"{path}.kernel")
            down, up = (np.asarray(array, np.float32) for array in arrays)
            layers = layers_of(path, down.shape)
            if up.ndim != 2 + len(layers) or up.shape[:-1] != (*layers, *down.shape[-1:]):
                raise ValueError(
                    f"{path} has factors of shapes {list(down.shape)} and {list(up.shape)}; "
                    "[..., d_in, rank] and [..., rank, d_out] are needed"
                )
            rank = np.full(layers, up.shape[-2], np.int64)
            pairs[path] = Pair(down, up, np.full(layers, alpha, np.float64), rank)
        return cls(pairs)


def _rule(target: str) -> Rule:
    try:
        return RULES[target]
    except KeyError:
        name = target.removesuffix(".kernel")
        raise ValueError(
            f"{name} is no part of a DiT; needed are names such as layers.self_attn.q or head_proj"
        ) from None


def layers_of(target: str, shape: Shape) -> Shape:
    """[i] for a parameter of the stack, [] for others."""
    return shape[:1] if target.startswith("layers.") else ()


# Merging


def merge(dit: DiT, loras: Sequence[tuple[Lora, float]], *, donate: bool = False) -> DiT:
    """The network with scale times the difference of each LoRA added.

    loras: (LoRA, scale). Sums are float32 and rounded once to the dtype in which a parameter is
    stored; they are made on the device, for one layer of one parameter at a time, which for that
    leaves the host's memory if it lies there. donate: the given network's arrays are used up, so
    that there is no second copy of any. Raises ValueError naming a LoRA's part that does not fit
    the network.
    """
    leaves = trees.flatten(dit)
    if isinstance(dit.layers.ffn_in, QuantizedLinear):
        raise ValueError("a LoRA is added to weights before these are quantised, not after")
    for lora, _ in loras:
        _check_fit(lora, {name: leaf.shape for name, leaf in leaves.items()})
    touched = {f"{path}.kernel" for lora, _ in loras for path in lora.pairs}
    touched |= {name for lora, _ in loras for name in lora.diffs}
    for name in sorted(touched):
        factors = _factors(name.removesuffix(".kernel"), loras)
        diffs = [scale * lora.diffs[name] for lora, scale in loras if name in lora.diffs]
        diff = np.asarray(np.sum(diffs, axis=0, dtype=np.float32)) if diffs else None
        leaf, add = leaves[name], _add
        if host_memory.lies_in(leaf):
            leaves[name] = _added_on_host(leaf, factors, diff, donate=donate)
            continue
        if name.startswith("layers."):
            cpu = next(iter(leaf.devices())).platform == "cpu"
            add = _add_to_stack(as_bits=cpu and leaf.dtype != jnp.float32)
        # The program is kept by jax, by the function and the shapes.
        program = jax.jit(add, donate_argnums=0 if donate else (), out_shardings=leaf.sharding)
        leaves[name] = program(leaf, factors, diff)
    return trees.fill(dit, leaves)


def _check_fit(lora: Lora, shapes: Mapping[str, Shape]) -> None:
    found = {name: diff.shape for name, diff in lora.diffs.items()}
    for path, pair in lora.pairs.items():
        found[f"{path}.kernel"] = (*pair.down.shape[:-1], pair.up.shape[-1])
    for name, shape in found.items():
        if shapes.get(name) != shape:
            needed = list(shapes[name]) if name in shapes else "none: it has no such part"
            raise ValueError(
                f"the LoRA changes {name} of shape {list(shape)}; the network's is {needed}"
            )


def _factors(
    path: str, loras: Sequence[tuple[Lora, float]]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Factors of the sum of all LoRAs' differences of a product, side by side; None without any."""
    found = [(lora.pairs[path], scale) for lora, scale in loras if path in lora.pairs]
    if not found:
        return None
    scales = [(scale * pair.scale).astype(np.float32)[..., None, None] for pair, scale in found]
    downs = [pair.down for pair, _ in found]
    ups = [pair.up * scale for (pair, _), scale in zip(found, scales, strict=True)]
    return np.concatenate(downs, axis=-1), np.concatenate(ups, axis=-2)


def _add(leaf: Array, factors: tuple[Array, Array] | None, diff: Array | None) -> Array:
    total = leaf.astype(jnp.float32)
    if factors is not None:
        down, up = factors
        product = jnp.dot(down.reshape(-1, down.shape[-1]), up, precision=lax.Precision.HIGHEST)
        total = total + product.reshape(leaf.shape)
    if diff is not None:
        total = total + diff
    return total.astype(leaf.dtype)


@functools.cache
def _add_to_stack(*, as_bits: bool) -> Callable[..., Array]:
    """_add() for a stack, a layer at a time, in place: in float32 it would take twice its memory.

    as_bits: the stack goes through the loop as integers. XLA's CPU would convert all of a bfloat16
    stack, there and back, for each of its layers. Kept, so that jax knows the function again.
    """

    def add(leaf: Array, factors: tuple[Array, Array] | None, diff: Array | None) -> Array:
        carried = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}") if as_bits else leaf.dtype

        def body(i: Array, stack: Array) -> Array:
            layer, *rest = jax.tree.map(lambda x: x[i], (stack, factors, diff))
            total = _add(lax.bitcast_convert_type(layer, leaf.dtype), *rest)
            total = lax.bitcast_convert_type(total, carried)
            return lax.dynamic_update_index_in_dim(stack, total, i, 0)

        stack = lax.bitcast_convert_type(leaf, carried)
        return lax.bitcast_convert_type(lax.fori_loop(0, leaf.shape[0], body, stack), leaf.dtype)

    return add


_add_to_layer = jax.jit(_add, donate_argnums=0)


def _added_on_host(
    leaf: Array,
    factors: tuple[np.ndarray, np.ndarray] | None,
    diff: np.ndarray | None,
    *,
    donate: bool,
) -> Array:
    """_add() for a stack in the host's memory: each layer of what a device has is brought to it."""
    found, where = [], leaf.sharding
    for shard in leaf.addressable_shards:
        own = np.array(shard.data)
        layers, *columns = shard.index
        for i, layer in enumerate(range(*layers.indices(leaf.shape[0]))):
            pair, part = None, None
            if factors is not None:
                down, up = factors[0][layer], factors[1][layer]
                pair = down[tuple(columns[:-1])], up[:, columns[-1]]
            if diff is not None:
                part = diff[layer][tuple(columns)]
            own[i] = _add_to_layer(jax.device_put(own[i], shard.device), pair, part)
        found.append((own, shard.data.sharding))
    if donate:
        leaf.delete()
    placed = [jax.device_put(own, place) for own, place in found]
    return jax.make_array_from_single_device_arrays(leaf.shape, where, placed)


# Writing


def write(path: Path, lora: Lora, *, naming: str) -> None:
    """Write a LoRA as safetensors in float32; the file appears when it is whole.

    naming: "diffusers", which Diffusers' load_lora_weights() takes, with alphas in the header; or
    "comfyui", the original's names with an alpha beside each pair. What is written reads back bit
    for bit: no alpha is multiplied into a factor, which would round, so readers that do not look
    into the header (Diffusers before 0.34, or given tensors and no file) take the rank for alpha.
    Raises ValueError for another naming or ending of the file, for numbers that are not finite, and
    for differences that the naming has no place for; OSError if the disk fails.
    """
    if naming not in lora_names.NAMES:
        raise ValueError(f"naming is {naming!r}; one of {lora_names.NAMES} is needed")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no name for a LoRA's file; one in .safetensors is needed")
    tensors: dict[str, np.ndarray] = {}
    described: dict[str, tuple[int, float]] = {}
    for name, pair in lora.pairs.items():
        _write_pair(tensors, described, name, pair, naming)
    for target, diff in lora.diffs.items():
        rule = _rule(target)
        name_of = lora_names.key(rule, 0, "diff", naming=naming)
        if name_of is None:
            raise ValueError(f"naming {naming!r} has no place for the difference of {target}")
        for i, layer in enumerate(diff if layers_of(target, diff.shape) else (diff,)):
            name_of = lora_names.key(rule, i, "diff", naming=naming)
            assert name_of is not None
            if layer.any():
                tensors[name_of] = rule.layout.invert(np.asarray(layer, np.float32))
    wrong = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if wrong or not tensors:
        raise ValueError(
            f"the LoRA for {path} has values that are not finite: {', '.join(wrong[:5])}"
            if wrong
            else f"the LoRA for {path} is empty; one with at least one product is needed"
        )
    metadata = {"format": "pt"}
    if naming == "diffusers":
        metadata[METADATA] = json.dumps(_peft(described), indent=2, sort_keys=True)
    whole = {name: np.array(tensor, order="C") for name, tensor in sorted(tensors.items())}
    with files.whole_or_nothing(path) as work:
        try:
            save_file(whole, work, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {one_line(error)}") from error
        work.chmod(0o644)  # the library lets only the owner read it


def _write_pair(
    tensors: dict[str, np.ndarray],
    described: dict[str, tuple[int, float]],
    path: str,
    pair: Pair,
    naming: str,
) -> None:
    """Add a product's tensors; described: {its module: (rank, alpha)}."""
    rule = _rule(f"{path}.kernel")
    axes = len(rule.layout.permute or ())
    for i, rank in enumerate(np.atleast_1d(pair.rank)):
        if not rank:
            continue
        at: Any = i if pair.rank.ndim else ...
        alpha = float(np.atleast_1d(pair.alpha)[i])
        up = pair.up[at][:rank].T
        found = {
            "down": rule.layout.invert(pair.down[at][..., :rank]),
            "up": up.reshape(*up.shape, *[1] * (axes - 2)),  # of a convolution one of size 1
            "alpha": _number(alpha),
        }
        for kind, tensor in found.items():
            name = lora_names.key(rule, i, kind, naming=naming)
            if name is not None:
                tensors[name] = tensor
        described[lora_names.module(rule, i, naming)] = int(rank), alpha


def _number(value: float) -> np.ndarray:
    """[] float32, as other programs have it, or float64 where that would change the value."""
    with np.errstate(over="ignore"):
        single = np.array(value, np.float32)
    return single if float(single) == value else np.array(value, np.float64)


def _peft(described: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """PEFT's configuration of these {module: (rank, alpha)}, as Diffusers stores it."""
    rank = Counter(rank for rank, _ in described.values()).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in described.values()).most_common(1)[0][0]
    # PEFT takes the names for regular expressions, each to be found at the end of a module's.
    ranks = {_pattern(name): own for name, (own, _) in described.items() if own != rank}
    alphas = {_pattern(name): own for name, (_, own) in described.items() if own != alpha}
    values = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": sorted(described),
    }
    return {f"transformer.{name}": value for name, value in values.items()}


def _pattern(name: str) -> str:
    return "^" + name.replace(".", r"\.")
