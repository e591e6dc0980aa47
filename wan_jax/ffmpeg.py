"""Runs ffmpeg: frames go through a pipe into an .mp4, .gif or .webp file, or out of a video file.

A leaf: NumPy, imageio's ffmpeg and the standard library.
"""

import collections
import contextlib
import functools
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np

ENCODERS = {".mp4": "libx264", ".gif": "gif", ".webp": "libwebp_anim"}

# .mp4: what `imageio.get_writer(path, fps=fps, codec="libx264", quality=8)`, the reference's call,
# asks of ffmpeg: int((1 - 8 / 10) * 51) = CRF 10. imageio's own writer is not used because it
# ignores ffmpeg's exit status, so that a full disk passes for success, and rescales sides that are
# not multiples of 16.
# .gif: one palette for all frames, as one for each flickers and takes five times as long; ffmpeg
# holds them as bytes until it is known. The dither passes errors on from pixel to pixel: an ordered
# one is nearer in each pixel but further away, and less steady, in the mean of a few.
_PALETTE = "[0:v]split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=sierra2_4a"
_ARGUMENTS = {
    ".mp4": ["-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", "10", "-v", "warning"],
    ".gif": ["-filter_complex", _PALETTE, "-loop", "0", "-f", "gif", "-v", "error"],
    ".webp": ["-vcodec", "libwebp_anim", "-pix_fmt", "bgra", "-quality", "95", "-loop", "0"]
    + ["-f", "webp", "-v", "error"],
}
# Containers, not playlists, which name further files. Which codecs is up to the ffmpeg.
_CONTAINERS = "mov,matroska,webm,gif,avi,mpegts,mpeg,flv,asf,ogg"
_STDERR_LINES = 8
_EXIT_SECONDS = 10.0


def check(path: Path, *, size: tuple[int, int] | None = None) -> None:
    """Raises ValueError if a video could not be encoded to a file with this ending.

    size: (width, height) in pixels, if known. Checks that there is an ffmpeg with the encoder, and
    for .mp4 that the sides are even.
    """
    _program(path)
    if size is not None:
        _check_sides(path, size)


def encode(frames: Iterator[np.ndarray], path: Path, *, fps: float) -> None:
    """Writes frames to an .mp4, .gif or .webp file; the two last loop for ever.

    frames: one or more, uint8 [y, x, 3], all of one size; each is handed to ffmpeg before the next
    is asked for. fps: frames a second; a .gif counts hundredths of a second and a .webp
    thousandths, so their frames last a unit more or less, and are right on average.
    Raises ValueError as `check` does, OSError with ffmpeg's own words if it fails. An error of
    `frames` passes through unchanged. What was written until then is left to the caller.
    """
    with contextlib.ExitStack() as stack:
        write = None
        for frame in frames:
            if write is None:
                height, width, _ = frame.shape
                command = _encode_command(path, size=(width, height), fps=fps)
                write = stack.enter_context(_encoder(command, path.suffix))
            write(frame)


def decode(path: Path, *, size: tuple[int, int], fps: float, frames: int) -> Iterator[np.ndarray]:
    """Frames of a video file from its start, uint8 [y, x, 3], one by one as they are decoded.

    size: (width, height). The picture as it is meant to be seen, upright and with square pixels, is
    resized to cover that, bicubic and without aliasing, and cut at its centre. fps: frames a
    second; those of the file are repeated or left out. frames: at most so many; the file may have
    fewer, and nothing past them is read.
    Raises ValueError if there is no ffmpeg, OSError with its own words if it cannot read the file
    so far; a frame that it finds damaged counts as that, though players would show something.
    """
    program = _any_program(path)
    width, height = size
    command = [program, "-nostdin", "-v", "error", "-xerror", "-protocol_whitelist", "file"]
    command += ["-format_whitelist", _CONTAINERS, "-i", _file(path), "-map", "0:V:0"]
    command += ["-vf", _covering(size, fps), "-frames:v", str(frames)]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stderr is not None
    words: collections.deque[bytes] = collections.deque(maxlen=_STDERR_LINES)
    reader = threading.Thread(target=words.extend, args=(process.stderr,), daemon=True)
    reader.start()
    try:
        for _ in range(frames):
            data = process.stdout.read(height * width * 3)
            if len(data) < height * width * 3:
                break
            yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
        else:  # what it runs into beyond is no matter
            return
        if process.wait() != 0:
            reader.join(_EXIT_SECONDS)
            raise OSError(_failure(f"reading {path}", process.returncode, list(words)))
    finally:
        process.kill()  # does nothing to one that has ended
        process.wait()
        process.stdout.close()
        reader.join(_EXIT_SECONDS)
        process.stderr.close()


def check_decoder(path: Path) -> None:
    """Raises ValueError, naming what to install, if there is no ffmpeg to read a video with."""
    _any_program(path)


def add_tags(source: Path, target: Path, *, tags: Mapping[str, str]) -> None:
    """Copies an .mp4, its streams byte for byte, and gives the copy these tags and no others.

    tags: values of one line that do not end in a backslash, of any length.
    Raises ValueError for other values, OSError with ffmpeg's own words if it fails.
    """
    for name, value in tags.items():
        # ffmpeg takes a backslash before a line's end for one that escapes it, escaped or not.
        if value.endswith("\\") or re.search(r"[\0\r\n]", value):
            raise ValueError(f"tag {name}={value!r}; accepted: one line, no backslash at its end")
    # Not as arguments, of which none may be longer than 128 KiB.
    lines = [";FFMETADATA1", *(f"{name}={_escape(value)}" for name, value in tags.items())]
    command = ["-y", "-i", _file(source), "-f", "ffmetadata", "-i", "-", "-map", "0"]
    command += ["-map_metadata", "1", "-c", "copy", "-f", "mp4", "-v", "warning", _file(target)]
    _run(source, command, "adding tags to the .mp4", given="\n".join([*lines, ""]).encode())


def read_tags(path: Path) -> dict[str, str]:
    """The tags of a video file.

    Raises ValueError if there is no ffmpeg, OSError with its own words if it cannot read the file.
    """
    command = ["-v", "error", "-i", _file(path), "-f", "ffmetadata", "-"]
    text = _run(path, command, f"reading {path}").decode(errors="replace")
    found = re.findall(r"^((?:[^=;#\\\n]|\\[\s\S])+)=((?:[^\\\n]|\\[\s\S])*)$", text, re.MULTILINE)
    return {_unescape(name): _unescape(value) for name, value in found}


# Finding ffmpeg


def _program(path: Path) -> str:
    """The ffmpeg that writes such a file; ValueError naming what to install if there is none."""
    ending = path.suffix.lower()
    try:
        # Here, so that other files can be written without it.
        import imageio_ffmpeg

        program: str = imageio_ffmpeg.get_ffmpeg_exe()
        if ENCODERS[ending] not in _encoders(program):
            raise RuntimeError(f"{program} has no {ENCODERS[ending]} encoder")
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(
            f"path {str(path)!r}: {ending} needs ffmpeg with {ENCODERS[ending]} ({error}); "
            f"accepted: .npz or .png, or {ending} after `pip install imageio[ffmpeg]`, or with "
            "IMAGEIO_FFMPEG_EXE naming such an ffmpeg"
        ) from error
    return program


def _any_program(path: Path) -> str:
    """Any ffmpeg, for reading; ValueError naming what to install if there is none."""
    try:
        import imageio_ffmpeg

        program: str = imageio_ffmpeg.get_ffmpeg_exe()
        _encoders(program)  # runs it
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(
            f"path {str(path)!r}: reading videos needs ffmpeg ({error}); accepted: images, or "
            "videos after `pip install imageio[ffmpeg]`, or with IMAGEIO_FFMPEG_EXE naming an "
            "ffmpeg"
        ) from error
    return program


@functools.cache
def _encoders(program: str) -> frozenset[str]:
    """The encoders that an ffmpeg was built with (some distributions leave libx264 out)."""
    command = [program, "-hide_banner", "-encoders"]
    listing = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    rows = [line.split() for line in listing.stdout.decode(errors="replace").splitlines()]
    return frozenset(row[1] for row in rows if len(row) > 1)


def _check_sides(path: Path, size: tuple[int, int]) -> None:
    """ValueError for an .mp4 with an odd side; size is (width, height)."""
    width, height = size
    if path.suffix.lower() == ".mp4" and (width % 2 or height % 2):
        raise ValueError(
            f"video is {width} by {height} pixels; accepted for an .mp4: even sides (yuv420p "
            "stores colour at half size), or a path with another ending"
        )


# Running it


def _encode_command(path: Path, *, size: tuple[int, int], fps: float) -> list[str]:
    """The command that reads raw frames of size (width, height) from a pipe; see _ARGUMENTS."""
    _check_sides(path, size)
    command = [_program(path), "-y", "-f", "rawvideo", "-vcodec", "rawvideo"]
    command += ["-s", f"{size[0]}x{size[1]}", "-pix_fmt", "rgb24"]
    command += ["-r", str(Fraction(fps).limit_denominator()), "-i", "-", "-an"]
    return [*command, *_ARGUMENTS[path.suffix.lower()], _file(path)]


def _covering(size: tuple[int, int], fps: float) -> str:
    """The filters of decode()."""
    width, height = size
    # From 0, as a file may start later. "dar" is the shape of the picture as it is shown. To RGB
    # before the cut, as 4:2:0 would put that on even pixels.
    scale = f"w='max({width},round({height}*dar))':h='max({height},round({width}/dar))'"
    return (
        f"setpts=PTS-STARTPTS,fps={Fraction(fps).limit_denominator()},"
        f"scale={scale}:flags=bicubic+accurate_rnd+full_chroma_int,"
        f"format=rgb24,crop={width}:{height}"
    )


def _file(path: Path) -> str:
    """A path as ffmpeg's command line takes it, whatever characters are in it."""
    return f"file:{os.path.abspath(path)}"


@contextlib.contextmanager
def _encoder(command: list[str], ending: str) -> Iterator[Callable[[np.ndarray], None]]:
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
        return OSError(_failure(f"writing the {ending}", process.returncode, list(words)))

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


def _run(path: Path, arguments: list[str], doing: str, *, given: bytes = b"") -> bytes:
    """What ffmpeg writes to its standard output; OSError with its own words if it fails."""
    done = subprocess.run(
        [_program(path), *arguments],
        input=given,
        capture_output=True,
        start_new_session=True,
        check=False,
    )
    if done.returncode != 0:
        words = done.stderr.splitlines()[-_STDERR_LINES:]
        raise OSError(_failure(doing, done.returncode, words))
    return done.stdout


def _failure(doing: str, status: int | None, words: list[bytes]) -> str:
    """How ffmpeg ended (None: not yet) and the last lines it wrote, mostly with the cause."""
    end = "it stopped reading" if status is None else f"exit status {status}"
    if status is not None and status < 0:
        end = f"killed by {signal.Signals(-status).name}"
    lines = [line.decode(errors="replace").strip() for line in words]
    said = "; ".join(line for line in lines if line) or "nothing"
    return f"ffmpeg failed while {doing} ({end}); it said: {said}"


def _escape(text: str) -> str:
    """Text as ffmpeg's metadata files hold it."""
    return re.sub(r"[=;#\\\n]", r"\\\g<0>", text)


def _unescape(text: str) -> str:
    return re.sub(r"\\([\s\S])", r"\1", text)
