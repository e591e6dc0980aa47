"""Attention of what has come together in parts, by Hopper's kernel: which runs when, of what.

Parts are of multiples of 128 rows; hopper.fits() knows of the rest.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from wan_jax import cudnn
from wan_jax.hopper import ROWS, kernel, passes
from wan_jax.parts import Parts

Array = jax.Array

_AT_ONCE = 132  # thread blocks on an H100 SXM or H200, one on each multiprocessor
# So many times the rounds of one kernel are what several may take. To join queries and to part
# results is reckoned to cost the 1.3B and the 14B at 480P as much, in passes and open journeys.
_ROUNDED = 1.02


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(q: Parts, k: Parts, v: Parts, count: int) -> Parts:
    """hopper.attend() of what is joined; the result as attention.attention_in_parts() has it.

    Where that leaves hardly more of the GPU idle, each part of the queries has a kernel of its own,
    this device's two where those take no more rounds: one at first, while the others' travel, and
    one at last, while what was found for those does. Else queries are joined.
    """
    # One program for all of as many tiles: to make one and to compile it takes a second.
    program = jax.jit(functools.partial(kernel, count=count), static_argnames="tiles")
    run = functools.partial(program, k=(k.own, *k.others), v=(v.own, *v.others), place=q.place)
    tiles, blocks = q.rows // ROWS, q.own.shape[0] * q.heads
    if q.members * _rounds(tiles * blocks) > _ROUNDED * _rounds(q.members * tiles * blocks):
        (joined,) = run(jnp.concatenate((q.mine, *q.others), 1))
        return q.like(jnp.split(joined, q.members, 1))
    half = _half(tiles, blocks)
    b, _, n, d = q.others[0].shape
    whole = lax.empty((b, q.rows, q.members * n, d), q.own.dtype)

    def of_own(first: int, end: int, into: Array) -> Array:
        start = jnp.array([first], jnp.int32)
        return run(q.own, start=start, tiles=end - first, into=into)[0]

    found = [of_own(0, half, whole)]
    for part in q.others:
        found[-1], part = lax.optimization_barrier((found[-1], part))  # one after the other
        found += run(part)
    own, *others = found
    if half < tiles:
        own, others[-1] = lax.optimization_barrier((own, others[-1]))
        own = of_own(half, tiles, own)
    return Parts(own, tuple(others), q.place)


def _rounds(blocks: int) -> int:
    return -(-blocks // _AT_ONCE)


def _half(tiles: int, blocks: int) -> int:
    """How many tiles, each of so many thread blocks, are at first: about half, by whole rounds.

    All, if two kernels took a round more than one.
    """
    whole = _rounds(tiles * blocks)
    for half in (tiles // 2, whole // 2 * _AT_ONCE // blocks):
        if half and _rounds(half * blocks) + _rounds((tiles - half) * blocks) == whole:
            return half
    return tiles


def _attend_cudnn(q: Parts, k: Parts, v: Parts, count: int) -> Parts:
    return q.apart(cudnn.attend(q.joined(), k.joined(), v.joined(), count))


attend.defvjp(*passes(_attend_cudnn))
