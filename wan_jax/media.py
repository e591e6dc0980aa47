"""Videos and images out, noise in: frames become .mp4, .png or .npz, one chunk at a time.

A leaf: NumPy, imageio and the standard library. A file appears under its own name only once it is
whole, so a failed or interrupted run leaves nothing behind and an older file untouched.
"""

import collections
import contextlib
import functools
import math
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import imageio.v3 as iio
import numpy as np

ENDINGS = (".mp4", ".png", ".npz")

# What `imageio.get_writer(path, fps=fps, codec="libx264", quality=8)`, the reference's call, asks
# of ffmpeg: int((1 - 8 / 10) * 51) = CRF 10. imageio's own writer is not used because it ignores
# ffmpeg's exit status, so that a full disk passes for success, and rescales sides that are not
# multiples of 16.
_CRF = 10
_STDERR_LINES = 8
_EXIT_SECONDS = 10.0


def quantize(frames_float: np.ndarray, *, rounding: Literal["truncate", "round"]) -> np.ndarray:
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


def check_output(path: str | os.PathLike[str], frames: int) -> None:
    """Raises ValueError now if a video of this many frames could not be saved there later.

    frames: pixel frames. Checks the ending, the number of frames, that the folder exists and can be
    written to, and for .mp4 that there is an ffmpeg with libx264. Meant to be called before
    anything slow starts.
    """
    ending = _check_place(Path(path))
    if frames < 1:
        raise ValueError(f"frames={frames}; accepted: 1 or more")
    if ending == ".png" and frames != 1:
        raise ValueError(_not_one_frame(Path(path), str(frames)))


def save_video(
    video: np.ndarray | Iterable[np.ndarray],
    path: str | os.PathLike[str],
    *,
    fps: float = 16,
    latents: np.ndarray | None = None,
) -> None:
    """Writes one video to an .mp4, .png or .npz file, whole or not at all.

    video: uint8, or float32 in [-1, 1], [f, y, x, 3] or [1, f, y, x, 3]; or an iterable of such
    chunks along f. A chunk is asked for only when the one before it has been handed on, so frames
    are encoded while later ones are still being decoded.
    .mp4: H.264, yuv420p, CRF 10 as the reference, `fps` frames a second; floats are truncated to
    bytes; the size is kept, and both sides must be even.
    .png: exactly one frame; floats are rounded to bytes.
    .npz: `frames` float32 [f, y, x, 3] just as given, and `latents` as float32 if given.
    Raises ValueError for what the caller can mend (see check_output; also the shape and dtype of a
    chunk, odd sides, fps, latents with an ending that cannot hold them), OSError with ffmpeg's own
    words if it fails. An error of the iterable passes through unchanged.
    """
    place = Path(os.path.abspath(path))
    if isinstance(video, Iterable) and not hasattr(video, "__array__"):
        chunks: Iterable[Any] = video
        ending = _check_place(place)
    else:
        whole = _check_chunk(video)
        chunks = (whole,)
        check_output(place, len(whole))
        ending = place.suffix.lower()
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps={fps}; accepted: a number of frames a second above 0")
    if latents is not None and ending != ".npz":
        raise ValueError(f"latents cannot be stored in {place.name!r}; accepted: an .npz file")
    extra = None if latents is None else _check_latents(latents)
    frames = _each_frame(chunks)
    with _whole_or_nothing(place) as partial:
        if ending == ".mp4":
            _write_mp4(frames, partial, fps=fps)
        elif ending == ".png":
            _write_png(frames, partial, name=place)
        else:
            _write_npz(frames, partial, latents=extra)


def load_noise(path: str | os.PathLike[str], *, shape: tuple[int, ...]) -> np.ndarray:
    """Reads the initial noise of a run from a .npy file laid out as the reference does.

    shape: what the caller needs, (b, T, h, w, c) in latent frames and latent pixels, c = 16.
    The file holds any floating dtype, [c, T, h, w] (only for b = 1) or [b, c, T, h, w].
    Returns float32 [b, T, h, w, c]. Raises ValueError, naming the file, if it is missing, cut
    short, pickled, not of that shape, not floating or not finite.
    """
    batch, length, height, width, channels = shape
    wanted = (batch, channels, length, height, width)
    accepted = f"accepted: a .npy file of floats, shape {wanted}"
    accepted += f" or {wanted[1:]}" if batch == 1 else ""
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
    except Exception as error:  # NumPy's parser fails in a dozen ways, all of them the file's fault
        raise ValueError(f"noise file {str(path)!r} cannot be read: {error}; {accepted}") from error
    if not hasattr(loaded, "dtype"):
        raise ValueError(f"noise file {str(path)!r} is an .npz archive; {accepted}")
    if not np.issubdtype(loaded.dtype, np.floating):
        raise ValueError(f"noise file {str(path)!r} has dtype {loaded.dtype}; {accepted}")
    if loaded.shape != wanted and (batch != 1 or loaded.shape != wanted[1:]):
        raise ValueError(f"noise file {str(path)!r} has shape {loaded.shape}; {accepted}")
    with np.errstate(over="ignore"):
        noise = loaded.reshape(wanted).astype(np.float32)
    bad = noise.size - np.count_nonzero(np.isfinite(noise))
    if bad:
        raise ValueError(
            f"noise file {str(path)!r} has {bad} of {noise.size} values that are not finite in "
            f"float32; {accepted}"
        )
    return np.ascontiguousarray(np.moveaxis(noise, 1, -1))


# Checks


def _check_place(path: Path) -> str:
    """The ending of a path that can be written to, in lower case; otherwise ValueError."""
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"path {str(path)!r} ends in {ending!r}; accepted: {', '.join(ENDINGS)}")
    if path.is_dir():
        raise ValueError(f"path {str(path)!r} is a folder; accepted: the name of a file")
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(
            f"path {str(path)!r}: there is no folder {str(folder)!r}; accepted: a path in an "
            "existing local folder"
        )
    try:  # the real thing, as permission bits say nothing of quotas, mounts and long names
        _partial(path).touch()
        _partial(path).unlink()
    except OSError as error:
        raise ValueError(
            f"path {str(path)!r} cannot be written to ({error.strerror}); accepted: a path in a "
            "folder where you may create files"
        ) from error
    if ending == ".mp4":
        _ffmpeg()
    return ending


def _ffmpeg() -> str:
    """The ffmpeg to run; ValueError naming what to install if there is none with libx264."""
    try:
        # Here, so that .png and .npz work without it.
        import imageio_ffmpeg

        program: str = imageio_ffmpeg.get_ffmpeg_exe()
        if not _has_libx264(program):
            raise RuntimeError(f"{program} has no libx264 encoder")
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(
            f"path: an .mp4 needs ffmpeg with libx264 ({error}); accepted: .npz or .png, or .mp4 "
            "after `pip install imageio[ffmpeg]`, or with IMAGEIO_FFMPEG_EXE naming such an ffmpeg"
        ) from error
    return program


@functools.cache
def _has_libx264(program: str) -> bool:
    """Whether this ffmpeg was built with libx264 (some distributions leave it out)."""
    command = [program, "-hide_banner", "-encoders"]
    listing = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return b" libx264 " in listing.stdout


def _not_one_frame(path: Path, found: str) -> str:
    """What to say of a .png of more frames than one."""
    return (
        f"path {str(path)!r}: a .png holds exactly one frame and the video has {found}; accepted: "
        "a video of 1 frame (--frame_num 1, or video[k:k+1] for frame k), or an .mp4 or .npz path"
    )


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


def _check_latents(latents: Any) -> np.ndarray:
    """Latents as float32 (bfloat16 has no .npy dtype); ValueError for what is not numbers."""
    try:
        return np.asarray(latents).astype(np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"latents: {error}; accepted: an array of numbers") from error


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


def _partial(path: Path) -> Path:
    """The hidden name, with the same ending and in the same folder, of a file being written."""
    return path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")


@contextlib.contextmanager
def _whole_or_nothing(path: Path) -> Iterator[Path]:
    """A name to write to in the same folder: moved to `path` at the end, removed on any error."""
    partial = _partial(path)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write_mp4(frames: Iterator[np.ndarray], path: Path, *, fps: float) -> None:
    """Hands each frame to ffmpeg before the next is asked for."""
    with contextlib.ExitStack() as stack:
        write = None
        for frame in frames:
            if write is None:
                command = _ffmpeg_command(path, size=frame.shape[:2], fps=fps)
                write = stack.enter_context(_encoder(command))
            write(frame if frame.dtype == np.uint8 else quantize(frame, rounding="truncate"))


def _ffmpeg_command(path: Path, *, size: tuple[int, ...], fps: float) -> list[str]:
    """The command imageio would run, less its rescaling; size is (y, x), odd sides a ValueError."""
    height, width = size
    if height % 2 or width % 2:
        raise ValueError(
            f"video is {width} by {height} pixels; accepted for an .mp4: even sides (yuv420p "
            "stores colour at half size), or an .npz path"
        )
    rate = str(Fraction(fps).limit_denominator())
    command = [_ffmpeg(), "-y", "-f", "rawvideo", "-vcodec", "rawvideo", "-s", f"{width}x{height}"]
    command += ["-pix_fmt", "rgb24", "-r", rate, "-i", "-", "-an", "-vcodec", "libx264"]
    return command + ["-pix_fmt", "yuv420p", "-crf", str(_CRF), "-v", "warning", str(path)]


@contextlib.contextmanager
def _encoder(command: list[str]) -> Iterator[Callable[[np.ndarray], None]]:
    """Runs ffmpeg and gives the function that hands it a frame, uint8 [y, x, 3].

    Raises OSError with ffmpeg's own words if it fails; on any error it is killed and waited for.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches us alone, and we end ffmpeg
    )
    pipe, errors = process.stdin, process.stderr
    assert pipe is not None and errors is not None
    words: collections.deque[bytes] = collections.deque(maxlen=_STDERR_LINES)
    # Drained by a thread, as a full pipe would stop ffmpeg; not a file, as the disk may be full.
    reader = threading.Thread(target=words.extend, args=(errors,), daemon=True)
    reader.start()

    def failure() -> OSError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_EXIT_SECONDS)
        reader.join(_EXIT_SECONDS)
        return OSError(_ffmpeg_failure(process.returncode, list(words)))

    def write(frame: np.ndarray) -> None:
        try:
            pipe.write(np.ascontiguousarray(frame).data)
            pipe.flush()
        except OSError:  # a broken pipe, which says nothing of why
            raise failure() from None

    try:
        yield write
        pipe.close()
        if process.wait() != 0:
            raise failure()
    finally:
        process.kill()  # does nothing to one that has ended
        process.wait()
        with contextlib.suppress(OSError):
            pipe.close()
        reader.join(_EXIT_SECONDS)
        errors.close()


def _ffmpeg_failure(status: int | None, words: list[bytes]) -> str:
    """How ffmpeg ended (None: not yet) and the last lines it wrote, mostly with the cause."""
    end = "it stopped reading" if status is None else f"exit status {status}"
    if status is not None and status < 0:
        end = f"killed by {signal.Signals(-status).name}"
    lines = [line.decode(errors="replace").strip() for line in words]
    said = "; ".join(line for line in lines if line) or "nothing"
    return f"ffmpeg failed while writing the .mp4 ({end}); it said: {said}"


def _write_png(frames: Iterator[np.ndarray], path: Path, *, name: Path) -> None:
    """Writes the only frame; ValueError, speaking of `name`, if there are more."""
    frame = next(frames)
    if next(frames, None) is not None:
        raise ValueError(_not_one_frame(name, "more than one"))
    image = frame if frame.dtype == np.uint8 else quantize(frame, rounding="round")
    path.write_bytes(iio.imwrite("<bytes>", image, plugin="pillow", extension=".png"))


def _write_npz(frames: Iterator[np.ndarray], path: Path, *, latents: np.ndarray | None) -> None:
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
            if latents is not None:
                with archive.open("latents.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, latents, allow_pickle=False)
