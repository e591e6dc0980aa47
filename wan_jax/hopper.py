"""Attention on Hopper by a kernel of our own, in Pallas for Mosaic GPU: 16 bits, heads of 128.

A thread block has 128 queries of a head: 64 for each of two warpgroups, which multiply, while a
third has the keys and values brought to shared memory, block by block. A warpgroup gives the tensor
cores the scores of a block and, behind them, the product of the block before with its values; while
that is at work it takes the softmax of the scores, online as FlashAttention does. Keys that are not
real have no weight at all, so there is nothing to make good as behind cuDNN's kernel without a
mask. Source of the scheme: FlashAttention-3 (arXiv 2407.08608), its overlap inside a warpgroup; to
let the two take turns in every block is slower here than to give one a start.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from wan_jax import cudnn, xla
from wan_jax.parts import Parts

Array = jax.Array
Softmax = tuple[Array, Array, Array]  # largest score and sum of each row so far, and the weights

ROWS = 128  # of a thread block; lengths must be multiples
HEAD = 128  # their width
_GROUPS = 2  # warpgroups that multiply
_OWN = ROWS // _GROUPS  # queries of each
_BLOCK = 128  # keys at a time
_STAGES = 2  # blocks in shared memory
_AT_ONCE = 132  # thread blocks on an H100 SXM or H200, one on each multiprocessor
# So many times the rounds of one kernel are what several may take. To join queries and to part
# results is reckoned to cost the 1.3B and the 14B at 480P as much, in passes and open journeys.
_ROUNDED = 1.02
# Registers of a thread: 64 scores, 64 sums of the result, 32 weights and what else there is.
_MANY, _FEW = 240, 24
_LOWEST = -1e30
# A thread block's place, and a warpgroup's in it. Names of a mesh's axes would mean its devices.
_GRID = ("hopper_head", "hopper_tile", "hopper_batch")
_GROUP = "hopper_group"


class _Memory(NamedTuple):
    """Shared memory, and the barriers that tell that something is there, or no longer needed."""

    q: Any  # [group, row, k]; the result in the end
    k: Any  # [stage, key, k]
    v: Any
    q_there: Any  # one for each group
    k_there: Any  # one for each stage
    v_there: Any
    k_free: Any
    v_free: Any
    turn: Any  # one for each group, which may begin, and one that is asked by none


def fits(q: Array | jax.ShapeDtypeStruct, k: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether attend() takes q [b, s, n, k] and keys, on the device that is traced for."""
    rows = q.shape[1] % ROWS == 0 and k.shape[1] % _BLOCK == 0 and k.shape[1] > 0
    narrow = q.dtype in (jnp.bfloat16, jnp.float16)
    return xla.on_hopper() and rows and q.shape[-1] == HEAD and narrow


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(q: Array, k: Array, v: Array, count: int) -> Array:
    """softmax(q k^T / sqrt(k)) v over the first `count` keys, in the dtype of q.

    What stands in the rows behind those may be any finite numbers. The gradient is cuDNN's, forward
    pass and all, as it needs that kernel's weights.
    """
    return _kernel(q, (k,), (v,), count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend_parts(q: Parts, k: Parts, v: Parts, count: int) -> Parts:
    """attend() of parts of multiples of 128 rows; the result as attention_in_parts() has it.

    The numbers are those of attend() for what is joined. Where that leaves hardly more of the GPU
    idle, each part of the queries has a kernel of its own, this device's two where those take no
    more rounds: one at first, while the others' travel, and one at last, while what was found for
    those does. Else queries are joined.
    """
    # One program for all of as many tiles: to make one and to compile it takes a second.
    program = jax.jit(functools.partial(_kernel, count=count), static_argnames="tiles")
    run = functools.partial(program, k=(k.own, *k.others), v=(v.own, *v.others), place=q.place)
    tiles, blocks = q.rows // ROWS, q.own.shape[0] * q.heads
    if q.members * _rounds(tiles * blocks) > _ROUNDED * _rounds(q.members * tiles * blocks):
        found = run(jnp.concatenate((q.mine, *q.others), 1))
        return q.like(jnp.split(found, q.members, 1))
    half = _half(tiles, blocks)
    b, _, n, d = q.others[0].shape
    whole = lax.empty((b, q.rows, q.members * n, d), q.own.dtype)

    def of_own(first: int, end: int, into: Array) -> Array:
        start = jnp.array([first], jnp.int32)
        return run(q.own, start=start, tiles=end - first, into=into)

    found = [of_own(0, half, whole)]
    for part in q.others:
        found[-1], part = lax.optimization_barrier((found[-1], part))  # one after the other
        found.append(run(part))
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


def _attend_cudnn(q: Array, k: Array, v: Array, count: int) -> Array:
    whole = count == k.shape[1]
    return cudnn.attend(q, k, v) if whole else cudnn.attend_rows(q, k, v, count)


def _attend_parts_cudnn(q: Parts, k: Parts, v: Parts, count: int) -> Parts:
    return q.apart(_attend_cudnn(q.joined(), k.joined(), v.joined(), count))


def _passes(run: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and back of what is differentiated as run(q, k, v, count=...) is."""
    return (
        lambda q, k, v, count: jax.vjp(functools.partial(run, count=count), q, k, v),
        lambda count, back, out_cotangent: back(out_cotangent),
    )


attend.defvjp(*_passes(_attend_cudnn))
attend_parts.defvjp(*_passes(_attend_parts_cudnn))


class _Refs(NamedTuple):
    """What the kernel has in the GPU's memory: keys and values in parts, with a place if several.

    All may have more heads than those that are meant, but for parts of other members. start: the
    first tile of the queries that is meant, if not of all; only where there is a place.
    """

    q: Any
    k: Sequence[Any]
    v: Sequence[Any]
    out: Any
    place: Any = None
    start: Any = None

    def first(self, x: Any) -> Any:
        """The first head that is meant of those that x has."""
        return self.place[1] if x.shape[2] > self.k[-1].shape[2] else 0

    def tile(self, index: Any) -> Any:
        """That of a thread block."""
        return index if self.start is None else self.start[0] + index


def _kernel(
    q: Array,
    k: Sequence[Array],
    v: Sequence[Array],
    count: int,
    place: Array | None = None,
    *,
    start: Array | None = None,
    tiles: int | None = None,
    into: Array | None = None,
) -> Array:
    """The queries' attention to keys in parts.

    start: int32 [1], the first tile of 128 rows that it is found for; tiles: how many; None is all.
    into: [b, s, all members' heads, k], which is written into: what is not found it keeps.
    """
    (b, s, _, d), dtype, parts, n = q.shape, q.dtype, len(k), k[-1].shape[2]
    given = [q, *k, *v, *(x for x in (place, start) if x is not None)]
    layout = gpu.TilingTransform((8, 64)), gpu.SwizzleTransform(128)

    def shared(*shape: int) -> Any:
        return gpu.SMEM(shape, dtype, transforms=layout)

    def barriers(number: int, arrivals: int = 1) -> Any:
        return gpu.Barrier(num_arrivals=arrivals, num_barriers=number)

    def block(*refs: Any) -> None:
        q_ref, *rest, out = refs
        ours = _Refs(q_ref, rest[:parts], rest[parts : 2 * parts], out, *rest[2 * parts :])
        pl.run_scoped(
            lambda *memory: _run(ours, _Memory(*memory), count),
            shared(_GROUPS, _OWN, d),
            shared(_STAGES, _BLOCK, d),
            shared(_STAGES, _BLOCK, d),
            *(barriers(number) for number in (_GROUPS, _STAGES, _STAGES)),
            *(barriers(_STAGES, _GROUPS) for _ in range(2)),
            barriers(_GROUPS + 1),
            collective_axes=_GROUP,
        )

    options = gpu.CompilerParams(approx_math=True)
    threads: dict[str, Any] = {
        # Blocks at work at a time are of few heads, whose keys and values are then in the L2 cache.
        "grid": (n, s // ROWS if tiles is None else tiles, b),
        "grid_names": _GRID,
        "num_threads": _GROUPS + 1,
        "thread_name": _GROUP,
    }
    if into is None:
        out_type = jax.ShapeDtypeStruct((b, s, n, d), dtype)
        return gpu.kernel(block, out_type=out_type, compiler_params=options, **threads)(*given)
    out = jax.new_ref(into)  # gpu.kernel() of JAX 0.10 takes none; this has no rule for vmap
    pl.kernel(block, mesh=gpu.Mesh(**threads), compiler_params=options)(*given, out)
    return jax.freeze(out)


def _run(refs: _Refs, memory: _Memory, count: int) -> None:
    """What every warpgroup does."""
    head, tile, batch, group = (lax.axis_index(name) for name in (*_GRID, _GROUP))
    steps = -(-count // _BLOCK)

    @pl.when(group < _GROUPS)
    def _multiply() -> None:
        gpu.set_max_registers(_MANY, action="increase")
        own, first_row = memory.q.at[group], refs.tile(tile) * ROWS + group * _OWN

        def rows(x: Any) -> Any:
            return x.at[batch, pl.ds(first_row, _OWN), refs.first(x) + head]

        # Only the third warpgroup asks for parts: a branch here, and ptxas makes a fifth more
        # instructions of the loop, clearing sums by way of uniform registers.
        gpu.copy_gmem_to_smem(rows(refs.q), own, memory.q_there.at[group])
        gpu.barrier_wait(memory.q_there.at[group])
        result = functools.partial(_attend_all, own, memory, group, steps=steps, count=count)
        pl.run_scoped(result, gpu.ACC((_OWN, HEAD), jnp.float32))
        gpu.commit_smem()
        gpu.copy_smem_to_gmem(own, rows(refs.out))
        gpu.wait_smem_to_gmem(0)

    @pl.when(group == _GROUPS)
    def _bring() -> None:
        gpu.set_max_registers(_FEW, action="decrease")

        def copy(target: Any, there: Any, part: Any, step: Any) -> None:
            source = part.at[batch, pl.ds(step * _BLOCK, _BLOCK), refs.first(part) + head]
            gpu.copy_gmem_to_smem(source, target, there)

        def bring(step: Any, stage: Any, *, wait: bool) -> None:
            for parts, there, whole, free in (
                (refs.k, memory.k_there, memory.k, memory.k_free),
                (refs.v, memory.v_there, memory.v, memory.v_free),
            ):
                if wait:
                    gpu.barrier_wait(free.at[stage])
                to_stage = functools.partial(copy, whole.at[stage], there.at[stage])
                _in_part(to_stage, parts, step, refs.place)

        gpu.barrier_arrive(memory.turn.at[0])
        first_steps = min(_STAGES, steps)
        for step in range(first_steps):
            bring(step, step, wait=False)

        @pl.loop(first_steps, steps)
        def _(step: Array) -> None:
            bring(step, _stage(step), wait=True)


def _in_part(act: Callable[[Any, Any], None], parts: Sequence[Any], tile: Any, place: Any) -> None:
    """act(part, tile) with the part that a tile of 128 rows is in, and the tile there."""
    if len(parts) == 1:
        act(parts[0], tile)
        return
    tiles = parts[0].shape[1] // ROWS
    before = _over(lax.rem, place[0] - _over(lax.div, tile, tiles) + len(parts), len(parts))
    for i, part in enumerate(parts):
        pl.when(before == i)(functools.partial(act, part, _over(lax.rem, tile, tiles)))


def _attend_all(own: Any, memory: _Memory, group: Any, out: Any, *, steps: int, count: int) -> None:
    """A warpgroup's queries, in `own`, over all keys; the result takes their place.

    out: the accumulator [row, k] of the products with the values.
    """
    narrow = own.dtype

    def scores_of(score: Any, step: Any, weights: Array | None) -> Array:
        """Those of a block; of the one before, the product of its weights with the values."""
        gpu.barrier_wait(memory.k_there.at[_stage(step)])
        gpu.wgmma(score, own, memory.k.at[_stage(step)].transpose((1, 0)))
        if weights is None:
            return gpu.wgmma_accumulator_load(score, wait_n=0)
        gpu.barrier_wait(memory.v_there.at[_stage(step - 1)])
        gpu.wgmma(out, weights, memory.v.at[_stage(step - 1)])
        return gpu.wgmma_accumulator_load(score, wait_n=1)  # the product goes on

    def scores(step: Any, weights: Array | None) -> Array:
        run = functools.partial(scores_of, step=step, weights=weights)
        found = pl.run_scoped(run, gpu.ACC((_OWN, _BLOCK), jnp.float32))
        gpu.barrier_arrive(memory.k_free.at[_stage(step)])
        return found

    def follow(step: Any, before: Softmax, *, real: int = _BLOCK) -> Softmax:
        *rows, weights = before
        found = scores(step, weights)
        best, total, fade, weights = _softmax(found, *rows, real=real, dtype=narrow)
        done = gpu.wgmma_accumulator_load(out, wait_n=0)
        gpu.barrier_arrive(memory.v_free.at[_stage(step - 1)])
        out[...] = done * _over_rows(fade, done)
        return best, total, weights

    last = count - (steps - 1) * _BLOCK  # keys of the last block
    none = (
        gpu.layout_cast(jnp.full((_OWN,), x), gpu.Layout.WGMMA.reduce(1)) for x in (_LOWEST, 0.0)
    )
    real = last if steps == 1 else _BLOCK
    # One begins when the other has its first weights, and then they stay so: side by side they wait
    # for the tensor cores together, and which it is chance would decide (3 % of the time).
    gpu.barrier_wait(memory.turn.at[group])
    best, total, _, weights = _softmax(scores(0, None), *none, real=real, dtype=narrow)
    gpu.barrier_arrive(memory.turn.at[group + 1])
    state = best, total, weights
    if steps > 1:
        state = lax.fori_loop(1, steps - 1, follow, state)
        state = follow(jnp.int32(steps - 1), state, real=last)
    _, total, weights = state
    gpu.barrier_wait(memory.v_there.at[_stage(steps - 1)])
    gpu.wgmma(out, weights, memory.v.at[_stage(steps - 1)])
    done = gpu.wgmma_accumulator_load(out, wait_n=0)
    own[...] = (done * _over_rows(1.0 / total, done)).astype(narrow)


def _softmax(
    scores: Array, best: Array, total: Array, *, real: int, dtype: jnp.dtype
) -> tuple[Array, Array, Array, Array]:
    """(largest score of each row so far, sum, what is left of the sums before, weights).

    Of scores [row, key] before they are scaled, of which so many columns are real. Powers are of 2.
    """
    if real < _BLOCK:
        columns = gpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=gpu.Layout.WGMMA)
        scores = jnp.where(columns < real, scores, _LOWEST)
    scale = math.log2(math.e) / math.sqrt(HEAD)
    top = jnp.maximum(best, jnp.max(scores, axis=1) * scale)
    fade = jnp.exp2(best - top)
    weights = jnp.exp2(scores * scale - _over_rows(top, scores))
    return top, total * fade + jnp.sum(weights, axis=1), fade, weights.astype(dtype)


def _over_rows(x: Array, like: Array) -> Array:
    return lax.broadcast_in_dim(x, like.shape, [0])


def _stage(step: Any) -> Any:
    return _over(lax.rem, step, _STAGES)


def _over(divide: Callable[[Any, Any], Any], x: Any, by: int) -> Any:
    """lax.div or lax.rem of an index that is not negative, traced or not."""
    if isinstance(x, int):
        return x // by if divide is lax.div else x % by
    return divide(x, jnp.array(by, x.dtype))
