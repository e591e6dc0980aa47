"""The VAE in tiles of its width on one device: memory that neither length nor width decides.

A tile is a narrower video (tiles.py). Each runs through a block of chunks before the next one does,
so that its state never leaves the device in between; after the block it waits in the host's memory
for the next one. Frames of a block are put together on the host. What is at the latents' resolution
is small and runs whole, before the tiles of a block or after them. What it makes for the decoder's
tiles is cut on the device and waits in pinned memory: with arrays of the host an H200 was idle for
a third of the time.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax import spread, vae, xla
from wan_jax.config import VAEConfig
from wan_jax.sharding import Layout
from wan_jax.tiles import Place, Tiles
from wan_jax.vae_blocks import How
from wan_jax.vae_stages import (
    RGB,
    Coarse,
    Fine,
    StageState,
    State,
    decoder_parts,
    decoder_reaches,
    encoder_parts,
    encoder_reaches,
    features_shape,
)

Array = jax.Array
Item = TypeVar("Item")
Offsets = tuple[Any, ...]  # as a Place has them
Span = tuple[int, int]  # of latent frames
_HOST = "pinned_host"
# Bytes on the host that the chunks of a block may take, one chunk at least: then the states cross
# to the host and back once a block. Those of 1280x720 take 8 GiB, 32 of its chunks in five tiles 4.
_BLOCK = 4 * 2**30


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


class Decoded(NamedTuple):
    """Frames [b, f, y, x, 3], whether they are finite, and how many latent frames are done."""

    frames: np.ndarray
    finite: bool
    done: int


def decode(
    network: vae.VAE,
    latents: np.ndarray,
    *,
    run: Run,
    where: jax.sharding.Sharding,
    pixels: str,
    chunk: int,
    rounding: float,
) -> Iterator[Decoded]:
    """The frames of a video, chunk by chunk as streaming.decode() gives them.

    They come a block at a time; before that what comes has no frames and tells what is done.
    where: the network lies.
    """
    shape, coarse = latents.shape, None
    spans = [(0, 1), *((i, i + chunk) for i in range(1, shape[1], chunk))]
    states = _nothing(run)
    size = functools.partial(_decoded_bytes, network, shape, pixels, run.tiles)
    for block, is_last in _blocks(spans, size):
        begun, ended = block[0][0], block[-1][1]
        pieces = [jax.device_put(latents[:, start:stop], where) for start, stop in block]
        given, coarse = _windows(network, pieces, coarse, first=begun == 0, run=run)
        frames = [np.empty(_frames_shape(network, shape, span), pixels) for span in block]
        finite = [True] * len(block)
        step = functools.partial(_decode_tile, network, begun == 0, run, pixels, rounding)
        made = _each(step, given, operator.getitem, states, run=run, where=where, keep=not is_last)
        total = len(block) * len(states)
        for count, (place, i, (own, is_finite)) in enumerate(made, start=1):
            run.tiles.put(frames[i], np.asarray(own), place)
            finite[i] &= bool(is_finite)
            yield Decoded(frames[i][:, :0], True, begun + count * (ended - begun) // total)
        for found, is_finite, (_, stop) in zip(frames, finite, block, strict=True):
            yield Decoded(found, is_finite, stop)


def encode(
    network: vae.VAE, chunks: Iterable[np.ndarray], *, run: Run, where: jax.sharding.Sharding
) -> Iterator[Array]:
    """The latents of a video, chunk by chunk as streaming.encode() gives them.

    They come a block at a time. where: the network lies.
    """
    states, coarse, is_first = _nothing(run), None, True
    for block, is_last in _blocks(chunks, lambda pixels: pixels.nbytes):
        features = [_no_features(network, pixels.shape) for pixels in block]
        step = functools.partial(_encode_tile, network, is_first, run)
        made = _each(step, block, run.tiles.window, states, run=run, where=where, keep=not is_last)
        for place, i, own in made:
            run.tiles.put(features[i], np.asarray(own), place)
        for i, x in enumerate(features):
            program = encode_coarse_program(is_first and i == 0, run)
            latents, coarse = program(network, jax.device_put(x, where), coarse)
            yield latents
        is_first = False


def _blocks(
    items: Iterable[Item], size: Callable[[Item], int]
) -> Iterator[tuple[list[Item], bool]]:
    """Items in runs of at most _BLOCK bytes or one item, and whether the run is the last."""
    block: list[Item] = []
    total = 0
    for item in items:
        if block and total + size(item) > _BLOCK:
            yield block, False
            block, total = [], 0
        block.append(item)
        total += size(item)
    if block:
        yield block, True


def _nothing(run: Run) -> list[Fine | None]:
    """The states of the tiles before the first frame, which are zeros."""
    return [None] * len(run.tiles.places())


def _each(
    step: Callable[[int, Array, Offsets, Fine | None], tuple[Any, Fine]],
    inputs: Sequence[Item],
    window_of: Callable[[Item, int], Any],
    states: list[Fine | None],
    *,
    run: Run,
    where: jax.sharding.Sharding,
    keep: bool,
) -> Iterator[tuple[Place, int, Any]]:
    """What every tile makes of its window of every input, which step() is told the number of.

    window_of: gives it, on the host, of an input and the number of a tile. Each result comes when
    the device is at work on the next. The device holds the state of one tile at a time; keep:
    whether the next ones are put into `states`, on the host, or nobody needs them.
    """
    waiting = None
    for number, place in enumerate(run.tiles.places()):
        state, states[number] = jax.device_put(states[number], where), None
        before: Item | None = None
        for i, x in enumerate(inputs):
            if x is not before:  # grey chunks are one array
                window, before = jax.device_put(window_of(x, number), where), x
            made, state = step(i, window, place.offsets, state)
            if waiting is not None:
                yield waiting
            waiting = place, i, made
        states[number] = jax.block_until_ready(_to_host(state)) if keep else None
        del state
    if waiting is not None:
        yield waiting


def _to_host(tree: Any) -> Any:
    """The arrays in the host's memory; where there is pinned memory, on their way to it."""
    leaf = jax.tree.leaves(tree)[0]
    kinds = {memory.kind for memory in next(iter(leaf.devices())).addressable_memories()}
    if _HOST not in kinds:
        return jax.tree.map(np.asarray, tree)
    return jax.device_put(tree, leaf.sharding.with_memory_kind(_HOST))


def _decode_tile(
    network: vae.VAE,
    first: bool,
    run: Run,
    pixels: str,
    rounding: float,
    i: int,
    x: Array,
    offsets: Offsets,
    state: Fine | None,
) -> tuple[tuple[Array, Array], Fine]:
    """A tile's part of chunk i of a block; first: whether the block is."""
    return decode_fine_program(first and i == 0, pixels, run)(network, x, offsets, state, rounding)


def _encode_tile(
    network: vae.VAE,
    first: bool,
    run: Run,
    i: int,
    x: Array,
    offsets: Offsets,
    state: Fine | None,
) -> tuple[Array, Fine]:
    """The same for encoding."""
    return encode_fine_program(first and i == 0, run)(network, x, offsets, state)


def _windows(
    network: vae.VAE, pieces: Sequence[Array], state: Coarse | None, *, first: bool, run: Run
) -> tuple[list[tuple[Any, ...]], Coarse | None]:
    """Of the latents of every chunk the windows of all tiles, on the host, and the next state."""
    found: list[tuple[Any, ...]] = []
    for i, piece in enumerate(pieces):
        windows, state = decode_coarse_program(first and i == 0, run)(network, piece, state)
        found.append(_to_host(windows))
        del windows
        jax.block_until_ready(found[-2:-1])  # or those of all chunks were on the device at once
    return jax.block_until_ready(found), state


def _frames_shape(network: vae.VAE, shape: tuple[int, ...], span: Span) -> tuple[int, ...]:
    """Of the frames of the latents `span` of those of this shape."""
    (b, _, h, w, _), (start, stop) = shape, span
    side, time = network.config.spatial_stride, network.config.temporal_stride
    return b, (stop - start) * time if start else 1, h * side, w * side, RGB


def _decoded_bytes(
    network: vae.VAE, shape: tuple[int, ...], pixels: str, tiles: Tiles, span: Span
) -> int:
    """Of what waits on the host while a chunk is decoded."""
    b, _, height, _, z = shape
    piece = (b, span[1] - span[0], height, len(tiles.places()) * tiles.windows[0], z)
    features = features_shape(network.config, piece, first=span[0] == 0)
    frames = math.prod(_frames_shape(network, shape, span)) * np.dtype(pixels).itemsize
    return math.prod(features) * network.dtype.itemsize + frames


def _no_features(network: vae.VAE, shape: tuple[int, ...]) -> np.ndarray:
    """Room for what encode_coarse_program() takes of frames of this shape."""
    config, kernel = network.config, list(network.encoder.stages)[-1].blocks[0].conv1.kernel
    b, t, y, x, _ = shape
    side, time = config.spatial_stride, 1 if t == 1 else config.temporal_stride
    return np.empty((b, t // time, y // side, x // side, kernel.shape[-1]), kernel.dtype)


# The programs


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
        numbers = range(len(run.tiles.places()))
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
