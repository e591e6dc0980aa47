"""DiT: the names of Wan2.1 and of Diffusers, and its dimensions from either's files."""

from collections.abc import Mapping
from typing import Any

from wan_jax.config import DiTConfig
from wan_jax.weights.rules import LINEAR, SAME, Layout, Rule, Shape, Table

_PATCH = Layout(permute=(2, 3, 4, 1, 0))  # [d, c, pt, ph, pw] -> [pt, ph, pw, c, d]
_SQUEEZE = Layout(squeeze=(0,))


def _linear(target: str, wan: str, diffusers: str, layout: Layout = LINEAR) -> list[Rule]:
    return [
        Rule(f"{target}.kernel", f"{wan}.weight", f"{diffusers}.weight", layout),
        Rule(f"{target}.bias", f"{wan}.bias", f"{diffusers}.bias"),
    ]


def _attention(target: str, wan: str, diffusers: str) -> list[Rule]:
    rules = []
    for name in "qkv":
        rules += _linear(f"{target}.{name}", f"{wan}.{name}", f"{diffusers}.to_{name}")
    rules += _linear(f"{target}.o", f"{wan}.o", f"{diffusers}.to_out.0")
    for name in ("norm_q", "norm_k"):
        rules.append(
            Rule(f"{target}.{name}.scale", f"{wan}.{name}.weight", f"{diffusers}.{name}.weight")
        )
    return rules


def _table() -> Table:
    embedder, b = "condition_embedder", "blocks.{i}"
    rules = [
        *_linear("patch", "patch_embedding", "patch_embedding", _PATCH),
        *_linear("text_in", "text_embedding.0", f"{embedder}.text_embedder.linear_1"),
        *_linear("text_out", "text_embedding.2", f"{embedder}.text_embedder.linear_2"),
        *_linear("time_in", "time_embedding.0", f"{embedder}.time_embedder.linear_1"),
        *_linear("time_out", "time_embedding.2", f"{embedder}.time_embedder.linear_2"),
        *_linear("time_proj", "time_projection.1", f"{embedder}.time_proj"),
        Rule("layers.modulation", f"{b}.modulation", f"{b}.scale_shift_table", _SQUEEZE),
        *_attention("layers.self_attn", f"{b}.self_attn", f"{b}.attn1"),
        # The affine norm before cross-attention is norm3 in Wan2.1 and norm2 in Diffusers.
        Rule("layers.norm3.scale", f"{b}.norm3.weight", f"{b}.norm2.weight", SAME),
        Rule("layers.norm3.bias", f"{b}.norm3.bias", f"{b}.norm2.bias", SAME),
        *_attention("layers.cross_attn", f"{b}.cross_attn", f"{b}.attn2"),
        *_linear("layers.ffn_in", f"{b}.ffn.0", f"{b}.ffn.net.0.proj"),
        *_linear("layers.ffn_out", f"{b}.ffn.2", f"{b}.ffn.net.2"),
        Rule("head_modulation", "head.modulation", "scale_shift_table", _SQUEEZE),
        *_linear("head_proj", "head.head", "proj_out"),
    ]
    stray = {r"blocks\.\d+\.attn2\.norm_added_q\.weight": "written by Diffusers, read by nothing"}
    return Table(tuple(rules), ignored=stray)


TABLE = _table()


def config_from_wan(values: Mapping[str, Any], shapes: Mapping[str, Shape]) -> DiTConfig:
    """From config.json of the original layout; what it does not store comes from the shapes.

    Raises ValueError for a network that is not text to video.
    """
    kind = values.get("model_type", "t2v")
    if kind != "t2v":
        raise ValueError(
            f"config.json has model_type {kind!r}; only 't2v' checkpoints are supported"
        )
    return DiTConfig(
        dim=values["dim"],
        ffn_dim=values["ffn_dim"],
        num_heads=values["num_heads"],
        num_layers=values["num_layers"],
        in_channels=values["in_dim"],
        out_channels=values["out_dim"],
        text_dim=shapes["text_embedding.0.weight"][1],
        text_len=values["text_len"],
        freq_dim=values["freq_dim"],
        patch_size=tuple(shapes["patch_embedding.weight"][2:]),
        eps=values["eps"],
    )


def config_from_diffusers(values: Mapping[str, Any]) -> DiTConfig:
    """From transformer/config.json of WanTransformer3DModel.

    Raises ValueError for a network that is not text to video or a choice Wan2.1 does not make.
    """
    fixed = {
        "qk_norm": "rms_norm_across_heads",
        "cross_attn_norm": True,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "pos_embed_seq_len": None,
    }
    for name, needed in fixed.items():
        if values.get(name, needed) != needed:
            raise ValueError(
                f"transformer/config.json has {name} = {values[name]!r}; {needed!r} is needed, "
                "as in a text-to-video checkpoint"
            )
    return DiTConfig(
        dim=values["num_attention_heads"] * values["attention_head_dim"],
        ffn_dim=values["ffn_dim"],
        num_heads=values["num_attention_heads"],
        num_layers=values["num_layers"],
        in_channels=values["in_channels"],
        out_channels=values["out_channels"],
        text_dim=values["text_dim"],
        freq_dim=values["freq_dim"],
        patch_size=tuple(values["patch_size"]),
        eps=values["eps"],
    )


def config_to_diffusers(config: DiTConfig) -> dict[str, Any]:
    """transformer/config.json of WanTransformer3DModel with this network's dimensions."""
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(config.patch_size),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": config.eps,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
    }
