"""Tokens traded for heads by the members of Ulysses (DeepSpeed-Ulysses, Jacobs et al. 2023).

A member's rows of all heads [b, l, n, k] are cut by heads, each member is given its share of those
by the others, and what attention makes of them goes back the same way. Inside shard_map.
"""

from collections.abc import Callable, Sequence
from typing import Any

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


def send(x: Array, upcoming: Any, members: int, *, in_place: bool) -> tuple[Parts, Any]:
    """x [b, l, n, k] on its way between devices that write to each other, as Parts of their rows.

    upcoming: what the next such is made of, given back. By it nothing of that begins before what
    is sent lies there, which then travels beside it. in_place: x is in memory anyway, so its own
    heads are left among all; else XLA writes what is sent and what is kept, each where it goes.
    """
    b, rows, n, k = x.shape
    own = lax.axis_index(ULYSSES)
    of_members = x.reshape(b, rows, members, -1, k)

    def of(member: Array) -> Array:
        return lax.dynamic_index_in_dim(of_members, member, 2, keepdims=False)

    sent = [of((own + i) % members) for i in range(1, members)]
    sent, upcoming = lax.optimization_barrier((sent, upcoming))
    place = jnp.stack([own, own * (n // members)])
    return Parts(x if in_place else of(own), _travel(sent, 1), place), upcoming


def gather(found: Parts) -> Array:
    """This member's rows [b, l, n, k] of all heads, of what each has found for the others' rows.

    found: its own among all heads, where the others' take their places.
    """
    whole = found.own
    heads = found.others[0].shape[2]
    for i, part in enumerate(_travel(found.others, -1), start=1):
        first = (found.place[0] + i) % found.members * heads
        whole = lax.dynamic_update_slice_in_dim(whole, part, first, axis=2)
    return whole


def _travel(parts: Sequence[Array], way: int) -> tuple[Array, ...]:
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
