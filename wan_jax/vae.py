"""The causal video VAE, streamed in time with its state as a value.

Arrays are [b, t, y, x, c]. The first frame goes through encode_first or decode_first, everything
after it through encode_next or decode_next in chunks of any size, each call taking the State that
the one before it gave. Chunks change the speed and the memory, never the values. encode and decode
drive them over a whole video in memory that, the output apart, does not grow with its length.

Latents are normalised, float32, and never sampled: the encoder's mean is taken. Frames are RGB in
-1..1. `precision` is that of the convolutions and counts for float32 weights only: DEFAULT is TF32
on NVIDIA, what the reference runs in; HIGHEST is float32 everywhere. With `columns`, inside
shard_map, frames, latents and state are a device's share of them.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax import lax

from wan_jax.columns import Columns
from wan_jax.config import VAEConfig
from wan_jax.layers import Array, Linear, RMSNorm
from wan_jax.vae_blocks import (
    Blocks,
    CausalConv3D,
    How,
    Middle,
    Resample,
    conv1x1,
    conv3d,
    downsample,
    middle,
    norm_silu,
    run_stage,
    upsample,
)
from wan_jax.vae_stages import (
    RGB,
    Coarse,
    Fine,
    State,
    decoder_parts,
    decoder_stages,
    decoder_state,
    encoder_parts,
    encoder_stages,
    encoder_state,
)

HIGHEST = lax.Precision.HIGHEST


class Encoder(nnx.Module):
    """Pixels to twice z_dim channels: means, then log-variances."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        make = functools.partial(Resample, rngs=rngs, dtype=dtype)
        stages = encoder_stages(config)
        self.conv_in = CausalConv3D(RGB, stages[0].d_in, (3, 3, 3), rngs=rngs, dtype=dtype)
        self.stages: nnx.List[Blocks] = nnx.List()
        for s in stages:
            time = s.d_out if s.temporal else None
            resample = make(s.d_out, d_space=s.d_out, d_time=time) if s.resample else None
            self.stages.append(Blocks(s, resample, rngs=rngs, dtype=dtype))
        d = stages[-1].d_out
        self.middle = Middle(d, rngs=rngs, dtype=dtype)
        self.norm_out = RMSNorm(d, dtype=dtype)
        self.conv_out = CausalConv3D(d, 2 * config.z_dim, (3, 3, 3), rngs=rngs, dtype=dtype)


class Decoder(nnx.Module):
    """z_dim channels to pixels."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        make = functools.partial(Resample, rngs=rngs, dtype=dtype)
        stages = decoder_stages(config)
        self.conv_in = CausalConv3D(config.z_dim, stages[0].d_in, (3, 3, 3), rngs=rngs, dtype=dtype)
        self.middle = Middle(stages[0].d_in, rngs=rngs, dtype=dtype)
        self.stages: nnx.List[Blocks] = nnx.List()
        for s in stages:
            time = 2 * s.d_out if s.temporal else None
            resample = make(s.d_out, d_space=s.d_out // 2, d_time=time) if s.resample else None
            self.stages.append(Blocks(s, resample, rngs=rngs, dtype=dtype))
        d = stages[-1].d_out
        self.norm_out = RMSNorm(d, dtype=dtype)
        self.conv_out = CausalConv3D(d, RGB, (3, 3, 3), rngs=rngs, dtype=dtype)


class VAE(nnx.Module):
    """Encoder, decoder, and the 1x1x1 convolutions on either side of the latents."""

    def __init__(
        self, config: VAEConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32
    ) -> None:
        self.config = config
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype)
        self.quant = Linear(2 * config.z_dim, 2 * config.z_dim, rngs=rngs, dtype=dtype)
        self.post_quant = Linear(config.z_dim, config.z_dim, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config, rngs=rngs, dtype=dtype)

    @property
    def dtype(self) -> jnp.dtype:
        """Of the weights, and so of the state."""
        return self.decoder.conv_in.kernel.dtype


Cut = Callable[[int, Array], Array]


def _all(i: int, x: Array) -> Array:
    del i
    return x


def encode_fine(
    vae: VAE, frames: Array, state: Fine, *, how: How, cut: Cut = _all
) -> tuple[Array, Fine]:
    """The encoder as far as the latents' resolution, at which encode_coarse() goes on.

    cut: of i and what the blocks of stage i give: the columns that are kept of it.
    """
    p = vae.encoder
    x, conv_in = conv3d(p.conv_in, frames, state.conv, how=how)
    stages = []
    for i, (blocks, past) in enumerate(zip(list(p.stages)[:-1], state.stages, strict=True)):
        own = functools.partial(cut, i)
        x, after = run_stage(blocks, x, past, resample=downsample, how=how, cut=own)
        stages.append(after)
    return x, Fine(tuple(stages), conv_in)


def encode_coarse(vae: VAE, x: Array, state: Coarse, *, how: How) -> tuple[Array, Coarse]:
    """Means and log-variances of raw latents, [b, t, h, w, 2 z] float32, of encode_fine()'s."""
    p = vae.encoder
    x, stage = run_stage(p.stages[-1], x, state.stage, resample=downsample, how=how)
    x, mid = middle(p.middle, x, state.middle, how=how)
    x, conv_out = conv3d(p.conv_out, norm_silu(p.norm_out, x), state.conv, how=how)
    return conv1x1(vae.quant, x, how=how).astype(jnp.float32), Coarse(conv_out, mid, stage)


def decode_coarse(vae: VAE, raw: Array, state: Coarse, *, how: How) -> tuple[Array, Coarse]:
    """The decoder of raw latents as far as its first upsampling, whence decode_fine() goes on."""
    p = vae.decoder
    z = conv1x1(vae.post_quant, raw, how=how)
    x, conv_in = conv3d(p.conv_in, z, state.conv, how=how)
    x, mid = middle(p.middle, x, state.middle, how=how)
    x, stage = run_stage(p.stages[0], x, state.stage, resample=upsample, how=how)
    return x, Coarse(conv_in, mid, stage)


def decode_fine(
    vae: VAE, x: Array, state: Fine, *, how: How, cut: Cut = _all
) -> tuple[Array, Fine]:
    """Frames, float32 and not clipped, of what decode_coarse() gives; cut: as in encode_fine()."""
    p, stages = vae.decoder, []
    for i, (blocks, past) in enumerate(zip(list(p.stages)[1:], state.stages, strict=True)):
        own = functools.partial(cut, i)
        x, after = run_stage(blocks, x, past, resample=upsample, how=how, cut=own)
        stages.append(after)
    x, conv_out = conv3d(p.conv_out, norm_silu(p.norm_out, x), state.conv, how=how)
    return x.astype(jnp.float32), Fine(tuple(stages), conv_out)


def normalised(config: VAEConfig, moments: Array) -> Array:
    """Latents of the means and log-variances of raw ones."""
    mean, std = _statistics(config)
    return (moments[..., : config.z_dim] - mean) / std


def raw_latents(config: VAEConfig, latents: Array) -> Array:
    """What normalised() has made latents of."""
    mean, std = _statistics(config)
    return latents.astype(jnp.float32) * std + mean


def _statistics(config: VAEConfig) -> tuple[Array, Array]:
    return (
        jnp.asarray(config.latents_mean, jnp.float32),
        jnp.asarray(config.latents_std, jnp.float32),
    )


def encode_raw(vae: VAE, frames: Array, state: State, *, how: How) -> tuple[Array, State]:
    """Means and log-variances of raw latents of a chunk, as encode_coarse() gives them."""
    coarse, fine = encoder_parts(state)
    x, fine = encode_fine(vae, frames, fine, how=how)
    x, coarse = encode_coarse(vae, x, coarse, how=how)
    return x, State(fine.conv, coarse.middle, (*fine.stages, coarse.stage), coarse.conv)


def decode_raw(vae: VAE, raw: Array, state: State, *, how: How) -> tuple[Array, State]:
    """Frames of a chunk of raw latents, as decode_fine() gives them."""
    coarse, fine = decoder_parts(state)
    x, coarse = decode_coarse(vae, raw, coarse, how=how)
    x, fine = decode_fine(vae, x, fine, how=how)
    return x, State(coarse.conv, coarse.middle, (coarse.stage, *fine.stages), fine.conv)


def _encode(vae: VAE, frames: Array, state: State, *, how: How) -> tuple[Array, State]:
    moments, state = encode_raw(vae, frames, state, how=how)
    return normalised(vae.config, moments), state


def _decode(vae: VAE, latents: Array, state: State, *, how: How) -> tuple[Array, State]:
    frames, state = decode_raw(vae, raw_latents(vae.config, latents), state, how=how)
    return jnp.clip(frames, -1.0, 1.0), state


def _check(name: str, value: Array, channels: int) -> None:
    if value.ndim != 5 or value.shape[-1] != channels or 0 in value.shape:
        raise ValueError(f"{name} of shape {value.shape}: [b, t, y, x, {channels}] is needed")


def _check_grid(config: VAEConfig, frames: Array) -> None:
    _check("frames", frames, RGB)
    stride, (height, width) = config.spatial_stride, frames.shape[2:4]
    if height % stride or width % stride:
        raise ValueError(
            f"frames are {width}x{height} pixels; width and height must be multiples of {stride}"
        )


def _check_one(name: str, value: Array) -> None:
    if value.shape[1] != 1:
        raise ValueError(f"{name} holds {value.shape[1]} frames; the first chunk is one frame")


def encode_first(
    vae: VAE,
    frame: Array,
    state: State,
    *,
    precision: lax.Precision = HIGHEST,
    columns: Columns | None = None,
) -> tuple[Array, State]:
    """Latent of the first frame.

    frame: [b, 1, y, x, 3] in -1..1; state: encoder_state(). Returns latents [b, 1, y/8, x/8, z],
    float32, and the next state. ValueError for another number of frames or an uneven size.
    """
    _check_grid(vae.config, frame)
    _check_one("frame", frame)
    return _encode(vae, frame, state, how=How(True, precision, columns))


def encode_next(
    vae: VAE,
    frames: Array,
    state: State,
    *,
    precision: lax.Precision = HIGHEST,
    columns: Columns | None = None,
) -> tuple[Array, State]:
    """Latents of the frames after those that gave the state.

    frames: [b, 4k, y, x, 3] in -1..1. Returns latents [b, k, y/8, x/8, z], float32, and the next
    state. ValueError for a number of frames that does not divide or an uneven size.
    """
    _check_grid(vae.config, frames)
    stride = vae.config.temporal_stride
    if frames.shape[1] % stride:
        raise ValueError(f"a chunk of {frames.shape[1]} frames; a multiple of {stride} is needed")
    return _encode(vae, frames, state, how=How(False, precision, columns))


def decode_first(
    vae: VAE,
    latent: Array,
    state: State,
    *,
    precision: lax.Precision = HIGHEST,
    columns: Columns | None = None,
) -> tuple[Array, State]:
    """The first frame.

    latent: [b, 1, h, w, z]; state: decoder_state(). Returns frames [b, 1, 8h, 8w, 3], float32 in
    -1..1, and the next state. ValueError for another number of latent frames.
    """
    _check("latent", latent, vae.config.z_dim)
    _check_one("latent", latent)
    return _decode(vae, latent, state, how=How(True, precision, columns))


def decode_next(
    vae: VAE,
    latents: Array,
    state: State,
    *,
    precision: lax.Precision = HIGHEST,
    columns: Columns | None = None,
) -> tuple[Array, State]:
    """The frames of the latents after those that gave the state.

    latents: [b, k, h, w, z]. Returns frames [b, 4k, 8h, 8w, 3], float32 in -1..1, and the next
    state.
    """
    _check("latents", latents, vae.config.z_dim)
    return _decode(vae, latents, state, how=How(False, precision, columns))


Step = Callable[..., tuple[Array, State]]


def _stream(
    first: Step, following: Step, source: Array, state: State, *, chunk: int, read: int, write: int
) -> Array:
    """Run a video through in chunks that read and write so many frames per latent frame.

    Frames are written in place into one output: stacking the chunks of a scan would copy it.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; a positive number of latent frames is needed")
    count = (source.shape[1] - 1) // read
    head, state = first(source[:, :1], state)
    output = jnp.zeros((head.shape[0], 1 + count * write, *head.shape[2:]), head.dtype)
    output = lax.dynamic_update_slice_in_dim(output, head, 0, axis=1)

    def step(carry: tuple[Array, State], start: Array | int, size: int) -> tuple[Array, State]:
        output, state = carry
        piece = lax.dynamic_slice_in_dim(source, 1 + start * read, size * read, axis=1)
        done, state = following(piece, state)
        return lax.dynamic_update_slice_in_dim(output, done, 1 + start * write, axis=1), state

    carry = (output, state)
    whole = count // chunk * chunk
    if whole:  # the bounds are static, so this is a scan
        carry = lax.fori_loop(0, whole // chunk, lambda i, c: step(c, i * chunk, chunk), carry)
    if count > whole:
        carry = step(carry, whole, count - whole)
    return carry[0]


def encode(vae: VAE, frames: Array, *, chunk: int = 1, precision: lax.Precision = HIGHEST) -> Array:
    """Latents of a whole video.

    frames: [b, 1 + 4n, y, x, 3] in -1..1; chunk: latent frames at a time. Returns latents
    [b, 1 + n, y/8, x/8, z], float32. ValueError for another number of frames or an uneven size.
    """
    config, stride = vae.config, vae.config.spatial_stride
    _check_grid(config, frames)
    batch, count, height, width, _ = frames.shape
    if (count - 1) % config.temporal_stride:
        n = config.temporal_stride
        raise ValueError(f"{count} frames; 1 + {n}n are needed: 1, {1 + n}, {1 + 2 * n}, ...")
    state = encoder_state(
        config,
        batch,
        height=height // stride,
        width=width // stride,
        dtype=vae.dtype,
    )
    return _stream(
        functools.partial(encode_first, vae, precision=precision),
        functools.partial(encode_next, vae, precision=precision),
        frames,
        state,
        chunk=chunk,
        read=config.temporal_stride,
        write=1,
    )


def decode(
    vae: VAE, latents: Array, *, chunk: int = 1, precision: lax.Precision = HIGHEST
) -> Array:
    """Frames of a whole video.

    latents: [b, 1 + n, h, w, z]; chunk: latent frames at a time. Returns frames
    [b, 1 + 4n, 8h, 8w, 3], float32 in -1..1.
    """
    _check("latents", latents, vae.config.z_dim)
    batch, _, height, width, _ = latents.shape
    return _stream(
        functools.partial(decode_first, vae, precision=precision),
        functools.partial(decode_next, vae, precision=precision),
        latents,
        decoder_state(vae.config, batch, height=height, width=width, dtype=vae.dtype),
        chunk=chunk,
        read=1,
        write=vae.config.temporal_stride,
    )
