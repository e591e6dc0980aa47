"""load(): from whatever the user has, on disk or elsewhere, to a Wan ready to run."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from wan_jax.config import NANO_T2V, WanConfig
from wan_jax.pipeline import Callback, Progress, Wan
from wan_jax.tokenizer import load_tokenizer
from wan_jax.weights import checkpoint, miniature, remote
from wan_jax.weights.sources import PARTS, Folder, open_folder

DTYPES = ("bfloat16", "float32")
Notify = Callable[[str], None]


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
    notify: Notify | None = None,
) -> Wan:
    """A checkpoint ready to run.

    path: a converted checkpoint; PyTorch files in the Diffusers or the original layout, or a
    repacked .safetensors file that holds every part; a hub id such as
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"; any of these folders on gs://. What is not converted is,
    once, into cache_dir. None makes and runs a small checkpoint of random weights. dtype:
    "bfloat16", or "float32" to compare number by number. offload: each stage's weights leave the
    device when it is done. text_on_cpu: UMT5 runs on the host. callback: told the progress; notify:
    told in a sentence what takes long. Raises ValueError naming what is wrong with the files.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; one of {DTYPES} is needed")
    cache = _cache(cache_dir)
    say = notify or (lambda _: None)
    if path is None:
        source = _random_miniature(cache, say)
    else:
        source = fetch(path, cache_dir=cache, callback=callback, notify=say)
    folder = source
    if not checkpoint.is_checkpoint(source):
        folder = _converted(source, cache, dtype=dtype, callback=callback, say=say)
    checkpoint.check_whole(folder, dtype)
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
    tokenizer = load_tokenizer(folder / checkpoint.TOKENIZER)
    digest = checkpoint.read_manifest(folder)["digest"]
    wan = Wan(config, tokenizer, loaders, dtype=dtype, offload=offload, digest=digest)
    if not offload:
        for done, part in enumerate((*PARTS, None)):
            if callback is not None:
                callback(Progress("load", done, len(PARTS)))
            if part is not None:
                wan.network(part)
    return wan


def _cache(path: str | os.PathLike[str] | None) -> Path:
    # Orbax takes absolute paths only.
    return (Path(path) if path is not None else default_cache_dir()).absolute()


def fetch(
    path: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    callback: Callback | None = None,
    notify: Notify | None = None,
) -> Path:
    """Where what load(path) needs lies on this machine; a hub id's files are downloaded first.

    Raises ValueError naming what is wrong with the path.
    """
    text = os.fspath(path)
    local = Path(text).absolute()
    if local.exists():
        return local
    if remote.is_hub_id(text):
        return remote.download_hub(text, notify=notify or (lambda _: None))
    raise ValueError(
        f"{local} does not exist; needed is a checkpoint's folder or .safetensors file, or a hub "
        "id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    )


def read_config(path: str | os.PathLike[str] | None) -> WanConfig:
    """The configuration of what load(path) would load, for a path on this machine.

    Only headers are read. Raises ValueError naming what is wrong with the files.
    """
    if path is None:
        return NANO_T2V
    source = Path(path).absolute()
    if checkpoint.is_checkpoint(source):
        checkpoint.check_whole(source, "bfloat16")
        return checkpoint.read_config(source)
    return open_folder(source).config


def _random_miniature(cache: Path, say: Notify) -> Path:
    path = cache / miniature.NAME
    say(
        "no checkpoint given: running a small network of random weights, which shows that "
        f"everything works and makes patterns, not pictures ({path})"
    )
    if not path.is_dir():
        miniature.write(path)
    return path


def _converted(
    source: Path, cache: Path, *, dtype: str, callback: Callback | None, say: Notify
) -> Path:
    folder = open_folder(source)
    target = cache / f"{source.resolve().name}-{dtype}-{_key(folder, dtype)}"

    def on_wait() -> None:
        say(f"waiting for another process that is converting into {target}")

    checkpoint.wait(target, on_wait=on_wait)
    if checkpoint.is_checkpoint(target):
        return target
    say(f"converting {source} once into {target}")

    def on_bytes(done: int, total: int) -> None:
        if callback is not None:
            callback(Progress("convert", done, total))

    on_bytes(0, 1)
    checkpoint.write(folder, target, dtype=dtype, on_bytes=on_bytes)
    return target


def _key(folder: Folder, dtype: str) -> str:
    """A short name for what converting this folder would give: files, sizes, times and dtype."""
    facts = [
        str(folder.path.resolve()),
        dtype,
        str(checkpoint.FORMAT),
        json.dumps(dataclasses.asdict(folder.config)),
    ]
    assert folder.tokenizer is not None
    files = [file for source in folder.sources.values() for file in source.reader.files]
    for file in (*files, folder.tokenizer / "tokenizer.json"):
        status = file.stat()
        facts.append(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
