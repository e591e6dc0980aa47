"""Tensors of PyTorch .pth files, read without torch and without running anything from the file.

A .pth is a pickle of names whose tensors point into raw storages: a zip of one file each, or in the
older form all of them one after another behind the pickle. The unpickler here knows the handful of
globals that a state dict needs and refuses every other, so a hostile file is an error message.
"""

import collections
import io
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from wan_jax.weights.rules import Shape

_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_PICKLE = 2**26  # bytes; the largest released file's is under 1 MiB


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: Shape
    strides: Shape


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor is not described by a storage and numbers")
    if len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor has as many strides as axes, this one does not")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


class _Unpickler(pickle.Unpickler):
    """Knows ordered dictionaries, tensors and storages, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which is no part of weights"
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError(f"it refers to {kind!r}, which is no storage of weights")
        return _Storage(key, dtype)


class PthReader:
    """rules.Reader over one .pth file; a tensor's bytes are read when it is asked for.

    Raises ValueError naming the file if it is missing, truncated, no .pth, holds anything but named
    tensors, or asks for a global that weights do not need.
    """

    def __init__(self, file: Path) -> None:
        self.files = (file,)
        try:
            with file.open("rb") as stream:
                whole = zipfile.is_zipfile(stream)
                stream.seek(0)
                tree, self._places = _read_zip(file) if whole else _read_legacy(stream)
            self._tensors = self._checked(tree)
        except FileNotFoundError:
            raise ValueError(f"{file} is missing") from None
        except Exception as error:  # a broken pickle or zip fails in any way it likes
            raise ValueError(f"{file} is not a readable .pth of weights: {error}") from error

    def _checked(self, tree: Any) -> dict[str, _Tensor]:
        tensors = {}
        for name, value in dict(tree).items():
            if not isinstance(name, str) or not isinstance(value, _Tensor):
                raise ValueError(f"{name!r} is a {type(value).__name__}, not a tensor")
            place = self._places.get(value.storage.key)
            if place is None:
                raise ValueError(f"the storage of {name} is missing")
            last = value.offset + sum(
                (n - 1) * step for n, step in zip(value.shape, value.strides, strict=True)
            )
            size = value.storage.dtype.itemsize
            if math.prod(value.shape) and (last + 1) * size > place[1]:
                raise ValueError(f"{name} reaches beyond its storage of {place[1]} bytes")
            tensors[name] = value
        return tensors

    def shapes(self) -> dict[str, tuple[Shape, str]]:
        """{tensor name: (shape, NumPy dtype name)}."""
        return {name: (t.shape, t.storage.dtype.name) for name, t in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the shape and dtype it is stored in."""
        tensor = self._tensors[name]
        start, length = self._places[tensor.storage.key]
        dtype = tensor.storage.dtype
        flat = np.memmap(self.files[0], np.uint8, "r", offset=start, shape=(length,))
        values = flat[: length // dtype.itemsize * dtype.itemsize].view(dtype)[tensor.offset :]
        strides = [step * dtype.itemsize for step in tensor.strides]
        return np.array(np.lib.stride_tricks.as_strided(values, tensor.shape, strides))

    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return self.files[0].stat().st_size


Places = dict[str, tuple[int, int]]


def _read_zip(file: Path) -> tuple[Any, Places]:
    """The pickled tree, and {storage key: (start in the file, length in bytes)}."""
    with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
        entries = {info.filename: info for info in archive.infolist()}
        name = next(n for n in entries if n.endswith("/data.pkl"))
        root = name.removesuffix("data.pkl")
        if entries[name].file_size > _MAX_PICKLE:
            raise ValueError(f"its pickle has {entries[name].file_size} bytes")
        order = f"{root}byteorder"
        if order in entries and archive.read(order) != b"little":
            raise ValueError("it was written on a big-endian machine")
        tree = _Unpickler(io.BytesIO(archive.read(name))).load()
        places = {
            n.removeprefix(f"{root}data/"): (_start(stream, info), info.file_size)
            for n, info in entries.items()
            if n.startswith(f"{root}data/")
        }
    return tree, places


def _start(stream: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind a local header of 30 bytes, its name and its padding."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    stream.seek(info.header_offset)
    header = stream.read(30)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{info.filename} has no header")
    name, extra = struct.unpack("<HH", header[26:])
    return info.header_offset + 30 + name + extra


def _read_legacy(stream: BinaryIO) -> tuple[Any, Places]:
    """The same of torch before 1.6: three small pickles, the tree, the keys, then raw storages."""
    magic, _, system = (_Unpickler(stream).load() for _ in range(3))
    if magic != _LEGACY_MAGIC or not system.get("little_endian"):
        raise ValueError("it is neither a zip nor the older form from a little-endian machine")
    storages: dict[str, np.dtype] = {}

    class Recording(_Unpickler):
        def persistent_load(self, pid: Any) -> _Storage:
            storage = super().persistent_load(pid)
            storages[storage.key] = storage.dtype
            return storage

    tree = Recording(stream).load()
    places: Places = {}
    end = stream.seek(0, io.SEEK_CUR)
    size = stream.seek(0, io.SEEK_END)
    stream.seek(end)
    for key in _Unpickler(stream).load():
        (count,) = struct.unpack("<q", stream.read(8))
        start, length = stream.tell(), count * storages[key].itemsize
        if count < 0 or start + length > size:
            raise ValueError("it is truncated")
        places[key] = (start, length)
        stream.seek(length, io.SEEK_CUR)
    return tree, places
