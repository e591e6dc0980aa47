"""cuDNN's attention on NVIDIA GPUs, as far as 16 bits go: odd lengths, rows to spare, the weight.

Arrays are [b, s, n, k]. What lengths the kernel is fastest at is in attention.row_tile().
"""

import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from wan_jax.layers import pad

Array = jax.Array
# A query's weight, the logarithm of the sum of its keys' exponentials, below which exp(-weight) and
# what is multiplied with it may leave the range of 16 bits.
_FAR = -60.0


def attend(q: Array, k: Array, v: Array, count: int | None = None) -> Array:
    """softmax(q k^T / sqrt(k)) v in the dtype of q, over the first `count` keys; None is all.

    The rows to spare become copies of the last key, of value zero, for the kernel without a mask is
    the faster one. So all they do is to lessen the result by their share of the softmax, which is
    divided out; it is at most spare / (spare + 1), whatever the scores are. Odd numbers of rows
    have no gradient in JAX; they are cut off.
    """
    odd = q.shape[1] % 2 or k.shape[1] % 2
    if count is not None and count < k.shape[1]:
        if not odd:
            return _rows(q, k, v, count)
        return attend(q, k[:, :count], v[:, :count])
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
def _rows(q: Array, k: Array, v: Array, count: int) -> Array:
    k, v = _spared(k, v, count)
    out, weight = attend_with_weight(q, k, v)
    return _undiluted(q, k, out, weight, count)[0]


def _spared(k: Array, v: Array, count: int) -> tuple[Array, Array]:
    return k.at[:, count:].set(k[:, count - 1 : count]), v.at[:, count:].set(0)


def _undiluted(q: Array, k: Array, out: Array, weight: Array, count: int) -> tuple[Array, Array]:
    """The result over the real keys alone, and their weight."""
    rest = -_share(q, k, weight) * (k.shape[1] - count)
    real = out.astype(jnp.float32) / (1.0 + rest)[..., None]
    return real.astype(q.dtype), weight + jnp.log1p(rest)


def _share(q: Array, k: Array, weight: Array) -> Array:
    """Of the last key in the softmax, [b, s, n]."""
    score = jnp.sum(q.astype(jnp.float32) * k[:, -1:].astype(jnp.float32), axis=-1)
    # Or XLA sums in the order that the kernel's weight has: 240 in place of 30 us on an H200.
    return jnp.exp(lax.optimization_barrier(score) * _scale(q) - weight)


def _rows_forward(q: Array, k: Array, v: Array, count: int) -> tuple[Array, Any]:
    k, v = _spared(k, v, count)
    out, weight = _undiluted(q, k, *attend_with_weight(q, k, v), count)
    return out, (q, k, v, out, weight)


def _rows_backward(count: int, kept: Any, out_cotangent: Array) -> tuple[Array, Array, Array]:
    """The kernel's gradient, given the result and the weight of the real keys.

    So what it says of them is right. A row to spare is a key of zeros, which gives the queries
    nothing whatever its share is reckoned to be, exp(-weight). Where that were no number, all
    scores of a query being far below zero, the rows of its head stay copies of the last key: then
    the gradient of a spare score is minus its share times <out, cotangent>, and what that gave the
    queries is taken off again, but for the kernel's rounding of it.
    """
    q, k, v, out, weight = kept
    far = jnp.min(weight, axis=1, keepdims=True) < _FAR
    k_spare = jnp.where(far[..., None], k[:, count:], 0)
    k_given = k.at[:, count:].set(k_spare)
    dq, dk, dv = _backward_kernel(q, k_given, v, out, weight, out_cotangent)
    spare, float32 = k.shape[1] - count, jnp.float32
    along = jnp.sum(out.astype(float32) * out_cotangent.astype(float32), axis=-1)
    added = jnp.where(far, along * _share(q, k, weight) * (spare * _scale(q)), 0)
    dq = (dq.astype(float32) + added[..., None] * k[:, -1:].astype(float32)).astype(q.dtype)
    return dq, dk.at[:, count:].set(0), dv.at[:, count:].set(0)


_rows.defvjp(_rows_forward, _rows_backward)


def _scale(q: Array) -> float:
    return 1.0 / math.sqrt(q.shape[-1])


# JAX has no public name for the backward kernel, and its own rule of the gradient of what
# attend_with_weight() calls would be given the weight of all rows, the spare ones too.
def _kernels() -> Any:
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def _backward_kernel(
    q: Array, k: Array, v: Array, out: Array, weight: Array, out_cotangent: Array
) -> tuple[Array, Array, Array]:
    cudnn = _kernels()
    rule = cudnn._dot_product_attention_bwd_rule
    # JAX 0.12 has a function of the scores and its arguments, too, among what it is given.
    of_scores = "score_mod" in inspect.signature(rule).parameters
    # Bias, lengths, offsets and page tables, as the rule wants them where there are none.
    unused: tuple[Any, ...] = (jnp.zeros(0, q.dtype),) * 7 + ((),) * of_scores
    kept = (q, k, v, *unused, weight.swapaxes(1, 2), out)
    # Seed and rate of dropout, whether there is a bias, mask and layout; window and that function.
    settings = (42, 0.0, (False, False), cudnn.MaskType.NO_MASK, cudnn.AttentionLayout.BTNH.value)
    rest = (None,) * (1 + of_scores)
    given = (*settings, *rest, cudnn.check_cudnn_version(), False, kept, out_cotangent)
    dq, dk, dv, *_ = rule(_scale(q), *given)
    return dq, dk, dv


def _by_rows(weight: Array, q: Array) -> Array:
    """[b, s, n] of what the kernel gives."""
    return weight.reshape(q.shape[0], q.shape[2], -1).swapaxes(1, 2)


def attend_with_weight(
    q: Array, k: Array, v: Array, *, count: Array | int | None = None
) -> tuple[Array, Array]:
    """As attention.partial_attention(), but of no keys anything comes."""
    # What jax.nn.dot_product_attention calls: it would round the weight to the dtype of q, which
    # in bfloat16 puts merged results off by 3 %.
    cudnn = _kernels()
    lengths: dict[str, Any] = {}
    if count is not None:
        rows = jnp.full((q.shape[0],), q.shape[1], jnp.int32)
        real = jnp.broadcast_to(jnp.asarray(count, jnp.int32), rows.shape)
        lengths = {"q_seqlen": rows, "kv_seqlen": real, "mask_type": cudnn.MaskType.PADDING}
    out, weight = cudnn.dot_product_attention(
        q, k, v, scale=_scale(q), return_residual=True, **lengths
    )
    return out, _by_rows(weight, q)
