"""What reads each network of a checkpoint, changes it as asked, and puts it where it belongs."""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wan_jax.config import WanConfig
from wan_jax.planning.memory import STREAMABLE
from wan_jax.sharding import Layout, Where
from wan_jax.weights import adapters, checkpoint, trees
from wan_jax.weights.quantization import with_quantized


def loaders(
    folder: Any,
    config: WanConfig,
    loras: Sequence[adapters.Adapter],
    parts: Sequence[str],
    *,
    dtype: str,
    vae_dtype: str,
    quantize: str | None,
    place: Callable[[str], Any],
    by_layers: bool,
    streamed: bool = False,
) -> dict[str, Callable[[], Any]]:
    """{part: function that puts it where place(part) says} of a checkpoint.

    streamed: with its stack in the host's memory. by_layers: a DiT is quantised as it leaves that,
    not all at once on the device.
    """
    on_host = STREAMABLE if streamed else ("dit",) if quantize is not None and by_layers else ()
    restore = functools.partial(checkpoint.restore, folder, dtype=dtype)
    found: dict[str, Callable[[], Any]] = {
        part: functools.partial(
            restore, part, config, sharding=place(part), streamed=part in on_host
        )
        for part in parts
    }
    if vae_dtype != "float32" and "vae" in found:
        load_vae = found["vae"]
        found["vae"] = lambda: trees.cast(load_vae(), jnp.dtype(vae_dtype))
    if loras:
        found["dit"] = adapters.with_loras(found["dit"], config.dit, loras)
    if quantize is not None:
        found["dit"] = with_quantized(found["dit"], quantize, place("dit"), streamed=streamed)
    return found


def place_of(
    layout: Layout | None, split: Collection[str], part: str, *, text_on_cpu: bool
) -> Where | None:
    """Where a network goes; None is the first device."""
    if text_on_cpu and part == "umt5":
        return jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    return None if layout is None else layout.of_weights(split=part in split).weight
