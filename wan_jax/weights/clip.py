"""CLIP's vision tower: the names of Wan2.1 and of Diffusers (transformers), and its dimensions.

The files hold more than is used: the last block, what follows it, and in Wan2.1 the text tower.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from wan_jax.config import CLIPConfig
from wan_jax.weights import facts
from wan_jax.weights.rules import LINEAR, Layout, Rule, Shape, Table

_PATCH = Layout(permute=(2, 3, 1, 0))  # [d, c, p, q] -> [p, q, c, d]
_TOKEN = Layout(squeeze=(0, 1))  # [1, 1, d] -> [d]
_POSITIONS = Layout(squeeze=(0,))  # [1, l, d] -> [l, d]
_HEAD_DIM = 80  # of the released tower; it is the one size that no shape shows
# From release 5 on transformers leaves this out where the tower is the whole model.
_PREFIX = "vision_model."
_WAN, _DIFFUSERS = "visual.transformer.{i}", f"{_PREFIX}encoder.layers.{{i}}"

# Tensors that the dimensions are read from; the last is behind all blocks.
_NAMES = {
    "wan": (
        "visual.patch_embedding.weight",
        "visual.pos_embedding",
        f"{_WAN}.mlp.0.weight",
        "visual.post_norm.weight",
    ),
    "diffusers": (
        f"{_PREFIX}embeddings.patch_embedding.weight",
        f"{_PREFIX}embeddings.position_embedding.weight",
        f"{_DIFFUSERS}.mlp.fc1.weight",
        f"{_PREFIX}post_layernorm.weight",
    ),
}


def _product(target: str, wan: str, diffusers: str) -> Iterator[Rule]:
    yield Rule(f"{target}.kernel", f"{wan}.weight", f"{diffusers}.weight", LINEAR)
    yield Rule(f"{target}.bias", f"{wan}.bias", f"{diffusers}.bias")


def _norm(target: str, wan: str, diffusers: str) -> Iterator[Rule]:
    yield Rule(f"{target}.scale", f"{wan}.weight", f"{diffusers}.weight")
    yield Rule(f"{target}.bias", f"{wan}.bias", f"{diffusers}.bias")


def _rules() -> Iterator[Rule]:
    patch, positions, *_ = zip(_NAMES["wan"], _NAMES["diffusers"], strict=True)
    token = "visual.cls_embedding", f"{_PREFIX}embeddings.class_embedding"
    yield Rule("patch.kernel", *patch, _PATCH)
    yield Rule("class_token", *token, wan_layout=_TOKEN)
    yield Rule("positions", *positions, wan_layout=_POSITIONS)
    yield from _norm("norm_in", "visual.pre_norm", f"{_PREFIX}pre_layrnorm")  # sic
    yield from _norm("layers.norm1", f"{_WAN}.norm1", f"{_DIFFUSERS}.layer_norm1")
    attention = f"{_WAN}.attn", f"{_DIFFUSERS}.self_attn"
    yield from _product("layers.qkv", f"{attention[0]}.to_qkv", f"{attention[1]}.{{q,k,v}}_proj")
    yield from _product("layers.out", f"{attention[0]}.proj", f"{attention[1]}.out_proj")
    yield from _norm("layers.norm2", f"{_WAN}.norm2", f"{_DIFFUSERS}.layer_norm2")
    yield from _product("layers.ffn_in", f"{_WAN}.mlp.0", f"{_DIFFUSERS}.mlp.fc1")
    yield from _product("layers.ffn_out", f"{_WAN}.mlp.2", f"{_DIFFUSERS}.mlp.fc2")


_RULES = tuple(_rules())


def table(config: CLIPConfig) -> Table:
    """The rules of a tower; which block is left out depends on how many there are."""
    used, prefix = config.num_layers - 1, rf"({re.escape(_PREFIX)})?"
    last = "the last block: Wan2.1 takes the state before it"
    after = "behind the last block"
    groups = (group for rule in _RULES for group in rule.names("diffusers", (used,)))
    return Table(
        _RULES,
        aliases={name.removeprefix(_PREFIX): name for group in groups for name in group},
        ignored={
            r"textual\..*": "the text tower, which Wan2.1 does not use",
            "log_scale": "weighs images against texts",
            r"visual\.post_norm\.(weight|bias)": after,
            r"visual\.head": after,
            rf"visual\.transformer\.{used}\..*": last,
            rf"{prefix}post_layernorm\.(weight|bias)": after,
            r"visual_projection\.weight": after,
            rf"{prefix}encoder\.layers\.{used}\..*": last,
            rf"{prefix}embeddings\.position_ids": "0, 1, 2, ..., as older releases stored them",
        },
    )


def stand_ins(config: CLIPConfig) -> dict[str, str]:
    """{tensor that transformers' CLIPVisionModel has and the table leaves out: one of its shape}.

    These are the last block and the norm behind it, which Wan2.1 does not use.
    """
    stacks = [rule for rule in _RULES if rule.stacked]
    first = [name for rule in stacks for name in rule.names("diffusers", (1,))[0]]
    last = _DIFFUSERS.replace("{i}", str(config.num_layers - 1))
    found = {name.replace(_DIFFUSERS.replace("{i}", "0"), last): name for name in first}
    norms = f"{_PREFIX}post_layernorm", f"{_PREFIX}pre_layrnorm"
    return found | {f"{norms[0]}.{leaf}": f"{norms[1]}.{leaf}" for leaf in ("weight", "bias")}


def stand_in(name: str, shape: Shape, dtype: np.dtype) -> np.ndarray:
    """One of stand_ins(): norms scale by one and products are zero, so the block adds nothing."""
    return np.full(shape, bool(re.search(r"norm\d?\.weight$", name)), dtype)


def config_from_diffusers(values: Mapping[str, Any]) -> CLIPConfig:
    """From image_encoder/config.json of transformers' CLIPVisionModel, with projection or without.

    Raises ValueError for a missing dimension, another kind of model or another activation.
    """
    fixed = {  # what is needed, and what transformers takes for granted where nothing is said
        "model_type": ("clip_vision_model", "clip_vision_model"),
        "num_channels": (3, 3),
        "hidden_act": ("gelu", "quick_gelu"),
    }
    for name, (needed, usual) in fixed.items():
        found = values.get(name, usual)
        if found != needed:
            raise ValueError(
                f"image_encoder/config.json has {name} = {found!r}; {needed!r} is needed"
            )
    sizes = {
        "image_size": "image_size",
        "patch_size": "patch_size",
        "dim": "hidden_size",
        "num_heads": "num_attention_heads",
        "num_layers": "num_hidden_layers",
        "ffn_dim": "intermediate_size",
    }
    missing = [name for name in sizes.values() if name not in values]
    if missing:
        raise ValueError(
            f"image_encoder/config.json lacks {missing}; a CLIP vision config has "
            f"{tuple(sizes.values())}"
        )
    dimensions = {ours: facts.integer(values, name) for ours, name in sizes.items()}
    return CLIPConfig(**dimensions, eps=values.get("layer_norm_eps", CLIPConfig.eps))


def config_from_shapes(shapes: Mapping[str, Shape], naming: str) -> CLIPConfig:
    """From {tensor name: shape} in one of rules.NAMINGS, heads as in the released tower.

    eps leaves no trace in a shape and keeps its default. Raises ValueError that names the tensors
    which are missing or contradict each other, or if the width is no multiple of 80.
    """
    if naming == "diffusers" and not any(name.startswith(_PREFIX) for name in shapes):
        shapes = {f"{_PREFIX}{name}": shape for name, shape in shapes.items()}
    patch, positions, ffn, after = _NAMES[naming]
    first = ffn.replace("{i}", "0")
    missing = [name for name in (patch, positions, first) if name not in shapes]
    if missing:
        raise ValueError(f"these weights are no vision tower of CLIP: {missing} missing")
    if after not in shapes:
        raise ValueError(
            f"{after} is missing, so the last block may be too, and which is the last decides the "
            "result; add the tower's config.json (num_hidden_layers, ...) beside its file"
        )
    dim, channels, *patch_sides = facts.sizes(shapes, patch, axes=4)
    tokens = facts.sizes(shapes, positions, axes=3 if naming == "wan" else 2)[-2]
    side, grid = patch_sides[0], math.isqrt(tokens - 1)
    if channels != 3 or patch_sides[1] != side:
        raise ValueError(f"{patch} has shape {list(shapes[patch])}; square patches of 3 are needed")
    if grid < 1 or grid**2 != tokens - 1:
        raise ValueError(f"{positions} has {tokens} rows; one and a square number are needed")
    if dim % _HEAD_DIM:
        raise ValueError(
            f"the vision tower has width {dim}, no multiple of {_HEAD_DIM}, and no tensor shows "
            "how many heads it has; add its config.json (hidden_size, ...) beside its file"
        )
    pattern = re.escape(ffn).replace(re.escape("{i}"), r"\d+")
    return CLIPConfig(
        image_size=grid * side,
        patch_size=side,
        dim=dim,
        num_heads=dim // _HEAD_DIM,
        num_layers=sum(1 for name in shapes if re.fullmatch(pattern, name)),
        ffn_dim=facts.sizes(shapes, first, axes=2)[0],
    )


def config_to_diffusers(config: CLIPConfig) -> dict[str, Any]:
    """image_encoder/config.json of transformers' CLIPVisionModel with this tower's dimensions.

    It counts all blocks, although we hold all but one: hidden_states[-2] is before the last.
    """
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.dim,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.ffn_dim,
        "hidden_act": "gelu",
        "layer_norm_eps": config.eps,
    }


def processor_to_diffusers(config: CLIPConfig) -> dict[str, Any]:
    """image_processor/preprocessor_config.json of transformers' CLIPImageProcessor."""
    size = config.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
