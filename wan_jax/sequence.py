"""The tokens of one video spread over devices: what runs inside shard_map.

Ring member r and Ulysses member u hold run r * ulysses + u of as many equal runs of tokens as there
are devices; the last runs are padded. All but self-attention knows single tokens and needs no other
device. For self-attention, Ulysses members trade tokens for heads (DeepSpeed-Ulysses, Jacobs et al.
2023), after which each holds the ring member's tokens for a share of the heads, a group of those
after another; the keys and values of the ring's members then go round (Ring Attention, Liu et al.
2023). Padding is not attended to.
"""

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wan_jax import xla
from wan_jax.attention import Partial, attention, merge, partial_attention, row_tile
from wan_jax.sharding import RING, ULYSSES

Array = jax.Array
_BOTH = (RING, ULYSSES)


class Share(NamedTuple):
    """A device's share of `tokens` tokens, in a ring and in groups of so many devices.

    tile: its rows are a multiple of this.
    """

    tokens: int
    ring: int = 1
    ulysses: int = 1
    tile: int = 1

    @property
    def devices(self) -> int:
        return self.ring * self.ulysses

    @property
    def rows(self) -> int:
        """Tokens on each device, padding included."""
        return -(-self.tokens // (self.devices * self.tile)) * self.tile

    def take(self, x: Array, *, axis: int) -> Array:
        """This device's rows of the tokens along an axis; padding is zero."""
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, self.rows * self.devices - self.tokens)
        padded = jnp.pad(x, widths) if widths[axis][1] else x
        if self.devices == 1:
            return padded
        start = lax.axis_index(_BOTH) * self.rows
        return lax.dynamic_slice_in_dim(padded, start, self.rows, axis)

    def join(self, x: Array, *, axis: int) -> Array:
        """All tokens along an axis, on every device."""
        whole = x if self.devices == 1 else lax.all_gather(x, _BOTH, axis=axis, tiled=True)
        return lax.slice_in_dim(whole, 0, self.tokens, axis=axis)

    def attention(
        self,
        q_blnk: Array,
        k_blnk: Array,
        v_blnk: Array,
        *,
        implementation: str | None = None,
        in_fp8: bool = False,
    ) -> Array:
        """Self-attention among all tokens, of and for this device's rows [b, l, n, k].

        The heads must be a multiple of the Ulysses members. in_fp8: as attention() has it, but not
        in a ring, where results are joined by weights that the kernel of 8 bits does not tell.
        """
        run = functools.partial(self._among, implementation=implementation, in_fp8=in_fp8)
        if self.ulysses == 1:
            return run(q_blnk, k_blnk, v_blnk)
        return self._traded(run, q_blnk, k_blnk, v_blnk)

    def _traded(self, run: Callable[..., Array], *qkv_blnk: Array) -> Array:
        """run() on the ring member's rows of a share of the heads, in groups, one after another.

        While a group is worked on, the next one's queries, keys and values are on their way, and
        what came of the one before is on its way back. The barriers keep this order: all that is
        sent before the first group makes it wait, and the results of one could be sent with those
        of the last.
        """
        given: list[list[Array]] = []
        for heads in groups_of(qkv_blnk[0].shape[2] // self.ulysses):
            parts = [self._apart(x, heads) for x in qkv_blnk]
            if given:
                parts, _ = lax.optimization_barrier((parts, given[-1]))
            given.append([self._together(self._swap(x)) for x in parts])
        found: list[Array] = []
        for group in given:
            own = self._back(run(*group))
            if found:
                own, _ = lax.optimization_barrier((own, found[-1]))
            found.append(self._swap(own))
        whole = jnp.concatenate([jnp.moveaxis(own, 0, 2) for own in found], 3)
        return whole.reshape(qkv_blnk[0].shape)

    def _among(
        self, q: Array, k: Array, v: Array, *, implementation: str | None, in_fp8: bool
    ) -> Array:
        """Attention of the ring member's rows of some heads."""
        if self.ring > 1:
            return self._around(q, k, v, implementation)
        # The queries of padding stay; what they give is cut by join().
        return attention(q, k, v, count=self.tokens, implementation=implementation, in_fp8=in_fp8)

    def _apart(self, x: Array, heads: slice) -> Array:
        """Rows of all heads -> of these of each member's share, a part for each member."""
        b, rows, _, k = x.shape
        return jnp.moveaxis(x.reshape(b, rows, self.ulysses, -1, k)[..., heads, :], 2, 0)

    def _together(self, parts: Array) -> Array:
        """The parts that came from each member -> the ring member's rows of some heads."""
        _, b, _, n, k = parts.shape
        return parts.swapaxes(0, 1).reshape(b, -1, n, k)

    def _back(self, x: Array) -> Array:
        """The ring member's rows of some heads -> a part for each member."""
        b, _, n, k = x.shape
        return x.reshape(b, self.ulysses, -1, n, k).swapaxes(0, 1)

    def _swap(self, parts: Array) -> Array:
        """Of parts [ulysses, b, rows, n, k], one for each member, those that they have for this.

        So they are in the order of memory, and of one video nothing is left to transpose where
        tokens come together.
        """
        if not xla.writes_to_peers():
            return lax.all_to_all(parts, ULYSSES, split_axis=0, concat_axis=0)
        members, own = self.ulysses, lax.axis_index(ULYSSES)
        found = lax.empty(parts.shape, parts.dtype)
        for step in range(members):
            part = lax.dynamic_index_in_dim(parts, (own + step) % members, 0, keepdims=False)
            if step:
                there = [(member, (member + step) % members) for member in range(members)]
                part = lax.ppermute(part, ULYSSES, there)
            found = lax.dynamic_update_index_in_dim(found, part, (own - step) % members, 0)
        return found

    def _around(self, q: Array, k: Array, v: Array, implementation: str | None) -> Array:
        """Attention to the keys of every ring member, which each passes on to the next."""
        steps = [(r, (r + 1) % self.ring) for r in range(self.ring)]
        rows, padded = k.shape[1], self.rows * self.devices > self.tokens
        own, pair = lax.axis_index(RING), jnp.stack((k, v))
        found: Partial | None = None
        for i in range(self.ring):
            # The next are under way while these are worked on, and no sooner: without the barrier
            # XLA sends all of them round first, and holds every member's.
            coming = lax.ppermute(pair, RING, steps) if i + 1 < self.ring else None
            count = None
            if padded:
                count = jnp.clip(self.tokens - (own - i) % self.ring * rows, 0, rows)
            part = partial_attention(*(q, *pair), count=count, implementation=implementation)
            found = part if found is None else merge(found, part)
            if coming is not None:
                pair, found = lax.optimization_barrier((coming, found))
        assert found is not None
        return found[0].astype(q.dtype)


def groups_of(heads: int) -> list[slice]:
    """The heads of a Ulysses member in up to three groups.

    The first one's journey and the last one's way back are all that is waited for: so each of the
    two is a fifth of the heads. But it is two heads where there are four or more, and one of three
    or two, or the journeys of the next would take longer than it is worked on. They are all in one
    where a device does not write to the others: a TPU's compiler lets no exchange travel under a
    kernel, and a GPU's kernels for it take the place of the blocks of attention.
    """
    if not xla.writes_to_peers():
        return [slice(0, heads)]
    outer = max(heads // 5, min(2, heads // 2))
    return [slice(*ends) for ends in pairwise(sorted({0, outer, heads - outer, heads}))]


def share_of(tokens: int, dtype: jnp.dtype, *, ring: int = 1, ulysses: int = 1) -> Share:
    """The share that suits the kernels; dtype: that of the products."""
    # In a ring keys are counted anyway, by a kernel with a mask.
    tile = row_tile(tokens, dtype) if ring == 1 else 1
    return Share(tokens, ring, ulysses, tile)
