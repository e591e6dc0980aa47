"""From flags, configuration files and prompt files to videos to make, all checked beforehand."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from wan_jax import hosts, images, loading, media, noise_file, outputs, shipped, tasks
from wan_jax.cli import Reporter, say
from wan_jax.config import WanConfig
from wan_jax.outputs import Job
from wan_jax.prompts import FLAG_OF, Entry, entries, parse_size
from wan_jax.request import Request, make_request
from wan_jax.weights import adapters, folders, quantization, remote


@dataclasses.dataclass(frozen=True)
class Plan:
    """All of one run.

    source: what load() takes, on this machine. loras: added to it.
    """

    source: Any
    config: WanConfig
    jobs: tuple[Job, ...]
    skipped: tuple[Path, ...]
    loras: tuple[adapters.Chosen, ...] = ()


def plan(values: flags.FlagValues, configs: Path) -> Plan:
    """Check every flag against the checkpoint before anything slow starts.

    configs: the folder of the tasks' settings. Raises ValueError naming the flag, its value and
    what would be accepted.
    """
    _check_unsupported(values)
    settings = tasks.settings(values, configs)
    found = entries(values)
    cache = values.cache_dir or str(loading.default_cache_dir())
    for flag, folder in (("resume_dir", values.resume_dir), ("cache_dir", cache)):
        if folder is not None and not (flag == "cache_dir" and remote.is_bucket(folder)):
            with _naming(flag, folder):
                folders.check_writable(Path(folder))
    loras = _loras(values)
    if values.ckpt_dir is not None and not Path(values.ckpt_dir).exists():
        _check_elsewhere(values, settings, found)
    given, known = values.ckpt_dir, outputs.Checkpoint(values.ckpt_dir)
    name = tasks.miniature(values, found) if given is None else given
    with _naming("ckpt_dir", name):
        with hosts.in_turn():
            source = loading.fetch(
                name, cache_dir=values.cache_dir, callback=Reporter(), notify=say
            )
        config = loading.read_config(source)
        if values.skip_existing:
            known = _known(values, source, loras)
    tasks.check_checkpoint(values, config.images)
    for text, lora in zip(values.lora or (), loras, strict=True):
        with _naming("lora", text):
            adapters.check([lora], config.dit)
    jobs = _all_jobs(values, config, settings, found)
    _warn(settings, jobs)
    placed, skipped = _placed(values, jobs, known)
    if given is None:
        say(f"no --ckpt_dir is given; for real videos: {tasks.real(values, config.images)}")
    if shipped.is_miniature(source):
        _warn_of_words(source, placed)
    return Plan(source, config, _agreed(jobs, placed), tuple(skipped), loras)


def planned(values: flags.FlagValues, configs: Path) -> tuple[WanConfig, list[Job]]:
    """The networks and the videos of the flags, for --plan: nothing is downloaded or written.

    There need be no checkpoint: a task has its own networks. Images need not be given either; then
    the videos are of exactly --size. Raises ValueError as plan() does.
    """
    _check_unsupported(values)
    settings, found = tasks.settings(values, configs), entries(values)
    config = _networks(values, found)
    tasks.check_checkpoint(values, config.images)
    given = tasks.images(values, config.images)
    whole = [_with_images(entry, given, config.images) for entry in found]
    return config, _all_jobs(values, config, settings, whole)


def _with_images(entry: Entry, given: Collection[str], count: int) -> Entry:
    """A prompt with a picture for each of so many images that neither it nor the flags give."""
    needed = tasks.SOURCES[:count]
    missing = [name for name in needed if name not in given and name not in entry.values]
    own = dict.fromkeys(missing, str(shipped.PICTURE))
    fit = {"fit": "pad"} if count and len(missing) == count else {}
    return Entry(entry.where, {**own, **fit, **entry.values})


def _networks(values: flags.FlagValues, found: Sequence[Entry]) -> WanConfig:
    """The networks of the checkpoint on this machine that the flags name, or of the task."""
    task, path = tasks.chosen(values), values.ckpt_dir
    there = path is not None and (loading.is_small(path) or Path(path).exists())
    if task is not None and not there:
        return task.network
    if path is not None and not there:
        return _elsewhere(values, found)
    name = tasks.miniature(values, found) if path is None else path
    with _naming("ckpt_dir", name):
        return loading.read_config(loading.fetch(name))


def _agreed(jobs: Sequence[Job], placed: Sequence[Job]) -> tuple[Job, ...]:
    """Of several processes, in each the jobs that the first has placed, as it has them.

    Raises ValueError if they were not asked for the same.
    """
    asked = hosts.exchange(json.dumps([job.wanted for job in jobs], sort_keys=True))
    if len(set(asked)) > 1:
        raise ValueError("the processes were given different flags or files; all need the same")
    if hosts.count() == 1:
        return tuple(placed)
    facts = [
        (job.prompt, job.settings["video"], job.request.seed, str(job.output)) for job in placed
    ]
    told = json.loads(hosts.tell(json.dumps(facts)))
    own = {(job.prompt, job.settings["video"]): job for job in jobs}
    return tuple(
        dataclasses.replace(own[prompt, video].with_seed(seed), output=Path(output))
        for prompt, video, seed, output in told
    )


def _loras(values: flags.FlagValues) -> tuple[adapters.Chosen, ...]:
    """The LoRAs of the flags; ValueError for a file that is not there or none."""
    found: list[adapters.Chosen] = []
    for text in values.lora or ():
        with _naming("lora", text):
            found += adapters.chosen(text)
    return tuple(found)


def _known(
    values: flags.FlagValues, source: Any, loras: Sequence[adapters.Chosen]
) -> outputs.Checkpoint:
    """What tells the checkpoint of this run from others."""
    digest = loading.known_digest(source, dtype=values.dtype, cache_dir=values.cache_dir)
    added = adapters.hashed(loras)
    if digest is not None:
        digest = adapters.digest(digest, added)
    return outputs.Checkpoint(values.ckpt_dir, digest, added)


def _check_elsewhere(
    values: flags.FlagValues, settings: Mapping[str, Any], found: Sequence[Entry]
) -> None:
    """Say what is wrong in any case before gigabytes are downloaded."""
    if loading.is_small(values.ckpt_dir):
        return
    jobs = _all_jobs(values, _elsewhere(values, found), settings, found)
    _placed(values, jobs, outputs.Checkpoint(values.ckpt_dir))


def _elsewhere(values: flags.FlagValues, found: Sequence[Entry]) -> WanConfig:
    """What a checkpoint on the hub or in a bucket will be, as far as can be told from here."""
    count = loading.images_elsewhere(values.ckpt_dir)
    if count is None:
        return tasks.likely(values, found)
    return tasks.check_checkpoint(values, count)


def _all_jobs(
    values: flags.FlagValues,
    config: WanConfig,
    settings: Mapping[str, Any],
    prompts: Sequence[Entry],
) -> list[Job]:
    jobs: list[Job] = []
    for number, entry in enumerate(prompts):
        request, found, paths = _request(config, values, settings, entry)
        for job in _jobs(values, entry, request, found, paths):
            same = sum(job.wanted == other.wanted for other in jobs)
            jobs.append(dataclasses.replace(job, prompt=number, copy=same))
    return jobs


def _warn(settings: Mapping[str, Any], jobs: Sequence[Job]) -> None:
    """Say once which sizes are none that the model was made for."""
    sizes = settings.get("sizes")
    listed = ", ".join(f"{w}*{h}" for w, h in sizes or ())
    for size in sorted({tuple(job.settings["size"]) for job in jobs}):
        if sizes and size not in sizes:
            say(f"warning: size {size[0]}*{size[1]} is not one this model was made for: {listed}")


def _warn_of_words(source: Path, jobs: Sequence[Job]) -> None:
    """Say which words of the prompts mean nothing to the miniature."""
    prompts = dict.fromkeys(job.settings["prompt"] for job in jobs)
    words = shipped.unknown_words(source, prompts)
    if words:
        more = f" and {len(words) - 8} more" if len(words) > 8 else ""
        say(f"warning: the miniature was not taught these words: {', '.join(words[:8])}{more}")


@contextlib.contextmanager
def _naming(flag: str, value: Any) -> Iterator[None]:
    """Errors of the block begin with the flag whose value they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"--{flag} {value}: {error}") from error


def _check_unsupported(values: flags.FlagValues) -> None:
    for name in ("ulysses_size", "ring_size"):
        size = getattr(values, name)
        if size < 1:
            raise ValueError(f"--{name} is {size}; 1 or more is needed")
    try:
        quantization.check_kind(values.quantize, values.dtype)
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    if values.use_prompt_extend:
        raise ValueError(
            "--use_prompt_extend is not supported so far; give the long prompt as --prompt"
        )


# Requests


def _request(
    config: WanConfig, values: flags.FlagValues, settings: Mapping[str, Any], entry: Entry
) -> tuple[Request, dict[str, Any], tuple[str, ...]]:
    """The request of a prompt, what its images are as JSON, and their paths."""
    given = {
        "negative_prompt": values.negative_prompt,
        "size": parse_size(values.size) if values.size is not None else None,
        "frames": values.frame_num,
        "steps": values.sample_steps,
        "shift": values.sample_shift,
        "solver": values.sample_solver,
        "guidance": values.sample_guide_scale,
        "seed": None if values.base_seed == -1 else values.base_seed,
        "num_videos": values.num_videos,
        **tasks.images(values, config.images),
    }
    if values.base_seed < -1:
        raise ValueError(f"--base_seed is {values.base_seed}; 0 or more is needed, or -1 for any")
    own = {k: v for k, v in entry.values.items() if k != "save_file"}
    arguments = {k: v for k, v in given.items() if v is not None} | own
    usual = {k: v for k, v in settings.items() if k != "sizes"}
    defaults = dataclasses.replace(config.defaults, **usual)
    paths = tuple(arguments[name] for name in tasks.SOURCES if name in arguments)
    try:
        found = _open_images(arguments, values)
        request = make_request(dataclasses.replace(config, defaults=defaults), **arguments)
    except ValueError as error:
        name = str(error).split(" ", 1)[0].split("=", 1)[0]
        if name in own and entry.where:
            raise ValueError(f"{entry.where}: {error}") from error
        if given.get(name) is None and name in settings:
            raise ValueError(f"--config {values.config}: {error}") from error
        raise ValueError(_name_flag(str(error), config.images)) from error
    if request.frames != 1 and (values.task or "").startswith("t2i"):
        name = f"{entry.where}: frames" if "frames" in own else "--frame_num"
        raise ValueError(f"{name} is {request.frames}; --task {values.task} makes 1")
    if request.images:
        height, width = request.images[0].pixels.shape[:2]
        found["resolution"] = [width, height]
    return request, found, paths


def _open_images(arguments: dict[str, Any], values: flags.FlagValues) -> dict[str, Any]:
    """Put pictures in the place of paths; gives what tells the images apart, as JSON."""
    found: dict[str, Any] = {}
    for name in tasks.SOURCES:
        if name in arguments:
            arguments[name] = images.open_picture(arguments[name], name=name)
            found[f"{name}_sha256"] = arguments[name].sha256
    if found:
        arguments.setdefault("fit", values.fit)
        found["fit"] = arguments["fit"]
    return found


def _name_flag(message: str, count: int) -> str:
    """A library's "steps is 0; ..." as "--sample_steps is 0; ..."."""
    name, rest = message.split(" ", 1)
    name, equals, value = name.partition("=")
    if name in tasks.SOURCES:
        return f"--{tasks.image_flag(name, count)} {rest}"
    return f"--{FLAG_OF[name]}{equals}{value} {rest}" if name in FLAG_OF else message


def _jobs(
    values: flags.FlagValues,
    entry: Entry,
    request: Request,
    found: Mapping[str, Any],
    paths: tuple[str, ...],
) -> Iterator[Job]:
    """The videos of one prompt; their outputs are placed later.

    found, paths: what its images are, and where they lie.
    """
    given, digest = None, None
    if values.noise_file is not None:
        with _naming("noise_file", values.noise_file):
            given = noise_file.load_noise(values.noise_file, shape=request.noise_shape)
            digest = hashlib.sha256(given.tobytes()).hexdigest()
    drawn = values.base_seed == -1 and "seed" not in entry.values and given is None
    seed = secrets.randbits(63) if drawn else request.seed
    settings = {
        "prompt": request.prompts[0],
        "negative_prompt": request.negative,
        "size": list(request.size),
        "frames": request.frames,
        "steps": len(request.schedule.table),
        "shift": request.schedule.shift,
        "guidance": request.guidance,
        "solver": request.schedule.solver,
        "dtype": values.dtype,
        "vae_dtype": values.vae_dtype,
        "quantize": values.quantize,
        "noise_sha256": digest,
        "seed": None if given is not None else seed,
        **found,
    }
    for k in range(request.num_videos):
        yield Job(
            request=request._replace(seed=seed, num_videos=1),
            noise=None if given is None else given[k : k + 1],
            seed_drawn=drawn,
            settings=settings | {"video": k},
            videos=request.num_videos,
            save_file=entry.values.get("save_file"),
            images=paths,
        )


def _placed(
    values: flags.FlagValues, jobs: Sequence[Job], known: outputs.Checkpoint
) -> tuple[list[Job], list[Path]]:
    """The jobs to run, each with its output, and the outputs of those that are skipped.

    Only the first process knows: where others run there may be no such folders.
    """
    if not hosts.is_first():
        return list(jobs), []
    now = datetime.datetime.now()
    taken: set[Path] = set()
    placed, skipped = [], []
    inputs = {os.path.realpath(path) for job in jobs for path in job.images}
    seeds: dict[int, int] = {}  # drawn before, for videos of the same prompt
    for number, job in enumerate(jobs):
        with _naming("save_file", job.save_file or values.save_file or "by default"):
            where = outputs.place(values, job, number=number, total=len(jobs), now=now, taken=taken)
            frames = job.settings["frames"]
            size = tuple(job.settings.get("resolution", job.settings["size"]))
            media.check_output(where.path, frames, size=size)
            outputs.check_record(where.path, frames)
        target = outputs.target(where.path, frames)
        if os.path.realpath(target) in inputs:
            raise ValueError(f"--save_file {where.path} is an image to read; give another name")
        found = None
        if values.skip_existing:
            found = outputs.finished(where, job, taken, known)
        if found is not None:
            taken.add(found.target)
            skipped.append(found.path)
            if job.seed_drawn and found.seed is not None:
                seeds[job.prompt] = found.seed
            continue
        if target in taken:
            raise ValueError(f"--save_file {where.path} would hold two videos; it can hold one")
        taken.add(target)
        placed.append(dataclasses.replace(job, output=where.path))
    return [job.with_seed(seeds.get(job.prompt)) for job in placed], skipped
