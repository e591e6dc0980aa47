"""The VAE on a whole video at once, as its own training and that of the miniature's DiTs run it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from wan_jax import vae
from wan_jax.vae import VAE
from wan_jax.vae_blocks import How
from wan_jax.vae_stages import State

Array = jax.Array


def moments(
    network: VAE, frames: Array, *, precision: lax.Precision = vae.HIGHEST
) -> tuple[Array, Array]:
    """Mean and log-variance of the raw latents of a video.

    frames: [b, 1 + 4n, y, x, 3] in -1..1. Both are [b, 1 + n, y/8, x/8, z], float32.
    """
    config, (batch, _, y, x, _) = network.config, frames.shape
    height, width = y // config.spatial_stride, x // config.spatial_stride
    state = vae.encoder_state(config, batch, height=height, width=width, dtype=network.dtype)
    both = _whole(functools.partial(vae.encode_raw, network), frames, state, precision=precision)
    return tuple(jnp.split(both, 2, axis=-1))  # type: ignore[return-value]


def reconstruct(network: VAE, raw: Array, *, precision: lax.Precision = vae.HIGHEST) -> Array:
    """Frames [b, 1 + 4n, 8h, 8w, 3], float32 and not clipped, of what moments() gives."""
    batch, _, height, width, _ = raw.shape
    state = vae.decoder_state(
        network.config, batch, height=height, width=width, dtype=network.dtype
    )
    return _whole(functools.partial(vae.decode_raw, network), raw, state, precision=precision)


def _whole(
    run: Callable[..., tuple[Array, State]],
    source: Array,
    state: State,
    *,
    precision: lax.Precision,
) -> Array:
    """The first frame and then all others at once."""
    head, state = run(source[:, :1], state, how=How(True, precision))
    if source.shape[1] == 1:
        return head
    rest, _ = run(source[:, 1:], state, how=How(False, precision))
    return jnp.concatenate([head, rest], axis=1)
