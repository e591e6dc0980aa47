"""load(): from whatever the user has, on disk or elsewhere, to a Wan ready to run."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from wan_jax import apart, hosts, shipped
from wan_jax.config import NANO_FLF2V, NANO_I2V, NANO_T2V, WanConfig
from wan_jax.loaders import loaders, place_of
from wan_jax.pipeline import Wan
from wan_jax.planning.budget import budget, start
from wan_jax.planning.memory import STREAMABLE
from wan_jax.plans import Plan
from wan_jax.progress import Callback, Progress
from wan_jax.tokenizer import load_tokenizer
from wan_jax.weights import adapters, checkpoint, dit, folders, miniature, remote
from wan_jax.weights.quantization import check_device, check_kind
from wan_jax.weights.sources import Folder, open_folder

DTYPES = ("bfloat16", "float32")
# Small networks of random weights, by the name that load() takes in place of a path.
BUILT_IN = {"nano-t2v": NANO_T2V, "nano-i2v": NANO_I2V, "nano-flf2v": NANO_FLF2V}
_REMEDY = "choose another cache_dir"
Notify = Callable[[str], None]


def default_cache_dir() -> Path:
    """Where converted checkpoints are kept: wan_jax under the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "wan_jax"
    except RuntimeError as error:  # a user without a home, as in some containers
        raise ValueError("cache_dir is not given and there is no home directory") from error


def built_in(path: str | os.PathLike[str]) -> WanConfig | None:
    """The configuration of the small random network that this names; None for any other path.

    A file or folder of the name comes before the network.
    """
    config = BUILT_IN.get(os.fspath(path))
    return config if config is None or not Path(path).exists() else None


def is_small(path: str | os.PathLike[str]) -> bool:
    """Whether this names one of the small networks, trained or random."""
    return built_in(path) is not None or (
        os.fspath(path) in shipped.MINIATURES and not Path(path).exists()
    )


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    lora: adapters.Choice = None,
    dtype: str = "bfloat16",
    cache_dir: str | os.PathLike[str] | None = None,
    offload: bool = False,
    text_on_cpu: bool = False,
    plan: Plan | None = None,
    vae_dtype: str = "float32",
    max_memory: int | str | None = None,
    quantize: str | None = None,
    callback: Callback | None = None,
    notify: Notify | None = None,
) -> Wan:
    """A checkpoint ready to run.

    path: a converted checkpoint; PyTorch files in the Diffusers or the original layout, or in one
    .safetensors; a hub id such as "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"; any of these folders on
    gs://. What is not converted is, once, into cache_dir. "mini-t2v", "mini-i2v", "mini-flf2v" are
    the trained miniatures, None the first of these; "nano-t2v" and so on have random weights. lora:
    what is added to the DiT: a .safetensors file, "file:scale", (file, scale), or a list of these;
    the scale is 1 if not given. dtype: "bfloat16", or "float32" to compare number by number.
    offload: each stage's weights leave the device when it is done. text_on_cpu: UMT5 runs on the
    host. plan: how a video is spread over devices (plans.choose); None is the first. vae_dtype: of
    the VAE's weights. max_memory: bytes of a device, or such as "6GB", that are to do: if need be
    the VAE runs in tiles and layers stay in the host's memory (of which a GPU takes 64 GB, and all
    only if nothing of JAX ran before); networks are then read when first needed. quantize: "fp8"
    lets the DiT's large products and its self-attention multiply 8 bits on a Hopper GPU,
    "fp8_linear" the products alone. callback: told the progress; notify: told in a sentence what
    takes long. Raises ValueError naming what is wrong.
    """
    limit = start(max_memory)
    kinds = _checked(notify, dtype=dtype, vae_dtype=vae_dtype, quantize=quantize)
    wanted = adapters.chosen(lora)
    folder = prepare(
        path, lora=wanted, dtype=dtype, cache_dir=cache_dir, callback=callback, notify=notify
    )
    config, loras = checkpoint.read_config(folder), adapters.hashed(wanted)
    layout, split = (None, ()) if plan is None else (plan.layout(), plan.split)
    place = functools.partial(place_of, layout, split, text_on_cpu=text_on_cpu)
    within = budget(limit, config, plan, offload=offload, text_on_cpu=text_on_cpu, **kinds)
    held = {"place": place, "by_layers": within is not None and within.by_layers, **kinds}
    make = functools.partial(loaders, folder, config, loras, **held)
    wan = Wan(
        config,
        load_tokenizer(folder / checkpoint.TOKENIZER),
        make(parts=config.dit.parts),
        dtype=dtype,
        offload=offload,
        digest=adapters.digest(checkpoint.read_manifest(folder)["digest"], loras),
        loras=loras,
        layout=layout,
        split=split,
        budget=within,
        streaming=make(parts=STREAMABLE, streamed=True),
        streamed=() if within is None else within.streamed_by_default(),
    )
    if not offload and within is None:
        _hold(wan, callback)
    return wan


def _checked(
    notify: Notify | None, *, dtype: str, vae_dtype: str, quantize: str | None
) -> dict[str, Any]:
    """The kinds of numbers, by the names of load(); ValueError for what cannot be."""
    for name, value in (("dtype", dtype), ("vae_dtype", vae_dtype)):
        if value not in DTYPES:
            raise ValueError(f"{name} is {value!r}; one of {DTYPES} is needed")
    check_kind(quantize, dtype)
    check_device(quantize, notify=notify)
    return {"dtype": dtype, "vae_dtype": vae_dtype, "quantize": quantize}


def _hold(wan: Wan, callback: Callback | None) -> None:
    """Every network to the devices."""
    for done, part in enumerate((*wan.loaders, None)):
        if callback is not None:
            callback(Progress("load", done, len(wan.loaders)))
        if part is not None:
            wan.network(part)


def prepare(
    path: str | os.PathLike[str] | None = None,
    *,
    lora: Sequence[adapters.Chosen] = (),
    dtype: str = "bfloat16",
    cache_dir: str | os.PathLike[str] | None = None,
    callback: Callback | None = None,
    notify: Notify | None = None,
) -> Any:
    """The folder of the converted checkpoint that load() of the same would read, made if needed.

    lora: checked against it before anything slow.
    """
    cache = _cache(cache_dir)
    say = notify or (lambda _: None)
    name = shipped.default() if path is None else path
    small = built_in(name)
    if small is not None:
        source = miniature.kept(small, _local(cache), say)
    else:
        source = fetch(name, cache_dir=cache_dir, callback=callback, notify=say)
        if shipped.is_miniature(source):
            say(f"running the miniature, a small trained Wan; it knows {shipped.KNOWS}")
    if lora:
        adapters.check(lora, read_config(source).dit)
    folder = source
    if not is_checkpoint(source):
        folder = _converted(source, cache, dtype=dtype, callback=callback, say=say)
    checkpoint.check_whole(folder, dtype)
    return folder


def _cache(path: str | os.PathLike[str] | None) -> Any:
    """The cache as an absolute path, as Orbax takes no other, or one in a bucket."""
    if path is None:
        return default_cache_dir().absolute()
    text = os.fspath(path)
    return remote.bucket_path(text) if remote.is_bucket(text) else Path(text).absolute()


def fetch(
    path: str | os.PathLike[str],
    *,
    parts: Collection[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    callback: Callback | None = None,
    notify: Notify | None = None,
) -> Any:
    """Where what load(path) needs can be read: PyTorch files are brought to this machine.

    parts: those whose files are needed; None is all that there are. A converted checkpoint in a
    bucket stays there; the name of a small random network is its own place. Raises ValueError
    naming what is wrong with the path.
    """
    own = shipped.folder(path)
    if own is not None:
        return own
    text, say = os.fspath(path), notify or (lambda _: None)
    if built_in(path) is not None:
        return text
    if not text:
        raise ValueError("the path is empty; a folder, a hub id or a gs:// path is needed")
    if remote.is_bucket(text):
        place = remote.bucket_path(text)
        if is_checkpoint(place):
            return place
        return remote.download_bucket(
            text,
            _local(_cache(cache_dir)),
            notify=say,
            callback=in_bytes("download", callback),
            parts=parts,
        )
    local = Path(text).absolute()
    if local.exists():
        return local
    if remote.is_hub_id(text):
        return remote.download_hub(text, notify=say, parts=parts)
    raise ValueError(
        f"{local} does not exist; needed is a checkpoint's folder or .safetensors file, a hub id "
        f"such as {remote.EXAMPLE}, or a gs:// path"
    )


def images_elsewhere(path: str | os.PathLike[str]) -> int | None:
    """How many images a checkpoint on the hub or in a bucket takes, by its config.json alone.

    None if that cannot be told; then, or when something is wrong, fetch() will.
    """
    values = remote.peek(os.fspath(path))
    return None if values is None else dit.images_of(values)


def read_config(path: Any) -> WanConfig:
    """The configuration of what load(path) would load, for a path that fetch() gave.

    Only headers are read. Raises ValueError naming what is wrong with the files.
    """
    small = built_in(path)
    if small is not None:
        return small
    if is_checkpoint(path):
        checkpoint.check_whole(path, "bfloat16")
        return checkpoint.read_config(path)
    return _open(path).config


def _open(path: Path) -> Folder:
    if (path / "dit" / "state").is_dir() and not (path / checkpoint.MANIFEST).exists():
        raise ValueError(
            f"{path} is a converted checkpoint without {checkpoint.MANIFEST}; convert it again"
        )
    return open_folder(path)


def convert(
    folder: Folder,
    target: Any,
    *,
    dtype: str,
    callback: Callback | None = None,
    scratch: Path,
    remedy: str = _REMEDY,
) -> None:
    """Convert PyTorch files into a checkpoint at `target`, also in a bucket; see checkpoint.write.

    scratch: a folder on this machine for what goes into a bucket. remedy: what an error about the
    disk advises. For a local target, to be called within folders.alone(target).
    """
    on_bytes = in_bytes("convert", callback)
    if isinstance(target, Path):
        checkpoint.write(folder, target, dtype=dtype, on_bytes=on_bytes, remedy=remedy)
        return
    # Orbax cannot write piece by piece into a bucket: made here, then copied, the manifest last.
    local = scratch / f"upload-{hashlib.sha256(str(target).encode()).hexdigest()[:12]}"
    with folders.alone(local):
        try:
            shutil.rmtree(local, ignore_errors=True)  # a killed upload's
            checkpoint.write(folder, local, dtype=dtype, on_bytes=on_bytes, remedy=remedy)
            upload = in_bytes("upload", callback)
            remote.upload_folder(local, str(target), last=checkpoint.MANIFEST, callback=upload)
        finally:
            shutil.rmtree(local, ignore_errors=True)


def local_cache(cache_dir: str | os.PathLike[str] | None) -> Path:
    """The cache, or the default one if that is in a bucket: for what must be on this machine."""
    return _local(_cache(cache_dir))


def _local(cache: Any) -> Path:
    """The cache, or where it lies in a bucket the default one, for what must be on this machine."""
    return cache if isinstance(cache, Path) else default_cache_dir().absolute()


def in_bytes(stage: str, callback: Callback | None) -> checkpoint.OnBytes | None:
    """A function of (done, total) bytes that tells a callback the Progress of a stage."""
    if callback is None:
        return None
    return lambda done, total: callback(Progress(stage, done, total))


def _converted(
    source: Path, cache: Any, *, dtype: str, callback: Callback | None, say: Notify
) -> Any:
    folder = _open(source)
    target = _target(folder, cache, dtype=dtype)
    if is_checkpoint(target):
        return target
    if isinstance(target, Path):
        checkpoint.check(folder, target, dtype=dtype, remedy=_REMEDY)
    waiting = f"waiting for another process that is converting into {target}"
    held = folders.alone(target, on_wait=lambda: say(waiting)) if isinstance(target, Path) else None
    with held or contextlib.nullcontext():
        if is_checkpoint(target):
            return target
        say(f"converting {source} once into {target}")
        if callback is not None:
            callback(Progress("convert", 0, 1))
        own: dict[str, Any] = {"dtype": dtype, "scratch": _local(cache), "remedy": _REMEDY}
        if hosts.count() > 1:
            apart.convert(source, target, on_bytes=in_bytes("convert", callback), **own)
        else:
            convert(folder, target, callback=callback, **own)
    return target


def is_checkpoint(path: Any) -> bool:
    """checkpoint.is_checkpoint(), also in a bucket, whose errors are ValueErrors."""
    if isinstance(path, Path):
        return checkpoint.is_checkpoint(path)
    with remote.bucket_errors(str(path)):
        return checkpoint.is_checkpoint(path)


def known_digest(
    path: Any, *, dtype: str, cache_dir: str | os.PathLike[str] | None = None
) -> str | None:
    """The digest of what load() of a path that fetch() gave would have, if it is converted."""
    cache = _cache(cache_dir)
    small = built_in(path)
    place = path if small is None else _local(cache) / miniature.name(small)
    if not is_checkpoint(place):
        if isinstance(place, Path) and not place.exists():
            return None
        place = _target(open_folder(place), cache, dtype=dtype)
        if not is_checkpoint(place):
            return None
    return str(checkpoint.read_manifest(place)["digest"])


def _target(folder: Folder, cache: Any, *, dtype: str) -> Any:
    """Where in the cache a folder's conversion goes."""
    # What comes with the package is the same after it is installed anew.
    own = shipped.is_miniature(folder.path)
    facts = [dtype, str(checkpoint.FORMAT), json.dumps(dataclasses.asdict(folder.config))]
    key = folder.key(facts, contents=own or not isinstance(cache, Path))
    name = ("mini-" if own else "") + re.sub(r"[^\w.-]", "_", folder.path.resolve().name)
    return cache / f"{name}-{dtype}-{key}"
