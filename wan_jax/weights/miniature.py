"""A small checkpoint of random weights in the Diffusers layout: everything runs, no download."""

import dataclasses
import json
import math
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from wan_jax.config import NANO_T2V, WanConfig
from wan_jax.tokenizer import write_byte_tokenizer
from wan_jax.weights import dit, rules, trees, umt5, vae
from wan_jax.weights.folders import written_whole
from wan_jax.weights.sources import DEFAULTS_FILE, PartConfig, abstract_part, part_table

# The name changes with the sizes, so that a cache never holds those of another release.
NAME = f"random-nano-t2v-{zlib.crc32(NANO_T2V.to_json().encode()):08x}"


def write(path: Path, *, config: WanConfig = NANO_T2V, seed: int = 0) -> None:
    """Write a checkpoint folder with random weights; it appears under its name when whole."""
    with written_whole(path, is_whole=Path.is_dir) as work:
        _write(work, config, seed)


def _write(path: Path, config: WanConfig, seed: int) -> None:
    stream = np.random.RandomState(seed)
    parts: tuple[tuple[str, str, PartConfig, dict[str, Any]], ...] = (
        (
            "transformer",
            "diffusion_pytorch_model",
            config.dit,
            dit.config_to_diffusers(config.dit),
        ),
        ("vae", "diffusion_pytorch_model", config.vae, vae.config_to_diffusers(config.vae)),
        ("text_encoder", "model", config.umt5, umt5.config_to_diffusers(config.umt5)),
    )
    for name, file, part, values in parts:
        folder = path / name
        folder.mkdir(parents=True)
        targets = trees.flatten(abstract_part(part, jnp.float32))
        arrays = {target: _random(target, leaf.shape, stream) for target, leaf in targets.items()}
        tensors = dict(rules.export(part_table(part), arrays, naming="diffusers"))
        try:
            save_file(tensors, folder / f"{file}.safetensors")
        except SafetensorError as error:  # a full disk, mostly
            raise OSError(f"{path} cannot be written: {error}") from error
        (folder / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    write_byte_tokenizer(path / "tokenizer", vocab_size=config.umt5.vocab_size)
    defaults = dataclasses.asdict(config.defaults)
    (path / DEFAULTS_FILE).write_text(
        json.dumps(defaults, indent=2, ensure_ascii=False), encoding="utf-8"
    )
    (path / "model_index.json").write_text(
        json.dumps({"_class_name": "WanPipeline"}, indent=2), encoding="utf-8"
    )


def _random(target: str, shape: tuple[int, ...], stream: np.random.RandomState) -> np.ndarray:
    """Scales 1, biases 0, everything else Gaussian of a size that keeps activations near 1."""
    leaf = target.rsplit(".", 1)[-1]
    if leaf in ("scale", "bias"):
        return np.full(shape, float(leaf == "scale"), np.float32)
    # Convolutions keep their output axis first, products last; the others' first axis is rows.
    conv = leaf == "kernel" and len(shape) >= 4 and not target.startswith("patch")
    fan_in = math.prod(shape[1:] if conv else shape[:-1]) if leaf == "kernel" else 1
    if target.startswith("layers.") and leaf == "kernel":
        fan_in //= shape[0]
    return (stream.standard_normal(shape) / math.sqrt(fan_in)).astype(np.float32)
