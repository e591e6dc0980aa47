"""From a command to its first denoising step, in fresh processes that find ever more kept.

    python benchmarks/startup.py --model 1.3B [--folder DIR]

Writes a converted checkpoint of random numbers into --folder (1.3B: 15 GB, 14B: 41 GB) if it is not
there, and runs what run_t2v.py runs, up to the second step, with a cache for programs that is empty
at first: "nothing kept"; "programs kept", the weights' files dropped from the page cache; "files
kept" too. seconds is to the end of the first step. load is reading weights; compile is XLA's,
cache_read what came from the cache instead, trace JAX's own part (what is traced inside another
counts twice); start is all between the imports and the first weights. Prints one table and writes
results/startup_MODEL.json. Needs a GPU for the real models.
"""

import argparse
import collections
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import random_checkpoint
from measure import OURS, Case, attempt, parser, run

ROOT = Path(__file__).parents[1]
KEPT = ("nothing kept", "programs kept", "files kept")
MODELS = ("tiny", "nano", "1.3B", "14B")
_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "trace",
    "/jax/core/compile/backend_compile_duration": "compile",
    "/jax/compilation_cache/cache_retrieval_time_sec": "cache_read",
    "/jax/compilation_cache/cache_hits": "cache_hits",
    "/jax/compilation_cache/cache_misses": "cache_misses",
}


class Watch:
    """What a run tells of itself: moments since it began, and seconds and counts by event."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._sums: collections.Counter[str] = collections.Counter()
        self._loading = 0.0
        self.found: dict[str, Any] = {}

    def now(self) -> float:
        return time.perf_counter() - self._begun

    def event(self, name: str, amount: float = 1, **_: Any) -> None:
        """Told by JAX."""
        if name in _EVENTS:
            self._sums[_EVENTS[name]] += amount

    def progress(self, progress: Any) -> None:
        """Told by the pipeline."""
        stage, done = progress.stage, progress.done
        if stage == "load" and done == 0:
            self.found.setdefault("start", self.now() - self.found["import"])
            self._loading = self.now()
        elif stage == "load":
            self._sums["load"] += self.now() - self._loading
        elif stage == "denoise" and done == 1:
            sums = dict(self._sums)
            # What JAX calls compiling has the reading in it.
            sums["compile"] = sums.get("compile", 0.0) - sums.get("cache_read", 0.0)
            self.found |= {"seconds": self.now(), **sums}
        elif stage == "denoise" and done == 2:
            self.found["second_step"] = self.now() - self.found["seconds"]
            raise SystemExit(0)  # the rest is not asked for


def command(arguments: argparse.Namespace, output: str) -> list[str]:
    """What a user would type behind run_t2v.py."""
    own = ["--ckpt_dir", str(arguments.folder), "--cache_dir", str(arguments.cache)]
    own += ["--prompt", "Two cats box on a spotlit stage.", "--base_seed", "0"]
    own += ["--sample_steps", "2", "--save_file", output]
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
    sys.path.insert(0, str(ROOT))
    watch = Watch()
    import jax

    import run_t2v
    from wan_jax import cli

    watch.found["import"] = watch.now()
    jax.monitoring.register_event_duration_secs_listener(watch.event)
    jax.monitoring.register_event_listener(watch.event)
    told = cli.Reporter.__call__

    def tell(self: Any, progress: Any) -> None:
        told(self, progress)
        watch.progress(progress)

    cli.Reporter.__call__ = tell  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["run_t2v.py", *command(arguments, os.path.join(folder, "video.mp4"))]
        cli.define_flags(run_t2v.TEXT_TASKS)
        try:
            cli.run(run_t2v.main)
        except SystemExit as end:
            if end.code:
                watch.found["error"] = f"run_t2v.py ended with status {end.code}"
    return watch.found


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
    cases = written(model, folder)
    cases += [
        Case({"case": model, "how": how}, [*own, "--case", how])
        for how in arguments.kept.split(",")
    ]
    columns = ("case", "how", "seconds", "import", "start", "load", "trace", "compile")
    columns += ("cache_read", "cache_hits", "cache_misses", "second_step")
    try:
        run(f"startup_{model}", __file__, cases, arguments=arguments, columns=columns)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
