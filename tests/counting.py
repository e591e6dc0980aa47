"""What programs compute and tell each other, counted in what they are made of."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_SIZES = {"bf16": 2, "f32": 4, "f16": 2, "s32": 4, "pred": 1, "u8": 1}
_COLLECTIVE = re.compile(
    r"= (.*?) (all-to-all|all-gather|collective-permute|all-reduce)(?:-start)?\((.*)"
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def products(jaxpr: Any) -> int:
    """Multiplications and additions of every matrix product and convolution of a jaxpr."""
    total = 0
    for eqn in jaxpr.eqns:
        name, out = eqn.primitive.name, eqn.outvars[0].aval
        if name == "dot_general":
            (axes, _), _ = eqn.params["dimension_numbers"]
            total += 2 * math.prod(out.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in axes)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            outputs = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(out.shape) * math.prod(kernel) // outputs
        times = eqn.params["length"] if name == "scan" else 1
        total += times * sum(products(inner) for inner in _inner(eqn.params))
    return total


def _inner(parameters: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation, bodies of loops and calls."""
    for value in parameters.values():
        found = getattr(value, "jaxpr", value)
        if hasattr(found, "eqns"):
            yield found


class Collective(NamedTuple):
    """One in the text of a compiled program. bytes: of its result. times: how often it runs.

    group: devices that tell each other.
    """

    kind: str
    bytes: int
    times: int
    group: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time."""
        if self.kind == "collective-permute":
            return self.bytes
        share = (self.group - 1) / self.group
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


def collectives(text: str) -> list[Collective]:
    """All of a compiled program's."""
    bodies = _computations(text)
    times = _times(bodies)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match:
                shape, kind, rest = match.groups()
                found.append(Collective(kind, _bytes(shape), times.get(name, 1), _group(rest)))
    return found


def _computations(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = line.split("(")[0].removeprefix("ENTRY").strip().strip("%")
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def _times(bodies: dict[str, list[str]]) -> dict[str, int]:
    """{computation: how often it runs}, for bodies of loops, and what they call."""
    calls: dict[str, list[tuple[str, int]]] = {}
    for name, lines in bodies.items():
        for line in lines:
            count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for called in re.findall(
                r"(?:body|to_apply|calls|called_computations=\{)=?%?([\w.-]+)", line
            ):
                loops = int(count[1]) if count and f"body=%{called}" in line else 1
                calls.setdefault(name, []).append((called, loops))
    times: dict[str, int] = {}

    def visit(name: str, factor: int) -> None:
        times[name] = times.get(name, 0) + factor
        for called, loops in calls.get(name, ()):
            visit(called, factor * loops)

    called = {name for pairs in calls.values() for name, _ in pairs}
    for name in bodies:
        if name not in called:
            visit(name, 1)
    return times


def _bytes(shape: str) -> int:
    sizes = [
        _SIZES[kind] * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in _ARRAY.findall(shape)
        if kind in _SIZES
    ]
    return sum(sizes)


def _group(rest: str) -> int:
    """Devices in a group, as any release of jaxlib writes it; 1 where nothing is said."""
    axes = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest)
    if axes:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes[2]))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return listed[1].count(",") + 1
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    return int(iota[1]) if iota else 1
