"""What wan_jax.apart runs: one conversion, told of on the standard output.

    python -m wan_jax.converter SOURCE TARGET DTYPE SCRATCH REMEDY

prints [done, total] in bytes, as lines of JSON, and at last an error's kind and text if there is
one.
"""

import json
import signal
import sys
from pathlib import Path
from typing import Any

from wan_jax import apart, loading
from wan_jax.pipeline import Progress
from wan_jax.weights import remote
from wan_jax.weights.sources import open_folder


def main(source: str, target: str, dtype: str, scratch: str, remedy: str) -> None:
    """Convert; see loading.convert()."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    place = remote.bucket_path(target) if remote.is_bucket(target) else Path(target)
    try:
        loading.convert(
            open_folder(Path(source)),
            place,
            dtype=dtype,
            callback=_tell_progress,
            scratch=Path(scratch),
            remedy=remedy,
        )
    except Exception as error:
        kinds = [name for name, kind in apart.ERRORS.items() if isinstance(error, kind)]
        _tell(kinds[0] if kinds else type(error).__name__, str(error) or repr(error))


def _tell_progress(progress: Progress) -> None:
    _tell(progress.done, progress.total)


def _tell(*facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def _end(signum: int, frame: Any) -> None:
    del frame
    sys.exit(128 + signum)  # removing what is half-written


if __name__ == "__main__":
    main(*sys.argv[1:])
