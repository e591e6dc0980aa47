"""How a video was made, kept as JSON in the file itself or beside it."""

import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np

from wan_jax import ffmpeg, files

Metadata = Callable[[], dict[str, Any]]

_PNG_KEY = "wan_jax"
_PNG_HEADER = 33  # bytes: the signature and IHDR, which has to stay the first chunk


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The metadata that an .mp4, .png or .npz file was saved with, None if with none.

    Raises ValueError, naming the file, for another ending and for what cannot be read.
    """
    place = Path(path)
    ending = place.suffix.lower()
    if ending not in (".mp4", ".png", ".npz"):
        raise ValueError(f"path {str(path)!r} holds no metadata; accepted: .mp4, .png, .npz")
    if ending == ".mp4":
        ffmpeg.check(place)
    text: Any = None
    try:
        if ending == ".mp4":
            text = ffmpeg.read_tags(place).get("comment")
        elif ending == ".png":
            text = iio.immeta(place, plugin="pillow").get(_PNG_KEY)
        else:
            # Opened here, as np.load leaves a broken archive open.
            with open(place, "rb") as file, np.load(file, allow_pickle=False) as archive:
                text = str(archive["metadata"]) if "metadata" in archive else None
    except Exception as error:  # three parsers fail in many ways, all of them the file's fault
        raise ValueError(
            f"path {str(path)!r} cannot be read: {error}; accepted: an .mp4, .png or .npz file"
        ) from error
    try:
        values = json.loads(text or "null")
    except ValueError:  # a comment of someone else's
        return None
    return values if isinstance(values, dict) else None


def write_json(values: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a .json file for people to read, whole or not at all.

    Raises ValueError for what JSON cannot hold, OSError if the file cannot be written.
    """
    text = json_text(values, indent=2)
    with files.whole_or_nothing(Path(os.path.abspath(path))) as partial:
        partial.write_text(f"{text}\n", encoding="utf-8")


def json_text(values: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Values as JSON; ValueError for what it cannot hold."""
    try:
        text = json.dumps(dict(values), ensure_ascii=False, allow_nan=False, indent=indent)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata: {error}; accepted: a dict of what JSON can hold, numbers finite"
        ) from error
    # Half a surrogate pair, as arguments that are not UTF-8 hold, becomes JSON's own escape.
    return text.encode("utf-8", "backslashreplace").decode()


def tag_mp4(path: Path, copy: Path, *, values: Mapping[str, Any]) -> None:
    """Puts metadata into an .mp4 as its comment, and "prompt" as its title, by way of a copy.

    The streams stay as they are, byte for byte. Whatever happens, the copy is gone at the end.
    """
    tags = {"comment": json_text(values)}
    prompt = values.get("prompt")
    if isinstance(prompt, str):
        # One line for a player's title bar; the comment has the prompt to the letter.
        title = " ".join(prompt.replace("\0", " ").split()).rstrip("\\")
        tags["title"] = title.encode("utf-8", "replace").decode()
    try:
        ffmpeg.add_tags(path, copy, tags=tags)
        os.replace(copy, path)
    finally:
        copy.unlink(missing_ok=True)


def tag_png(png: bytes, *, values: Mapping[str, Any]) -> bytes:
    """A .png file with metadata as international text, uncompressed, before its pixels."""
    body = b"iTXt" + _PNG_KEY.encode() + bytes(5) + json_text(values).encode()
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:_PNG_HEADER] + chunk + png[_PNG_HEADER:]
