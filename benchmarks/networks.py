"""Networks of random weights made on the card, ours and diffusers', for benchmarks of the DiT."""

from typing import Any

from measure import in_torch, torch_device
from random_checkpoint import config_of

# name: latent frames, height, width, of 81 frames
LATENTS = {"1.3B": (21, 60, 104), "14B": (21, 90, 160), "tiny": (3, 8, 12)}
LATENTS |= dict.fromkeys(("i2v-14B", "flf2v-14B"), LATENTS["14B"])


def whole_config(model: str) -> Any:
    """The configuration of all networks: by the name of a kind, or by the size of one for text."""
    from wan_jax.config import RELEASED

    return RELEASED[model] if model in RELEASED else config_of(model)


def random_dit(config: Any, where: Any = None) -> Any:
    """The DiT in bfloat16; its head is not zero, as it is before training. where: of each array."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from wan_jax.dit import DiT

    def make() -> DiT:
        network = DiT(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        head = network.head_proj.kernel
        head[...] = (0.02 * jax.random.normal(jax.random.key(2), head.shape)).astype(head.dtype)
        return network

    return jax.jit(make, out_shardings=where)()


def diffusers_transformer(config: Any) -> Any:
    """The transformer in bfloat16 and, on a card, compiled as diffusers advises."""
    import torch
    from diffusers import WanTransformer3DModel

    same = ("ffn_dim", "num_layers", "in_channels", "out_channels", "text_dim", "freq_dim")
    settings = {
        **{name: getattr(config, name) for name in same},
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "rope_max_seq_len": 1024,
    }
    if config.images:
        settings |= {"image_dim": config.image_dim, "added_kv_proj_dim": config.dim}
        settings["pos_embed_seq_len"] = config.image_positions
    network = in_torch(lambda: WanTransformer3DModel(**settings), torch.bfloat16)
    if torch_device() == "cuda":
        network.compile_repeated_blocks(fullgraph=False)
    return network
