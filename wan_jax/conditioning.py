"""What a video is told of its known frames: the mask, and the pixels that the VAE encodes.

A leaf: NumPy. The network reads [noise, mask, latents of the pixels], in this order of channels;
mask and latents are the same with and without the prompt.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

STRIDE = 4  # pixel frames to a latent frame, but for the first, which is one


class Known(NamedTuple):
    """What images tell of a video, on the host, float32.

    channels: [1, t, h, w, 4 + z], the mask of the known frames and the latents of a video that is
    grey but for them. tokens: [1, s, d], CLIP's, those of a last frame behind those of the first.
    """

    channels: np.ndarray
    tokens: np.ndarray


def mask_bthwc(
    frames: int, *, height: int, width: int, last: bool = False, stride: int = STRIDE
) -> np.ndarray:
    """1 where a pixel frame is known, else 0: float32 [1, t, h, w, stride].

    frames: pixel frames, 4n + 1. height, width: of the latent grid. The first frame is known and,
    with `last`, the last. Channel k belongs to pixel frame k of the four of a latent frame; the
    first frame fills its latent frame alone and is counted four times, so it has ones in all
    channels, and a last frame has its one in the last channel.
    Raises ValueError for another number of frames.
    """
    _check_frames(frames, stride)
    known = np.zeros(frames, np.float32)
    known[0] = 1.0
    if last:
        known[-1] = 1.0
    grouped = np.concatenate([np.repeat(known[:1], stride - 1), known]).reshape(-1, stride)
    shape = (1, len(grouped), height, width, stride)
    return np.broadcast_to(grouped[None, :, None, None, :], shape).copy()


def pixel_chunks(
    first: np.ndarray,
    *,
    frames: int,
    last: np.ndarray | None = None,
    stride: int = STRIDE,
) -> Iterator[np.ndarray]:
    """The video to encode, one latent frame at a time: for vae.encode_first and vae.encode_next.

    first, last: float32 [y, x, 3] at the video's size, in [-1, 1] but for overshoot, which stays.
    frames: pixel frames, 4n + 1. Yields float32 [1, 1, y, x, 3], the first frame, then n times
    [1, 4, y, x, 3]: 0, mid-grey, for what is not known, and the last frame at the end. Grey chunks
    are one and the same array, not writeable, so a video is never whole in memory.
    Raises ValueError, at once, for another number of frames, shapes or dtypes that do not fit, and
    a last frame in a video of one.
    """
    _check_frames(frames, stride)
    if last is not None and frames == 1:
        raise ValueError(f"frames is 1; first and last frame need {1 + stride} or more")
    for name, image in (("first", first), ("last", last)):
        if image is None:
            continue
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.float32:
            raise ValueError(
                f"the {name} frame has shape {image.shape} and dtype {image.dtype}; float32 "
                "[y, x, 3] is needed"
            )
        if image.shape != first.shape:
            raise ValueError(
                f"the last frame has shape {image.shape}; that of the first, {first.shape}, is "
                "needed"
            )
    return _chunks(first, last, (frames - 1) // stride, stride)


def video_chunks(pixels: np.ndarray, *, stride: int = STRIDE) -> Iterator[np.ndarray]:
    """A whole video as pixel_chunks() gives one that is grey but for its ends.

    pixels: float32 [f, y, x, 3], f = 4n + 1, in -1..1. Yields views of it. Raises ValueError, at
    once, for another number of frames, shape or dtype.
    """
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.float32:
        raise ValueError(
            f"the video has shape {pixels.shape} and dtype {pixels.dtype}; float32 [f, y, x, 3] is "
            "needed"
        )
    _check_frames(len(pixels), stride)
    starts = range(1, len(pixels), stride)
    return (
        pixels[None, start:stop] for start, stop in [(0, 1), *((k, k + stride) for k in starts)]
    )


def _chunks(
    first: np.ndarray, last: np.ndarray | None, count: int, stride: int
) -> Iterator[np.ndarray]:
    """The first frame, then `count` latent frames' worth of grey that may end in the last frame."""
    yield first[None, None]
    grey = np.zeros((1, stride, *first.shape), np.float32)
    grey.flags.writeable = False
    for _ in range(count if last is None else count - 1):
        yield grey
    if last is not None:
        final = grey.copy()
        final[0, -1] = last
        yield final


def _check_frames(frames: int, stride: int) -> None:
    """ValueError unless frames are 1, 1 + stride, 1 + 2 * stride, ..."""
    if isinstance(frames, bool) or frames < 1 or (frames - 1) % stride:
        raise ValueError(f"frames is {frames}; {stride}n + 1 is needed: 1, {stride + 1}, ...")
