"""What a callback is told while a checkpoint is loaded and a video made."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from wan_jax import sampler


class Progress(NamedTuple):
    """What a callback is told: `done` of `total` parts of a stage are finished.

    stage: "load", "encode", "clip", "image", "denoise", "decode" or, in bytes, "download",
    "convert", "upload", "export"; the first report of each has done = 0 or, where a run is taken
    up, the steps before. latents: float32 [b, t, h, w, c] after a denoising step, else None. carry:
    then also where the solver stands, in buffers that the next step reuses but for the latents:
    copy what is kept.
    """

    stage: str
    done: int
    total: int
    latents: jax.Array | None = None
    carry: sampler.Carry | None = None


Callback = Callable[[Progress], None]


def tell(callback: Callback | None, stage: str, done: int, total: int) -> None:
    """Tell a callback, if there is one."""
    if callback is not None:
        callback(Progress(stage, done, total))
