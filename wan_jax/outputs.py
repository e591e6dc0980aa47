"""Where videos go: names as the reference makes them, and which of them are there already."""

import dataclasses
import datetime
import json
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from absl import flags

from wan_jax import files, labels, media
from wan_jax.request import Request
from wan_jax.weights.adapters import Adapter


@dataclasses.dataclass(frozen=True)
class Job:
    """One checked video: what is asked of the checkpoint, and where the result goes.

    request: of this video alone. noise: instead of the seed's. seed_drawn: nobody asked for this
    seed. settings: all that makes the video what it is but the checkpoint, as JSON; "video" is its
    number among those of its prompt, `videos`. images: the paths that were given. save_file: the
    one its line in a prompts file names. prompt: the number of its prompt. copy: how many jobs
    before it want the same. output: where the result goes, known once all jobs are.
    """

    request: Request
    noise: np.ndarray | None
    seed_drawn: bool
    settings: dict[str, Any]
    videos: int
    save_file: str | None
    prompt: int = 0
    copy: int = 0
    images: tuple[str, ...] = ()
    output: Path = Path()

    @property
    def wanted(self) -> dict[str, Any]:
        """The settings that were asked for: without a seed that was drawn."""
        return {k: v for k, v in self.settings.items() if k != "seed" or not self.seed_drawn}

    def with_seed(self, seed: int | None) -> Self:
        """The same with another seed, if one was drawn and there is another."""
        if seed is None or not self.seed_drawn:
            return self
        request = self.request._replace(seed=seed)
        return dataclasses.replace(self, request=request, settings=self.settings | {"seed": seed})


class Place(NamedTuple):
    """An output's path and, where its name holds the time, the pattern of such names."""

    path: Path
    pattern: re.Pattern[str] | None = None


class Checkpoint(NamedTuple):
    """What a video is to be made with.

    path: as it was given. digest: of its contents and the LoRAs', where that is known.
    """

    path: str | None
    digest: str | None = None
    loras: tuple[Adapter, ...] = ()


class Found(NamedTuple):
    """A finished output: as it was asked for, where it really is, and the seed its record tells."""

    path: Path
    target: Path
    seed: int | None


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
    video = f"_{job.settings['video']}" if job.videos > 1 else ""
    if job.save_file is not None:
        return Place(_numbered(job.save_file, video))
    if values.save_file is not None:
        return Place(_numbered(values.save_file, f"_{number:03}" if total > 1 else ""))
    width, height = job.settings["size"]
    text = _in_a_name(job.settings["prompt"])
    task = values.task or _in_a_name(Path(values.ckpt_dir or "miniature").absolute().name)
    head = f"{task}_{width}*{height}_{values.ulysses_size}_{values.ring_size}_{text}_"
    image = values.task.startswith("t2i") if values.task else job.settings["frames"] == 1
    ending = ".png" if image else ".mp4"
    path = Path(f"{head}{now:%Y%m%d_%H%M%S}{video}{ending}")
    if target(path, 1) in taken:  # another prompt that begins alike
        path = path.with_name(f"{path.stem}_n{number}{ending}")
    pattern = rf"{re.escape(head)}\d{{8}}_\d{{6}}{video}(_n\d+)?{re.escape(ending)}"
    return Place(path, re.compile(pattern))


def _numbered(path: str, number: str) -> Path:
    whole = Path(path)
    if not whole.name:
        raise ValueError(f"{path!r} names no file; a path such as cats.mp4 is needed")
    return whole.with_name(f"{whole.stem}{number}{whole.suffix}")


def _in_a_name(text: str) -> str:
    """What a file's name can hold of a text: 50 characters, as the reference, and 150 bytes."""
    plain = "".join(c if c.isprintable() and c not in " /" else "_" for c in text[:50])
    return plain.encode()[:150].decode(errors="ignore")


def target(path: Path, frames: int) -> Path:
    """What really appears for an output, so that two names of one thing are the same."""
    return Path(os.path.abspath(media.output_path(path, frames)))


def finished(
    where: Place, job: Job, taken: Collection[Path], checkpoint: Checkpoint
) -> Found | None:
    """The output that an earlier run made of this job, if there is one.

    What a run left must
    tell of the same settings; a file that was asked for by name and tells nothing counts too.
    """
    frames = job.settings["frames"]
    if where.pattern is None:
        paths = [where.path]
    else:
        names = (path.name for path in where.path.parent.iterdir())
        held = sorted((n for n in names if where.pattern.fullmatch(n)), reverse=True)
        paths = [where.path.with_name(name) for name in held]
    for path in paths:
        whole = target(path, frames)
        if whole in taken or not whole.exists():
            continue
        facts = _facts(whole)
        if facts is None and where.pattern is None:
            return Found(path, whole, None)
        if facts is not None and _agrees(facts, job, checkpoint):
            return Found(path, whole, facts.get("seed"))
    return None


def record_path(whole: Path) -> Path:
    """Where the record of what really appears goes: beside it, .json behind its name."""
    return whole.with_name(f"{whole.name}.json")


def check_record(path: Path, frames: int) -> None:
    """Raise ValueError if the record of an output could not be written, or would replace another.

    Meant to be called when the output itself has been checked.
    """
    record = record_path(target(path, frames))
    if record.exists() and (not record.is_file() or _read(record) is None):
        raise ValueError(f"{record} is in the way: it is no record of a video, and one goes there")
    trial = files.hidden(record, "partial")
    try:  # its name is longer than any that was tried
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(f"{record} cannot be written: {error.strerror}") from error


def _read(record: Path) -> dict[str, Any] | None:
    """A record; None for a file that is none."""
    try:
        facts = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and {"prompt", "versions"} <= set(facts) else None


def _facts(whole: Path) -> dict[str, Any] | None:
    """What is told of an output: by its record, or else by the file itself."""
    if record_path(whole).exists():
        return _read(record_path(whole)) or {}
    if whole.suffix.lower() not in (".mp4", ".png", ".npz"):
        return None
    try:
        return labels.read_metadata(whole)
    except ValueError:
        return {}


def _agrees(facts: dict[str, Any], job: Job, checkpoint: Checkpoint) -> bool:
    facts = {"vae_dtype": "float32", "quantize": None, **facts}  # earlier records do not tell
    if any(k not in facts or facts[k] != v for k, v in job.wanted.items()):
        return False
    if checkpoint.digest is not None:
        return facts.get("checkpoint_digest") == checkpoint.digest
    if _contents(facts.get("loras", [])) != _contents(described(checkpoint.loras)):
        return False
    given, wanted = facts.get("checkpoint"), checkpoint.path
    if given is None or wanted is None:
        return given is wanted
    return os.path.abspath(given) == os.path.abspath(wanted)


def described(loras: Sequence[Adapter]) -> list[dict[str, Any]]:
    """LoRAs as a record has them."""
    return [{"path": str(x.path), "scale": x.scale, "sha256": x.sha256} for x in loras]


def _contents(loras: Any) -> list[Any] | None:
    """What makes LoRAs of a record what they are, whatever their order; None if it is damaged."""
    try:
        return sorted((str(lora["sha256"]), float(lora["scale"])) for lora in loras)
    except (KeyError, TypeError, ValueError):
        return None
