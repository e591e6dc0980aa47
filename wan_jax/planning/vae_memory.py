"""What the VAE needs of a device's memory by formula, and in how many tiles it fits a limit.

A run and --plan go by the same numbers. Nothing is measured: a limit is met as well as they are.
"""

import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from wan_jax import tile_programs, vae
from wan_jax.columns import Columns
from wan_jax.config import VAEConfig
from wan_jax.streaming import decode_chunk
from wan_jax.tiles import Tiles
from wan_jax.vae_stages import (
    RGB,
    decoder_parts,
    decoder_stages,
    encoder_parts,
    encoder_stages,
    features_shape,
)
from wan_jax.weights.sources import abstract_part

Kind = Literal["encode", "decode"]
# Arrays as large as a chunk of frames at the finest scale that the VAE has at once, its state
# apart: a convolution's input behind its past, the result, the block's input, and what norms make.
_ARRAYS = 5
# The same of what the decoder makes whole at the latents' resolution, before it runs in tiles: as
# large as its features, by the CPU's compiler at 720P.
_COARSE_ARRAYS = 8
_F32 = 4  # bytes
# Of the released decoder at 720P what the CPU's compiler needs is 1 to 10 % more than the formula;
# what XLA needs on an H200 is 17 to 28 % less, without what cuDNN's convolutions work in.
_MARGIN = 1.05
_UNITS = {"MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30, "TB": 10**12, "TiB": 2**40}


class Tiling(NamedTuple):
    """How much of a video is run at a time: tiles of the width, latent frames of a chunk."""

    tiles: int
    chunk: int


class Coding(NamedTuple):
    """One direction of the VAE on a device.

    latent_shape: [t, h, w, c]. batch: videos at once. dtype: of the VAE's weights. devices: that
    have columns of the video each.
    """

    kind: Kind
    config: VAEConfig
    latent_shape: tuple[int, ...]
    batch: int = 1
    dtype: str = "float32"
    devices: int = 1

    @property
    def usual(self) -> Tiling:
        """How it is run where memory is no concern."""
        count = self.latent_shape[0]
        return Tiling(1, decode_chunk(count) if self.kind == "decode" and count > 1 else 1)

    def tilings(self) -> Iterator[Tiling]:
        """All that there are, those first that take the least time."""
        width, chunk = self.latent_shape[2], self.usual.chunk
        shares = dict.fromkeys(-(-width // n) for n in range(1, width + 1))
        counts = [-(-width // share) for share in shares] if self.devices == 1 else [1]
        for tiles in counts:
            for size in dict.fromkeys((chunk, 1)):
                yield Tiling(tiles, size)

    def frames(self, tiling: Tiling) -> int:
        """Frames of a chunk."""
        return 1 if self.latent_shape[0] == 1 else tiling.chunk * self.config.temporal_stride

    def tiles(self, tiling: Tiling) -> Tiles:
        """The tiles of the width."""
        make = tile_programs.encoder_tiles if self.kind == "encode" else tile_programs.decoder_tiles
        return make(self.config, self.latent_shape[2], tiling.tiles)

    def working_bytes(self, tiling: Tiling) -> int:
        """Bytes on a device beside the weights."""
        return _working_bytes(self, tiling)

    def _working(self, tiling: Tiling) -> int:
        if tiling.tiles > 1:
            return self.batch * self._in_tiles(tiling)
        columns = Columns(self.latent_shape[2], self.devices)
        kept = _bytes(self._state(columns.width, columns))
        # The past of a convolution is two frames, and a column of each neighbour.
        arrays = _ARRAYS * self._pixels(tiling, columns.share)
        whole = self._frame_bytes(tiling, columns.share * columns.devices)
        return self.batch * (kept + arrays + whole)

    def _in_tiles(self, tiling: Tiling) -> int:
        """Of one video: while a tile runs or, if that is more, while what is whole does."""
        config, (_, h, w, _), tiles = self.config, self.latent_shape, self.tiles(tiling)
        dtype = jnp.dtype(self.dtype)
        own: dict[str, Any] = {"height": h, "tiles": tiles}
        own["network"] = abstract_part(config, dtype, dtype)
        if self.kind == "encode":
            coarse, _ = encoder_parts(self._state(w))
            fine = jax.eval_shape(functools.partial(tile_programs.encoder_fine, batch=1, **own))
            features = tiling.chunk * h * w * encoder_stages(config)[-1].d_in * self._itemsize
            given = self._frame_bytes(tiling, tiles.windows[0])
            whole = _ARRAYS * features
        else:
            coarse, _ = decoder_parts(self._state(w))
            fine = jax.eval_shape(functools.partial(tile_programs.decoder_fine, batch=1, **own))
            piece, first = (1, tiling.chunk, *self.latent_shape[1:]), self.latent_shape[0] == 1
            features = math.prod(features_shape(config, piece, first=first)) * self._itemsize
            window = features * tiles.windows[0] // w
            # Of frames, and of all windows, one chunk is on its way to the host while the next is
            # made.
            given = window + self._frame_bytes(tiling, tiles.share)
            whole = _COARSE_ARRAYS * features + 2 * window * tiles.total
        arrays = max(self._inputs(tiling, tiles.windows))
        tile = _bytes(fine) + _ARRAYS * arrays + 2 * given
        return _bytes(coarse) + max(tile, whole)

    def _inputs(self, tiling: Tiling, windows: Sequence[int]) -> Iterator[int]:
        """Bytes of a convolution's input in each finer stage, where windows are so wide."""
        h, frames, config = self.latent_shape[1], self.frames(tiling), self.config
        if self.kind == "encode":
            stages, up, count = encoder_stages(config)[:-1], config.spatial_stride, frames
        else:
            first, *finer = decoder_stages(config)
            stages, up = tuple(finer), 2 if first.resample else 1
            count = min(frames, 2 * tiling.chunk) if first.temporal else tiling.chunk
        for i, stage in enumerate(stages):
            columns = windows[min(i, len(windows) - 1)]
            pixels = (count + 2) * up * h * (up * columns + 2)
            yield pixels * max(stage.d_in, stage.d_out) * self._itemsize
            if self.kind == "encode":
                up, count = up // 2, -(-count // 2) if stage.temporal else count
            else:
                up = 2 * up
                count = min(frames, 2 * count) if stage.temporal else count

    @property
    def _itemsize(self) -> int:
        return int(jnp.dtype(self.dtype).itemsize)

    def _pixels(self, tiling: Tiling, columns: int) -> int:
        """Bytes of a convolution's input at the finest scale of so many latent columns."""
        side, h = self.config.spatial_stride, self.latent_shape[1]
        pixels = (self.frames(tiling) + 2) * h * side * (columns * side + 2)
        return pixels * self.config.base_dim * self.config.dim_mult[0] * self._itemsize

    def _frame_bytes(self, tiling: Tiling, columns: int) -> int:
        side, h = self.config.spatial_stride, self.latent_shape[1]
        return self.frames(tiling) * h * side * columns * side * RGB * _F32

    def _state(self, width: int, columns: Columns | None = None) -> vae.State:
        make = vae.encoder_state if self.kind == "encode" else vae.decoder_state
        height, dtype = self.latent_shape[1], jnp.dtype(self.dtype)
        own = functools.partial(make, self.config, 1, height=height, width=width, dtype=dtype)
        return jax.eval_shape(functools.partial(own, columns=columns))


@functools.cache
def _working_bytes(coding: Coding, tiling: Tiling) -> int:
    """Kept, for many are compared and the states of each are traced."""
    return coding._working(tiling)


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Room(NamedTuple):
    """What of its devices the VAE is given.

    memory: bytes of a device that may be used; None is no limit. weights: those that networks take
    of them meanwhile. dtype: of the VAE's weights. devices: that share a video.
    """

    memory: int | None = None
    weights: int = 0
    dtype: str = "float32"
    devices: int = 1

    def tiling(
        self, kind: Kind, config: VAEConfig, latent_shape: tuple[int, ...], batch: int = 1
    ) -> Tiling:
        """The first tiling that fits; ValueError naming the least memory that would do."""
        coding = self.coding(kind, config, latent_shape, batch)
        found = self.best(coding)
        needed = self._of(coding, found)
        if self.memory is not None and needed > self.memory:
            raise ValueError(_refusal(coding, self.memory, needed, self.weights))
        return found

    def needed(self, coding: Coding) -> int:
        """Bytes of a device, weights and all, with the tiling of best()."""
        return self._of(coding, self.best(coding))

    def coding(
        self, kind: Kind, config: VAEConfig, latent_shape: tuple[int, ...], batch: int = 1
    ) -> Coding:
        """What is done in it."""
        return Coding(kind, config, latent_shape, batch, self.dtype, self.devices)

    def best(self, coding: Coding) -> Tiling:
        """The first tiling that fits or, if there is none, the one that needs least."""
        if self.memory is None:
            return coding.usual
        found = list(coding.tilings())
        fits = (tiling for tiling in found if self._of(coding, tiling) <= self.memory)
        return next(fits, None) or min(found, key=coding.working_bytes)

    def _of(self, coding: Coding, tiling: Tiling) -> int:
        return self.weights + int(coding.working_bytes(tiling) * _MARGIN)


def _refusal(coding: Coding, memory: int, needed: int, weights: int) -> str:
    t, h, w, _ = coding.latent_shape
    config = coding.config
    size = f"{w * config.spatial_stride}x{h * config.spatial_stride}"
    frames = 1 + (t - 1) * config.temporal_stride
    return (
        f"max_memory is {size_text(memory)}; to {coding.kind} {frames} frames of {size} takes at "
        f"least {size_text(needed)}, {size_text(weights)} of it weights"
    )


def parse_memory(value: int | str) -> int:
    """Bytes of a number of them, or of a text such as 6GB or 6.5GiB."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([MGT]i?B)\s*", str(value))
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size == 0:
        raise ValueError(f"max_memory is {value!r}; a size such as 6GB, 6.5GiB or 900MB is needed")
    return size


def size_text(size: int) -> str:
    """A size as parse_memory() takes it, rounded up, so that what is named as enough is enough."""
    unit = "GB" if size >= 10**9 else "MB"
    return f"{math.ceil(100 * size / _UNITS[unit]) / 100:.10g}{unit}"
