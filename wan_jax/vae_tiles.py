"""The VAE in tiles of its width on one device: memory that neither length nor width decides.

A tile is a narrower video. What is finer than the latents runs on a window of columns, wide enough
that those in its middle see all that they see in the whole; the others are computed and cut off. A
window ends where the video ends, and not sooner, so what a convolution pads with is right where it
is kept, and the networks know nothing of tiles. Each tile's state waits in the memory of the host
while the others run. What is at the latents' resolution is small and runs whole.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wan_jax import spread, vae, xla
from wan_jax.config import VAEConfig
from wan_jax.sharding import Layout
from wan_jax.vae_blocks import How
from wan_jax.vae_stages import (
    RGB,
    Coarse,
    Fine,
    State,
    decoder_parts,
    decoder_reach,
    encoder_parts,
    encoder_reach,
)

Array = jax.Array
_AXIS = 3  # of [b, t, y, x, c]
_HOST = "pinned_host"


class Place(NamedTuple):
    """Where a tile is, in latent columns: its window, its own columns in that and in the whole."""

    window: np.int32
    inside: np.int32
    own: np.int32


class Tiles(NamedTuple):
    """The columns of a video whose latents are `width` wide in `number` tiles, or fewer.

    reach: so many latent columns beside its own a tile sees. All tiles are equally wide, so that
    one program serves them: where the width does not divide the last repeats some of the columns
    before it.
    """

    width: int
    number: int
    reach: int

    @property
    def share(self) -> int:
        """Latent columns that each tile makes."""
        return -(-self.width // self.number)

    @property
    def window(self) -> int:
        """Latent columns that it computes for that."""
        return min(self.width, self.share + min(2, self.number - 1) * self.reach)

    def places(self) -> list[Place]:
        """Where the tiles are, from the left."""
        found = []
        for start in range(0, self.width, self.share):
            own = min(start, self.width - self.share)
            window = min(max(0, own - self.reach), self.width - self.window)
            found.append(Place(*(np.int32(n) for n in (window, own - window, own))))
        return found

    def take(self, whole: Array, place: Place) -> Array:
        """A tile's window of an array of any resolution."""
        scale = whole.shape[_AXIS] // self.width
        return lax.dynamic_slice_in_dim(whole, place.window * scale, self.window * scale, _AXIS)

    def cut(self, x: Array, place: Place) -> Array:
        """A tile's own columns of its window."""
        scale = x.shape[_AXIS] // self.window
        return lax.dynamic_slice_in_dim(x, place.inside * scale, self.share * scale, _AXIS)

    def put(self, whole: Array, own: Array, place: Place) -> Array:
        """The whole with a tile's own columns in it."""
        scale = whole.shape[_AXIS] // self.width
        return lax.dynamic_update_slice_in_dim(whole, own, place.own * scale, _AXIS)


def encoder_tiles(config: VAEConfig, width: int, number: int) -> Tiles:
    """Tiles in which frames are encoded; width: of the latents."""
    return Tiles(width, min(number, width), encoder_reach(config))


def decoder_tiles(config: VAEConfig, width: int, number: int) -> Tiles:
    """Tiles in which latents so wide are decoded."""
    return Tiles(width, min(number, width), decoder_reach(config))


class TiledState(NamedTuple):
    """What the encoder or the decoder remembers; fine: of each tile, on the host.

    None, as it is at the start, is zeros.
    """

    coarse: Coarse | None
    fine: tuple[Fine | None, ...]


class Run(NamedTuple):
    """How a video is run. dtype: of the run, "bfloat16" or "float32"."""

    tiles: Tiles
    dtype: str
    layout: Layout | None

    def start(self) -> TiledState:
        """The state before the first frame."""
        return TiledState(None, (None,) * len(self.tiles.places()))


def decode(
    network: vae.VAE,
    latents: Array,
    state: TiledState,
    rounding: float,
    *,
    run: Run,
    first: bool,
    pixels: str,
) -> tuple[Array, Array, TiledState]:
    """A chunk of frames, whether they are finite, and the next state.

    As streaming.decode_program() gives them; the latents lie where the network does.
    """
    features, coarse = decode_coarse_program(first, run)(network, latents, state.coarse)
    b, _, h, w, _ = latents.shape
    side, time = network.config.spatial_stride, network.config.temporal_stride
    frames = latents.shape[1] if first else latents.shape[1] * time
    shape, program = (b, frames, h * side, w * side, RGB), decode_fine_program(first, pixels, run)
    made = jax.device_put((np.zeros(shape, pixels), np.bool_(True)), features.sharding)

    def step(place: Place, made: Any, fine: Fine | None) -> tuple[Any, Fine]:
        return program(network, features, place, made, fine, rounding)

    made, after = _each(step, made, state.fine, run.tiles, features.sharding)
    return *made, TiledState(coarse, after)


def encode(
    network: vae.VAE, pixels: Array, state: TiledState, *, run: Run, first: bool
) -> tuple[Array, TiledState]:
    """Latents of a chunk, as streaming.encode_program() gives them, and the next state."""
    config, kernel = network.config, list(network.encoder.stages)[-1].blocks[0].conv1.kernel
    b, t, y, x, _ = pixels.shape
    side, time = config.spatial_stride, 1 if first else config.temporal_stride
    shape = (b, t // time, y // side, x // side, kernel.shape[-1])
    features = jax.device_put(np.zeros(shape, kernel.dtype), pixels.sharding)
    program = encode_fine_program(first, run)

    def step(place: Place, made: Array, fine: Fine | None) -> tuple[Array, Fine]:
        return program(network, pixels, place, made, fine)

    features, after = _each(step, features, state.fine, run.tiles, pixels.sharding)
    latents, coarse = encode_coarse_program(first, run)(network, features, state.coarse)
    return latents, TiledState(coarse, after)


def _each(
    step: Callable[[Place, Any, Fine | None], tuple[Any, Fine]],
    made: Any,
    states: tuple[Fine | None, ...],
    tiles: Tiles,
    where: jax.sharding.Sharding,
) -> tuple[Any, tuple[Fine, ...]]:
    """Every tile in turn: what they have made, and their next states, on the host.

    The device holds the state of one at a time: the next waits until it has left. The states are
    used up, so that the host holds each once.
    """
    after = []
    for place, state in zip(tiles.places(), states, strict=True):
        made, left = step(place, made, jax.device_put(state, where))
        after.append(_to_host(left))
        del left
        for leaf in jax.tree.leaves(state):  # jax donates nothing from one memory to another
            if isinstance(leaf, jax.Array):
                leaf.delete()
    return made, tuple(after)


def _to_host(state: Fine) -> Fine:
    """The arrays in the host's memory, when they are there: where it can be, in pinned memory."""
    leaf = jax.tree.leaves(state)[0]
    kinds = {memory.kind for memory in next(iter(leaf.devices())).addressable_memories()}
    if _HOST not in kinds:
        return jax.tree.map(np.asarray, state)
    return jax.block_until_ready(jax.device_put(state, leaf.sharding.with_memory_kind(_HOST)))


# The programs


@functools.cache
def decode_coarse_program(first: bool, run: Run) -> xla.Program:
    """Of (network, latents, coarse state): what decode_fine_program() takes, and the next state."""

    def own(
        network: vae.VAE, latents: Array, state: Coarse | None, *, fetch: None = None
    ) -> tuple[Array, Coarse]:
        del fetch  # the network has no stack of layers
        if state is None:
            state, _ = decoder_parts(_zeros(vae.decoder_state, network, latents, 1))
        raw = vae.raw_latents(network.config, latents)
        return vae.decode_coarse(network, raw, state, how=_how(first, run))

    return spread.program(own, run.layout, donate_argnums=2)


@functools.cache
def decode_fine_program(first: bool, pixels: str, run: Run) -> xla.Program:
    """Of (network, features, place, (frames, finite), fine state, rounding): the same with a tile.

    The frames are written in place.
    """

    def own(
        network: vae.VAE,
        features: Array,
        place: Place,
        made: tuple[Array, Array],
        state: Fine | None,
        rounding: Array,
        *,
        fetch: None = None,
    ) -> tuple[tuple[Array, Array], Fine]:
        del fetch
        (whole, finite), window = made, run.tiles.take(features, place)
        if state is None:
            scale = features.shape[_AXIS] // run.tiles.width
            _, state = decoder_parts(_zeros(vae.decoder_state, network, window, scale))
        frames, state = vae.decode_fine(network, window, state, how=_how(first, run))
        frames = run.tiles.cut(jnp.clip(frames, -1.0, 1.0), place)
        finite &= jnp.all(jnp.isfinite(frames))
        return (run.tiles.put(whole, levels(frames, pixels, rounding), place), finite), state

    return spread.program(own, run.layout, donate_argnums=(3, 4))


@functools.cache
def encode_fine_program(first: bool, run: Run) -> xla.Program:
    """Of (network, pixels, place, features, fine state): the features and the state of a tile.

    The features, which encode_coarse_program() takes, are written in place.
    """

    def own(
        network: vae.VAE,
        pixels: Array,
        place: Place,
        features: Array,
        state: Fine | None,
        *,
        fetch: None = None,
    ) -> tuple[Array, Fine]:
        del fetch
        window, side = run.tiles.take(pixels, place), network.config.spatial_stride
        if state is None:
            _, state = encoder_parts(_zeros(vae.encoder_state, network, window, side))
        found, state = vae.encode_fine(network, window, state, how=_how(first, run))
        own = run.tiles.cut(found, place).astype(features.dtype)
        return run.tiles.put(features, own, place), state

    return spread.program(own, run.layout, donate_argnums=(3, 4))


@functools.cache
def encode_coarse_program(first: bool, run: Run) -> xla.Program:
    """Of (network, features, coarse state): the latents and the next state."""

    def own(
        network: vae.VAE, features: Array, state: Coarse | None, *, fetch: None = None
    ) -> tuple[Array, Coarse]:
        del fetch
        if state is None:
            state, _ = encoder_parts(_zeros(vae.encoder_state, network, features, 1))
        found, state = vae.encode_coarse(network, features, state, how=_how(first, run))
        return vae.normalised(network.config, found), state

    return spread.program(own, run.layout, donate_argnums=2)


def _how(first: bool, run: Run) -> How:
    return How(first, xla.convolutions(run.dtype))


def _zeros(make: Callable[..., State], network: vae.VAE, x: Array, scale: int) -> State:
    """The zero state of a video of x's batch and size at `scale` times the latents' resolution."""
    b, _, height, width, _ = x.shape
    size = {"height": height // scale, "width": width // scale}
    return make(network.config, b, dtype=network.dtype, **size)


def levels(frames: Array, pixels: str, rounding: Array) -> Array:
    """Frames of -1..1 as "uint8", truncated after `rounding` is added, or as "float32"."""
    if pixels != "uint8":
        return frames
    return jnp.minimum((frames + 1.0) * 0.5 * 255.0 + rounding, 255.0).astype(jnp.uint8)
