"""What the VAE's encoder and decoder are made of: blocks, their weights and their pasts.

Arrays are [b, t, y, x, c]. A convolution over time takes the frames that came before its input,
its past, and gives the past of the next chunk back; its padding in time is nothing but that.
Activations have the dtype of the weights, norms are float32. `precision` is that of the
convolutions (1x1 ones included) and counts for float32 weights only.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from wan_jax.attention import attention
from wan_jax.config import VAEConfig
from wan_jax.layers import Array, Linear, RMSNorm, normal


class Stage(NamedTuple):
    """One resolution: residual blocks d_in -> d_out -> d_out ..., then a resampling or none."""

    d_in: int
    d_out: int
    num_blocks: int
    resample: bool
    temporal: bool


def encoder_stages(config: VAEConfig) -> tuple[Stage, ...]:
    """Stages of the encoder, finest first; stage i works at 1 / 2**i of the pixel grid."""
    widths = [config.base_dim * m for m in (1, *config.dim_mult)]
    last = len(config.dim_mult) - 1
    temporal = (*config.temporal_downsample, False)
    return tuple(
        Stage(widths[i], widths[i + 1], config.num_res_blocks, i < last, temporal[i])
        for i in range(last + 1)
    )


def decoder_stages(config: VAEConfig) -> tuple[Stage, ...]:
    """Stages of the decoder, coarsest first; every upsampling halves the channels."""
    widths = [config.base_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
    last = len(config.dim_mult) - 1
    temporal = (*reversed(config.temporal_downsample), False)
    return tuple(
        Stage(
            widths[i] // 2 if i else widths[0],
            widths[i + 1],
            config.num_res_blocks + 1,
            i < last,
            temporal[i],
        )
        for i in range(last + 1)
    )


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

Past = Callable[[int], Array]


class BlockState(NamedTuple):
    """Pasts of one residual block, [b, 2, y, x, c] each."""

    conv1: Array
    conv2: Array


class StageState(NamedTuple):
    """Pasts of one stage; time is that of its resampling in time, if it has one."""

    blocks: tuple[BlockState, ...]
    time: Array | None


class MiddleState(NamedTuple):
    """Pasts of the middle's two residual blocks."""

    block1: BlockState
    block2: BlockState


def block_state(d_in: int, d_out: int, past: Past) -> BlockState:
    """Zero state of a residual block; past(d) makes zeros of d channels."""
    return BlockState(past(d_in), past(d_out))


def middle_state(d: int, past: Past) -> MiddleState:
    """Zero state of the middle."""
    return MiddleState(block_state(d, d, past), block_state(d, d, past))


def stage_state(stage: Stage, past: Past, time: Array | None) -> StageState:
    """Zero state of a stage whose resampling in time has this past."""
    widths = (stage.d_in, *(stage.d_out for _ in range(stage.num_blocks - 1)))
    return StageState(tuple(block_state(d, stage.d_out, past) for d in widths), time)


def _precision(kernel: Array, precision: lax.Precision) -> lax.Precision:
    return precision if kernel.dtype == jnp.float32 else lax.Precision.DEFAULT


def conv3d(
    p: CausalConv3D, x: Array, past: Array, *, precision: lax.Precision, stride: int = 1
) -> tuple[Array, Array]:
    """Convolution of past and x over time and space; the output, and the past of the next chunk.

    The past has two frames, one where `stride`, the step in time, is 2. Space is padded evenly,
    inside the convolution; padding the time axis there would cost a copy of the input.
    """
    kernel = p.kernel[...]
    frames = jnp.concatenate([past, x.astype(kernel.dtype)], axis=1)
    narrow = max(kernel.shape[0], kernel.shape[-1]) <= _NARROW
    run = _conv3d_by_frames if narrow else _conv3d
    y = run(kernel, frames, stride, precision=_precision(kernel, precision))
    return y + p.bias[...], frames[:, -past.shape[1] :]


def _space(kernel: Array) -> list[tuple[int, int]]:
    """Even padding in space for kernel [..., y, x, d_in]."""
    return [(size // 2, size // 2) for size in kernel.shape[-3:-1]]


def _conv3d(kernel: Array, frames: Array, stride: int, *, precision: lax.Precision) -> Array:
    return lax.conv_general_dilated(
        frames,
        kernel,
        (stride, 1, 1),
        [(0, 0), *_space(kernel)],
        dimension_numbers=("NDHWC", "ODHWI", "NDHWC"),
        precision=precision,
    )


def _conv3d_by_frames(
    kernel: Array, frames: Array, stride: int, *, precision: lax.Precision
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
        _space(kernel),
        dimension_numbers=("NHWC", "OHWI", "NHWC"),
        precision=precision,
    )
    return y.reshape(*stacked.shape[:2], *y.shape[1:])


def conv2d(
    p: Conv2D, x: Array, *, precision: lax.Precision, stride: int, padding: tuple[int, int]
) -> Array:
    """3x3 convolution of every frame, padded by (before, after) on both axes."""
    kernel = p.kernel[...]
    y = lax.conv_general_dilated(
        x.reshape(-1, *x.shape[2:]).astype(kernel.dtype),
        kernel,
        (stride, stride),
        [padding, padding],
        dimension_numbers=("NHWC", "OHWI", "NHWC"),
        precision=_precision(kernel, precision),
    )
    return y.reshape(*x.shape[:2], *y.shape[1:]) + p.bias[...]


def conv1x1(p: Linear, x: Array, *, precision: lax.Precision) -> Array:
    """Product over the channels at a convolution's precision, as the reference runs it."""
    kernel = p.kernel[...]
    y = lax.dot_general(
        x.astype(kernel.dtype),
        kernel,
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=_precision(kernel, precision),
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
    p: ResidualBlock, x: Array, state: BlockState, *, precision: lax.Precision
) -> tuple[Array, BlockState]:
    """The block and its next state."""
    h, past1 = conv3d(p.conv1, norm_silu(p.norm1, x), state.conv1, precision=precision)
    h, past2 = conv3d(p.conv2, norm_silu(p.norm2, h), state.conv2, precision=precision)
    if p.shortcut is not None:
        x = conv1x1(p.shortcut, x, precision=precision)
    return x + h, BlockState(past1, past2)


def attention_block(p: AttentionBlock, x: Array, *, precision: lax.Precision) -> Array:
    """Self-attention within each frame. Its own products are float32 for float32 weights."""
    b, t, height, width, c = x.shape
    qkv = conv1x1(p.qkv, norm(p.norm, x), precision=precision)
    q, k, v = jnp.split(qkv.reshape(b * t, height * width, 1, 3 * c), 3, axis=-1)
    h = attention(q, k, v, implementation="chunked").reshape(x.shape)
    return x + conv1x1(p.out, h, precision=precision)


def middle(
    p: Middle, x: Array, state: MiddleState, *, precision: lax.Precision
) -> tuple[Array, MiddleState]:
    """The middle of either network and its next state."""
    x, past1 = residual_block(p.block1, x, state.block1, precision=precision)
    x = attention_block(p.attention, x, precision=precision)
    x, past2 = residual_block(p.block2, x, state.block2, precision=precision)
    return x, MiddleState(past1, past2)


def downsample(
    p: Resample, x: Array, past: Array | None, *, first: bool, precision: lax.Precision
) -> tuple[Array, Array | None]:
    """Halve space, then time where `p.time` says so; the first frame of all stays as it is.

    The last row and column are zero-padded, the first are not.
    """
    x = conv2d(p.space, x, precision=precision, stride=2, padding=(0, 1))
    if p.time is None or past is None:
        return x, past
    if first:
        return x, x
    return conv3d(p.time, x, past, precision=precision, stride=2)


def upsample(
    p: Resample, x: Array, past: Array | None, *, first: bool, precision: lax.Precision
) -> tuple[Array, Array | None]:
    """Double time where `p.time` says so, then space by repetition.

    The first frame of all is not doubled, and is not remembered either: the frame after it sees
    zeros for a past (Wan2.1 wan/modules/vae.py, Resample).
    """
    if p.time is not None and past is not None and not first:
        b, t, height, width, c = x.shape
        y, past = conv3d(p.time, x, past, precision=precision)
        y = y.reshape(b, t, height, width, 2, c)  # halves of the channels: even, odd frames
        x = jnp.moveaxis(y, 4, 2).reshape(b, 2 * t, height, width, c)
    x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    return conv2d(p.space, x, precision=precision, stride=1, padding=(1, 1)), past


def run_stage(
    p: Blocks,
    x: Array,
    state: StageState,
    *,
    resample: Callable[..., tuple[Array, Array | None]],
    first: bool,
    precision: lax.Precision,
) -> tuple[Array, StageState]:
    """The blocks of one stage, then `resample` (downsample or upsample) if it has one."""
    pasts = []
    for block, block_state in zip(p.blocks, state.blocks, strict=True):
        x, past = residual_block(block, x, block_state, precision=precision)
        pasts.append(past)
    time = state.time
    if p.resample is not None:
        x, time = resample(p.resample, x, time, first=first, precision=precision)
    return x, StageState(tuple(pasts), time)
