"""The VAE's stages, and what its encoder and decoder remember of the frames before a chunk.

A past is [b, t, y, x, c]: the last frames that a convolution over time was given.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from wan_jax.columns import Columns
from wan_jax.config import VAEConfig
from wan_jax.layers import Array

RGB = 3


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


class State(NamedTuple):
    """Everything the encoder or the decoder remembers of the frames before this chunk."""

    conv_in: Array
    middle: MiddleState
    stages: tuple[StageState, ...]
    conv_out: Array


class Coarse(NamedTuple):
    """Of a State what belongs to the latents' resolution; conv: at the latents' end.

    stage: the encoder's last, or the decoder's first, whose upsampling belongs to it.
    """

    conv: Array
    middle: MiddleState
    stage: StageState


class Fine(NamedTuple):
    """Of a State what is finer than that; conv: at the pixels' end."""

    stages: tuple[StageState, ...]
    conv: Array


def encoder_parts(state: State) -> tuple[Coarse, Fine]:
    """An encoder's state in two."""
    coarse = Coarse(state.conv_out, state.middle, state.stages[-1])
    return coarse, Fine(state.stages[:-1], state.conv_in)


def decoder_parts(state: State) -> tuple[Coarse, Fine]:
    """A decoder's state in two."""
    coarse = Coarse(state.conv_in, state.middle, state.stages[0])
    return coarse, Fine(state.stages[1:], state.conv_out)


# A convolution looks one column to either side; that of a halving in space one to the right.


def encoder_reaches(config: VAEConfig) -> tuple[int, ...]:
    """How far the encoder sees as frames become Coarse's input, in latent columns to either side.

    At most so many are seen by all of it, and by what follows the blocks of each finer stage.
    """
    reach, found = 0, []
    for i, stage in reversed(list(enumerate(encoder_stages(config)[:-1]))):
        pixels = config.spatial_stride >> i  # a latent column there
        reach = 2 * reach + 1 if stage.resample else reach
        found.append(-(-reach // pixels))
        reach += 2 * stage.num_blocks
    return -(-(reach + 1) // config.spatial_stride), *reversed(found)


def decoder_reaches(config: VAEConfig) -> tuple[int, ...]:
    """The same of the decoder, as frames become of what comes of Coarse.

    By all of it, and by what follows the blocks of each finer stage but the last.
    """
    reach, found = 1, []
    first, *finer = decoder_stages(config)
    for i, stage in reversed(list(enumerate(finer, start=1 if first.resample else 0))):
        if stage.resample:
            # The convolution is behind the doubling: of two columns that are one both see the same.
            reach = -(-(reach + 1) // 2)
            found.append(-(-reach // 2**i))
        reach += 2 * stage.num_blocks
    return -(-reach // 2) if first.resample else reach, *reversed(found)


def features_shape(
    config: VAEConfig, latent_shape: tuple[int, ...], *, first: bool
) -> tuple[int, ...]:
    """Of what the decoder makes at first of latents [b, t, h, w, z]; first: of the first of all."""
    b, t, h, w, _ = latent_shape
    stage = decoder_stages(config)[0]
    up = 2 if stage.resample else 1
    count = 2 * t if stage.temporal and not first else t
    return b, count, up * h, up * w, stage.d_out // up


def encoder_state(
    config: VAEConfig,
    batch: int,
    *,
    height: int,
    width: int,
    dtype: jnp.dtype = jnp.float32,
    columns: Columns | None = None,
) -> State:
    """Zero state of the encoder.

    height, width: of the latent grid. dtype: that of the weights. columns: whose share it is of,
    None all.
    """
    plan = encoder_stages(config)
    zeros = functools.partial(_zeros, batch, dtype, height, width, columns)
    pasts = [zeros(up) for up in range(len(plan) - 1, -1, -1)]
    stages = []
    for i, stage in enumerate(plan):
        time = None
        if stage.temporal:  # behind the halving of space, and one frame: it steps by two
            time = zeros(len(plan) - 2 - i, beside=0, frames=1)(stage.d_out)
        stages.append(stage_state(stage, pasts[i], time))
    d = plan[-1].d_out
    return State(pasts[0](RGB), middle_state(d, pasts[-1]), tuple(stages), pasts[-1](d))


def decoder_state(
    config: VAEConfig,
    batch: int,
    *,
    height: int,
    width: int,
    dtype: jnp.dtype = jnp.float32,
    columns: Columns | None = None,
) -> State:
    """Zero state of the decoder.

    height, width: of the latent grid. dtype: that of the weights. columns: whose share it is of,
    None all.
    """
    plan = decoder_stages(config)
    zeros = functools.partial(_zeros, batch, dtype, height, width, columns)
    pasts = [zeros(up) for up in range(len(plan))]
    stages = tuple(
        stage_state(stage, past, zeros(i, beside=0)(stage.d_out) if stage.temporal else None)
        for i, (stage, past) in enumerate(zip(plan, pasts, strict=True))
    )
    mid = middle_state(plan[0].d_in, pasts[0])
    return State(pasts[0](config.z_dim), mid, stages, pasts[-1](plan[-1].d_out))


def _zeros(
    batch: int,
    dtype: jnp.dtype,
    height: int,
    width: int,
    columns: Columns | None,
    up: int,
    *,
    beside: int = 1,
    frames: int = 2,
) -> Past:
    """Pasts at 2**up times the latent grid.

    beside: columns of either neighbour, as the convolution looks to the side. A past keeps them, so
    that each is sent once, with its frame, and not again with every chunk that has it for a past;
    and what a convolution is given is still one concatenation, of past and input.
    """
    own = width << up if columns is None else (columns.share << up) + 2 * beside
    return lambda d: jnp.zeros((batch, frames, height << up, own, d), dtype)
