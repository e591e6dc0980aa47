"""Tables that map parameter names and layouts of PyTorch files to ours, total both ways.

A table is a list of rules; a rule says which source tensor fills which target and how its axes
move. Nothing here knows a model. Names are matched before a tensor is read, and every name on
either side must be accounted for: resolve() returns a plan or raises one report of six lists.
"""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import jax
import numpy as np

Shape = tuple[int, ...]
Abstract = jax.ShapeDtypeStruct | jax.Array | np.ndarray  # only the shape and dtype are read
NAMINGS = ("wan", "diffusers")
_ALIGNED = 64  # bytes
_JOINED = re.compile(r"\{(\w+(?:,\w+)+)\}")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a source array becomes a target array: drop unit axes, then permute; invertible."""

    squeeze: tuple[int, ...] = ()
    permute: tuple[int, ...] | None = None

    def apply(self, source: np.ndarray) -> np.ndarray:
        array = np.squeeze(source, self.squeeze) if self.squeeze else source
        return array if self.permute is None else array.transpose(self.permute)

    def invert(self, target: np.ndarray) -> np.ndarray:
        array = target if self.permute is None else target.transpose(np.argsort(self.permute))
        for axis in self.squeeze:
            array = np.expand_dims(array, axis)
        return array

    def source_shape(self, target: Shape) -> Shape:
        """Shape of the source tensor that fills a target of this shape."""
        order = np.argsort(self.permute) if self.permute is not None else range(len(target))
        shape = [target[axis] for axis in order]
        for axis in self.squeeze:
            shape.insert(axis, 1)
        return tuple(shape)


SAME = Layout()
LINEAR = Layout(permute=(1, 0))  # [out, in] -> [in, out]
CONV2D = Layout(permute=(0, 2, 3, 1))  # OIHW -> OHWI
CONV3D = Layout(permute=(0, 2, 3, 4, 1))  # OIDHW -> ODHWI


@dataclasses.dataclass(frozen=True)
class Rule:
    """One target and the tensor that fills it, in both namings.

    Where the names hold `{i}` the target is a stack: its leading axis counts the layers, and layer
    i comes from the source whose name has i in that place. Where a name holds alternatives, such as
    `{q,k,v}`, it stands for a tensor each: of equal shapes, joined along their first axis in this
    order before the layout applies. The other naming may store them as one. wan_layout: the layout
    in Wan2.1's naming, where it is not that of Diffusers.
    """

    target: str
    wan: str
    diffusers: str
    layout: Layout = SAME
    wan_layout: Layout | None = None

    def source(self, naming: str) -> str:
        return {"wan": self.wan, "diffusers": self.diffusers}[naming]

    def layout_in(self, naming: str) -> Layout:
        return self.wan_layout if naming == "wan" and self.wan_layout else self.layout

    @property
    def stacked(self) -> bool:
        return "{i}" in self.wan

    def names(self, naming: str, shape: Shape) -> list[tuple[str, ...]]:
        """The tensors that fill a target of this shape: a group for it, or for each layer of it."""
        group = _alternatives(self.source(naming))
        layers = range(shape[0]) if self.stacked else (0,)
        return [tuple(name.replace("{i}", str(i)) for name in group) for i in layers]

    def source_shape(self, naming: str, shape: Shape) -> Shape:
        """The shape of each of the tensors that fill a target of this shape."""
        whole = self.layout_in(naming).source_shape(shape[1:] if self.stacked else shape)
        count = len(_alternatives(self.source(naming)))
        return whole if count == 1 else (whole[0] // count, *whole[1:])


def _alternatives(name: str) -> list[str]:
    """The names that `a.{q,k,v}.b` stands for; one for a name without alternatives."""
    found = _JOINED.search(name)
    return [name.replace(found[0], word) for word in found[1].split(",")] if found else [name]


@dataclasses.dataclass(frozen=True)
class Table:
    """The rules of one network, and the source names that are left out on purpose.

    aliases maps a second name of a tensor to the one the rules use (tied weights are stored under
    either or both). ignored maps a regular expression of source names to the reason.
    """

    rules: tuple[Rule, ...]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Assignment:
    """One target, the source names that fill it in order, and how.

    groups: the names for the target, or for each layer of a stack; those of a group are joined.
    """

    target: str
    abstract: Abstract
    groups: tuple[tuple[str, ...], ...]
    source_shape: Shape
    layout: Layout
    stacked: bool

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(itertools.chain.from_iterable(self.groups))


class MismatchError(ValueError):
    """Names, shapes or dtypes of a checkpoint do not fit the table."""


class Reader(Protocol):
    """What a source of tensors offers (see readers.py)."""

    def shapes(self) -> Mapping[str, tuple[Shape, str]]: ...

    def read(self, name: str) -> np.ndarray: ...


def _report(lists: Mapping[str, list[str]], what: str) -> str:
    lines = [f"{what} does not fit:"]
    for title, names in lists.items():
        shown = ", ".join(sorted(names)[:8]) + (f", ... {len(names)} in all" if names[8:] else "")
        lines.append(f"  {title}: {shown or '-'}")
    return "\n".join(lines)


def resolve(
    table: Table,
    targets: Mapping[str, Abstract],
    *,
    naming: str,
    names: Sequence[str],
    what: str = "checkpoint",
) -> list[Assignment]:
    """The plan that fills every target from every source name exactly once.

    targets: {path: abstract array}; names: the source's tensor names; what: how errors call it.
    Raises MismatchError with six lists: source unused, absent, used twice; target unfilled,
    unknown, assigned twice.
    """
    present = set(names)
    renamed = {alias: name for alias, name in table.aliases.items() if alias in present}
    actual = {name: alias for alias, name in renamed.items() if name not in present}
    second = {alias for alias, name in renamed.items() if name in present}
    ignored = {n for n in present if any(re.fullmatch(pattern, n) for pattern in table.ignored)}

    known = [(rule, targets[rule.target]) for rule in table.rules if rule.target in targets]
    plan = [
        Assignment(
            rule.target,
            leaf,
            tuple(
                tuple(actual.get(n, n) for n in group) for group in rule.names(naming, leaf.shape)
            ),
            rule.source_shape(naming, leaf.shape),
            rule.layout_in(naming),
            rule.stacked,
        )
        for rule, leaf in known
    ]
    uses = Counter(name for item in plan for name in item.sources)
    fills = Counter(rule.target for rule in table.rules)
    lists = {
        "source tensors unused": list(present - set(uses) - ignored - second),
        "source tensors absent": list(set(uses) - present),
        "source tensors used twice": [name for name, count in uses.items() if count > 1],
        "targets unfilled": list(set(targets) - set(fills)),
        "targets unknown": [rule.target for rule in table.rules if rule.target not in targets],
        "targets assigned twice": [target for target, count in fills.items() if count > 1],
    }
    if any(lists.values()):
        raise MismatchError(_report(lists, what))
    return plan


def check_shapes(plan: Sequence[Assignment], reader: Reader, *, what: str = "checkpoint") -> None:
    """Raise MismatchError naming every tensor whose shape or dtype cannot fill its target."""
    shapes = reader.shapes()
    wrong = []
    for item in plan:
        for name in item.sources:
            shape, dtype = shapes[name]
            if shape != item.source_shape:
                wrong.append(f"{name} has shape {list(shape)}, needed {list(item.source_shape)}")
            elif dtype not in ("float32", "float16", "bfloat16"):
                wrong.append(f"{name} is stored as {dtype}, needed float32, float16 or bfloat16")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise MismatchError(f"{what} does not fit: " + "; ".join(wrong[:5]) + more)


def apply(
    plan: Sequence[Assignment],
    reader: Reader,
    *,
    what: str = "checkpoint",
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (target path, array in the target's shape and dtype), one target in memory at a time.

    progress is called with the number of bytes read after each source tensor, or group of them
    that is joined. Raises MismatchError naming a tensor that holds NaN or infinite values, as
    damaged files do, or would in the dtype.
    """
    for item in plan:
        dtype = np.dtype(item.abstract.dtype)
        target = _empty(item.abstract.shape, dtype)
        for i, group in enumerate(item.groups):
            sources = [reader.read(name) for name in group]
            count = sum(source.nbytes for source in sources)
            source = sources[0]
            if len(sources) > 1:
                source = np.concatenate(sources, dtype=dtype, casting="unsafe")
            part = target[i] if item.stacked else target
            with np.errstate(over="ignore"):
                part[...] = item.layout.apply(source)
            if not np.isfinite(part).all():
                raise MismatchError(_not_finite(sources, group, dtype, what))
            if progress is not None:
                progress(count)
            del source, sources
        yield item.target, target
        del target, part  # or they would live on while the next one is filled


def _empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An array that JAX on the CPU takes as it stands, where another one it would copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNED, np.uint8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + size].view(dtype).reshape(shape)


def _not_finite(
    sources: Sequence[np.ndarray], group: Sequence[str], dtype: np.dtype, what: str
) -> str:
    for name, source in zip(group, sources, strict=True):
        if not np.isfinite(source).all():
            return f"{what} is damaged: {name} holds NaN or infinite values"
    most = max(float(np.abs(source).max()) for source in sources)
    return f"{what} does not fit: {' and '.join(group)} goes up to {most}, beyond {dtype}"


def export(
    table: Table, arrays: Mapping[str, np.ndarray], *, naming: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (source name, array in the source's layout): apply() backwards, dtypes kept."""
    for rule in table.rules:
        array = np.asarray(arrays[rule.target])
        groups = rule.names(naming, array.shape)
        parts = array if rule.stacked else (array,)
        for group, part in zip(groups, parts, strict=True):
            source = rule.layout_in(naming).invert(part)
            pieces = (source,) if len(group) == 1 else np.split(source, len(group))
            for name, piece in zip(group, pieces, strict=True):
                yield name, np.ascontiguousarray(piece)
