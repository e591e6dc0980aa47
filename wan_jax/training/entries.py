"""What a cache holds: one .safetensors file an example, read in part and written whole."""

import contextlib
import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from wan_jax import files

LATENTS, CONTEXT, KNOWN, TOKENS = "latents", "context", "known", "tokens"
SUFFIX = ".safetensors"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Entry(NamedTuple):
    """One example, encoded.

    path: of a file with `latents` float32 [t, h, w, z], `context` [captions, s, d] and, of a
    checkpoint that takes images, `known` float32 [t, h, w, 4 + z] and `tokens` float32 [s, d].
    name: of the example. shape: of the latents. captions: how many. rows: s of the context.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    captions: int
    rows: int


class Cache(NamedTuple):
    """Encoded examples, in the order of the listing, and what was left out.

    null: states [s, d] of the empty prompt, in the dtype of the contexts. skipped: {name: reason}.
    """

    folder: Path
    entries: tuple[Entry, ...]
    null: np.ndarray
    skipped: dict[str, str]


def write(path: Path, tensors: Mapping[str, np.ndarray], *, about: Mapping[str, object]) -> None:
    """Writes a file, whole or not at all.

    about: what people may want to know of it, as JSON holds it. Raises OSError naming the folder
    and the bytes that are needed if the disk is full.
    """
    metadata = {"wan_jax": json.dumps(dict(about))}
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    data = save(arrays, metadata=metadata)
    try:
        with files.whole_or_nothing(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(
            error.errno,
            f"no room for {len(data)} bytes in {path.parent}; what is there stays, and the same "
            "command goes on from it once there is more",
        ) from error


def names(path: Path) -> frozenset[str]:
    """Names of the tensors of a file; ValueError naming it if it cannot be read."""
    with _reading(path), safe_open(path, framework="numpy") as handle:
        return frozenset(handle.keys())


def shapes(path: Path, names: Sequence[str]) -> dict[str, tuple[int, ...]] | None:
    """Shapes of these tensors; None if the file is missing, damaged or has others."""
    try:
        with safe_open(path, framework="numpy") as handle:
            if set(handle.keys()) != set(names):
                return None
            return {name: tuple(handle.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError):
        return None


def read(path: Path, names: Sequence[str], *, row: int | None = None) -> dict[str, np.ndarray]:
    """Tensors of a file, of `context` only one row unless that is None.

    Raises ValueError naming the file if it cannot be read.
    """
    found: dict[str, np.ndarray] = {}
    with _reading(path), safe_open(path, framework="numpy") as handle:
        for name in names:
            if name == CONTEXT and row is not None:
                found[name] = handle.get_slice(name)[row : row + 1][0]
            else:
                found[name] = handle.get_tensor(name)
    return found


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors of the library as a ValueError that names the file."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); if it is deleted, the next run makes it anew"
        ) from error
