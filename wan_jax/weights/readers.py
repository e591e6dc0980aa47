"""Sources of tensors on disk: safetensors, single or sharded."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from wan_jax.weights.rules import Shape

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


class SafetensorsReader:
    """Tensors of one or more safetensors files by name; headers are read at once, data on demand.

    Raises ValueError naming the file that is missing, truncated or not safetensors, and the name
    of a tensor that two files hold.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, tuple[Shape, str]] = {}
        for file in self.files:
            self._read_header(file)

    def _read_header(self, file: Path) -> None:
        if not file.is_file():
            raise ValueError(f"{file} is missing; the checkpoint's index names it")
        try:
            with safe_open(file, framework="numpy") as handle:
                for name in handle.keys():  # noqa: SIM118 (not a dict)
                    if name in self._where:
                        raise ValueError(f"{file} and {self._where[name]} both hold {name}")
                    part = handle.get_slice(name)
                    kind = part.get_dtype()
                    self._where[name] = file
                    self._shapes[name] = (tuple(part.get_shape()), _DTYPES.get(kind, kind.lower()))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from error

    def shapes(self) -> dict[str, tuple[Shape, str]]:
        """{tensor name: (shape, NumPy dtype name)}."""
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the shape and dtype it is stored in."""
        with safe_open(self._where[name], framework="numpy") as handle:
            return handle.get_tensor(name)

    def nbytes(self) -> int:
        """Size of all files in bytes."""
        return sum(file.stat().st_size for file in self.files)


def open_safetensors(folder: Path) -> SafetensorsReader:
    """The reader of the weights in a folder: those its index names, or its single file.

    Raises ValueError if the folder holds none, several without an index, or a broken index.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise ValueError(
            f"{folder} has {len(indexes)} index files {_names(indexes)}; one is needed"
        )
    if indexes:
        return _open_sharded(indexes[0])
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        found = f"{len(files)} without an index: {_names(files)}" if files else "none"
        raise ValueError(
            f"{folder} needs one .safetensors file, or several and an index; found {found}"
        )
    return SafetensorsReader(files)


def _open_sharded(index: Path) -> SafetensorsReader:
    try:
        mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({index.parent / file for file in mapping.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors shards: {error!r}") from error
    reader = SafetensorsReader(files)
    wrong = sorted(set(mapping) ^ set(reader.shapes()))
    if wrong:
        raise ValueError(f"{index} and its shards disagree about {len(wrong)} tensors: {wrong[:5]}")
    return reader


def _names(files: Sequence[Path]) -> list[str]:
    return [file.name for file in files]
