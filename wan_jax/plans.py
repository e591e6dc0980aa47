"""How many devices do what for a video: guidance, Ulysses, ring; chosen, or as flags say.

The two branches of guidance come first, which exchange nothing but a velocity a step; then Ulysses,
as far as the heads divide; then a ring, which takes any number.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from wan_jax.sharding import GUIDANCE, RING, ULYSSES, Layout, make_mesh

# Weights that take no more of a device's memory are whole on each: gathering them costs time, and
# the rest is room for activations and the other networks.
_WHOLE_SHARE = 0.4


class Plan(NamedTuple):
    """Devices along each axis of the mesh, and whose weights are split over all of them.

    batch: devices, or groups of them, that make videos of their own.
    """

    batch: int = 1
    guidance: int = 1
    ring: int = 1
    ulysses: int = 1
    dit_fsdp: bool = False
    t5_fsdp: bool = False

    def layout(self, devices: Sequence[jax.Device] | None = None) -> Layout:
        """The layout on these devices, by default the first there are; ValueError for too few."""
        given = jax.devices() if devices is None else list(devices)
        if len(given) < self.devices:
            raise ValueError(f"the plan is for {self.devices} devices; there are {len(given)}")
        axes = {"guidance": self.guidance, "ring": self.ring, "ulysses": self.ulysses}
        return Layout(make_mesh(given[: self.devices], **axes))

    @property
    def split(self) -> tuple[str, ...]:
        """The networks whose weights are split."""
        return tuple(n for n, on in (("dit", self.dit_fsdp), ("umt5", self.t5_fsdp)) if on)

    @property
    def devices(self) -> int:
        """How many it is for."""
        return self.batch * self.guidance * self.ring * self.ulysses

    def __str__(self) -> str:
        axes = {GUIDANCE: self.guidance, ULYSSES: self.ulysses, RING: self.ring}
        parts = [f"{name} {count}" for name, count in axes.items() if count > 1]
        if self.devices == 1:
            return "1 device"
        text = f"{self.devices} devices: {' x '.join(parts) or 'everything on each'}"
        return text + (f"; weights of {' and '.join(self.split)} split" if self.split else "")


def choose(
    devices: int,
    *,
    heads: int,
    branches: int,
    ulysses: int | None = None,
    ring: int | None = None,
    dit_fsdp: bool | None = None,
    t5_fsdp: bool | None = None,
    weights: Mapping[str, int] | None = None,
    memory: int | None = None,
) -> Plan:
    """The plan for so many devices.

    heads: of the DiT. branches: 2 with guidance, else 1. ulysses, ring, dit_fsdp, t5_fsdp: as
    flags; None is chosen. weights: {network: bytes}, memory: bytes of a device, by which it is
    chosen whose weights are split; without them none are.
    Raises ValueError for what the devices or the heads do not allow, naming the nearest that they
    do.
    """
    for name, value in (("ulysses_size", ulysses), ("ring_size", ring)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; a positive number is needed")
    options = [
        plan
        for plan in _all(devices, heads, branches)
        if ulysses in (None, plan.ulysses) and ring in (None, plan.ring)
    ]
    if not options:
        raise ValueError(_refusal(devices, heads, branches, ulysses, ring))
    large = _large(weights or {}, memory) if devices > 1 else ()
    return options[0]._replace(
        dit_fsdp="dit" in large if dit_fsdp is None else dit_fsdp,
        t5_fsdp="umt5" in large if t5_fsdp is None else t5_fsdp,
    )


def _large(weights: Mapping[str, int], memory: int | None) -> tuple[str, ...]:
    """The networks that are to be split: of more than a share of the device's memory."""
    if memory is None:
        return ()
    return tuple(name for name, size in weights.items() if size > _WHOLE_SHARE * memory)


def _all(devices: int, heads: int, branches: int) -> list[Plan]:
    """Every plan that uses all devices, the best first."""
    found = []
    for guidance in (2, 1):
        if guidance > branches or devices % guidance:
            continue
        rest = devices // guidance
        sizes = [u for u in range(rest, 0, -1) if rest % u == 0 and heads % u == 0]
        found += [Plan(guidance=guidance, ring=rest // u, ulysses=u) for u in sizes]
    return found


def _refusal(devices: int, heads: int, branches: int, ulysses: int | None, ring: int | None) -> str:
    """Why these sizes cannot be, and the plan that is nearest to them."""

    def distance(plan: Plan) -> float:
        pairs = ((ulysses, plan.ulysses), (ring, plan.ring))
        return sum(abs(math.log2(own / wanted)) for wanted, own in pairs if wanted is not None)

    nearest = min(_all(devices, heads, branches), key=distance)
    flags = {"ulysses_size": ulysses, "ring_size": ring}
    given = ", ".join(f"{name} {value}" for name, value in flags.items() if value is not None)
    there = "one device" if devices == 1 else f"{devices} devices"
    why = f"the {heads} heads" if ulysses is not None and heads % ulysses else there
    return (
        f"{given} cannot be had with {why}; the nearest is ulysses_size {nearest.ulysses}, "
        f"ring_size {nearest.ring}"
        + (", with a group of devices for each branch of guidance" * (nearest.guidance == 2))
    )
