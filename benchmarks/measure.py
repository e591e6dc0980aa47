"""What every benchmark shares: timing, the facts of the machine, results beside the peer's.

A benchmark is a parent that runs one child process for each system and case, and a child that
reports every row as soon as it has it. A child that fails or is stopped loses no row but its own.
Run as a script this file tells the device.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

OURS = "wan_jax"
RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "transformers", "nvidia-cudnn-cu13")
_STARTED = time.perf_counter()
# TFLOP/s measured on a card by its name: a bfloat16 product of 8192^3 (by torch), and the decoder's
# 3x3x3 convolutions at 1280x720, each at the best rate its shape gave in JAX.
CEILINGS = {
    "NVIDIA H200": {"product bfloat16": 790.0, "conv bfloat16": 533.0, "conv float32": 337.0}
}


class Case(NamedTuple):
    """A child to run. labels: what each of its rows says besides what it measures."""

    labels: dict[str, Any]
    arguments: list[str]
    environment: Mapping[str, str] | None = None


# What a child uses


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


def report(value: dict[str, Any]) -> None:
    """Print a child's result as a line of its own."""
    print(json.dumps(value), flush=True)


def attempt(labels: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    """Report the labels with what measure() gives or, if it fails, with its error."""
    try:
        found = measure()
    except Exception as error:  # one case must not lose the others
        line = " ".join(str(error).split())[:200]
        found = {"error": f"{type(error).__name__}: {line}"}
    report({**labels, **found})


def matmul_tflops(size: int) -> float:
    """Measured TFLOP/s of a square bfloat16 product: what a step could at best come to."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 2)
    x, y = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    repeats = 20

    @jax.jit
    def many(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, repeats, lambda _, z: (z @ y) * jnp.bfloat16(0.01), x)

    jax.block_until_ready(many(x, y))
    start = time.perf_counter()
    jax.block_until_ready(many(x, y))
    return repeats * 2 * size**3 / (time.perf_counter() - start) / 1e12


def peak_gib() -> float:
    """Most memory of the device that JAX's allocator had in use so far; 0 where it keeps no count.

    It counts what tuning a program needed too.
    """
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30


def torch_device() -> str:
    """Where torch computes."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def in_torch(make: Callable[[], Any], dtype: Any) -> Any:
    """The module that make() gives, its random weights made on the card in this dtype."""
    import torch

    torch.set_default_dtype(dtype)
    try:
        with torch.device(torch_device()):
            network = make()
    finally:
        torch.set_default_dtype(torch.float32)
    return network.eval().requires_grad_(False)


def torch_seconds(
    run: Callable[[], Any], *, warmups: int = 1, repeats: int = 3
) -> dict[str, float]:
    """Median seconds of run(), without gradients, and the most memory that it had allocated."""
    import torch

    on_card = torch.cuda.is_available()

    def whole() -> None:
        with torch.no_grad():
            run()
        if on_card:
            torch.cuda.synchronize()

    whole()
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(whole, warmups=warmups, repeats=repeats)
    peak = torch.cuda.max_memory_allocated() if on_card else 0
    return {"seconds": seconds, "peak_gib": peak / 2**30}


# What a parent uses


def parser(description: str | None, *, systems: Sequence[str] = (OURS,)) -> argparse.ArgumentParser:
    """The flags that benchmarks share."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if len(systems) > 1:
        made.add_argument("--systems", default=",".join(systems), help="which to measure")
    made.add_argument("--seconds", type=float, help="stop in time, and write what there is")
    made.add_argument("--each", type=float, help="stop a child after so many seconds")
    made.add_argument("--keep", action="store_true", help="add to what an earlier run wrote")
    made.add_argument("--tiny", action="store_true", help="small shapes, to try it on a CPU")
    made.add_argument("--child", help=argparse.SUPPRESS)
    made.add_argument("--case", help=argparse.SUPPRESS)
    return made


class _Tail(threading.Thread):
    """Shows what a child says on stderr, and keeps the last line of it."""

    def __init__(self, source: IO[str]) -> None:
        super().__init__(daemon=True)
        self._source, self._last = source, ""
        self.start()

    def run(self) -> None:
        with self._source:
            for line in self._source:
                sys.stderr.write(line)
                self._last = line.strip() or self._last

    def last(self) -> str:
        self.join(1.0)
        return self._last[-200:]


def rows(
    script: str,
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Run `python script arguments`; every object that it reports, as it comes.

    Each system is measured in a process of its own, so that neither holds the other's memory. One
    that fails, or is stopped after so many seconds, gives {"error": ...} last.
    """
    process = subprocess.Popen(
        [sys.executable, script, *arguments],
        env={"JAX_TRACEBACK_FILTERING": "off", **os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # its own children are stopped with it
    )
    assert process.stdout is not None and process.stderr is not None
    late, said = threading.Event(), _Tail(process.stderr)

    def stop() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(0.0 if seconds is None else max(seconds, 0.0), stop)
    if seconds is not None:
        timer.start()
    try:
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found
        process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
        said.last()
    if late.is_set():
        yield {"error": f"stopped after {seconds:.0f} s"}
    elif process.returncode:
        yield {"error": f"exit status {process.returncode}: {said.last()}"}


def child(
    script: str, arguments: Sequence[str], *, environment: Mapping[str, str] | None = None
) -> Any:
    """The last object of rows(); an error if there is none."""
    found = list(rows(script, arguments, environment=environment))
    return found[-1] if found else {"error": "nothing was reported"}


def device() -> str:
    """The kind of device that JAX finds, asked in a process of its own."""
    return str(child(__file__, []).get("device", "unknown"))


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
    git = ["git", "-C", str(Path(__file__).parents[1])]
    changed = ("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results", ":!docs")
    try:
        name, changes = (
            subprocess.run([*git, *own], capture_output=True, text=True, check=True).stdout.strip()
            for own in (("rev-parse", "--short", "HEAD"), changed)
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("WAN_JAX_COMMIT", "unknown")
    return name + ("+" if changes else "")


def path_of(name: str, *, tiny: bool = False) -> Path:
    """Where the results of a benchmark go: those of tiny shapes never beside the real ones."""
    folder = os.environ.get("WAN_JAX_RESULTS")
    if folder is None and tiny:
        folder = os.path.join(tempfile.gettempdir(), "wan_jax_tiny_results")
    return Path(folder or RESULTS) / f"{name}.json"


def save(
    name: str, rows: Sequence[dict[str, Any]], facts: dict[str, Any], *, tiny: bool = False
) -> Path:
    """Write results/NAME.json with the rows, the device, the versions, the commit, the command."""
    path = path_of(name, tiny=tiny)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"command": " ".join(["python", *sys.argv]), "commit": commit(), **facts}
    work = path.with_suffix(".partial")  # a run may be killed at any moment
    work.write_text(json.dumps({**head, "versions": versions(), "rows": rows}, indent=2) + "\n")
    work.rename(path)
    return path


def kept(
    name: str, facts: dict[str, Any], cases: Sequence[Case], *, tiny: bool
) -> list[dict[str, Any]]:
    """Rows of an earlier run on such a device with these versions, less those measured anew."""
    try:
        before = json.loads(path_of(name, tiny=tiny).read_text())
    except (OSError, ValueError):
        return []
    same = {**facts, "versions": versions(), "commit": commit()}
    if any(before.get(key) != value for key, value in same.items()):
        print(f"what {name}.json holds is of another device or version, and goes", flush=True)
        return []
    new = [case.labels for case in cases]
    return [row for row in before["rows"] if not any(own.items() <= row.items() for own in new)]


def compare(found: Iterable[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """The rows with rate, share of the ceiling, and seconds by those of the case's best peer."""
    found = [dict(row) for row in found]
    best: dict[str, float] = {}
    for row in found:
        if "seconds" in row and row.get("system", OURS) != OURS:
            best[row["case"]] = min(row["seconds"], best.get(row["case"], float("inf")))
    for row in found:
        if "seconds" not in row:
            continue
        if "tflop" in row:
            row["tflop_per_s"] = row["tflop"] / row["seconds"]
            ceiling = CEILINGS.get(device, {}).get(row.get("kind", ""))
            if ceiling is not None:
                row["share"] = row["tflop_per_s"] / ceiling
        if row["case"] in best:
            row["ratio"] = row["seconds"] / best[row["case"]]
    return found


def run(
    name: str,
    script: str,
    cases: Sequence[Case],
    *,
    arguments: argparse.Namespace,
    columns: Sequence[str],
    facts: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Run every case, print and write each row as it comes, and print the table."""
    tiny = arguments.tiny
    kind = device()
    facts = {"device": kind, **(facts or {})}
    found = kept(name, facts, cases, tiny=tiny) if arguments.keep else []
    for case in cases:
        left = arguments.each
        if arguments.seconds is not None:
            whole = arguments.seconds - (time.perf_counter() - _STARTED)
            if whole <= 0:
                print(f"no time is left for {case.labels}", flush=True)
                continue
            left = whole if left is None else min(left, whole)
        own = [*case.arguments, *(["--tiny"] if tiny else [])]
        for row in rows(script, own, environment=case.environment, seconds=left):
            found.append({**case.labels, **row})
            print(found[-1], flush=True)
            save(name, compare(found, kind), facts, tiny=tiny)
    found = compare(found, kind)
    path = save(name, found, facts, tiny=tiny)
    print(f"{kind}, {versions()}\nwritten to {path}")
    print(table(found, (*columns, "error")))
    return found


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


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    report({"device": jax.devices()[0].device_kind})
