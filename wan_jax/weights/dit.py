"""DiT: the names of Wan2.1 and of Diffusers, and its dimensions from either's files."""

import math
import re
from collections.abc import Mapping
from typing import Any

from wan_jax.config import KINDS, DiTConfig
from wan_jax.weights import facts
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


def _image_rules(*, positions: bool) -> list[Rule]:
    """What an image adds: the MLP before the blocks, and keys and values in each.

    positions: whether a table tells the tokens of two images apart.
    """
    wan, diffusers = "img_emb.proj", "condition_embedder.image_embedder"
    b = "blocks.{i}"
    rules = [
        *_norm("image.norm1", f"{wan}.0", f"{diffusers}.norm1"),
        *_linear("image.fc1", f"{wan}.1", f"{diffusers}.ff.net.0.proj"),
        *_linear("image.fc2", f"{wan}.3", f"{diffusers}.ff.net.2"),
        *_norm("image.norm2", f"{wan}.4", f"{diffusers}.norm2"),
    ]
    target, ours, theirs = "layers.cross_attn", f"{b}.cross_attn", f"{b}.attn2"
    for name in "kv":
        rules += _linear(f"{target}.{name}_img", f"{ours}.{name}_img", f"{theirs}.add_{name}_proj")
    norm = f"{ours}.norm_k_img.weight", f"{theirs}.norm_added_k.weight"
    rules.append(Rule(f"{target}.norm_k_img.scale", *norm))
    if positions:
        table = f"{wan.removesuffix('.proj')}.emb_pos", f"{diffusers}.pos_embed"
        rules.append(Rule("image.positions", *table, _SQUEEZE))
    return rules


def _norm(target: str, wan: str, diffusers: str) -> list[Rule]:
    return [
        Rule(f"{target}.scale", f"{wan}.weight", f"{diffusers}.weight"),
        Rule(f"{target}.bias", f"{wan}.bias", f"{diffusers}.bias"),
    ]


def table(config: DiTConfig) -> Table:
    """The rules of a DiT, with an image branch or without."""
    if config.image_dim is None:
        return TABLE
    rules = _image_rules(positions=config.image_positions is not None)
    return Table((*TABLE.rules, *rules), ignored=TABLE.ignored)


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
EVERY = Table((*TABLE.rules, *_image_rules(positions=True)))  # of all kinds of DiT together


_NAMES = {
    "wan": ("text_embedding.0", "time_embedding.0", "blocks.{i}.ffn.0", "head.head"),
    "diffusers": (
        "condition_embedder.text_embedder.linear_1",
        "condition_embedder.time_embedder.linear_1",
        "blocks.{i}.ffn.net.0.proj",
        "proj_out",
    ),
}
_HEAD_DIM = 128  # of every released network; it is the one size that no shape shows
# What an image adds, and of it the tensors that show its width and how many positions it has.
_IMAGE = {"wan": "img_emb.", "diffusers": "condition_embedder.image_embedder."}
_IMAGE_NAMES = {"wan": ("proj.0.weight", "emb_pos"), "diffusers": ("norm1.weight", "pos_embed")}


def _image_sizes(shapes: Mapping[str, Shape], naming: str) -> dict[str, int]:
    """The fields of DiTConfig that an image adds; none for a network without."""
    prefix = _IMAGE[naming]
    if not any(name.startswith(prefix) for name in shapes):
        return {}
    width, positions = (f"{prefix}{name}" for name in _IMAGE_NAMES[naming])
    found = {"image_dim": facts.sizes(shapes, width, axes=1)[0]}
    if positions in shapes:
        found["image_positions"] = facts.sizes(shapes, positions, axes=3)[1]
    return found


def config_from_shapes(shapes: Mapping[str, Shape], naming: str) -> DiTConfig:
    """Dimensions of the DiT whose tensors have these names and shapes, heads as in released ones.

    naming: one of rules.NAMINGS. text_len and eps are the released ones too. Raises ValueError
    where the tensors are those of no DiT, or where its width is no multiple of 128.
    """
    text, time, ffn, head = (f"{name}.weight" for name in _NAMES[naming])
    dim, in_channels, *patch = facts.sizes(shapes, "patch_embedding.weight", axes=5)
    outputs = facts.sizes(shapes, head, axes=2)[0]
    if outputs % math.prod(patch):
        raise ValueError(f"{head} has {outputs} rows, which patches of {patch} do not divide")
    if dim % _HEAD_DIM:
        raise ValueError(
            f"the DiT has width {dim}, no multiple of {_HEAD_DIM}, and no tensor shows how many "
            "heads it has; add its config.json (dim, num_heads, ...) beside its file"
        )
    pattern = re.escape(ffn).replace(re.escape("{i}"), r"\d+")
    return DiTConfig(
        dim=dim,
        ffn_dim=facts.sizes(shapes, ffn.replace("{i}", "0"), axes=2)[0],
        num_heads=dim // _HEAD_DIM,
        num_layers=sum(1 for name in shapes if re.fullmatch(pattern, name)),
        in_channels=in_channels,
        out_channels=outputs // math.prod(patch),
        text_dim=facts.sizes(shapes, text, axes=2)[1],
        freq_dim=facts.sizes(shapes, time, axes=2)[1],
        patch_size=tuple(patch),
        **_image_sizes(shapes, naming),
    )


def config_from_wan(
    values: Mapping[str, Any], shapes: Mapping[str, Shape], *, naming: str = "wan"
) -> DiTConfig:
    """From config.json of the original layout; what it does not store comes from the shapes.

    naming: that of the shapes. Raises ValueError for another kind of network, or one that the
    tensors are not.
    """
    kind = values.get("model_type")
    if kind not in (None, *KINDS):
        raise ValueError(
            f"config.json has model_type {kind!r}; only checkpoints of {', '.join(KINDS)} are "
            "supported"
        )
    config = DiTConfig(
        dim=facts.integer(values, "dim"),
        ffn_dim=facts.integer(values, "ffn_dim"),
        num_heads=facts.integer(values, "num_heads"),
        num_layers=facts.integer(values, "num_layers"),
        in_channels=facts.integer(values, "in_dim"),
        out_channels=facts.integer(values, "out_dim"),
        text_dim=facts.sizes(shapes, f"{_NAMES[naming][0]}.weight", axes=2)[1],
        text_len=facts.integer(values, "text_len"),
        freq_dim=facts.integer(values, "freq_dim"),
        patch_size=facts.sizes(shapes, "patch_embedding.weight", axes=5)[2:],
        eps=values["eps"],
        **_image_sizes(shapes, naming),
    )
    found = KINDS[config.images]
    if kind not in (None, found):
        raise ValueError(f"config.json has model_type {kind!r}; the tensors are those of {found!r}")
    return config


def config_from_diffusers(values: Mapping[str, Any]) -> DiTConfig:
    """From transformer/config.json of WanTransformer3DModel.

    Raises ValueError for another kind of network or a choice Wan2.1 does not make.
    """
    heads, head_dim = (
        facts.integer(values, name) for name in ("num_attention_heads", "attention_head_dim")
    )
    image = {
        ours: facts.integer(values, name)
        for ours, name in (("image_dim", "image_dim"), ("image_positions", "pos_embed_seq_len"))
        if values.get(name) is not None
    }
    fixed = {  # what is needed, and what diffusers takes for granted where nothing is said
        "_class_name": ("WanTransformer3DModel", "WanTransformer3DModel"),
        "qk_norm": ("rms_norm_across_heads", "rms_norm_across_heads"),
        "cross_attn_norm": (True, True),
        "added_kv_proj_dim": (heads * head_dim if image else None, None),
    }
    for name, (needed, usual) in fixed.items():
        found = values.get(name, usual)
        if found != needed:
            kind = "image" if image else "text"
            raise ValueError(
                f"transformer/config.json has {name} = {found!r}; {needed!r} is needed, as in "
                f"{kind}-to-video checkpoints of Wan2.1"
            )
    return DiTConfig(
        dim=heads * head_dim,
        ffn_dim=facts.integer(values, "ffn_dim"),
        num_heads=heads,
        num_layers=facts.integer(values, "num_layers"),
        in_channels=facts.integer(values, "in_channels"),
        out_channels=facts.integer(values, "out_channels"),
        text_dim=facts.integer(values, "text_dim"),
        freq_dim=facts.integer(values, "freq_dim"),
        patch_size=facts.integers(values, "patch_size"),
        eps=values["eps"],
        **image,
    )


def images_of(values: Mapping[str, Any]) -> int | None:
    """How many images a DiT takes, by config.json of either layout; None if that does not tell."""
    kind = values.get("model_type")
    if kind is not None:
        return KINDS.index(kind) if kind in KINDS else None
    if "num_attention_heads" not in values:
        return None
    if values.get("image_dim") is None:
        return 0
    return 1 if values.get("pos_embed_seq_len") is None else 2


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
        "image_dim": config.image_dim,
        "added_kv_proj_dim": config.dim if config.images else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": config.image_positions,
    }


def config_to_wan(config: DiTConfig) -> dict[str, Any]:
    """config.json of the original's WanModel with this network's dimensions.

    It has no place for patch_size, text_dim and the sizes of images, which its tensors show.
    """
    return {
        "_class_name": "WanModel",
        "model_type": KINDS[config.images],
        "text_len": config.text_len,
        "in_dim": config.in_channels,
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "out_dim": config.out_channels,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "eps": config.eps,
    }
