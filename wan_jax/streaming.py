"""The VAE chunk by chunk: compiled programs that hand the state on, frames in and out of the host.

A program serves all chunks of a shape, and the state's buffers are reused, so memory does not grow
with the length of a video. With a layout each device has its columns of all but what goes in and
out, which is whole on every device: a process of several can only read what its own devices have.
Of one device the memory can be less than a state: then the columns are run tile after tile.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wan_jax import spread, tile_programs, vae, vae_tiles, xla
from wan_jax.columns import SPLIT, columns_on
from wan_jax.config import VAEConfig
from wan_jax.sampler import DivergedError
from wan_jax.sharding import Layout
from wan_jax.spread import WHOLE

Array = jax.Array

# At most so many latent frames are decoded at a time, and a number that divides, so that one
# program serves all chunks. On an H200 at 480P: 1 takes 1.23 s for 81 frames, 2 1.18 s, 5 1.15 s.
DECODE_CHUNK = 2


def decode_chunk(count: int) -> int:
    """Latent frames that are decoded at a time, after the first, of a video that has so many."""
    return max(k for k in range(1, DECODE_CHUNK + 1) if (count - 1) % k == 0)


def encode(
    network: vae.VAE,
    chunks: Iterable[np.ndarray],
    *,
    dtype: str,
    what: str,
    layout: Layout | None = None,
    tiles: int = 1,
) -> Iterator[np.ndarray]:
    """Latents [b, 1, h, w, z] float32 of a video, a latent frame at a time.

    chunks: float32 in -1..1, [b, 1, y, x, 3] and then [b, 4, y, x, 3] each, as
    conditioning.pixel_chunks or video_chunks give them. dtype: of the run, "bfloat16" or "float32".
    layout: of the devices that the network lies on; None is the first device. tiles: of the width,
    one after the other, on one device; it changes the memory, never the values.
    Raises DivergedError, which says `what` the video is, for latents that are not finite.
    """
    each = _encoded if tiles == 1 else functools.partial(_encoded_in_tiles, tiles=tiles)
    for i, latents in enumerate(each(network, chunks, dtype=dtype, layout=layout)):
        found = np.asarray(latents)
        if not np.isfinite(found).all():
            raise DivergedError(f"{what}'s latents became NaN or infinite at latent frame {i}")
        yield found


def decode(
    network: vae.VAE,
    latents: Array | np.ndarray,
    *,
    pixels: str,
    dtype: str,
    layout: Layout | None = None,
    tiles: int = 1,
    chunk: int | None = None,
) -> Iterator[tuple[np.ndarray, int]]:
    """Chunks of frames [b, f, y, x, 3], each with the number of latent frames that are done.

    latents: float32 [b, t, h, w, z]; of those on the host tiles bring a chunk at a time to the
    device. pixels: "uint8" or "float32". dtype: of the run. layout, tiles: as encode() has them.
    chunk: latent frames at a time after the first, a number that divides those; None is
    decode_chunk()'s. A chunk crosses to the host while the next is computed;
    those of tiles come together, and before them some without frames that tell what is done.
    Raises DivergedError for frames that hold NaN, ValueError for latents of no frame.
    """
    count = latents.shape[1]
    if count == 0:
        raise ValueError(f"latents of shape {latents.shape} have no frame to decode")
    chunk = decode_chunk(count) if chunk is None else chunk
    # One image is rounded, as the reference saves it; a video is truncated, as it writes those.
    rounding = 0.5 if count == 1 else 0.0
    options: dict[str, Any] = {"pixels": pixels, "chunk": chunk, "rounding": rounding}
    found: Iterator[tuple[Any, Any, int]]
    if tiles > 1:
        of_width = tile_programs.decoder_tiles(network.config, latents.shape[3], tiles)
        run = tile_programs.Run(of_width, dtype, _one_device(layout, tiles))
        where = _where(layout)
        # A copy: the caller may write into its own array while frames come.
        found = vae_tiles.decode(network, np.array(latents), run=run, where=where, **options)
    else:
        found = _decoded(network, place(latents, layout), dtype=dtype, layout=layout, **options)
    yield from itertools.starmap(_fetch, found)


def _encoded(
    network: vae.VAE, chunks: Iterable[np.ndarray], *, dtype: str, layout: Layout | None
) -> Iterator[Array]:
    """Latents of every chunk, on the devices."""
    state, before = None, None
    for i, pixels in enumerate(chunks):
        if state is None:
            b, _, y, x, _ = pixels.shape
            side = network.config.spatial_stride
            shape = b, y // side, x // side
            state = zeros(vae.encoder_state, network.config, shape, layout, dtype=network.dtype)
        if pixels is not before:  # grey chunks are one array, and cross to the device once
            placed, before = place(pixels, layout), pixels
        latents, state = encode_program(i == 0, dtype, layout)(network, placed, state)
        yield latents


def _encoded_in_tiles(
    network: vae.VAE,
    chunks: Iterable[np.ndarray],
    *,
    dtype: str,
    layout: Layout | None,
    tiles: int,
) -> Iterator[Array]:
    """The same of so many tiles, which the first frame tells the width of."""
    chunks = iter(chunks)
    first = next(chunks)
    width = first.shape[3] // network.config.spatial_stride
    of_width = tile_programs.encoder_tiles(network.config, width, tiles)
    run = tile_programs.Run(of_width, dtype, _one_device(layout, tiles))
    given = itertools.chain([first], chunks)
    return vae_tiles.encode(network, given, run=run, where=_where(layout))


def _decoded(
    network: vae.VAE,
    latents: Array,
    *,
    dtype: str,
    layout: Layout | None,
    pixels: str,
    chunk: int,
    rounding: float,
) -> Iterator[tuple[Array, Array, int]]:
    """Frames on the devices, whether they are finite, and latent frames done; one chunk ahead."""
    b, count, height, width, _ = latents.shape
    state = zeros(
        vae.decoder_state, network.config, (b, height, width), layout, dtype=network.dtype
    )
    waiting: tuple[Array, Array, int] | None = None
    for start in (0, *range(1, count, chunk)):
        stop = 1 if start == 0 else start + chunk
        # A dynamic slice: a static one would be a program of its own for every chunk.
        piece = lax.dynamic_slice_in_dim(latents, start, stop - start, axis=1)
        program = decode_program(start == 0, pixels, dtype, layout)
        found, finite, state = program(network, piece, state, rounding)
        if waiting is not None:
            yield waiting
        waiting = found, finite, stop
    assert waiting is not None
    yield waiting


def _one_device(layout: Layout | None, tiles: int) -> Layout | None:
    """The layout; ValueError if it is of several devices, each of which has columns of its own."""
    devices = 1 if layout is None else layout.mesh.size
    if devices > 1:
        raise ValueError(f"tiles is {tiles}; they are run on one device, and there are {devices}")
    return layout


def _fetch(pixels: Any, finite: Any, stop: int) -> tuple[np.ndarray, int]:
    """Frames on the host; DivergedError if they hold NaN, which bytes would show as black."""
    if not bool(finite):
        raise DivergedError(f"frames became NaN or infinite by latent frame {stop}")
    return np.asarray(pixels), stop


def place(tree: Any, layout: Layout | None) -> Any:
    """Arrays whole on the devices of the layout, or on the first device.

    Put there, whence jit makes one program and not two.
    """
    return jax.device_put(tree, jax.devices()[0]) if layout is None else layout.whole(tree)


def _where(layout: Layout | None) -> jax.sharding.Sharding:
    """Of the arrays of place()."""
    return place(np.zeros(()), layout).sharding


def zeros(
    make: Callable[..., vae.State],
    config: VAEConfig,
    shape: tuple[int, int, int],
    layout: Layout | None,
    *,
    dtype: jnp.dtype = jnp.float32,
) -> vae.State:
    """The state that vae.encoder_state or vae.decoder_state makes for latents [b, _, h, w, _].

    dtype: of the network's weights. With a layout no device ever holds more of it than is its own.
    """
    if layout is None:
        b, height, width = shape
        return place(make(config, b, height=height, width=width, dtype=dtype), None)
    return zeros_program(make, config, shape, layout, dtype)()


@functools.cache
def zeros_program(
    make: Callable[..., vae.State],
    config: VAEConfig,
    shape: tuple[int, int, int],
    layout: Layout,
    dtype: jnp.dtype = jnp.float32,
) -> xla.Program:
    """The program by which zeros() makes it with a layout."""
    b, height, width = shape
    columns = columns_on(layout, width)
    size = {"height": height, "width": width, "dtype": dtype}
    own = functools.partial(make, config, b, columns=columns, **size)
    return spread.make(own, layout, SPLIT)


@functools.cache
def encode_program(first: bool, dtype: str, layout: Layout | None) -> xla.Program:
    """The compiled encoder of a first or a following chunk; the state's buffers are reused."""
    own = vae.encode_first if first else vae.encode_next

    def run(
        network: vae.VAE, pixels: Array, state: vae.State, *, fetch: None = None
    ) -> tuple[Array, vae.State]:
        del fetch  # the network has no stack of layers
        columns = columns_on(layout, pixels.shape[3] // network.config.spatial_stride)
        if columns is not None:
            pixels = columns.take(pixels)
        precision = xla.convolutions(dtype)
        latents, state = own(network, pixels, state, precision=precision, columns=columns)
        return latents if columns is None else columns.join(latents), state

    return spread.program(run, layout, given=(WHOLE, SPLIT), found=(WHOLE, SPLIT), donate_argnums=2)


@functools.cache
def decode_program(first: bool, pixels: str, dtype: str, layout: Layout | None) -> xla.Program:
    """The compiled decoder of a first or a following chunk; the state's buffers are reused."""
    own = vae.decode_first if first else vae.decode_next

    def run(
        network: vae.VAE, latents: Array, state: vae.State, rounding: Array, *, fetch: None = None
    ) -> tuple[Array, Array, vae.State]:
        del fetch
        columns = columns_on(layout, latents.shape[3])
        if columns is not None:
            latents = columns.take(latents)
        precision = xla.convolutions(dtype)
        frames, state = own(network, latents, state, precision=precision, columns=columns)
        if columns is not None:
            frames = columns.real(frames)
        finite = jnp.all(jnp.isfinite(frames))
        frames = tile_programs.levels(frames, pixels, rounding)
        if columns is not None:  # as bytes, a quarter of what floats would be
            frames, finite = columns.join(frames), columns.every(finite)
        return frames, finite, state

    given, found = (WHOLE, SPLIT, WHOLE), (WHOLE, WHOLE, SPLIT)
    return spread.program(run, layout, given=given, found=found, donate_argnums=2)
