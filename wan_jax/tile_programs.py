"""The compiled programs of the VAE in tiles, and a tile's state: what vae_tiles.py drives.

A tile's window is narrowed as soon as nothing that follows sees the columns that are cut off.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wan_jax import spread, vae, xla
from wan_jax.config import VAEConfig
from wan_jax.sharding import Layout
from wan_jax.tiles import Tiles
from wan_jax.vae_blocks import How
from wan_jax.vae_stages import (
    Coarse,
    Fine,
    StageState,
    State,
    decoder_parts,
    decoder_reaches,
    encoder_parts,
    encoder_reaches,
)

Array = jax.Array
Offsets = tuple[Any, ...]  # as a Place has them


def encoder_tiles(config: VAEConfig, width: int, number: int) -> Tiles:
    """Tiles in which frames are encoded; width: of the latents."""
    return Tiles(width, min(number, width), encoder_reaches(config))


def decoder_tiles(config: VAEConfig, width: int, number: int) -> Tiles:
    """Tiles in which latents so wide are decoded."""
    return Tiles(width, min(number, width), decoder_reaches(config))


class Run(NamedTuple):
    """How a video is run. dtype: of the run, "bfloat16" or "float32"."""

    tiles: Tiles
    dtype: str
    layout: Layout | None


@functools.cache
def decode_coarse_program(first: bool, run: Run) -> xla.Program:
    """Of (network, latents, coarse state): every tile's window of features, and the next state."""

    def own(
        network: vae.VAE, latents: Array, state: Coarse | None, *, fetch: None = None
    ) -> tuple[tuple[Array, ...], Coarse]:
        del fetch  # the network has no stack of layers
        if state is None:
            state, _ = decoder_parts(_whole(vae.decoder_state, network, latents))
        raw = vae.raw_latents(network.config, latents)
        features, state = vae.decode_coarse(network, raw, state, how=_how(first, run))
        numbers = range(run.tiles.total)
        return tuple(run.tiles.window(features, number) for number in numbers), state

    return spread.program(own, run.layout, donate_argnums=2)


@functools.cache
def decode_fine_program(first: bool, pixels: str, run: Run) -> xla.Program:
    """Of (network, window of features, offsets, fine state, rounding): a tile's own.

    ((frames, whether they are finite), the next state). offsets: as a Place has them.
    """

    def own(
        network: vae.VAE,
        window: Array,
        offsets: Offsets,
        state: Fine | None,
        rounding: Array,
        *,
        fetch: None = None,
    ) -> tuple[tuple[Array, Array], Fine]:
        del fetch
        tiles, how = run.tiles, _how(first, run)
        if state is None:
            b, _, y, x, _ = window.shape
            height = y * tiles.windows[0] // x
            state = decoder_fine(network, b, height=height, tiles=tiles)
        cut = functools.partial(_cut, tiles, offsets)
        frames, state = vae.decode_fine(network, window, state, how=how, cut=cut)
        frames = cut(len(offsets) - 1, jnp.clip(frames, -1.0, 1.0))
        return (levels(frames, pixels, rounding), jnp.all(jnp.isfinite(frames))), state

    return spread.program(own, run.layout, donate_argnums=3)


@functools.cache
def encode_fine_program(first: bool, run: Run) -> xla.Program:
    """Of (network, window of pixels, offsets, fine state): a tile's own.

    (what encode_coarse_program() takes, the next state).
    """

    def own(
        network: vae.VAE,
        window: Array,
        offsets: Offsets,
        state: Fine | None,
        *,
        fetch: None = None,
    ) -> tuple[Array, Fine]:
        del fetch
        tiles, how = run.tiles, _how(first, run)
        if state is None:
            b, _, y, _, _ = window.shape
            height = y // network.config.spatial_stride
            state = encoder_fine(network, b, height=height, tiles=tiles)
        cut = functools.partial(_cut, tiles, offsets)
        found, state = vae.encode_fine(network, window, state, how=how, cut=cut)
        return cut(len(offsets) - 1, found).astype(network.dtype), state

    return spread.program(own, run.layout, donate_argnums=3)


@functools.cache
def encode_coarse_program(first: bool, run: Run) -> xla.Program:
    """Of (network, features, coarse state): the latents and the next state."""

    def own(
        network: vae.VAE, features: Array, state: Coarse | None, *, fetch: None = None
    ) -> tuple[Array, Coarse]:
        del fetch
        if state is None:
            state, _ = encoder_parts(_whole(vae.encoder_state, network, features))
        found, state = vae.encode_coarse(network, features, state, how=_how(first, run))
        return vae.normalised(network.config, found), state

    return spread.program(own, run.layout, donate_argnums=2)


def encoder_fine(network: vae.VAE, batch: int, *, height: int, tiles: Tiles) -> Fine:
    """The zero state of a tile of frames; height: of the latents."""
    size: dict[str, Any] = {"height": height, "dtype": network.dtype}
    make = functools.partial(vae.encoder_state, network.config, batch, **size)
    of_windows = [encoder_parts(make(width=window))[1] for window in tiles.windows]
    return Fine(_narrowing(of_windows), of_windows[0].conv)


def decoder_fine(network: vae.VAE, batch: int, *, height: int, tiles: Tiles) -> Fine:
    """The zero state of a tile of latents so high."""
    size: dict[str, Any] = {"height": height, "dtype": network.dtype}
    make = functools.partial(vae.decoder_state, network.config, batch, **size)
    of_windows = [decoder_parts(make(width=window))[1] for window in tiles.windows]
    return Fine(_narrowing(of_windows), of_windows[-1].conv)


def _whole(make: Callable[..., State], network: vae.VAE, x: Array) -> State:
    """The zero state of a video of x's batch and size, at the latents' resolution."""
    b, _, height, width, _ = x.shape
    return make(network.config, b, height=height, width=width, dtype=network.dtype)


def _narrowing(of_windows: Sequence[Fine]) -> tuple[StageState, ...]:
    """Stage i's state in window i; of its resampling, which is behind the cut, in the next one."""
    last = len(of_windows) - 1
    return tuple(
        of_windows[i].stages[i]._replace(time=of_windows[min(i + 1, last)].stages[i].time)
        for i in range(len(of_windows[0].stages))
    )


def _cut(tiles: Tiles, offsets: Offsets, i: int, x: Array) -> Array:
    return tiles.narrow(x, i, offsets)


def _how(first: bool, run: Run) -> How:
    return How(first, xla.convolutions(run.dtype))


def levels(frames: Array, pixels: str, rounding: Array) -> Array:
    """Frames of -1..1 as "uint8", truncated after `rounding` is added, or as "float32"."""
    if pixels != "uint8":
        return frames
    return jnp.minimum((frames + 1.0) * 0.5 * 255.0 + rounding, 255.0).astype(jnp.uint8)
