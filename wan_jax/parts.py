"""What has come together on a device in parts, and is used as it lies there.

To have it in one array would be a pass over all of it in every layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


class Parts(NamedTuple):
    """Rows [b, members * l, n, k] of some heads: a device's own, and what other members have sent.

    own: [b, l, n of all heads, k], of which some are meant. others: each [b, l, n, k]; the first is
    of the member before this in their circle, the next of that before it. place: int32 [2], this
    member's number and the first of the heads that are meant in `own`.
    """

    own: Array
    others: tuple[Array, ...]
    place: Array

    @property
    def members(self) -> int:
        return 1 + len(self.others)

    @property
    def rows(self) -> int:
        """Of each part."""
        return self.own.shape[1]

    @property
    def whole(self) -> jax.ShapeDtypeStruct:
        """What joined() gives."""
        b, rows, n, k = self.others[0].shape
        return jax.ShapeDtypeStruct((b, self.members * rows, n, k), self.own.dtype)

    def joined(self) -> Array:
        """In one array, member after member."""
        b, rows, n, k = self.others[0].shape
        own = lax.dynamic_slice_in_dim(self.own, self.place[1], n, axis=2)
        found = lax.empty((self.members, b, rows, n, k), self.own.dtype)
        for step, part in enumerate((own, *self.others)):
            member = (self.place[0] - step) % self.members
            found = lax.dynamic_update_index_in_dim(found, part, member, 0)
        return found.swapaxes(0, 1).reshape(self.whole.shape)

    def apart(self, x: Array) -> tuple[Array, ...]:
        """Such rows [b, members * l, n, k] as a part for each member, in the order of these."""
        b, _, n, k = x.shape
        of_members = x.reshape(b, self.members, self.rows, n, k)
        numbers = (self.place[0] - jnp.arange(self.members)) % self.members
        return tuple(
            lax.dynamic_index_in_dim(of_members, number, 1, keepdims=False) for number in numbers
        )
