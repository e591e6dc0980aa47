"""Folders that appear under their name only when they are whole."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(path: Path, *, is_whole: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to fill; when the block ends it becomes `path`, and if it fails it is removed.

    is_whole(path) tells whether another process has finished the same folder meanwhile, which is
    then left as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: two hosts that share the disk may have the same process number.
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        work.chmod(0o755)
        yield work
        try:
            work.rename(path)
        except OSError:
            if not is_whole(path):
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
