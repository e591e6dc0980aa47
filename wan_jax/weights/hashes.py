"""SHA-256 of files, computed beside other work on them."""

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_CHUNK = 2**24


class FileHashes:
    """A thread that hashes files while its block runs; of() waits for a file's turn.

    In a block, so that an error in it ends the thread within a chunk of 16 MiB.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._results: dict[Path, str] = {}
        self._error: OSError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(list(files),), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self, files: list[Path]) -> None:
        try:
            for file in files:
                digest = hashlib.sha256()
                with file.open("rb") as stream:
                    while chunk := stream.read(_CHUNK):
                        if self._stop.is_set():
                            return
                        digest.update(chunk)
                self._results[file] = digest.hexdigest()
        except OSError as error:
            self._error = error

    def of(self, file: Path) -> str:
        """SHA-256 of one of the files, in hexadecimal; OSError if one could not be read."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._results[file]
