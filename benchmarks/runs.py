"""The parent of a benchmark: its flags, its cases one by one, and the table at the end.

It runs one child process for each system and case, and a child reports every row as soon as it has
it. A child that fails or is stopped loses no row but its own.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from children import child, end_with_signals, follow_parent, rows
from records import OURS, Results, compare, table, versions

_EACH = 1800.0  # seconds that a child may take
_DEVICE = 300.0  # that it may take to start the card
_STARTED = time.perf_counter()
Rows = list[dict[str, Any]]


class Case(NamedTuple):
    """A child to run. labels: what each of its rows says besides what it measures."""

    labels: dict[str, Any]
    arguments: list[str]
    environment: Mapping[str, str] | None = None


def parser(description: str | None, *, systems: Sequence[str] = (OURS,)) -> argparse.ArgumentParser:
    """The flags that benchmarks share."""
    follow_parent()
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if len(systems) > 1:
        made.add_argument("--systems", default=",".join(systems), help="which to measure")
    made.add_argument("--name", help="of the file of results; default: the benchmark's")
    made.add_argument("--seconds", type=float, help="stop in time, and write what there is")
    made.add_argument("--each", type=float, default=_EACH, help="stop a child after so many")
    made.add_argument("--keep", action="store_true", help="add to what an earlier run wrote")
    made.add_argument("--tiny", action="store_true", help="small shapes, to try it on a CPU")
    made.add_argument("--child", help=argparse.SUPPRESS)
    made.add_argument("--case", help=argparse.SUPPRESS)
    return made


def listed(text: str) -> list[str]:
    """What commas part."""
    return [item for item in (part.strip() for part in text.split(",")) if item]


def device() -> tuple[str, int]:
    """The kind of device that JAX finds and how many, asked in a process of its own."""
    found = child(str(Path(__file__).with_name("measure.py")), [], seconds=_DEVICE)
    return str(found.get("device", "unknown")), int(found.get("devices", 1))


def run(
    name: str,
    script: str,
    cases: Sequence[Case],
    *,
    arguments: argparse.Namespace,
    columns: Sequence[str],
    facts: Mapping[str, Any] | None = None,
    number: str = "seconds",
    derive: Callable[[Rows], Rows] = list,
    spread: bool = False,
) -> Rows:
    """Run every case, print and write each row as it comes, and print the table.

    number: what is compared with the peers. derive: adds what follows from other rows. spread: over
    all cards; else, unless the environment picks one, the first is used.
    """
    end_with_signals()
    if not spread:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    kind, count = device()
    told = {"device": f"{count} x {kind}" if spread else kind, **(facts or {})}
    results = Results(
        arguments.name or name,
        told,
        [case.labels for case in cases],
        keep=arguments.keep,
        tiny=arguments.tiny,
    )
    found = list(results.kept)

    def finished() -> Rows:
        return derive(compare(found, kind, number=number))

    for case in cases:
        left = _left(arguments)
        if left <= 0:
            print(f"no time is left for {case.labels}", flush=True)
            continue
        own = [*case.arguments, *(["--tiny"] if arguments.tiny else [])]
        for row in rows(script, own, environment=case.environment, seconds=left):
            found.append({**case.labels, **row})
            print(found[-1], flush=True)
            results.write(finished())
    if not found:
        print("nothing was measured, and nothing is written", flush=True)
        return []
    results.write(finished())
    print(f"{told['device']}, {versions()}\nwritten to {results.path}")
    print(table(finished(), (*columns, "error")), flush=True)
    return finished()


def _left(arguments: argparse.Namespace) -> float:
    """Seconds that the next child may take."""
    if arguments.seconds is None:
        return float(arguments.each)
    left = arguments.seconds - (time.perf_counter() - _STARTED)
    return min(left, float(arguments.each))
