"""What is written down of each step: a line of JSON and, where asked for, TensorBoard's events."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Self

FILE = "metrics.jsonl"


class Metrics:
    """The lines of OUT/metrics.jsonl, one a step; those after `step`, of a run that was cut short,
    are dropped, so that the file tells of one uninterrupted run.

    tensorboard: also write events into OUT/tensorboard, which needs the package tensorboardX.
    """

    def __init__(self, out: Path, *, step: int = 0, tensorboard: bool = False) -> None:
        self._path = out / FILE
        self._drop_after(step)
        self._file = self._path.open("a", encoding="utf-8")
        self._events = _events(out / "tensorboard", step) if tensorboard else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # What a full disk did not take flush() has told; it would be told again.
        for stream in (self._file, self._events):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the values of a step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Hand to the disk what was written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def _drop_after(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = [line for line in read(self._path) if line["step"] <= step]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(partial, self._path)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that a kill cut off is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _events(folder: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "--tensorboard needs the package tensorboardX: pip install '.[train]'"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)
