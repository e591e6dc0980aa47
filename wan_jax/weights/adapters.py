"""Which LoRAs a user wants added to a checkpoint's DiT, and how that changes what is loaded."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from wan_jax.config import DiTConfig
from wan_jax.dit import DiT
from wan_jax.weights import lora, lora_files
from wan_jax.weights.facts import one_line
from wan_jax.weights.hashes import FileHashes
from wan_jax.weights.readers import SafetensorsReader

_Path = str | os.PathLike[str]
One = _Path | tuple[_Path, float]
Choice = One | Sequence[One] | None  # what load() takes


class Chosen(NamedTuple):
    """A LoRA's file and how much of its difference is added."""

    path: Path
    scale: float


class Adapter(NamedTuple):
    """A chosen LoRA and the SHA-256 of its file."""

    path: Path
    scale: float
    sha256: str

    @property
    def contents(self) -> tuple[str, float]:
        """What makes it what it is, wherever it lies."""
        return self.sha256, self.scale


def chosen(value: Choice) -> tuple[Chosen, ...]:
    """The LoRAs that a path, "path:scale", (path, scale) or a list of these names.

    Raises ValueError for a scale that is not finite and a file that is not there or no safetensors.
    """
    if value is None:
        return ()
    pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Real)
    many: Any = (value,) if pair or isinstance(value, str | os.PathLike) else value
    return tuple(_one(item) for item in many)


def _one(item: Any) -> Chosen:
    path, scale = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"lora has {item!r}; a path, 'path:scale' or (path, scale) is needed")
    if scale is None:
        path, scale = split(os.fspath(path))
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise ValueError(f"LoRA {os.fspath(path)} has scale {scale!r}; a finite number is needed")
    file = Path(path).absolute()
    if not file.is_file():
        raise ValueError(
            f"LoRA {os.fspath(path)} is not there; needed is a .safetensors file on this machine, "
            "with a colon and a number behind it for another scale than 1 (not a hub id or a "
            "bucket's path)"
        )
    SafetensorsReader([file])
    return Chosen(file, float(scale))


def split(text: str) -> tuple[str, float]:
    """A path and what follows its last colon, if that is a finite number; else the scale is 1."""
    path, _, number = text.rpartition(":")
    try:
        scale = float(number)
    except ValueError:
        return text, 1.0
    return (path, scale) if path and math.isfinite(scale) else (text, 1.0)


def check(wanted: Sequence[Chosen], config: DiTConfig) -> None:
    """Raise ValueError naming the file, by its header, for a LoRA that does not fit the network."""
    for item in wanted:
        lora_files.check(item.path, config)


def hashed(wanted: Sequence[Chosen]) -> tuple[Adapter, ...]:
    """The same with the files' SHA-256; ValueError for one that cannot be read."""
    paths = list(dict.fromkeys(item.path for item in wanted))
    try:
        with FileHashes(paths) as hashes:
            return tuple(Adapter(*item, hashes.of(item.path)) for item in wanted)
    except OSError as error:
        raise ValueError(f"a LoRA cannot be read: {one_line(error)}") from error


def digest(checkpoint: str, adapters: Sequence[Adapter]) -> str:
    """A name for a checkpoint with LoRAs, whatever their order; without any it is its own."""
    if not adapters:
        return checkpoint
    facts = [checkpoint, *sorted(adapter.contents for adapter in adapters)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def with_loras(
    load: Callable[[], DiT], config: DiTConfig, adapters: Sequence[Adapter]
) -> Callable[[], DiT]:
    """A function that loads the network and adds the LoRAs, which are read again each time.

    It raises ValueError for a file that has changed since it was hashed. The order of the LoRAs
    does not change a bit.
    """
    ordered = sorted(adapters, key=lambda adapter: adapter.contents)
    stamps = {adapter.path: _stamp(adapter.path) for adapter in ordered}

    def loaded() -> DiT:
        loras = [(lora_files.read(item.path, config), item.scale) for item in ordered]
        for path, stamp in stamps.items():
            if _stamp(path) != stamp:
                raise ValueError(f"{path} changed while it was in use; load it again")
        return lora.merge(load(), loras, donate=True)

    return loaded


def _stamp(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
