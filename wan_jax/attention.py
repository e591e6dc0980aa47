"""softmax(q k^T / sqrt(k)) v, by the fastest kernel that the platform has.

Callers pass arrays of the true length. Whatever a kernel wants in multiples is padded and cut here,
and a padded row never reaches a softmax.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from wan_jax.layers import precision_of

Array = jax.Array
IMPLEMENTATIONS = ("cudnn", "splash", "chunked")

# Scores held at once by the chunked form: 2^24 float32 values are 64 MiB.
_CHUNK_ELEMENTS = 2**24
_CHUNK_KEYS = 1024

# Tiles of the TPU kernel, in rows; they fit the 16 MiB of scoped VMEM that v5e allows by default.
_SPLASH_QUERIES = 1024
_SPLASH_KEYS = 1024
_LANES = 128


def attention(
    q_bsnk: Array, k_bsnk: Array, v_bsnk: Array, *, implementation: str | None = None
) -> Array:
    """Dense attention of q [b, s, n, k] over k and v [b, s', n, k], in the dtype of q.

    implementation: None picks cuDNN on NVIDIA for 16 bits and the Pallas flash kernel ("splash") on
    TPU for bfloat16, and the memory-bounded "chunked" form for all else. A named one
    runs or raises: ValueError for an unknown name or operands it does not take.
    """
    shapes = q_bsnk.shape, k_bsnk.shape, v_bsnk.shape
    (b, _, n, d), (bk, s, nk, dk), _ = shapes
    if (b, n, d) != (bk, nk, dk) or shapes[1] != shapes[2] or s == 0:
        raise ValueError(f"q, k, v of shapes {shapes} do not fit; [b, s, n, k] is needed")
    if not q_bsnk.dtype == k_bsnk.dtype == v_bsnk.dtype:
        raise ValueError(f"q, k, v are {q_bsnk.dtype}, {k_bsnk.dtype}, {v_bsnk.dtype}; need one")
    name = implementation or _pick(q_bsnk)
    if name == "cudnn":
        return _cudnn(q_bsnk, k_bsnk, v_bsnk)
    if name == "splash":
        return _splash(q_bsnk, k_bsnk, v_bsnk)
    if name == "chunked":
        return _chunked(q_bsnk, k_bsnk, v_bsnk)
    raise ValueError(f"implementation is {name!r}; one of {IMPLEMENTATIONS} is needed")


def is_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of jax.checkpoint that keeps the output of cuDNN's forward kernel, nothing else."""
    return str(primitive.name).startswith("dot_product_attention_fwd")


def _pick(q: Array) -> str:
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return "chunked"
    tpu_kernel = "splash" if q.dtype == jnp.bfloat16 else "chunked"
    return {"gpu": _gpu_kernel(q), "tpu": tpu_kernel}.get(jax.default_backend(), "chunked")


def _gpu_kernel(q: Array) -> str:
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    nvidia = jax.default_backend() == "gpu" and "NVIDIA" in jax.devices()[0].device_kind.upper()
    return "cudnn" if fits and nvidia else "chunked"


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    if jax.default_backend() != "gpu":
        raise ValueError(
            f"implementation 'cudnn' needs an NVIDIA GPU, this is {jax.default_backend()}"
        )
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"implementation 'cudnn' needs bfloat16 or float16, got {q.dtype}")
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _pad(x: Array, axis: int, multiple: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths) if widths[axis][1] else x


def _splash(q: Array, k: Array, v: Array) -> Array:
    """Pallas flash attention for TPU (jax.experimental.pallas.ops.tpu.splash_attention)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

    if q.dtype == jnp.float16:
        raise ValueError("implementation 'splash' is given float16, which Mosaic does not load")
    (_, s, n, d), keys = q.shape, k.shape[1]
    block_q = min(_SPLASH_QUERIES, -(-s // _LANES) * _LANES)
    block_k = min(_SPLASH_KEYS, -(-keys // _LANES) * _LANES)
    scale = jnp.asarray(1.0 / math.sqrt(d), jnp.float32)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel does not scale
    q, k, v = (
        _pad(_pad(x, 1, block), 3, _LANES).swapaxes(1, 2)
        for x, block in ((q, block_q), (k, block_k), (v, block_k))
    )
    run = kernel.make_splash_mha(
        mask=mask.MultiHeadMask([mask.FullMask((q.shape[2], k.shape[2]))] * n),
        block_sizes=kernel.BlockSizes(block_q=block_q, block_kv=block_k, block_kv_compute=block_k),
        head_shards=1,
        q_seq_shards=1,
    )
    segments = None
    if k.shape[2] != keys:  # real queries and keys are segment 0, padded keys segment 1
        padded = (jnp.arange(k.shape[2]) >= keys).astype(jnp.int32)
        segments = kernel.SegmentIds(q=jnp.zeros((q.shape[2],), jnp.int32), kv=padded)
    # The kernel takes the global precision, and Mosaic compiles no bfloat16 product at "highest".
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        out = jax.vmap(functools.partial(run, segment_ids=segments))(q, k, v)
    return out.swapaxes(1, 2)[:, :s, :, :d]


def _chunked(q: Array, k: Array, v: Array) -> Array:
    """Online softmax over blocks of keys for blocks of queries, in plain XLA."""
    (b, s, n, d), keys = q.shape, k.shape[1]
    block_k = min(_CHUNK_KEYS, keys)
    block_q = max(1, min(s, _CHUNK_ELEMENTS // (b * n * block_k)))
    q, k, v = _pad(q, 1, block_q), _pad(k, 1, block_k), _pad(v, 1, block_k)
    blocks_k, blocks_v = (x.reshape(b, -1, block_k, n, d).transpose(1, 0, 3, 2, 4) for x in (k, v))
    starts = jnp.arange(blocks_k.shape[0], dtype=jnp.int32) * block_k
    precision = precision_of(q.dtype)

    def product(subscripts: str, x: Array, y: Array) -> Array:
        return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)

    def over_keys(q_bnsk: Array) -> Array:
        def step(
            carry: tuple[Array, Array, Array], block: tuple[Array, Array, Array]
        ) -> tuple[tuple[Array, Array, Array], None]:
            best, total, out = carry
            start, k_bntk, v_bntk = block
            scores = product("bnsk,bntk->bnst", q_bnsk, k_bntk) * (1.0 / math.sqrt(d))
            real = start + jnp.arange(block_k, dtype=jnp.int32) < keys
            scores = jnp.where(real, scores, -jnp.inf)
            top = jnp.maximum(best, jnp.max(scores, -1, keepdims=True))
            weights, fade = jnp.exp(scores - top), jnp.exp(best - top)
            out = out * fade + product("bnst,bntk->bnsk", weights.astype(v.dtype), v_bntk)
            return (top, total * fade + jnp.sum(weights, -1, keepdims=True), out), None

        rows = (*q_bnsk.shape[:3], 1)
        start = jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros(q_bnsk.shape)
        (_, total, out), _ = lax.scan(step, start, (starts, blocks_k, blocks_v))
        return (out / total).astype(q.dtype)

    blocks_q = q.reshape(b, -1, block_q, n, d).transpose(1, 0, 3, 2, 4)
    out = lax.map(over_keys, blocks_q)
    return out.transpose(1, 0, 3, 2, 4).reshape(b, -1, n, d)[:, :s]
