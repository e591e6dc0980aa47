"""Tensors of PyTorch .pth files, read without torch and without running anything from the file.

A .pth is a pickle of names whose tensors point into raw storages: a zip of one file each, or in the
older form all of them one after another behind the pickle. Storages, tensors and the file must
account for each other in full, so that a damaged number is an error and never another tensor.
"""

import itertools
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from wan_jax.weights import pickled
from wan_jax.weights.archive import Archive, is_zip
from wan_jax.weights.facts import one_line
from wan_jax.weights.pickled import Storage, Tensor, show
from wan_jax.weights.rules import Shape

_MAX_ENTRY = 2**21  # bytes of those entries of a zip that are no storages
_LEGACY = (0x1950A86A20F9469CFC6C, 1001)  # magic number and version of the older form
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

Places = dict[str, tuple[int, int]]  # {storage key: (start in the file, length in bytes)}


def _dtype(storage: Storage) -> np.dtype:
    return _BFLOAT16 if storage.dtype == "bfloat16" else np.dtype(storage.dtype)


class PthReader:
    """rules.Reader over one .pth file; a tensor's bytes are read when it is asked for.

    Raises ValueError naming the file if it is missing, truncated, damaged, no .pth, or holds
    anything but named tensors. Where the zip has checksums, read() raises it as well.
    """

    def __init__(self, file: Path) -> None:
        self.files = (file,)
        self._archive: Archive | None = None
        self._verified: set[str] = set()
        try:
            with file.open("rb") as stream:
                tree = self._open_zip(file) if is_zip(stream) else self._open_legacy(stream)
            self._tensors = _tensors(tree)
            _check(self._tensors, self._places, checked=self._checked)
        except FileNotFoundError:
            raise ValueError(f"{file} is missing") from None
        except (ValueError, OSError, struct.error, OverflowError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"{self.files[0]} is not a readable .pth of weights: {one_line(error)}")

    @property
    def _checked(self) -> bool:
        return self._archive is not None and self._archive.checked

    def _open_zip(self, file: Path) -> Any:
        self._archive = Archive(file)
        tree, self._root = _read_zip(self._archive)
        data = f"{self._root}data/"
        self._places: Places = {
            name.removeprefix(data): (entry.start, entry.length)
            for name, entry in self._archive.entries.items()
            if name.startswith(data)
        }
        return tree

    def _open_legacy(self, stream: BinaryIO) -> Any:
        tree, self._places = _read_legacy(stream)
        return tree

    def shapes(self) -> dict[str, tuple[Shape, str]]:
        """{tensor name: (shape, NumPy dtype name)}."""
        return {name: (t.shape, t.storage.dtype) for name, t in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the shape and dtype it is stored in."""
        tensor = self._tensors[name]
        dtype = _dtype(tensor.storage)
        if 0 in tensor.shape:
            return np.empty(tensor.shape, dtype)
        try:
            self._verify(tensor.storage.key)
            start, length = self._places[tensor.storage.key]
            flat = np.memmap(self.files[0], np.uint8, "r", offset=start, shape=(length,))
        except (ValueError, OSError) as error:
            raise self._damaged(error) from error
        values = flat.view(dtype)[tensor.offset :]
        strides = [step * dtype.itemsize for step in tensor.strides]
        return np.array(np.lib.stride_tricks.as_strided(values, tensor.shape, strides))

    def _verify(self, key: str) -> None:
        if self._archive is not None and key not in self._verified:
            self._archive.verify(f"{self._root}data/{key}")
            self._verified.add(key)

    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return self.files[0].stat().st_size


def _read_zip(archive: Archive) -> tuple[Any, str]:
    """The pickled tree, and the folder in the zip that everything lies in."""
    pickles = [name for name in archive.entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"it is a zip with {len(pickles)} data.pkl in place of one")
    root = pickles[0].removesuffix("data.pkl")
    strange = [name for name in archive.entries if not name.startswith(root)]
    code = [name for name in archive.entries if name.startswith(f"{root}code/")]
    if strange or code:
        raise ValueError(f"it holds {show((strange + code)[0])}, which is no part of weights")
    order = f"{root}byteorder"
    if order in archive.entries and archive.read(order, most=_MAX_ENTRY) != b"little":
        raise ValueError("it was written on a big-endian machine")
    return pickled.loads(archive.read(pickles[0], most=_MAX_ENTRY)), root


def _read_legacy(stream: BinaryIO) -> tuple[Any, Places]:
    """The same of torch before 1.6: three small pickles, the tree, the keys, then raw storages."""
    magic, version, system = (pickled.load(stream) for _ in range(3))
    little = type(system) is dict and system.get("little_endian") is True
    if (magic, version) != _LEGACY or not little:
        raise ValueError("it is neither a zip nor the older form from a little-endian machine")
    tree, keys = pickled.load(stream), pickled.load(stream)
    storages = {tensor.storage.key: tensor.storage for tensor in _tensors(tree).values()}
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise ValueError("it has no list of storages")
    places: Places = {}
    offset = stream.tell()
    size = stream.seek(0, 2)
    for key in keys:
        if key not in storages or key in places:
            raise ValueError(f"the storage {show(key)} is no tensor's, or there twice")
        stream.seek(offset)
        (count,) = struct.unpack("<q", stream.read(8))
        length = count * _dtype(storages[key]).itemsize
        if count != storages[key].length or offset + 8 + length > size:
            raise ValueError(f"it is truncated, or the storage {show(key)} has another length")
        places[key] = (offset + 8, length)
        offset += 8 + length
    if offset != size:
        raise ValueError(f"{size - offset} bytes follow its last storage")
    return tree, places


def _tensors(tree: Any) -> dict[str, Tensor]:
    if type(tree) is not dict:
        raise ValueError(f"it holds a {type(tree).__name__} in place of named tensors")
    for name, value in tree.items():
        if type(value) is not Tensor:
            raise ValueError(f"{show(name)} is a {type(value).__name__}, not a tensor")
        if not name.isprintable() or not name:
            raise ValueError(f"the name {show(name)!r} is not one of a tensor")
    return tree


def _check(tensors: Mapping[str, Tensor], places: Places, *, checked: bool) -> None:
    """Raise ValueError unless storages have their lengths, and each is used as tensors may.

    checked: the zip has checksums, and so the pickle's numbers are those that were written: a
    tensor may be any part of its storage, also one that others have, as slices and tied weights
    are. Without checksums a slice cannot be told from a number that was damaged, and there the
    tensors of a storage must fill it, each its own run (or the same run in the same way). Nor can
    the two types of 16 bits be told apart there, so a file has one of them.
    """
    users: dict[Storage, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        users.setdefault(tensor.storage, {})[name] = tensor
    keys = [storage.key for storage in users]
    unused = [show(key) for key in sorted(set(places) - set(keys))]
    if unused:
        raise ValueError(f"the storages {unused[:3]} are used by no tensor")
    if len(set(keys)) != len(keys):
        raise ValueError("one storage has two types or lengths")
    if not checked and {"float16", "bfloat16"} <= {storage.dtype for storage in users}:
        raise ValueError("it has float16 and bfloat16 and no checksums; save it with a newer torch")
    for storage, group in users.items():
        first = show(next(iter(group)))
        if storage.key not in places:
            raise ValueError(f"the storage of {first} is missing")
        if storage.length * _dtype(storage).itemsize != places[storage.key][1]:
            raise ValueError(f"the storage of {first} has another length than {first} says")
        for name, tensor in group.items():
            _check_view(show(name), tensor)
        if not checked:
            _check_filled(first, storage, group)


def _check_view(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a tensor that leaves its storage or has an element twice."""
    axes = sorted((s, n) for s, n in zip(tensor.strides, tensor.shape, strict=True) if n > 1)
    reach = 0
    for step, count in axes:
        if step <= reach and 0 not in tensor.shape:
            raise ValueError(f"{name} has strides {tensor.strides} for shape {tensor.shape}")
        reach += (count - 1) * step
    if 0 not in tensor.shape and tensor.offset + reach >= tensor.storage.length:
        raise ValueError(f"{name} reaches beyond its storage of {tensor.storage.length} numbers")


def _check_filled(first: str, storage: Storage, group: Mapping[str, Tensor]) -> None:
    runs = sorted({(t.offset, t.shape, t.strides) for t in group.values() if 0 not in t.shape})
    place = 0
    for offset, shape, strides in runs:
        axes = sorted((s, n) for s, n in zip(strides, shape, strict=True) if n > 1)
        steps = itertools.accumulate((n for _, n in axes), lambda a, b: a * b, initial=1)
        dense = all(step == due for (step, _), due in zip(axes, steps))
        place = place + math.prod(shape) if offset == place and dense else -1
        if place < 0:
            break
    if place != storage.length:
        raise ValueError(
            f"{first} is damaged, or a slice or another view of a tensor, which cannot be told "
            "apart in a file without checksums; save it again with a newer torch"
        )
