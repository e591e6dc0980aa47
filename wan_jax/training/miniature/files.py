"""Trained networks between the stages: safetensors of dotted paths, with their configuration."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from wan_jax.files import whole_or_nothing

_FIELD = "config"


def write(path: Path, arrays: dict[str, Any], config: dict[str, Any]) -> None:
    """Write {dotted path: array} as float32, with the configuration in the header."""
    found = {name: np.ascontiguousarray(value, np.float32) for name, value in arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_nothing(path) as partial:
        save_file(found, partial, metadata={_FIELD: json.dumps(config)})


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What write() wrote. Raises ValueError naming the stage that makes the file."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; run the stage {path.stem!r} before")
    with safe_open(path, framework="np") as file:
        config = json.loads(file.metadata()[_FIELD])
    return load_file(path), config


def digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """SHA-256 of the files of stages, by which a training knows what it was begun from."""
    found = {}
    for name in names:
        with (folder / f"{name}.safetensors").open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
