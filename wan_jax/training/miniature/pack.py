"""Trained networks become what the package ships: Diffusers folders that share what is the same."""

import filecmp
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from wan_jax.config import KINDS, WanConfig
from wan_jax.training.miniature import captions, files, world
from wan_jax.training.miniature.networks import DEFAULTS
from wan_jax.training.miniature.render import render
from wan_jax.weights import miniature
from wan_jax.weights.checkpoint import copy_files

LIMIT = 48 * 10**6  # bytes in git
PICTURE = "picture.png"
# What run_i2v.py begins with where no image is given; its caption is the prompt.
SCENE = world.Scene(
    objects=(
        world.Object(
            "star", "yellow", "large", "right", x=80.0, y=48.0, radius=19.2, reach=32.0, phase=0.0
        ),
    ),
    background=world.Background("gradient", "dark", level=0.15, span=0.29, turn=1),
    size=(160, 96),
    frames=world.FRAMES,
)


def pack(src: Path, dst: Path) -> dict[str, int]:
    """Write dst/t2v, dst/i2v and dst/flf2v, those whose DiT is there, as folders of bfloat16.

    src: holds tokenizer/ and what files.write() wrote: vae, umt5, t2v, for images also clip and
    i2v, flf2v. Each folder is whole, loads here and in diffusers, and has relative links to what
    another before it has alike. Folders of these names that pack() wrote before are replaced.
    Returns {"t2v/vae": bytes, ...} without links; what is at the top of a folder counts under
    "t2v". The same input gives the same bytes. Raises ValueError naming the file for networks that
    are missing or do not fit, a folder in dst that is none of pack()'s, and for more than LIMIT.
    """
    kinds = [kind for kind in KINDS if (src / f"{kind}.safetensors").exists()]
    if not kinds:
        raise ValueError(f"{src} has no DiT; needed is one of {', '.join(KINDS)} (.safetensors)")
    foreign = [dst / kind for kind in KINDS if _is_foreign(dst / kind)]
    if foreign:
        raise ValueError(f"{foreign[0]} is there and no checkpoint; give another folder")
    dst.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".packed-", dir=dst) as folder:
        work = Path(folder)
        for kind in kinds:
            _write(src, work / kind, kind)
        _link(work, kinds)
        sizes = _sizes(work)
        if sum(sizes.values()) > LIMIT:
            raise ValueError(f"{src} makes {sum(sizes.values())} bytes; at most {LIMIT} are wanted")
        for kind in KINDS:
            if (dst / kind).exists():
                shutil.rmtree(dst / kind)
        for kind in kinds:
            (work / kind).rename(dst / kind)
    return sizes


def draw_picture(file: Path) -> str:
    """Write the first frame of SCENE as a .png; gives its caption."""
    fields: Mapping[str, Any] = world.fields([SCENE])
    frames = render(dict(fields), size=SCENE.size, frames=SCENE.frames)
    pixels = np.asarray(jnp.round(127.5 * (frames[0, 0] + 1.0)), np.uint8)
    Image.fromarray(pixels).save(file, optimize=True)
    return captions.plain_caption(SCENE)


def _is_foreign(path: Path) -> bool:
    return path.is_symlink() or (path.exists() and not (path / "model_index.json").is_file())


def _write(src: Path, path: Path, kind: str) -> None:
    """One checkpoint, nothing of it linked."""
    arrays: dict[str, miniature.Arrays] = {}
    configs: dict[str, Any] = {}
    for part, name in files.parts(kind).items():
        found, configs[part] = files.network(src, name)
        arrays[part] = {k: array.astype(jnp.bfloat16) for k, array in found.items()}
    tokenizer = files.tokenizer(src)
    if KINDS[configs["dit"].images] != kind:
        file, other = src / f"{kind}.safetensors", KINDS[configs["dit"].images]
        raise ValueError(f"{file} is of the kind {other}; {kind} is needed")
    config = WanConfig(**configs, defaults=DEFAULTS)
    copy_files(tokenizer, path / "tokenizer")
    try:
        miniature.write_arrays(path, arrays, config=config, stand_ins=True)
    except ValueError as error:
        raise ValueError(f"{src}: {error}") from error


def _link(work: Path, kinds: list[str]) -> None:
    """Put relative links in the place of folders that one of an earlier kind has alike."""
    for number, kind in enumerate(kinds):
        for folder in sorted(path for path in (work / kind).iterdir() if path.is_dir()):
            for earlier in kinds[:number]:
                other = work / earlier / folder.name
                if other.is_dir() and not other.is_symlink() and _alike(folder, other):
                    shutil.rmtree(folder)
                    folder.symlink_to(Path("..") / earlier / folder.name)
                    break


def _alike(one: Path, other: Path) -> bool:
    """Whether two folders have the same files."""
    names = sorted(os.listdir(one))
    if names != sorted(os.listdir(other)):
        return False
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def _sizes(work: Path) -> dict[str, int]:
    """{"kind" or "kind/folder": bytes of its own files}."""
    found: dict[str, int] = {}
    for root, _, names in os.walk(work):  # which does not follow links
        place = Path(root)
        if names:
            total = sum((place / name).stat().st_size for name in names)
            found[place.relative_to(work).as_posix()] = total
    return dict(sorted(found.items()))
