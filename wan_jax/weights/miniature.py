"""A small checkpoint of random weights in the Diffusers layout: everything runs, no download."""

import dataclasses
import json
import math
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from wan_jax.config import KINDS, NANO_T2V, WanConfig
from wan_jax.tokenizer import write_byte_tokenizer
from wan_jax.weights import rules, trees
from wan_jax.weights.folders import written_whole
from wan_jax.weights.layouts import DIFFUSERS
from wan_jax.weights.sources import DEFAULTS_FILE, TABLES, abstract_part, part_table


def name(config: WanConfig) -> str:
    """A folder's name that changes with the sizes: a cache never holds those of another release."""
    kind = KINDS[config.images]
    return f"random-nano-{kind}-{zlib.crc32(config.to_json().encode()):08x}"


def write(path: Path, *, config: WanConfig = NANO_T2V, seed: int = 0) -> None:
    """Write a checkpoint folder with random weights; it appears under its name when whole."""
    with written_whole(path, is_whole=Path.is_dir) as work:
        _write(work, config, seed)


def _write(path: Path, config: WanConfig, seed: int) -> None:
    stream = np.random.RandomState(seed)
    for part in config.dit.parts:
        values = getattr(config, part)
        file = (path / DIFFUSERS[part]).with_suffix(".safetensors")
        file.parent.mkdir(parents=True)
        targets = trees.flatten(abstract_part(values, jnp.float32))
        arrays = {target: _random(target, leaf.shape, stream) for target, leaf in targets.items()}
        tensors = dict(rules.export(part_table(values), arrays, naming="diffusers"))
        try:
            save_file(tensors, file)
        except SafetensorError as error:  # a full disk, mostly
            raise OSError(f"{path} cannot be written: {error}") from error
        described = TABLES[part].config_to_diffusers(values)
        (file.parent / "config.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
    write_byte_tokenizer(path / "tokenizer", vocab_size=config.umt5.vocab_size)
    defaults = dataclasses.asdict(config.defaults)
    (path / DEFAULTS_FILE).write_text(
        json.dumps(defaults, indent=2, ensure_ascii=False), encoding="utf-8"
    )
    pipeline = "WanImageToVideoPipeline" if config.images else "WanPipeline"
    (path / "model_index.json").write_text(
        json.dumps({"_class_name": pipeline}, indent=2), encoding="utf-8"
    )


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
