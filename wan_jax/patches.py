"""Latents to the patches that are the DiT's tokens, ordered t, h, w, and back."""

import jax

from wan_jax import rope
from wan_jax.config import DiTConfig

Array = jax.Array


def patchify(latents: Array, config: DiTConfig) -> tuple[rope.Grid, Array]:
    """[b, t, h, w, c] -> grid and patches [b, l, pt, ph, pw, c], tokens ordered t, h, w."""
    b, *extent, c = latents.shape
    if c != config.in_channels or any(n % p for n, p in zip(extent, config.patch_size)):
        raise ValueError(
            f"latents have shape {latents.shape}; [b, t, h, w, {config.in_channels}] with t, h, w "
            f"in multiples of {config.patch_size} is needed"
        )
    t, h, w = (n // p for n, p in zip(extent, config.patch_size, strict=True))
    pt, ph, pw = config.patch_size
    x = latents.reshape(b, t, pt, h, ph, w, pw, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return (t, h, w), x.reshape(b, t * h * w, pt, ph, pw, c)


def unpatchify(x_blo: Array, grid: rope.Grid, config: DiTConfig) -> Array:
    """[b, l, pt*ph*pw*c], channel fastest -> [b, t, h, w, c]."""
    (t, h, w), (pt, ph, pw), c = grid, config.patch_size, config.out_channels
    x = x_blo.reshape(-1, t, h, w, pt, ph, pw, c).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(-1, t * pt, h * ph, w * pw, c)
