"""A checkpoint like another one but for its DiT, which was trained."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wan_jax.weights import checkpoint
from wan_jax.weights.folders import alone, check_space, written_whole


def check(source: Any, path: Path, nbytes: int) -> None:
    """Raise ValueError if write() could not work. nbytes: of the DiT's arrays."""
    if not isinstance(source, Path):
        raise ValueError(
            f"{source} is in a bucket; a checkpoint that is derived from it needs it on this "
            "machine: copy the folder and give that"
        )
    checkpoint.check_free(path)
    check_space(path.parent, nbytes + checkpoint.SPARE, remedy="choose another --out")


def write(
    source: Path, path: Path, arrays: Mapping[str, jax.Array], *, trained: Mapping[str, Any]
) -> None:
    """Write a checkpoint with the DiT of these arrays, in the dtypes they have.

    The other networks, the tokenizer and the settings are the source's: hard links to its files,
    or copies on another disk. trained: what its manifest says of how the DiT came about. It appears
    when it is whole; one that is there already is left. Raises ValueError as check() does; OSError
    if the disk fails.
    """
    check(source, path, sum(leaf.nbytes for leaf in arrays.values()))
    manifest = checkpoint.read_manifest(source)
    with alone(path), written_whole(path, is_whole=checkpoint.is_checkpoint) as work:
        for item in sorted(source.iterdir()):
            if item.is_dir() and item.name in {*manifest["parts"], checkpoint.TOKENIZER} - {"dit"}:
                shutil.copytree(item, work / item.name, copy_function=_link)
        shutil.copyfile(source / checkpoint.CONFIG, work / checkpoint.CONFIG)
        content = hashlib.sha256()

        def hashed() -> Any:
            for name in sorted(arrays):
                array = np.asarray(arrays[name])
                content.update(f"{name} {array.dtype} {array.shape} ".encode())
                content.update(np.ascontiguousarray(array).view(np.uint8).data)
                yield name, array

        checkpoint.save_arrays(work / "dit", hashed())
        size = sum(leaf.nbytes for leaf in arrays.values())
        # Its name for the digest; the other facts are what an export of the source would need.
        files = {"trained": {"bytes": size, "sha256": content.hexdigest()}}
        entry = manifest["parts"]["dit"] | {"files": files, "trained": dict(trained)}
        parts = manifest["parts"] | {"dit": entry}
        checkpoint.write_json(
            work / checkpoint.MANIFEST, checkpoint.make_manifest(parts, manifest["dtype"])
        )


def _link(source: str, target: str) -> None:
    with contextlib.suppress(OSError):  # another disk, or one without links
        os.link(source, target)
        return
    shutil.copyfile(source, target)
