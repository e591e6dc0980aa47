"""The UMT5 text encoder: token ids to the context of the DiT.

Pre-norm blocks without biases, unscaled attention, and in every layer its own table of relative
positions. Axes: b batch, s text tokens (q queries, k keys), d width, n heads, c head width.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from wan_jax.config import UMT5Config
from wan_jax.layers import Array, Linear, RMSNorm, gelu_tanh, linear, lookup, normal, precision_of


class Attention(nnx.Module):
    """Projections of self-attention; their width num_heads * head_dim need not be dim."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        d, width = config.dim, config.num_heads * config.head_dim

        def make(d_in: int, d_out: int, std: float) -> Linear:
            return Linear(d_in, d_out, rngs=rngs, dtype=dtype, init=normal(std), bias=False)

        # Attention is unscaled, so the queries start smaller by the square root of the head width.
        self.q = make(d, width, (d * config.head_dim) ** -0.5)
        self.k = make(d, width, d**-0.5)
        self.v = make(d, width, d**-0.5)
        self.o = make(width, d, width**-0.5)


class FeedForward(nnx.Module):
    """Gated feed-forward: fc2(fc1(x) * gelu(gate(x)))."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        d, hidden = config.dim, config.ffn_dim

        def make(d_in: int, d_out: int) -> Linear:
            init = normal(d_in**-0.5)
            return Linear(d_in, d_out, rngs=rngs, dtype=dtype, init=init, bias=False)

        self.gate = make(d, hidden)
        self.fc1 = make(d, hidden)
        self.fc2 = make(hidden, d)


class Block(nnx.Module):
    """One encoder block; position [num_buckets, num_heads] is its table of relative positions."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        table = (config.num_buckets, config.num_heads)
        init = normal((2 * config.num_buckets * config.num_heads) ** -0.5)
        self.norm1 = RMSNorm(config.dim, dtype=dtype)
        self.attn = Attention(config, rngs=rngs, dtype=dtype)
        self.position = nnx.Param(init(rngs.params(), table, dtype))
        self.norm2 = RMSNorm(config.dim, dtype=dtype)
        self.ffn = FeedForward(config, rngs=rngs, dtype=dtype)


class UMT5(nnx.Module):
    """The encoder's weights, all in one dtype; leaves of `layers` have a leading layer axis.

    bfloat16 rounds where the original does; float32 multiplies at HIGHEST, for parity.
    """

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        keys = jax.random.split(rngs.params(), config.num_layers)
        shape = (config.vocab_size, config.dim)
        self.config = config
        self.embedding = nnx.Param(normal(1.0)(rngs.params(), shape, dtype))
        self.layers = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key), dtype=dtype))(keys)
        self.norm = RMSNorm(config.dim, dtype=dtype)


def position_buckets(length: int, *, num_buckets: int, max_distance: int) -> np.ndarray:
    """Row of the position table for query q and key k: int32 [length, length], indexed [q, k].

    Half of the buckets belong to keys after the query. Within a half, the first half of the
    distances have a bucket each; from there the buckets widen with the logarithm up to
    max_distance, and the last one takes all that is farther.
    """
    half = num_buckets // 2
    exact = half // 2
    position = np.arange(length)
    relative = position[None, :] - position[:, None]
    distance = np.abs(relative)
    ratio = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact)
    # Powers of two lie exactly on the edge of a bucket; the margin keeps rounding from moving them.
    far = exact + np.floor(ratio * (half - exact) + 1e-6).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return (bucket + half * (relative > 0)).astype(np.int32)


def _norm(p: RMSNorm, x: Array, *, eps: float) -> Array:
    """T5's norm, in the dtype of the scale: the quotient is rounded before it is scaled."""
    wide = x.astype(jnp.float32)
    y = wide * lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps)
    return p.scale[...] * y.astype(p.scale.dtype)


def _attention(p: Attention, x_bsd: Array, bias_nqk: Array, mask_bs: Array, *, heads: int) -> Array:
    """Self-attention without scaling; keys where mask_bs is False get no weight."""
    b, s, _ = x_bsd.shape
    dtype = x_bsd.dtype
    precision = precision_of(dtype)
    q, k, v = (linear(w, x_bsd).reshape(b, s, heads, -1) for w in (p.q, p.k, p.v))
    logits = jnp.einsum(
        "bqnc,bknc->bnqk", q, k, precision=precision, preferred_element_type=jnp.float32
    )
    # Logits and their sum with the bias are rounded to the weights' dtype, as in the original.
    logits = logits.astype(dtype) + bias_nqk
    logits = jnp.where(mask_bs[:, None, None, :], logits, jnp.finfo(dtype).min)
    weights = jax.nn.softmax(logits.astype(jnp.float32), axis=-1).astype(dtype)
    y = jnp.einsum(
        "bnqk,bknc->bqnc", weights, v, precision=precision, preferred_element_type=jnp.float32
    )
    return linear(p.o, y.astype(dtype).reshape(b, s, -1))


def _block(
    block: Block, x_bsd: Array, buckets: np.ndarray, mask_bs: Array, config: UMT5Config
) -> Array:
    """One encoder block, [b, s, d] to [b, s, d] in the dtype of the weights."""
    bias_nqk = lookup(block.position[...], jnp.asarray(buckets)).transpose(2, 0, 1)
    h = _norm(block.norm1, x_bsd, eps=config.eps)
    x_bsd = x_bsd + _attention(block.attn, h, bias_nqk, mask_bs, heads=config.num_heads)
    h = _norm(block.norm2, x_bsd, eps=config.eps)
    hidden = linear(block.ffn.fc1, h) * gelu_tanh(linear(block.ffn.gate, h))
    return x_bsd + linear(block.ffn.fc2, hidden)


def encode(
    umt5: UMT5,
    ids_bs: Array,
    mask_bs: Array,
    *,
    fetch: Callable[[Block], Block] | None = None,
) -> Array:
    """Context [b, s, dim] in the dtype of the weights, zero where the mask is 0.

    ids_bs: int32 token ids [b, s]; mask_bs: int32 or bool [b, s], nonzero at tokens of the text and
    its end mark. Tokens do not attend to padding; an id outside the vocabulary gives NaN. fetch:
    brings one layer's weights to the device inside the scan.
    """
    config = umt5.config
    mask_bs = jnp.asarray(mask_bs).astype(jnp.bool_)
    buckets = position_buckets(
        ids_bs.shape[1], num_buckets=config.num_buckets, max_distance=config.max_distance
    )

    def step(x_bsd: Array, block: Block) -> tuple[Array, None]:
        return _block(
            block if fetch is None else fetch(block), x_bsd, buckets, mask_bs, config
        ), None

    x_bsd = lookup(umt5.embedding[...], ids_bs)
    x_bsd, _ = lax.scan(step, x_bsd, umt5.layers)
    x_bsd = _norm(umt5.norm, x_bsd, eps=config.eps)
    return jnp.where(mask_bs[..., None], x_bsd, jnp.zeros((), x_bsd.dtype))
