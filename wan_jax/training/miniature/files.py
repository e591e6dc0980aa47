"""Trained networks between the stages: safetensors of dotted paths, with their configuration."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from wan_jax.config import CLIPConfig, DiTConfig, UMT5Config, VAEConfig
from wan_jax.files import whole_or_nothing
from wan_jax.weights.hashes import FileHashes

_FIELD = "config"
_CONFIGS: dict[str, Any] = {
    "vae": VAEConfig,
    "umt5": UMT5Config,
    "reader": UMT5Config,
    "clip": CLIPConfig,
}
# {file: stage that makes it} of those that are not named like their stage.
STAGES = {"umt5": "t2v", "clip": "i2v"}


def parts(kind: str) -> dict[str, str]:
    """{part of a checkpoint: name of the file of its network}; kind: of networks.DITS."""
    names = {"dit": kind, "vae": "vae", "umt5": "umt5"}
    return names if kind == "t2v" else names | {"clip": "clip"}


def write(path: Path, arrays: dict[str, Any], config: dict[str, Any]) -> None:
    """Write {dotted path: array} as float32, with the configuration in the header."""
    found = {name: np.ascontiguousarray(value, np.float32) for name, value in arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_nothing(path) as partial:
        save_file(found, partial, metadata={_FIELD: json.dumps(config)})


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What write() wrote. Raises ValueError naming the stage that makes the file."""
    _check_made(path)
    with safe_open(path, framework="np") as file:
        config = json.loads(file.metadata()[_FIELD])
    return load_file(path), config


def tokenizer(folder: Path) -> Path:
    """Where the tokenizer lies. Raises ValueError naming the stage that makes it."""
    path = folder / "tokenizer"
    _check_made(path)
    return path


def _check_made(path: Path) -> None:
    if not path.exists():
        stage = STAGES.get(path.stem, path.stem)
        raise ValueError(f"{path} does not exist; run the stage {stage!r} before")


def network(folder: Path, name: str) -> tuple[dict[str, np.ndarray], Any]:
    """The arrays of a network and its configuration, by the name of its file."""
    arrays, values = read(folder / f"{name}.safetensors")
    return arrays, _CONFIGS.get(name, DiTConfig).from_dict(values)


def rounded(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays rounded to bfloat16, which is what is shipped, as float32."""
    return {k: np.asarray(v.astype(jnp.bfloat16), np.float32) for k, v in arrays.items()}


def digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """SHA-256 of the files of stages, by which a training knows what it was begun from.

    Raises ValueError naming the stage that makes a file that is not there.
    """
    places = {}
    for name in names:
        if name == "tokenizer":
            places[name] = tokenizer(folder) / "tokenizer.json"
        else:
            places[name] = folder / f"{name}.safetensors"
            _check_made(places[name])
    with FileHashes([*places.values()]) as hashes:
        return {name: hashes.of(place) for name, place in places.items()}


def digest(arrays: Mapping[str, Any]) -> str:
    """SHA-256 of weights that are in no file of their own, as float32."""
    content = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name], np.float32)
        content.update(f"{name} {array.shape} ".encode())
        content.update(array.data)
    return content.hexdigest()
