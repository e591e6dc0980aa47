"""Sources of tensors on disk: safetensors, single or sharded, and parts of a file."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from wan_jax.weights.facts import one_line, read_json
from wan_jax.weights.rules import Shape

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_BITS = re.compile(r"[a-z]+(\d+)")
_SUFFIX = ".safetensors"
_INDEX = re.compile(r".*\.safetensors\.index(\.\w+)?\.json")  # diffusers adds a variant: fp16


class FileReader(Protocol):
    """rules.Reader over files."""

    @property
    def files(self) -> tuple[Path, ...]: ...

    def shapes(self) -> Mapping[str, tuple[Shape, str]]: ...

    def read(self, name: str) -> np.ndarray: ...

    def nbytes(self) -> int: ...


class SafetensorsReader:
    """Tensors of one or more safetensors files by name; headers are read at once, data on demand.

    The library checks that the tensors of a file fill it, each where and as large as the header
    says. Raises ValueError naming the file that is missing, truncated or not safetensors, and the
    name of a tensor that two files hold.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, tuple[Shape, str]] = {}
        for file in self.files:
            self._read_header(file)

    def _read_header(self, file: Path) -> None:
        if not file.is_file():
            raise ValueError(f"{file} is missing, or a link to a file that is")
        try:
            with safe_open(file, framework="numpy") as handle:
                for name in handle.keys():  # noqa: SIM118 (not a dict)
                    if not name.isprintable() or not name:
                        raise ValueError(
                            f"{file} has the name {name[:100]!r}, which is no tensor's"
                        )
                    if name in self._where:
                        raise ValueError(f"{file} and {self._where[name]} both hold {name}")
                    part = handle.get_slice(name)
                    kind = part.get_dtype()
                    self._where[name] = file
                    self._shapes[name] = (tuple(part.get_shape()), _DTYPES.get(kind, kind.lower()))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} is truncated or not a safetensors file: {one_line(error)}"
            ) from error

    def shapes(self) -> dict[str, tuple[Shape, str]]:
        """{tensor name: (shape, NumPy dtype name)}."""
        return self._shapes

    def where(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._where[name]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the shape and dtype it is stored in."""
        file = self._where[name]
        try:
            with safe_open(file, framework="numpy") as handle:
                return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read: {one_line(error)}") from error

    def nbytes(self) -> int:
        """Size of all files in bytes."""
        return sum(file.stat().st_size for file in self.files)


class Excerpt:
    """Some tensors of a reader under names of their own.

    names: {name here: name there}.
    """

    def __init__(self, reader: FileReader, names: Mapping[str, str]) -> None:
        shapes = reader.shapes()
        self.files = reader.files
        self._reader = reader
        self._names = dict(names)
        self._shapes = {name: shapes[there] for name, there in self._names.items()}

    def shapes(self) -> dict[str, tuple[Shape, str]]:
        """{tensor name: (shape, NumPy dtype name)}."""
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the shape and dtype it is stored in."""
        return self._reader.read(self._names[name])

    def nbytes(self) -> int:
        """Size of these tensors in bytes; the file may hold others."""
        return sum(math.prod(shape) * _bits(kind) // 8 for shape, kind in self._shapes.values())


def _bits(dtype: str) -> int:
    match = _BITS.match(dtype)
    return int(match[1]) if match else 8


def list_safetensors(folder: Path) -> tuple[list[Path], list[Path]]:
    """Index files in a folder, and all safetensors files, each in order of their names."""
    try:
        files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}") from error
    indexes = [file for file in files if _INDEX.fullmatch(file.name)]
    return indexes, [file for file in files if file.name.endswith(_SUFFIX)]


def open_index(index: Path) -> SafetensorsReader:
    """The reader of the shards that an index names; other files beside it are no part of them.

    Raises ValueError if a shard is missing, or the index and the shards differ in any tensor.
    """
    mapping = read_index(index)
    missing = [file for file in _shards(index, mapping.values()) if not file.is_file()]
    if missing:
        raise ValueError(f"{missing[0]} is missing; the checkpoint's index names it")
    reader = SafetensorsReader(_shards(index, mapping.values()))
    wrong = sorted(set(mapping) ^ set(reader.shapes()))
    wrong += sorted(n for n in mapping if n not in wrong and reader.where(n).name != mapping[n])
    if wrong:
        raise ValueError(f"{index} and its shards disagree about {len(wrong)} tensors: {wrong[:5]}")
    return reader


def read_index(index: Path) -> dict[str, str]:
    """{tensor name: file name} of an index; ValueError naming it if it is none."""
    mapping = None
    try:
        mapping = read_json(index).get("weight_map")
    except ValueError as error:
        text = str(error).removeprefix(f"{index} ")
        raise ValueError(f"{index} is not an index of safetensors shards: it {text}") from error
    if not isinstance(mapping, dict) or not mapping:
        raise ValueError(f"{index} is not an index of safetensors shards: it has no weight_map")
    for file in mapping.values():
        # A name, not a path: an index must not reach for files elsewhere.
        plain = isinstance(file, str) and file.endswith(_SUFFIX) and file.isprintable()
        if not plain or "/" in file or "\\" in file:
            raise ValueError(
                f"{index} is not an index of safetensors shards: it names the file "
                f"{str(file)[:100]!r}"
            )
    return mapping


def _shards(index: Path, names: Iterable[str]) -> list[Path]:
    return [index.parent / name for name in sorted(set(names))]
