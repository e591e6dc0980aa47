"""Folders that appear under their name only when they are whole, whatever happens meanwhile."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_LOCK = ".writing"  # held by the process that fills a partial folder, and gone from a whole one


@contextlib.contextmanager
def written_whole(path: Path, *, is_whole: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to fill; when the block ends it becomes `path`, and if it fails it is removed.

    is_whole(path) tells whether another process has finished the same folder meanwhile, which is
    then left as it is. A process that is killed leaves a hidden folder beside `path`, which
    wait_for_others() of the next one removes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: two hosts that share the disk may have the same process number.
    work = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
    try:
        work.chmod(0o755)
        with (work / _LOCK).open("w") as lock:
            _try_lock(lock.fileno())
            yield work
            try:
                work.rename(path)
                (path / _LOCK).unlink()
            except OSError:
                if not is_whole(path):
                    raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def wait_for_others(path: Path, *, on_wait: Callable[[], None] | None = None) -> None:
    """Wait for processes that are writing the same folder, and remove what dead ones left of it.

    on_wait is called once before the first wait. On a disk that knows no locks nothing is removed
    or waited for, and the first writer to finish wins.
    """
    for work in sorted(path.parent.glob(f"{_prefix(path)}*")):
        try:
            lock = (work / _LOCK).open("r+")
        except OSError:  # between two steps of another's making or removing it
            continue
        with lock:
            taken = _try_lock(lock.fileno())
            if taken is False:
                if on_wait is not None:
                    on_wait()
                    on_wait = None
                fcntl.flock(lock, fcntl.LOCK_EX)
            if taken is not None and _is_same(lock.fileno(), work / _LOCK):
                shutil.rmtree(work, ignore_errors=True)


def _prefix(path: Path) -> str:
    return f".{path.name}.partial-"


def _try_lock(descriptor: int) -> bool | None:
    """Whether the lock was free and is now ours; None where the disk knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_same(descriptor: int, file: Path) -> bool:
    """Whether the open file still has this name: its folder may have got its own meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except OSError:
        return False


def check_space(folder: Path, needed: int, *, remedy: str) -> None:
    """Raise ValueError, ending with the remedy, if the folder's disk has not `needed` bytes free.

    The folder need not exist yet.
    """
    place = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB free at {place}; {remedy}"
        )
