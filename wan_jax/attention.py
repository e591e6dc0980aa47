"""softmax(q k^T / sqrt(k)) v, by the fastest kernel that the platform has.

Callers pass arrays of the true length, or with rows to spare and the count of the real ones. What
a kernel wants in multiples is padded and cut here. No such row counts in a result: it is not in the
softmax (hopper.py), or divided out of it (cudnn.py), but of 8 bits has a weight that is told in
fp8.py.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wan_jax import cudnn, fp8, xla
from wan_jax.layers import pad, precision_of
from wan_jax.partials import LOWEST, Partial
from wan_jax.parts import Parts

Array = jax.Array
Shaped = Array | jax.ShapeDtypeStruct
WEIGHED = ("hopper", "cudnn", "splash", "chunked")  # those that partial_attention() has, too
IMPLEMENTATIONS = (*WEIGHED, "cudnn_fp8", "chunked_fp8")

# Scores held at once by the chunked form: 2^24 float32 values are 64 MiB.
_CHUNK_ELEMENTS = 2**24
_CHUNK_KEYS = 1024


class _Tiles(NamedTuple):
    """The largest tiles of the TPU kernel, in rows, and how many keys of a tile it scores at once.

    It holds the scores of a tile of queries with those keys in VMEM, float32, and a few more such.
    """

    queries: int
    keys: int
    at_once: int


# These fit the 16 MiB that v5e gives a kernel by default, in float32 too.
_SMALL_TILES = _Tiles(1024, 1024, 1024)
# MaxDiffusion's for Wan; 75,600 queries are 25 tiles. They fit what v6e and v7x give by default
# and what xla.py asks for on v5p. Kinds have two names each.
_LARGE_TILES = _Tiles(3024, 2048, 1024)
_TILES = dict.fromkeys(("TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e", "TPU7x"), _LARGE_TILES)
_LANES = 128
_ROW_TILE, _TILED = 128, 8192  # see row_tile()
_ROWS = 16  # of the smallest bfloat16 tile that the hardware has


def attention(
    q_bsnk: Array,
    k_bsnk: Array,
    v_bsnk: Array,
    *,
    count: int | None = None,
    implementation: str | None = None,
    in_fp8: bool = False,
) -> Array:
    """Dense attention of q [b, s, n, k] over k and v [b, s', n, k], in the dtype of q.

    count: the first so many keys are real, at least one, and the rows behind them, of which any
    finite numbers may be left, are not attended to; None is all. row_tile() says when such rows
    pay. implementation: None picks, for 16 bits on NVIDIA, our own kernel for Hopper ("hopper") at
    the lengths of videos that fit it, and cuDNN's at others; on TPU the Pallas flash kernel
    ("splash") for bfloat16; and the memory-bounded "chunked" form for all else. A named one runs or
    raises: ValueError for an unknown name or operands it does not take. in_fp8: where none is
    named, both products multiply 8 bits: "cudnn_fp8" on NVIDIA, as far as the heads' width fits it,
    and "chunked_fp8", which rounds as it does, elsewhere.
    """
    name = _checked(q_bsnk, k_bsnk, v_bsnk, implementation, in_fp8=in_fp8)
    if name == "hopper":
        from wan_jax import hopper

        return hopper.attend(q_bsnk, k_bsnk, v_bsnk, k_bsnk.shape[1] if count is None else count)
    if name == "cudnn":
        return cudnn.attend(q_bsnk, k_bsnk, v_bsnk, count)
    if count is not None:
        k_bsnk, v_bsnk = k_bsnk[:, :count], v_bsnk[:, :count]
    if name == "splash":
        return _splash(q_bsnk, k_bsnk, v_bsnk, weigh=False)[0]
    if name == "chunked":
        return _chunked(q_bsnk, k_bsnk, v_bsnk)[0]
    return _fp8(q_bsnk, k_bsnk, v_bsnk, fp8.cudnn_attention if name == "cudnn_fp8" else _fp8_chunks)


def attention_in_parts(
    q: Parts,
    k: Parts,
    v: Parts,
    *,
    count: int | None = None,
    implementation: str | None = None,
    in_fp8: bool = False,
) -> Parts:
    """attention() of what has come together in parts, and its result in such.

    In its `own` only the heads that are meant have a value, of as many as all members have.
    """
    options: dict[str, Any] = {"implementation": implementation, "in_fp8": in_fp8}
    name = _checked(q.whole, k.whole, v.whole, **options)
    if name == "hopper":
        from wan_jax import hopper, hopper_parts

        if all(x.rows % hopper.ROWS == 0 for x in (q, k)):
            return hopper_parts.attend(q, k, v, k.whole.shape[1] if count is None else count)
    joined = (x.joined() for x in (q, k, v))
    return q.apart(attention(*joined, count=count, **options))


def partial_attention(
    q_bsnk: Array,
    k_bsnk: Array,
    v_bsnk: Array,
    *,
    count: Array | int | None = None,
    implementation: str | None = None,
) -> Partial:
    """attention() over some of the keys, and its weight, to be joined by partials.merge().

    count: so many keys are real and the rest are not attended to; None is all of them. It may be 0.
    """
    name = _checked(q_bsnk, k_bsnk, v_bsnk, implementation, weighed=True)
    out, weight = _weighing(name)(q_bsnk, k_bsnk, v_bsnk, count=count)
    if count is None or name == "hopper":  # of no keys its weight is low enough
        return out, weight
    some = jnp.asarray(count) > 0  # kernels give anything for no keys at all
    return jnp.where(some, out, 0), jnp.where(some, weight, LOWEST)


def _weighing(name: str) -> Callable[..., Partial]:
    """What gives the weight, too."""
    if name == "hopper":
        from wan_jax import hopper

        return hopper.attend_with_weight
    return {"cudnn": cudnn.attend_with_weight, "splash": _splash, "chunked": _chunked}[name]


def counted_attention(q_bsnk: Array, k_bsnk: Array, v_bsnk: Array, log_count: Array) -> Array:
    """attention() over keys of which the last is there several times; for few keys, in plain XLA.

    log_count: float32, the logarithm of how often. All scores are held at once.
    """
    _checked(q_bsnk, k_bsnk, v_bsnk, "chunked")
    product = functools.partial(
        jnp.einsum, precision=precision_of(q_bsnk.dtype), preferred_element_type=jnp.float32
    )
    scores = product("bsnk,btnk->bnst", q_bsnk, k_bsnk) * (1.0 / math.sqrt(q_bsnk.shape[-1]))
    weights = jax.nn.softmax(scores.at[..., -1].add(log_count), axis=-1).astype(v_bsnk.dtype)
    return product("bnst,btnk->bsnk", weights, v_bsnk).astype(q_bsnk.dtype)


def _checked(
    q_bsnk: Shaped,
    k_bsnk: Shaped,
    v_bsnk: Shaped,
    implementation: str | None,
    *,
    weighed: bool = False,
    in_fp8: bool = False,
) -> str:
    """The implementation to run; ValueError if it cannot."""
    shapes = q_bsnk.shape, k_bsnk.shape, v_bsnk.shape
    (b, _, n, d), (bk, s, nk, dk), _ = shapes
    if (b, n, d) != (bk, nk, dk) or shapes[1] != shapes[2] or s == 0:
        raise ValueError(f"q, k, v of shapes {shapes} do not fit; [b, s, n, k] is needed")
    if not q_bsnk.dtype == k_bsnk.dtype == v_bsnk.dtype:
        raise ValueError(f"q, k, v are {q_bsnk.dtype}, {k_bsnk.dtype}, {v_bsnk.dtype}; need one")
    known = WEIGHED if weighed else IMPLEMENTATIONS
    name = implementation or _pick(q_bsnk, k_bsnk, weighed=weighed, in_fp8=in_fp8)
    if name not in known:
        raise ValueError(f"implementation is {name!r}; one of {known} is needed")
    if name == "hopper" and not _fits_hopper(q_bsnk, k_bsnk):
        raise ValueError(
            f"implementation 'hopper' has {q_bsnk.dtype} of {shapes} on {xla.traced_for().kind}; "
            "16 bits, multiples of 128 rows and heads of 128 on an H100 or H200 are needed"
        )
    if name.startswith("cudnn"):
        _check_cudnn(q_bsnk, name)
    if name == "splash" and q_bsnk.dtype == jnp.float16:
        raise ValueError("implementation 'splash' is given float16, which Mosaic does not load")
    return name


def is_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of jax.checkpoint that keeps the output of cuDNN's forward kernel, nothing else."""
    return str(primitive.name).startswith("dot_product_attention_fwd")


def row_tile(length: int, dtype: jnp.dtype) -> int:
    """Of how many rows a video of this length is best given a multiple, in attention and products.

    On an H200 cuDNN's attention is 8 % faster at multiples of 128, and a product of 32,768 rows
    faster by a third than one of 32,760; short videos would get too many rows for it.
    """
    narrow = dtype in (jnp.bfloat16, jnp.float16)
    on_nvidia = narrow and xla.on_nvidia() and length >= _TILED
    return _ROW_TILE if on_nvidia else 1


def _pick(q: Shaped, k: Shaped, *, weighed: bool, in_fp8: bool) -> str:
    platform = xla.traced_for().platform
    if in_fp8 and (platform != "gpu" or _fits_fp8(q)):
        return "cudnn_fp8" if platform == "gpu" else "chunked_fp8"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return "chunked"
    tpu_kernel = "splash" if q.dtype == jnp.bfloat16 else "chunked"
    # With a weight it is faster than cuDNN's, as measured from 2,048 rows on.
    own = (weighed or min(q.shape[1], k.shape[1]) >= _TILED) and _fits_hopper(q, k)
    gpu_kernel = "hopper" if own else _gpu_kernel(q)
    return {"gpu": gpu_kernel, "tpu": tpu_kernel}.get(platform, "chunked")


def _gpu_kernel(q: Shaped) -> str:
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return "cudnn" if fits and xla.on_nvidia() else "chunked"


def _fits_hopper(q: Shaped, k: Shaped) -> bool:
    if not xla.on_nvidia():
        return False
    from wan_jax import hopper

    return hopper.fits(q, k)


def _fits_fp8(q: Shaped) -> bool:
    return q.shape[-1] % 16 == 0 and q.shape[-1] <= 128


def _check_cudnn(q: Shaped, name: str) -> None:
    platform = xla.traced_for().platform
    if platform != "gpu":
        raise ValueError(f"implementation {name!r} needs an NVIDIA GPU, this is {platform}")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"implementation {name!r} needs bfloat16 or float16, got {q.dtype}")
    if name == "cudnn_fp8" and not _fits_fp8(q):
        raise ValueError(
            f"implementation {name!r} has heads of width {q.shape[-1]}; a multiple of 16, at most "
            "128, is needed"
        )


def _tiles(queries: int, keys: int, dtype: jnp.dtype) -> _Tiles:
    """The tiles for so many rows, by the kind of device that the program is for."""
    narrow = dtype == jnp.bfloat16
    most = _TILES.get(xla.traced_for().kind, _SMALL_TILES) if narrow else _SMALL_TILES
    if keys <= most.at_once:
        block = at_once = -(-keys // _LANES) * _LANES
    else:
        parts = most.keys // most.at_once
        block = _least_padding(keys, most.keys, _LANES * parts)
        at_once = block if block <= most.at_once else block // parts
    return _Tiles(_least_padding(queries, most.queries, _ROWS), block, at_once)


def _least_padding(length: int, most: int, multiple: int) -> int:
    """The tile of at least half of `most` rows that pads a length least; of equals the largest."""
    if length <= most:
        return -(-length // multiple) * multiple
    sizes = range(most, most // 2 - 1, -multiple)
    return min(sizes, key=lambda size: -length % size)


def _splash(
    q: Array, k: Array, v: Array, *, count: Array | int | None = None, weigh: bool = True
) -> tuple[Array, Any]:
    """Pallas flash attention for TPU (jax.experimental.pallas.ops.tpu.splash_attention)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

    (_, s, n, d), keys = q.shape, k.shape[1]
    block_q, block_k, at_once = _tiles(s, keys, q.dtype)
    scale = jnp.asarray(1.0 / math.sqrt(d), jnp.float32)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel does not scale
    q, k, v = (
        pad(pad(x, 1, block), 3, _LANES).swapaxes(1, 2)
        for x, block in ((q, block_q), (k, block_k), (v, block_k))
    )
    run = kernel.make_splash_mha(
        mask=mask.MultiHeadMask([mask.FullMask((q.shape[2], k.shape[2]))] * n),
        block_sizes=kernel.BlockSizes(block_q=block_q, block_kv=block_k, block_kv_compute=at_once),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=weigh,  # then there is no gradient
    )
    segments = None
    if count is not None or k.shape[2] != keys:
        # Real queries and keys are segment 0, padded keys segment 1.
        real = keys if count is None else count
        padded = (jnp.arange(k.shape[2]) >= real).astype(jnp.int32)
        segments = kernel.SegmentIds(q=jnp.zeros((q.shape[2],), jnp.int32), kv=padded)
    # The kernel takes the global precision, and Mosaic compiles no bfloat16 product at "highest".
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        found = jax.vmap(functools.partial(run, segment_ids=segments))(q, k, v)
    out, weight = (found[0], found[1][0].swapaxes(1, 2)[:, :s]) if weigh else (found, None)
    return out.swapaxes(1, 2)[:, :s, :, :d], weight


def _fp8(q: Array, k: Array, v: Array, run: Callable[[fp8.Operands], Array]) -> Array:
    """Attention of 8 bits by what gives it in the scale of v."""
    operands = fp8.attention_operands(q, k, v)
    return operands.restored(run(operands)[:, : q.shape[1]], q.dtype)


def _fp8_chunks(operands: fp8.Operands) -> Array:
    """What fp8.cudnn_attention() gives, rounded where it rounds, by products of float32."""
    # XLA on a GPU takes what is rounded and widened again for what it was before.
    q, k, v = (x.widened(jnp.float32) for x in lax.optimization_barrier(operands[:3]))
    out, _ = _chunked(q, k, v, rounded=fp8.attention_weights)
    return fp8.saturated(out / operands.v.scale)


def _chunked(
    q: Array,
    k: Array,
    v: Array,
    *,
    count: Array | int | None = None,
    rounded: Callable[[Array], Array] | None = None,
) -> tuple[Array, Array]:
    """Online softmax over blocks of keys for blocks of queries, in plain XLA.

    rounded: what happens to the softmax's weights before they are multiplied with v; by default
    they take its dtype.
    """
    (b, s, n, d), keys = q.shape, k.shape[1]
    block_k = min(_CHUNK_KEYS, keys)
    block_q = max(1, min(s, _CHUNK_ELEMENTS // (b * n * block_k)))
    q, k, v = pad(q, 1, block_q), pad(k, 1, block_k), pad(v, 1, block_k)
    blocks_k, blocks_v = (x.reshape(b, -1, block_k, n, d).transpose(1, 0, 3, 2, 4) for x in (k, v))
    starts = jnp.arange(blocks_k.shape[0], dtype=jnp.int32) * block_k
    precision = precision_of(q.dtype)
    last = keys if count is None else count
    narrow = rounded or (lambda weights: weights.astype(v.dtype))

    def product(subscripts: str, x: Array, y: Array) -> Array:
        return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)

    def over_keys(q_bnsk: Array) -> tuple[Array, Array]:
        def step(
            carry: tuple[Array, Array, Array], block: tuple[Array, Array, Array]
        ) -> tuple[tuple[Array, Array, Array], None]:
            best, total, out = carry
            start, k_bntk, v_bntk = block
            scores = product("bnsk,bntk->bnst", q_bnsk, k_bntk) * (1.0 / math.sqrt(d))
            real = start + jnp.arange(block_k, dtype=jnp.int32) < last
            scores = jnp.where(real, scores, -jnp.inf)
            top = jnp.maximum(best, jnp.max(scores, -1, keepdims=True))
            weights, fade = jnp.exp(scores - top), jnp.exp(best - top)
            out = out * fade + product("bnst,bntk->bnsk", narrow(weights), v_bntk)
            return (top, total * fade + jnp.sum(weights, -1, keepdims=True), out), None

        rows = (*q_bnsk.shape[:3], 1)
        start = jnp.full(rows, LOWEST), jnp.zeros(rows), jnp.zeros(q_bnsk.shape)
        (best, total, out), _ = lax.scan(step, start, (starts, blocks_k, blocks_v))
        return (out / total).astype(q.dtype), (best + jnp.log(total))[..., 0]

    blocks_q = q.reshape(b, -1, block_q, n, d).transpose(1, 0, 3, 2, 4)
    out, weight = lax.map(over_keys, blocks_q)
    out = out.transpose(1, 0, 3, 2, 4).reshape(b, -1, n, d)[:, :s]
    return out, weight.transpose(1, 0, 3, 2).reshape(b, -1, n)[:, :s]
