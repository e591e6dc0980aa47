"""Small checkpoints in the Diffusers layout: of random weights, or of given ones.

With random weights everything runs and nothing is downloaded.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from wan_jax.config import KINDS, NANO_T2V, CLIPConfig, WanConfig
from wan_jax.tokenizer import write_byte_tokenizer
from wan_jax.weights import clip, rules, trees
from wan_jax.weights.descriptions import describe, pipeline
from wan_jax.weights.folders import written_whole
from wan_jax.weights.layouts import DIFFUSERS
from wan_jax.weights.sources import DEFAULTS_FILE, PartConfig, abstract_part, part_table
from wan_jax.weights.writers import save_tensors, write_json

Arrays = Mapping[str, np.ndarray]
_FLOAT32 = jnp.dtype(jnp.float32)


def name(config: WanConfig) -> str:
    """A folder's name that changes with the sizes: a cache never holds those of another release."""
    kind = KINDS[config.images]
    return f"random-nano-{kind}-{zlib.crc32(config.to_json().encode()):08x}"


def kept(config: WanConfig, cache: Path, notify: Callable[[str], None]) -> Path:
    """The folder in the cache of a checkpoint with random weights; notify: told that they are."""
    path = cache / name(config)
    notify(
        "running a small network of random weights, which shows that everything works and makes "
        f"patterns, not pictures ({path})"
    )
    if not path.is_dir():
        write(path, config=config)
    return path


def write(path: Path, *, config: WanConfig = NANO_T2V, seed: int = 0) -> None:
    """Write a checkpoint folder with random weights; it appears under its name when whole."""
    with written_whole(path, is_whole=Path.is_dir) as work:
        stream = np.random.RandomState(seed)
        arrays = {part: random_arrays(getattr(config, part), stream) for part in config.dit.parts}
        write_byte_tokenizer(work / "tokenizer", vocab_size=config.umt5.vocab_size)
        write_arrays(work, arrays, config=config)


def write_arrays(
    path: Path, arrays: Mapping[str, Arrays], *, config: WanConfig, stand_ins: bool = False
) -> None:
    """Write networks and all that describes them; `path` is there and has its tokenizer/.

    arrays: {part: {dotted path: array}}, in the dtypes that are written. stand_ins: writes a last
    block of CLIP that adds nothing, as transformers wants one and Wan2.1 has none. Raises
    ValueError for arrays that are not those of the configuration, or hold NaN, and OSError if the
    disk fails.
    """
    for part in config.dit.parts:
        values = getattr(config, part)
        _check(part, values, arrays[part])
        described = describe(part, values, {}, layout="diffusers")
        assert described is not None
        tensors = dict(rules.export(part_table(values), arrays[part], naming="diffusers"))
        if stand_ins and isinstance(values, CLIPConfig):
            for new, like in clip.stand_ins(values).items():
                tensors[new] = clip.stand_in(new, tensors[like].shape, tensors[like].dtype)
        save_tensors(path / DIFFUSERS[part], tensors.items(), limit=None)
        write_json(path / DIFFUSERS[part].with_name("config.json"), described)
    others: dict[Path, dict[str, Any]] = pipeline(config.clip, config.defaults, path / "tokenizer")
    for file, contents in {**others, Path(DEFAULTS_FILE): config.defaults.to_dict()}.items():
        write_json(path / file, contents)


def _check(part: str, config: PartConfig, arrays: Arrays) -> None:
    """Raise ValueError for arrays that are not those of a network, and for NaN."""
    wanted = {k: leaf.shape for k, leaf in trees.flatten(abstract_part(config, _FLOAT32)).items()}
    found = {k: array.shape for k, array in arrays.items()}
    if found != wanted:
        wrong = next(k for k in sorted({*found, *wanted}) if found.get(k) != wanted.get(k))
        if wrong not in found:
            raise ValueError(f"the {part} lacks {wrong} of shape {wanted[wrong]}")
        needed = f"{wanted[wrong]} is needed" if wrong in wanted else "there is no such array"
        raise ValueError(f"the {part} has {wrong} of shape {found[wrong]}; {needed}")
    for target, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{target} of the {part} holds NaN or infinite values")


def random_arrays(config: PartConfig, stream: np.random.RandomState) -> dict[str, np.ndarray]:
    """{dotted path: float32 array} of a network, drawn from the stream."""
    targets = trees.flatten(abstract_part(config, _FLOAT32))
    return {target: _random(target, leaf.shape, stream) for target, leaf in targets.items()}


def _random(target: str, shape: tuple[int, ...], stream: np.random.RandomState) -> np.ndarray:
    """Scales 1, biases 0, everything else Gaussian of a size that keeps activations near 1."""
    leaf = target.rsplit(".", 1)[-1]
    if leaf in ("scale", "bias"):
        return np.full(shape, float(leaf == "scale"), np.float32)
    if leaf in ("class_token", "positions"):  # small, so that an image counts for more
        return (stream.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)
    # Convolutions keep their output axis first, products last; the others' first axis is rows.
    conv = leaf == "kernel" and len(shape) >= 4 and not target.startswith("patch")
    fan_in = math.prod(shape[1:] if conv else shape[:-1]) if leaf == "kernel" else 1
    if target.startswith("layers.") and leaf == "kernel":
        fan_in //= shape[0]
    return (stream.standard_normal(shape) / math.sqrt(fan_in)).astype(np.float32)
