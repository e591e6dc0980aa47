"""What has come together on a device in parts, and is used as it lies there.

To have it in one array would be a pass over all of it in every layer.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


class Parts(NamedTuple):
    """Rows [b, members * l, n, k] of some heads: a device's own, and those of other members.

    own: [b, l, n, k], or of all heads, of which those are meant. others: each [b, l, n, k]; the
    first is of the member before this in their circle, the next of that before it. place: int32
    [2], this member's number and the first of the heads that are meant among all.
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
    def heads(self) -> int:
        """That are meant."""
        return self.others[0].shape[2]

    @property
    def whole(self) -> jax.ShapeDtypeStruct:
        """What joined() gives."""
        b, rows, n, k = self.others[0].shape
        return jax.ShapeDtypeStruct((b, self.members * rows, n, k), self.own.dtype)

    @property
    def mine(self) -> Array:
        """[b, l, n, k]: of `own` the heads that are meant."""
        if self.own.shape[2] == self.heads:
            return self.own
        return lax.dynamic_slice_in_dim(self.own, self.place[1], self.heads, axis=2)

    def joined(self) -> Array:
        """In one array, member after member."""
        b, rows, n, k = self.others[0].shape
        found = lax.empty((self.members, b, rows, n, k), self.own.dtype)
        for step, part in enumerate((self.mine, *self.others)):
            member = (self.place[0] - step) % self.members
            found = lax.dynamic_update_index_in_dim(found, part, member, 0)
        return found.swapaxes(0, 1).reshape(self.whole.shape)

    def apart(self, x: Array) -> "Parts":
        """Such rows [b, members * l, n, k] as parts like these, own among all heads."""
        b, _, n, k = x.shape
        of_members = x.reshape(b, self.members, self.rows, n, k)
        numbers = (self.place[0] - jnp.arange(self.members)) % self.members
        return self.like(
            lax.dynamic_index_in_dim(of_members, number, 1, keepdims=False) for number in numbers
        )

    def like(self, parts: Iterable[Array]) -> "Parts":
        """Others in the order of these, each [b, l, n, k]; own among all heads."""
        own, *others = parts
        b, rows, n, k = own.shape
        whole = lax.empty((b, rows, self.members * n, k), own.dtype)
        whole = lax.dynamic_update_slice_in_dim(whole, own, self.place[1], axis=2)
        return Parts(whole, tuple(others), self.place)
