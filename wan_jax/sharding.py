"""One mesh for everything: its axes, and where arrays lie on it.

Axes, outermost first: "batch", videos or clips; "guidance", the two branches of classifier-free
guidance; "ring" and "ulysses", the tokens of a video (see sequence.py). The last three share the
columns of a video in the VAE (see columns.py). In training the rows of a batch are split over all
of them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

BATCH, GUIDANCE, RING, ULYSSES = AXES = ("batch", "guidance", "ring", "ulysses")
Where = Sharding | Callable[[tuple[int, ...]], Sharding]  # arrays lie, by their shapes
SMALL = 2**16  # elements; an array below is whole on every device, for to gather it costs more


class Layout(NamedTuple):
    """Where arrays lie on the devices of a mesh.

    weights_over: the axes along which devices hold a share of the weights each; along the others
    they hold the same. small: arrays with fewer elements are whole.
    """

    mesh: Mesh
    weights_over: tuple[str, ...] = ()
    small: int = SMALL

    def size(self, *axes: str) -> int:
        """How many devices there are along these axes."""
        return int(np.prod([self.mesh.shape[axis] for axis in axes], dtype=np.int64))

    def of_weights(self, *, split: bool) -> "Layout":
        """The same with weights split over all devices, or whole on each."""
        return self._replace(weights_over=AXES if split else ())

    def spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        """How a weight of this shape is split, or its average or moments."""
        return weight_spec(shape, self.weights_over, self.size(*self.weights_over), self.small)

    def weight(self, shape: tuple[int, ...]) -> NamedSharding:
        """Where a weight of this shape lies."""
        return NamedSharding(self.mesh, self.spec(shape))

    def weights(self, tree: Any) -> Any:
        """The same for all leaves of a tree, which have shapes."""
        return jax.tree.map(lambda leaf: self.weight(leaf.shape), tree)

    def rows(self, batch: Any) -> Any:
        """Arrays of the host [b, ...] on the devices, each with a share of the rows."""
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec(AXES)))

    def whole(self, tree: Any) -> Any:
        """Arrays on every device; of several processes each has the same ones."""
        where = NamedSharding(self.mesh, PartitionSpec())
        if where.is_fully_addressable:
            return jax.device_put(tree, where)
        # device_put would compare what the processes have, and send it round for that.
        return jax.tree.map(functools.partial(_everywhere, where), tree)


def _everywhere(where: NamedSharding, array: Any) -> jax.Array:
    if isinstance(array, jax.Array) and array.sharding.device_set == where.device_set:
        return array  # what programs over all devices give is whole on each
    own = np.asarray(array)
    return jax.make_array_from_callback(own.shape, where, lambda index: own[index])


def by_shape(where: Where | None) -> Callable[[tuple[int, ...]], Sharding]:
    """Where an array of a shape lies; None is the first device."""
    place = where or SingleDeviceSharding(jax.devices()[0])
    return place if callable(place) else lambda _: place


def make_layout(
    fsdp: int | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    small: int = SMALL,
) -> Layout:
    """The layout of a training on these devices, by default all.

    fsdp: how many share one copy of the weights; None is all. Raises ValueError for a number that
    does not divide that of the devices.
    """
    given = jax.devices() if devices is None else list(devices)
    share = len(given) if fsdp is None else fsdp
    if share < 1 or len(given) % share:
        raise ValueError(f"fsdp is {fsdp}; a divisor of the {len(given)} devices is needed")
    return Layout(make_mesh(given, ulysses=share), (ULYSSES,), small)


def make_mesh(
    devices: Sequence[jax.Device], *, guidance: int = 1, ring: int = 1, ulysses: int = 1
) -> Mesh:
    """The mesh; what is left of the devices lies along "batch".

    Ulysses members, who tell each other most, are neighbours in the list, as the GPUs of a host
    are; those of a TPU are laid along its torus.
    """
    shape = (len(devices) // (guidance * ring * ulysses), guidance, ring, ulysses)
    if devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices).reshape(shape)
    return Mesh(grid, AXES)


def weight_spec(
    shape: tuple[int, ...], over: tuple[str, ...], count: int, small: int = SMALL
) -> PartitionSpec:
    """Split along the largest axis that divides, the last of equals; whole if there is none.

    The first of several axes is left alone: in a stack it is that of the layers, and every device
    runs all of them.
    """
    first = 1 if len(shape) > 1 else 0
    fits = [axis for axis in range(first, len(shape)) if shape[axis] % count == 0]
    if count == 1 or not fits or np.prod(shape, dtype=np.int64) < small:
        return PartitionSpec()
    chosen = max(fits, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*(over if axis == chosen else None for axis in range(chosen + 1)))
