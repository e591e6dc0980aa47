"""Rotary tables and the timestep's sinusoid, against numbers of Wan2.1 and against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tolerances
from wan_jax import rope

GRID = (3, 2, 5)


def test_head_of_128_splits_into_44_42_42() -> None:
    assert rope.axis_widths(128) == (44, 42, 42)


@pytest.mark.parametrize("head_dim", range(2, 258, 2))
def test_widths_of_every_even_head_are_even_and_add_up(head_dim: int) -> None:
    widths = rope.axis_widths(head_dim)
    assert sum(widths) == head_dim
    assert all(width % 2 == 0 for width in widths)


@pytest.mark.parametrize(
    ("width", "second", "last"), [(44, 0.65793322, 1.5199e-4), (42, 0.64494668, 1.5505e-4)]
)
def test_angles_at_position_1_are_the_printed_ones(width: int, second: float, last: float) -> None:
    angles = rope.axis_angles(1024, width)
    assert angles.shape == (1024, width // 2) and angles.dtype == np.float64
    assert not angles[0].any()
    assert angles[1, 0] == 1.0
    assert abs(angles[1, 1] - second) <= tolerances.ROPE_PRINTED_DIGIT
    assert abs(angles[1, -1] / last - 1) <= tolerances.ROPE_PRINTED_SMALL
    np.testing.assert_array_equal(angles, np.arange(1024)[:, None] * angles[1])


@pytest.mark.parametrize("head_dim", [128, 48, 32])
def test_tables_hold_each_token_s_frame_row_and_column(head_dim: int) -> None:
    cos, sin = rope.tables(GRID, head_dim)
    tokens = int(np.prod(GRID))
    assert cos.shape == sin.shape == (tokens, head_dim // 2)
    assert cos.dtype == sin.dtype == jnp.float32
    angles = _angles(head_dim)
    np.testing.assert_array_equal(cos, np.cos(angles).astype(np.float32))
    np.testing.assert_array_equal(sin, np.sin(angles).astype(np.float32))


@pytest.mark.parametrize("head_dim", [128, 48, 32])
def test_rotation_is_a_complex_product(head_dim: int) -> None:
    shape = (2, int(np.prod(GRID)), 3, head_dim)
    x = np.random.RandomState(3).standard_normal(shape).astype(np.float32)
    turned = jax.jit(lambda x: rope.rotate(x, *rope.tables(GRID, head_dim)))(x)
    assert turned.shape == shape and turned.dtype == jnp.float32
    pairs = x.astype(np.float64).reshape(*shape[:-1], -1, 2)
    numbers = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * _angles(head_dim))[:, None]
    truth = np.stack([numbers.real, numbers.imag], -1).reshape(shape)
    assert np.abs(np.asarray(turned) - truth).max() <= tolerances.ROPE_ROTATION * np.abs(x).max()


def test_rotated_products_depend_on_the_offset_alone() -> None:
    stream = np.random.RandomState(4)
    grid, width = (6, 7, 8), 48
    q, k = (
        jnp.broadcast_to(stream.standard_normal(width).astype(np.float32), (1, 336, 1, width))
        for _ in range(2)
    )
    tables = rope.tables(grid, width)
    q, k = (np.asarray(rope.rotate(x, *tables), np.float64).reshape(*grid, width) for x in (q, k))
    offset = np.einsum("thwk,thwk->thw", q[:-2, :-3, :-1], k[2:, 3:, 1:])
    assert np.ptp(offset) <= tolerances.ROPE_OFFSET * np.abs(offset).max()


def test_sinusoid_at_999_has_the_printed_values() -> None:
    wave = np.asarray(jax.jit(rope.sinusoid, static_argnums=1)(jnp.asarray([999.0]), 256))[0]
    cos = 0.99964985, 0.96378248, -0.39899176, 0.70482050
    sin = -0.02646075, -0.26668958, -0.91695451, 0.70938570
    assert wave.shape == (256,) and wave.dtype == np.float32
    assert np.abs(wave[:4] - cos).max() <= tolerances.DIT_SINUSOID
    assert np.abs(wave[128:132] - sin).max() <= tolerances.DIT_SINUSOID


@pytest.mark.parametrize("width", [256, 64, 2])
def test_sinusoid_equals_float64_at_every_whole_and_some_broken_timesteps(width: int) -> None:
    times = np.concatenate([np.arange(1001.0), [0.5, 91.0625, 333.25, 998.984375]])
    wave = np.asarray(rope.sinusoid(jnp.asarray(times, jnp.float32), width))
    angles = times[:, None] * 10000.0 ** (-np.arange(width // 2) / (width // 2))
    truth = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    assert np.abs(wave - truth).max() <= tolerances.DIT_SINUSOID


def _angles(head_dim: int) -> np.ndarray:
    """Angles [l, head_dim / 2], float64, token by token from the definition."""
    rows = []
    for position in np.ndindex(GRID):
        parts = [
            p * 10000.0 ** (-np.arange(0, width, 2) / width)
            for p, width in zip(position, rope.axis_widths(head_dim), strict=True)
        ]
        rows.append(np.concatenate(parts))
    return np.stack(rows)
