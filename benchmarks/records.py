"""What a benchmark writes: its rows with the device, the versions, the commit and the command."""

import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

OURS = "wan_jax"
ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # what is measured is what commit() names, installed or not
    sys.path.insert(0, str(ROOT))
RESULTS = Path(__file__).parent / "results"
WIDE, NARROW = "product bfloat16", "product fp8"
# TFLOP/s measured on a card by its name: a bfloat16 product of 8192^3 (by torch), and the decoder's
# 3x3x3 convolutions at 1280x720, each at the best rate its shape gave in JAX.
CEILINGS = {
    "NVIDIA H200": {WIDE: 790.0, "conv bfloat16": 533.0, "conv float32": 337.0},
    "NVIDIA H100 80GB HBM3": {WIDE: 735.0},
}
_PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "transformers", "nvidia-cudnn-cu13")
_LINE, _MORE = 300, 160  # characters of an error
_NO_MEMORY = re.compile("RESOURCE_EXHAUSTED|OutOfMemoryError")


def shortened(text: str) -> str:
    """An error in one line of some length, which tells if memory was what it lacked."""
    line = " ".join(text.split())
    lack = _NO_MEMORY.search(line)
    if lack is None or lack.end() <= _LINE:
        return line[:_LINE]
    return f"{line[: _LINE - _MORE]} ... {line[lack.start() :][:_MORE]}"


def lacks_memory(row: Mapping[str, Any]) -> bool:
    """Whether this is a row of what found no memory."""
    return _NO_MEMORY.search(row.get("error", "")) is not None


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that is measured, with a + if files differ; WAN_JAX_COMMIT where git is not."""
    git = ["git", "-C", str(ROOT)]
    changed = ("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results", ":!docs")
    try:
        name, changes = (
            subprocess.run([*git, *own], capture_output=True, text=True, check=True).stdout.strip()
            for own in (("rev-parse", "--short", "HEAD"), changed)
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("WAN_JAX_COMMIT", "unknown")
    return name + ("+" if changes else "")


def command() -> str:
    """What was typed, without the folders of this machine."""
    script, *given = sys.argv
    path = Path(script).absolute()
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(path.name)
    plain = [Path(word).name if os.path.isabs(word) else word for word in given]
    return shlex.join(["python", str(name), *plain])


def same_case(labels: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether a row is of the case that has these labels; "@" is the only way that there is."""
    counted = ("tflop", "kind") if "tflop" in labels else ()  # how fast it is, not which
    told = {name: value for name, value in labels.items() if name not in counted}
    return told.items() <= {"how": "@", **row}.items()


class Results:
    """The rows of a run, written as they come: results/NAME.json.

    labels: of the cases that are run. keep: add to the rows of other cases, if what the file holds
    is of this device, of these versions and of this commit. No row of a case that is not run is
    ever lost: where that cannot be, the file is NAME_2.json and so on. tiny: small shapes, whose
    results are never beside the real ones.
    """

    def __init__(
        self,
        name: str,
        facts: Mapping[str, Any],
        labels: Sequence[Mapping[str, Any]] = (),
        *,
        keep: bool = False,
        tiny: bool = False,
    ) -> None:
        self._head = {"command": command(), "commit": commit(), **facts}
        self._versions = versions()
        first = _folder(tiny) / f"{name}.json"
        before = _read(first)
        same = {**facts, "versions": self._versions, "commit": self._head["commit"]}
        self.kept: list[dict[str, Any]] = []
        if keep and all(before.get(key) == value for key, value in same.items()):
            self.path, self.kept = first, list(_others(before, labels))
        else:
            self.path = _free(first, labels)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write all rows; NaN and infinity, which JSON does not have, as null."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = {**self._head, "versions": self._versions, "rows": [*rows]}
        work = self.path.with_suffix(f".partial-{os.getpid()}")  # it may be killed at any moment
        work.write_text(json.dumps(_plain(whole), indent=2, allow_nan=False) + "\n")
        work.rename(self.path)


def _folder(tiny: bool) -> Path:
    folder = os.environ.get("WAN_JAX_RESULTS")
    if folder is None and tiny:
        folder = os.path.join(tempfile.gettempdir(), "wan_jax_tiny_results")
    return Path(folder or RESULTS)


def _read(path: Path) -> dict[str, Any]:
    """What the file holds; {} for none, or one that is damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _free(first: Path, labels: Sequence[Mapping[str, Any]]) -> Path:
    """The first of NAME.json, NAME_2.json, ... that holds no row of another case."""
    path, number = first, 1
    while any(_others(_read(path), labels)):
        number += 1
        path = first.with_stem(f"{first.stem}_{number}")
    return path


def _others(
    found: Mapping[str, Any], labels: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The rows of a file that are of none of these cases; what it says of all rows is of each."""
    for row in found.get("rows", ()):
        if not any(same_case(own, {**found, **row}) for own in labels):
            yield row


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare(
    found: Iterable[Mapping[str, Any]], device: str, *, number: str = "seconds"
) -> list[dict[str, Any]]:
    """The rows with rate, share of the ceiling, and seconds by those of the case's best peer.

    number: what is compared. The peers multiply bfloat16: a row of 8 bits has its ratio to that as
    to_bfloat16, and no share.
    """
    rows = [dict(row) for row in found]
    best: dict[str, float] = {}
    for row in rows:
        if row.get(number) and row.get("system", OURS) != OURS:
            best[case_of(row)] = min(row[number], best.get(case_of(row), math.inf))
    for row in rows:
        if not row.get(number):
            continue
        kind = row.get("kind", "")
        if "tflop" in row:
            row["tflop_per_s"] = row["tflop"] / row[number]
            if kind in (ceilings := CEILINGS.get(device, {})):
                row["share"] = row["tflop_per_s"] / ceilings[kind]
        if case_of(row) in best:
            name = "to_bfloat16" if kind == NARROW else "ratio"
            row[name] = row[number] / best[case_of(row)]
    return rows


def case_of(row: Mapping[str, Any]) -> str:
    """What is alike in rows that are compared."""
    return str(row.get("case", row.get("model", "")))


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The rows as aligned text, one column a key; numbers to four digits."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    text = [list(columns)] + [[cell(row.get(c, "-")) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in text) for i in range(len(columns))]
    return "\n".join(
        "  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip()
        for line in text
    )
