"""The flags both scripts share, progress on the terminal, and how errors reach the user."""

import contextlib
import functools
import math
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from absl import app, flags, logging
from tqdm import tqdm

from wan_jax import hosts, loading
from wan_jax.fitting import Fit
from wan_jax.pipeline import Progress
from wan_jax.planning.vae_memory import parse_memory
from wan_jax.sampler import DivergedError
from wan_jax.schedulers import SOLVERS
from wan_jax.weights.quantization import KINDS

_WORDS = dict.fromkeys(("true", "yes", "t", "y", "1"), True)
_WORDS |= dict.fromkeys(("false", "no", "f", "n", "0"), False)
_LINE = 1000  # characters of an error that are shown; XLA's go on for pages


class Stopped(BaseException):
    """A signal ended the run; the text says what it left and how to go on."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
        self.status = 128 + signum


class _Memory(flags.ArgumentParser):
    """Bytes, as in `--max_memory 6GB`."""

    def parse(self, argument: str | int) -> int:
        return parse_memory(argument)

    def flag_type(self) -> str:
        return "a size such as 6GB"


class _Words(flags.ArgumentParser):
    """True or False given as a word, as in `--offload_model False`."""

    def parse(self, argument: str | bool) -> bool:
        try:
            return _WORDS[str(argument).lower()]
        except KeyError:
            raise ValueError(f"{argument!r} is neither True nor False") from None

    def flag_type(self) -> str:
        return "True or False"


def define_flags(
    tasks: Collection[str], values: flags.FlagValues = flags.FLAGS, *, images: bool = False
) -> None:
    """Define the reference's flags and ours on `values`.

    tasks: the values of --task. images: also those of a script that takes images.
    """
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    number = functools.partial(flags.DEFINE_float, flag_values=values)
    switch = functools.partial(flags.DEFINE_bool, flag_values=values)
    choice = functools.partial(flags.DEFINE_enum, flag_values=values)
    choice("task", None, list(tasks), "What to run; without it, the checkpoint's own defaults.")
    string("ckpt_dir", None, "Checkpoint: folder, repacked .safetensors, hub id or gs:// path.")
    text = "LoRA to add: file.safetensors or file.safetensors:scale; may be given several times."
    flags.DEFINE_multi_string("lora", None, text, flag_values=values)
    string("config", None, "A file like those in configs/, instead of --task.")
    string("size", None, "Width*height in pixels, multiples of 16, such as 832*480.")
    integer("frame_num", None, "Frames of the video, 4n + 1.")
    prompts = "What the video shows; may be given several times."
    flags.DEFINE_multi_string("prompt", None, prompts, flag_values=values)
    string("prompts_file", None, "A prompt a line, as text or as JSON with its own settings.")
    integer("num_videos", 1, "Videos, or images, of each prompt.")
    string("negative_prompt", None, "What it should not be; the default is the reference's.")
    string("sample_solver", None, f"Solver: one of {', '.join(SOLVERS)}.")
    integer("sample_steps", None, "Solver steps, 1 to 1000.")
    number("sample_shift", None, "Shift of the noise schedule, above 0.")
    number("sample_guide_scale", None, "Guidance scale; 1 runs a single pass.")
    integer("base_seed", -1, "Seed of the noise; -1 draws one and prints it.")
    string("noise_file", None, "Initial noise instead of a seed's: .npy, float [16, T, h, w].")
    string("save_file", None, "Output: .mp4, .gif, .webp, .png, or .npz (floats and latents).")
    switch("skip_existing", False, "Leave videos out that an earlier run has finished.")
    string("resume_dir", None, "Where Ctrl-C or SIGTERM leaves a state that the next run takes up.")
    if images:
        string("image", None, "Image that the video begins with (i2v); .png, .jpg, .webp, ...")
        string("first_frame", None, "Image that the video begins with (flf2v).")
        string("last_frame", None, "Image that the video ends with (flf2v).")
        text = "keep: --size is an area, the image's shape stays; crop or pad: exactly --size."
        choice("fit", "keep", get_args(Fit), text)
    _define_memory(values)
    string("cache_dir", None, "Where converted checkpoints are kept; default ~/.cache/wan_jax.")
    text = "its devices share each video; while this and the other size are 1, they are chosen."
    integer("ulysses_size", 1, f"Trades tokens for heads: {text}")
    integer("ring_size", 1, f"Passes keys and values round: {text}")
    text = "weights over the devices; chosen by their memory if neither this nor its no is given."
    switch("dit_fsdp", None, f"Split the transformer's {text}")
    switch("t5_fsdp", None, f"Split the text encoder's {text}")
    switch("plan", False, "Only tell what a run needs of the devices, and whether it fits.")
    string("plan_target", None, "What --plan is for, such as v6e:4x4 or h100:8; default: this.")
    string("coordinator_address", None, "host:port of process 0, if processes find no launcher.")
    integer("num_processes", None, "How many processes make a video together; see there.")
    integer("process_id", None, "The number of this one, from 0; see there.")
    switch("use_prompt_extend", False, "Rewrite the prompt; not supported so far.")
    choice("prompt_extend_method", "local_qwen", ["dashscope", "local_qwen"], "How to rewrite it.")
    string("prompt_extend_model", None, "The model that rewrites it.")
    choice("prompt_extend_target_lang", "zh", ["zh", "en"], "Its language then.")
    for flag in values.flags_by_module_dict()[__name__]:  # so that the script's --help lists them
        values.register_key_flag_for_module(sys.argv[0], flag)


def _define_memory(values: flags.FlagValues) -> None:
    """Those of the numbers' kinds, and of what lies where."""
    choice = functools.partial(flags.DEFINE_enum, flag_values=values)
    words, text = _Words(), "True: a stage's weights leave the device when it is done."
    flags.DEFINE(words, "offload_model", True, text, flag_values=values)
    flags.DEFINE_bool("t5_cpu", False, "Run the text encoder on the CPU.", flag_values=values)
    choice("dtype", "bfloat16", loading.DTYPES, "float32 is for comparing numbers.")
    text = "8 bits: fp8 in the DiT's large products and self-attention, or in the products alone."
    choice("quantize", None, KINDS, text)
    text = "Of the VAE; bfloat16 takes half its memory, and frames differ a little."
    choice("vae_dtype", "float32", loading.DTYPES, text)
    text = "What may be used of a device, such as 6GB: by tiles of the VAE and streamed weights."
    flags.DEFINE(_Memory(), "max_memory", None, text, flag_values=values)


def run(main: Callable[[flags.FlagValues], None], *, advice: str = "") -> None:
    """Parse the command line and call main; errors of the user are one line and exit status 2.

    advice: how to go on after Ctrl-C or SIGTERM.
    """

    def parse(arguments: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(list(arguments))
        except flags.Error as error:
            text = str(error).splitlines()[0]
            if re.search("'(image|first_frame|last_frame)'", text):
                text += "; run_i2v.py takes images"
            _fail(text)
        if rest[1:]:
            _fail(f"{rest[1]!r} is not a flag; texts with spaces need quotes")
        return rest

    def guarded(_: list[str]) -> None:
        logging.set_verbosity(logging.FATAL)  # Orbax tells its own story, errors in pages
        for number in heard():
            signal.signal(number, _terminated)
        more = f"; {advice}" if advice else ""
        try:
            main(flags.FLAGS)
        except (ValueError, DivergedError, OSError, RuntimeError, MemoryError) as error:
            if _received:  # a library made another error of the signal's
                word = "interrupted" if _received[0] == signal.SIGINT else "terminated"
                _fail(f"{word}{more}", status=128 + _received[0])
            # A device without memory raises a RuntimeError.
            text = hosts.explained(error) or "no memory left"
            _fail(text, status=2 if isinstance(error, ValueError) else 1)
        except Stopped as error:
            _fail(f"{error}{more}", status=error.status)
        except KeyboardInterrupt:
            _fail(f"interrupted{more}", status=128 + signal.SIGINT)
        except Exception as error:
            if hosts.count() > 1:  # the others would wait for this one
                traceback.print_exc()
                _fail(repr(error), status=1)
            raise

    app.run(guarded, flags_parser=parse)


def heard() -> list[int]:
    """The signals that end a program, but for those that it was started to ignore, as by nohup."""
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in ending if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def handled(numbers: Sequence[int], handler: Callable[[int, Any], None] | int) -> Iterator[None]:
    """Signals are this handler's during the block."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


_received: list[int] = []


def _terminated(signum: int, frame: Any) -> NoReturn:
    del frame
    # Kept, as some callbacks of JAX swallow what is raised in them: the next progress raises again.
    _received.append(signum)
    _stop(signum)


def _stop(signum: int) -> NoReturn:
    """Raise, so that what is half-written is removed."""
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped("terminated", signum)


def _fail(message: str, *, status: int = 2) -> NoReturn:
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # or the message would stand behind a bar
    line = " ".join(message.split())[:_LINE]
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    if hosts.count() > 1:
        hosts.leave(line, status)
    raise SystemExit(status)


class Reporter:
    """Progress bars with time left, and the seconds that each stage took.

    Stages may come several times (weights are loaded a network at a time); their times add up.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._laps: dict[str, float] = {}
        self._begun = time.perf_counter()
        self._bar: tqdm | None = None
        self._started = 0.0

    def __call__(self, progress: Progress) -> None:
        if _received:
            _stop(_received[0])
        if not hosts.is_first():
            return
        if progress.done == 0 or self._bar is None:
            in_bytes = progress.stage in ("convert", "download", "upload", "export")
            self._bar = tqdm(
                total=progress.total,
                initial=progress.done,
                desc=progress.stage,
                unit="B" if in_bytes else "it",
                unit_scale=in_bytes,
            )
            self._started = time.perf_counter()
        self._bar.total = progress.total
        self._bar.update(progress.done - self._bar.n)
        if progress.done >= progress.total:
            self._bar.close()
            self._bar = None
            spent = time.perf_counter() - self._started
            self.seconds[progress.stage] = self.seconds.get(progress.stage, 0.0) + spent

    def lap(self) -> dict[str, float]:
        """The seconds of each stage since the last lap."""
        spent = {stage: t - self._laps.get(stage, 0.0) for stage, t in self.seconds.items()}
        self._laps = dict(self.seconds)
        return {stage: t for stage, t in spent.items() if t > 0.0}

    def line(self) -> str:
        """One line of seconds a stage; the total is by the clock, since this was made."""
        total = time.perf_counter() - self._begun
        stages = {**self.seconds, "other": total - math.fsum(self.seconds.values())}
        parts = [f"{stage} {spent:.2f}" for stage, spent in stages.items()]
        return f"seconds: {', '.join(parts)}, total {total:.2f}"


def say(message: str) -> None:
    """A line on stderr, above a progress bar; of several processes the first says it."""
    if hosts.is_first():
        tqdm.write(message, file=sys.stderr)
