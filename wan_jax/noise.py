"""Initial latents from a seed: the same numbers on any device, mesh and batch."""

import jax
import jax.numpy as jnp
import numpy as np

MAX_SEED = 2**64 - 1


def initial_noise(seed: int, samples: int, *, shape: tuple[int, ...], first: int = 0) -> jax.Array:
    """Standard normal latents [samples, *shape], float32: samples first, first + 1, ... of a seed.

    Sample k draws from fold_in(seed, k), so it does not depend on how many are drawn with it.
    Raises ValueError for a seed outside 0..2^64 - 1.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed is {seed}; an integer from 0 to {MAX_SEED} is needed")
    # Both halves of the seed, spelled out: jax.random.key drops the upper one without 64-bit mode.
    halves = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    key = jax.random.wrap_key_data(jnp.asarray(halves), impl="threefry2x32")
    draw = [
        jax.random.normal(jax.random.fold_in(key, k), shape) for k in range(first, first + samples)
    ]
    return jnp.stack(draw)
