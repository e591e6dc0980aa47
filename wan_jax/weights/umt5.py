"""UMT5: the names of Wan2.1 and of Diffusers (transformers), and its dimensions from the files."""

import re
from collections.abc import Mapping
from typing import Any

from wan_jax.config import UMT5Config
from wan_jax.weights import facts
from wan_jax.weights.rules import LINEAR, Rule, Shape, Table

_EMBEDDING = {"wan": "token_embedding.weight", "diffusers": "shared.weight"}
_TIED = "encoder.embed_tokens.weight"
_WAN, _DIFFUSERS = "blocks.{i}", "encoder.block.{i}.layer"


def _linear(target: str, wan: str, diffusers: str) -> Rule:
    return Rule(
        f"layers.{target}.kernel",
        f"{_WAN}.{wan}.weight",
        f"{_DIFFUSERS}.{diffusers}.weight",
        LINEAR,
    )


def _same(target: str, wan: str, diffusers: str) -> Rule:
    return Rule(f"layers.{target}", f"{_WAN}.{wan}.weight", f"{_DIFFUSERS}.{diffusers}.weight")


def _table() -> Table:
    attention, ffn = "0.SelfAttention", "1.DenseReluDense"
    rules = (
        Rule("embedding", _EMBEDDING["wan"], _EMBEDDING["diffusers"]),
        _same("norm1.scale", "norm1", "0.layer_norm"),
        *(_linear(f"attn.{name}", f"attn.{name}", f"{attention}.{name}") for name in "qkvo"),
        _same("position", "pos_embedding.embedding", f"{attention}.relative_attention_bias"),
        _same("norm2.scale", "norm2", "1.layer_norm"),
        _linear("ffn.gate", "ffn.gate.0", f"{ffn}.wi_0"),
        _linear("ffn.fc1", "ffn.fc1", f"{ffn}.wi_1"),
        _linear("ffn.fc2", "ffn.fc2", f"{ffn}.wo"),
        Rule("norm.scale", "norm.weight", "encoder.final_layer_norm.weight"),
    )
    return Table(rules, aliases={_TIED: _EMBEDDING["diffusers"]})


_TABLE = _table()


def table(config: UMT5Config) -> Table:
    """The rules of a UMT5; they are the same for every size."""
    del config
    return _TABLE


def config_from_diffusers(values: Mapping[str, Any]) -> UMT5Config:
    """From text_encoder/config.json of transformers' UMT5EncoderModel.

    Raises ValueError for a missing dimension, another kind of model or another feed-forward.
    """
    fixed = {
        "model_type": "umt5",
        "feed_forward_proj": "gated-gelu",
        "is_gated_act": True,
        "dense_act_fn": "gelu_new",
    }
    for name, needed in fixed.items():
        if values.get(name, needed) != needed:
            raise ValueError(
                f"text_encoder/config.json has {name} = {values[name]!r}; {needed!r} is needed"
            )
    sizes = ("vocab_size", "d_model", "num_heads", "d_kv", "d_ff", "num_layers")
    missing = [name for name in sizes if name not in values]
    if missing:
        raise ValueError(f"text_encoder/config.json lacks {missing}; a UMT5 config has {sizes}")
    vocab_size, dim, heads, head_dim, ffn_dim, layers = (
        facts.integer(values, name) for name in sizes
    )
    return UMT5Config(
        vocab_size=vocab_size,
        dim=dim,
        num_heads=heads,
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        num_layers=layers,
        num_buckets=values.get("relative_attention_num_buckets", UMT5Config.num_buckets),
        max_distance=values.get("relative_attention_max_distance", UMT5Config.max_distance),
        eps=values.get("layer_norm_epsilon", UMT5Config.eps),
    )


def config_from_shapes(shapes: Mapping[str, Shape], naming: str) -> UMT5Config:
    """From {tensor name: shape} in one of rules.NAMINGS.

    max_distance and eps leave no trace in a shape and keep their defaults. Raises ValueError that
    names the tensors which are missing or contradict each other.
    """

    def name_of(target: str, layer: int = 0) -> str:
        rule = next(rule for rule in _TABLE.rules if rule.target == target)
        return rule.source(naming).replace("{i}", str(layer))

    embedding = _EMBEDDING[naming]
    if embedding not in shapes and naming == "diffusers":
        embedding = _TIED
    query, gate = name_of("layers.attn.q.kernel"), name_of("layers.ffn.gate.kernel")
    bias = name_of("layers.position")
    missing = [name for name in (embedding, query, gate, bias) if name not in shapes]
    if missing:
        raise ValueError(f"these weights are no UMT5 encoder: {missing} missing")
    vocab_size, dim = facts.sizes(shapes, embedding, axes=2)
    num_buckets, num_heads = facts.sizes(shapes, bias, axes=2)
    width = facts.sizes(shapes, query, axes=2)[0]
    if width % num_heads:
        raise ValueError(
            f"{query} has {width} rows, which the {num_heads} heads of {bias} do not divide"
        )
    pattern = re.escape(name_of("layers.attn.q.kernel", -1)).replace(re.escape("-1"), r"\d+")
    return UMT5Config(
        vocab_size=vocab_size,
        dim=dim,
        num_heads=num_heads,
        head_dim=width // num_heads,
        ffn_dim=facts.sizes(shapes, gate, axes=2)[0],
        num_layers=sum(1 for name in shapes if re.fullmatch(pattern, name)),
        num_buckets=num_buckets,
    )


def config_to_diffusers(config: UMT5Config) -> dict[str, Any]:
    """text_encoder/config.json of transformers' UMT5EncoderModel with this network's dimensions."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": config.vocab_size,
        "d_model": config.dim,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "d_ff": config.ffn_dim,
        "num_layers": config.num_layers,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.eps,
        "feed_forward_proj": "gated-gelu",
        "is_gated_act": True,
        "dense_act_fn": "gelu_new",
    }
