"""Wan2.1 video generation in JAX: load a checkpoint, generate a video, save it."""

from wan_jax.loading import load
from wan_jax.media import save_video
from wan_jax.pipeline import Progress, Wan

__all__ = ["Progress", "Wan", "load", "save_video"]
__version__ = "0.1.0"
