"""A folder of videos and images with captions: the listing, and clips as arrays."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from wan_jax import ffmpeg
from wan_jax.images import read_image

# By ending, as a listing is checked before anything is opened.
VIDEOS = (
    *(".mp4", ".webm", ".mov", ".mkv", ".gif", ".avi", ".m4v"),
    *(".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv"),
)
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

Notify = Callable[[str], None]

LISTING = "metadata.jsonl"  # what Hugging Face's VideoFolder and ImageFolder read
_FILE_KEYS = ("file_name", "file")
_TEXT_KEYS = ("text", "caption")
_TOLD = 10  # of the lines that are left out; the others are counted


class Example(NamedTuple):
    """A video or an image and what it shows.

    name: as the listing has it. captions: one or more; each stands for the whole.
    """

    path: Path
    captions: tuple[str, ...]
    name: str


def is_image(path: Path) -> bool:
    """Whether a file is read as an image, which is a video of one frame."""
    return path.suffix.lower() in IMAGES


def read_listing(folder: str | os.PathLike[str], *, notify: Notify | None = None) -> list[Example]:
    """The examples of a folder, in the order of its listing.

    The listing is metadata.jsonl in the folder or, without it, the only file there that ends in
    .jsonl. A line is a JSON object with the keys `file_name` (or `file`: a path from the folder, of
    an ending in VIDEOS or IMAGES) and `text` (or `caption`: a text, or a list of texts, one of
    which is drawn every time); others are ignored. A link in the folder may lead anywhere, a path
    that leaves it by `..` or from / may not.
    notify: told of every line that is left out, by its number: one that is not such an object,
    names a file that is missing or was named before, or has no text. Raises ValueError if there is
    no listing, or no line is left.
    """
    place = Path(folder)
    listing = _find_listing(place)
    examples: list[Example] = []
    wrong: list[str] = []
    seen: dict[Path, int] = {}
    try:
        lines = listing.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(f"{listing} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            example = _parse(line, place)
            if example.path in seen:
                raise ValueError(f"{example.name!r} was named in line {seen[example.path]}")
        except ValueError as error:
            wrong.append(f"{listing} line {number}: {error}")
            continue
        seen[example.path] = number
        examples.append(example)
    if not examples:
        raise ValueError(summary(f"{listing} has no line that can be used", wrong))
    if notify is not None and wrong:
        for sentence in wrong[:_TOLD]:
            notify(f"left out: {sentence}")
        if len(wrong) > _TOLD:
            notify(f"left out: {len(wrong) - _TOLD} more lines of {listing}")
    return examples


def summary(what: str, reasons: list[str]) -> str:
    """One sentence with the first of many reasons."""
    more = f"; and {len(reasons) - _TOLD} more" if len(reasons) > _TOLD else ""
    return f"{what}: {'; '.join(reasons[:_TOLD]) or 'it is empty'}{more}"


def read_clip(path: Path, *, size: tuple[int, int], frames: int, fps: float) -> np.ndarray:
    """The first `frames` frames of a video, or an image: float32 [f, y, x, 3] in -1..1.

    size: (width, height), which the picture is resized to cover and then cut to at its centre;
    fitting.cover would be the same but for the aliasing of whatever is larger. fps: frames a second
    of the result. An image is one frame, whatever `frames`. One frame at a time is held at another
    size. Raises ValueError naming the file if it is missing, damaged or of another kind, or a video
    that is too short.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing or not a file")
    if is_image(path):
        return _cover(read_image(path), size)[None]
    width, height = size
    clip = np.empty((frames, height, width, 3), np.float32)
    found = 0
    try:
        for frame in ffmpeg.decode(path, size=size, fps=fps, frames=frames):
            clip[found] = read_image(frame)
            found += 1
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if found < frames:
        raise ValueError(
            f"{path} has {found} frames at {fps:g} a second ({found / fps:.2f} s); {frames} are "
            "needed"
        )
    return clip


def _find_listing(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"--data {folder} is no folder; one of videos and images is needed")
    if (folder / LISTING).is_file():
        return folder / LISTING
    found = [p for p in sorted(folder.glob("*.jsonl")) if not p.name.startswith(".")]
    if len(found) != 1:
        names = ", ".join(p.name for p in found[:5]) or "no file of that ending"
        raise ValueError(
            f"--data {folder} has {names}; needed is {LISTING}, or one file that ends in .jsonl, "
            'with lines like {"file_name": "cat.mp4", "text": "A cat."}'
        )
    return found[0]


def _parse(line: bytes, folder: Path) -> Example:
    """One line of a listing; ValueError with what is wrong."""
    try:
        values = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"a {type(values).__name__}; an object is needed")
    name = _first(values, _FILE_KEYS)
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"file_name is {name!r}; a path from the folder is needed")
    base = os.path.abspath(folder)
    path = Path(os.path.normpath(os.path.join(base, name)))
    if not path.is_relative_to(base):
        raise ValueError(f"file_name {name!r} leads out of the folder")
    if path.suffix.lower() not in (*VIDEOS, *IMAGES):
        raise ValueError(
            f"file_name {name!r} ends in {path.suffix!r}; accepted: {' '.join((*VIDEOS, *IMAGES))}"
        )
    try:
        present = path.is_file()
    except (OSError, ValueError):  # too long, or half a surrogate pair
        present = False
    if not present:
        raise ValueError(f"{name!r} does not exist or is not a file")
    return Example(path, _captions(_first(values, _TEXT_KEYS)), name)


def _captions(text: Any) -> tuple[str, ...]:
    texts = tuple(text) if isinstance(text, list) else (text,)
    if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise ValueError(f"text is {text!r}; a text or a list of texts is needed")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text is {text!r}, which holds half a character") from error
    return texts


def _first(values: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The value of the first of these keys that is there; ValueError if none is."""
    for key in keys:
        if key in values:
            return values[key]
    raise ValueError(f"no {keys[0]}; its keys are {sorted(values)}")


def _cover(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Float32 [y, x, 3] at (width, height): covered, cut at the centre, without aliasing."""
    width, height = size
    rows, columns = image.shape[:2]
    ratio = max(height / rows, width / columns)
    wide, tall = min(width / ratio, columns), min(height / ratio, rows)
    left, top = (columns - wide) / 2, (rows - tall) / 2
    box = (left, top, left + wide, top + tall)
    channels = [
        Image.fromarray(np.ascontiguousarray(image[..., c])).resize(
            size, Image.Resampling.BICUBIC, box=box
        )
        for c in range(3)
    ]
    # A cubic overshoots at edges, which no video's bytes do.
    return np.clip(np.stack([np.asarray(c) for c in channels], axis=-1), -1.0, 1.0)
