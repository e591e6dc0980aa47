"""What the VAE's encoder and decoder are made of: blocks, and their weights.

Arrays are [b, t, y, x, c]. A convolution over time takes the frames that came before its input,
its past, and gives the past of the next chunk back; its padding in time is nothing but that.
Activations have the dtype of the weights, norms are float32.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from wan_jax.attention import attention
from wan_jax.columns import Columns
from wan_jax.layers import Array, Linear, RMSNorm, normal
from wan_jax.vae_stages import BlockState, MiddleState, Stage, StageState

Padding = tuple[int, int]  # before and after, along one axis


class How(NamedTuple):
    """How a chunk is run.

    first: it is the first frame of all. precision: of the convolutions, 1x1 ones included; it
    counts for float32 weights only. columns: the share of them that the arrays are; None is all.
    """

    first: bool
    precision: lax.Precision
    columns: Columns | None = None


def _conv_kernel(shape: tuple[int, ...], rngs: nnx.Rngs, dtype: jnp.dtype) -> nnx.Param:
    return nnx.Param(normal(1 / math.sqrt(math.prod(shape[1:])))(rngs.params(), shape, dtype))


class CausalConv3D(nnx.Module):
    """kernel [d_out, t, y, x, d_in], the order in which XLA:GPU needs no transpose, and bias."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        window: tuple[int, int, int],
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ) -> None:
        self.kernel = _conv_kernel((d_out, *window, d_in), rngs, dtype)
        self.bias = nnx.Param(jnp.zeros((d_out,), dtype))


class Conv2D(nnx.Module):
    """kernel [d_out, y, x, d_in] and bias of a 3x3 convolution of single frames."""

    def __init__(self, d_in: int, d_out: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.kernel = _conv_kernel((d_out, 3, 3, d_in), rngs, dtype)
        self.bias = nnx.Param(jnp.zeros((d_out,), dtype))


class ResidualBlock(nnx.Module):
    """Two norm, SiLU, 3x3x3 convolution rows around a shortcut (1x1x1 where the width changes)."""

    def __init__(self, d_in: int, d_out: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.norm1 = RMSNorm(d_in, dtype=dtype)
        self.conv1 = CausalConv3D(d_in, d_out, (3, 3, 3), rngs=rngs, dtype=dtype)
        self.norm2 = RMSNorm(d_out, dtype=dtype)
        self.conv2 = CausalConv3D(d_out, d_out, (3, 3, 3), rngs=rngs, dtype=dtype)
        changes = d_in != d_out
        self.shortcut = Linear(d_in, d_out, rngs=rngs, dtype=dtype) if changes else None


class AttentionBlock(nnx.Module):
    """Single-head self-attention over the positions of one frame."""

    def __init__(self, d: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.norm = RMSNorm(d, dtype=dtype)
        self.qkv = Linear(d, 3 * d, rngs=rngs, dtype=dtype)
        self.out = Linear(d, d, rngs=rngs, dtype=dtype)


class Middle(nnx.Module):
    """Residual block, attention, residual block, at the coarsest resolution."""

    def __init__(self, d: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.block1 = ResidualBlock(d, d, rngs=rngs, dtype=dtype)
        self.attention = AttentionBlock(d, rngs=rngs, dtype=dtype)
        self.block2 = ResidualBlock(d, d, rngs=rngs, dtype=dtype)


class Resample(nnx.Module):
    """A 3x3 convolution in space and, where time changes too, a three-frame one in time."""

    def __init__(
        self, d: int, *, d_space: int, d_time: int | None, rngs: nnx.Rngs, dtype: jnp.dtype
    ) -> None:
        self.space = Conv2D(d, d_space, rngs=rngs, dtype=dtype)
        self.time = CausalConv3D(d, d_time, (3, 1, 1), rngs=rngs, dtype=dtype) if d_time else None


class Blocks(nnx.Module):
    """Weights of one Stage: its residual blocks and its resampling, if any."""

    def __init__(
        self, stage: Stage, resample: Resample | None, *, rngs: nnx.Rngs, dtype: jnp.dtype
    ) -> None:
        widths = (stage.d_in, *(stage.d_out for _ in range(stage.num_blocks)))
        self.blocks = nnx.List(
            ResidualBlock(a, b, rngs=rngs, dtype=dtype) for a, b in itertools.pairwise(widths)
        )
        self.resample = resample


# Channels up to which a convolution over time is better done frame by frame. On an H200 the weight
# gradient of 16 channels and one frame takes cuDNN 3.3 ms in three dimensions and 0.07 ms in two;
# on a CPU all of it is 2 to 4 times faster. With more channels their threefold input costs more.
_NARROW = 64


def _precision(kernel: Array, how: How) -> lax.Precision:
    return how.precision if kernel.dtype == jnp.float32 else lax.Precision.DEFAULT


def conv3d(
    p: CausalConv3D, x: Array, past: Array, *, how: How, stride: int = 1
) -> tuple[Array, Array]:
    """Convolution of past and x over time and space; the output, and the past of the next chunk.

    The past has two frames, one where `stride`, the step in time, is 2. Space is padded evenly,
    inside the convolution; padding the time axis there would cost a copy of the input.
    """
    kernel = p.kernel[...]
    even = [(size // 2, size // 2) for size in kernel.shape[2:4]]
    frames, padding = _given(x.astype(kernel.dtype), past, even, how=how)
    narrow = max(kernel.shape[0], kernel.shape[-1]) <= _NARROW
    run = _conv3d_by_frames if narrow else _conv3d
    after = frames[:, -past.shape[1] :]
    if how.columns is not None:
        # Else XLA, who delays what nobody waits for to hide what devices tell each other, cuts the
        # pasts at the end and keeps the frames of every layer: 9.1 GB in place of 3.0 at 720P.
        frames, after = lax.optimization_barrier((frames, after))
    y = run(kernel, frames, stride, padding=padding, precision=_precision(kernel, how))
    return y + p.bias[...], after


def _given(
    x: Array, past: Array | None, padding: Sequence[Padding], *, how: How
) -> tuple[Array, Sequence[Padding]]:
    """What a convolution is given for x, and the padding along y and x that is left to it.

    A share of the columns gets those of its neighbours in place of padding.
    """
    if how.columns is not None and any(padding[1]):
        return how.columns.widen(x, padding[1], past=past), [padding[0], (0, 0)]
    return x if past is None else jnp.concatenate([past, x], axis=1), padding


def _conv3d(
    kernel: Array,
    frames: Array,
    stride: int,
    *,
    padding: Sequence[Padding],
    precision: lax.Precision,
) -> Array:
    return lax.conv_general_dilated(
        frames,
        kernel,
        (stride, 1, 1),
        [(0, 0), *padding],
        dimension_numbers=("NDHWC", "ODHWI", "NDHWC"),
        precision=precision,
    )


def _conv3d_by_frames(
    kernel: Array,
    frames: Array,
    stride: int,
    *,
    padding: Sequence[Padding],
    precision: lax.Precision,
) -> Array:
    """The same, as a convolution of single frames whose channels are those of a whole window."""
    d_out, window, *space, d_in = kernel.shape
    count = (frames.shape[1] - window) // stride + 1
    views = [frames[:, i : i + stride * (count - 1) + 1 : stride] for i in range(window)]
    stacked = jnp.concatenate(views, axis=-1)
    y = lax.conv_general_dilated(
        stacked.reshape(-1, *stacked.shape[2:]),
        jnp.moveaxis(kernel, 1, 3).reshape(d_out, *space, window * d_in),
        (1, 1),
        padding,
        dimension_numbers=("NHWC", "OHWI", "NHWC"),
        precision=precision,
    )
    return y.reshape(*stacked.shape[:2], *y.shape[1:])


def conv2d(p: Conv2D, x: Array, *, how: How, stride: int, padding: Padding) -> Array:
    """3x3 convolution of every frame, padded by (before, after) on both axes."""
    kernel = p.kernel[...]
    x, both = _given(x.astype(kernel.dtype), None, [padding, padding], how=how)
    y = lax.conv_general_dilated(
        x.reshape(-1, *x.shape[2:]),
        kernel,
        (stride, stride),
        both,
        dimension_numbers=("NHWC", "OHWI", "NHWC"),
        precision=_precision(kernel, how),
    )
    return y.reshape(*x.shape[:2], *y.shape[1:]) + p.bias[...]


def conv1x1(p: Linear, x: Array, *, how: How) -> Array:
    """Product over the channels at a convolution's precision, as the reference runs it."""
    kernel = p.kernel[...]
    y = lax.dot_general(
        x.astype(kernel.dtype),
        kernel,
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=_precision(kernel, how),
        preferred_element_type=jnp.float32,
    )
    if p.bias is not None:
        y = y + p.bias[...].astype(jnp.float32)
    return y.astype(kernel.dtype)


def norm(p: RMSNorm, x: Array) -> Array:
    """x / max(|x|, 1e-12) * sqrt(c) * scale over the channels, in float32.

    This is no layers.rms_norm: the bound stands in place of an epsilon in the mean.
    """
    x = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), -1, keepdims=True)
    inverse = lax.rsqrt(jnp.maximum(squares, 1e-24)) * math.sqrt(x.shape[-1])
    return x * inverse * p.scale[...].astype(jnp.float32)


def norm_silu(p: RMSNorm, x: Array) -> Array:
    """SiLU of norm(), in float32."""
    return jax.nn.silu(norm(p, x))


def residual_block(
    p: ResidualBlock, x: Array, state: BlockState, *, how: How
) -> tuple[Array, BlockState]:
    """The block and its next state."""
    h, past1 = conv3d(p.conv1, norm_silu(p.norm1, x), state.conv1, how=how)
    h, past2 = conv3d(p.conv2, norm_silu(p.norm2, h), state.conv2, how=how)
    if p.shortcut is not None:
        x = conv1x1(p.shortcut, x, how=how)
    return x + h, BlockState(past1, past2)


def attention_block(p: AttentionBlock, x: Array, *, how: How) -> Array:
    """Self-attention within each frame. Its own products are float32 for float32 weights."""
    frames, c = x.shape[0] * x.shape[1], x.shape[-1]
    q, kv = jnp.split(conv1x1(p.qkv, norm(p.norm, x), how=how), [c], axis=-1)
    if how.columns is not None:
        kv = how.columns.join(kv)
    k, v = jnp.split(kv.reshape(frames, -1, 1, 2 * c), 2, axis=-1)
    q = q.reshape(frames, -1, 1, c)
    h = attention(q, k, v, implementation="chunked").reshape(x.shape)
    return x + conv1x1(p.out, h, how=how)


def middle(p: Middle, x: Array, state: MiddleState, *, how: How) -> tuple[Array, MiddleState]:
    """The middle of either network and its next state."""
    x, past1 = residual_block(p.block1, x, state.block1, how=how)
    x = attention_block(p.attention, x, how=how)
    x, past2 = residual_block(p.block2, x, state.block2, how=how)
    return x, MiddleState(past1, past2)


def downsample(
    p: Resample, x: Array, past: Array | None, *, how: How
) -> tuple[Array, Array | None]:
    """Halve space, then time where `p.time` says so; the first frame of all stays as it is.

    The last row and column are zero-padded, the first are not.
    """
    x = conv2d(p.space, x, how=how, stride=2, padding=(0, 1))
    if p.time is None or past is None:
        return x, past
    if how.first:
        return x, x
    return conv3d(p.time, x, past, how=how, stride=2)


def upsample(p: Resample, x: Array, past: Array | None, *, how: How) -> tuple[Array, Array | None]:
    """Double time where `p.time` says so, then space by repetition.

    The first frame of all is not doubled, and is not remembered either: the frame after it sees
    zeros for a past (Wan2.1 wan/modules/vae.py, Resample).
    """
    if p.time is not None and past is not None and not how.first:
        b, t, height, width, c = x.shape
        y, past = conv3d(p.time, x, past, how=how)
        y = y.reshape(b, t, height, width, 2, c)  # halves of the channels: even, odd frames
        x = jnp.moveaxis(y, 4, 2).reshape(b, 2 * t, height, width, c)
    x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    return conv2d(p.space, x, how=how, stride=1, padding=(1, 1)), past


def run_stage(
    p: Blocks,
    x: Array,
    state: StageState,
    *,
    resample: Callable[..., tuple[Array, Array | None]],
    how: How,
    cut: Callable[[Array], Array] | None = None,
) -> tuple[Array, StageState]:
    """The blocks of one stage, then `resample` (downsample or upsample) if it has one.

    cut: gives what is resampled of what the blocks give; None is all.
    """
    pasts = []
    for block, block_state in zip(p.blocks, state.blocks, strict=True):
        x, past = residual_block(block, x, block_state, how=how)
        pasts.append(past)
    time = state.time
    if p.resample is not None:
        x, time = resample(p.resample, x if cut is None else cut(x), time, how=how)
    return x, StageState(tuple(pasts), time)
