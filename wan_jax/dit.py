"""The diffusion transformer of Wan2.1, at four seams: prepare, embed, blocks, head.

    cond   = dit.prepare(context, image)     once a prompt
    h, mod = dit.embed(latents, t)           once a step
    h      = dit.blocks(h, mod, cond)        the scanned stack, or a slice of it
    v      = dit.head(h, mod)

Axes: b batch, t h w latent grid, l video tokens, s text tokens, d width, n heads, k head width,
i layers. Precision (Wan2.1 run on one GPU): products in the kernels' dtype; the residual stream,
norms, modulation, time path and head in float32.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from wan_jax import host_memory, rope, xla
from wan_jax.attention import attention, counted_attention, is_attention
from wan_jax.config import DiTConfig
from wan_jax.image_tokens import ImageMLP, image_tokens
from wan_jax.layers import (
    PRODUCT,
    LayerNorm,
    Linear,
    RMSNorm,
    gelu_tanh,
    layer_norm,
    linear,
    normal,
    rms_norm,
)
from wan_jax.patches import patchify, unpatchify
from wan_jax.residual import Stream
from wan_jax.sequence import Share, share_of
from wan_jax.stack import scan_by_kernels

Array = jax.Array
REMAT = ("none", "products", "attention", "full")


class Cond(NamedTuple):
    """Cross-attention keys and values of every block, [i, b, s, n, k] in the kernels' dtype.

    k_img, v_img: those of the image tokens, which share the queries and have a softmax of their
    own; None in text to video. padding: float32 [i], the logarithm of how often the last text token
    is there; None is once.
    """

    k: Array
    v: Array
    k_img: Array | None = None
    v_img: Array | None = None
    padding: Array | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["time_bd", "blocks_b6d", "cos_lk", "sin_lk"],
    meta_fields=["grid"],
)
@dataclasses.dataclass(frozen=True)
class Modulation:
    """What one step's timestep and grid mean to every block and the head; float32.

    grid counts patches along (t, h, w), so l = t * h * w.
    """

    time_bd: Array
    blocks_b6d: Array
    cos_lk: Array
    sin_lk: Array
    grid: rope.Grid


class Attention(nnx.Module):
    """Projections of one attention, with the norms of q and k over the full width."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        d = config.dim
        self.q, self.k, self.v, self.o = (Linear(d, d, rngs=rngs, dtype=dtype) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(d), RMSNorm(d)


class CrossAttention(Attention):
    """Attention to the text and, where the network takes an image, to its tokens."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        super().__init__(config, rngs=rngs, dtype=dtype)
        d = config.dim
        if config.image_dim is not None:
            self.k_img, self.v_img = (Linear(d, d, rngs=rngs, dtype=dtype) for _ in range(2))
            self.norm_k_img = RMSNorm(d)


class Block(nnx.Module):
    """One transformer block. norm3 is the affine norm before cross-attention, as Wan names it."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        d = config.dim
        table = jax.random.normal(rngs.params(), (6, d), jnp.float32) / d**0.5
        self.modulation = nnx.Param(table)
        self.self_attn = Attention(config, rngs=rngs, dtype=dtype)
        self.norm3 = LayerNorm(d)
        self.cross_attn = CrossAttention(config, rngs=rngs, dtype=dtype)
        self.ffn_in = Linear(d, config.ffn_dim, rngs=rngs, dtype=dtype)
        self.ffn_out = Linear(config.ffn_dim, d, rngs=rngs, dtype=dtype)


class DiT(nnx.Module):
    """Weights of the transformer; the stack's leaves have a leading layer axis.

    dtype is that of the kernels outside the float32 islands: bfloat16, or float32 for parity.
    fp8_attention: whether the video's tokens attend to each other in 8 bits, which
    weights/quantization.py sets.
    """

    fp8_attention = False

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        d, f32 = config.dim, jnp.float32
        small = normal(0.02)
        self.config = config
        self.patch = Linear((*config.patch_size, config.in_channels), d, rngs=rngs, dtype=dtype)
        self.text_in = Linear(config.text_dim, d, rngs=rngs, dtype=dtype, init=small)
        self.text_out = Linear(d, d, rngs=rngs, dtype=dtype, init=small)
        self.time_in = Linear(config.freq_dim, d, rngs=rngs, dtype=f32, init=small)
        self.time_out = Linear(d, d, rngs=rngs, dtype=f32, init=small)
        self.time_proj = Linear(d, 6 * d, rngs=rngs, dtype=f32)
        image = config.image_dim is not None
        self.image = ImageMLP(config, rngs=rngs, dtype=dtype) if image else None
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key), dtype=dtype))(keys)
        table = jax.random.normal(rngs.params(), (2, d), jnp.float32) / d**0.5
        self.head_modulation = nnx.Param(table)
        out = int(np.prod(config.patch_size)) * config.out_channels
        self.head_proj = Linear(d, out, rngs=rngs, dtype=f32, init=normal(0.0))

    def prepare(
        self,
        context_bsd: Array,
        image_bsd: Array | None = None,
        *,
        fetch: Callable[[Block], Block] | None = None,
        fold: bool = False,
    ) -> Cond:
        """Text states [b, s <= text_len, text_dim] -> keys and values of every block.

        image_bsd: CLIP's tokens [b, s, image_dim], where the network takes an image; those of a
        first and a last frame one after the other. Rows past the text are zero and stay in: the
        network attends to them (Wan2.1 text_len pads). fetch: see blocks(). fold: those rows, which
        are all the same, become one token that counts as often as they are there: the same to a
        rounding, and much less work for few video tokens.
        """
        _, s, width = context_bsd.shape
        if s > self.config.text_len or width != self.config.text_dim:
            raise ValueError(
                f"context has shape {context_bsd.shape}; at most {self.config.text_len} rows of "
                f"width {self.config.text_dim} are needed"
            )
        missing = self.config.text_len - s
        fold = fold and missing > 0
        context = jnp.pad(context_bsd, ((0, 0), (0, 1 if fold else missing), (0, 0)))
        text = linear(self.text_out, gelu_tanh(linear(self.text_in, context)))
        image = image_tokens(self.image, image_bsd, self.config)

        def keys_and_values(_: None, layer: Block) -> tuple[None, Cond]:
            weights = (layer if fetch is None else fetch(layer)).cross_attn
            pair = self._keys_and_values(weights.k, weights.norm_k, weights.v, text)
            if image is None:
                return None, Cond(*pair)
            norm = weights.norm_k_img
            return None, Cond(
                *pair, *self._keys_and_values(weights.k_img, norm, weights.v_img, image)
            )

        cond = lax.scan(keys_and_values, None, self.layers)[1]
        if fold:
            cond = cond._replace(padding=jnp.full(cond.k.shape[:1], np.log(missing), jnp.float32))
        return cond

    def embed(
        self, latents_bthwc: Array, t_b: Array, *, share: Share | None = None
    ) -> tuple[Array, Modulation]:
        """Latents and timesteps (0..1000) -> tokens [b, l, d] float32 and the modulation.

        share: what other devices leave to this one, inside shard_map (see spread.py); None is all.
        """
        config = self.config
        grid, patches = patchify(latents_bthwc, config)
        cos, sin = rope.tables(grid, config.head_dim)
        if share is not None:
            patches = share.take(patches, axis=1)
            cos, sin = (share.take(table, axis=0) for table in (cos, sin))
        h = linear(self.patch, patches).astype(jnp.float32)
        wave = rope.sinusoid(t_b, config.freq_dim)
        time = linear(self.time_out, jax.nn.silu(linear(self.time_in, wave)))
        steps = linear(self.time_proj, jax.nn.silu(time)).reshape(-1, 6, config.dim)
        return h, Modulation(time, steps, cos, sin, grid)

    def blocks(
        self,
        h_bld: Array,
        mod: Modulation,
        cond: Cond,
        *,
        layers: slice | None = None,
        residuals: Array | None = None,
        fetch: Callable[[Block], Block] | None = None,
        implementation: str | None = None,
        remat: str = "none",
        share: Share | None = None,
    ) -> Array:
        """Run the stack, or the blocks of `layers`, on tokens [b, l, d] float32.

        residuals: [layers run, b, l, d], added after each block. fetch: brings one layer's weights
        to the device inside the scan. implementation: which attention (see attention()). remat: for
        training, one of REMAT: what of a block the way back computes again instead of keeping it.
        "attention" is everything but the attention's kernel, which is kept where it is cuDNN's;
        "products" keeps those of linear(), too, in their own dtype, where "none" keeps float32.
        share: as in embed().
        """
        stack = self.layers
        share = Share(h_bld.shape[1]) if share is None else share
        if layers is not None:
            stack, cond = jax.tree.map(lambda x: x[layers], (stack, cond))

        def body(stream: Stream, item: tuple[Block, Cond, Array | None]) -> tuple[Stream, None]:
            layer, kv, residual = item
            stream = self._block(
                layer if fetch is None else fetch(layer), stream, mod, kv, share, implementation
            )
            stream = stream if residual is None else stream.add(residual)
            return (stream if waiting else stream.settled()), None

        # What is given to the next block is also what the way back keeps: with remat one array.
        waiting = residuals is None and remat == "none"
        stream = Stream.of(h_bld, self.text_in.kernel.dtype, waiting=waiting)
        # Not out of the host's memory, which copies have to bring.
        together = share.devices > 1 and xla.on_nvidia() and host_memory.fetch_of(self) is None
        scan = scan_by_kernels if together else lax.scan
        return scan(_remat(body, remat), stream, (stack, cond, residuals))[0].whole()

    def head(self, h_bld: Array, mod: Modulation, *, share: Share | None = None) -> Array:
        """Tokens -> velocity [b, t, h, w, out_channels], float32. share: as in embed()."""
        shift, scale = _split(self.head_modulation[...] + mod.time_bd[:, None], 2)
        normed = layer_norm(h_bld, eps=self.config.eps) * (1.0 + scale) + shift
        patches = linear(self.head_proj, normed)
        if share is not None:
            patches = share.join(patches, axis=1)
        return unpatchify(patches, mod.grid, self.config)

    def __call__(
        self,
        latents_bthwc: Array,
        t_b: Array,
        cond: Cond,
        *,
        fetch: Callable[[Block], Block] | None = None,
        implementation: str | None = None,
        remat: str = "none",
        share: Share | None = None,
    ) -> Array:
        """Velocity [b, t, h, w, out_channels], float32, of latents at timesteps t (0..1000).

        fetch, implementation, remat: see blocks(). share: as in embed(), None that of one device.
        """
        share = self.share(latents_bthwc.shape) if share is None else share
        h, mod = self.embed(latents_bthwc, t_b, share=share)
        h = self.blocks(
            h, mod, cond, fetch=fetch, implementation=implementation, remat=remat, share=share
        )
        return self.head(h, mod, share=share)

    def share(self, shape: tuple[int, ...], *, ring: int = 1, ulysses: int = 1) -> Share:
        """A device's share of the tokens of latents of this shape [b, t, h, w, c]."""
        tokens = int(np.prod(shape[1:4])) // int(np.prod(self.config.patch_size))
        return share_of(tokens, self.text_in.kernel.dtype, ring=ring, ulysses=ulysses)

    def _keys_and_values(
        self, key: Linear, norm: RMSNorm, value: Linear, tokens: Array
    ) -> tuple[Array, Array]:
        v = linear(value, tokens)
        k = rms_norm(norm, linear(key, tokens), eps=self.config.eps)
        return self._heads(k.astype(v.dtype)), self._heads(v)

    def _heads(self, x_bld: Array) -> Array:
        return x_bld.reshape(*x_bld.shape[:2], self.config.num_heads, self.config.head_dim)

    def _block(
        self,
        layer: Block,
        stream: Stream,
        mod: Modulation,
        kv: Cond,
        share: Share,
        implementation: str | None,
    ) -> Stream:
        eps = self.config.eps
        shift1, scale1, gate1, shift2, scale2, gate2 = _split(
            layer.modulation[...] + mod.blocks_b6d, 6
        )
        x, stream = stream.norm(1.0 + scale1, shift1, eps=eps)
        stream = stream.add(
            self._self_attention(layer.self_attn, x, mod, share, implementation), gate1
        )

        weights, affine = layer.cross_attn, layer.norm3
        x, stream = stream.norm(affine.scale[...], affine.bias[...], eps=eps, leave=True)
        q = rms_norm(weights.norm_q, linear(weights.q, x), eps=eps)
        q = self._heads(q.astype(kv.k.dtype))
        if kv.padding is None:
            y = attention(q, kv.k, kv.v, implementation=implementation)
        else:
            y = counted_attention(q, kv.k, kv.v, kv.padding)
        if kv.k_img is not None and kv.v_img is not None:
            y = y + attention(q, kv.k_img, kv.v_img, implementation=implementation)
        stream = stream.add(linear(weights.o, y.reshape(x.shape)))

        x, stream = stream.norm(1.0 + scale2, shift2, eps=eps)
        return stream.add(linear(layer.ffn_out, gelu_tanh(linear(layer.ffn_in, x))), gate2)

    def _self_attention(
        self,
        weights: Attention,
        x: Array,
        mod: Modulation,
        share: Share,
        implementation: str | None,
    ) -> Array:
        values = self._heads(linear(weights.v, x))
        if share.ulysses > 1:
            # As products read it, so that what has to wait for another's journey is half the bytes.
            # (A gradient would be summed so; none is taken, as a training has no such share.)
            x = x.astype(values.dtype)
        upcoming = x, mod.cos_lk, mod.sin_lk
        v, upcoming = share.send(values, upcoming, in_place=True)

        def made(norm: RMSNorm, p: Linear, x: Array, cos: Array, sin: Array) -> Array:
            normed = rms_norm(norm, linear(p, x), eps=self.config.eps, goes_on=True)
            return rope.rotate(self._heads(normed), cos, sin).astype(values.dtype)

        k, upcoming = share.send(made(weights.norm_k, weights.k, *upcoming), upcoming)
        q, _ = share.send(made(weights.norm_q, weights.q, *upcoming))
        y = share.attention(q, k, v, implementation=implementation, in_fp8=self.fp8_attention)
        return linear(weights.o, y.reshape(x.shape))


def _remat(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """The scan's body, which keeps for its gradient no more than `remat` says."""
    if remat not in REMAT:
        raise ValueError(f"remat is {remat!r}; one of {REMAT} is needed")
    if remat == "none":
        return body
    policies = jax.checkpoint_policies
    policy = {
        "products": policies.save_from_both_policies(
            is_attention, policies.save_only_these_names(PRODUCT)
        ),
        "attention": is_attention,
        "full": None,
    }[remat]
    return jax.checkpoint(body, policy=policy, prevent_cse=False)  # a scan needs no such guard


def _split(table_bmd: Array, count: int) -> list[Array]:
    """[b, count, d] -> count arrays [b, 1, d], which broadcast over tokens."""
    return [table_bmd[:, i : i + 1] for i in range(count)]
