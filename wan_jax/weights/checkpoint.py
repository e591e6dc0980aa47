"""Our own checkpoints: an Orbax folder for each network, config.json, manifest.json, tokenizer/.

Arrays are written a few at a time and the folder appears under its name only when it is whole.
"""

import dataclasses
import datetime
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from orbax.checkpoint.experimental.v1 import partial

from wan_jax.config import WanConfig
from wan_jax.weights import rules, trees
from wan_jax.weights.folders import written_whole
from wan_jax.weights.sources import PARTS, Folder, abstract_part

CONFIG, MANIFEST, TOKENIZER = "config.json", "manifest.json", "tokenizer"
FORMAT = 1
_GROUP_BYTES = 2**30  # arrays are handed to Orbax in groups of about this size

OnBytes = Callable[[int, int], None]


def is_checkpoint(path: Path) -> bool:
    """Whether the folder is one that write() finished."""
    return (path / CONFIG).is_file() and (path / MANIFEST).is_file()


def write(folder: Folder, path: Path, *, dtype: str, on_bytes: OnBytes | None = None) -> None:
    """Convert PyTorch files into a checkpoint at `path`, which must not exist yet.

    dtype: "bfloat16" stores the kernels of bfloat16 products so and the float32 islands as
    float32; "float32" stores everything as float32. on_bytes(done, total) reports bytes read.
    Every name, shape and stored dtype is checked before the first tensor is read.
    Raises rules.MismatchError for a checkpoint that does not fit.
    """
    plans = {part: _plan(folder, part, dtype) for part in PARTS}
    total = sum(source.reader.nbytes() for source in folder.sources.values())
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if on_bytes is not None:
            on_bytes(min(done, total), total)

    with written_whole(path, is_whole=is_checkpoint) as work:
        for part, plan in plans.items():
            reader = folder.sources[part].reader
            _save(work / part, rules.apply(plan, reader, progress=progress))
        _copy_files(folder.tokenizer, work / TOKENIZER)
        (work / CONFIG).write_text(folder.config.to_json(), encoding="utf-8")
        (work / MANIFEST).write_text(
            json.dumps(_manifest(folder, dtype), indent=2), encoding="utf-8"
        )
    if on_bytes is not None:
        on_bytes(total, total)


def _plan(folder: Folder, part: str, dtype: str) -> list[rules.Assignment]:
    source = folder.sources[part]
    targets = trees.flatten(abstract_part(source.config, jnp.dtype(dtype)))
    what = f"{source.reader.files[0].parent} ({part}, {source.naming} names)"
    names = list(source.reader.shapes())
    plan = rules.resolve(source.table, targets, naming=source.naming, names=names, what=what)
    rules.check_shapes(plan, source.reader, what=what)
    return plan


def _save(path: Path, arrays: Iterator[tuple[str, np.ndarray]]) -> None:
    group: dict[str, np.ndarray] = {}
    for name, array in arrays:
        group[name] = array
        del array  # or it would live on while the next one is made
        if sum(a.nbytes for a in group.values()) >= _GROUP_BYTES:
            partial.save(path, group)
            group = {}
    if group:
        partial.save(path, group)
    partial.finalize(path)


def _copy_files(source: Path, target: Path) -> None:
    """Contents only: a read-only source must not make a cache that cannot be removed."""
    target.mkdir()
    for file in source.iterdir():
        if file.is_file():
            shutil.copyfile(file, target / file.name)


def _manifest(folder: Folder, dtype: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "dtype": dtype,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source": str(folder.path),
        "parts": {
            part: {
                "naming": source.naming,
                "tensors": len(source.reader.shapes()),
                "files": {file.name: file.stat().st_size for file in source.reader.files},
            }
            for part, source in folder.sources.items()
        },
    }


def check_dtype(path: Path, dtype: str) -> None:
    """Raise ValueError for a checkpoint of another format, or one too coarse for `dtype`."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        written, stored = manifest["format"], manifest["dtype"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / MANIFEST} is not a manifest: {error!r}") from error
    if written != FORMAT:
        raise ValueError(f"{path} has format {written}, this release reads {FORMAT}; convert again")
    if dtype == "float32" and stored != "float32":
        raise ValueError(
            f"{path} was converted to {stored}; for dtype float32 load the folder it came from"
        )


def read_config(path: Path) -> WanConfig:
    """The configuration of a checkpoint; ValueError if config.json is not one."""
    try:
        return WanConfig.from_json((path / CONFIG).read_text(encoding="utf-8"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path / CONFIG} is not a wan_jax configuration: {error}") from error


def restore(
    path: Path, part: str, config: WanConfig, *, dtype: str, sharding: jax.sharding.Sharding | None
) -> Any:
    """One network ("dit", "vae" or "umt5") of a checkpoint, straight to the devices.

    sharding: where every array goes; None puts them on the default device. Raises ValueError
    naming the folder that cannot be read.
    """
    where = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    module = abstract_part(getattr(config, part), jnp.dtype(dtype))
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        for name, leaf in trees.flatten(module).items()
    }
    try:
        arrays = ocp.load(path / part, wanted)
    except (OSError, ValueError, KeyError) as error:
        line = str(error).splitlines()[0][:300]
        raise ValueError(f"{path / part} is not a whole Orbax checkpoint: {line}") from error
    return trees.fill(module, arrays)


def digest(folder: Folder, dtype: str) -> str:
    """A short name for what converting this folder would give: files, sizes, times and dtype."""
    facts = [
        str(folder.path.resolve()),
        dtype,
        str(FORMAT),
        json.dumps(dataclasses.asdict(folder.config)),
    ]
    files = [file for source in folder.sources.values() for file in source.reader.files]
    for file in (*files, folder.tokenizer / "tokenizer.json"):
        status = file.stat()
        facts.append(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
