"""A converted checkpoint written back as safetensors, in the original's files or in Diffusers'.

The tables that convert a checkpoint are read backwards. A stacked parameter is in memory at a time,
besides the tensors of the file that is being filled.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from wan_jax.config import PARTS, CLIPConfig, Defaults, DiTConfig
from wan_jax.weights import checkpoint, clip, layouts, rules, trees
from wan_jax.weights.checkpoint import OnBytes
from wan_jax.weights.descriptions import LAYOUTS, describe, pipeline
from wan_jax.weights.facts import one_line, read_json
from wan_jax.weights.folders import alone, check_space, check_writable, written_whole
from wan_jax.weights.rules import Rule, Shape, Table
from wan_jax.weights.sources import DEFAULTS_FILE, PartConfig, abstract_part, part_table
from wan_jax.weights.writers import save_tensors, write_json

DTYPES = ("source", "float32", "bfloat16", "float16")
MAX_SHARD = 5 * 10**9  # bytes, as in Diffusers and transformers
_GROUP_BYTES = 2**27  # small parameters are read together, up to this size
_NAMINGS = {"original": "wan", "diffusers": "diffusers"}
_TOKENIZERS = {"original": "google/umt5-xxl", "diffusers": "tokenizer"}
_PLACES = {  # of the files, without what comes after the name of the first
    "original": {
        "dit": Path("diffusion_pytorch_model"),
        "vae": Path("Wan2.1_VAE"),
        "umt5": Path("models_t5_umt5-xxl-enc-bf16"),
    },
    "diffusers": layouts.DIFFUSERS,
}


@dataclasses.dataclass(frozen=True)
class _Network:
    """One network of a checkpoint and what is written of it.

    leaves: {target: shape and stored dtype}. kinds: {tensor name in the layout's naming: dtype to
    write}. exact: where that dtype would lose anything, the stored one is written. stand_ins:
    {tensor that a reader needs and the checkpoint has not: one of its shape and dtype}.
    """

    part: str
    path: Path
    config: PartConfig
    table: Table
    leaves: Mapping[str, np.ndarray]
    kinds: Mapping[str, np.dtype]
    naming: str
    exact: bool
    stand_ins: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, Shape]:
        """{tensor name: shape} of what is written."""
        found: dict[str, Shape] = {}
        for rule in self.table.rules:
            shape = self.leaves[rule.target].shape
            names = itertools.chain.from_iterable(rule.names(self.naming, shape))
            found |= dict.fromkeys(names, rule.source_shape(self.naming, shape))
        return found | {name: found[like] for name, like in self.stand_ins.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are written."""
        return sum(math.prod(s) * self.kinds[n].itemsize for n, s in self.shapes.items())

    def cast(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """The tensor in the dtype it is written in; ValueError if it holds more than that does."""
        kind = self.kinds[name]
        if kind == tensor.dtype:
            return tensor
        with np.errstate(over="ignore"):
            cast = tensor.astype(kind)
        if self.exact:
            return cast if np.array_equal(cast.astype(tensor.dtype), tensor) else tensor
        if not np.isfinite(cast).all():
            raise ValueError(
                f"dtype {kind.name} cannot hold {name} of the {self.part}, which goes up to "
                f"{np.abs(tensor).max():.3g}; source, float32 or bfloat16 can"
            )
        return cast


def write(
    src: Path,
    dst: Path,
    *,
    layout: str,
    parts: Sequence[str] | None = None,
    dtype: str = "source",
    max_shard: int = MAX_SHARD,
    on_bytes: OnBytes | None = None,
) -> None:
    """Write the checkpoint at `src` as PyTorch programs read it; `dst` appears when it is whole.

    layout: one of LAYOUTS. parts: None writes all that are there. dtype: one of DTYPES; "source"
    gives every tensor the dtype it had before it was converted, unless that would change what is
    stored now. max_shard: bytes of a file; the original's VAE and text encoder are one file each,
    whatever their size, for what reads them knows no shards. on_bytes(done, total) reports bytes of
    the checkpoint. A checkpoint has neither the last block of CLIP nor the norm behind it, and
    transformers wants both: the block is written so that it adds nothing. Raises ValueError, before
    anything is written, if `src` is no checkpoint or lacks a part, `dst` exists, the disk is too
    small, or the layout has no place for a network or a property of it.
    """
    if layout not in LAYOUTS or dtype not in DTYPES or max_shard < 1:
        raise ValueError(
            f"--layout {layout!r}, --dtype {dtype!r}, --max_shard_size of {max_shard} bytes given; "
            f"needed are one of {LAYOUTS}, one of {DTYPES} and a positive size"
        )
    check_writable(dst.parent)
    with alone(dst):
        if dst.exists() or dst.is_symlink():
            raise ValueError(f"--dst {dst} exists already; give the name of a folder that does not")
        chosen = _chosen(src, parts, layout)
        networks = {part: _open(src, part, layout=layout, dtype=dtype) for part in chosen}
        configs = {
            part: describe(part, network.config, network.shapes, layout=layout)
            for part, network in networks.items()
        }
        others = _other_files(src, layout, networks)
        needed = sum(network.nbytes for network in networks.values()) + checkpoint.SPARE
        check_space(dst.parent, needed, remedy="choose another --dst")
        with written_whole(dst, is_whole=lambda _: False) as work:
            _write_networks(work, networks, layout=layout, max_shard=max_shard, on_bytes=on_bytes)
            for part, values in configs.items():
                if values is not None:
                    others[_PLACES[layout][part].with_name(checkpoint.CONFIG)] = values
            for file, values in others.items():
                write_json(work / file, values)
            if "umt5" in networks:
                checkpoint.copy_files(src / checkpoint.TOKENIZER, work / _TOKENIZERS[layout])


def _chosen(src: Path, parts: Sequence[str] | None, layout: str) -> list[str]:
    """The parts to write, in their usual order."""
    if not checkpoint.is_checkpoint(src):
        raise ValueError(
            f"--src {src} is not a converted checkpoint; needed is a local folder that "
            f"convert/to_orbax.py wrote, with {checkpoint.CONFIG} and {checkpoint.MANIFEST}"
        )
    there = [part for part in PARTS if part in checkpoint.read_manifest(src)["parts"]]
    wanted = there if parts is None else list(parts)
    unknown = [part for part in wanted if part not in PARTS]
    if unknown or not wanted:
        raise ValueError(f"--parts is {','.join(wanted)!r}; needed are some of {','.join(PARTS)}")
    missing = [part for part in wanted if part not in there]
    if missing:
        raise ValueError(
            f"parts has {','.join(missing)} and {src} has not; it has {','.join(there)}"
        )
    if "clip" in wanted and layout == "original":
        others = ",".join(part for part in there if part != "clip")
        raise ValueError(
            "layout original has CLIP in one file with a text tower, of which a checkpoint has "
            f"none; take the released {layouts.CLIP_PTH} and export the rest with --parts {others}"
        )
    if "umt5" in wanted and not (src / checkpoint.TOKENIZER).is_dir():
        raise ValueError(f"{src / checkpoint.TOKENIZER} is missing, which belongs to the umt5")
    return [part for part in PARTS if part in wanted]


def _open(src: Path, part: str, *, layout: str, dtype: str) -> _Network:
    """What there is of a network; ValueError if its folder does not hold what config.json says."""
    config = checkpoint.read_part_config(src, part)
    targets = trees.flatten(abstract_part(config, jnp.dtype(jnp.float32)))
    path, table, naming = (src / part).absolute(), part_table(config), _NAMINGS[layout]
    try:
        stored = dict(ocp.metadata(path).metadata)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a whole Orbax checkpoint: {one_line(error)}") from error
    if {n: leaf.shape for n, leaf in stored.items()} != {n: t.shape for n, t in targets.items()}:
        raise ValueError(f"{path} does not hold the arrays that {src / checkpoint.CONFIG} says")
    # Arrays of one element that all indices share: only their shapes and dtypes are asked for.
    leaves = {n: np.broadcast_to(np.zeros((), s.dtype), s.shape) for n, s in stored.items()}
    entry = checkpoint.read_manifest(src)["parts"][part]
    try:
        kinds = _source_dtypes(table, leaves, entry, naming=naming)
    except (AttributeError, KeyError, TypeError) as error:
        file = src / checkpoint.MANIFEST
        raise ValueError(f"{file} does not say what the {part} was: {one_line(error)}") from error
    stand_ins = clip.stand_ins(config) if isinstance(config, CLIPConfig) else {}
    kinds |= {name: kinds[like] for name, like in stand_ins.items()}
    if dtype != "source":
        kinds = dict.fromkeys(kinds, np.dtype(dtype))
    exact = dtype == "source"
    return _Network(part, path, config, table, leaves, kinds, naming, exact, stand_ins)


def _source_dtypes(
    table: Table, leaves: Mapping[str, np.ndarray], entry: Mapping[str, Any], *, naming: str
) -> dict[str, np.dtype]:
    """{tensor name in `naming`: dtype of its source}, from a network's entry in the manifest."""
    # The entry has the source's own names, among them second names of tied tensors.
    exceptions = {table.aliases.get(name, name): kind for name, kind in entry["dtypes"].items()}
    kinds: dict[str, np.dtype] = {}
    for rule in table.rules:
        shape = leaves[rule.target].shape
        groups = rule.names(naming, shape), rule.names(entry["naming"], shape)
        for names, sources in zip(*groups, strict=True):
            stored = [np.dtype(exceptions.get(name, entry["dtype"])) for name in sources]
            if len(names) != len(sources):  # joined in one naming only: the widest holds them all
                stored = [max(stored, key=lambda kind: kind.itemsize)] * len(names)
            kinds |= dict(zip(names, stored, strict=True))
    return kinds


def _other_files(
    src: Path, layout: str, networks: Mapping[str, _Network]
) -> dict[Path, dict[str, Any]]:
    """{file: contents} of what belongs to the checkpoint as a whole.

    A pipeline of Diffusers has all parts; without one of them there is none to describe.
    """
    if "dit" not in networks:
        return {}
    try:
        defaults = Defaults.from_dict(read_json(src / checkpoint.CONFIG)["defaults"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{src / checkpoint.CONFIG} has no defaults: {one_line(error)}") from error
    files: dict[Path, dict[str, Any]] = {Path(DEFAULTS_FILE): defaults.to_dict()}
    config = networks["dit"].config
    assert isinstance(config, DiTConfig)
    if layout == "diffusers" and set(networks) == set(config.parts):
        tower = networks["clip"].config if "clip" in networks else None
        assert isinstance(tower, CLIPConfig | None)
        files |= pipeline(tower, defaults, src / checkpoint.TOKENIZER)
    return files


def _write_networks(
    work: Path,
    networks: Mapping[str, _Network],
    *,
    layout: str,
    max_shard: int,
    on_bytes: OnBytes | None,
) -> None:
    sizes = [leaf.nbytes for network in networks.values() for leaf in network.leaves.values()]
    total, done = sum(sizes), 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if on_bytes is not None:
            on_bytes(min(done, total - 1), total)

    progress(0)
    for part, network in networks.items():
        limit = None if layout == "original" and part != "dit" else max_shard
        save_tensors(work / _PLACES[layout][part], _tensors(network, progress), limit=limit)
    if on_bytes is not None:
        on_bytes(total, total)


def _tensors(
    network: _Network, progress: Callable[[int], None]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, tensor); progress is called with the bytes of each in the checkpoint."""
    table = network.table.rules
    starts = itertools.accumulate((network.leaves[r.target].nbytes for r in table), initial=0)
    pairs = zip(table, starts)
    for _, group in itertools.groupby(pairs, key=lambda pair: pair[1] // _GROUP_BYTES):
        todo = [rule for rule, _ in group]
        arrays = _load(network, [rule.target for rule in todo])
        for rule in todo:
            # Handed over, so that it is gone before the next is read, which takes twice its size.
            yield from _unstack(network, rule, arrays.pop(rule.target), progress)
    shapes = network.shapes
    for name in network.stand_ins:
        yield name, clip.stand_in(name, shapes[name], network.kinds[name])


def _load(network: _Network, targets: Sequence[str]) -> dict[str, np.ndarray]:
    """Some of a network's arrays, on the host."""
    wanted = {
        name: leaf if name in targets else ocp.PLACEHOLDER for name, leaf in network.leaves.items()
    }
    try:
        arrays = ocp.load(network.path, wanted)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{network.path} is not a whole Orbax checkpoint: {one_line(error)}"
        ) from error
    return {name: arrays[name] for name in targets}


def _unstack(
    network: _Network, rule: Rule, array: np.ndarray, progress: Callable[[int], None]
) -> Iterator[tuple[str, np.ndarray]]:
    one = rules.export(Table((rule,)), {rule.target: array}, naming=network.naming)
    del array
    for name, tensor in one:
        yield name, network.cast(name, tensor)
        progress(tensor.nbytes)
