"""What every benchmark shares: timing, the facts of the machine, results beside the peer's."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "nvidia-cudnn-cu13")


def median_seconds(run: Callable[[], Any], *, warmups: int = 1, repeats: int = 3) -> float:
    """Median wall time of run(), which must block until its work is done."""
    for _ in range(warmups):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def child(
    script: str, arguments: Sequence[str], *, environment: dict[str, str] | None = None
) -> Any:
    """Run `python script arguments` and return the JSON object on its last line of output.

    Each system is measured in a process of its own, so that neither holds the other's memory.
    A process that fails gives {"error": its last line}.
    """
    command = [sys.executable, script, *arguments]
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, text=True
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": f"exit status {done.returncode}: {(lines or [''])[-1]}"}
    return json.loads(lines[-1])


def report(value: dict[str, Any]) -> None:
    """Print a child's result as its last line."""
    print(json.dumps(value), flush=True)


def save(name: str, rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Path:
    """Write results/NAME.json with the rows, the device, the versions and the command."""
    path = Path(os.environ.get("WAN_JAX_RESULTS", RESULTS)) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", *sys.argv])
    path.write_text(
        json.dumps({"command": command, **facts, "versions": versions(), "rows": rows}, indent=2)
        + "\n"
    )
    return path


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """The rows as aligned text, one column a key; numbers to four digits."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    text = [list(columns)] + [[cell(row.get(c, "-")) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in text) for i in range(len(columns))]
    return "\n".join(
        "  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True))
        for line in text
    )
