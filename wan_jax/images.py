"""Images in: files and arrays become float32 [y, x, 3] in [-1, 1].

A leaf: NumPy and Pillow.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# MPO, what many phones write, is a .jpg with further pictures behind it. Not every format that
# Pillow knows is safe: its reader of EPS runs Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_ACCEPTED = "accepted: a whole .png, .jpg, .webp, .bmp, .gif or .tiff file"
_MAX_PIXELS = 178_956_970  # where Pillow, too, sees a decompression bomb: 2 GiB as float32

_MAX_BYTES = 2**30  # the most that so many pixels take in 16-bit colour

_WHITE = np.float32(1.0)

_TURNS = {  # of the EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image file as it was when it was opened, so that what is checked is what is used.

    sha256: of its bytes, which are all that pictures are compared by. name: what errors call it.
    """

    sha256: str
    name: str = dataclasses.field(compare=False)
    data: bytes = dataclasses.field(compare=False, repr=False)


def open_picture(path: str | os.PathLike[str], *, name: str = "image") -> Picture:
    """The bytes of an image file, not yet decoded.

    Raises ValueError, naming it, if it is missing, no file, or of more than 1 GiB.
    """
    name = f"{name} {os.fspath(path)!r}"
    if not os.path.isfile(path):  # nor is a pipe opened, which would wait for a writer
        exists = "is not a file" if os.path.exists(path) else "does not exist"
        found = "is a folder" if os.path.isdir(path) else exists
        raise ValueError(f"{name} {found}; {_ACCEPTED}")
    size = os.path.getsize(path)
    if size > _MAX_BYTES:
        raise ValueError(f"{name} has {size} bytes; accepted: at most {_MAX_BYTES}")
    with _reading(name), open(path, "rb") as file:
        data = file.read(_MAX_BYTES)
    return Picture(hashlib.sha256(data).hexdigest(), name, data)


def read_image(source: Any, *, name: str = "image") -> np.ndarray:
    """Reads an image as float32 [y, x, 3], RGB in [-1, 1].

    source: a path to a .png, .jpg, .webp, .bmp, .gif or .tiff (the content counts, not the name;
    of several frames the first), a Picture, a PIL image, or an array: uint8 [y, x], [y, x, 3] or
    [y, x, 4], or float32 [y, x, 3] in [-1, 1]. name: what an error calls it. Files in plain RGB,
    grey, palette, CMYK or YCbCr give exactly the reference's numbers. Where it would misread one,
    this does not: EXIF's orientation is followed, transparency shows white, and 16-bit grey keeps
    its 16 bits. 16-bit colour is read by its upper 8 bits, which is all that Pillow gives.
    Raises ValueError, naming the file, if it is missing, no such image, truncated, of more than
    178,956,970 pixels (told from its header), or of a mode without a scale (32-bit grey).
    """
    if isinstance(source, Image.Image):
        return _read(name, source)
    if isinstance(source, str | os.PathLike):
        source = open_picture(source, name=name)
    if not isinstance(source, Picture):
        return _from_array(source, name)
    with _reading(source.name):
        image = Image.open(io.BytesIO(source.data), formats=_FORMATS)
    with image:
        return _read(source.name, image)


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
