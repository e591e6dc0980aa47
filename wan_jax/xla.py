"""XLA settings that the product needs, in one place, and the jit that applies them."""

import functools
from collections.abc import Callable
from typing import Any

import jax

# GPU: without the NHWC layout cuDNN's 3D convolutions transpose input and output (1.4 to 1.9 times
# slower on an H200). CPU: code motion would convert all layers of a bfloat16 stack to float32
# before the scan, 18 GiB for UMT5-XXL.
_GPU: dict[str, bool | str] = {"xla_gpu_force_conv_nhwc": True}
_OPTIONS: dict[str, dict[str, bool | str]] = {
    "gpu": _GPU,
    "cuda": _GPU,
    "cpu": {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"},
}


def compiler_options(platform: str) -> dict[str, bool | str]:
    """XLA options of every program for "gpu", "cpu" or "tpu"."""
    return _OPTIONS.get(platform, {})


def jit(function: Callable[..., Any], **arguments: Any) -> Callable[..., Any]:
    """jax.jit(function, **arguments) with the options of the platform that its first array is on.

    The program is made at the first call: asking for the platform on import would start it.
    """

    @functools.cache
    def program(platform: str) -> Callable[..., Any]:
        return jax.jit(function, compiler_options=compiler_options(platform), **arguments)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return program(_platform(args))(*args, **kwargs)

    return call


def _platform(args: Any) -> str:
    arrays = (leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.Array))
    first = next(arrays, None)
    if first is None or isinstance(first, jax.core.Tracer):
        return jax.default_backend()
    return next(iter(first.devices())).platform
