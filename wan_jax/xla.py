"""XLA settings that the product needs, in one place, and the jit that applies them."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def compiler_options() -> dict[str, bool | str]:
    """Options of every program, by platform.

    GPU: without the NHWC layout cuDNN's 3D convolutions transpose input and output (1.4 to 1.9
    times slower on an H200). CPU: code motion would convert all layers of a bfloat16 stack to
    float32 before the scan, 18 GiB for UMT5-XXL.
    """
    options: dict[str, dict[str, bool | str]] = {
        "gpu": {"xla_gpu_force_conv_nhwc": True},
        "cpu": {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"},
    }
    return options.get(jax.default_backend(), {})


def jit(function: Callable[..., Any], **arguments: Any) -> Callable[..., Any]:
    """jax.jit(function, **arguments) with compiler_options().

    The program is made at the first call: asking for the platform on import would start it.
    """

    @functools.cache
    def program() -> Callable[..., Any]:
        return jax.jit(function, compiler_options=compiler_options(), **arguments)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return program()(*args, **kwargs)

    return call
