"""Tensors and descriptions as Hugging Face's libraries have them on disk."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file


def save_tensors(
    place: Path, tensors: Iterable[tuple[str, np.ndarray]], *, limit: int | None
) -> None:
    """Write tensors to one file, or to several of at most `limit` bytes and an index of them.

    place: the file without the end of its name, which is as Hugging Face's libraries have it. A
    tensor that is larger has a file to itself. limit: None is one file. The bytes depend on the
    tensors alone. Raises OSError if the disk fails.
    """
    place.parent.mkdir(exist_ok=True)
    files: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        # Named when their number is known.
        file = place.with_name(f"{len(files)}.part")
        try:
            save_file(shard, file, metadata={"format": "pt"})  # without which transformers fails
        except SafetensorError as error:  # a full disk, mostly
            raise OSError(f"{file} cannot be written: {error}") from error
        files.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and limit is not None and size + tensor.nbytes > limit:
            flush()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    where: dict[str, str] = {}
    for i, names in enumerate(files):
        suffix = f"-{i + 1:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        file = place.with_name(f"{place.name}{suffix}.safetensors")
        place.with_name(f"{i}.part").rename(file)
        file.chmod(0o644)  # the library lets only the owner read it
        where |= dict.fromkeys(names, file.name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_json(place.with_name(f"{place.name}.safetensors.index.json"), index)


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write values as readable JSON; the folder need not exist."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
