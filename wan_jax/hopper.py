"""Attention on Hopper by a kernel of our own, in Pallas for Mosaic GPU: 16 bits, heads of 128.

A thread block has 128 queries of a head: 64 for each of two warpgroups, which multiply, while a
third has the keys and values brought to shared memory, block by block. A warpgroup gives the tensor
cores the scores of a block and, behind them, the product of the block before with its values; while
that is at work it takes the softmax of the scores, online as FlashAttention does. Keys that are not
real have no weight at all, so there is nothing to make good as behind cuDNN's kernel without a
mask. Source of the scheme: FlashAttention-3 (arXiv 2407.08608), its overlap inside a warpgroup; to
let the two take turns as well is slower here.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from wan_jax import cudnn, xla

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


def fits(q: Array, k: Array) -> bool:
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
    return _kernel(q, k, v, count)


def _attend_cudnn(q: Array, k: Array, v: Array, count: int) -> Array:
    whole = count == k.shape[1]
    return cudnn.attend(q, k, v) if whole else cudnn.attend_rows(q, k, v, count)


attend.defvjp(
    lambda q, k, v, count: jax.vjp(functools.partial(_attend_cudnn, count=count), q, k, v),
    lambda count, back, out_cotangent: back(out_cotangent),
)


def _kernel(q: Array, k: Array, v: Array, count: int) -> Array:
    (b, s, n, d), dtype = q.shape, q.dtype
    layout = gpu.TilingTransform((8, 64)), gpu.SwizzleTransform(128)

    def shared(*shape: int) -> Any:
        return gpu.SMEM(shape, dtype, transforms=layout)

    def barriers(number: int, arrivals: int = 1) -> Any:
        return gpu.Barrier(num_arrivals=arrivals, num_barriers=number)

    def block(q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any) -> None:
        pl.run_scoped(
            lambda *memory: _run(q_ref, k_ref, v_ref, out_ref, _Memory(*memory), count),
            shared(_GROUPS, _OWN, d),
            shared(_STAGES, _BLOCK, d),
            shared(_STAGES, _BLOCK, d),
            *(barriers(number) for number in (_GROUPS, _STAGES, _STAGES)),
            *(barriers(_STAGES, _GROUPS) for _ in range(2)),
            collective_axes=_GROUP,
        )

    return gpu.kernel(
        block,
        out_type=jax.ShapeDtypeStruct(q.shape, dtype),
        # Blocks at work at a time are of few heads, whose keys and values are then in the L2 cache.
        grid=(n, s // ROWS, b),
        grid_names=_GRID,
        num_threads=_GROUPS + 1,
        thread_name=_GROUP,
        compiler_params=gpu.CompilerParams(approx_math=True),
    )(q, k, v)


def _run(q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, memory: _Memory, count: int) -> None:
    """What every warpgroup does."""
    head, tile, batch, group = (lax.axis_index(name) for name in (*_GRID, _GROUP))
    steps = -(-count // _BLOCK)

    @pl.when(group < _GROUPS)
    def _multiply() -> None:
        gpu.set_max_registers(_MANY, action="increase")
        own = memory.q.at[group]
        place = batch, pl.ds(tile * ROWS + group * _OWN, _OWN), head
        gpu.copy_gmem_to_smem(q_ref.at[place], own, memory.q_there.at[group])
        gpu.barrier_wait(memory.q_there.at[group])
        result = functools.partial(_attend_all, own, memory, steps=steps, count=count)
        pl.run_scoped(result, gpu.ACC((_OWN, HEAD), jnp.float32))
        gpu.commit_smem()
        gpu.copy_smem_to_gmem(own, out_ref.at[place])
        gpu.wait_smem_to_gmem(0)

    @pl.when(group == _GROUPS)
    def _bring() -> None:
        gpu.set_max_registers(_FEW, action="decrease")

        def bring(step: Any, stage: Any, *, wait: bool) -> None:
            place = batch, pl.ds(step * _BLOCK, _BLOCK), head
            for ref, there, whole, free in (
                (k_ref, memory.k_there, memory.k, memory.k_free),
                (v_ref, memory.v_there, memory.v, memory.v_free),
            ):
                if wait:
                    gpu.barrier_wait(free.at[stage])
                gpu.copy_gmem_to_smem(ref.at[place], whole.at[stage], there.at[stage])

        first = min(_STAGES, steps)
        for step in range(first):
            bring(step, step, wait=False)

        @pl.loop(first, steps)
        def _(step: Array) -> None:
            bring(step, _stage(step), wait=True)


def _attend_all(own: Any, memory: _Memory, out: Any, *, steps: int, count: int) -> None:
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
    best, total, _, weights = _softmax(scores(0, None), *none, real=real, dtype=narrow)
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
    if isinstance(step, int):
        return step % _STAGES
    return lax.rem(step, jnp.array(_STAGES, step.dtype))
