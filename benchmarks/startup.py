"""From a command to its first denoising step, in fresh processes that find ever more kept.

    python benchmarks/startup.py --model 1.3B [--folder DIR]

Writes a converted checkpoint of random numbers into --folder (1.3B: 15 GB, 14B: 41 GB) if it is not
there, and runs what run_t2v.py runs on one device, up to step --steps, with a cache for programs
that is empty at first: "nothing kept"; "programs kept", the weights' files dropped from the page
cache; "files kept" too. seconds is to the end of the first step. Its parts: import; start, all
between the imports and the first weights; load, reading weights; encode, the texts; programs,
tracing and compiling or reading what was compiled before, wherever it happens; first_step, the
computing alone; and other. later_step is the median of the steps after it. Of programs, trace is
JAX's own part (what is traced inside another counts twice), compile XLA's, cache_read what came
from the cache instead. Prints one table and writes results/startup_MODEL.json. Needs a GPU for the
real models.
"""

import argparse
import collections
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import random_checkpoint
from measure import attempt
from records import OURS
from runs import Case, listed, parser, run

KEPT = ("nothing kept", "programs kept", "files kept")
MODELS = ("tiny", "nano", "1.3B", "14B")
PARTS = ("import", "start", "load", "encode", "programs", "first_step", "other")
_MAKING = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "trace",
    "/jax/core/compile/backend_compile_duration": "compile",
    "/jax/compilation_cache/cache_retrieval_time_sec": "cache_read",
}
_COUNTED = {
    "/jax/compilation_cache/cache_hits": "cache_hits",
    "/jax/compilation_cache/cache_misses": "cache_misses",
}
Span = tuple[float, float]  # moments


class Watch:
    """What a run tells of itself: when stages and the making of programs began and ended."""

    def __init__(self, steps: int) -> None:
        self._steps, self._begun = steps, time.perf_counter()
        self._sums: collections.Counter[str] = collections.Counter()
        self._making: list[Span] = []
        self._stages: dict[str, list[Span]] = collections.defaultdict(list)
        self._since: dict[str, float] = {}
        self._done: list[float] = []  # moments at which steps were done
        self.imported = 0.0

    def now(self) -> float:
        return time.perf_counter() - self._begun

    def duration(self, name: str, seconds: float, **_: Any) -> None:
        """Told by JAX when it has made a program, or a part of one."""
        if name in _MAKING:
            self._sums[_MAKING[name]] += seconds
            self._making.append((self.now() - seconds, self.now()))

    def event(self, name: str, **_: Any) -> None:
        """Told by JAX."""
        if name in _COUNTED:
            self._sums[_COUNTED[name]] += 1

    def progress(self, progress: Any) -> None:
        """Told by the pipeline."""
        stage, done = progress.stage, progress.done
        if done == 0:
            self._since[stage] = self.now()
        elif stage == "denoise":
            self._done.append(self.now())
            if done == 1:
                self._stages["first_step"].append((self._since[stage], self.now()))
            if done >= self._steps:
                raise SystemExit(0)  # the rest is not asked for
        elif done == progress.total:
            self._stages[stage].append((self._since.get(stage, self.now()), self.now()))

    def found(self) -> dict[str, float]:
        """The parts of the time to the end of the first step, each without the others'."""
        if not self._done:
            raise RuntimeError("the run ended before its first step")
        end, making = self._done[0], joined(self._making)
        parts = {
            stage: covered(joined(self._stages[stage]), (0.0, end), without=making)
            for stage in ("load", "encode", "first_step")
        }
        first_load = min((begun for begun, _ in self._stages["load"]), default=self.imported)
        early = covered(making, (0.0, first_load))
        parts |= {"import": self.imported, "programs": covered(making, (0.0, end))}
        parts["start"] = max(first_load - self.imported - early, 0.0)
        parts["other"] = end - sum(parts.values())
        later = sorted(b - a for a, b in zip(self._done, self._done[1:], strict=False))
        more = {"later_step": later[len(later) // 2]} if later else {}
        sums = dict(self._sums)
        # What JAX calls compiling has the reading in it.
        sums["compile"] = sums.get("compile", 0.0) - sums.get("cache_read", 0.0)
        return {"seconds": end, **{name: parts[name] for name in PARTS}, **sums, **more}


def joined(spans: Iterable[Span]) -> list[Span]:
    """The same moments in spans that do not overlap."""
    found: list[Span] = []
    for begun, ended in sorted(spans):
        if found and begun <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], ended)
        else:
            found.append((begun, ended))
    return found


def covered(spans: Iterable[Span], within: Span, *, without: Iterable[Span] = ()) -> float:
    """Seconds of joined spans inside another, less those that are in `without`, joined as well."""
    apart, total = list(without), 0.0
    for begun, ended in spans:
        own = max(begun, within[0]), min(ended, within[1])
        if own[1] > own[0]:
            total += own[1] - own[0] - covered(apart, own)
    return total


def command(arguments: argparse.Namespace, output: str) -> list[str]:
    """What a user would type behind run_t2v.py; pictures need no ffmpeg, and none is written."""
    own = ["--ckpt_dir", str(arguments.folder), "--cache_dir", str(arguments.cache)]
    own += ["--prompt", "Two cats box on a spotlit stage.", "--base_seed", "0"]
    own += ["--sample_steps", str(max(arguments.steps, 2)), "--save_file", output]
    if arguments.tiny:
        own += ["--size", "32*16", "--frame_num", "5"]
    return own


def run_command(arguments: argparse.Namespace) -> dict[str, Any]:
    """The command's own path in this process, watched."""
    if arguments.case != KEPT[2]:
        random_checkpoint.drop_cached(arguments.folder)
    if arguments.tiny:  # on a CPU a run keeps no programs of itself
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(arguments.cache)
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    watch = Watch(arguments.steps)
    import jax

    import run_t2v
    from wan_jax import cli

    watch.imported = watch.now()
    jax.monitoring.register_event_duration_secs_listener(watch.duration)
    jax.monitoring.register_event_listener(watch.event)
    told = cli.Reporter.__call__

    def tell(self: Any, progress: Any) -> None:
        told(self, progress)
        watch.progress(progress)

    cli.Reporter.__call__ = tell  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["run_t2v.py", *command(arguments, os.path.join(folder, "video.png"))]
        cli.define_flags(run_t2v.TEXT_TASKS)
        try:
            cli.run(run_t2v.main)
        except SystemExit as end:
            if end.code:
                reason = f"status {end.code}: {end.__context__}"
                raise RuntimeError(f"run_t2v.py ended with {reason}") from end
    return watch.found()


def write(model: str, folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    random_checkpoint.write_all(model, folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"write_seconds": time.perf_counter() - start, "gb": size / 1e9}


def written(model: str, folder: Path) -> list[Case]:
    """The case that writes the checkpoint, on the host alone, if it is not there."""
    if (folder / "manifest.json").exists():
        return []
    own = ["--child", "write", "--model", model, "--folder", str(folder)]
    return [Case({"case": model, "how": "write"}, own, {"JAX_PLATFORMS": "cpu"})]


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--model", default="1.3B", choices=MODELS)
    flags.add_argument("--folder", type=Path, help="of the checkpoint; default: removed at the end")
    flags.add_argument("--kept", default=",".join(KEPT), help="which to measure, the first first")
    flags.add_argument("--steps", type=int, default=4, help="of denoising, the first one included")
    flags.add_argument("--cache", type=Path, help="of programs; default: removed at the end")
    arguments = flags.parse_args()
    model = "tiny" if arguments.tiny else arguments.model
    if arguments.child == "write":
        attempt({}, lambda: write(model, arguments.folder))
        return
    if arguments.child:
        attempt({"system": OURS}, lambda: run_command(arguments))
        return
    scratch = Path(tempfile.mkdtemp())
    folder = (arguments.folder or scratch / "checkpoint").absolute()
    cache = (arguments.cache or scratch / "cache").absolute()
    own = ["--child", OURS, "--model", model, "--folder", str(folder), "--cache", str(cache)]
    own += ["--steps", str(arguments.steps)]
    # JAX takes its memory at once, as it does where nobody says otherwise.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}
    cases = written(model, folder)
    cases += [
        Case({"case": model, "how": how}, [*own, "--case", how], environment)
        for how in listed(arguments.kept)
    ]
    columns = ("case", "how", "seconds", *PARTS, "later_step", "trace", "compile", "cache_read")
    columns += ("cache_hits", "cache_misses")
    try:
        run(f"startup_{model}", __file__, cases, arguments=arguments, columns=columns)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
