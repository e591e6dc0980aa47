"""The VAE in tiles of its width on one device: memory that neither length nor width decides.

A tile is a narrower video (tiles.py). Each runs through a block of chunks before the next one does,
so that its state never leaves the device in between; after the block it waits in the host's memory
for the next one. Frames of a block are put together on the host. What is at the latents' resolution
is small and runs whole, before the tiles of a block or after them. What it makes for the decoder's
tiles is cut on the device and waits in pinned memory, whence it comes while the device is at work:
to cut arrays of the host took an H200 5.1 s in place of 3.4 for 81 frames of 1280x720.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from wan_jax import vae
from wan_jax.tile_programs import (
    Offsets,
    Run,
    decode_coarse_program,
    decode_fine_program,
    encode_coarse_program,
    encode_fine_program,
)
from wan_jax.tiles import Place, Tiles
from wan_jax.vae_stages import RGB, Coarse, Fine, features_shape

Array = jax.Array
Item = TypeVar("Item")
Span = tuple[int, int]  # of latent frames
_HOST = "pinned_host"
# Bytes on the host that the chunks of a block may take, one chunk at least: then the states cross
# to the host and back once a block. Those of 1280x720 take 8 GiB, 32 of its chunks in five tiles 4.
_BLOCK = 4 * 2**30


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
    where: the network's arrays lie.
    """
    shape, coarse = latents.shape, None
    spans = [(0, 1), *((i, i + chunk) for i in range(1, shape[1], chunk))]
    states = _nothing(run)
    size = functools.partial(_decoded_bytes, network, shape, pixels, run.tiles)
    for block, is_last in _blocks(spans, size):
        given, coarse = _windows(network, latents, block, coarse, run=run, where=where)
        step = functools.partial(_decode_tile, network, block[0][0] == 0, run, pixels, rounding)
        made = _each(step, given, operator.getitem, states, run=run, where=where, keep=not is_last)
        frames = [np.empty(_frames_shape(network, shape, span), pixels) for span in block]
        yield from _put_together(made, frames, block, run)
        del given, made, frames  # or they were there until the next block's are


def _put_together(
    made: Iterator[tuple[Place, int, Any]],
    frames: list[np.ndarray],
    block: Sequence[Span],
    run: Run,
) -> Iterator[Decoded]:
    """The frames of a block, of what its tiles have made."""
    finite = [True] * len(block)
    begun, ended = block[0][0], block[-1][1]
    total = len(block) * run.tiles.total
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

    They come a block at a time. where: the network's arrays lie.
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
    return [None] * run.tiles.total


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
    network: vae.VAE,
    latents: np.ndarray,
    block: Sequence[Span],
    state: Coarse | None,
    *,
    run: Run,
    where: jax.sharding.Sharding,
) -> tuple[list[tuple[Any, ...]], Coarse | None]:
    """Of every chunk of a block the windows of all tiles, on the host, and the next state."""
    found: list[tuple[Any, ...]] = []
    for start, stop in block:
        piece = jax.device_put(latents[:, start:stop], where)
        windows, state = decode_coarse_program(start == 0, run)(network, piece, state)
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
    piece = (b, span[1] - span[0], height, tiles.total * tiles.windows[0], z)
    features = features_shape(network.config, piece, first=span[0] == 0)
    frames = math.prod(_frames_shape(network, shape, span)) * np.dtype(pixels).itemsize
    return math.prod(features) * network.dtype.itemsize + frames


def _no_features(network: vae.VAE, shape: tuple[int, ...]) -> np.ndarray:
    """Room for what encode_coarse_program() takes of frames of this shape."""
    config, kernel = network.config, list(network.encoder.stages)[-1].blocks[0].conv1.kernel
    b, t, y, x, _ = shape
    side, time = config.spatial_stride, 1 if t == 1 else config.temporal_stride
    return np.empty((b, t // time, y // side, x // side, kernel.shape[-1]), kernel.dtype)
