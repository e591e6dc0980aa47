"""The flags both scripts share, the configuration files, and how errors reach the user."""

import ast
import contextlib
import dataclasses
import datetime
import functools
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from absl import app, flags, logging
from tqdm import tqdm

import wan_jax
from wan_jax import loading, media
from wan_jax.config import WanConfig
from wan_jax.pipeline import Progress
from wan_jax.request import Request, make_request
from wan_jax.sampler import DivergedError
from wan_jax.schedulers import SOLVERS

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
}
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_LINE = 1000  # characters of an error that are shown; XLA's go on for pages
_PROMPT = "Two anthropomorphic cats in boxing gear fight on a spotlit stage."


class _Words(flags.ArgumentParser):
    """True or False given as a word, as in `--offload_model False`."""

    def parse(self, argument: str | bool) -> bool:
        try:
            return _WORDS[str(argument).lower()]
        except KeyError:
            raise ValueError(f"{argument!r} is neither True nor False") from None

    def flag_type(self) -> str:
        return "True or False"


def define_flags(tasks: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the reference's flags and ours on `values`; `tasks` are the values of --task."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    number = functools.partial(flags.DEFINE_float, flag_values=values)
    switch = functools.partial(flags.DEFINE_bool, flag_values=values)
    choice = functools.partial(flags.DEFINE_enum, flag_values=values)
    choice("task", None, list(tasks), "What to run; without it, the checkpoint's own defaults.")
    string("ckpt_dir", None, "Checkpoint: Diffusers or original folder, or one converted before.")
    string("config", None, "A file like those in configs/, instead of --task.")
    string("size", None, "Width*height in pixels, multiples of 16, such as 832*480.")
    integer("frame_num", None, "Frames of the video, 4n + 1.")
    string("prompt", None, "What the video shows.")
    string("negative_prompt", None, "What it should not be; the default is the reference's.")
    string("sample_solver", None, f"Solver: one of {', '.join(SOLVERS)}.")
    integer("sample_steps", None, "Solver steps, 1 to 1000.")
    number("sample_shift", None, "Shift of the noise schedule, above 0.")
    number("sample_guide_scale", None, "Guidance scale; 1 runs a single pass.")
    integer("base_seed", -1, "Seed of the noise; -1 draws one and prints it.")
    string("noise_file", None, "Initial noise instead of a seed's: .npy, float [16, T, h, w].")
    string("save_file", None, "Output: .mp4, .png for one frame, or .npz (floats and latents).")
    words, text = _Words(), "True: a stage's weights leave the device when it is done."
    flags.DEFINE(words, "offload_model", True, text, flag_values=values)
    switch("t5_cpu", False, "Run the text encoder on the CPU.")
    choice("dtype", "bfloat16", loading.DTYPES, "float32 is for comparing numbers.")
    string("cache_dir", None, "Where converted checkpoints are kept; default ~/.cache/wan_jax.")
    for name in ("ulysses_size", "ring_size"):
        integer(name, 1, "Devices that share one video; only 1 is supported so far.")
    for name in ("dit_fsdp", "t5_fsdp"):
        switch(name, False, "Shard the weights; not supported so far.")
    for flag in values.flags_by_module_dict()[__name__]:  # so that the script's --help lists them
        values.register_key_flag_for_module(sys.argv[0], flag)


def run(main: Callable[[flags.FlagValues], None]) -> None:
    """Parse the command line and call main; errors of the user are one line and exit status 2."""

    def parse(arguments: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(list(arguments))
        except flags.Error as error:
            _fail(str(error).splitlines()[0])
        if rest[1:]:
            _fail(f"{rest[1]!r} is not a flag; texts with spaces need quotes")
        return rest

    def guarded(_: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # Orbax tells its own story at INFO
        # As an exception, so that what is half-written is removed.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            main(flags.FLAGS)
        except ValueError as error:
            _fail(str(error))
        except (DivergedError, OSError, RuntimeError) as error:  # out of memory is one of the last
            _fail(str(error), status=1)
        except KeyboardInterrupt:
            _fail("interrupted", status=128 + signal.SIGINT)

    app.run(guarded, flags_parser=parse)


def _fail(message: str, *, status: int = 2) -> NoReturn:
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # or the message would stand behind a bar
    line = " ".join(message.split())[:_LINE]
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    raise SystemExit(status)


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
    known = {"sizes", "size", "frames", "steps", "shift", "guidance", "solver", "negative_prompt"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"--config {path} has unknown settings {unknown}; known: {sorted(known)}")
    return settings


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of a size like 832*480; ValueError naming the flag."""
    parts = text.split("*")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"--size is {text!r}; width*height is needed, such as 832*480")
    return int(parts[0]), int(parts[1])


@dataclasses.dataclass(frozen=True)
class Job:
    """One checked run: what is asked of the checkpoint, and where the result goes."""

    config: WanConfig
    arguments: dict[str, Any]
    request: Request
    noise: np.ndarray | None
    output: Path


def plan(values: flags.FlagValues, configs: Path) -> Job:
    """Check every flag against the checkpoint before anything slow starts."""
    _check_parallel(values)
    settings = _settings(values, configs)
    with _naming("ckpt_dir", values.ckpt_dir):
        config = loading.read_config(values.ckpt_dir)
    arguments = _arguments(values, settings)
    try:
        request = make_request(config, **arguments)
    except ValueError as error:
        raise ValueError(_name_flag(str(error))) from error
    arguments["seed"] = request.seed
    output = Path(values.save_file) if values.save_file else _default_output(values, request)
    frames = 1 + (request.latent_shape[0] - 1) * config.vae.temporal_stride
    if frames != 1 and (values.task or "").startswith("t2i"):
        raise ValueError(f"--frame_num is {frames}; --task {values.task} makes 1")
    with _naming("save_file", output):
        media.check_output(output, frames)
    noise = None
    if values.noise_file is not None:
        with _naming("noise_file", values.noise_file):
            noise = media.load_noise(values.noise_file, shape=request.noise_shape)
    return Job(config, arguments, request, noise, output)


@contextlib.contextmanager
def _naming(flag: str, value: Any) -> Iterator[None]:
    """Errors of the block begin with the flag whose value they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"--{flag} {value}: {error}") from error


def _check_parallel(values: flags.FlagValues) -> None:
    for name in ("ulysses_size", "ring_size"):
        if values[name].value != 1:
            raise ValueError(f"--{name} is {values[name].value}; only 1 is supported so far")
    for name in ("dit_fsdp", "t5_fsdp"):
        if values[name].value:
            raise ValueError(f"--{name} needs several devices, which are not supported so far")


def _settings(values: flags.FlagValues, configs: Path) -> dict[str, Any]:
    if values.task is not None and values.config is not None:
        raise ValueError(
            f"--task {values.task} and --config {values.config} are both given; need one"
        )
    if values.task is not None and values.ckpt_dir is None:
        repository = f"Wan-AI/Wan2.1-{values.task.upper().replace('T2I', 'T2V')}-Diffusers"
        raise ValueError(
            f"--task {values.task} needs --ckpt_dir; get the weights with "
            f"`hf download {repository} --local-dir DIR`"
        )
    if values.task is not None:
        name = values.task.lower().replace("-", "_").replace(".", "_")
        return read_settings(configs / f"{name}.py")
    return {} if values.config is None else read_settings(Path(values.config))


def _arguments(values: flags.FlagValues, settings: dict[str, Any]) -> dict[str, Any]:
    given = {
        "negative_prompt": values.negative_prompt,
        "size": parse_size(values.size) if values.size is not None else None,
        "frames": values.frame_num,
        "steps": values.sample_steps,
        "shift": values.sample_shift,
        "solver": values.sample_solver,
        "guidance": values.sample_guide_scale,
    }
    arguments = {k: settings.get(k) if v is None else v for k, v in given.items()}
    sizes, size = settings.get("sizes"), arguments["size"]
    if sizes and size is not None and tuple(size) not in sizes:
        listed = ", ".join(f"{w}*{h}" for w, h in sizes)
        _say(f"warning: size {size[0]}*{size[1]} is not one this model was made for: {listed}")
    if values.base_seed < -1:
        raise ValueError(f"--base_seed is {values.base_seed}; 0 or more is needed, or -1 for any")
    arguments["seed"] = None if values.base_seed == -1 else values.base_seed
    arguments["prompt"] = _PROMPT if values.prompt is None else values.prompt
    return arguments


def _name_flag(message: str) -> str:
    """A library's "steps is 0; ..." as "--sample_steps is 0; ..."."""
    name, rest = message.split(" ", 1)
    name, equals, value = name.partition("=")
    return f"--{_FLAG_OF[name]}{equals}{value} {rest}" if name in _FLAG_OF else message


def _default_output(values: flags.FlagValues, request: Request) -> Path:
    """The reference's name: task, size, devices, the prompt's first 50 characters, the time."""
    _, height, width, _ = request.latent_shape
    text = re.sub(r"[\s/]", "_", request.prompts[0])[:50]
    now = datetime.datetime.now().strftime("%Y%m%d_%H%M%S")
    task = values.task or Path(values.ckpt_dir or "miniature").absolute().name
    ending = ".png" if request.latent_shape[0] == 1 else ".mp4"
    size = f"{8 * width}*{8 * height}"
    return Path(f"{task}_{size}_{values.ulysses_size}_{values.ring_size}_{text}_{now}{ending}")


class Reporter:
    """Progress bars with time left, and the seconds that each stage took.

    Stages may come several times (weights are loaded a network at a time); their times add up.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begun = time.perf_counter()
        self._bar: tqdm | None = None
        self._started = 0.0

    def __call__(self, progress: Progress) -> None:
        if progress.done == 0 or self._bar is None:
            in_bytes = progress.stage == "convert"
            unit = "B" if in_bytes else "it"
            self._bar = tqdm(
                total=progress.total, desc=progress.stage, unit=unit, unit_scale=in_bytes
            )
            self._started = time.perf_counter()
        self._bar.total = progress.total
        self._bar.update(progress.done - self._bar.n)
        if progress.done >= progress.total:
            self._bar.close()
            self._bar = None
            spent = time.perf_counter() - self._started
            self.seconds[progress.stage] = self.seconds.get(progress.stage, 0.0) + spent

    def line(self) -> str:
        """One line of seconds a stage; the total is by the clock, since this was made."""
        total = time.perf_counter() - self._begun
        stages = {**self.seconds, "other": total - math.fsum(self.seconds.values())}
        parts = [f"{stage} {spent:.2f}" for stage, spent in stages.items()]
        return f"seconds: {', '.join(parts)}, total {total:.2f}"


def execute(values: flags.FlagValues, job: Job) -> None:
    """Load, generate, decode into the file."""
    _check_platform()
    report = Reporter()
    wan = wan_jax.load(
        values.ckpt_dir,
        dtype=values.dtype,
        cache_dir=values.cache_dir,
        offload=values.offload_model,
        text_on_cpu=values.t5_cpu,
        callback=report,
        notify=_say,
    )
    if job.noise is None:
        _say(f"seed {job.request.seed}")
    latents = wan.generate(**job.arguments, noise=job.noise, callback=report, output="latents")
    floats = job.output.suffix.lower() != ".mp4"
    frames = wan.decode(latents, dtype="float32" if floats else "uint8", callback=report)
    extra = latents[0] if job.output.suffix.lower() == ".npz" else None
    media.save_video(frames, job.output, fps=job.config.defaults.fps, latents=extra)
    _say(report.line())
    _say(f"saved {job.output}")


def _check_platform() -> None:
    """Raise RuntimeError if JAX cannot start; without a plugin it only fails an assertion."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        named = os.environ.get("JAX_PLATFORMS", "")
        raise RuntimeError(
            f"JAX_PLATFORMS={named} has no device that starts here: {error}"
        ) from None


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
