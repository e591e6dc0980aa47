"""What --task means: the checkpoint that it is for, its settings, and where to download it."""

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from wan_jax import shipped
from wan_jax.config import KINDS, RELEASED, WanConfig
from wan_jax.prompts import Entry, parse_size

_SETTINGS = (
    "sizes",
    "shift_480p",
    "negative_prompt",
    "size",
    "frames",
    "steps",
    "shift",
    "guidance",
    "solver",
)
_480P = ((832, 480), (480, 832))


class _Kind(NamedTuple):
    """A kind of checkpoint: what errors call it, its script, and the flags of its images."""

    title: str
    script: str
    flags: tuple[str, ...]


_KINDS = (  # by the number of images
    _Kind("a text-to-video", "run_t2v.py", ()),
    _Kind("an image-to-video", "run_i2v.py", ("image",)),
    _Kind("a first-and-last-frame", "run_i2v.py", ("first_frame", "last_frame")),
)
SOURCES = ("image", "last_image")  # the library's names of what the flags of a kind give


class Task(NamedTuple):
    """released: its networks, in config.RELEASED. config: the file in configs/, without .py."""

    released: str
    config: str
    repository: str

    @property
    def network(self) -> WanConfig:
        """The configuration of the released checkpoint."""
        return RELEASED[self.released]


_T2V_14B = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
_I2V_480P = Task("i2v-14B", "i2v_14b_480p", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers")
_I2V_720P = Task("i2v-14B", "i2v_14b_720p", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers")
TEXT_TASKS = {
    "t2v-1.3B": Task("t2v-1.3B", "t2v_1_3b", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    "t2v-14B": Task("t2v-14B", "t2v_14b", _T2V_14B),
    "t2i-14B": Task("t2v-14B", "t2i_14b", _T2V_14B),
}
IMAGE_TASKS = {
    "i2v-14B": _I2V_720P,  # or the other, by --size: the reference has one name for both
    "i2v-14B-480P": _I2V_480P,
    "i2v-14B-720P": _I2V_720P,
    # The hub has this one in lower case.
    "flf2v-14B": Task("flf2v-14B", "flf2v_14b", "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers"),
}
_TASKS = TEXT_TASKS | IMAGE_TASKS


def chosen(values: flags.FlagValues) -> Task | None:
    """The task of the flags, if one is given."""
    if values.task is None:
        return None
    if values.task == "i2v-14B" and values.size is not None and parse_size(values.size) in _480P:
        return _I2V_480P
    return _TASKS[values.task]


def takes_images(values: flags.FlagValues) -> bool:
    """Whether these are the flags of the script that takes images."""
    return "image" in values


def likely(values: flags.FlagValues, entries: Sequence[Entry]) -> WanConfig:
    """What the checkpoint will be, as far as the flags and the prompts tell."""
    task = chosen(values)
    return _released(_images_given(values, entries)) if task is None else task.network


def _released(count: int) -> WanConfig:
    return RELEASED[f"{KINDS[count]}-14B"]


def miniature(values: flags.FlagValues, entries: Sequence[Entry]) -> str:
    """What to load without a checkpoint."""
    return shipped.default(_images_given(values, entries))


def real(values: flags.FlagValues, count: int) -> str:
    """The flags that run a released checkpoint of the kind that takes so many images."""
    tasks = IMAGE_TASKS if takes_images(values) else TEXT_TASKS
    name = next(name for name, task in tasks.items() if task.network.images == count)
    return f"--task {name} --ckpt_dir {tasks[name].repository}"


def _images_given(values: flags.FlagValues, entries: Sequence[Entry]) -> int:
    """How many images a video is to be made of, before the checkpoint is known."""
    if not takes_images(values):
        return 0
    given = values.first_frame, values.last_frame, *(e.values.get("last_image") for e in entries)
    return 1 if all(path is None for path in given) else 2


def check_checkpoint(values: flags.FlagValues, count: int) -> WanConfig:
    """The released checkpoint of the kind that takes so many images.

    Raises ValueError if the script or --task is for another kind.
    """
    path, kind = values.ckpt_dir, _KINDS[count]
    if takes_images(values) != (count > 0):
        raise ValueError(f"--ckpt_dir {path} is {kind.title} checkpoint; {kind.script} runs those")
    task = chosen(values)
    if task is not None and task.network.images != count:
        raise ValueError(
            f"--ckpt_dir {path} is {kind.title} checkpoint and --task {values.task} is for "
            f"{_KINDS[task.network.images].title} one; use --task {KINDS[count]}-14B"
        )
    return _released(count)


def images(values: flags.FlagValues, count: int) -> dict[str, str]:
    """{"image", "last_image": path} that the flags give a checkpoint which takes `count` images.

    Raises ValueError for a flag that is for another kind of checkpoint.
    """
    if not takes_images(values):
        return {}
    kind = _KINDS[count]
    for name in ("image", "first_frame", "last_frame"):
        if values[name].value is not None and name not in kind.flags:
            raise ValueError(
                f"--{name} {values[name].value} is given; {kind.title} checkpoint takes "
                + " and ".join(f"--{flag}" for flag in kind.flags)
            )
    paths = zip(SOURCES, (values[name].value for name in kind.flags), strict=False)
    return {name: path for name, path in paths if path is not None}


def image_flag(name: str, count: int) -> str:
    """The flag that sets "image" or "last_image" of a checkpoint which takes `count` images."""
    return "last_frame" if name == "last_image" else _KINDS[count or 1].flags[0]


def settings(values: flags.FlagValues, configs: Path) -> dict[str, Any]:
    """The settings of --task or --config, {} without either. configs: the folder of the tasks'.

    Raises ValueError for both, for a task without a checkpoint that is to run, and for a file that
    is none.
    """
    task = chosen(values)
    if task is None:
        return {} if values.config is None else read_settings(Path(values.config))
    if values.config is not None:
        raise ValueError(
            f"--task {values.task} and --config {values.config} are both given; need one"
        )
    if values.ckpt_dir is None and not values.plan:
        raise ValueError(
            f"--task {values.task} needs --ckpt_dir: a folder, or {task.repository}, which is "
            "downloaded"
        )
    found = read_settings(configs / f"{task.config}.py")
    if values.task == "i2v-14B":  # which stands for both
        sizes = [read_settings(configs / f"{t.config}.py")["sizes"] for t in (_I2V_480P, _I2V_720P)]
        found["sizes"] = [size for some in sizes for size in some]
    return found


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a generation in a configuration file; ValueError for an unknown one."""
    found = read_literal(path)
    try:
        found["sizes"] = [(int(w), int(h)) for w, h in found.get("sizes", ())]
    except (ValueError, TypeError) as error:
        raise ValueError(f"--config {path} has sizes that are none: {error}") from error
    unknown = sorted(set(found) - set(_SETTINGS))
    if unknown:
        raise ValueError(f"--config {path} has unknown settings {unknown}; known: {_SETTINGS}")
    return found


def read_literal(path: Path) -> dict[str, Any]:
    """The literal of a configuration file, `config = {...}`; nothing in the file is executed."""
    try:
        module = ast.parse(path.read_text(encoding="utf-8"))
        values = [n.value for n in module.body if isinstance(n, ast.Assign)]
        return dict(ast.literal_eval(values[0]))
    except (OSError, SyntaxError, ValueError, IndexError, TypeError) as error:
        raise ValueError(
            f"--config {path} is not a file with one `config = {{...}}`: {error}"
        ) from error
