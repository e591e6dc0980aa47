"""LoRA read from safetensors, whoever wrote them; names are told apart in lora_names.py."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from wan_jax.config import DiTConfig
from wan_jax.weights import lora_names, trees
from wan_jax.weights.facts import one_line
from wan_jax.weights.lora import METADATA, RULES, Lora, Pair, layers_of
from wan_jax.weights.lora_names import Meaning
from wan_jax.weights.readers import SafetensorsReader
from wan_jax.weights.rules import MismatchError, Shape
from wan_jax.weights.sources import abstract_part

_FLOATS = ("float32", "float16", "bfloat16")
_DAMAGED = (AttributeError, TypeError, ValueError, OverflowError, RecursionError, re.error)
_BESIDE = "adapter_config.json"  # where PEFT without Diffusers keeps alpha
# A pattern has up to 12 alternatives, a repetition counting as 4, and so up to 2**12 ways to fail.
# Of all patterns together they are limited, each counting as 2**6 at least: 1024 plain ones.
_ALTERNATIVES, _AS_REPEAT, _LEAST, _WAYS = 12, 4, 6, 2**16


def read(path: Path, config: DiTConfig) -> Lora:
    """The LoRA in a safetensors file for the network of this configuration.

    Names are Diffusers' and PEFT's, ComfyUI's (the original's) or kohya's. alpha is the product's
    own, or that of the header's PEFT configuration, or else the rank. Raises ValueError naming the
    file if it holds anything that is not used, lacks a half of a pair, does not fit the network,
    has numbers that are not finite, or is PEFT's own with another alpha in the file beside it.
    """
    return _File(path, config).read()


def check(path: Path, config: DiTConfig) -> None:
    """Raise as read() does for all that the file's header tells."""
    _File(path, config)


class _File:
    """A LoRA's file whose header was checked against a network."""

    def __init__(self, path: Path, config: DiTConfig) -> None:
        self._path, self._config = path, config
        self._reader = SafetensorsReader([path])
        shapes = self._reader.shapes()
        self._shapes = {name: shape for name, (shape, _) in shapes.items()}
        abstract = trees.flatten(abstract_part(config, jnp.dtype(jnp.float32)))
        self._targets: dict[str, Shape] = {name: leaf.shape for name, leaf in abstract.items()}
        self._meanings = self._understood()
        # {(parameter, layer): {kind: name}}; a bias counts with the product it belongs to.
        self._groups: dict[tuple[str, int], dict[str, str]] = defaultdict(dict)
        self._sort()
        self._check_pairs()
        wrong = [n for n, (_, kind) in shapes.items() if kind not in _FLOATS]
        wrong = [n for n in wrong if self._meanings[n].kind != "alpha"]
        if wrong:
            kinds = ", ".join(sorted({shapes[name][1] for name in wrong}))
            raise self._error(f"is stored as {kinds}; needed are {', '.join(_FLOATS)}", wrong)
        found = _settings(path)
        self._settings = found or _Settings()
        if found is None and any(map(lora_names.is_peft, self._shapes)):
            self._check_beside()

    def _error(self, text: str, names: list[str]) -> MismatchError:
        shown = ", ".join(sorted(names)[:5]) + (f", ... {len(names)} in all" if names[5:] else "")
        return MismatchError(f"{self._path} {text}{': ' if names else ''}{shown}")

    def _understood(self) -> dict[str, Meaning]:
        """{name in the file: its meaning}; every name has one."""
        if not self._shapes:
            raise self._error("is empty; a LoRA is needed", [])
        text = [name for name in self._shapes if lora_names.is_text(name)]
        if text:
            raise self._error("changes a text encoder, which is not supported", text)
        names = lora_names.names_of(self._config)
        found = {name: names.meaning(name) for name in self._shapes}
        known = {name: meaning for name, meaning in found.items() if meaning is not None}
        self._check_width(known)
        unknown = [name for name in self._shapes if name not in known]
        if unknown:
            every = lora_names.all_names(self._config.num_layers)
            if all(every.meaning(name) is not None for name in unknown):
                kind = "is of a network that takes an image, and this one does not take it so"
                raise self._error(kind, unknown)
            raise self._error(
                f"has tensors that are none of a LoRA of this network, which has "
                f"{self._config.num_layers} blocks (pairs lora_A and lora_B, or lora_down and "
                "lora_up, with alpha, and diff, diff_b, diff_m can be read)",
                unknown,
            )
        return known

    def _check_width(self, known: Mapping[str, Meaning]) -> None:
        """Say it in a line where the LoRA is one of a network of another width."""
        width = self._config.dim
        for name, meaning in known.items():
            kernel = self._targets[meaning.rule.target]
            shape = self._shapes[name]
            if meaning.kind == "down" and len(shape) == 2 and kernel[1:-1] == (width,) != shape[1:]:
                raise self._error(
                    f"is a LoRA of a network of width {shape[1]}, and this one has width {width}",
                    [],
                )

    def _sort(self) -> None:
        for name, meaning in self._meanings.items():
            target, kind = meaning.rule.target, meaning.kind
            if kind == "bias":
                target = target.removesuffix("bias") + "kernel"
            group = self._groups[target, meaning.layer]
            if kind in group:
                raise self._error("holds two tensors for one thing", [group[kind], name])
            group[kind] = name

    def _check_pairs(self) -> None:
        halves, wrong = [], []
        for (target, _), group in self._groups.items():
            if "down" in group and "up" in group:
                wrong += self._misfits(target, group)
            elif set(group) - {"diff"}:
                halves += [name for kind, name in group.items() if kind != "diff"]
            if "diff" in group:
                needed = self._source_shape(target, self._meanings[group["diff"]])
                wrong += self._unless(group["diff"], needed)
        if halves:
            raise self._error("has not both halves of a pair (lora_A, lora_B) for", halves)
        if wrong:
            more = f"; and {len(wrong) - 3} more" if wrong[3:] else ""
            raise self._error(f"does not fit the network: {'; '.join(wrong[:3])}{more}", [])

    def _check_beside(self) -> None:
        """Refuse alphas that are beside the file: it would mean another thing elsewhere."""
        beside = self._path.parent / _BESIDE
        if not beside.is_file():
            return
        try:
            text = beside.read_bytes()
        except OSError as error:
            raise ValueError(f"{beside} cannot be read: {one_line(error)}") from error
        theirs = _parsed(self._path, f"{_BESIDE} beside it", text)
        for group in self._groups.values():
            if "down" not in group or "alpha" in group:
                continue
            module, rank = self._meanings[group["down"]].module, self._shapes[group["down"]][0]
            alpha = theirs.alpha(module, rank)
            if alpha != rank:
                raise self._error(
                    f"has no alpha, and {_BESIDE} beside it, which is not read, says {alpha:g} at "
                    f"rank {rank} of {module}; needed is that JSON in the file's own header, as "
                    f"{METADATA}",
                    [],
                )

    def _source_shape(self, target: str, meaning: Meaning) -> Shape:
        """The shape that the parameter, or one layer of it, has in a file."""
        shape = self._targets[target]
        layer = shape[len(layers_of(target, shape)) :]
        return meaning.rule.layout.source_shape(layer)

    def _misfits(self, target: str, group: Mapping[str, str]) -> list[str]:
        down, up = self._shapes[group["down"]], self._shapes[group["up"]]
        out, *inner = self._source_shape(target, self._meanings[group["down"]])
        rank = down[0] if down else 0
        # Of a convolution the factors may be convolutions or products.
        found = []
        if not rank or down[1:] not in (tuple(inner), (math.prod(inner),)):
            found.append(f"{group['down']} has shape {list(down)}, needed {['rank', *inner]}")
        if up not in ((out, rank), (out, rank, *[1] * (len(inner) - 1))):
            found.append(f"{group['up']} has shape {list(up)}, needed {[out, rank]}")
        if "bias" in group:
            found += self._unless(group["bias"], (out,))
        if "alpha" in group and math.prod(self._shapes[group["alpha"]]) != 1:
            found.append(f"{group['alpha']} is not one number")
        return found

    def _unless(self, name: str, needed: Shape) -> list[str]:
        """What is wrong with a shape; unit axes before it do not count."""
        shape = self._shapes[name]
        if _plain(shape) == _plain(needed):
            return []
        return [f"{name} has shape {list(shape)}, needed {list(needed)}"]

    def read(self) -> Lora:
        """What the file holds; ValueError for numbers that are not finite."""
        stacks: dict[str, dict[int, dict[str, str]]] = defaultdict(dict)
        for (target, layer), group in self._groups.items():
            stacks[target][layer] = group
        pairs: dict[str, Pair] = {}
        diffs: dict[str, np.ndarray] = {}
        for target, groups in stacks.items():
            if any("down" in group for group in groups.values()):
                pair = self._pair(target, groups)
                pairs[target.removesuffix(".kernel")] = pair
            for layer, group in groups.items():
                if "diff" in group:
                    self._add(diffs, target, layer, self._tensor(group["diff"]))
                if "bias" in group:
                    pair = pairs[target.removesuffix(".kernel")]
                    scale = np.atleast_1d(pair.scale)[layer]
                    bias = (scale * self._tensor(group["bias"])).astype(np.float32)
                    self._add(diffs, target.removesuffix("kernel") + "bias", layer, bias)
        return Lora(pairs, diffs)

    def _pair(self, target: str, groups: Mapping[int, Mapping[str, str]]) -> Pair:
        shape = self._targets[target]
        layers = layers_of(target, shape)
        ranks = {
            i: self._shapes[group["down"]][0] for i, group in groups.items() if "down" in group
        }
        most = max(ranks.values())
        down = np.zeros((*shape[:-1], most), np.float32)
        up = np.zeros((*layers, most, shape[-1]), np.float32)
        alpha, rank = np.zeros(layers, np.float64), np.zeros(layers, np.int64)
        for i, r in ranks.items():
            group, at = groups[i], ((i,) if layers else ())
            meaning = self._meanings[group["down"]]
            inner = self._source_shape(target, meaning)[1:]
            factor = self._tensor(group["down"]).reshape(r, *inner)
            down[at][..., :r] = meaning.rule.layout.apply(factor)
            up[at][:r] = self._tensor(group["up"]).reshape(-1, r).T
            alpha[at], rank[at] = self._alpha(group, r), r
        return Pair(down, up, alpha, rank)

    def _add(
        self, diffs: dict[str, np.ndarray], target: str, layer: int, tensor: np.ndarray
    ) -> None:
        """Add the difference of one parameter, or of a layer of it, to those of the others."""
        shape = self._targets[target]
        layers = layers_of(target, shape)
        whole = diffs.setdefault(target, np.zeros(shape, np.float32))
        rule = RULES[target]
        source = tensor.reshape(rule.layout.source_shape(shape[len(layers) :]))
        at: Any = (layer,) if layers else ...
        whole[at] += rule.layout.apply(source)

    def _tensor(self, name: str) -> np.ndarray:
        tensor = self._reader.read(name).astype(np.float32)
        if not np.isfinite(tensor).all():
            raise self._error("is damaged: there are NaN or infinite values in", [name])
        return tensor

    def _alpha(self, group: Mapping[str, str], rank: int) -> float:
        if "alpha" in group:
            value = float(self._reader.read(group["alpha"]).reshape(()))
            if not math.isfinite(value):
                raise self._error(
                    "is damaged: there are NaN or infinite values in", [group["alpha"]]
                )
            return value
        return self._settings.alpha(self._meanings[group["down"]].module, rank)


def _plain(shape: Shape) -> Shape:
    """The shape without the unit axes before it."""
    return shape if not shape or shape[0] != 1 else _plain(shape[1:])


class _Settings(NamedTuple):
    """What PEFT's configuration says of alpha; without one it is the rank.

    patterns: {regular expression of modules: their alpha}; compiled, as re itself keeps but few.
    by_root: the scale is alpha / sqrt(rank), as with use_rslora.
    """

    usual: float | None = None
    patterns: Mapping[re.Pattern[str], float] = {}
    by_root: bool = False

    def alpha(self, module: str, rank: int) -> float:
        """Of a module, by its name without a prefix, so that its scale is alpha / rank."""
        own = (a for p, a in self.patterns.items() if p.match(module))
        found = next(own, self.usual)
        if found is None:
            return float(rank)
        return found * math.sqrt(rank) if self.by_root else found


def _settings(path: Path) -> _Settings | None:
    """From the header's PEFT configuration, if there is one; ValueError naming the file."""
    try:
        with safe_open(path, framework="numpy") as handle:
            text = (handle.metadata() or {}).get(METADATA)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
    return None if text is None else _parsed(path, METADATA, text)


def _parsed(path: Path, where: str, text: str | bytes) -> _Settings:
    """What PEFT's configuration of a file says; ValueError naming the file and where it is."""
    try:
        values = json.loads(text)
        # Diffusers puts the network's name before each; PEFT alone does not.
        own = {k.removeprefix("transformer."): v for k, v in values.items()}
        usual = None if own.get("lora_alpha") is None else _finite(own["lora_alpha"])
        patterns = _patterns(own.get("alpha_pattern") or {})
    except _DAMAGED as error:
        raise ValueError(f"{path} has a damaged {where}: {one_line(error)}") from error
    if own.get("use_dora"):
        raise ValueError(f"{path} is a DoRA, which is not supported; a LoRA is needed")
    return _Settings(usual, patterns, own.get("use_rslora") is True)


def _patterns(values: Mapping[str, Any]) -> dict[re.Pattern[str], float]:
    """Compiled; ValueError for those that could take long, alone or together, or are none."""
    found: dict[re.Pattern[str], float] = {}
    ways = 0
    for pattern, alpha in values.items():
        ways += 2 ** max(_LEAST, _alternatives(pattern))
        if ways > _WAYS:
            raise ValueError(
                f"its {len(values)} patterns are too many or too elaborate together; up to "
                f"{_WAYS >> _LEAST} plain ones, or {_WAYS >> _ALTERNATIVES} of the most "
                "elaborate, are read"
            )
        re.compile(pattern)  # on its own as well: "a)(b" is one only in brackets
        found[re.compile(_whole(pattern))] = _finite(alpha)
    return found


def _alternatives(pattern: str) -> int:
    """How many a pattern has, with its repetitions; ValueError where it could take long."""
    bare = re.sub(r"(?s)\\.", "x", pattern)
    # What only opens a group is no repetition. Others, with flags, could hide one behind spaces.
    bare = re.sub(r"\(\?(:|<?[=!]|P<\w+>)", "(", bare)
    count = bare.count("|") + _AS_REPEAT * len(re.findall(r"[*+?{]", bare))
    of_group = re.search(r"\)[*+?{]", bare)
    if len(pattern) > 200 or count > _ALTERNATIVES or of_group or "(?" in bare:
        raise ValueError(
            f"the pattern {pattern[:60]!r} is too elaborate; up to 200 characters and "
            f"{_ALTERNATIVES} alternatives are read, where a repetition counts as {_AS_REPEAT}, "
            "without flags and repetitions of a group"
        )
    return count


def _whole(pattern: str) -> str:
    """As peft.utils.other.get_pattern_key: an end of the module's name, at a dot."""
    return rf"(.*\.)?({pattern})$"


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"alpha is {value!r}; a finite number is needed")
    return float(value)
