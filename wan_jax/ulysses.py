"""Tokens traded for heads by the members of Ulysses (DeepSpeed-Ulysses, Jacobs et al. 2023).

A member's rows of all heads [b, l, n, k] are cut by heads, each member is given its share of those
by the others, and what attention makes of them goes back the same way. Inside shard_map.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from wan_jax.parts import Parts
from wan_jax.sharding import ULYSSES

Array = jax.Array


def trade(run: Callable[..., Array], members: int, *qkv_blnk: Array) -> Array:
    """run(q, k, v) on all members' rows of this one's heads, by one exchange of all there and back.

    So it is for devices whose kernels would have to bring what travels, or wait for it: on a TPU
    nothing travels under a kernel, and NCCL's hold up those that they are to run under.
    """
    b, rows, n, k = qkv_blnk[0].shape

    def there(x: Array) -> Array:
        parts = _swap(jnp.moveaxis(x.reshape(b, rows, members, -1, k), 2, 0))
        return parts.swapaxes(0, 1).reshape(b, -1, n // members, k)

    out = run(*map(there, qkv_blnk))
    parts = _swap(out.reshape(b, members, rows, -1, k).swapaxes(0, 1))
    return jnp.moveaxis(parts, 0, 2).reshape(b, rows, n, k)


def _swap(parts: Array) -> Array:
    """Of parts [members, b, l, n, k], one for each member, those that they have for this.

    So they are in the order of memory, and of one video nothing is left to transpose where tokens
    come together.
    """
    return lax.all_to_all(parts, ULYSSES, split_axis=0, concat_axis=0)


def write(run: Callable[..., tuple[Array, ...]], members: int, *qkv_blnk: Array) -> Array:
    """run(q, k, v: Parts) the same, between devices that write to each other.

    Values and keys travel while queries are made, beside the products. run() is given what came as
    it lies there, and what it gives goes back so.
    """
    b, rows, n, k = qkv_blnk[0].shape
    own = lax.axis_index(ULYSSES)
    place = jnp.stack([own, own * (n // members)])

    def there(x: Array) -> Parts:
        of_members = x.reshape(b, rows, members, -1, k)
        sent = [
            lax.dynamic_index_in_dim(of_members, (own + i) % members, 2, keepdims=False)
            for i in range(1, members)
        ]
        return Parts(x, _sent(sent, 1), place)

    mine, *others = run(*map(there, qkv_blnk))
    # Each goes back to whom its rows are from; here are this member's heads, the next one's, ...
    found = jnp.stack([mine, *_sent(others, -1)], 2)
    return jnp.roll(found, own, 2).reshape(b, rows, n, k)


def _sent(parts: list[Array], way: int) -> tuple[Array, ...]:
    """What comes when all send the first to the next member, the second to that behind it, ...

    way: 1, or -1 for those before.
    """
    members = len(parts) + 1
    steps = [
        [(i, (i + way * step) % members) for i in range(members)] for step in range(1, members)
    ]
    return tuple(
        lax.ppermute(part, ULYSSES, there) for part, there in zip(parts, steps, strict=True)
    )
