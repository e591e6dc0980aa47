"""What --plan can be for: the devices at hand, a TPU slice or a number of GPUs by name.

The facts of a device are public data sheets'. What share of them programs reach is measured here on
an H200, and an estimate for TPUs, which we have not run on.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from wan_jax import xla

GIB = 2**30


class Chip(NamedTuple):
    """One device of a kind as jax counts them: of tpu7x one of a chip's two cores.

    kinds: what jax calls it, for GPUs a part of that. dims: numbers in a topology; 0 where devices
    are only counted. cores: devices to a chip. flops: bfloat16 products a second, dense. memory:
    bytes that programs have. bandwidth: bytes a second of it. link: bytes a second that a device
    can send to others. host: bytes a second that it can read of the host's memory. attention,
    linear, conv: shares of flops that are reached.
    """

    kinds: tuple[str, ...]
    dims: int
    cores: int
    flops: float
    memory: int
    bandwidth: float
    link: float
    host: float
    attention: float
    linear: float
    conv: float

    @property
    def platform(self) -> str:
        """As jax says it."""
        return "tpu" if self.dims else "gpu"


# jax takes three quarters of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
_GPU_SHARE = 0.75
# Memory of TPUs: what the compiler allows. Link: half of what data sheets give for one direction of
# all of a TPU's links, as an exchange between all passes through neighbours; of NVLink 350 of 450
# GB/s. Host: 16 GB/s, which "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus) gives
# for v4; of GPUs 0.8 of a PCIe link of 16 lanes, which is 32 GB/s for an A100 and 64 since. Shares
# of TPUs, estimates: of attention what published times of Wan on v6e-8 and v7x-8 leave for it
# (heads of 128 half fill a 256-wide matrix unit), of convolutions a third of what bfloat16 ones may
# reach, as the VAE multiplies in three passes. Of GPUs, measured on an H200: attention 632 TF/s by
# our own kernel and 574 by cuDNN's, which an A100 has, products 633 with everything between them,
# the VAE's convolutions as TF32 240.
CHIPS = {
    "v5e": Chip(
        kinds=("TPU v5 lite", "TPU v5e"), dims=2, cores=1, flops=197e12,
        memory=int(15.75 * GIB), bandwidth=0.82e12, link=100e9, host=16e9,
        attention=0.5, linear=0.7, conv=0.2,
    ),
    "v5p": Chip(
        kinds=("TPU v5", "TPU v5p"), dims=3, cores=1, flops=459e12,
        memory=int(95.7 * GIB), bandwidth=2.765e12, link=300e9, host=16e9,
        attention=0.5, linear=0.7, conv=0.2,
    ),
    "v6e": Chip(
        kinds=("TPU v6 lite", "TPU v6e"), dims=2, cores=1, flops=918e12,
        memory=int(31.2 * GIB), bandwidth=1.64e12, link=200e9, host=16e9,
        attention=0.25, linear=0.7, conv=0.2,
    ),
    "tpu7x": Chip(
        kinds=("TPU7x",), dims=3, cores=2, flops=1153e12,
        memory=int(94.7 * GIB), bandwidth=3.69e12, link=150e9, host=16e9,
        attention=0.25, linear=0.7, conv=0.2,
    ),
    "a100": Chip(
        kinds=("A100-SXM4-80GB", "A100"), dims=0, cores=1, flops=312e12,
        memory=int(80 * GIB * _GPU_SHARE), bandwidth=2.04e12, link=230e9, host=25e9,
        attention=0.58, linear=0.64, conv=0.24,
    ),
    "h100": Chip(
        kinds=("H100",), dims=0, cores=1, flops=989e12,
        memory=int(79.6 * GIB * _GPU_SHARE), bandwidth=3.35e12, link=350e9, host=50e9,
        attention=0.64, linear=0.64, conv=0.24,
    ),
    "h200": Chip(
        kinds=("H200",), dims=0, cores=1, flops=989e12,
        memory=int(140 * GIB * _GPU_SHARE), bandwidth=4.8e12, link=350e9, host=50e9,
        attention=0.64, linear=0.64, conv=0.24,
    ),
}  # fmt: skip
_EXAMPLES = "v6e:4x4, v5p:2x2x2, tpu7x:2x2x1 or h100:8"
# Chips of the slices that there are, by the numbers in a topology; up to 256.
_SLICES = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8)),
}


class Target(NamedTuple):
    """Devices to plan for.

    chip: their facts; None for a device that the table lacks. number: of devices. memory: bytes
    that programs have on each. topology: the name of a TPU slice, which need not be there.
    """

    name: str
    chip: Chip | None
    number: int
    memory: int
    topology: str | None = None
    at_hand: bool = False

    @property
    def is_nvidia(self) -> bool:
        """Whether the devices are NVIDIA's GPUs."""
        if self.at_hand:
            return xla.on_nvidia()
        return self.chip is not None and self.chip.platform == "gpu"

    @property
    def compiles(self) -> bool:
        """Whether programs can be compiled for it on this machine."""
        return self.at_hand or self.topology is not None

    def devices(self) -> list[jax.Device]:
        """The devices, those of a slice as libtpu describes them.

        Raises ValueError if it cannot, or where there is nothing to compile with.
        """
        if self.at_hand:
            return jax.devices()
        if self.topology is None:
            raise ValueError(f"{self.name} is known by its facts only; nothing compiles for it")
        return _devices_of(self.topology)


def parse(text: str) -> Target:
    """The target of a name such as "v6e:4x4" or "h100:8"; ValueError saying what is accepted."""
    name, colon, shape = text.strip().lower().partition(":")
    if name not in CHIPS or not colon:
        raise ValueError(
            f"plan_target is {text!r}; one of {', '.join(CHIPS)}, a colon and its devices are "
            f"needed: {_EXAMPLES}"
        )
    chip = CHIPS[name]
    wanted = f"{chip.dims} numbers of chips" if chip.dims else "a number of GPUs"
    numbers = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape)
    dims = [int(part) for part in shape.split("x")] if numbers else []
    if len(dims) != (chip.dims or 1):
        raise ValueError(f"plan_target is {text!r}; after {name}: {wanted} is needed: {_EXAMPLES}")
    return _target(name, dims)


def at_hand() -> Target:
    """The devices that jax has."""
    count, first = jax.device_count(), jax.local_devices()[0]
    kind, stats = first.device_kind, first.memory_stats() or {}
    chip = chip_of(kind)
    # Devices of the CPU have the machine's memory together.
    limit = stats.get("bytes_limit", chip.memory if chip else _host_bytes() // count)
    return Target(f"{count} x {kind}", chip, count, limit, at_hand=True)


def chip_of(kind: str) -> Chip | None:
    """The facts of what jax calls this kind of device; None for one that the table lacks."""
    exact = [chip for chip in CHIPS.values() if kind in chip.kinds]
    gpus = [chip for chip in CHIPS.values() if not chip.dims]
    return next(iter(exact or (c for c in gpus if any(k in kind for k in c.kinds))), None)


def larger(target: Target) -> Target | None:
    """The next larger slice of the kind, or twice the GPUs; None if there is none or no such kind.

    A device has the memory that it has in `target`.
    """
    if target.chip is None:
        return None
    name = next(name for name, chip in CHIPS.items() if chip is target.chip)
    sizes: Sequence[tuple[int, ...]] = _SLICES.get(target.chip.dims, ((2 * target.number,),))
    found = (_target(name, dims) for dims in sizes)
    more = next((other for other in found if other.number > target.number), None)
    return None if more is None else more._replace(memory=target.memory)


def _target(name: str, dims: Sequence[int]) -> Target:
    chip = CHIPS[name]
    full = f"{name}:{'x'.join(map(str, dims))}"
    topology = full if chip.dims else None
    return Target(full, chip, math.prod(dims) * chip.cores, chip.memory, topology)


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _devices_of(topology: str) -> list[Any]:
    if not _has_libtpu():
        raise ValueError(f"plan_target is {topology!r}, which libtpu compiles: pip install libtpu")
    # libtpu asks the machine what it is; these answer for one that is not in a cloud. No chip is
    # held, so none is contended.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # of many kinds
        name, _, _ = topology.partition(":")
        known = ", ".join("x".join(map(str, dims)) for dims in _SLICES[CHIPS[name].dims])
        raise ValueError(
            f"plan_target is {topology!r}; a slice that libtpu knows is needed, of {name} those "
            f"are {known}: {str(error).splitlines()[0]}"
        ) from error
    return list(found.devices)


def _has_libtpu() -> bool:
    return "TPU_LIBRARY_PATH" in os.environ or importlib.util.find_spec("libtpu") is not None
