"""From flags, configuration files and prompt files to videos to make, all checked beforehand."""

import ast
import contextlib
import dataclasses
import datetime
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from wan_jax import loading, media, noise_file, outputs
from wan_jax.cli import say
from wan_jax.config import RELEASED, T2V_14B, WanConfig
from wan_jax.outputs import Job
from wan_jax.request import Request, make_request
from wan_jax.weights import remote

# Arguments of the library whose flag has another name; errors name the flag.
_FLAG_OF = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "size": "size",
    "frames": "frame_num",
    "steps": "sample_steps",
    "shift": "sample_shift",
    "solver": "sample_solver",
    "guidance": "sample_guide_scale",
    "seed": "base_seed",
    "num_videos": "num_videos",
}
_PROMPT = "Two anthropomorphic cats in boxing gear fight on a spotlit stage."
_DEFAULTS = ("negative_prompt", "size", "frames", "steps", "shift", "guidance", "solver")


@dataclasses.dataclass(frozen=True)
class Plan:
    """All of one run. source: the checkpoint on this machine; None is the random miniature."""

    source: Path | None
    config: WanConfig
    jobs: tuple[Job, ...]
    skipped: tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A prompt with the settings of its own; where: what errors about it name, "" for the flags."""

    where: str
    values: dict[str, Any]


def plan(values: flags.FlagValues, configs: Path) -> Plan:
    """Check every flag against the checkpoint before anything slow starts.

    configs: the folder of the tasks' settings. Raises ValueError naming the flag, its value and
    what would be accepted.
    """
    _check_unsupported(values)
    settings = _settings(values, configs)
    entries = _entries(values)
    path = values.ckpt_dir
    if path is not None and not Path(path).exists() and remote.is_hub_id(path):
        likely = RELEASED.get((values.task or "").replace("t2i", "t2v"), T2V_14B)
        for entry in entries:  # what is wrong in any case, before gigabytes are downloaded
            _request(likely, values, settings, entry)
    source: Path | None = None
    with _naming("ckpt_dir", path):
        source = (
            None if path is None else loading.fetch(path, cache_dir=values.cache_dir, notify=say)
        )
        config = loading.read_config(source)
    jobs = [
        job
        for entry in entries
        for job in _jobs(values, entry, *_request(config, values, settings, entry))
    ]
    if values.resume_dir is not None:
        _check_writable("resume_dir", Path(values.resume_dir))
    placed, skipped = _placed(values, jobs)
    return Plan(source, config, tuple(placed), tuple(skipped))


@contextlib.contextmanager
def _naming(flag: str, value: Any) -> Iterator[None]:
    """Errors of the block begin with the flag whose value they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"--{flag} {value}: {error}") from error


def _check_unsupported(values: flags.FlagValues) -> None:
    for name in ("ulysses_size", "ring_size"):
        if values[name].value != 1:
            raise ValueError(f"--{name} is {values[name].value}; only 1 is supported so far")
    for name in ("dit_fsdp", "t5_fsdp"):
        if values[name].value:
            raise ValueError(f"--{name} needs several devices, which are not supported so far")
    if values.use_prompt_extend:
        raise ValueError(
            "--use_prompt_extend is not supported so far; give the long prompt as --prompt"
        )


def _check_writable(flag: str, folder: Path) -> None:
    """Raise ValueError if this folder cannot be written to or made; nothing is made now."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"--{flag} {folder}: {place} is no folder that you may write to")


# Settings


def read_settings(path: Path) -> dict[str, Any]:
    """The literal of a configuration file, `config = {...}`; nothing in the file is executed."""
    try:
        module = ast.parse(path.read_text(encoding="utf-8"))
        values = [n.value for n in module.body if isinstance(n, ast.Assign)]
        settings = dict(ast.literal_eval(values[0]))
        settings["sizes"] = [(int(w), int(h)) for w, h in settings.get("sizes", ())]
    except (OSError, SyntaxError, ValueError, IndexError, TypeError) as error:
        raise ValueError(
            f"--config {path} is not a file with one `config = {{...}}`: {error}"
        ) from error
    unknown = sorted(set(settings) - {"sizes", *_DEFAULTS})
    if unknown:
        known = ["sizes", *_DEFAULTS]
        raise ValueError(f"--config {path} has unknown settings {unknown}; known: {known}")
    return settings


def _settings(values: flags.FlagValues, configs: Path) -> dict[str, Any]:
    if values.task is not None and values.config is not None:
        raise ValueError(
            f"--task {values.task} and --config {values.config} are both given; need one"
        )
    if values.task is not None and values.ckpt_dir is None:
        repository = f"Wan-AI/Wan2.1-{values.task.upper().replace('T2I', 'T2V')}-Diffusers"
        raise ValueError(
            f"--task {values.task} needs --ckpt_dir: a folder, or {repository}, which is downloaded"
        )
    if values.task is not None:
        name = values.task.lower().replace("-", "_").replace(".", "_")
        return read_settings(configs / f"{name}.py")
    return {} if values.config is None else read_settings(Path(values.config))


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of a size like 832*480; ValueError naming the flag."""
    parts = text.split("*")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"--size is {text!r}; width*height is needed, such as 832*480")
    return int(parts[0]), int(parts[1])


# Prompts


def _entries(values: flags.FlagValues) -> list[_Entry]:
    if values.prompts_file is None:
        return [_Entry("", {"prompt": text}) for text in values.prompt or [_PROMPT]]
    if values.prompt:
        raise ValueError("--prompt and --prompts_file are both given; need one")
    if values.noise_file is not None:
        raise ValueError("--noise_file is for one prompt; --prompts_file is for several")
    return read_prompts(Path(values.prompts_file))


def read_prompts(path: Path) -> list[_Entry]:
    """The prompts of a file, a line each: text, or a JSON object with settings of its own.

    Raises ValueError naming the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts_file {path} cannot be read: {error}") from error
    entries = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"--prompts_file {path} line {number}"
            entries.append(_Entry(where, _parse_line(line.strip(), where)))
    if not entries:
        raise ValueError(f"--prompts_file {path} has no line with a prompt")
    return entries


def _parse_line(line: str, where: str) -> dict[str, Any]:
    if not line.startswith("{"):
        return {"prompt": line}
    try:
        values: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not a JSON object: {error}") from error
    known = [*_FLAG_OF, "save_file"]
    unknown = sorted(set(values) - set(known))
    if unknown or "prompt" not in values:
        wrong = f"has unknown keys {unknown}" if unknown else 'has no "prompt"'
        raise ValueError(f"{where} {wrong}; known: {known}")
    if isinstance(values.get("size"), str):
        try:
            values["size"] = parse_size(values["size"])
        except ValueError as error:
            raise ValueError(f"{where}: {str(error).removeprefix('--')}") from error
    if not isinstance(values.get("save_file", ""), str):
        raise ValueError(f"{where}: save_file is {values['save_file']!r}; a path is needed")
    return values


# Requests


def _request(
    config: WanConfig, values: flags.FlagValues, settings: Mapping[str, Any], entry: _Entry
) -> tuple[Request, dict[str, Any]]:
    """The request of a prompt and the arguments that make it, every default filled in."""
    given = {
        "negative_prompt": values.negative_prompt,
        "size": parse_size(values.size) if values.size is not None else None,
        "frames": values.frame_num,
        "steps": values.sample_steps,
        "shift": values.sample_shift,
        "solver": values.sample_solver,
        "guidance": values.sample_guide_scale,
    }
    if values.base_seed < -1:
        raise ValueError(f"--base_seed is {values.base_seed}; 0 or more is needed, or -1 for any")
    own = {k: v for k, v in entry.values.items() if v is not None and k != "save_file"}
    arguments: dict[str, Any] = {"num_videos": values.num_videos}
    if values.base_seed != -1:
        arguments["seed"] = values.base_seed
    for name in _DEFAULTS:
        chosen = settings.get(name) if given[name] is None else given[name]
        arguments[name] = getattr(config.defaults, name) if chosen is None else chosen
    arguments |= own
    try:
        request = make_request(config, **arguments)
    except ValueError as error:
        text = f"{entry.where}: {error}" if entry.where else _name_flag(str(error))
        raise ValueError(text) from error
    if request.latent_shape[0] != 1 and (values.task or "").startswith("t2i"):
        name = f"{entry.where}: frames" if "frames" in own else "--frame_num"
        raise ValueError(f"{name} is {arguments['frames']}; --task {values.task} makes 1")
    sizes, size = settings.get("sizes"), tuple(arguments["size"])
    if sizes and size not in sizes:
        listed = ", ".join(f"{w}*{h}" for w, h in sizes)
        say(f"warning: size {size[0]}*{size[1]} is not one this model was made for: {listed}")
    return request, arguments


def _name_flag(message: str) -> str:
    """A library's "steps is 0; ..." as "--sample_steps is 0; ..."."""
    name, rest = message.split(" ", 1)
    name, equals, value = name.partition("=")
    return f"--{_FLAG_OF[name]}{equals}{value} {rest}" if name in _FLAG_OF else message


def _jobs(
    values: flags.FlagValues,
    entry: _Entry,
    request: Request,
    arguments: Mapping[str, Any],
) -> Iterator[Job]:
    """The videos of one prompt; their outputs are placed later."""
    seed = request.seed if "seed" in arguments else secrets.randbits(63)
    given = None
    if values.noise_file is not None:
        with _naming("noise_file", values.noise_file):
            given = noise_file.load_noise(values.noise_file, shape=request.noise_shape)
    settings = {
        "prompt": request.prompts[0],
        "negative_prompt": request.negative,
        "size": list(arguments["size"]),
        "frames": int(arguments["frames"]),
        "steps": len(request.schedule.table),
        "shift": float(arguments["shift"]),
        "guidance": request.guidance,
        "solver": request.schedule.solver,
        "dtype": values.dtype,
        "checkpoint": values.ckpt_dir,
        "noise_file": values.noise_file,
    }
    for k in range(request.num_videos):
        yield Job(
            request=request._replace(seed=seed, num_videos=1),
            noise=None if given is None else given[k : k + 1],
            seed_drawn="seed" not in arguments,
            settings=settings | {"seed": seed, "video": k},
            videos=request.num_videos,
            save_file=entry.values.get("save_file"),
        )


def _placed(values: flags.FlagValues, jobs: Sequence[Job]) -> tuple[list[Job], list[Path]]:
    """The jobs to run, each with its output, and the outputs of those that are skipped."""
    now = datetime.datetime.now()
    taken: set[Path] = set()
    placed, skipped = [], []
    for number, job in enumerate(jobs):
        place = outputs.place(values, job, number=number, total=len(jobs), now=now, taken=taken)
        found = outputs.finished(place, job, taken) if values.skip_existing else None
        if found is not None:
            taken.add(found)
            skipped.append(found)
            continue
        if place.path in taken:
            raise ValueError(f"--save_file {place.path} would hold two videos; it can hold one")
        taken.add(place.path)
        with _naming("save_file", place.path):
            size = tuple(job.settings["size"])
            media.check_output(place.path, job.settings["frames"], size=size)
        placed.append(dataclasses.replace(job, output=place.path))
    return placed, skipped
