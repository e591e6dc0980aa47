"""Converted checkpoints of random numbers, for benchmarks that read weights from the disk."""

import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_BLOCK = 2**25  # random numbers, repeated


def config_of(model: str) -> Any:
    """The configuration of a released network for text, of "nano", or of one yet smaller."""
    from wan_jax.config import NANO_T2V, RELEASED, VAEConfig

    vae = VAEConfig(base_dim=4, dim_mult=(1, 2, 2, 2), num_res_blocks=1)
    small = {"nano": NANO_T2V, "tiny": dataclasses.replace(NANO_T2V, vae=vae)}
    return small[model] if model in small else RELEASED[f"t2v-{model}"]


def arrays(config: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Finite numbers of about the size of weights, by name, as conversion to bfloat16 stores it."""
    import jax.numpy as jnp

    from wan_jax.weights import trees
    from wan_jax.weights.sources import abstract_part

    leaves = trees.flatten(abstract_part(config, jnp.dtype(jnp.bfloat16)))
    most = min(_BLOCK, max(math.prod(leaf.shape) for leaf in leaves.values()))
    block = np.random.default_rng(0).standard_normal(most, np.float32) * 0.02
    for name, leaf in leaves.items():
        whole = np.empty(leaf.shape, leaf.dtype)
        flat = whole.reshape(-1)
        numbers = block[: flat.size].astype(leaf.dtype)
        for start in range(0, flat.size, _BLOCK):
            part = flat[start : start + _BLOCK]
            part[...] = numbers[: part.size]
        yield name, whole
        del whole, flat


def network(config: Any) -> Any:
    """The network on the device: to draw its numbers there would take a minute of compiling."""
    import jax
    import jax.numpy as jnp

    from wan_jax.weights import trees
    from wan_jax.weights.sources import abstract_part

    module = abstract_part(config, jnp.dtype(jnp.bfloat16))
    return trees.fill(module, {name: jax.device_put(array) for name, array in arrays(config)})


def write(model: str, folder: Path, *, parts: Sequence[str] = ("dit",)) -> None:
    """Write FOLDER/PART of each part that is not there; it appears when it is whole.

    Of several processes that write the same at once the first to be done is the one that counts.
    """
    from wan_jax.weights import checkpoint

    work = folder / f"unfinished-{os.getpid()}"
    try:
        for part in parts:
            if (folder / part).exists():
                continue
            checkpoint.save_arrays(work / part, arrays(getattr(config_of(model), part)))
            with contextlib.suppress(FileExistsError):
                _appear(work / part, folder / part)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _appear(work: Path, place: Path) -> None:
    """Rename; FileExistsError if there is such a folder by now."""
    try:
        work.rename(place)
    except OSError as error:
        if not place.exists():
            raise
        raise FileExistsError(f"{place} is there") from error


def write_all(model: str, folder: Path) -> None:
    """A checkpoint that run_t2v.py takes, with a tokenizer of bytes; its manifest is last."""
    from wan_jax.tokenizer import write_byte_tokenizer
    from wan_jax.weights import checkpoint

    config = config_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    write(model, folder, parts=config.dit.parts)
    write_byte_tokenizer(folder / checkpoint.TOKENIZER)
    (folder / checkpoint.CONFIG).write_text(config.to_json(), encoding="utf-8")
    entry = {"files": {}, "facts_sha256": f"random {model}"}
    manifest = checkpoint.make_manifest(dict.fromkeys(config.dit.parts, entry), "bfloat16")
    checkpoint.write_json(folder / checkpoint.MANIFEST, manifest)


def drop_cached(folder: Path) -> None:
    """Ask the system to read these files from the disk again."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fdatasync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
