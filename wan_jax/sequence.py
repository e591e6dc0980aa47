"""The tokens of one video spread over devices: what runs inside shard_map.

Ring member r and Ulysses member u hold run r * ulysses + u of as many equal runs of tokens as there
are devices; the last runs are padded. All but self-attention knows single tokens and needs no other
device. For self-attention, Ulysses members trade tokens for heads (DeepSpeed-Ulysses, Jacobs et al.
2023), after which each holds the ring member's tokens for a share of the heads; the keys and values
of the ring's members then go round (Ring Attention, Liu et al. 2023). Padding is not attended to.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wan_jax import ulysses, xla
from wan_jax.attention import attention, attention_in_parts, partial_attention, row_tile
from wan_jax.partials import Partial, merge
from wan_jax.parts import Parts
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

    def send(
        self, x_blnk: Array, upcoming: Any = None, *, in_place: bool = False
    ) -> tuple[Array | Parts, Any]:
        """Queries, keys or values of this device's rows, as attention() takes them.

        Between devices that write to each other they are on their way from here on; else they go
        when attention() exchanges them. upcoming: what the next of these is made of; it comes back.
        Without a hold on it XLA makes one product and one pass of queries and keys, and has nothing
        to do while the first travel. in_place: as ulysses.send() has it.
        """
        if self.ulysses == 1:
            return x_blnk, upcoming
        if xla.writes_to_peers():
            return ulysses.send(x_blnk, upcoming, self.ulysses, in_place=in_place)
        return x_blnk, None if upcoming is None else lax.optimization_barrier(upcoming)

    def attention(
        self,
        q_blnk: Array | Parts,
        k_blnk: Array | Parts,
        v_blnk: Array | Parts,
        *,
        implementation: str | None = None,
        in_fp8: bool = False,
    ) -> Array:
        """Self-attention among all tokens, of and for this device's rows [b, l, n, k], of send().

        The heads must be a multiple of the Ulysses members. in_fp8: as attention() has it, but not
        in a ring, where results are joined by weights that the kernel of 8 bits does not tell.
        """
        options: dict[str, Any] = {"implementation": implementation, "in_fp8": in_fp8}
        if isinstance(q_blnk, Parts):
            assert isinstance(k_blnk, Parts) and isinstance(v_blnk, Parts)
            return ulysses.gather(self._among_parts(q_blnk, k_blnk, v_blnk, **options))
        assert not isinstance(k_blnk, Parts) and not isinstance(v_blnk, Parts)
        if self.ulysses == 1:
            return self._among(q_blnk, k_blnk, v_blnk, **options)
        among = functools.partial(self._among, **options)
        return ulysses.trade(among, self.ulysses, q_blnk, k_blnk, v_blnk)

    def _among(
        self, q: Array, k: Array, v: Array, *, implementation: str | None, in_fp8: bool
    ) -> Array:
        """Attention of the ring member's rows of some heads."""
        if self.ring > 1:
            return self._around(q, k, v, implementation)
        # The queries of padding stay; what they give is cut by join().
        return attention(q, k, v, count=self.tokens, implementation=implementation, in_fp8=in_fp8)

    def _among_parts(self, q: Parts, k: Parts, v: Parts, **options: Any) -> Parts:
        """The same of rows that have come together in parts."""
        if self.ring > 1:
            return q.apart(self._among(q.joined(), k.joined(), v.joined(), **options))
        return attention_in_parts(q, k, v, count=self.tokens, **options)

    def _around(self, q: Array, k: Array, v: Array, implementation: str | None) -> Array:
        """Attention to the keys of every ring member, which each passes on to the next."""
        steps = [(r, (r + 1) % self.ring) for r in range(self.ring)]
        rows, padded = k.shape[1], self.rows * self.devices > self.tokens
        own, pair = lax.axis_index(RING), (k, v)
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


def share_of(tokens: int, dtype: jnp.dtype, *, ring: int = 1, ulysses: int = 1) -> Share:
    """The share that suits the kernels; dtype: that of the products."""
    # In a ring keys are counted, and cuDNN's kernel that counts has a mask, which costs more.
    tile = row_tile(tokens, dtype) if ring == 1 or xla.on_hopper() else 1
    return Share(tokens, ring, ulysses, tile)
