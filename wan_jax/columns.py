"""The columns of one video spread over devices: what the VAE runs inside shard_map.

The devices of a video, whatever else they do for it, hold as many equal runs of latent columns, and
at every resolution the columns that those become; the last runs are padded. Only what looks beside
a column tells other devices anything: a convolution, which is given one column of each neighbour,
and attention, which is given the keys and values of all.

Padding may hold anything; where something looks at it, it is zero, as what a convolution pads with
is, or cut off.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from wan_jax.sharding import GUIDANCE, RING, ULYSSES, Layout

Array = jax.Array
_DEVICES = (GUIDANCE, RING, ULYSSES)
_AXIS = 3  # of [b, t, y, x, c]

SPLIT = PartitionSpec(*(None,) * _AXIS, _DEVICES)  # of arrays of which devices hold columns each


class Columns(NamedTuple):
    """A device's share of the columns of a video whose latents are `width` wide.

    Arrays are [b, t, y, x, c], of any resolution that is a multiple of the latents'.
    """

    width: int
    devices: int

    @property
    def share(self) -> int:
        """Latent columns on each device, padding included."""
        return -(-self.width // self.devices)

    def take(self, x: Array) -> Array:
        """This device's columns of a whole array; padding is zero."""
        scale = x.shape[_AXIS] // self.width
        own = self.share * scale
        widths = [(0, 0)] * x.ndim
        widths[_AXIS] = (0, (self.share * self.devices - self.width) * scale)
        start = lax.axis_index(_DEVICES) * own
        return lax.dynamic_slice_in_dim(jnp.pad(x, widths), start, own, _AXIS)

    def join(self, x: Array) -> Array:
        """All columns, on every device, without padding."""
        whole = lax.all_gather(x, _DEVICES, axis=_AXIS, tiled=True)
        return lax.slice_in_dim(whole, 0, self._true(x), axis=_AXIS)

    def real(self, x: Array) -> Array:
        """x with zeros for padding."""
        if self.share * self.devices == self.width:
            return x
        own = x.shape[_AXIS]
        places = lax.axis_index(_DEVICES) * own + jnp.arange(own, dtype=jnp.int32)
        return jnp.where((places < self._true(x))[:, None], x, 0)

    def widen(self, x: Array, padding: tuple[int, int], *, past: Array | None = None) -> Array:
        """x between so many columns of the neighbours, 0 or 1 each, in place of zeros.

        Where a video ends there are zeros: no neighbour sends any, or one sends padding. past: as
        wide as the result; it comes before x in time.
        """
        x, (before, after), last = self.real(x), padding, x.shape[_AXIS] - 1
        along = [(i, i + 1) for i in range(self.devices - 1)]
        edges = []
        if before:
            edge = lax.slice_in_dim(x, last, last + 1, axis=_AXIS)
            edges.append((0, lax.ppermute(edge, _DEVICES, along)))
        if after:
            edge = lax.slice_in_dim(x, 0, 1, axis=_AXIS)
            back = [(j, i) for i, j in along]
            edges.append((before + last + 1, lax.ppermute(edge, _DEVICES, back)))
        # The neighbours' columns are put in last, in place: so XLA makes one copy, which does not
        # wait for them. To concatenate in time what was concatenated along columns makes two.
        widths = [(0, 0)] * x.ndim
        widths[_AXIS] = padding
        wide = jnp.pad(x, widths)
        if past is not None:
            wide = jnp.concatenate([past, wide], 1)
        for place, edge in edges:
            start = (0, wide.shape[1] - x.shape[1], 0, place, 0)
            wide = lax.dynamic_update_slice(wide, edge, start)
        return wide

    def every(self, flag: Array) -> Array:
        """Whether it is so on every device."""
        return lax.pmin(flag.astype(jnp.int32), _DEVICES) > 0

    def _true(self, x: Array) -> int:
        """Columns of the whole of which x is this device's share."""
        return x.shape[_AXIS] // self.share * self.width


def columns_on(layout: Layout | None, width: int) -> Columns | None:
    """How a layout's devices share the columns of latents so wide; None if each has all."""
    devices = 1 if layout is None else layout.size(*_DEVICES)
    return Columns(width, devices) if devices > 1 else None
