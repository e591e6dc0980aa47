"""Our own checkpoints: an Orbax folder for each network, config.json, manifest.json, tokenizer/.

Arrays are written a few at a time, and the manifest, which says what is there, is written last.
"""

import contextlib
import datetime
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from orbax.checkpoint.experimental.v1 import partial

from wan_jax import host_memory
from wan_jax.config import PARTS, CLIPConfig, DiTConfig, UMT5Config, VAEConfig, WanConfig
from wan_jax.sharding import Where, by_shape
from wan_jax.weights import rules, trees
from wan_jax.weights.folders import check_space, written_whole
from wan_jax.weights.hashes import FileHashes
from wan_jax.weights.sources import Folder, PartConfig, Source, abstract_part

CONFIG, MANIFEST, TOKENIZER = "config.json", "manifest.json", "tokenizer"
FORMAT = 3
_ADDED = "added"  # where parts that are added are written first
SPARE = 2**26  # bytes of disk beyond the arrays: the tokenizer, indices, JSON
_PIECE_BYTES = 2**25
_GROUP_BYTES = 2**28  # arrays are handed to Orbax in groups that reach this
_CONFIGS: dict[str, type[PartConfig]] = {
    "dit": DiTConfig,
    "vae": VAEConfig,
    "umt5": UMT5Config,
    "clip": CLIPConfig,
}

OnBytes = Callable[[int, int], None]
Plans = Mapping[str, list[rules.Assignment]]


def plan(folder: Folder, dtype: str) -> Plans:
    """{part: assignments} that convert a folder; every name, shape and stored dtype is checked.

    dtype: "bfloat16" stores the kernels of bfloat16 products so and the float32 islands as
    float32; "float32" stores everything as float32. Only headers are read.
    Raises rules.MismatchError for a checkpoint that does not fit.
    """
    if not folder.missing:
        _ = folder.config  # the networks must fit each other
    return {part: _plan(source, dtype) for part, source in folder.sources.items()}


def _plan(source: Source, dtype: str) -> list[rules.Assignment]:
    targets = trees.flatten(abstract_part(source.config, jnp.dtype(dtype)))
    what = f"{_where(source)} ({source.part}, {source.naming} names)"
    names = list(source.reader.shapes())
    shapes = source.reader.shapes()
    for alias, name in source.table.aliases.items():
        if alias in shapes and name in shapes and shapes[alias] != shapes[name]:
            raise rules.MismatchError(f"{what} does not fit: {alias} is not the same as {name}")
    found = rules.resolve(source.table, targets, naming=source.naming, names=names, what=what)
    rules.check_shapes(found, source.reader, what=what)
    return found


def _where(source: Source) -> Path:
    """The file of a network, or the folder of its shards."""
    files = source.reader.files
    return files[0] if len(files) == 1 else files[0].parent


def nbytes(plans: Plans) -> int:
    """Bytes of all arrays that the plans fill."""
    leaves = (item.abstract for items in plans.values() for item in items)
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def is_checkpoint(path: Path) -> bool:
    """Whether the folder is one that write() finished, whatever parts it has."""
    return (path / CONFIG).is_file() and (path / MANIFEST).is_file()


def check_free(path: Path) -> None:
    """Raise ValueError if something else than a checkpoint has this name."""
    wild = sorted(set(str(path)) & set("*?[]"))
    if wild:
        raise ValueError(f"{path} has {' '.join(wild)} in it, which Orbax cannot read back")
    if path.is_symlink() or os.path.ismount(path):
        raise ValueError(f"{path} is a link or a mount point; give the name of a folder in it")
    if path.exists() and not is_checkpoint(path) and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is no checkpoint of wan_jax; give another name")


def check(folder: Folder, path: Path, *, dtype: str, remedy: str) -> Plans:
    """The plans that write() would carry out; raises as it does before it writes anything."""
    check_free(path)
    plans = plan(folder, dtype)
    check_space(path.parent, nbytes(plans) + SPARE, remedy=remedy)
    return plans


def write(
    folder: Folder,
    path: Path,
    *,
    dtype: str,
    on_bytes: OnBytes | None = None,
    remedy: str = "choose another cache_dir",
) -> None:
    """Convert PyTorch files into a checkpoint at `path`; it appears there when it is whole.

    on_bytes(done, total) reports bytes read. remedy: what an error about the disk advises.
    Raises ValueError before the first tensor is read if the files do not fit (see plan) or the
    disk is too small, and for a tensor that holds NaN; OSError if the disk fails. To be called
    within folders.alone(path).
    """
    plans = check(folder, path, dtype=dtype, remedy=remedy)
    with written_whole(path, is_whole=is_checkpoint) as work:
        parts = _fill(work, folder, plans, on_bytes=on_bytes)
        write_json(work / CONFIG, _sections(folder))
        write_json(work / MANIFEST, make_manifest(parts, dtype))


def add(folder: Folder, path: Path, *, on_bytes: OnBytes | None = None, remedy: str) -> None:
    """Convert PyTorch files into parts of the checkpoint at `path`, in its dtype.

    Raises as write() does, and ValueError for a part that is there already. What fails or is
    interrupted leaves the parts that were there: one counts when the manifest, written last, names
    it. To be called within folders.alone(path).
    """
    before = read_manifest(path)
    both = [part for part in folder.sources if part in before["parts"]]
    if both:
        raise ValueError(f"{path} has {', '.join(both)} already; remove it or give another name")
    with _explained(path):
        sections = json.loads((path / CONFIG).read_text(encoding="utf-8")) | _sections(folder)
        whole = set(_needed(sections)) <= set(sections)
    if whole:
        try:
            WanConfig.from_json(json.dumps(sections))
        except ValueError as error:
            raise ValueError(f"{folder.path} does not fit {path}: {error}") from error
    plans = plan(folder, before["dtype"])
    check_space(path, nbytes(plans) + SPARE, remedy=remedy)
    # Inside, and so on the same disk: the parts are moved to their places.
    with written_whole(path / _ADDED, is_whole=Path.is_dir) as work:
        parts = _fill(work, folder, plans, on_bytes=on_bytes)
        for name in (*parts, TOKENIZER):
            if (work / name).exists():
                shutil.rmtree(path / name, ignore_errors=True)
                (work / name).rename(path / name)
        write_json(path / CONFIG, sections)
        write_json(path / MANIFEST, make_manifest(before["parts"] | parts, before["dtype"]))
    shutil.rmtree(path / _ADDED, ignore_errors=True)


def _fill(work: Path, folder: Folder, plans: Plans, *, on_bytes: OnBytes | None) -> dict[str, Any]:
    """Write the networks and the tokenizer; gives the manifest's entry of each part."""
    total = sum(source.reader.nbytes() for source in folder.sources.values())
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if on_bytes is not None:
            on_bytes(min(done, total - 1), total)

    # One file may hold several networks.
    files = list(dict.fromkeys(f for s in folder.sources.values() for f in s.reader.files))
    stamps = [_stamp(file) for file in files]
    with FileHashes(files) as hashes:
        for part, items in plans.items():
            source = folder.sources[part]
            what = str(_where(source))
            save_arrays(
                work / part, rules.apply(items, source.reader, what=what, progress=progress)
            )
        if folder.tokenizer is not None:
            copy_files(folder.tokenizer, work / TOKENIZER)
        parts = {part: _entry(folder, part, plans[part], hashes) for part in plans}
    changed = [f for f, stamp in zip(files, stamps, strict=True) if _stamp(f) != stamp]
    if changed:
        raise ValueError(f"{changed[0]} changed while it was read; convert it again")
    if on_bytes is not None:
        on_bytes(total, total)
    return parts


def write_json(file: Path, values: Any) -> None:
    """The file is the old one or the new one, never half of it."""
    work = file.with_name(f".{file.name}.partial-{os.getpid()}")
    work.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
    work.rename(file)


def save_arrays(path: Path, arrays: Iterator[tuple[str, np.ndarray]]) -> None:
    """Write a network's arrays, which are asked for one at a time; OSError naming the folder."""
    options = ocp.Context()
    # Trained weights hardly compress: without, half the memory and twice the speed both ways.
    options.array.saving.use_compression = False
    # A host of several reads the pieces that hold its share, where one piece would be read whole.
    options.array.saving.storage_options.chunk_byte_size = _PIECE_BYTES
    group: dict[str, np.ndarray | jax.Array] = {}
    with options:
        for name, array in arrays:
            group[name] = _held(array)
            del array  # or it would live on while the next one is made
            # Before there is another: Orbax needs as much again as the group has.
            if sum(a.nbytes for a in group.values()) >= _GROUP_BYTES:
                with _writing(path):
                    partial.save(path, group)
                group = {}
        with _writing(path):
            if group:
                partial.save(path, group)
            partial.finalize(path)


def _held(array: np.ndarray) -> np.ndarray | jax.Array:
    """The array as JAX's, where it can be: Orbax copies those of NumPy twice, and writes slower."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return array
    return jax.device_put(array, device, may_alias=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0][:200]}") from error


def copy_files(source: Path, target: Path) -> None:
    """Contents only: a read-only source must not make a cache that cannot be removed."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file():
            shutil.copyfile(file, target / file.name)


def _sections(folder: Folder) -> dict[str, Any]:
    sections = {part: source.config.to_dict() for part, source in folder.sources.items()}
    return (
        sections if folder.defaults is None else sections | {"defaults": folder.defaults.to_dict()}
    )


def _stamp(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _entry(
    folder: Folder, part: str, items: list[rules.Assignment], hashes: FileHashes
) -> dict[str, Any]:
    source = folder.sources[part]
    facts = json.dumps(source.config.to_dict(), sort_keys=True).encode()
    if part == "umt5" and folder.tokenizer is not None:
        facts += (folder.tokenizer / "tokenizer.json").read_bytes()
    stored = {name: kind for name, (_, kind) in source.reader.shapes().items()}
    used = [name for item in items for name in item.sources]
    common = Counter(stored[name] for name in used).most_common(1)[0][0]
    return {
        "source": str(_where(source)),
        "naming": source.naming,
        "rules": len(items),
        "tensors": len(used),
        "facts_sha256": hashlib.sha256(facts).hexdigest(),  # the configuration and the tokenizer
        "dtype": common,
        "dtypes": {name: stored[name] for name in used if stored[name] != common},
        "files": {
            file.name: {"bytes": file.stat().st_size, "sha256": hashes.of(file)}
            for file in source.reader.files
        },
    }


def make_manifest(parts: dict[str, Any], dtype: str) -> dict[str, Any]:
    """What manifest.json says of these parts, {part: its entry}."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    name = _digest(parts)
    return {"format": FORMAT, "dtype": dtype, "written": now, "digest": name, "parts": parts}


def _digest(parts: Mapping[str, Any]) -> str:
    """A name for all that makes the checkpoint, whatever its files are called and wherever."""
    facts = {
        part: [
            sorted(file["sha256"] for file in entry["files"].values()),
            entry["facts_sha256"],
        ]
        for part, entry in parts.items()
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """manifest.json of a checkpoint; ValueError if it is none or of another format."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        _, _, written = manifest["dtype"], manifest["parts"].keys(), manifest["format"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / MANIFEST} is not a manifest: {error!r}") from error
    if written != FORMAT:
        raise ValueError(f"{path} has format {written}, this release reads {FORMAT}; convert again")
    return manifest


def _needed(sections: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts that make a checkpoint of this config.json whole: its DiT says what they are."""
    if "dit" not in sections:
        return PARTS[:-1]  # at least
    return DiTConfig.from_dict(sections["dit"]).parts


def check_whole(path: Path, dtype: str) -> None:
    """Raise ValueError for a checkpoint that lacks a part, or is too coarse for `dtype`."""
    manifest = read_manifest(path)
    with _explained(path):
        needed = _needed(json.loads((path / CONFIG).read_text(encoding="utf-8")))
    missing = [part for part in needed if part not in manifest["parts"]]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}; add with `python convert/to_orbax.py --src DIR "
            f"--dst {path} --parts {','.join(missing)} --dtype {manifest['dtype']}`"
        )
    lost = [part for part in (*needed, TOKENIZER) if not (path / part).is_dir()]
    if lost:
        raise ValueError(f"{path} has lost its folder {lost[0]}; convert it again")
    if dtype == "float32" and manifest["dtype"] != "float32":
        raise ValueError(
            f"{path} was converted to {manifest['dtype']}; for dtype float32 load the folder it "
            "came from"
        )


def read_config(path: Path) -> WanConfig:
    """The configuration of a checkpoint; ValueError if config.json is not one."""
    with _explained(path):
        return WanConfig.from_json((path / CONFIG).read_text(encoding="utf-8"))


def read_part_config(path: Path, part: str) -> PartConfig:
    """The configuration of one network of a checkpoint, which may have no other."""
    with _explained(path):
        return _CONFIGS[part].from_dict(json.loads((path / CONFIG).read_text("utf-8"))[part])


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path / CONFIG} is not a wan_jax configuration: {error}") from error


def restore(
    path: Path,
    part: str,
    config: WanConfig,
    *,
    dtype: str,
    sharding: Where | None,
    streamed: bool = False,
) -> Any:
    """One network of a checkpoint, by its name in PARTS, straight to the devices.

    sharding: where every array goes, or one of its shape; None puts them on the default device.
    streamed: those of the stack go straight to the host's memory; see host_memory.py.
    Raises ValueError naming the folder that cannot be read.
    """
    place = by_shape(sharding)
    at = host_memory.where if streamed else lambda _, usual: usual
    module = abstract_part(getattr(config, part), jnp.dtype(dtype))
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at(name, place(leaf.shape)))
        for name, leaf in trees.flatten(module).items()
    }
    try:
        arrays = ocp.load(path / part, wanted)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        line = str(error).splitlines()[0].split(" See full")[0][:160]
        raise ValueError(
            f"{path / part} is not a whole Orbax checkpoint ({line}); convert it again"
        ) from error
    return trees.fill(module, arrays)
