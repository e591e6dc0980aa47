"""Examples encoded once: each network runs over all of them in turn, and what it gives is kept.

The VAE comes first, as it alone needs the pixels: every clip is decoded once, and what is broken is
known before the larger networks are loaded. It leaves a file of parts beside where the example's
own will be; CLIP adds its tokens, and UMT5 makes it whole. So whatever stops a build, it goes on
from there.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from wan_jax import ffmpeg, files, request, tokenizer
from wan_jax.config import WanConfig
from wan_jax.pipeline import Callback, Progress, Wan
from wan_jax.sampler import DivergedError
from wan_jax.training import entries
from wan_jax.training.dataset import Example, is_image, read_clip, summary
from wan_jax.training.entries import CONTEXT, KNOWN, LATENTS, TOKENS, Cache, Entry
from wan_jax.weights import folders, remote

FORMAT = 1  # of the files; another number leaves those of before alone
SKIPPED = "skipped.jsonl"
_VIEWS = "views"  # what CLIP is to see, while the example waits for it
_PARTS = f".parts{entries.SUFFIX}"
_STALE = 3600.0  # seconds; a file that is not whole after so long has no writer

Notify = Callable[[str], None]
_Item = TypeVar("_Item")


class _Settings(NamedTuple):
    """How clips are read, as dataset.read_clip() takes it."""

    size: tuple[int, int]
    frames: int
    fps: float


class _Job(NamedTuple):
    """An example, how it is read, and the folder and name of what comes of it."""

    example: Example
    settings: _Settings
    folder: Path
    key: str

    @property
    def path(self) -> Path:
        return self.folder / f"{self.key}{entries.SUFFIX}"

    @property
    def parts(self) -> Path:
        """Where tensors wait for those of the next network."""
        return self.folder / f".{self.key}{_PARTS}"


def build(
    wan: Wan,
    examples: Sequence[Example],
    *,
    folder: str | os.PathLike[str],
    size: tuple[int, int],
    frames: int,
    fps: float = 16,
    callback: Callback | None = None,
    notify: Notify | None = None,
) -> Cache:
    """Encodes examples into a folder; those that are there already are not encoded again.

    size: (width, height) in pixels. frames: 4n + 1 pixel frames of a video; an image is one. fps:
    frames a second. A file's name is a digest of the example's content and captions, of these
    settings, and of the checkpoint and its dtype: what changes is encoded anew, and what was before
    stays until it is deleted. Another process that builds in the folder is waited for.
    callback: told the Progress of "read" (files whose content is looked at), "load", "image" (the
    VAE), "clip" and "encode" (text), each counted in examples. notify: told what was left out.
    What cannot be encoded is left out and listed in skipped.jsonl in the folder: missing, damaged
    or too short, or an image for a checkpoint that takes images. Raises ValueError for
    settings that cannot be, a disk too small, and if nothing is left; OSError if the disk is full.
    """
    grid = latent_shape(wan.config, size=size, frames=frames)
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps is {fps}; a number of frames a second above 0 is needed")
    if not examples:
        raise ValueError("examples are none; one or more are needed")
    if remote.is_bucket(os.fspath(folder)):
        raise ValueError(f"{folder} is in a bucket; a folder of this machine is needed")
    settings = _Settings((int(size[0]), int(size[1])), int(frames), float(fps))
    place = Path(folder).absolute()
    folders.check_writable(place)
    say = notify or (lambda _: None)
    waiting = f"waiting for another process that is encoding into {place}"
    with folders.alone(place / "build", on_wait=lambda: say(waiting)):
        skipped: dict[str, str] = {}
        jobs = _jobs(wan, examples, place, settings, skipped, callback)
        names = _tensors(wan)
        todo = list({j.key: j for j in jobs if not entries.shapes(j.path, names)}.values())
        _sweep(place)
        _check_space(wan, todo, grid)
        failed = _encode_pixels(wan, todo, callback)
        skipped |= {j.example.name: failed[j.key] for j in jobs if j.key in failed}
        _report(place, skipped, say)
        jobs = [job for job in jobs if job.key not in failed]
        if not jobs:
            reasons = list(skipped.values())
            raise ValueError(summary(f"none of {len(examples)} examples can be used", reasons))
        todo = [job for job in todo if job.key not in failed]
        if wan.config.images:
            _encode_views(wan, todo, callback)
        null = _encode_texts(wan, todo, place, callback)
        return Cache(place, tuple(_entry(job, names) for job in jobs), null, skipped)


# What there is to do


def latent_shape(wan: WanConfig, *, size: Any, frames: Any) -> tuple[int, ...]:
    """(t, h, w, c) of the latents of a clip; ValueError for a size or frames that cannot be.

    A checkpoint that takes images learns nothing of one frame, which is the image itself.
    """
    found = request.latent_shape(wan, size=size, frames=frames)
    if wan.images and found[0] == 1:
        least = 1 + wan.vae.temporal_stride
        raise ValueError(
            f"frames is {frames}, only the image that a video begins with; a checkpoint that takes "
            f"images needs {least} or more"
        )
    return found


def _jobs(
    wan: Wan,
    examples: Sequence[Example],
    folder: Path,
    settings: _Settings,
    skipped: dict[str, str],
    callback: Callback | None,
) -> list[_Job]:
    """Jobs of the examples whose files can be read; the others go to `skipped`."""
    jobs = []
    for example in _counted("read", examples, callback):
        own = settings._replace(frames=1) if is_image(example.path) else settings
        if is_image(example.path) and wan.config.images:
            skipped[example.name] = (
                f"{example.path} is one frame, which is also the image that it would begin with; "
                "a checkpoint that takes images needs videos"
            )
            continue
        try:
            with example.path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            skipped[example.name] = f"{example.path} cannot be read: {error.strerror}"
            continue
        pace = None if is_image(example.path) else own.fps
        key = _digest(wan, content, example.captions, own.size, own.frames, pace)
        jobs.append(_Job(example, own, folder, key))
    return jobs


def _digest(wan: Wan, *facts: object) -> str:
    text = json.dumps([FORMAT, wan.digest, wan.dtype, *facts])
    return hashlib.sha256(text.encode()).hexdigest()


def _tensors(wan: Wan) -> tuple[str, ...]:
    """Names of the tensors of an example."""
    return (LATENTS, CONTEXT, *((KNOWN, TOKENS) if wan.config.images else ()))


def _check_space(wan: Wan, jobs: Sequence[_Job], grid: tuple[int, ...]) -> None:
    """ValueError if the disk cannot hold what is to come, captions not counted."""
    t, height, width, z = grid
    channels = z + (z + wan.config.vae.temporal_stride if wan.config.images else 0)
    latent_frames = sum(1 if job.settings.frames == 1 else t for job in jobs)
    if jobs:
        needed = latent_frames * height * width * channels * 4
        folders.check_space(
            jobs[0].folder, needed, remedy="choose another folder for the encoded examples"
        )


def _entry(job: _Job, names: Sequence[str]) -> Entry:
    found = entries.shapes(job.path, names)
    if found is None:
        raise ValueError(f"{job.path} was written and cannot be read; is the disk sound?")
    captions, rows, _ = found[CONTEXT]
    return Entry(job.path, job.example.name, found[LATENTS], captions, rows)


# The networks, one after the other


def _encode_pixels(wan: Wan, jobs: Sequence[_Job], callback: Callback | None) -> dict[str, str]:
    """Latents of the clips and of what is known of them; {key: reason} of those that failed."""
    first = (LATENTS, *((KNOWN, _VIEWS) if wan.config.images else ()))
    second = [name for name in _tensors(wan) if name != CONTEXT]
    left = [
        job
        for job in jobs
        if not (entries.shapes(job.parts, first) or entries.shapes(job.parts, second))
    ]
    if not left:
        return {}
    videos = [job.example.path for job in left if not is_image(job.example.path)]
    if videos:
        ffmpeg.check_decoder(videos[0])  # else every video would be left out
    failed: dict[str, str] = {}
    with wan.hold("vae", callback):
        for job in _counted("image", left, callback):
            try:
                tensors = _pixels(wan, job)
            except (ValueError, DivergedError) as error:
                where, why = str(job.example.path), str(error)
                failed[job.key] = why if where in why else f"{where}: {why}"
                continue
            entries.write(job.parts, tensors, about={})
    return failed


def _pixels(wan: Wan, job: _Job) -> dict[str, np.ndarray]:
    """What the VAE makes of a clip, and what CLIP is to see."""
    clip = read_clip(job.example.path, **job.settings._asdict())
    tensors = {}
    if wan.config.images:
        # As generate() would for these images: at the size of the video, "crop" changes nothing.
        asked = request.make_request(
            wan.config,
            job.example.captions[0],
            image=clip[0],
            last_image=clip[-1] if wan.config.images > 1 else None,
            fit="crop",
            size=job.settings.size,
            frames=job.settings.frames,
        )
        tensors[KNOWN] = wan.encode_known(asked)[0]
        tensors[_VIEWS] = np.stack([frame.view for frame in asked.images])
    tensors[LATENTS] = wan.encode_video(clip)[0]
    return tensors


def _encode_views(wan: Wan, jobs: Sequence[_Job], callback: Callback | None) -> None:
    left = [job for job in jobs if entries.shapes(job.parts, (LATENTS, KNOWN, _VIEWS))]
    if not left:
        return
    with wan.hold("clip", callback):
        for job in _counted("clip", left, callback):
            tensors = entries.read(job.parts, (LATENTS, KNOWN, _VIEWS))
            tensors[TOKENS] = wan.encode_views(tensors.pop(_VIEWS))[0]
            entries.write(job.parts, tensors, about={})


def _encode_texts(
    wan: Wan, jobs: Sequence[_Job], folder: Path, callback: Callback | None
) -> np.ndarray:
    """Makes the examples' files whole; the states [s, d] of the empty prompt."""
    empty = folder / f"null-{_digest(wan, '')[:16]}{entries.SUFFIX}"
    there = entries.shapes(empty, (CONTEXT,)) is not None
    if jobs or not there:
        with wan.hold("umt5", callback):
            if not there:
                entries.write(empty, {CONTEXT: _states(wan, ("",))}, about={"captions": [""]})
            for job in _counted("encode", jobs, callback):
                names = [name for name in _tensors(wan) if name != CONTEXT]
                tensors = entries.read(job.parts, names)
                tensors[CONTEXT] = _states(wan, job.example.captions)
                captions = list(job.example.captions)
                about = {"file_name": job.example.name, "captions": captions, "format": FORMAT}
                entries.write(job.path, tensors, about=about)
                job.parts.unlink(missing_ok=True)
    return entries.read(empty, (CONTEXT,), row=0)[CONTEXT]


def _states(wan: Wan, captions: Sequence[str]) -> np.ndarray:
    """UMT5's states [n, s, d], s the tokens of the longest caption."""
    _, mask = tokenizer.tokenize(wan.tokenizer, captions, length=wan.config.dit.text_len)
    return wan.encode_text(captions)[:, : int(mask.sum(axis=1).max())]


# What is told


def _counted(stage: str, items: Sequence[_Item], callback: Callback | None) -> Iterator[_Item]:
    """The items, with their number told as they are done."""
    for done, item in enumerate(items):
        if callback is not None and done == 0:
            callback(Progress(stage, 0, len(items)))
        yield item
        if callback is not None:
            callback(Progress(stage, done + 1, len(items)))


def _report(folder: Path, skipped: Mapping[str, str], say: Notify) -> None:
    """Lists what was left out in a file of the folder."""
    path = folder / SKIPPED
    if not skipped:
        path.unlink(missing_ok=True)
        return
    lines = [
        json.dumps({"file_name": name, "reason": reason}, ensure_ascii=False)
        for name, reason in skipped.items()
    ]
    with files.whole_or_nothing(path) as partial:
        partial.write_text("\n".join([*lines, ""]), encoding="utf-8", errors="backslashreplace")
    say(f"{summary(f'left out {len(skipped)} files', list(skipped.values()))} (all in {path})")


def _sweep(folder: Path) -> None:
    """Removes what killed processes left half written, or whole beside what it became part of."""
    for item in folder.glob(".*.partial-*"):
        if time.time() - item.stat().st_mtime > _STALE:
            item.unlink(missing_ok=True)
    for item in folder.glob(f".*{_PARTS}"):
        if item.with_name(item.name[1:].removesuffix(_PARTS) + entries.SUFFIX).exists():
            item.unlink(missing_ok=True)
