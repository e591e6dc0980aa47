"""XLA settings that the product needs, in one place, and the jit that applies them."""

import contextvars
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax

from wan_jax import host_memory

Options = dict[str, bool | int | str]
# GPU: without the NHWC layout cuDNN's 3D convolutions transpose input and output (1.4 to 1.9 times
# slower on an H200). Triton's products would leave the bias and the GELU to passes of their own,
# and round in between; cuBLASLt's take them along (layers.linear). CPU: code motion would convert
# all layers of a bfloat16 stack to float32 before the scan, 18 GiB for UMT5-XXL.
_GPU: Options = {
    "xla_gpu_force_conv_nhwc": True,
    "xla_gpu_enable_triton_gemm": False,
}
_OPTIONS: dict[str, Options] = {
    "gpu": _GPU,
    "cuda": _GPU,
    "cpu": {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"},
}
# GPU: for programs that read layers of weights from the host's memory. Without it a layer is not
# copied before the computation of the one before is over.
_STREAMING: dict[str, Options] = {
    platform: {"xla_gpu_enable_pipelined_host_offloading": True} for platform in ("gpu", "cuda")
}
# v5p lets a kernel have 16 MiB of VMEM by default, and the tiles of attention.py need more. This is
# for programs with attention: a convolution that may have it takes five times as long to compile.
_ROOM: Options = {"xla_tpu_scoped_vmem_limit_kib": "65536"}
_ATTENTION = {"TPU v5": _ROOM, "TPU v5p": _ROOM}
# GPUs that write to each other: values, then keys travel while what follows is made, and queries
# while half of this device's own attend, results while the rest do (ulysses.py, hopper_parts.py).
# The copy engines bring them; kernels of NCCL would wait for the blocks of another and then hold up
# the rest of them. Each travels as soon as it is there, up to four at a time: by default there is
# one journey at a time, of all that would go together.
_PEERS: dict[str, Options] = {
    platform: {
        "xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY",
        "xla_gpu_collective_permute_combine_threshold_bytes": 0,
        "xla_gpu_experimental_collective_start_as_early_as_possible": True,
        "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
    }
    for platform in ("gpu", "cuda")
}
_HOPPER = ("H100", "H200", "H800", "GH200")  # by jax


def compiler_options(
    platform: str,
    kind: str = "",
    *,
    attention: bool = False,
    exchanges: bool = False,
    streams: bool = False,
) -> Options:
    """XLA options of every program for "gpu", "cpu" or "tpu", of devices of this kind.

    attention: those of a program whose attention is as long as a video. exchanges: of one whose
    devices may trade heads for it. streams: of one whose weights lie in the host's memory.
    """
    options = _OPTIONS.get(platform, {}) | (_ATTENTION.get(kind, {}) if attention else {})
    if exchanges and platform in _PEERS and _one_process():
        options = options | _PEERS[platform]
    return options | (_STREAMING.get(platform, {}) if streams else {})


def pin_host_memory() -> None:
    """Let weights take all of the host's memory; to be called before JAX starts.

    A GPU's client pins no more than 64 GiB for all its devices unless the environment says so.
    """
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(max(64, size // 2**30)))


class Traced(NamedTuple):
    """The devices that a program is traced for; platform: "gpu", "tpu" or "cpu"; kind: by jax."""

    platform: str
    kind: str


# Of the program that is being traced in this thread; see Program.on().
_traced: contextvars.ContextVar[Traced | None] = contextvars.ContextVar("traced", default=None)


def traced_for() -> Traced:
    """What is being traced is for these: those of its Program, or inside shard_map of its mesh.

    So it is right also for a program compiled ahead of time for devices that are not there, and for
    a network on the host beside others on GPUs.
    """
    program = _traced.get()
    if program is not None:
        return program
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.devices()[0]
    return Traced(device.platform, device.device_kind)


def on_nvidia() -> bool:
    """Whether what is being traced is for NVIDIA's GPUs."""
    device = traced_for()
    return device.platform == "gpu" and "NVIDIA" in device.kind.upper()


def writes_to_peers() -> bool:
    """Whether the devices of what is being traced write into each other's memory, as _PEERS has it.

    GPUs of one process do, and where the driver lets none see another's memory XLA takes NCCL's
    kernels. Those of several processes trade by NCCL, others as XLA has it.
    """
    return traced_for().platform == "gpu" and _one_process()


def _one_process() -> bool:
    return jax.process_count() == 1


def on_hopper() -> bool:
    """Whether what is being traced is for NVIDIA's Hopper GPUs."""
    device = traced_for()
    return device.platform == "gpu" and any(kind in device.kind for kind in _HOPPER)


def convolutions(dtype: str) -> lax.Precision:
    """The precision of float32 convolutions in a run in "bfloat16" or "float32".

    The reference's: TF32 on NVIDIA; three bfloat16 passes are TPU's nearest.
    """
    if dtype == "float32":
        return lax.Precision.HIGHEST
    return lax.Precision.HIGH if traced_for().platform == "tpu" else lax.Precision.DEFAULT


class Program:
    """What jit() gives: called, or by on(device).trace(...) compiled ahead of time."""

    def __init__(
        self, function: Callable[..., Any], arguments: dict[str, Any], own: dict[str, bool]
    ) -> None:
        functools.update_wrapper(self, function)
        self._function, self._arguments, self._own = function, arguments, own
        self._made: dict[tuple[str, str, bool], Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.of(*args)(*args, **kwargs)

    def of(self, *args: Any) -> Any:
        """What jax.jit() gives for arrays that lie where these do; a call looks each time."""
        return self.on(_device(args), streams=host_memory.lies_in(args))

    def on(self, device: jax.Device, *, streams: bool = False) -> Any:
        """What jax.jit() gives for devices of this kind; streams: as compiler_options() has it."""
        platform, kind = device.platform, device.device_kind
        key = platform, kind, streams
        if key not in self._made:
            options = compiler_options(platform, kind, **self._own, streams=streams)
            function = _traced_for(Traced(platform, kind), self._function)
            self._made[key] = jax.jit(function, compiler_options=options, **self._arguments)
        return self._made[key]


def _traced_for(devices: Traced, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which is told what devices it is traced for."""

    @functools.wraps(function)
    def told(*args: Any, **kwargs: Any) -> Any:
        before = _traced.set(devices)
        try:
            return function(*args, **kwargs)
        finally:
            _traced.reset(before)

    return told


def jit(
    function: Callable[..., Any],
    *,
    attention: bool = False,
    exchanges: bool = False,
    **arguments: Any,
) -> Program:
    """jax.jit(function, **arguments) with the options of the device that its first array is on.

    The program is made at the first call: asking for the device on import would start it.
    attention, exchanges: as compiler_options() has them.
    """
    return Program(function, arguments, {"attention": attention, "exchanges": exchanges})


def _device(args: Any) -> jax.Device:
    arrays = (leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.Array))
    first = next(arrays, None)
    if first is None or isinstance(first, jax.core.Tracer):
        return jax.devices()[0]
    return next(iter(first.devices()))
