"""The mesh of a training, and where its arrays lie.

Two axes: "data", along which devices hold the same weights, and "fsdp", along which they hold a
share each. The rows of a batch are split over both. XLA adds what the devices tell each other.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")
SMALL = 2**16  # elements; an array below is whole on every device, for to gather it costs more


class Layout(NamedTuple):
    """Where arrays lie on the devices of a mesh. small: arrays with fewer elements are whole."""

    mesh: Mesh
    small: int = SMALL

    def weight(self, shape: tuple[int, ...]) -> NamedSharding:
        """Where a weight of this shape lies, or its average or moments."""
        return NamedSharding(self.mesh, weight_spec(shape, self.mesh.shape["fsdp"], self.small))

    def weights(self, tree: Any) -> Any:
        """The same for all leaves of a tree, which have shapes."""
        return jax.tree.map(lambda leaf: self.weight(leaf.shape), tree)

    def rows(self, batch: Any) -> Any:
        """Arrays of the host [b, ...] on the devices, each with a share of the rows."""
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec(AXES)))

    def whole(self, tree: Any) -> Any:
        """Arrays of the host on every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))


def make_layout(
    fsdp: int | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    small: int = SMALL,
) -> Layout:
    """The layout for these devices, by default all.

    fsdp: how many share one copy of the weights; None is all. Raises ValueError for a number that
    does not divide that of the devices.
    """
    given = jax.devices() if devices is None else list(devices)
    share = len(given) if fsdp is None else fsdp
    if share < 1 or len(given) % share:
        raise ValueError(f"fsdp is {fsdp}; a divisor of the {len(given)} devices is needed")
    return Layout(Mesh(np.array(given).reshape(-1, share), AXES), small)


def weight_spec(shape: tuple[int, ...], count: int, small: int = SMALL) -> PartitionSpec:
    """Split along the largest axis that divides, the last of equals; whole if there is none."""
    fits = [axis for axis, size in enumerate(shape) if size % count == 0]
    if count == 1 or not fits or np.prod(shape, dtype=np.int64) < small:
        return PartitionSpec()
    chosen = max(fits, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*("fsdp" if axis == chosen else None for axis in range(chosen + 1)))
