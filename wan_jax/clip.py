"""The vision tower of CLIP ViT-H/14: an image to the tokens that image to video attends to.

Pre-norm blocks on a class token and the patches. Wan2.1 takes the state before the last block and
before the last norm, so neither of these is here. Axes: b batch, l tokens, d width, n heads, k head
width, h w patches of an image, p q pixels of a patch, c channels.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from wan_jax.attention import attention
from wan_jax.config import CLIPConfig
from wan_jax.layers import Array, LayerNorm, Linear, gelu, layer_norm, linear, normal

CHANNELS = 3
# Of red, green and blue from 0 to 1, in the data that CLIP was trained on.
_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
_STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)


class Block(nnx.Module):
    """One block; qkv holds the rows of queries, keys and values side by side."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        d = config.dim
        self.norm1 = LayerNorm(d)
        self.qkv = Linear(d, 3 * d, rngs=rngs, dtype=dtype)
        self.out = Linear(d, d, rngs=rngs, dtype=dtype)
        self.norm2 = LayerNorm(d)
        self.ffn_in = Linear(d, config.ffn_dim, rngs=rngs, dtype=dtype)
        self.ffn_out = Linear(config.ffn_dim, d, rngs=rngs, dtype=dtype)


class CLIP(nnx.Module):
    """The tower's weights without the last block; leaves of `layers` have a leading layer axis.

    dtype is that of the kernels, both embeddings and the residual stream, as in the original:
    float16, or float32 for parity.
    """

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        d, p = config.dim, config.patch_size
        small = normal(d**-0.5)
        self.config = config
        self.patch = Linear((p, p, CHANNELS), d, rngs=rngs, dtype=dtype, bias=False)
        self.class_token = nnx.Param(small(rngs.params(), (d,), dtype))
        self.positions = nnx.Param(small(rngs.params(), (config.num_tokens, d), dtype))
        self.norm_in = LayerNorm(d)
        keys = jax.random.split(rngs.params(), config.num_layers - 1)
        self.layers = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key), dtype=dtype))(keys)


def normalise(image: Array) -> Array:
    """[..., 3] in -1..1, of the size that the tower takes, to what encode() reads; float32.

    Nothing is clamped: where a bicubic resize overshoots, so does the original.
    """
    unit = image.astype(jnp.float32) * 0.5 + 0.5
    return (unit - _MEAN) / _STD


def encode(clip: CLIP, pixels_bhwc: Array, *, implementation: str | None = None) -> Array:
    """Tokens [b, 1 + patches, dim] in the dtype of the kernels, the class token first.

    pixels_bhwc: float32 [b, image_size, image_size, 3] as normalise() gives them.
    implementation: which attention (see attention()). Raises ValueError for another size.
    """
    config = clip.config
    size = config.image_size
    if pixels_bhwc.ndim != 4 or pixels_bhwc.shape[1:] != (size, size, CHANNELS):
        raise ValueError(
            f"the image has shape {pixels_bhwc.shape}; [b, {size}, {size}, {CHANNELS}] is needed"
        )

    def step(x_bld: Array, block: Block) -> tuple[Array, None]:
        return _block(block, x_bld, config, implementation), None

    x_bld = _embed(clip, pixels_bhwc)
    return lax.scan(step, x_bld, clip.layers)[0]


def _embed(clip: CLIP, pixels: Array) -> Array:
    """Class token and patches at their positions, after the first norm: [b, l, d]."""
    config = clip.config
    b, g, p = pixels.shape[0], config.grid, config.patch_size
    patches = pixels.reshape(b, g, p, g, p, CHANNELS).transpose(0, 1, 3, 2, 4, 5)  # bhwpqc
    x = linear(clip.patch, patches.reshape(b, g * g, p, p, CHANNELS))
    token = jnp.broadcast_to(clip.class_token[...], (b, 1, config.dim))
    x = jnp.concatenate([token, x], axis=1) + clip.positions[...]
    return layer_norm(x, eps=config.eps, affine=clip.norm_in).astype(x.dtype)


def _block(block: Block, x_bld: Array, config: CLIPConfig, implementation: str | None) -> Array:
    """One block, [b, l, d] to [b, l, d]; what its norms give is rounded by the products."""
    b, s, d = x_bld.shape
    h = layer_norm(x_bld, eps=config.eps, affine=block.norm1)
    qkv = linear(block.qkv, h).reshape(b, s, 3, config.num_heads, -1)
    q, k, v = (qkv[:, :, i] for i in range(3))  # [b, l, n, k]
    y = attention(q, k, v, implementation=implementation)
    x_bld = x_bld + linear(block.out, y.reshape(b, s, d))
    h = layer_norm(x_bld, eps=config.eps, affine=block.norm2)
    return x_bld + linear(block.ffn_out, gelu(linear(block.ffn_in, h)))
