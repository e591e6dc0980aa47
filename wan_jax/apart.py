"""Conversion in a process of its own, for runs of several.

Orbax lets all processes of a run write a checkpoint together and waits for each; where only one is
to write, it must not know of the others. The process runs wan_jax.converter.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Those of a conversion that callers tell apart.
ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError, "OSError": OSError}


def convert(
    source: Path,
    target: Any,
    *,
    dtype: str,
    scratch: Path,
    remedy: str,
    on_bytes: Callable[[int, int], None] | None = None,
) -> None:
    """loading.convert() of the files at `source`, with the same errors."""
    command = [sys.executable, "-m", "wan_jax.converter", str(source), str(target), dtype]
    command += [str(scratch), remedy]
    package = str(Path(__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    error: tuple[str, str] | None = None
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                first, second = json.loads(line)
                if isinstance(first, str):
                    error = first, second
                elif on_bytes is not None:
                    on_bytes(first, second)
        except BaseException:
            process.terminate()  # it removes what is half-written
            raise
    if error is not None:
        raise ERRORS.get(error[0], RuntimeError)(error[1])
    if process.returncode:
        raise RuntimeError(f"the conversion of {source} ended with status {process.returncode}")
