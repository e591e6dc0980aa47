"""Many benchmarks beside each other, each on a GPU of its own.

    python benchmarks/all.py --out DIR [--gpus 4] [--seconds 560] [--only precision,attention]

Jobs start in the order of the list, or of --only, as GPUs become free; those that need all of them
come last and run alone. A job that reads a checkpoint waits until it is written, on the CPU, into
--checkpoints, unless it is there. Each job writes its results as they come; they are gathered in
--out with its log, NAME.json and NAME.log, for benchmarks/results. At --seconds everything is
stopped, with what was measured until then. A line tells of each job: its seconds, its exit status,
its rows, those that are errors, and the last line of its log. The exit status is 0 if all jobs'
were. --list tells what there is; --tiny tries everything on a CPU.
"""

import argparse
import collections
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from children import end_with_signals, environment_of
from records import ROOT
from runs import listed

FOLDER = "CKPT"  # in a command: where the checkpoint of its model lies
ALL, NONE = -1, 0  # of the GPUs
_POLL = 0.2  # seconds
_GRACE = 12.0  # that a job has to write what it has and to end
_LEAST = 45.0  # with fewer left no job is started


class Job(NamedTuple):
    """command: a script beside this one, and its flags. minutes: about what it takes on an H100.

    cards: 1, ALL or NONE. model: whose checkpoint it reads.
    """

    command: str
    minutes: float
    cards: int = 1
    model: str = ""


_DIT = "--backends _native_cudnn --quantize fp8_linear,fp8"
_WHOLE, _LONG = "decode 1280x720 81 whole,decode 1280x720 81 6GB", "1920x1080 81 12GB"
_EXACT = f"decode 1280x720 81 6GB,decode {_LONG},encode {_LONG}"
_DECODE = f"{_WHOLE},decode {_LONG},decode 1920x1080 801 12GB"
JOBS = {
    "precision": Job("precision.py", 4),
    "attention": Job("attention.py", 4),
    "residual": Job("residual.py", 2),
    "dit_14B": Job(f"dit.py --models 14B {_DIT}", 9),
    "dit_1.3B": Job(f"dit.py --models 1.3B {_DIT}", 4),
    "fp8": Job("fp8.py", 6),
    "training": Job("training.py --remats products,attention", 5),
    "vae_decode": Job("vae.py --directions decode --sizes 1280x720", 7),
    "vae_encode": Job("vae.py --directions encode --sizes 1280x720", 7),
    "umt5": Job("umt5.py", 4),
    "end_to_end_1.3B": Job("end_to_end.py --model 1.3B", 5),
    "miniature_t2v": Job("miniature.py --kinds t2v", 4),
    "miniature_i2v": Job("miniature.py --kinds i2v", 4),
    "miniature_flf2v": Job("miniature.py --kinds flf2v", 4),
    "miniature_vae": Job("miniature.py --kinds vae", 2),
    "lora": Job("lora.py", 6),
    "startup_14B": Job(f"startup.py --model 14B --steps 3 --folder {FOLDER}", 7, model="14B"),
    "memory_1.3B": Job(
        f"memory.py --model 1.3B --folder {FOLDER} --stages all --max_memory none,6GB",
        5,
        model="1.3B",
    ),
    "memory_14B": Job(
        f"memory.py --model 14B --folder {FOLDER} --stages all --steps 3 --max_memory none,12GB",
        9,
        model="14B",
    ),
    "tiles_decode": Job(f"tiles.py --measure time --cases '{_DECODE}'", 7),
    "tiles_encode": Job(
        f"tiles.py --measure time --cases 'encode {_LONG},encode 1920x1080 801 12GB'", 4
    ),
    "tiles_exact": Job(f"tiles.py --measure apart --exact --cases '{_EXACT}'", 8),
    "spread": Job("spread.py --plans guidance2,guidance2xulysses2 --steps 3", 8, ALL),
    "restore": Job(f"restore.py --model 14B --counts 4 --folder {FOLDER}", 3, ALL, "14B"),
}


class Running(NamedTuple):
    """A job at work. ends: the moment at which it should be done."""

    name: str
    job: Job
    process: subprocess.Popen[bytes]
    cards: tuple[str, ...]
    begun: float
    ends: float


class Queue:
    """Jobs on cards, until `seconds` are over. out: where results and logs go."""

    def __init__(
        self,
        jobs: Mapping[str, Job],
        cards: Sequence[str],
        *,
        out: Path,
        checkpoints: Path,
        seconds: float,
        tiny: bool = False,
    ) -> None:
        self._out, self._checkpoints, self._tiny = out, checkpoints, tiny
        self._work = Path(tempfile.mkdtemp(prefix="wan_jax_all"))
        self._cards, self._free = tuple(cards), list(cards)
        self._over = time.perf_counter() + seconds
        models = dict.fromkeys(job.model for job in jobs.values() if job.model)
        writers = {f"write_{m}": self._writer(m) for m in models if not self._written(m)}
        self._waiting = collections.deque([*writers.items(), *jobs.items()])
        self._running: list[Running] = []
        self.failed: list[str] = []

    def run(self) -> None:
        """Until all are done, or time is over."""
        self._out.mkdir(parents=True, exist_ok=True)
        try:
            while self._waiting or self._running:
                for name, job in list(self._waiting):
                    if self._may_start(job):
                        self._waiting.remove((name, job))
                        self._start(name, job)
                time.sleep(_POLL)
                self._look()
                if not self._running and not any(self._may_start(j) for _, j in self._waiting):
                    break
        finally:
            self._stop()

    def _writer(self, model: str) -> Job:
        own = f"startup.py --child write --model {model} --folder {FOLDER}"
        return Job(own, 5, NONE, model)

    def _folder(self, model: str) -> Path:
        return self._checkpoints / model

    def _written(self, model: str) -> bool:
        return (self._folder(model) / "manifest.json").exists()

    def _left(self) -> float:
        return self._over - time.perf_counter()

    def _may_start(self, job: Job) -> bool:
        if self._left() < _LEAST + _GRACE:
            return False
        if job.cards == NONE:
            return True
        if job.model and not self._written(job.model):
            return False
        if job.cards != ALL:
            return bool(self._free)
        others = [other for _, other in self._waiting if other.cards == 1 and not self._lost(other)]
        return not others and len(self._free) == len(self._cards)

    def _lost(self, job: Job) -> bool:
        """Whether its checkpoint is not there, and nobody writes it."""
        if not job.model or self._written(job.model):
            return False
        active = [*(run.job for run in self._running), *(own for _, own in self._waiting)]
        return not any(own.cards == NONE and own.model == job.model for own in active)

    def _start(self, name: str, job: Job) -> None:
        count = len(self._cards) if job.cards == ALL else job.cards
        cards = tuple(self._free.pop(0) for _ in range(count))
        script, *own = shlex.split(job.command)
        words = [str(self._folder(job.model)) if word == FOLDER else word for word in own]
        seconds = min(self._left() - _GRACE, 120 * job.minutes)
        if "write" not in own:
            words += ["--name", name, "--seconds", f"{seconds:.0f}"]
        words += ["--tiny"] if self._tiny else []
        where = {"WAN_JAX_RESULTS": str(self._work / name), "PYTHONUNBUFFERED": "1"}
        where["CUDA_VISIBLE_DEVICES"] = ",".join(cards)
        where |= {"JAX_PLATFORMS": "cpu"} if job.cards == NONE else {}
        with (self._out / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(Path("benchmarks") / script), *words],
                cwd=ROOT,
                env=environment_of(where),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        begun = time.perf_counter()
        self._running.append(Running(name, job, process, cards, begun, begun + seconds))
        print(f"{name} begins on {', '.join(cards) or 'the CPU'}", flush=True)

    def _look(self) -> None:
        """Gather results, and see who is done or late."""
        now = time.perf_counter()
        for run in list(self._running):
            if run.process.poll() is not None:
                self._running.remove(run)
                self._free = sorted([*self._free, *run.cards], key=self._cards.index)
                self._tell(run)
            elif now > run.ends + 2 * _GRACE:
                _signal(run, signal.SIGKILL)
            elif now > run.ends + _GRACE:
                _signal(run, signal.SIGTERM)
        self._gather()

    def _gather(self) -> None:
        for path in self._work.glob("*/*.json"):
            place = self._out / path.name
            with contextlib.suppress(OSError):
                if not place.exists() or place.stat().st_mtime < path.stat().st_mtime:
                    shutil.copy2(path, place)

    def _tell(self, run: Running) -> None:
        """The line of a job that has ended."""
        self._gather()
        rows = [row for path in (self._work / run.name).glob("*.json") for row in _rows(path)]
        errors = sum("error" in row for row in rows)
        status = run.process.returncode
        wrong = run.job.cards == NONE and not self._written(run.job.model)
        if status or wrong:
            self.failed.append(run.name)
        seconds = time.perf_counter() - run.begun
        told = f"{run.name}: {seconds:.0f} s, exit status {status}, {len(rows)} rows"
        told += f", {errors} of them errors" if errors else ""
        print(f"{told}; {_last(self._out / f'{run.name}.log')}", flush=True)

    def _stop(self) -> None:
        """End all that runs, and say what never began."""
        for number, patience in ((signal.SIGTERM, 8.0), (signal.SIGKILL, 2.0)):
            for run in self._running:
                _signal(run, number)
            until = time.perf_counter() + patience
            while self._running and time.perf_counter() < until:
                time.sleep(_POLL)
                self._look()
        for name, _ in self._waiting:
            self.failed.append(name)
            print(f"{name}: not begun", flush=True)
        self._gather()
        shutil.rmtree(self._work, ignore_errors=True)


def _signal(run: Running, number: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(run.process.pid, number)


def _rows(path: Path) -> Iterator[Mapping[str, object]]:
    with contextlib.suppress(OSError, ValueError):
        yield from json.loads(path.read_text())["rows"]


def _last(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").split("\n")]
    return next((line[-200:] for line in reversed(lines) if line), "it said nothing")


def cards_of(count: int | None) -> list[str]:
    """The GPUs by the names that CUDA knows them by: those that the environment lets be seen."""
    seen = listed(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    return (seen or [str(i) for i in range(count or 1)])[:count]


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--out", type=Path, help="where results and logs go")
    flags.add_argument("--gpus", type=int, default=1)
    flags.add_argument("--seconds", type=float, default=3600.0)
    flags.add_argument("--only", default=",".join(JOBS))
    flags.add_argument("--checkpoints", type=Path, help="default: removed at the end")
    flags.add_argument("--list", action="store_true", help="what there is, and about how long")
    flags.add_argument("--tiny", action="store_true", help="small shapes, to try it on a CPU")
    arguments = flags.parse_args()
    wanted = listed(arguments.only)
    if unknown := [name for name in wanted if name not in JOBS]:
        flags.error(f"--only has {unknown}; there are {', '.join(JOBS)}")
    jobs = {name: JOBS[name] for name in wanted}
    if arguments.list:
        for name, job in jobs.items():
            print(f"{name}: {job.minutes:g} min, benchmarks/{job.command}")
        return
    if arguments.out is None:
        flags.error("--out is missing")
    if arguments.tiny:
        jobs = {n: job._replace(model=job.model and "tiny") for n, job in jobs.items()}
    end_with_signals()
    scratch = Path(tempfile.mkdtemp(prefix="wan_jax_checkpoints"))
    try:
        queue = Queue(
            jobs,
            cards_of(arguments.gpus),
            out=arguments.out.absolute(),
            checkpoints=(arguments.checkpoints or scratch).absolute(),
            seconds=arguments.seconds,
            tiny=arguments.tiny,
        )
        queue.run()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if queue.failed:
        raise SystemExit(f"not done: {', '.join(queue.failed)}")


if __name__ == "__main__":
    main()
