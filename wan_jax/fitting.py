"""An image at the size of a video: bicubic resizing, and what becomes of its aspect ratio.

A leaf: NumPy. Resizing is torch's bicubic without antialiasing, which the reference uses, to the
last float32 digits; its results overshoot [-1, 1] and are not clamped.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

Fit = Literal["keep", "crop", "pad"]

_BLACK = np.float32(-1.0)


class Frame(NamedTuple):
    """A frame that is known: float32 in [-1, 1], but for what a bicubic resize overshoots.

    pixels: [y, x, 3], as the video has it. view: [side, side, 3], as CLIP sees it.
    """

    pixels: np.ndarray
    view: np.ndarray


def resize_bicubic(image: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """torch's interpolate(mode="bicubic", align_corners=False, antialias=False) of an image.

    image: float32 [y, x, c] or [b, y, x, c]. Returns float32 of that form, `height` by `width`
    pixels, unclamped. Raises ValueError for another shape or dtype, or a size below 1.
    """
    rows, columns = _check_image(image)
    _check_whole(height=height, width=width)
    return _interpolate(image, _taps(rows, height), _taps(columns, width))


def fit_size(height: int, width: int, *, area: int, multiple: int = 16) -> tuple[int, int]:
    """(height, width) of a video of an image: its aspect ratio at about `area` pixels.

    Each side is rounded down to a multiple of `multiple` in the reference's float64 arithmetic,
    e.g. 720 by 1280 at an area of 480 * 832 gives 464 by 832.
    Raises ValueError for an aspect ratio so extreme that a side would be 0.
    """
    _check_whole(height=height, width=width, area=area, multiple=multiple)
    # Not area * height / width: its rounding can fall on the other side of a multiple.
    aspect = height / width
    tall = int(math.sqrt(area * aspect) // multiple) * multiple
    wide = int(math.sqrt(area / aspect) // multiple) * multiple
    if not (tall and wide):
        raise ValueError(
            f"image is of {width}x{height} pixels, for a video of {wide}x{tall}; accepted at an "
            f"area of {area} pixels: a side at most {area // multiple**2} times the other; to crop "
            "or pad takes any"
        )
    return tall, wide


def fit(
    image: np.ndarray, size: tuple[int, int], how: Fit = "keep", *, multiple: int = 16
) -> np.ndarray:
    """Resizes an image for a video of `size`, (width, height) in pixels.

    image: float32 [y, x, c] or [b, y, x, c]. Returns float32 of that form. "keep" keeps the
    image's aspect ratio and takes only the area of `size`, as the reference does (see fit_size);
    "crop" covers `size` and cuts what is over on both sides alike; "pad" fits into `size` and adds
    black bars: films have those, while grey is what stands for a frame that is not known.
    Raises ValueError for another shape, dtype, size or `how`.
    """
    check_fit(how)
    width, height = size
    _check_whole(height=height, width=width)
    rows, columns = _check_image(image)
    if how == "crop":
        return cover(image, height=height, width=width)
    if how == "keep":
        height, width = fit_size(rows, columns, area=height * width, multiple=multiple)
        return resize_bicubic(image, height=height, width=width)
    ratio = min(height / rows, width / columns)
    tall = min(max(round(rows * ratio), 1), height)
    wide = min(max(round(columns * ratio), 1), width)
    top, left = (height - tall) // 2, (width - wide) // 2
    padded = np.full((*image.shape[:-3], height, width, image.shape[-1]), _BLACK)
    padded[..., top : top + tall, left : left + wide, :] = resize_bicubic(
        image, height=tall, width=wide
    )
    return padded


def check_fit(how: Any) -> Fit:
    """Give it back; ValueError unless it is one of Fit."""
    if how not in get_args(Fit):
        raise ValueError(f"fit is {how!r}; accepted: {', '.join(get_args(Fit))}")
    known: Fit = how
    return known


def cover(image: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Resizes an image to cover a size and cuts what is over, on both sides alike.

    image: float32 [y, x, c] or [b, y, x, c]. Returns float32 of that form, `height` by `width`
    pixels. For last frames of another size than the first, too: the reference means to do this but
    cuts the frame without resizing it, its sides swapped, and stretches the rest.
    """
    rows, columns = _check_image(image)
    _check_whole(height=height, width=width)
    ratio = max(height / rows, width / columns)
    tall, wide = max(round(rows * ratio), height), max(round(columns * ratio), width)
    top, left = (tall - height) // 2, (wide - width) // 2
    # Only what remains is computed, so a long strip does not become an immense image.
    return _interpolate(
        image,
        _taps(rows, tall, start=top, count=height),
        _taps(columns, wide, start=left, count=width),
    )


def clip_view(image: np.ndarray, side: int) -> np.ndarray:
    """What CLIP sees of an image: all of it, squashed to side by side, not yet normalised.

    image: float32 [y, x, 3] or [b, y, x, 3] in [-1, 1], at its native size. side: 224 in the
    released tower.
    """
    return resize_bicubic(image, height=side, width=side)


def known_frames(
    images: Sequence[np.ndarray], size: tuple[int, int], how: Fit, side: int, multiple: int = 16
) -> tuple[Frame, ...]:
    """A first and maybe a last frame, for the video and for CLIP.

    images: float32 [y, x, 3] in [-1, 1] at their native sizes. size, how: as fit() takes them; with
    "keep" the first image decides the size, and a last one of another size covers that. side: of
    CLIP's view, which is of the whole image or, with "crop", of what is left of it.
    Raises ValueError as fit() does.
    """
    first = images[0]
    frames: list[Frame] = []
    for image in images:
        if how == "keep" and image.shape != first.shape:
            height, width = frames[0].pixels.shape[:2]
            pixels = cover(image, height=height, width=width)
        else:
            pixels = fit(image, size, how, multiple=multiple)
        seen = _central(image, pixels.shape) if how == "crop" else image
        frames.append(Frame(pixels, clip_view(seen, side)))
    return tuple(frames)


def _central(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The part of an image that cover() would leave of it, at its native size."""
    (rows, columns), (height, width) = image.shape[:2], shape[:2]
    ratio = max(height / rows, width / columns)
    tall, wide = max(round(height / ratio), 1), max(round(width / ratio), 1)
    top, left = (rows - tall) // 2, (columns - wide) // 2
    return image[top : top + tall, left : left + wide]


# Resizing


class _Taps(NamedTuple):
    """Along one axis, which four source pixels make each target pixel: [4, n] each."""

    sources: np.ndarray
    weights: np.ndarray


def _taps(source: int, target: int, *, start: int = 0, count: int | None = None) -> _Taps:
    """Taps of target pixels start to start + count (all), when `source` pixels become `target`."""
    stop = target if count is None else start + count
    centre = np.arange(start, stop) + 0.5
    # As torch: the scale is rounded to float32, then the position once, by a fused multiply-add
    # (the product of two float32 is exact in float64). Its 24 bits leave the position in a large
    # image an error of 2e-4 pixels, so anything more exact or less would not match to 1e-5.
    scale = np.float32(source) / np.float32(target)
    position = (centre * np.float64(scale) - 0.5).astype(np.float32)
    base = np.floor(position)
    t = np.clip(position - base, 0, 1).astype(np.float64)
    weight = [_outer(t + 1), _inner(t), _inner(1 - t), _outer(2 - t)]
    index = base.astype(np.intp) + np.arange(-1, 3)[:, None]
    return _Taps(np.clip(index, 0, source - 1), np.stack(weight).astype(np.float32))


_A = -0.75  # torch's and OpenCV's slope; jax.image.resize and Pillow have -0.5


def _inner(t: np.ndarray) -> np.ndarray:
    """The cubic kernel at distances of 0 to 1."""
    return ((_A + 2) * t - (_A + 3)) * t * t + 1


def _outer(t: np.ndarray) -> np.ndarray:
    """The cubic kernel at distances of 1 to 2."""
    return ((_A * t - 5 * _A) * t + 8 * _A) * t - 4 * _A


def _interpolate(image: np.ndarray, rows: _Taps, columns: _Taps) -> np.ndarray:
    """Both axes of [..., y, x, c], first the one that leaves less in between."""
    tall, wide = image.shape[-3:-1]
    if rows.sources.shape[1] * wide <= tall * columns.sources.shape[1]:
        return _along(_along(image, rows, axis=-3), columns, axis=-2)
    return _along(_along(image, columns, axis=-2), rows, axis=-3)


def _along(image: np.ndarray, taps: _Taps, *, axis: int) -> np.ndarray:
    """The weighted sum of the taps along an axis, -3 or -2, of [..., y, x, c]."""
    shape = (-1,) + (1,) * (-1 - axis)
    total = np.take(image, taps.sources[0], axis=axis)
    total *= taps.weights[0].reshape(shape)
    term = np.empty_like(total)
    for index, weight in zip(taps.sources[1:], taps.weights[1:], strict=True):
        np.take(image, index, axis=axis, out=term, mode="clip")  # "raise" would buffer the output
        term *= weight.reshape(shape)
        total += term
    return total


# Checks


def _check_image(image: np.ndarray) -> tuple[int, int]:
    """Height and width of float32 [y, x, c] or [b, y, x, c]; otherwise ValueError."""
    if image.ndim not in (3, 4) or not image.size or image.dtype != np.float32:
        raise ValueError(
            f"image has shape {image.shape} and dtype {image.dtype}; accepted: float32 [y, x, c] "
            "or [b, y, x, c]"
        )
    return image.shape[-3], image.shape[-2]


def _check_whole(**given: Any) -> None:
    """ValueError unless all are integers of 1 or more."""
    for name, value in given.items():
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not whole or value < 1:
            raise ValueError(f"{name} is {value!r}; accepted: an integer of 1 or more")
