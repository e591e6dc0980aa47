"""CLIP's vision tower without torch: size, patches, precision, names and dimensions."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from tests import manifests, tolerances
from tests.random_weights import random_array, relative_l2
from wan_jax import clip as clip_module
from wan_jax import layers
from wan_jax.clip import CLIP, normalise
from wan_jax.config import CLIPConfig
from wan_jax.weights import clip as clip_weights
from wan_jax.weights import rules, trees
from wan_jax.weights.rules import Layout, MismatchError, Rule, Table

CONFIG = CLIPConfig(image_size=42, dim=160, num_heads=2, num_layers=4, ffn_dim=96)
Tensors = dict[str, np.ndarray]
LAST = {"wan": "visual.transformer.31.", "diffusers": "vision_model.encoder.layers.31."}

encode = jax.jit(clip_module.encode, static_argnames="implementation")


class _Reader:
    """rules.Reader over {name: array}, or over shapes alone."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors

    def shapes(self) -> dict[str, tuple[rules.Shape, str]]:
        return {name: (a.shape, a.dtype.name) for name, a in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name]


def _abstract(config: CLIPConfig = CONFIG, dtype: jnp.dtype = jnp.float32) -> CLIP:
    return trees.abstract(lambda: CLIP(config, rngs=nnx.Rngs(0), dtype=dtype))


def _tensors() -> Tensors:
    """Random values of what is used, in the layout and under the names of transformers."""
    targets = trees.flatten(_abstract())
    tensors = {}
    for rule in clip_weights.table(CONFIG).rules:
        shape = targets[rule.target].shape
        for group in rule.names("diffusers", shape):
            for name in group:
                tensors[name] = random_array(name, rule.source_shape("diffusers", shape))
    return tensors


def _arrays(tensors: Mapping[str, Any], naming: str, dtype: jnp.dtype = jnp.float32) -> Tensors:
    """{target: array} of a state dict."""
    table, targets = clip_weights.table(CONFIG), trees.flatten(_abstract(CONFIG, dtype))
    plan = rules.resolve(table, targets, naming=naming, names=list(tensors))
    rules.check_shapes(plan, _Reader(tensors))
    return dict(rules.apply(plan, _Reader(tensors)))


def _module(dtype: jnp.dtype = jnp.float32) -> CLIP:
    arrays = _arrays(_tensors(), "diffusers", dtype)
    return trees.fill(_abstract(CONFIG, dtype), {n: jnp.asarray(a) for n, a in arrays.items()})


def _pixels(batch: int = 2, config: CLIPConfig = CONFIG) -> np.ndarray:
    size = config.image_size
    return np.random.RandomState(7).standard_normal((batch, size, size, 3)).astype(np.float32)


# The network.


def test_parameter_count_of_the_released_tower() -> None:
    leaves = trees.flatten(_abstract(CLIPConfig(), jnp.bfloat16))
    assert sum(math.prod(leaf.shape) for leaf in leaves.values()) == 611_086_080
    norms = {path for path, leaf in leaves.items() if leaf.dtype == jnp.float32}
    assert norms == {path for path in leaves if "norm" in path}
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    assert {path for path, leaf in leaves.items() if leaf.shape[0] == 31} == {
        path for path in leaves if path.startswith("layers.")
    }
    out = jax.eval_shape(
        clip_module.encode,
        _abstract(CLIPConfig(), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32),
    )
    assert out.shape == (2, 257, 1280) and out.dtype == jnp.bfloat16


def test_every_pixel_is_in_its_own_token() -> None:
    module, pixels = _module(), _pixels(1)
    before = np.asarray(clip_module._embed(module, pixels))
    for row, column in ((0, 0), (13, 14), (20, 41), (41, 3)):
        changed = pixels.copy()
        changed[0, row, column, 1] += 1.0
        moved = (np.asarray(clip_module._embed(module, changed)) != before).any(-1)
        assert np.flatnonzero(moved[0]).tolist() == [1 + row // 14 * 3 + column // 14]


def test_a_batch_equals_its_members() -> None:
    module, pixels = _module(), _pixels()
    both = np.asarray(encode(module, pixels))
    assert both.shape == (2, CONFIG.num_tokens, CONFIG.dim)
    for row in range(2):
        alone = encode(module, pixels[row : row + 1])
        assert relative_l2(both[row], alone[0]) < tolerances.CLIP_PADDING


def test_bfloat16_is_close_to_float32() -> None:
    exact = np.asarray(encode(_module(), _pixels()))
    tokens = encode(_module(jnp.bfloat16), _pixels())
    assert tokens.dtype == jnp.bfloat16
    assert relative_l2(tokens, exact) < tolerances.CLIP_BFLOAT16


@pytest.mark.parametrize(
    "shape", [(2, 42, 42), (2, 41, 42, 3), (2, 42, 56, 3), (2, 3, 42, 42), (1, 224, 224, 3)]
)
def test_another_size_is_named(shape: tuple[int, ...]) -> None:
    needed = rf"{re.escape(str(shape))}; \[b, 42, 42, 3\] is needed"
    with pytest.raises(ValueError, match=needed):
        clip_module.encode(_module(), jnp.zeros(shape))


def test_implementation_reaches_the_attention() -> None:
    with pytest.raises(ValueError, match="'flash3'"):
        encode(_module(), _pixels(), implementation="flash3")


def test_padding_of_the_tpu_kernel_keeps_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """257 tokens and heads of 80, neither of which is a multiple of its tiles, interpreted."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    interpreted = functools.partial(kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(kernel, "make_splash_mha", interpreted)
    config = dataclasses.replace(CONFIG, image_size=224, num_layers=2)
    module, pixels = CLIP(config, rngs=nnx.Rngs(0), dtype=jnp.float32), _pixels(1, config)
    run = jax.jit(clip_module.encode, static_argnames="implementation")
    ours = run(module, pixels, implementation="splash")
    assert relative_l2(ours, run(module, pixels, implementation="chunked")) < (
        tolerances.CLIP_PADDING
    )


def test_own_initial_values_give_sound_tokens() -> None:
    module = CLIP(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32)
    tokens = np.asarray(encode(module, _pixels()))
    assert np.isfinite(tokens).all() and 0.1 < np.sqrt(np.mean(tokens**2)) < 10
    first, second = module.layers.qkv.kernel[...][:2]
    assert relative_l2(first, second) > tolerances.CLIP_MATTERS  # layers are drawn apart


def test_normalise() -> None:
    """Against float64, beyond -1..1 too: what a bicubic resize overshoots is kept."""
    image = np.linspace(-1.2, 1.2, 2 * 5 * 7 * 3).reshape(2, 5, 7, 3).astype(np.float32)
    mean = np.array((0.48145466, 0.4578275, 0.40821073))
    std = np.array((0.26862954, 0.26130258, 0.27577711))
    exact = (image.astype(np.float64) * 0.5 + 0.5 - mean) / std
    ours = jax.jit(normalise)(image)
    assert ours.dtype == jnp.float32
    assert relative_l2(ours, exact) < tolerances.CLIP_FLOAT32


def test_gelu_is_the_exact_one() -> None:
    x = np.linspace(-4, 4, 101, dtype=np.float32)
    exact = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.astype(np.float64)])
    assert relative_l2(layers.gelu(x), exact) < tolerances.CLIP_FLOAT32
    assert relative_l2(layers.gelu_tanh(x), exact) > 10 * tolerances.CLIP_FLOAT32
    assert layers.gelu(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_layers", 1, "at least 2"),
        ("num_heads", 3, "dim 160 must be a multiple of num_heads 3"),
        ("image_size", 43, "image_size 43 must be a multiple of patch_size 14"),
        ("ffn_dim", 0, "positive"),
        ("eps", 1, "eps"),
    ],
)
def test_config_rejects(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **{name: value})


# Joined tensors.

FUSED = Rule("a", "wan.{i}.qkv", "b.{i}.{q,k,v}.w", rules.LINEAR)


def _joined(naming: str, names: list[str], shape: rules.Shape = (2, 4, 6)) -> list[Any]:
    targets = {"a": jax.ShapeDtypeStruct(shape, jnp.float32)}
    return rules.resolve(Table((FUSED,)), targets, naming=naming, names=names)


def test_alternatives_are_joined_in_their_order() -> None:
    parts = {
        f"b.{i}.{x}.w": random_array(f"{i}{x}", (2, 4)).astype(kind)
        for i in range(2)
        for x, kind in zip("vqk", (np.float16, ml_dtypes.bfloat16, np.float32), strict=True)
    }
    plan = _joined("diffusers", list(parts))
    assert plan[0].sources == tuple(f"b.{i}.{x}.w" for i in range(2) for x in "qkv")
    assert plan[0].source_shape == (2, 4)
    rules.check_shapes(plan, _Reader(parts))
    read: list[int] = []
    ((target, array),) = rules.apply(plan, _Reader(parts), progress=read.append)
    assert (target, array.shape, array.dtype) == ("a", (2, 4, 6), np.float32)
    assert sum(read) == sum(part.nbytes for part in parts.values())
    for i in range(2):
        wanted = [parts[f"b.{i}.{x}.w"].astype(np.float32).T for x in "qkv"]
        np.testing.assert_array_equal(array[i], np.concatenate(wanted, axis=1))

    back = dict(rules.export(Table((FUSED,)), {"a": array}, naming="diffusers"))
    assert set(back) == set(parts)
    for name, part in parts.items():
        np.testing.assert_array_equal(back[name], part.astype(np.float32))
    whole = dict(rules.export(Table((FUSED,)), {"a": array}, naming="wan"))
    assert {name: part.shape for name, part in whole.items()} == {
        "wan.0.qkv": (6, 4),
        "wan.1.qkv": (6, 4),
    }
    again = dict(rules.apply(_joined("wan", list(whole)), _Reader(whole)))
    np.testing.assert_array_equal(again["a"], array)


def test_one_of_several_joined_tensors_is_missed() -> None:
    names = [f"b.{i}.{x}.w" for i in range(2) for x in "qkv"]
    with pytest.raises(MismatchError, match=r"absent: b\.1\.k\.w\n"):
        _joined("diffusers", [name for name in names if name != "b.1.k.w"])
    with pytest.raises(MismatchError, match=r"unused: b\.2\.k\.w\n"):
        _joined("diffusers", [*names, "b.2.k.w"])
    shapes = {name: jax.ShapeDtypeStruct((2, 4, 6), jnp.float32) for name in "ac"}
    twice = Table((FUSED, Rule("c", "wan.{i}.c", "b.{i}.k.w", rules.LINEAR)))
    with pytest.raises(MismatchError, match=r"used twice: b\.0\.k\.w"):
        rules.resolve(twice, shapes, naming="diffusers", names=names)


def test_joined_tensors_without_layers_and_a_layout_of_its_own() -> None:
    rule = Rule("a", "wan.a", "{x,y}.a", wan_layout=Layout(squeeze=(0,)))
    array = random_array("a", (4, 3))
    for naming, shapes in (
        ("wan", {"wan.a": (1, 4, 3)}),
        ("diffusers", {"x.a": (2, 3), "y.a": (2, 3)}),
    ):
        tensors = dict(rules.export(Table((rule,)), {"a": array}, naming=naming))
        assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
        plan = rules.resolve(Table((rule,)), {"a": array}, naming=naming, names=list(tensors))
        rules.check_shapes(plan, _Reader(tensors))
        ((_, back),) = rules.apply(plan, _Reader(tensors))
        np.testing.assert_array_equal(back, array)


def test_damage_in_a_joined_tensor_is_named() -> None:
    parts = {f"b.{i}.{x}.w": np.ones((2, 4), np.float32) for i in range(2) for x in "qkv"}
    parts["b.1.v.w"][1, 2] = np.nan
    with pytest.raises(MismatchError, match=r"b\.1\.v\.w holds NaN"):
        list(rules.apply(_joined("diffusers", list(parts)), _Reader(parts)))


# Names.


@pytest.mark.parametrize("naming", rules.NAMINGS)
def test_names_are_total_both_ways(naming: str) -> None:
    arrays = _arrays(_tensors(), "diffusers")
    exported = dict(rules.export(clip_weights.table(CONFIG), arrays, naming=naming))
    assert len(exported) == 5 + (16 if naming == "diffusers" else 12) * (CONFIG.num_layers - 1)
    back = _arrays(exported, naming)
    assert back.keys() == arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(back[path], array)


def _stored(naming: str) -> dict[str, jax.ShapeDtypeStruct]:
    """What the released file holds."""
    return {
        name: jax.ShapeDtypeStruct(shape, dtype or "float32")
        for name, (shape, dtype) in manifests.load(f"clip.{naming}").items()
    }


def _check(naming: str, tensors: Mapping[str, Any]) -> set[str]:
    """What a conversion checks before it reads; the names that are used."""
    targets = trees.flatten(_abstract(CLIPConfig(), jnp.bfloat16))
    table = clip_weights.table(CLIPConfig())
    plan = rules.resolve(table, targets, naming=naming, names=list(tensors))
    rules.check_shapes(plan, _Reader(tensors))
    assert sorted(item.target for item in plan) == sorted(targets)
    return {name for item in plan for name in item.sources}


@pytest.mark.parametrize("naming", rules.NAMINGS)
def test_tables_are_total_on_the_released_files(naming: str) -> None:
    tensors, head = _stored(naming), manifests.head(f"clip.{naming}")
    count = sum(math.prod(tensor.shape) for tensor in tensors.values())
    assert count == 632_076_800 == head["parameters"] and len(tensors) == head["tensors"]
    used = _check(naming, tensors)
    assert sum(math.prod(tensors[name].shape) for name in used) == 611_086_080
    left = {re.sub(rf"^{LAST[naming]}.*", "last", name) for name in tensors.keys() - used}
    after = {
        "wan": {"visual.post_norm.weight", "visual.post_norm.bias", "visual.head"},
        "diffusers": {
            "vision_model.post_layernorm.weight",
            "vision_model.post_layernorm.bias",
            "visual_projection.weight",
        },
    }
    assert left == {"last", *after[naming]}
    assert used == _check(naming, {name: tensors[name] for name in used})


def test_the_text_tower_and_positions_are_left_out() -> None:
    one = jax.ShapeDtypeStruct((1,), np.float32)
    names = (
        "log_scale",
        "textual.token_embedding.weight",
        "textual.blocks.23.attn.q.weight",
        "textual.head.2.weight",
    )
    _check("wan", _stored("wan") | dict.fromkeys(names, one))
    for name in ("vision_model.embeddings.position_ids", "embeddings.position_ids"):
        _check("diffusers", _stored("diffusers") | {name: one})


def test_names_without_the_prefix() -> None:
    tensors = _stored("diffusers")
    bare = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    used = _check("diffusers", tensors)
    assert {f"vision_model.{name}" for name in _check("diffusers", bare)} == used
    shapes = {name: tensor.shape for name, tensor in bare.items()}
    assert clip_weights.config_from_shapes(shapes, "diffusers") == CLIPConfig()


def _drop(tensors: dict[str, Any], name: str) -> None:
    del tensors[name]


def _rename(tensors: dict[str, Any], name: str) -> None:
    tensors[f"{name}_renamed"] = tensors.pop(name)


def _reshape(tensors: dict[str, Any], name: str) -> None:
    shape = tensors[name].shape
    tensors[name] = jax.ShapeDtypeStruct((*shape[:-1], shape[-1] + 1), np.float32)


@pytest.mark.parametrize("change", [_drop, _rename, _reshape])
@pytest.mark.parametrize("naming", rules.NAMINGS)
def test_one_wrong_entry_is_found(
    naming: str, change: Callable[[dict[str, Any], str], None]
) -> None:
    """Every kind of tensor that is used, in the first layer, one between and the last of ours."""
    whole = _stored(naming)
    between = r".*(transformer|layers)\.(?!(0|17|30)\.).*"
    victims = [name for name in _check(naming, whole) if not re.fullmatch(between, name)]
    assert len(victims) == 5 + 3 * (16 if naming == "diffusers" else 12)
    for victim in victims:
        tensors = dict(whole)
        change(tensors, victim)
        with pytest.raises(MismatchError, match=re.escape(victim)):
            _check(naming, tensors)


@pytest.mark.parametrize("naming", rules.NAMINGS)
def test_a_block_more_or_less_is_found(naming: str) -> None:
    whole = _stored(naming)
    more = {name.replace(".31.", ".32."): tensor for name, tensor in whole.items()} | whole
    with pytest.raises(MismatchError, match=r"unused: .*\.32\."):
        _check(naming, more)
    less = {name: tensor for name, tensor in whole.items() if ".30." not in name}
    with pytest.raises(MismatchError, match=r"absent: .*\.30\."):
        _check(naming, less)


def test_swapped_axes_are_found() -> None:
    tensors = _stored("wan")
    victim = "visual.transformer.30.attn.to_qkv.weight"
    tensors[victim] = jax.ShapeDtypeStruct(tensors[victim].shape[::-1], np.float32)
    with pytest.raises(MismatchError, match=r"\[1280, 3840\], needed \[3840, 1280\]"):
        _check("wan", tensors)


# Dimensions.


@pytest.mark.parametrize("naming", rules.NAMINGS)
def test_dimensions_from_shapes(naming: str) -> None:
    shapes = {name: tensor.shape for name, tensor in _stored(naming).items()}
    assert clip_weights.config_from_shapes(shapes, naming) == CLIPConfig()
    short = {name: shape for name, shape in shapes.items() if not name.startswith(LAST[naming])}
    config = clip_weights.config_from_shapes(short, naming)
    assert config == dataclasses.replace(CLIPConfig(), num_layers=31)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("visual.post_norm.weight", None, "last block may be too"),
        ("visual.pos_embedding", None, r"no vision tower of CLIP: \['visual.pos_embedding'\]"),
        ("visual.transformer.0.mlp.0.weight", None, r"mlp\.0\.weight'\] missing"),
        ("visual.pos_embedding", (1, 256, 1280), "256 rows; one and a square"),
        ("visual.pos_embedding", (1, 1, 1280), "1 rows; one and a square"),
        ("visual.pos_embedding", (257, 1280), "3 axes"),
        ("visual.patch_embedding.weight", (1280, 3, 14, 16), "square patches"),
        ("visual.patch_embedding.weight", (1280, 4, 14, 14), "square patches"),
        ("visual.patch_embedding.weight", (1024, 3, 14, 14), "width 1024, no multiple of 80"),
    ],
)
def test_dimensions_from_shapes_that_contradict(
    name: str, shape: rules.Shape | None, message: str
) -> None:
    shapes = {n: tensor.shape for n, tensor in _stored("wan").items()}
    if shape is None:
        del shapes[name]
    else:
        shapes[name] = shape
    with pytest.raises(ValueError, match=message):
        clip_weights.config_from_shapes(shapes, "wan")


DIFFUSERS = manifests.head("clip.diffusers")["config"]


def test_config_from_diffusers() -> None:
    assert clip_weights.config_from_diffusers(DIFFUSERS) == CLIPConfig()
    values = clip_weights.config_to_diffusers(CONFIG)
    assert clip_weights.config_from_diffusers(values) == CONFIG
    other = dataclasses.replace(CONFIG, eps=1e-6, num_heads=5)
    values = clip_weights.config_to_diffusers(other)
    assert clip_weights.config_from_diffusers(values) == other


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "quick_gelu"),
        ("hidden_act", "gelu_pytorch_tanh"),
        ("model_type", "clip"),
        ("model_type", "siglip_vision_model"),
        ("num_channels", 4),
    ],
)
def test_config_from_diffusers_rejects(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} = {value!r}"):
        clip_weights.config_from_diffusers(DIFFUSERS | {name: value})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hidden_size", r"lacks \['hidden_size'\]"),
        ("patch_size", r"lacks \['patch_size'\]"),
        ("hidden_act", "hidden_act = 'quick_gelu'"),  # what transformers takes for granted
    ],
)
def test_config_from_diffusers_names_what_is_missing(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip_weights.config_from_diffusers({k: v for k, v in DIFFUSERS.items() if k != name})


@pytest.mark.parametrize(("name", "value"), [("image_size", [224, 224]), ("layer_norm_eps", "1")])
def test_config_from_diffusers_with_a_value_of_another_type(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"image_size is \[224, 224\]|eps is '1'"):
        clip_weights.config_from_diffusers(DIFFUSERS | {name: value})
