"""Folders that appear under their name only when they are whole, whatever happens meanwhile."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_TRIES, _PAUSE = 20, 0.05  # seconds between; threads that still write end within


@contextlib.contextmanager
def alone(path: Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the right to write `path` while the block runs; other processes wait for it.

    What killed processes left of it is removed first. on_wait() is called before a wait. On a disk
    that knows no locks nothing is waited for or removed, and the first writer to finish wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lock")
    descriptor = _acquire(file, on_wait)
    try:
        if descriptor is not None:
            _sweep(path)
        yield
    finally:
        if descriptor is not None:
            file.unlink(missing_ok=True)  # while it is held: who waits for it looks again
            os.close(descriptor)


def _acquire(file: Path, on_wait: Callable[[], None] | None) -> int | None:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait is not None:
                    on_wait()
                    on_wait = None
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_same(descriptor, file):
                return descriptor
        except OSError:  # no locks here
            file.unlink(missing_ok=True)
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it: there may be another


def _is_same(descriptor: int, file: Path) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except OSError:
        return False


def _prefix(path: Path) -> str:
    return f".{path.name}.partial-"


def _sweep(path: Path) -> None:
    """Remove half-written folders beside and in the one of which this process is the writer."""
    left = [p for p in path.parent.iterdir() if p.name.startswith(_prefix(path))]
    if path.is_dir():
        left += [p for p in path.iterdir() if p.name.startswith(".") and ".partial-" in p.name]
    for item in left:
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item, ignore_errors=True)


@contextlib.contextmanager
def written_whole(path: Path, *, is_whole: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to fill; when the block ends it becomes `path`, and if it fails it is removed.

    is_whole(path) tells whether another process has finished the same folder meanwhile, which is
    then left as it is. A process that is killed leaves a hidden folder beside `path`, which
    alone() of the next one removes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: two hosts that share the disk may have the same process number.
    work = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
    try:
        work.chmod(0o755)
        yield work
        try:
            work.rename(path)
        except OSError:
            if not is_whole(path):
                raise
    finally:
        for _ in range(_TRIES):
            shutil.rmtree(work, ignore_errors=True)
            if not work.exists():
                break
            time.sleep(_PAUSE)


def check_writable(folder: Path) -> None:
    """Raise ValueError if a folder cannot be written to or, where there is none, be made."""
    place = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{place} is no folder that you may write to")


def check_space(folder: Path, needed: int, *, remedy: str) -> None:
    """Raise ValueError, ending with the remedy, if the folder's disk has not `needed` bytes free.

    The folder need not exist yet.
    """
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB free at {place}; {remedy}"
        )
