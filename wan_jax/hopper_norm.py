"""Sums and norms of the residual stream on Hopper, in one pass, in Pallas for Mosaic GPU.

A row is as wide as the network, no power of two; XLA, which fills it up to one, takes a third to a
half longer (benchmarks/residual.py). Here a warpgroup, which is a thread block, holds a row in
registers from the time it is read until its norm is written. That memory is never idle is the doing
of the other thread blocks of a multiprocessor, of which there is room for three with rows of 5120:
60 KB of the stream alone on their way. So a block has but two rows; with eight it takes longer. The
gates, of which all rows have the same, stay in the L1 cache.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from wan_jax import xla

Array = jax.Array
Part = tuple[Array | None, Array]  # gate, float32 [b, 1, d], None is 1; y [b, l, d] in 16 bits

ROWS = 2  # of a thread block; lengths must be multiples
_VECTOR = 4  # neighbours that a thread reads at a time: 16 bytes of the stream
_WIDTH = 128 * _VECTOR  # what a warpgroup reads at a time; widths must be multiples
_WIDEST = 6144  # of a row in a warpgroup's registers
# A thread block's place. Names of a mesh's axes would mean its devices.
_GRID = ("norm_tile", "norm_batch")


class _Refs(NamedTuple):
    """Where a thread block reads and writes."""

    h: Any  # [b, l, d] float32
    parts: list[Any]  # [b, l, d] in 16 bits
    vectors: Any  # [b, number, d] float32: scale and shift of the norm, and the gates
    out: Any  # the norm
    total: Any  # the sum, None if nobody wants it


def fits(h: Array, dtype: jnp.dtype) -> bool:
    """Whether add_and_norm() takes h [b, l, d] and parts in dtype, on the device traced for."""
    rows, width = h.shape[1] % ROWS == 0, h.shape[2] % _WIDTH == 0 and h.shape[2] <= _WIDEST
    dtypes = h.dtype == jnp.float32 and dtype == jnp.bfloat16
    return xla.on_hopper() and rows and width and h.size > 0 and dtypes


def add_and_norm(
    h: Array, parts: Sequence[Part], scale: Array, shift: Array, *, eps: float, keep: bool
) -> tuple[Array, Array | None]:
    """(layer_norm(sum) * scale + shift in the parts' 16 bits, the sum) of h + every gate * y.

    scale, shift: float32 [b or 1, 1, d]. keep: whether the sum is wanted, float32; else None.
    """
    b, length, d = h.shape
    gates = [gate for gate, _ in parts]
    # Computed, and one array: XLA would make the kernel a part of a fusion with slices of others.
    given = [scale, shift, *(gate for gate in gates if gate is not None)]
    vectors = jnp.concatenate([jnp.broadcast_to(vector, (b, 1, d)) for vector in given], axis=1)

    def block(h_ref: Any, vectors_ref: Any, *rest: Any) -> None:
        total_ref = rest[-1] if keep else None
        refs = _Refs(h_ref, list(rest[: len(gates)]), vectors_ref, rest[len(gates)], total_ref)
        _run(refs, [gate is not None for gate in gates], eps)

    wide = [jax.ShapeDtypeStruct(h.shape, jnp.float32)] if keep else []
    out, *total = gpu.kernel(
        block,
        out_type=[jax.ShapeDtypeStruct(h.shape, jnp.bfloat16), *wide],
        grid=(length // ROWS, b),
        grid_names=_GRID,
        # No memory is both read and written.
        compiler_params=gpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(h, vectors, *(y for _, y in parts))
    return out, total[0] if keep else None


def _run(refs: _Refs, gated: Sequence[bool], eps: float) -> None:
    """What a thread block does; gated: which of the parts have a gate."""
    tile, batch = (lax.axis_index(name) for name in _GRID)

    @pl.loop(0, ROWS)
    def _(number: Array) -> None:
        place = batch, tile * ROWS + number
        # All that comes from afar is asked for before anything is waited for.
        total, *parts = (_row(ref, *place) for ref in (refs.h, *refs.parts))
        gate = itertools.count(2)
        for has_gate, y in zip(gated, parts, strict=True):
            wide = y.astype(jnp.float32)
            total += wide * _row(refs.vectors, batch, next(gate)) if has_gate else wide
        if refs.total is not None:
            refs.total[place] = total
        width = total.shape[0]
        centred = total - jnp.sum(total) / width
        root = lax.rsqrt(jnp.sum(centred * centred) / width + eps)
        scale, shift = (_row(refs.vectors, batch, i) for i in range(2))
        refs.out[place] = (centred * root * scale + shift).astype(refs.out.dtype)


def _row(ref: Any, batch: Any, number: Any) -> Array:
    """A row in registers."""
    row = ref[batch, number]
    return gpu.layout_cast(row, gpu.Layout.WG_STRIDED(row.shape, vec_size=_VECTOR))
