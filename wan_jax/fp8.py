"""Arrays of 8-bit floating point with one scale each, and what products and attention make of them.

The numbers are float8_e4m3fn: 3 bits of mantissa, at most 448, even steps below 2^-6. Scales are
powers of two. An array times such a scale is exact in bfloat16, so what is multiplied without 8-bit
units, as in the tests, has the very operands of a Hopper GPU; and as two scales give different bits
to small values only, neither the members of a batch nor how tokens and heads lie on devices matter
much.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
E4M3 = jnp.float8_e4m3fn
_LARGEST = 448.0
_SMALLEST_SCALE = 2.0**-60  # of zeros; it and its reciprocal are finite in every dtype used
# Softmax weights are at most 1: this leaves them most of the range, and none saturates.
_WEIGHT_SCALE = 256.0
# Lengths for which cuDNN's kernel is fastest, 12 % above others at 75,600 tokens, and how many real
# keys there must be for a padded one.
_BLOCK, _REAL_KEYS = 512, 256


class Scaled(NamedTuple):
    """values, float8_e4m3fn of any shape, times scale, float32 [], a power of two."""

    values: Array
    scale: Array

    def widened(self, dtype: jnp.dtype) -> Array:
        """The array in bfloat16 or float32, exactly."""
        return self.values.astype(dtype) * self.scale.astype(dtype)


def quantize(x: Array) -> Scaled:
    """The nearest Scaled to bfloat16 or float32, its scale by the largest value.

    All of it is NaN if x has any NaN or inf. It is computed in the dtype of x, which loses nothing
    to a power of two: in bfloat16 the GPU moves half the bytes.
    """
    scale = _power_of_two(jnp.max(jnp.abs(x)).astype(jnp.float32) * (1.0 / _LARGEST))
    return Scaled((x * (1.0 / scale).astype(x.dtype)).astype(E4M3), scale)


def _power_of_two(x: Array) -> Array:
    """The least power of two that is not below x >= 0; 0 of NaN, by whose reciprocal all is NaN.

    By the bits of float32: exp2 of a whole number is not exact everywhere.
    """
    bits = lax.bitcast_convert_type(jnp.maximum(x, _SMALLEST_SCALE), jnp.uint32)
    return lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)


def product(x: Scaled, kernel: Scaled) -> Array:
    """x [..., d_in] times kernel [d_out, d_in]: bfloat16 [..., d_out].

    Written as a product of widened operands, which XLA makes one product of 8 bits on a GPU that
    has it ("__cublas$lt$matmul$f8"), with sums in float32 and rounded once, as long as scales are
    scalars and the contracted axis is the last of both. It pads rows to a multiple of 16.
    """
    rows = x._replace(values=x.values.reshape(-1, x.values.shape[-1]))
    y = lax.dot_general(
        rows.widened(jnp.bfloat16),
        kernel.widened(jnp.bfloat16),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.bfloat16,
    )
    return y.reshape(*x.values.shape[:-1], y.shape[-1])


class Operands(NamedTuple):
    """q, k and v of attention [b, s, n, k], rotated and without means, and the mean of v.

    mean: float32 [b, 1, n, k], over tokens. That of k changes all scores of a query alike, so no
    softmax; that of v is added to what comes out. q and k are rotated alike, which no score knows.
    All this is exact but for rounding, of which there is less: what is rounded has no large mean,
    and a rotation spreads the few large numbers of a head over its width. On the trained miniature
    it halves the error of the scores.
    """

    q: Scaled
    k: Scaled
    v: Scaled
    mean: Array

    def restored(self, out: Array, dtype: jnp.dtype) -> Array:
        """The result of attention, from e4m3 in the scale of v, which no weighted mean exceeds."""
        return (Scaled(out, self.v.scale).widened(jnp.float32) + self.mean).astype(dtype)


def attention_operands(q: Array, k: Array, v: Array) -> Operands:
    """Operands of arrays [b, s, n, k], padded with zeros to where the kernel is fastest.

    A padded key scores 0, the mean of a query's real scores. So, the exponential being convex, real
    keys have at least their share of the weight, and padding at most 1 of 256 and that only
    where the weights are all alike, and the result is v's mean, which padding does not move.
    """
    (q, grown), (k, _) = _rotated(q), _rotated(k)
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    mean = jnp.mean(v, axis=1, keepdims=True)
    k, v = k - jnp.mean(k, axis=1, keepdims=True), v - mean
    narrow = quantize(q)
    narrow = narrow._replace(scale=narrow.scale / grown)
    return Operands(_padded(narrow), _padded(quantize(k)), _padded(quantize(v)), mean)


def _rotated(x: Array) -> tuple[Array, int]:
    """x [..., k] times a Hadamard matrix of 1 and -1, and the factor by which squares grow.

    Blocks of k are rotated, each of the largest power of two that divides it.
    """
    size = x.shape[-1] & -x.shape[-1]
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    blocks = x.reshape(*x.shape[:-1], -1, size)
    turned = lax.dot_general(
        blocks,
        jnp.asarray(matrix, x.dtype),
        (((blocks.ndim - 1,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=x.dtype,
    )
    return turned.reshape(x.shape), size


def _padded(x: Scaled) -> Scaled:
    length = x.values.shape[1]
    more = -length % _BLOCK
    if more * _REAL_KEYS > length:
        return x
    return x._replace(values=jnp.pad(x.values, ((0, 0), (0, more), (0, 0), (0, 0))))


def attention_weights(weights: Array) -> Array:
    """Weights 0..1 of a softmax as the kernel rounds them, in their dtype."""
    narrow = lax.optimization_barrier((weights * _WEIGHT_SCALE).astype(E4M3))
    return narrow.astype(weights.dtype) * (1.0 / _WEIGHT_SCALE)


def saturated(x: Array) -> Array:
    """float8_e4m3fn of float32, clipped to what it holds, as the GPU's own conversion does."""
    return jnp.clip(x, -_LARGEST, _LARGEST).astype(E4M3)


def cudnn_attention(operands: Operands) -> Array:
    """softmax(q k^T / sqrt(k)) v as e4m3 [b, s, n, k] in the scale of v; cuDNN's, for Hopper.

    The kernel takes no lengths and no mask. Raises NotImplementedError for a head width that is no
    multiple of 16 or, on the device, above 128.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    q, k, v, _ = operands
    scales = {
        "descale_q": q.scale,
        "descale_k": k.scale,
        "descale_v": v.scale,
        "descale_s": 1.0 / _WEIGHT_SCALE,
        "scale_s": _WEIGHT_SCALE,
        "scale_o": 1.0 / v.scale,
    }
    # JAX wants those of the gradient as well, which are not read.
    given: dict[str, Any] = dict.fromkeys(cudnn.fp8_params_keys, 1.0) | scales
    arrays: Any = {n: jnp.full((1, 1, 1, 1), x, jnp.float32) for n, x in given.items()}
    out, *_ = cudnn.dot_product_attention(
        q.values,
        k.values,
        v.values,
        scale=1.0 / math.sqrt(q.values.shape[-1]),
        fp8_params=arrays,
        use_fp8=True,
    )
    return out
