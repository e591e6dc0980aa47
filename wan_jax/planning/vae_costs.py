"""What the VAE costs by formula: products, and bytes that devices with columns each tell others.

Of a device's share of the columns (columns.py), padding included, and of whole videos: the first
frame goes through alone, whatever doubles or halves time leaves it as it is.
"""

from collections.abc import Iterator
from typing import NamedTuple

from wan_jax.columns import Columns
from wan_jax.config import VAEConfig
from wan_jax.planning.costs import Flops
from wan_jax.vae_stages import RGB, Stage, decoder_stages, encoder_stages

_F32 = 4  # bytes; weights and activations are float32 in either dtype of a run


class Cost(NamedTuple):
    """Of one device. sent: bytes that it tells others."""

    flops: Flops
    sent: int


class _Conv(NamedTuple):
    """A convolution of d_in into d_out channels, by the size of its output on a device.

    taps: positions of its kernel. edges: columns of so many rows that are sent to neighbours.
    """

    frames: int
    rows: int
    columns: int
    d_in: int
    d_out: int
    taps: int
    edges: int = 0

    @property
    def flops(self) -> int:
        return 2 * self.frames * self.rows * self.columns * self.taps * self.d_in * self.d_out

    @property
    def sent(self) -> int:
        return self.edges * self.frames * self.rows * self.d_in * _F32


class _Grid(NamedTuple):
    """Frames of a resolution: the first, and the rest; rows and a device's columns."""

    rest: int
    rows: int
    columns: int

    def conv(self, d_in: int, d_out: int) -> _Conv:
        """Over time and space; each neighbour is sent the column beside it."""
        return _Conv(1 + self.rest, self.rows, self.columns, d_in, d_out, 27, 2)

    def product(self, d_in: int, d_out: int) -> _Conv:
        """Over the channels."""
        return _Conv(1 + self.rest, self.rows, self.columns, d_in, d_out, 1)

    def in_space(self, d_in: int, d_out: int) -> _Conv:
        """Of single frames. One that halves sends one column, but of twice the rows."""
        return _Conv(1 + self.rest, self.rows, self.columns, d_in, d_out, 9, 2)

    def in_time(self, d_in: int, d_out: int) -> _Conv:
        """Of all but the first frame."""
        return _Conv(self.rest, self.rows, self.columns, d_in, d_out, 3)


def decode(config: VAEConfig, latent_shape: tuple[int, ...], *, devices: int = 1) -> Cost:
    """Frames of latents [t, h, w, c] on one of so many devices."""
    grid, columns = _latent_grid(latent_shape, devices)
    convs = list(_decoder(config, grid))
    pixels = grid.rows * columns.share * devices * config.spatial_stride**2
    frames = 1 + grid.rest * config.temporal_stride
    joined = frames * pixels * RGB  # bytes
    return _cost(convs, grid, columns, d=decoder_stages(config)[0].d_in, joined=joined)


def encode(config: VAEConfig, latent_shape: tuple[int, ...], *, devices: int = 1) -> Cost:
    """Latents [t, h, w, c] of frames on one of so many devices."""
    grid, columns = _latent_grid(latent_shape, devices)
    convs = list(_encoder(config, grid))
    joined = (1 + grid.rest) * grid.rows * columns.share * devices * config.z_dim * _F32
    return _cost(convs, grid, columns, d=encoder_stages(config)[-1].d_out, joined=joined)


def _latent_grid(latent_shape: tuple[int, ...], devices: int) -> tuple[_Grid, Columns]:
    count, height, width = latent_shape[:3]
    columns = Columns(width, devices)
    return _Grid(count - 1, height, columns.share), columns


def _cost(convs: list[_Conv], grid: _Grid, columns: Columns, *, d: int, joined: int) -> Cost:
    """With attention in the middle, of width d. joined: bytes of the result on all devices."""
    frames, n = 1 + grid.rest, columns.devices
    attention = frames * 4 * grid.rows * grid.columns * grid.rows * columns.width * d
    flops = Flops(conv=float(sum(conv.flops for conv in convs) + attention))
    if n == 1:
        return Cost(flops, 0)
    keys_and_values = frames * grid.rows * columns.share * n * 2 * d * _F32
    gathered = (keys_and_values + joined) * (n - 1) // n
    return Cost(flops, sum(conv.sent for conv in convs) + gathered)


def _decoder(config: VAEConfig, grid: _Grid) -> Iterator[_Conv]:
    z, plan = config.z_dim, decoder_stages(config)
    yield grid.product(z, z)
    yield grid.conv(z, plan[0].d_in)
    yield from _middle(plan[0].d_in, grid)
    for stage in plan:
        yield from _blocks(stage, grid)
        if stage.temporal:
            yield grid.in_time(stage.d_out, 2 * stage.d_out)
            grid = grid._replace(rest=2 * grid.rest)
        if stage.resample:
            grid = grid._replace(rows=2 * grid.rows, columns=2 * grid.columns)
            yield grid.in_space(stage.d_out, stage.d_out // 2)
    yield grid.conv(plan[-1].d_out, RGB)


def _encoder(config: VAEConfig, latent: _Grid) -> Iterator[_Conv]:
    z, plan, stride = config.z_dim, encoder_stages(config), config.spatial_stride
    rest = latent.rest * config.temporal_stride
    grid = _Grid(rest, latent.rows * stride, latent.columns * stride)
    yield grid.conv(RGB, plan[0].d_in)
    for stage in plan:
        yield from _blocks(stage, grid)
        if stage.resample:
            grid = grid._replace(rows=grid.rows // 2, columns=grid.columns // 2)
            yield grid.in_space(stage.d_out, stage.d_out)
        if stage.temporal:
            grid = grid._replace(rest=grid.rest // 2)
            yield grid.in_time(stage.d_out, stage.d_out)
    yield from _middle(plan[-1].d_out, grid)
    yield grid.conv(plan[-1].d_out, 2 * z)
    yield grid.product(2 * z, 2 * z)


def _blocks(stage: Stage, grid: _Grid) -> Iterator[_Conv]:
    """A stage's residual blocks, the first of which may change the width."""
    yield from _residual(stage.d_in, stage.d_out, grid)
    for _ in range(stage.num_blocks - 1):
        yield from _residual(stage.d_out, stage.d_out, grid)


def _residual(d_in: int, d_out: int, grid: _Grid) -> Iterator[_Conv]:
    yield grid.conv(d_in, d_out)
    yield grid.conv(d_out, d_out)
    if d_in != d_out:
        yield grid.product(d_in, d_out)


def _middle(d: int, grid: _Grid) -> Iterator[_Conv]:
    """Two residual blocks, and what attention between them multiplies by weights."""
    for _ in range(2):
        yield from _residual(d, d, grid)
    yield grid.product(d, 3 * d)
    yield grid.product(d, d)
