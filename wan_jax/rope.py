"""Rotary position embedding over (time, height, width), tables from float64.

The head is split into interleaved pairs (x[2j], x[2j+1]); the first pairs turn with the token's
frame, then its row, then its column. Each axis has its own spectrum 10000^(-2j/D).
And the sinusoid that tells the network how noisy its latents are.
Source: Wan2.1 wan/modules/model.py, rope_params, rope_apply and sinusoidal_embedding_1d.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Grid = tuple[int, int, int]
MAX_TIMESTEP = 1000


def axis_widths(head_dim: int) -> Grid:
    """Channels of one head that turn with time, height, width: (44, 42, 42) for 128."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def axis_angles(length: int, width: int) -> np.ndarray:
    """Angles [length, width / 2], float64, of positions 0..length-1 along one axis."""
    spectrum = 10000.0 ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    return np.arange(length, dtype=np.float64)[:, None] * spectrum[None, :]


def tables(grid: Grid, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [l, head_dim / 2], of the l = t*h*w tokens in (t, h, w) order.

    Only the three one-axis tables are constants of the program; the broadcast is the device's.
    """

    def spread(function: np.ufunc) -> jax.Array:
        parts = []
        for axis, (length, width) in enumerate(zip(grid, axis_widths(head_dim), strict=True)):
            values = function(axis_angles(length, width)).astype(np.float32)
            shape = [1, 1, 1, width // 2]
            shape[axis] = length
            parts.append(jnp.broadcast_to(values.reshape(shape), (*grid, width // 2)))
        return jnp.concatenate(parts, -1).reshape(-1, head_dim // 2)

    return spread(np.cos), spread(np.sin)


def rotate(x_blnk: jax.Array, cos_lk: jax.Array, sin_lk: jax.Array) -> jax.Array:
    """Turn every pair of x [b, l, n, k] by its token's angle; float32 in and out.

    A pair (x, y) becomes (x cos - y sin, y cos + x sin), each number at its own place: itself times
    cos, and the other one times sin. To stack the two takes an H200 1.8 times as long.
    """
    pairs = x_blnk.reshape(*x_blnk.shape[:-1], -1, 2)
    cos, sin = (table[None, :, None, :, None] for table in (cos_lk, sin_lk))
    signs = jnp.asarray([-1.0, 1.0], sin.dtype)
    turned = pairs * cos + lax.rev(pairs, (pairs.ndim - 1,)) * (sin * signs)
    return turned.reshape(x_blnk.shape)


def sinusoid(t_b: jax.Array, width: int) -> jax.Array:
    """[cos | sin] of t * 10000^(-2j/width), float32 [b, width], for t in 0..1000.

    The original computes this in float64. A float32 product t * frequency would be off by 3e-5 at
    t = 1000, so whole timesteps come from a float64 table and the fraction, which is small, is
    added by the angle sum.
    """
    frequency = 10000.0 ** (-np.arange(width // 2, dtype=np.float64) / (width // 2))
    angles = np.arange(MAX_TIMESTEP + 1, dtype=np.float64)[:, None] * frequency
    t = t_b.astype(jnp.float32)
    whole = jnp.clip(jnp.floor(t), 0, MAX_TIMESTEP).astype(jnp.int32)
    rest = (t - whole.astype(jnp.float32))[:, None] * frequency.astype(np.float32)
    cos = jnp.asarray(np.cos(angles), jnp.float32)[whole]
    sin = jnp.asarray(np.sin(angles), jnp.float32)[whole]
    cos_rest, sin_rest = jnp.cos(rest), jnp.sin(rest)
    return jnp.concatenate([cos * cos_rest - sin * sin_rest, sin * cos_rest + cos * sin_rest], -1)
