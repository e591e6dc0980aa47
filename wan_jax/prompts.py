"""Prompts as the user gives them: flags, or a file with a prompt a line."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from wan_jax import loading, shipped

# Arguments of the library and the flags that set them; a line of a prompts file knows the first.
FLAG_OF = {
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
_IMAGE_KEYS = ("image", "last_image", "fit")  # where the script takes images
_PROMPT = "Two anthropomorphic cats in boxing gear fight on a spotlit stage."


@dataclasses.dataclass(frozen=True)
class Entry:
    """A prompt with the settings of its own; where: what errors about it name, "" for the flags."""

    where: str
    values: dict[str, Any]


def entries(values: flags.FlagValues) -> list[Entry]:
    """The prompts that the flags ask for, in order."""
    several = values.prompts_file is not None or len(values.prompt or ()) > 1
    if values.noise_file is not None and several:
        raise ValueError(f"--noise_file {values.noise_file} is for one prompt; there are several")
    with_images = "image" in values
    if values.prompts_file is None:
        return _of_flags(values, with_images=with_images)
    if values.prompt:
        raise ValueError("--prompt and --prompts_file are both given; need one")
    return read_prompts(Path(values.prompts_file), keys=_IMAGE_KEYS if with_images else ())


def _of_flags(values: flags.FlagValues, *, with_images: bool) -> list[Entry]:
    """Without a checkpoint there is a prompt, and where no image is given a picture too."""
    own: dict[str, Any] = {}
    if not with_images:
        small = values.ckpt_dir is None or loading.is_small(values.ckpt_dir)
        usual = shipped.PROMPT if small else _PROMPT
    else:
        given = (values.image, values.first_frame, values.last_frame)
        if values.ckpt_dir is None and values.task is None and given == (None, None, None):
            own = {"image": str(shipped.PICTURE)}
        elif not values.prompt and not values.plan:
            raise ValueError("--prompt is missing; a text that says what happens is needed")
        usual = shipped.PICTURE_PROMPT
    return [Entry("", {"prompt": text, **own}) for text in values.prompt or [usual]]


def read_prompts(path: Path, *, keys: Sequence[str] = ()) -> list[Entry]:
    """The prompts of a file, a line each: text, or a JSON object with settings of its own.

    keys: those that an object may have besides the usual ones. Raises ValueError naming the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts_file {path} cannot be read: {error}") from error
    found = []
    # Not splitlines(), which also parts a text at a form feed or a Unicode separator.
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if line.strip():
            where = f"--prompts_file {path} line {number}"
            found.append(Entry(where, _parse_line(line.strip(), where, keys)))
    if not found:
        raise ValueError(f"--prompts_file {path} has no line with a prompt")
    return found


def _parse_line(line: str, where: str, keys: Sequence[str]) -> dict[str, Any]:
    if not line.startswith("{"):
        return {"prompt": line}
    try:
        values: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not a JSON object: {error}") from error
    known = [*FLAG_OF, *keys, "save_file"]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; known: {known}")
    for name in ("prompt", "negative_prompt", *keys, "save_file"):
        text = values.get(name)
        if not isinstance(text, str) and (name == "prompt" or text is not None):
            raise ValueError(f"{where}: {name} is {text!r}; a text is needed")
    if isinstance(values.get("size"), str):
        try:
            values["size"] = parse_size(values["size"])
        except ValueError as error:
            raise ValueError(f"{where}: {str(error).removeprefix('--')}") from error
    return {name: value for name, value in values.items() if value is not None}


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of a size like 832*480; ValueError naming the flag."""
    parts = text.split("*")
    if len(parts) != 2 or not all(part.isdecimal() and len(part) < 7 for part in parts):
        raise ValueError(f"--size is {text!r}; width*height is needed, such as 832*480")
    return int(parts[0]), int(parts[1])
