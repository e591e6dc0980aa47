"""A folder of clips to train a LoRA on: a colour that the miniature has never seen."""

import json
from pathlib import Path

import jax
import numpy as np

from wan_jax import files, media, xla
from wan_jax.config import Defaults
from wan_jax.training.dataset import LISTING
from wan_jax.training.miniature import captions, world
from wan_jax.training.miniature.render import render

COLOUR = "lime"
COUNT = 40
_CAPTIONS = 4  # of every clip

_render = xla.jit(render, static_argnames=("size", "frames"))


def scenes(count: int, *, colour: str, seed: int) -> list[world.Scene]:
    """Scenes of one object of this colour, of the first of the sizes."""
    rng = np.random.default_rng(seed)
    size = world.FRAME_SIZES[0]
    return [world.draw(rng, count=1, size=size, colour=colour) for _ in range(count)]


def write(folder: Path, *, colour: str = COLOUR, count: int = COUNT, seed: int = 0) -> None:
    """Write clips 000.mp4, 001.mp4, ... and their captions in metadata.jsonl into a folder.

    Raises ValueError for a colour that the world lacks.
    """
    drawn = scenes(count, colour=colour, seed=seed)
    rng = np.random.default_rng((seed, 1))
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, scene in enumerate(drawn):
        name = f"{number:03}.mp4"
        clip = _render(world.fields([scene]), size=scene.size, frames=scene.frames)
        media.save_video(np.asarray(jax.device_get(clip)), folder / name, fps=Defaults.fps)
        told = [captions.plain_caption(scene)]
        told += [captions.caption(scene, rng) for _ in range(_CAPTIONS - 1)]
        lines.append(json.dumps({"file_name": name, "text": told}))
    with files.whole_or_nothing(folder / LISTING) as partial:
        Path(partial).write_text("\n".join(lines) + "\n", encoding="utf-8")
