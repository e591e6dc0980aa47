"""Tokens traded for heads by the members of Ulysses (DeepSpeed-Ulysses, Jacobs et al. 2023).

A member's rows of all heads [b, l, n, k] are cut by heads, each member is given its share of those
by the others, and what attention makes of them goes back the same way. Inside shard_map.
"""

from collections.abc import Callable
from itertools import pairwise

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
    """run(q, k, v: Parts) the same, in groups of heads, between devices that write to each other.

    While a group is worked on, the next one's queries, keys and values are on their way, and what
    came of the one before is on its way back. The barriers keep this order: all that is sent before
    the first group makes it wait, and the results of one could be sent with those of the last.
    Nothing is joined: run() takes what came as it lies there, and what it gives goes back so.
    """
    b, rows, n, k = qkv_blnk[0].shape
    own = lax.axis_index(ULYSSES)
    of_members = [x.reshape(b, rows, members, -1, k) for x in qkv_blnk]
    given: list[list[Parts]] = []
    for heads in groups_of(n // members):
        sent = [[_of(x[..., heads, :], own + i) for i in range(1, members)] for x in of_members]
        if given:
            sent, _ = lax.optimization_barrier((sent, [x.others for x in given[-1]]))
        place = jnp.stack([own, own * (n // members) + heads.start])
        given.append(
            [Parts(x, _sent(parts, 1), place) for x, parts in zip(qkv_blnk, sent, strict=True)]
        )
    found: list[tuple[Array, ...]] = []
    for group in given:
        mine, *others = run(*group)
        if found:
            others, _ = lax.optimization_barrier((others, found[-1][1:]))
        found.append((mine, *_sent(others, -1)))
    return _assembled(found, own)


def _of(x: Array, member: Array) -> Array:
    """The heads of a member; a number behind the last is that of the first again."""
    members = x.shape[2]
    return lax.dynamic_index_in_dim(x, member % members, 2, keepdims=False)


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


def _assembled(groups: list[tuple[Array, ...]], own: Array) -> Array:
    """This member's rows of all heads [b, l, n, k], of groups of what each member made of them.

    A group has this one's, that of the next member, and so on.
    """
    by_distance = [jnp.concatenate(parts, 2) for parts in zip(*groups, strict=True)]
    b, rows, _, k = by_distance[0].shape
    return jnp.roll(jnp.stack(by_distance, 2), own, 2).reshape(b, rows, -1, k)


def groups_of(heads: int) -> list[slice]:
    """A member's heads in up to three groups.

    The first one's journey and the last one's way back are all that is waited for: so each of the
    two is a fifth of the heads. But it is two heads where there are four or more: on an H200 the
    kernel takes 1.08 ms for one head of the 1.3B on half of its devices, and 1.8 ms for two.
    """
    outer = max(heads // 5, min(2, heads // 2))
    return [slice(*ends) for ends in pairwise(sorted({0, outer, heads - outer, heads}))]
