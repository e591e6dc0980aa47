"""cuDNN's attention on NVIDIA GPUs, as far as 16 bits go: odd lengths, rows to spare, the weight.

Arrays are [b, s, n, k]. What lengths the kernel is fastest at is in attention.row_tile().
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from wan_jax.layers import pad

Array = jax.Array


def attend(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T / sqrt(k)) v in the dtype of q."""
    odd = q.shape[1] % 2 or k.shape[1] % 2
    return (_odd if odd else _kernel)(q, k, v)


def _kernel(q: Array, k: Array, v: Array, **lengths: Any) -> Array:
    return jax.nn.dot_product_attention(q, k, v, **lengths, implementation="cudnn")


@jax.custom_vjp
def _odd(q: Array, k: Array, v: Array) -> Array:
    """The kernel for odd lengths, such as 257 image tokens; for a gradient that of _padded().

    JAX refuses the gradient of odd lengths: it takes every call for one with a bias, of which
    cuDNN has none.
    """
    return _kernel(q, k, v)


def _padded(q: Array, k: Array, v: Array) -> Array:
    """The kernel over a row more where a length is odd, which is masked."""
    (b, s, *_), keys = q.shape, k.shape[1]
    lengths = {"query_seq_lengths": s, "key_value_seq_lengths": keys}
    real = {name: jnp.full((b,), length, jnp.int32) for name, length in lengths.items()}
    return _kernel(*(pad(x, 1, 2) for x in (q, k, v)), **real)[:, :s]


_odd.defvjp(
    lambda q, k, v: jax.vjp(_padded, q, k, v), lambda back, out_cotangent: back(out_cotangent)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend_rows(q: Array, k: Array, v: Array, count: int) -> Array:
    """The kernel without a mask, which is the faster one, over more rows than there are keys.

    The rows to spare become copies of the last key, of value zero. So all they do is to lessen the
    result by their share of the softmax, which is divided out; it is at most spare / (spare + 1),
    whatever the scores are. For a gradient they are cut off.
    """
    spare, last = k.shape[1] - count, k[:, count - 1 : count]
    k, v = k.at[:, count:].set(last), v.at[:, count:].set(0)
    out, weight = attend_with_weight(q, k, v)
    score = jnp.sum(q.astype(jnp.float32) * last.astype(jnp.float32), axis=-1)
    share = spare * jnp.exp(score * (1.0 / math.sqrt(q.shape[-1])) - weight)
    return (out.astype(jnp.float32) / (1.0 - share)[..., None]).astype(q.dtype)


def _rows_forward(q: Array, k: Array, v: Array, count: int) -> tuple[Array, Any]:
    return jax.vjp(lambda q, k, v: attend(q, k[:, :count], v[:, :count]), q, k, v)


attend_rows.defvjp(_rows_forward, lambda _, back, out_cotangent: back(out_cotangent))


def attend_with_weight(
    q: Array, k: Array, v: Array, *, count: Array | int | None = None
) -> tuple[Array, Array]:
    """As attention.partial_attention(), but of no keys anything comes."""
    # What jax.nn.dot_product_attention calls: it would round the weight to the dtype of q, which
    # in bfloat16 puts merged results off by 3 %.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    lengths: dict[str, Any] = {}
    if count is not None:
        rows = jnp.full((q.shape[0],), q.shape[1], jnp.int32)
        real = jnp.broadcast_to(jnp.asarray(count, jnp.int32), rows.shape)
        lengths = {"q_seqlen": rows, "kv_seqlen": real, "mask_type": cudnn.MaskType.PADDING}
    scale = 1.0 / math.sqrt(q.shape[-1])
    out, weight = cudnn.dot_product_attention(q, k, v, scale=scale, return_residual=True, **lengths)
    return out, weight.reshape(q.shape[0], q.shape[2], -1).swapaxes(1, 2)
