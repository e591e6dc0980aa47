"""Where videos go: names as the reference makes them, and which of them are there already."""

import dataclasses
import datetime
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from wan_jax import media
from wan_jax.request import Request


@dataclasses.dataclass(frozen=True)
class Job:
    """One checked video: what is asked of the checkpoint, and where the result goes.

    request: of this video alone. noise: instead of the seed's. seed_drawn: nobody asked for this
    seed. settings: all that makes the video what it is, as JSON; "video" is its number among those
    of its prompt, `videos`. save_file: the one its line in a prompts file names. output: where the
    result goes, known once all jobs are.
    """

    request: Request
    noise: np.ndarray | None
    seed_drawn: bool
    settings: dict[str, Any]
    videos: int
    save_file: str | None
    output: Path = Path()


class Place(NamedTuple):
    """An output's path and, where its name holds the time, the pattern of such names."""

    path: Path
    pattern: re.Pattern[str] | None = None


def place(
    values: flags.FlagValues,
    job: Job,
    *,
    number: int,
    total: int,
    now: datetime.datetime,
    taken: Collection[Path],
) -> Place:
    """Where job `number` of `total` goes.

    A save_file of its own gets _K for video K of several; --save_file gets _NNN if there are
    several jobs; the reference's name is task, size, devices, the prompt's first 50 characters, the
    time.
    """
    if job.save_file is not None:
        path = Path(job.save_file)
        video = f"_{job.settings['video']}" if job.videos > 1 else ""
        return Place(path.with_name(f"{path.stem}{video}{path.suffix}"))
    if values.save_file is not None:
        path = Path(values.save_file)
        order = f"_{number:03}" if total > 1 else ""
        return Place(path.with_name(f"{path.stem}{order}{path.suffix}"))
    width, height = job.settings["size"]
    text = re.sub(r"[\s/]", "_", job.settings["prompt"])[:50]
    task = values.task or Path(values.ckpt_dir or "miniature").absolute().name
    head = f"{task}_{width}*{height}_{values.ulysses_size}_{values.ring_size}_{text}_"
    ending = ".png" if job.settings["frames"] == 1 else ".mp4"
    video = f"_{job.settings['video']}" if job.videos > 1 else ""
    path = Path(f"{head}{now:%Y%m%d_%H%M%S}{video}{ending}")
    if path in taken:  # another prompt that begins alike
        path = path.with_name(f"{path.stem}_n{number}{ending}")
    pattern = rf"{re.escape(head)}\d{{8}}_\d{{6}}{video}(_n\d+)?{re.escape(ending)}"
    return Place(path, re.compile(pattern))


def finished(where: Place, job: Job, taken: Collection[Path]) -> Path | None:
    """The output that an earlier run made of this job, if there is one.

    Its record must tell the same settings; a file that was asked for by name may have no record.
    """
    if where.pattern is None:
        whole = media.output_path(where.path, job.settings["frames"])
        return where.path if whole.exists() and _agrees(whole, job, without=True) else None
    folder = where.path.parent
    names = sorted(p.name for p in folder.iterdir() if where.pattern.fullmatch(p.name))
    for name in reversed(names):
        if folder / name not in taken and _agrees(folder / name, job, without=False):
            return folder / name
    return None


def record_path(output: Path, frames: int) -> Path:
    """Where the record of an output goes: beside it, .json behind its name."""
    whole = media.output_path(output, frames)
    return whole.with_name(f"{whole.name}.json")


def _agrees(output: Path, job: Job, *, without: bool) -> bool:
    """Whether the record beside an output tells of this job; `without`: what none means."""
    record = output.with_name(f"{output.name}.json")
    if not record.exists():
        return without
    try:
        facts: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    free = {"seed"} if job.seed_drawn else set()
    return all(facts.get(k) == v for k, v in job.settings.items() if k not in free)
