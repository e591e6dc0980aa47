"""Videos and images out: frames become .mp4, .gif, .webp, .png or .npz, one chunk at a time.

A file or folder appears under its own name only once it is whole, so a failed or interrupted run
leaves nothing behind and an older one untouched.
"""

import itertools
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import imageio.v3 as iio
import numpy as np

from wan_jax import ffmpeg, files, labels
from wan_jax.labels import Metadata

ENDINGS = (".mp4", ".gif", ".webp", ".png", ".npz")

Rounding = Literal["truncate", "round"]

_FLOOR = 1 << 20  # bytes; a disk with less than this is full
_GIF_FPS = 50  # delays of 1/100 s or none are played as 1/10 s by nearly every viewer


def quantize(frames_float: np.ndarray, *, rounding: Rounding) -> np.ndarray:
    """Turns pixels in [-1, 1] into bytes.

    frames_float: float32, any shape, clamped to [-1, 1]. Returns uint8 of the same shape.
    "truncate" is how Wan2.1 writes videos (clamp, make_grid, `(x * 255).type(uint8)`), "round" how
    it writes single images (torchvision's save_image adds 0.5 first).
    Raises ValueError for another dtype or rounding, and for NaN.
    """
    pixels: np.ndarray = np.asarray(frames_float)
    if pixels.dtype != np.float32:
        raise ValueError(f"frames_float has dtype {pixels.dtype}; accepted: float32")
    if rounding not in ("truncate", "round"):
        raise ValueError(f"rounding={rounding!r}; accepted: 'truncate', 'round'")
    if np.isnan(pixels).any():
        count = np.count_nonzero(np.isnan(pixels))
        raise ValueError(
            f"frames_float has {count} NaN among {pixels.size} values; accepted: numbers in [-1, 1]"
        )
    # float32 throughout and in the reference's order, so that no pixel falls on the other side.
    pixels = np.clip(pixels, -1.0, 1.0)
    pixels += 1.0
    pixels /= 2.0
    pixels *= 255.0
    if rounding == "round":
        pixels += 0.5
        np.clip(pixels, 0.0, 255.0, out=pixels)
    return pixels.astype(np.uint8)


def output_path(path: str | os.PathLike[str], frames: int) -> Path:
    """Where a video of this many frames appears: `path`, or for cats.png of several, cats/."""
    place = Path(path)
    several = place.suffix.lower() == ".png" and frames > 1
    return place.with_suffix("") if several else place


def check_output(
    path: str | os.PathLike[str], frames: int, *, size: tuple[int, int] | None = None
) -> None:
    """Raises ValueError now if a video of this many frames could not be saved there later.

    frames: pixel frames. size: (width, height) in pixels, if known.
    Checks the ending, the number of frames, that the folder exists and can be written to, that what
    would be replaced may be, the room on the disk (for an .npz what it takes, for the others, whose
    size depends on the content, that the disk is not full), and where ffmpeg is needed, that there
    is one with the encoder. Meant to be called before anything slow starts.
    """
    place = Path(path)
    ending = _check_place(place)
    if frames < 1:
        raise ValueError(f"frames={frames}; accepted: 1 or more")
    _check_target(place, frames)
    if ending in ffmpeg.ENCODERS:
        ffmpeg.check(place, size=size)
    needed = _FLOOR
    if ending == ".npz" and size is not None:
        # Twice, as the frames wait in a nameless file until their number is known.
        needed += 2 * frames * math.prod(size) * 3 * 4
    free = shutil.disk_usage(place.parent).free
    if free < needed:
        raise ValueError(
            f"path {str(path)!r}: {needed} bytes are needed and {free} are free; accepted: a path "
            "on a disk with more room"
        )


def save_video(
    video: np.ndarray | Iterable[np.ndarray],
    path: str | os.PathLike[str],
    *,
    fps: float = 16,
    latents: np.ndarray | None = None,
    metadata: Metadata | None = None,
) -> None:
    """Writes one video to a file, or to a folder of images, whole or not at all.

    video: uint8, or float32 in [-1, 1], [f, y, x, 3] or [1, f, y, x, 3]; or an iterable of such
    chunks along f. A chunk is asked for only when the one before it has been handed on, so frames
    are encoded while later ones are still being decoded (but images wait for the second frame,
    which tells whether there is one or several). `fps`: frames a second.
    .mp4: H.264, yuv420p, CRF 10 as the reference; the size is kept, and both sides must be even.
    .gif: looping, 256 colours, at most 50 frames a second. .webp: looping, lossy, quality 95.
    .png: one frame; of several, a folder cats/ for cats.png that holds 00000.png, 00001.png, ...
    .npz: `frames` float32 [f, y, x, 3] just as given, and `latents` as float32 if given.
    Floats are truncated to bytes as the reference's videos are; a single frame is rounded as its
    images are, unless in an .mp4.
    metadata: called once, when the last frame has been encoded, for what JSON can hold. An .mp4
    keeps it as its comment (and "prompt", if there is one, as its title), a .png of one frame as
    text, an .npz as the entry `metadata`; the others have no place for it and drop it.
    Raises ValueError for what the caller can mend (see check_output; also the shape and dtype of a
    chunk, fps, latents with an ending that cannot hold them, metadata that JSON cannot), OSError
    with ffmpeg's own words if it fails. An error of the iterable passes through unchanged.
    """
    place = Path(os.path.abspath(path))
    if isinstance(video, Iterable) and not hasattr(video, "__array__"):
        chunks: Iterable[Any] = video
        _check_stream(place)
    else:
        whole = _check_chunk(video)
        chunks = (whole,)
        check_output(place, len(whole), size=(whole.shape[2], whole.shape[1]))
    extra = _check_options(place, fps=fps, latents=latents, metadata=metadata)
    frames = _each_frame(chunks)
    if place.suffix.lower() == ".png":
        _save_png(frames, place, metadata=metadata)
        return
    with files.whole_or_nothing(place) as partial:
        if place.suffix.lower() == ".npz":
            _write_npz(frames, partial, latents=extra, metadata=metadata)
        elif place.suffix.lower() == ".mp4":
            ffmpeg.encode((_bytes(f, "truncate") for f in frames), partial, fps=fps)
            values = _described(metadata)
            if values is not None:
                labels.tag_mp4(partial, files.hidden(place, "tagged"), values=values)
        else:
            ffmpeg.encode(_each_image(frames), partial, fps=fps)
            _described(metadata)


# Checks


def _check_place(path: Path) -> str:
    """The ending of a path in a folder that can be written to, in lower case, or ValueError."""
    ending = path.suffix.lower()
    if ending not in ENDINGS or not path.stem.strip("."):
        raise ValueError(f"path {str(path)!r} ends in {ending!r}; accepted: {', '.join(ENDINGS)}")
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(
            f"path {str(path)!r}: there is no folder {str(folder)!r}; accepted: a path in an "
            "existing local folder"
        )
    try:  # the real thing, as permission bits say nothing of quotas, mounts and long names
        files.hidden(path, "partial").touch()
        files.hidden(path, "partial").unlink()
    except OSError as error:
        raise ValueError(
            f"path {str(path)!r} cannot be written to ({error.strerror}); accepted: a path in a "
            "folder where you may create files"
        ) from error
    return ending


def _check_target(path: Path, frames: int) -> None:
    """ValueError if what would be replaced is neither a file nor a folder that was written here."""
    target = output_path(path, frames)
    if target == path and path.is_dir():
        raise ValueError(f"path {str(path)!r} is a folder; accepted: the name of a file")
    odd = "" if target == path else files.in_the_way(target)
    if odd:
        raise ValueError(
            f"path {str(path)!r}: {frames} frames go to the folder {str(target)!r}, where there is "
            f"something else ({odd}); accepted: a name that is free, or a folder of nothing but "
            "such frames, which are replaced"
        )


def _check_stream(path: Path) -> None:
    """What check_output can say of a video that comes in chunks, or ValueError."""
    ending = _check_place(path)
    if ending != ".png":  # file or folder: not known before the second frame
        _check_target(path, 1)
    if ending in ffmpeg.ENCODERS:
        ffmpeg.check(path)


def _check_options(
    path: Path, *, fps: float, latents: Any, metadata: Metadata | None
) -> np.ndarray | None:
    """Latents as float32 (bfloat16 has no .npy dtype); ValueError for any wrong argument."""
    ending = path.suffix.lower()
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps={fps}; accepted: a number of frames a second above 0")
    if ending == ".gif" and fps > _GIF_FPS:
        raise ValueError(
            f"fps={fps}; accepted for a .gif: at most {_GIF_FPS}, as viewers slow faster ones down"
        )
    if metadata is not None and not callable(metadata):
        raise ValueError(f"metadata is {metadata!r}; accepted: a function that returns a dict")
    if latents is None:
        return None
    if ending != ".npz":
        raise ValueError(f"latents cannot be stored in {path.name!r}; accepted: an .npz file")
    try:
        return np.asarray(latents).astype(np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"latents: {error}; accepted: an array of numbers") from error


def _check_chunk(chunk: Any) -> np.ndarray:
    """A chunk as [f, y, x, 3], uint8 or float32, on the host; otherwise ValueError."""
    array = np.asarray(chunk)
    shape = array.shape
    if array.ndim == 5 and shape[0] != 1:
        raise ValueError(
            f"video has a batch of {shape[0]}, shape {shape}; accepted: one video a file, video[k]"
        )
    if array.ndim == 5:
        array = array[0]
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape[1:]:
        raise ValueError(
            f"video (or a chunk of it) has shape {shape}; accepted: [f, y, x, 3] or [1, f, y, x, 3]"
        )
    if array.dtype not in (np.uint8, np.float32):
        raise ValueError(
            f"video (or a chunk of it) has dtype {array.dtype}; accepted: uint8, or float32 in "
            "[-1, 1]"
        )
    return array


# Writing


def _each_frame(chunks: Iterable[Any]) -> Iterator[np.ndarray]:
    """Frames [y, x, 3] one by one, all of the first one's size; ValueError if there is none."""
    size = None
    for chunk in chunks:
        for frame in _check_chunk(chunk):
            size = size or frame.shape
            if frame.shape != size:
                raise ValueError(
                    f"video: a chunk has frames of shape {frame.shape} after frames of shape "
                    f"{size}; accepted: one size"
                )
            yield frame
    if size is None:
        raise ValueError("video has no frames; accepted: 1 or more")


def _bytes(frame: np.ndarray, rounding: Rounding) -> np.ndarray:
    """A frame as uint8."""
    return frame if frame.dtype == np.uint8 else quantize(frame, rounding=rounding)


def _each_image(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Frames as uint8 one by one: truncated, or rounded if there is only one."""
    waiting = list(itertools.islice(frames, 2))
    rounding: Rounding = "round" if len(waiting) == 1 else "truncate"
    while waiting:
        yield _bytes(waiting.pop(0), rounding)
        waiting += itertools.islice(frames, 1 - len(waiting))


def _described(metadata: Metadata | None) -> dict[str, Any] | None:
    """What the function for metadata returns, None without one; ValueError if JSON cannot."""
    if metadata is None:
        return None
    values = metadata()
    if not isinstance(values, dict):
        raise ValueError(f"metadata returned {values!r}; accepted: a dict")
    labels.json_text(values)
    return values


def _save_png(frames: Iterator[np.ndarray], place: Path, *, metadata: Metadata | None) -> None:
    """Writes the only frame to the file, or several to the folder of that name."""
    images = _each_image(frames)
    leading = list(itertools.islice(images, 2))
    _check_target(place, len(leading))
    target = output_path(place, len(leading))
    with files.whole_or_nothing(target) as partial:
        if len(leading) == 1:
            png = _png(leading[0])
            values = _described(metadata)
            partial.write_bytes(png if values is None else labels.tag_png(png, values=values))
            return
        files.remove(partial)  # of a run that was killed, with the same process id
        partial.mkdir()
        for k, image in enumerate(itertools.chain(leading, images)):
            (partial / files.frame_name(k)).write_bytes(_png(image))
        _described(metadata)


def _png(image: np.ndarray) -> bytes:
    """A .png file of uint8 [y, x, 3]."""
    return iio.imwrite("<bytes>", image, plugin="pillow", extension=".png")


def _write_npz(
    frames: Iterator[np.ndarray],
    path: Path,
    *,
    latents: np.ndarray | None,
    metadata: Metadata | None,
) -> None:
    """What np.savez writes, but with one frame in memory at a time."""
    count = 0
    size: tuple[int, ...] = ()
    # The array's header holds the number of frames, so the frames wait in a nameless file.
    with tempfile.TemporaryFile(dir=path.parent) as spool:
        for frame in frames:
            if frame.dtype != np.float32:
                raise ValueError(
                    "video is uint8; accepted for an .npz: float32 in [-1, 1], before it is "
                    "quantised"
                )
            spool.write(np.ascontiguousarray(frame, dtype="<f4").data)
            count, size = count + 1, frame.shape
        spool.seek(0)
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, *size)}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("frames.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                shutil.copyfileobj(spool, entry, 1 << 20)
            values = _described(metadata)
            text = None if values is None else np.array(labels.json_text(values))
            for name, array in {"latents": latents, "metadata": text}.items():
                if array is not None:
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                        np.lib.format.write_array(entry, array, allow_pickle=False)
