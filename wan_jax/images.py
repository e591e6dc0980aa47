"""Images in: files and arrays become float32 [y, x, 3] in [-1, 1], resized and fitted to a size.

A leaf: NumPy and Pillow. Resizing is torch's bicubic without antialiasing, which the reference
uses, to the last float32 digits; its results overshoot [-1, 1] and are not clamped.
"""

import contextlib
import math
import numbers
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

Fit = Literal["keep", "crop", "pad"]

# MPO, what many phones write, is a .jpg with further pictures behind it. Not every format that
# Pillow knows is safe: its reader of EPS runs Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_ACCEPTED = "accepted: a whole .png, .jpg, .webp, .bmp, .gif or .tiff file"
_MAX_PIXELS = 178_956_970  # where Pillow, too, sees a decompression bomb: 2 GiB as float32

_WHITE, _BLACK = np.float32(1.0), np.float32(-1.0)

_TURNS = {  # of the EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Frame(NamedTuple):
    """A frame that is known: float32 in [-1, 1], but for what a bicubic resize overshoots.

    pixels: [y, x, 3], as the video has it. view: [side, side, 3], as CLIP sees it.
    """

    pixels: np.ndarray
    view: np.ndarray


def read_image(source: Any, *, name: str = "image") -> np.ndarray:
    """Reads an image as float32 [y, x, 3], RGB in [-1, 1].

    source: a path to a .png, .jpg, .webp, .bmp, .gif or .tiff (the content counts, not the name;
    of several frames the first), a PIL image, or an array: uint8 [y, x], [y, x, 3] or [y, x, 4],
    or float32 [y, x, 3] in [-1, 1]. Files in plain RGB, grey, palette, CMYK or YCbCr give exactly
    the reference's numbers. Where it would misread one, this does not: EXIF's orientation is
    followed, transparency shows white, and 16-bit grey keeps its 16 bits. 16-bit colour is read by
    its upper 8 bits, which is all that Pillow gives. name: what an error calls it.
    Raises ValueError, naming the file, if it is missing, no such image, truncated, of more than
    178,956,970 pixels (told from its header), or of a mode without a scale (32-bit grey).
    """
    if isinstance(source, Image.Image):
        return _read(name, source)
    if not isinstance(source, str | os.PathLike):
        return _from_array(source, name)
    name = f"{name} {os.fspath(source)!r}"
    if not os.path.isfile(source):  # nor is a pipe opened, which would wait for a writer
        exists = "is not a file" if os.path.exists(source) else "does not exist"
        found = "is a folder" if os.path.isdir(source) else exists
        raise ValueError(f"{name} {found}; {_ACCEPTED}")
    with _reading(name):
        image = Image.open(source, formats=_FORMATS)
    with image:
        return _read(name, image)


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
            f"an image of {width}x{height} pixels gives a video of {wide}x{tall}; accepted at an "
            f"area of {area} pixels: a side at most {area // multiple**2} times the other"
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
    """The same; ValueError unless it is one of Fit."""
    if how not in get_args(Fit):
        raise ValueError(f"fit is {how!r}; accepted: {', '.join(get_args(Fit))}")
    fit: Fit = how
    return fit


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
    images: Sequence[np.ndarray], size: tuple[int, int], how: Fit, *, side: int, multiple: int = 16
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


# Reading


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Pillow's errors as a ValueError of one line, its warnings (of large images, say) as none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image, or truncated; {_ACCEPTED}") from error
    except Exception as error:  # decoders fail in a dozen ways, all of them the file's fault
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        reason = reason or type(error).__name__
        raise ValueError(f"{name} cannot be read: {reason}; {_ACCEPTED}") from error


def _read(name: str, image: Image.Image) -> np.ndarray:
    """Decodes an image: float32 [y, x, 3] in [-1, 1]."""
    width, height = image.size
    if not (width and height):
        raise ValueError(f"{name} has {width}x{height} pixels; accepted: 1x1 or more")
    if width * height > _MAX_PIXELS:
        raise ValueError(
            f"{name} has {width}x{height} pixels; accepted: at most {_MAX_PIXELS} in all"
        )
    raw = _raw_mode(image)
    if image.mode in ("I", "F") or raw == "I;12":
        raise ValueError(
            f"{name} is of the mode {raw or image.mode}, whose white is not defined; accepted: "
            "8 or 16 bits a channel"
        )
    with _reading(name):
        image.load()
        turn = _TURNS.get(_orientation(image))
        upright = image if turn is None else image.transpose(turn)
        if upright.mode.startswith("I;16"):
            return _from_words(upright)
        if upright.has_transparency_data and not raw.startswith("RGB;16"):
            return _on_white(np.asarray(upright.convert("RGBA")))
        return _levels(255)[np.asarray(upright.convert("RGB"))]


def _raw_mode(image: Image.Image) -> str:
    """How pixels lie in the file, e.g. "RGB;16B", before it is decoded; "" if that is not known."""
    tiles = getattr(image, "tile", None)
    options = tiles[0][3] if tiles else ""
    raw = options[0] if isinstance(options, tuple) and options else options
    return raw if isinstance(raw, str) else ""


def _orientation(image: Image.Image) -> int:
    """1 to 8 by EXIF, or what else stands there; 1 for EXIF that cannot be read."""
    try:
        # Pillow has turned a .tiff already when it decoded it, and taken the entry away.
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the pixels are sound, whatever is wrong beside them
        return 1


def _levels(top: int) -> np.ndarray:
    """0..top as float32 in [-1, 1], by the reference's to_tensor().sub_(0.5).div_(0.5)."""
    unit = np.arange(top + 1, dtype=np.float32) / np.float32(top)
    return (unit - np.float32(0.5)) / np.float32(0.5)


def _on_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 [y, x, 4] over white: float32 [y, x, 3] in [-1, 1]."""
    opacity = rgba[..., 3:].astype(np.float32) / np.float32(255)
    pixels = _levels(255)[rgba[..., :3]]
    pixels *= opacity
    pixels += (1 - opacity) * _WHITE
    return pixels


def _from_words(image: Image.Image) -> np.ndarray:
    """16-bit grey as float32 [y, x, 3] in [-1, 1], the transparent level, if any, as white."""
    words = np.asarray(image)
    grey = _levels(65535)[words]
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[words == transparent] = _WHITE
    return np.repeat(grey[..., None], 3, axis=-1)


def _from_array(source: Any, name: str) -> np.ndarray:
    """uint8 or float32 pixels as float32 [y, x, 3] in [-1, 1]; ValueError for other arrays."""
    pixels = np.asarray(source)
    accepted = "accepted: uint8 [y, x], [y, x, 3] or [y, x, 4], or float32 [y, x, 3] in [-1, 1]"
    found = f"{name} is an array of shape {pixels.shape} and dtype {pixels.dtype}"
    shapes = {np.dtype(np.uint8): ((), (3,), (4,)), np.dtype(np.float32): ((3,),)}
    if pixels.shape[2:] not in shapes.get(pixels.dtype, ()) or pixels.ndim < 2 or not pixels.size:
        raise ValueError(f"{found}; {accepted}")
    if pixels.dtype == np.float32:
        if not (np.abs(pixels) <= 1).all():  # so written, NaN does not pass
            raise ValueError(f"{found} with values outside [-1, 1] or NaN; {accepted}")
        return pixels.copy()
    if pixels.ndim == 2:
        return np.repeat(_levels(255)[pixels][..., None], 3, axis=-1)
    return _on_white(pixels) if pixels.shape[2] == 4 else _levels(255)[pixels]


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
