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
from wan_jax.partials import LOWEST, Partial

Array = jax.Array
Softmax = tuple[Array, Array, Array]  # largest score and sum of each row so far, and the weights

ROWS = 128  # of a thread block; lengths must be multiples
HEAD = 128  # their width
_GROUPS = 2  # warpgroups that multiply
_OWN = ROWS // _GROUPS  # queries of each
_BLOCK = 128  # keys at a time
_STAGES = 2  # blocks in shared memory
# Registers of a thread: 64 scores, 64 sums of the result, 32 weights and what else there is.
_MANY, _FEW = 240, 24
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
    weight: Any = None  # [group, row]


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
    return kernel(q, (k,), (v,), count)[0]


def attend_with_weight(
    q: Array, k: Array, v: Array, *, count: Array | int | None = None
) -> Partial:
    """As attention.partial_attention(), without a gradient.

    Of no keys comes what is finite, with a weight by which it is nothing beside others.
    """
    # Where the count is known and the weight is asked for, ptxas makes a fifth more of the loop.
    return _with_weight(q, k, v, jnp.asarray(k.shape[1] if count is None else count, jnp.int32))


@jax.jit
def _with_weight(q: Array, k: Array, v: Array, count: Array) -> Partial:
    """A program of its own, so that shares of as many keys are traced and compiled once."""
    out, weight = kernel(q, (k,), (v,), count, weigh=True)
    return out, weight.swapaxes(1, 2)


def passes(run: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and back of what is differentiated as run(q, k, v, count=...) is."""
    return (
        lambda q, k, v, count: jax.vjp(functools.partial(run, count=count), q, k, v),
        lambda count, back, out_cotangent: back(out_cotangent),
    )


attend.defvjp(*passes(cudnn.attend))


class _Refs(NamedTuple):
    """What the kernel has in the GPU's memory: keys and values in parts, with a place if several.

    All may have more heads than those that are meant, but for parts of other members. start: the
    first tile of the queries that is meant, if not of all; only where there is a place. count: of
    keys, if not known before.
    """

    q: Any
    k: Sequence[Any]
    v: Sequence[Any]
    out: Any
    weight: Any = None
    place: Any = None
    start: Any = None
    count: Any = None

    def first(self, x: Any) -> Any:
        """The first head that is meant of those that x has."""
        return self.place[1] if x.shape[2] > self.k[-1].shape[2] else 0

    def tile(self, index: Any) -> Any:
        """That of a thread block."""
        return index if self.start is None else self.start[0] + index


def kernel(
    q: Array,
    k: Sequence[Array],
    v: Sequence[Array],
    count: Array | int,
    place: Array | None = None,
    *,
    start: Array | None = None,
    tiles: int | None = None,
    into: Array | None = None,
    weigh: bool = False,
) -> tuple[Array, ...]:
    """The queries' attention to keys in parts, of which so many are real.

    start: int32 [1], the first tile of 128 rows that it is found for; tiles: how many; None is all.
    into: [b, s, all members' heads, k], which is written into: what is not found it keeps. weigh:
    the weight comes, too, as [b, n, s], but not with what is written into.
    """
    assert into is None or not weigh
    (b, s, _, d), dtype, parts, n = q.shape, q.dtype, len(k), k[-1].shape[2]
    known = count if isinstance(count, int) else None
    numbers = {"place": place, "start": start}
    numbers["count"] = None if known is not None else jnp.asarray(count, jnp.int32).reshape(1)
    numbers = {name: x for name, x in numbers.items() if x is not None}
    given = [q, *k, *v, *numbers.values()]
    types = [jax.ShapeDtypeStruct((b, s, n, d), dtype)]
    types += [jax.ShapeDtypeStruct((b, n, s), jnp.float32)] * weigh

    def block(*refs: Any) -> None:
        q_ref, *rest = refs[: len(given)]
        told = dict(zip(numbers, rest[2 * parts :], strict=True))
        ours = _Refs(q_ref, rest[:parts], rest[parts : 2 * parts], *refs[len(given) :], **told)
        pl.run_scoped(
            lambda *memory: _run(ours, _Memory(*memory), known),
            *_memory(d, dtype, weigh=weigh),
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
        made = gpu.kernel(block, out_type=tuple(types), compiler_params=options, **threads)
        return tuple(made(*given))
    out = jax.new_ref(into)  # gpu.kernel() of JAX 0.10 takes none; this has no rule for vmap
    pl.kernel(block, mesh=gpu.Mesh(**threads), compiler_params=options)(*given, out)
    return (jax.freeze(out),)


def _memory(d: int, dtype: jnp.dtype, *, weigh: bool) -> list[Any]:
    """The fields of _Memory, as they are asked for."""
    layout = gpu.TilingTransform((8, 64)), gpu.SwizzleTransform(128)

    def shared(*shape: int) -> Any:
        return gpu.SMEM(shape, dtype, transforms=layout)

    def barriers(number: int, arrivals: int = 1) -> Any:
        return gpu.Barrier(num_arrivals=arrivals, num_barriers=number)

    return [
        shared(_GROUPS, _OWN, d),
        shared(_STAGES, _BLOCK, d),
        shared(_STAGES, _BLOCK, d),
        *(barriers(number) for number in (_GROUPS, _STAGES, _STAGES)),
        *(barriers(_STAGES, _GROUPS) for _ in range(2)),
        barriers(_GROUPS + 1),
        *[gpu.SMEM((_GROUPS, _OWN), jnp.float32)] * weigh,
    ]


def _run(refs: _Refs, memory: _Memory, known: int | None) -> None:
    """What every warpgroup does; known: how many keys are real, if that is known before."""
    head, tile, batch, group = (lax.axis_index(name) for name in (*_GRID, _GROUP))
    count = refs.count[0] if known is None else known
    steps = _steps(count, sum(part.shape[1] for part in refs.k) // _BLOCK)

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
        if refs.weight is not None:
            weight = refs.weight.at[batch, head, pl.ds(first_row, _OWN)]
            gpu.copy_smem_to_gmem(memory.weight.at[group], weight)
        gpu.wait_smem_to_gmem(0)

    @pl.when(group == _GROUPS)
    def _bring_all() -> None:
        gpu.set_max_registers(_FEW, action="decrease")
        gpu.barrier_arrive(memory.turn.at[0])
        bring = functools.partial(_bring, refs, memory, batch, head)
        first_steps = min(_STAGES, steps) if isinstance(steps, int) else _STAGES
        for step in range(first_steps):
            bring(step, step, wait=False)

        @pl.loop(first_steps, steps)
        def _(step: Array) -> None:
            bring(step, _stage(step), wait=True)


def _steps(count: Any, blocks: int) -> Any:
    """Of how many blocks keys are taken, of as many as there are.

    Two at least if their count is known by the kernel alone, though one has none then: the program
    has a first, a last, and what is between.
    """
    if isinstance(count, int):
        return -(-count // _BLOCK)
    return 1 if blocks == 1 else jnp.maximum(_over(lax.div, count + (_BLOCK - 1), _BLOCK), 2)


def _bring(
    refs: _Refs, memory: _Memory, batch: Any, head: Any, step: Any, stage: Any, *, wait: bool
) -> None:
    """A block of keys and of values to shared memory; wait: until what is there is done with."""

    def copy(target: Any, there: Any, part: Any, step: Any) -> None:
        source = part.at[batch, pl.ds(step * _BLOCK, _BLOCK), refs.first(part) + head]
        gpu.copy_gmem_to_smem(source, target, there)

    for parts, there, whole, free in (
        (refs.k, memory.k_there, memory.k, memory.k_free),
        (refs.v, memory.v_there, memory.v, memory.v_free),
    ):
        if wait:
            gpu.barrier_wait(free.at[stage])
        to_stage = functools.partial(copy, whole.at[stage], there.at[stage])
        _in_part(to_stage, parts, step, refs.place)


def _in_part(act: Callable[[Any, Any], None], parts: Sequence[Any], tile: Any, place: Any) -> None:
    """act(part, tile) with the part that a tile of 128 rows is in, and the tile there."""
    if len(parts) == 1:
        act(parts[0], tile)
        return
    tiles = parts[0].shape[1] // ROWS
    before = _over(lax.rem, place[0] - _over(lax.div, tile, tiles) + len(parts), len(parts))
    for i, part in enumerate(parts):
        pl.when(before == i)(functools.partial(act, part, _over(lax.rem, tile, tiles)))


def _attend_all(own: Any, memory: _Memory, group: Any, out: Any, *, steps: Any, count: Any) -> None:
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

    def follow(step: Any, before: Softmax, *, real: Any = _BLOCK) -> Softmax:
        *rows, weights = before
        found = scores(step, weights)
        best, total, fade, weights = _softmax(found, *rows, real=real, dtype=narrow)
        done = gpu.wgmma_accumulator_load(out, wait_n=0)
        gpu.barrier_arrive(memory.v_free.at[_stage(step - 1)])
        out[...] = done * _over_rows(fade, done)
        return best, total, weights

    first, last = count, count - (steps - 1) * _BLOCK  # so many keys, if not more than a block has
    none = (
        gpu.layout_cast(jnp.full((_OWN,), x), gpu.Layout.WGMMA.reduce(1)) for x in (LOWEST, 0.0)
    )
    # One begins when the other has its first weights, and then they stay so: side by side they wait
    # for the tensor cores together, and which it is chance would decide (3 % of the time).
    gpu.barrier_wait(memory.turn.at[group])
    best, total, _, weights = _softmax(scores(0, None), *none, real=first, dtype=narrow)
    gpu.barrier_arrive(memory.turn.at[group + 1])
    state = best, total, weights
    if not isinstance(steps, int) or steps > 1:
        state = lax.fori_loop(1, steps - 1, follow, state)
        state = follow(jnp.asarray(steps - 1, jnp.int32), state, real=last)
    best, total, weights = state
    gpu.barrier_wait(memory.v_there.at[_stage(steps - 1)])
    gpu.wgmma(out, weights, memory.v.at[_stage(steps - 1)])
    done = gpu.wgmma_accumulator_load(out, wait_n=0)
    own[...] = (done * _over_rows(1.0 / total, done)).astype(narrow)
    if memory.weight is not None:
        memory.weight.at[group][...] = (best + jnp.log2(total)) * math.log(2)


def _softmax(
    scores: Array, best: Array, total: Array, *, real: Any, dtype: jnp.dtype
) -> tuple[Array, Array, Array, Array]:
    """(largest score of each row so far, sum, what is left of the sums before, weights).

    Of scores [row, key] before they are scaled, of which so many columns are real. Powers are of 2.
    """
    if not isinstance(real, int) or real < _BLOCK:
        columns = gpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=gpu.Layout.WGMMA)
        scores = jnp.where(columns < real, scores, LOWEST)
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
