"""What the diffusion transformer makes of the tokens that CLIP gives for its images.

Source: Wan2.1 wan/modules/model.py, MLPProj, and for first and last frames its positions.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from wan_jax.config import DiTConfig
from wan_jax.layers import LayerNorm, Linear, gelu, layer_norm, linear

Array = jax.Array
EPS = 1e-5  # of the norms around the products, PyTorch's default


class ImageMLP(nnx.Module):
    """CLIP's tokens [b, s, image_dim] to the network's width; positions tell two images apart."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        width = config.image_dim
        assert width is not None
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(config.dim)
        self.fc1 = Linear(width, width, rngs=rngs, dtype=dtype)
        self.fc2 = Linear(width, config.dim, rngs=rngs, dtype=dtype)
        if config.image_positions is not None:
            self.positions = nnx.Param(jnp.zeros((config.image_positions, width), jnp.float32))


def image_tokens(mlp: ImageMLP | None, image_bsd: Array | None, config: DiTConfig) -> Array | None:
    """CLIP's tokens in the network's width, [b, s, dim]; None for a network that takes no image.

    Raises ValueError for what the network of this configuration does not take.
    """
    width, positions = config.image_dim, config.image_positions
    if mlp is None or image_bsd is None:
        if (mlp is None) != (image_bsd is None):
            wanted = "takes no image" if mlp is None else f"needs tokens [b, s, {width}]"
            raise ValueError(f"image is {'None' if image_bsd is None else 'given'}; it {wanted}")
        return None
    _, s, found = image_bsd.shape
    if found != width or (positions is not None and s != positions):
        count = "s" if positions is None else str(positions)
        raise ValueError(
            f"image tokens have shape {image_bsd.shape}; [b, {count}, {width}] is needed"
        )
    x = image_bsd.astype(jnp.float32)
    if positions is not None:
        x = x + mlp.positions[...]
    x = layer_norm(x, eps=EPS, affine=mlp.norm1)
    x = linear(mlp.fc2, gelu(linear(mlp.fc1, x)))
    return layer_norm(x, eps=EPS, affine=mlp.norm2)
