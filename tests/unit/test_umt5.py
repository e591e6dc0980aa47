"""UMT5 without torch: size, buckets, padding, precision, names and dimensions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tolerances
from tests.random_weights import random_array, relative_l2
from wan_jax import umt5 as umt5_module
from wan_jax.config import T2V_1_3B, UMT5Config
from wan_jax.layers import lookup
from wan_jax.umt5 import UMT5, position_buckets
from wan_jax.weights import rules, trees
from wan_jax.weights import umt5 as umt5_weights

# Attention width 4 * 24 differs from dim, so a swapped axis cannot pass.
CONFIG = UMT5Config(vocab_size=97, dim=64, num_heads=4, head_dim=24, ffn_dim=160, num_layers=3)

encode = jax.jit(umt5_module.encode)


def _abstract(config: UMT5Config, dtype: jnp.dtype = jnp.float32) -> UMT5:
    return trees.abstract(lambda: UMT5(config, rngs=nnx.Rngs(0), dtype=dtype))


def _weights(config: UMT5Config = CONFIG) -> dict[str, np.ndarray]:
    """Random values at our own paths, drawn in the layout and under the names of transformers."""
    arrays = {}
    targets = trees.flatten(_abstract(config))
    for rule in umt5_weights.table(config).rules:
        shape = targets[rule.target].shape[rule.stacked :]
        source = rule.layout.source_shape(shape)
        layers = [
            rule.layout.apply(random_array(rule.diffusers.replace("{i}", str(i)), source))
            for i in range(config.num_layers if rule.stacked else 1)
        ]
        arrays[rule.target] = np.stack(layers) if rule.stacked else layers[0]
    # T5 draws queries so that its unscaled logits are about 1; at 5 a softmax amplifies rounding.
    arrays["layers.attn.q.kernel"] = arrays["layers.attn.q.kernel"] / math.sqrt(config.head_dim)
    return arrays


def _module(dtype: jnp.dtype = jnp.float32) -> UMT5:
    arrays = {path: jnp.asarray(array, dtype) for path, array in _weights().items()}
    return trees.fill(_abstract(CONFIG, dtype), arrays)


def _ids(lengths: tuple[int, ...], total: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.RandomState(seed).randint(2, CONFIG.vocab_size, (len(lengths), total))
    mask = (np.arange(total) < np.array(lengths)[:, None]).astype(np.int32)
    return (ids * mask).astype(np.int32), mask


def test_parameter_count_of_the_released_encoder() -> None:
    leaves = trees.flatten(_abstract(T2V_1_3B.umt5, jnp.bfloat16))
    assert sum(math.prod(leaf.shape) for leaf in leaves.values()) == 5_680_910_336
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {path for path, leaf in leaves.items() if leaf.shape[0] == 24} == {
        path for path in leaves if path.startswith("layers.")
    }


def test_bucket_bands() -> None:
    buckets = position_buckets(512, num_buckets=32, max_distance=128)
    assert buckets.dtype == np.int32
    bands = {8: 12, 9: 16, 10: 23, 11: 32, 12: 46, 13: 64, 14: 91, 15: 512}  # first of the next
    expected = list(range(8))
    for bucket, end in bands.items():
        expected += [bucket] * (end - len(expected))
    np.testing.assert_array_equal(buckets[:, 0], expected)  # keys before the query
    np.testing.assert_array_equal(buckets[0, 1:], np.array(expected[1:]) + 16)  # and after it
    for offset in (-300, -9, 0, 5, 100):
        assert len(set(np.diagonal(buckets, offset))) == 1


def test_every_layer_has_its_own_position_table() -> None:
    module = _module()
    position = module.layers.position[...]
    shared = nnx.Param(jnp.broadcast_to(position[:1], position.shape))
    ids, mask = _ids((20,), 20)
    before = encode(module, ids, mask)
    module.layers.position = shared
    assert relative_l2(encode(module, ids, mask), before) > tolerances.UMT5_MATTERS


def test_content_of_padding_does_not_matter() -> None:
    module = _module()
    ids, mask = _ids((7, 20), 24)
    other = np.where(mask == 1, ids, 5)
    np.testing.assert_array_equal(encode(module, ids, mask), encode(module, other, mask))


def test_longer_padding_gives_the_same_rows() -> None:
    module = _module()
    ids, mask = _ids((7, 20), 20)
    short = np.asarray(encode(module, ids, mask))
    long = np.asarray(encode(module, *(np.pad(a, ((0, 0), (0, 140))) for a in (ids, mask))))
    assert relative_l2(long[:, :20], short) < tolerances.UMT5_PADDING
    assert not long[:, 20:].any()


def test_rows_past_the_text_are_zero() -> None:
    module = _module()
    ids, mask = _ids((7, 20), 24)
    context = np.asarray(encode(module, ids, mask.astype(bool)))
    assert context.shape == (2, 24, CONFIG.dim)
    assert context.dtype == np.float32
    assert not context[mask == 0].any()
    assert (np.abs(context[mask == 1]).max(-1) > 0).all()


def test_a_batch_equals_its_members() -> None:
    module = _module()
    ids, mask = _ids((7, 20), 24)
    both = np.asarray(encode(module, ids, mask))
    for row in range(2):
        alone = encode(module, ids[row : row + 1], mask[row : row + 1])
        assert relative_l2(both[row], alone[0]) < tolerances.UMT5_PADDING


def test_bfloat16_is_close_to_float32() -> None:
    ids, mask = _ids((7, 140), 150)
    exact = np.asarray(encode(_module(), ids, mask))
    context = encode(_module(jnp.bfloat16), ids, mask)
    assert context.dtype == jnp.bfloat16
    assert relative_l2(context, exact) < tolerances.UMT5_BFLOAT16


def test_an_id_outside_the_vocabulary_gives_nan() -> None:
    ids = np.array([[3, CONFIG.vocab_size, 1]], np.int32)
    assert np.isnan(encode(_module(), ids, np.ones_like(ids))).all()


def test_own_initial_values_give_a_sound_context() -> None:
    module = UMT5(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32)
    ids, mask = _ids((20,), 20)
    context = np.asarray(encode(module, ids, mask))
    assert abs(np.sqrt(np.mean(context**2)) - 1) < tolerances.UMT5_UNIT_NORM
    first, second = module.layers.attn.q.kernel[...][:2]
    assert relative_l2(first, second) > tolerances.UMT5_MATTERS  # layers are drawn apart


def test_bucket_gather_is_not_recomputed_per_layer() -> None:
    """The bucket matrix is a NumPy constant: no logarithm is left in the program."""
    ids, mask = _ids((7,), 24)
    program = str(jax.make_jaxpr(umt5_module.encode)(_module(), ids, mask))
    assert "log" not in program.replace("logistic", "")


@pytest.mark.parametrize("naming", rules.NAMINGS)
def test_names_are_total_both_ways(naming: str) -> None:
    table = umt5_weights.table(CONFIG)
    targets = trees.flatten(_abstract(CONFIG))
    arrays = _weights()
    exported = dict(rules.export(table, arrays, naming=naming))
    plan = rules.resolve(table, targets, naming=naming, names=list(exported))

    assert len(exported) == 2 + 10 * CONFIG.num_layers
    assert {item.target for item in plan} == set(targets)
    for item in plan:
        assert all(exported[name].shape == item.source_shape for name in item.sources)
    with pytest.raises(rules.MismatchError, match="unused: stray"):
        rules.resolve(table, targets, naming=naming, names=[*exported, "stray"])
    with pytest.raises(rules.MismatchError, match=r"absent: .*final|absent: norm\.weight"):
        rules.resolve(
            table, targets, naming=naming, names=[n for n in exported if n[-11:] != "norm.weight"]
        )


@pytest.mark.parametrize("names", [["shared.weight"], ["encoder.embed_tokens.weight"], None])
def test_the_tied_embedding_is_found_under_either_name(names: list[str] | None) -> None:
    tied = ["shared.weight", "encoder.embed_tokens.weight"]
    table = umt5_weights.table(CONFIG)
    exported = dict(rules.export(table, _weights(), naming="diffusers"))
    present = [n for n in exported if n != tied[0]] + (names or tied)
    plan = rules.resolve(table, trees.flatten(_abstract(CONFIG)), naming="diffusers", names=present)
    (embedding,) = (item for item in plan if item.target == "embedding")
    assert embedding.sources == ((names or tied)[0],)

    shapes = {name: exported.get(name, exported[tied[0]]).shape for name in present}
    assert umt5_weights.config_from_shapes(shapes, "diffusers") == CONFIG


@pytest.mark.parametrize("naming", rules.NAMINGS)
def test_dimensions_from_shapes(naming: str) -> None:
    table = umt5_weights.table(CONFIG)
    exported = dict(rules.export(table, _weights(), naming=naming))
    shapes = {name: array.shape for name, array in exported.items()}
    assert umt5_weights.config_from_shapes(shapes, naming) == CONFIG

    shapes = {name: shape for name, shape in shapes.items() if "bias" not in name}
    shapes.pop("blocks.0.pos_embedding.embedding.weight", None)
    with pytest.raises(ValueError, match=r"relative_attention_bias|pos_embedding.*missing"):
        umt5_weights.config_from_shapes(shapes, naming)


def test_dimensions_from_shapes_that_contradict() -> None:
    exported = dict(rules.export(umt5_weights.table(CONFIG), _weights(), naming="wan"))
    shapes = {name: array.shape for name, array in exported.items()}
    shapes["blocks.0.pos_embedding.embedding.weight"] = (32, 5)
    with pytest.raises(ValueError, match=r"96 rows.* 5 heads"):
        umt5_weights.config_from_shapes(shapes, "wan")


DIFFUSERS = {
    "model_type": "umt5",
    "vocab_size": 97,
    "d_model": 64,
    "d_kv": 24,
    "d_ff": 160,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "dense_act_fn": "gelu_new",
    "scalable_attention": True,
}


def test_config_from_diffusers() -> None:
    assert umt5_weights.config_from_diffusers(DIFFUSERS) == CONFIG
    other = DIFFUSERS | {"relative_attention_max_distance": 64, "layer_norm_epsilon": 1e-5}
    config = umt5_weights.config_from_diffusers(other)
    assert (config.max_distance, config.eps) == (64, 1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("feed_forward_proj", "relu"),
        ("feed_forward_proj", "gated-silu"),
        ("is_gated_act", False),
        ("dense_act_fn", "relu"),
        ("model_type", "t5"),
    ],
)
def test_config_from_diffusers_rejects(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} = {value!r}"):
        umt5_weights.config_from_diffusers(DIFFUSERS | {name: value})


def test_config_from_diffusers_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"lacks \['d_kv'\]"):
        umt5_weights.config_from_diffusers({k: v for k, v in DIFFUSERS.items() if k != "d_kv"})


def test_lookup_has_the_gradient_of_take():
    rng = np.random.default_rng(3)
    table = jnp.asarray(rng.standard_normal((7, 5)), jnp.float32)
    index = jnp.asarray([[0, 3, 0], [6, 0, 3]], jnp.int32)
    weights = jnp.asarray(rng.standard_normal((2, 3, 5)), jnp.float32)

    def total(take, table):
        return jnp.sum(weights * jnp.square(take(table)))

    ours, want = (
        jax.grad(functools.partial(total, take))(table)
        for take in (lambda t: lookup(t, index), lambda t: jnp.take(t, index, axis=0))
    )
    np.testing.assert_allclose(ours, want, rtol=1e-6)
    assert not np.any(np.asarray(ours)[[1, 2, 4, 5]])
    np.testing.assert_array_equal(lookup(table, index), table[np.asarray(index)])


def test_lookup_keeps_small_shares_of_a_narrow_gradient():
    """Thousands of times the same token: in bfloat16 a running sum would stop at 256."""
    table = jnp.zeros((4, 2), jnp.bfloat16)
    index = jnp.zeros((1000,), jnp.int32)
    found = jax.grad(lambda t: jnp.sum(lookup(t, index).astype(jnp.float32)))(table)
    assert float(found[0, 0]) == 1000.0
