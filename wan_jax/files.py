"""Files, and folders of numbered frames, that appear whole or not at all.

A leaf: the standard library.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

_FRAME = re.compile(r"\d{5,}\.png")


def frame_name(number: int) -> str:
    """The name of one frame, counted from 0, in a folder of them."""
    return f"{number:05}.png"


def in_the_way(folder: Path) -> str:
    """What keeps a folder of frames from being written or replaced, in words; empty if nothing."""
    if not os.path.lexists(folder):
        return ""
    if folder.is_symlink() or not folder.is_dir():
        return "not a folder"
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return "a folder that you may not change"
    others = [item.name for item in folder.iterdir() if not _is_frame(item)]
    return ", ".join(sorted(others)[:3])


def hidden(path: Path, kind: str) -> Path:
    """A hidden name, with the same ending and in the same folder, of what is not whole yet."""
    return path.with_name(f".{path.stem}.{kind}-{os.getpid()}{path.suffix}")


@contextlib.contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """A name for a file or a folder of frames: moved to `path` at the end, removed on any error."""
    partial = hidden(path, "partial")
    try:
        yield partial
        if partial.is_dir():
            _replace_folder(partial, path)
        else:
            os.replace(partial, path)
    except BaseException:
        remove(partial)
        raise


def remove(path: Path) -> None:
    """Removes a file if it is there, or a folder of frames; OSError if that has anything else."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for item in list(path.iterdir()):
        if _is_frame(item):
            item.unlink()
    path.rmdir()


def _is_frame(item: Path) -> bool:
    return _FRAME.fullmatch(item.name) is not None and not item.is_dir()


def _replace_folder(new: Path, path: Path) -> None:
    """Moves a folder to where another may be, which is then removed, or on any error put back."""
    older = Path(tempfile.mkdtemp(prefix=f".{path.name}.older-", dir=path.parent))
    try:
        if path.exists():
            os.rename(path, older)
        os.rename(new, path)
    finally:
        if any(older.iterdir()) and not path.exists():
            os.rename(older, path)
        else:
            remove(older)
