"""Norms, the one matrix product, embeddings, and the dtype policy.

The policy is carried by the weights. A product runs in the dtype its kernel is stored in: bfloat16
kernels multiply bfloat16 inputs and give bfloat16, float32 kernels multiply float32 inputs at
HIGHEST precision (a plain float32 product would be TF32 on NVIDIA and bfloat16 passes on TPU).
So a network built with dtype=bfloat16 has bfloat16 kernels outside its float32 islands, and the
same code built with dtype=float32 is the float32 mode. A QuantizedLinear multiplies 8 bits and
gives bfloat16.
"""

import functools
import math
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from wan_jax import fp8, xla

Array = jax.Array
Init = Callable[[Array, tuple[int, ...], jnp.dtype], Array]
PRODUCT = "product"  # what linear() gives, by the name that policies of jax.checkpoint know it by


def precision_of(dtype: jnp.dtype) -> lax.Precision:
    """HIGHEST for float32 operands, the hardware's own for narrower ones."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def xavier(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Xavier-uniform values for a kernel whose last axis is the output."""
    fan_in, fan_out = math.prod(shape[:-1]), shape[-1]
    limit = math.sqrt(6.0 / (fan_in + fan_out))
    return jax.random.uniform(key, shape, jnp.float32, -limit, limit).astype(dtype)


def normal(std: float) -> Init:
    """Initialiser: Gaussian of standard deviation `std`."""
    return lambda key, shape, dtype: (std * jax.random.normal(key, shape)).astype(dtype)


@jax.custom_vjp
def lookup(table: Array, index: Array) -> Array:
    """Rows of a table [n, ...] by integers [...]; NaN for one outside 0..n-1.

    Its gradient is a product with ones and zeros. Adding rows up one by one, as JAX's own does,
    makes the threads of a GPU wait for each other wherever texts repeat a token, as padding does:
    with all tokens alike 118 of the 157 ms of a step of the miniature on an H200.
    """
    return jnp.take(table, index, axis=0)


def _lookup_forward(table: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
    return lookup(table, index), (table, index)


def _lookup_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, np.ndarray]:
    table, index = kept
    picked = jax.nn.one_hot(index, table.shape[0], dtype=gradient.dtype)
    over = tuple(range(index.ndim))
    total = lax.dot_general(
        picked,
        gradient,
        ((over, over), ((), ())),
        precision=precision_of(gradient.dtype),
        preferred_element_type=jnp.float32,
    )
    return total.astype(table.dtype), np.zeros(index.shape, jax.dtypes.float0)


lookup.defvjp(_lookup_forward, _lookup_backward)


class LowRank(nnx.Module):
    """A difference of a product's kernel, down @ up: down [*d_in, r], up [r, d_out]; float32."""

    def __init__(self, down: Array, up: Array) -> None:
        self.down, self.up = nnx.Param(down), nnx.Param(up)


class Linear(nnx.Module):
    """Weights of one product: kernel [*d_in, d_out] and, unless told otherwise, bias [d_out].

    lora: what is added to the kernel while it is trained; on the class, so that a network without
    it is the same tree as ever.
    """

    lora: LowRank | None = None

    def __init__(
        self,
        d_in: int | tuple[int, ...],
        d_out: int,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        init: Init = xavier,
        bias: bool = True,
    ) -> None:
        axes = (d_in,) if isinstance(d_in, int) else d_in
        self.kernel = nnx.Param(init(rngs.params(), (*axes, d_out), dtype))
        self.bias = nnx.Param(jnp.zeros((d_out,), dtype)) if bias else None


class QuantizedLinear(nnx.Module):
    """A Linear whose kernel has 8 bits: e4m3 [d_out, d_in], scale float32 [], bias [d_out] or None.

    The kernel is the transpose of Linear's, as Hopper multiplies 8 bits along the last axes only.
    """

    def __init__(self, kernel: fp8.Scaled, bias: Array | None) -> None:
        self.kernel, self.scale = nnx.Param(kernel.values), nnx.Param(kernel.scale)
        self.bias = None if bias is None else nnx.Param(bias)

    @classmethod
    def of(cls, p: Linear) -> Self:
        """The nearest of a Linear with one contracted axis."""
        return cls(fp8.quantize(p.kernel[...].T), None if p.bias is None else p.bias[...])


class LayerNorm(nnx.Module):
    """Scale and bias [d] of a layer norm with affine parameters, float32."""

    def __init__(self, d: int) -> None:
        self.scale = nnx.Param(jnp.ones((d,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((d,), jnp.float32))


class RMSNorm(nnx.Module):
    """Scale [d] of a root-mean-square norm."""

    def __init__(self, d: int, *, dtype: jnp.dtype = jnp.float32) -> None:
        self.scale = nnx.Param(jnp.ones((d,), dtype))


def linear(p: Linear | QuantizedLinear, x: Array) -> Array:
    """Contract the trailing axes of x with the kernel's [*d_in, d_out], in the kernel's dtype.

    Sum and bias are float32 and rounded once, as the reference's fused product does; to round the
    sum before the bias is added would put the bfloat16 mode at 1.17 times the reference's own
    distance from float32. On NVIDIA cuBLASLt does both in one call, which XLA makes of a product
    and a bias that are written in the kernel's dtype.
    """
    if isinstance(p, QuantizedLinear):
        return _quantized(p, x)
    kernel = p.kernel[...]
    x = x.astype(kernel.dtype)
    fused = p.lora is None and kernel.dtype != jnp.float32 and xla.on_nvidia()
    y = _product(x, kernel, kernel.dtype if fused else jnp.dtype(jnp.float32))
    if p.lora is not None:
        down, up = (half[...].astype(kernel.dtype) for half in (p.lora.down, p.lora.up))
        y = y + _product(_product(x, down, y.dtype).astype(kernel.dtype), up, y.dtype)
    if p.bias is not None:
        y = _plus(y, p.bias[...])
    return checkpoint_name(_rounded(y, kernel.dtype), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rounded(y: Array, dtype: jnp.dtype) -> Array:
    """y in dtype, and a gradient that is in memory in that dtype once, for all that read it.

    XLA would leave out the rounding and write it in float32 for the bias beside 16 bits for the
    products: with the 1.3B's feed-forward 1.8 GB more to move in every layer.
    """
    return y.astype(dtype)


def _rounded_forward(y: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    return y.astype(dtype), jnp.zeros(0, y.dtype)


def _rounded_backward(dtype: jnp.dtype, like: Array, gradient: Array) -> tuple[Array]:
    return (lax.optimization_barrier(gradient.astype(dtype)).astype(like.dtype),)


_rounded.defvjp(_rounded_forward, _rounded_backward)


@jax.custom_vjp
def _plus(y: Array, bias: Array) -> Array:
    """y [..., d] + bias [d] in the dtype of y, and a gradient that is summed in float32."""
    return y + bias.astype(y.dtype)


def _plus_forward(y: Array, bias: Array) -> tuple[Array, Array]:
    return _plus(y, bias), bias


def _plus_backward(bias: Array, gradient: Array) -> tuple[Array, Array]:
    rows = tuple(range(gradient.ndim - 1))
    return gradient, jnp.sum(gradient, rows, dtype=jnp.float32).astype(bias.dtype)


_plus.defvjp(_plus_forward, _plus_backward)


def _quantized(p: QuantizedLinear, x: Array) -> Array:
    """x [..., d_in], rounded to 8 bits with a scale of its own: bfloat16 [..., d_out]."""
    x = x.astype(jnp.bfloat16)
    y = fp8.product(fp8.quantize(x), fp8.Scaled(p.kernel[...], p.scale[...]))
    return y if p.bias is None else y + p.bias[...].astype(y.dtype)


def _product(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    """x [..., *d_in] times kernel [*d_in, d_out], of one dtype, summed in float32; in `dtype`."""
    wide = kernel.dtype == jnp.float32
    return _contract(x, kernel, dtype) if wide else _narrow_product(x, kernel, dtype)


def _contract(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    inner = kernel.ndim - 1
    return lax.dot_general(
        x,
        kernel,
        ((tuple(range(x.ndim - inner, x.ndim)), tuple(range(inner))), ((), ())),
        precision=precision_of(kernel.dtype),
        preferred_element_type=dtype,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow_product(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    """_contract() whose gradient multiplies in the kernel's dtype, too.

    JAX's own would be products of float32 with bfloat16, which no matrix unit has. Nothing is lost:
    linear() rounds the sum to that dtype, so what comes back was rounded as well.
    """
    return _contract(x, kernel, dtype)


def _narrow_forward(x: Array, kernel: Array, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return _contract(x, kernel, dtype), (x, kernel)


def _narrow_backward(
    dtype: jnp.dtype, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = kept
    rows = x.ndim - kernel.ndim + 1
    product = functools.partial(
        lax.dot_general, precision=precision_of(kernel.dtype), preferred_element_type=dtype
    )
    g = gradient.astype(kernel.dtype)
    outer = tuple(range(rows))
    to_x = product(g, kernel, (((rows,), (kernel.ndim - 1,)), ((), ())))
    to_kernel = product(x, g, ((outer, outer), ((), ())))
    return to_x.astype(x.dtype), to_kernel.astype(kernel.dtype)


_narrow_product.defvjp(_narrow_forward, _narrow_backward)


def layer_norm(x: Array, *, eps: float, affine: LayerNorm | None = None) -> Array:
    """Layer norm over the last axis in float32, with scale and bias where given."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, -1, keepdims=True)
    y = centred * lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + eps)
    if affine is None:
        return y
    return y * affine.scale[...] + affine.bias[...]


def rms_norm(p: RMSNorm, x: Array, *, eps: float, goes_on: bool = False) -> Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32.

    goes_on: more is done to the result that knows single values. On NVIDIA that is then one pass
    with the norm, over x; XLA would write the norm's float32 result and read it again.
    """
    x = x.astype(jnp.float32)
    root = lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)
    if goes_on and xla.on_nvidia():
        root = lax.optimization_barrier(root)
    return x * root * p.scale[...].astype(jnp.float32)


def gelu(x: Array) -> Array:
    """The exact form of GELU, by the error function, computed in float32, in the dtype of x."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def gelu_tanh(x: Array) -> Array:
    """The tanh form of GELU, computed in float32, in the dtype of x.

    On NVIDIA, behind linear(), cuBLASLt does this too, before it rounds; XLA knows it by its form
    in the product's dtype. Where there is a gradient it is not cuBLASLt's, and float32 by itself.
    """
    if x.dtype != jnp.float32 and xla.on_nvidia():
        return _gelu_of_product(x)
    return _gelu_tanh(x)


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


@jax.custom_vjp
def _gelu_of_product(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return _gelu_tanh(x), x


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    return jax.vjp(_gelu_tanh, x)[1](gradient)


_gelu_of_product.defvjp(_gelu_forward, _gelu_backward)


def pad(x: Array, axis: int, multiple: int) -> Array:
    """x with zeros behind it along an axis, to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths) if widths[axis][1] else x
