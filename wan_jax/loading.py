"""load(): from whatever the user has on disk to a Wan ready to run."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from wan_jax.config import NANO_T2V, WanConfig
from wan_jax.pipeline import Callback, Progress, Wan
from wan_jax.tokenizer import load_tokenizer
from wan_jax.weights import checkpoint, miniature
from wan_jax.weights.sources import PARTS, open_folder

DTYPES = ("bfloat16", "float32")


def default_cache_dir() -> Path:
    """Where converted checkpoints are kept: wan_jax under the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "wan_jax"
    except RuntimeError as error:  # a user without a home, as in some containers
        raise ValueError("cache_dir is not given and there is no home directory") from error


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    dtype: str = "bfloat16",
    cache_dir: str | os.PathLike[str] | None = None,
    offload: bool = False,
    text_on_cpu: bool = False,
    callback: Callback | None = None,
    notify: Callable[[str], None] | None = None,
) -> Wan:
    """A checkpoint ready to run.

    path: a converted checkpoint, or a folder in the Diffusers or the original layout, which is
    converted once into cache_dir; None makes and runs a small checkpoint of random weights. dtype:
    "bfloat16", or "float32" to compare number by number. offload: each stage's weights leave the
    device when it is done. text_on_cpu: UMT5 runs on the host. callback: told the progress; notify:
    told in a sentence what takes long. Raises ValueError naming what is wrong with the folder.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; one of {DTYPES} is needed")
    # Orbax takes absolute paths only.
    cache = (Path(cache_dir) if cache_dir is not None else default_cache_dir()).absolute()
    say = notify or (lambda _: None)
    source = _random_miniature(cache, say) if path is None else _existing(path)
    folder = source
    if not checkpoint.is_checkpoint(source):
        folder = _converted(source, cache, dtype=dtype, callback=callback, say=say)
    checkpoint.check_dtype(folder, dtype)
    config = checkpoint.read_config(folder)
    host = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0]) if text_on_cpu else None
    loaders: dict[str, Callable[[], Any]] = {
        part: functools.partial(
            checkpoint.restore,
            folder,
            part,
            config,
            dtype=dtype,
            sharding=host if part == "umt5" else None,
        )
        for part in PARTS
    }
    wan = Wan(
        config, load_tokenizer(folder / checkpoint.TOKENIZER), loaders, dtype=dtype, offload=offload
    )
    if not offload:
        for done, part in enumerate((*PARTS, None)):
            if callback is not None:
                callback(Progress("load", done, len(PARTS)))
            if part is not None:
                wan.network(part)
    return wan


def read_config(path: str | os.PathLike[str] | None) -> WanConfig:
    """The configuration of what load(path) would load; only headers are read.

    Raises ValueError naming what is wrong with the folder.
    """
    if path is None:
        return NANO_T2V
    source = _existing(path)
    if checkpoint.is_checkpoint(source):
        return checkpoint.read_config(source)
    return open_folder(source).config


def _existing(path: str | os.PathLike[str]) -> Path:
    source = Path(path).absolute()
    if not source.is_dir():
        raise ValueError(
            f"{source} is not a folder; a checkpoint folder is needed, for example from "
            "`hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir DIR`"
        )
    return source


def _random_miniature(cache: Path, say: Callable[[str], None]) -> Path:
    path = cache / miniature.NAME
    say(
        "no checkpoint given: running a small network of random weights, which shows that "
        f"everything works and makes patterns, not pictures ({path})"
    )
    if not path.is_dir():
        miniature.write(path)
    return path


def _converted(
    source: Path, cache: Path, *, dtype: str, callback: Callback | None, say: Callable[[str], None]
) -> Path:
    folder = open_folder(source)
    target = cache / f"{source.resolve().name}-{dtype}-{checkpoint.digest(folder, dtype)}"
    if checkpoint.is_checkpoint(target):
        return target
    say(f"converting {source} once into {target}")

    def on_bytes(done: int, total: int) -> None:
        if callback is not None:
            callback(Progress("convert", done, total))

    on_bytes(0, 1)
    checkpoint.write(folder, target, dtype=dtype, on_bytes=on_bytes)
    return target
