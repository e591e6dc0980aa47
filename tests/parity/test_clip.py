"""The vision tower of CLIP against transformers on the CPU, through the production rules."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from tests import tolerances
from tests.parity.convert import load_torch
from tests.random_weights import random_state_dict, relative_l2
from wan_jax import clip as clip_module
from wan_jax.clip import CLIP
from wan_jax.weights import clip as clip_weights
from wan_jax.weights import trees

# The released patches, tokens and head width.
TORCH_CONFIG = CLIPVisionConfig(
    hidden_size=160,
    intermediate_size=352,
    num_hidden_layers=9,
    num_attention_heads=2,
    image_size=224,
    patch_size=14,
    projection_dim=24,
    hidden_act="gelu",
    attn_implementation="sdpa",  # the eager form takes its softmax in float32 whatever the dtype
)
CONFIG = clip_weights.config_from_diffusers(TORCH_CONFIG.to_dict())
PREFIX = "vision_model."

encode = jax.jit(clip_module.encode)


def _shapes(kind: type[torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in kind(TORCH_CONFIG).named_parameters()}


STATE = random_state_dict(_shapes(CLIPVisionModelWithProjection))
PIXELS = np.random.RandomState(0).standard_normal((2, 224, 224, 3)).astype(np.float32)


def _torch_states(dtype: torch.dtype) -> list[np.ndarray]:
    """The input of every block and the output of the last, [b, l, d]."""
    model = CLIPVisionModelWithProjection._from_config(TORCH_CONFIG).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in STATE.items()})
    pixels = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).to(dtype)
    with torch.no_grad():
        output = model.to(dtype)(pixel_values=pixels, output_hidden_states=True)
    assert all(state.dtype == dtype for state in output.hidden_states)
    return [state.double().numpy() for state in output.hidden_states]


def _module(
    dtype: jnp.dtype, state: Mapping[str, np.ndarray] = STATE, naming: str = "diffusers"
) -> CLIP:
    abstract = trees.abstract(lambda: CLIP(CONFIG, rngs=nnx.Rngs(0), dtype=dtype))
    return load_torch(clip_weights.table(CONFIG), abstract, state, naming)


@pytest.fixture(scope="module")
def truth() -> list[np.ndarray]:
    return _torch_states(torch.float64)


def test_float32_is_as_close_to_float64_as_torch(truth: list[np.ndarray]) -> None:
    ours = np.asarray(encode(_module(jnp.float32), PIXELS))
    theirs = _torch_states(torch.float32)
    assert ours.shape == (2, 257, CONFIG.dim) and ours.dtype == np.float32
    for row in range(2):
        bound = tolerances.CLIP_TORCH_MULTIPLE * relative_l2(theirs[-2][row], truth[-2][row])
        assert relative_l2(ours[row], truth[-2][row]) <= bound
    for other in (truth[-3], truth[-1]):
        assert relative_l2(ours, other) > tolerances.CLIP_MATTERS


def test_bfloat16_is_as_close_to_float64_as_torch(truth: list[np.ndarray]) -> None:
    ours = encode(_module(jnp.bfloat16), PIXELS)
    assert ours.dtype == jnp.bfloat16
    theirs = _torch_states(torch.bfloat16)
    bound = tolerances.CLIP_TORCH_MULTIPLE_BFLOAT16 * relative_l2(theirs[-2], truth[-2])
    assert relative_l2(ours, truth[-2]) <= bound


_LAYER = r"vision_model\.encoder\.layers\.(\d+)\."
_WAN_NAMES = {  # Diffusers name to the name in Wan2.1; queries, keys and values apart
    r"vision_model\.embeddings\.class_embedding": "visual.cls_embedding",
    r"vision_model\.embeddings\.position_embedding\.weight": "visual.pos_embedding",
    r"vision_model\.embeddings\.patch_embedding\.weight": "visual.patch_embedding.weight",
    r"vision_model\.pre_layrnorm\.(\w+)": r"visual.pre_norm.\1",
    r"vision_model\.post_layernorm\.(\w+)": r"visual.post_norm.\1",
    r"visual_projection\.weight": "visual.head",
    _LAYER + r"layer_norm([12])\.(\w+)": r"visual.transformer.\1.norm\2.\3",
    _LAYER + r"self_attn\.([qkv])_proj\.(\w+)": r"visual.transformer.\1.attn.to_qkv.\3 \2",
    _LAYER + r"self_attn\.out_proj\.(\w+)": r"visual.transformer.\1.attn.proj.\2",
    _LAYER + r"mlp\.fc1\.(\w+)": r"visual.transformer.\1.mlp.0.\2",
    _LAYER + r"mlp\.fc2\.(\w+)": r"visual.transformer.\1.mlp.2.\2",
}


def _original(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As in Wan2.1's file: q, k and v in one tensor, two embeddings with unit axes."""
    renamed = {}
    for name, array in state.items():
        (new,) = (
            re.sub(old, new, name) for old, new in _WAN_NAMES.items() if re.fullmatch(old, name)
        )
        renamed[new] = array
    assert len(renamed) == len(state)
    for name in [name for name in renamed if name.endswith(" q")]:
        fused = name.removesuffix(" q")
        renamed[fused] = np.concatenate([renamed.pop(f"{fused} {part}") for part in "qkv"])
    renamed["visual.head"] = renamed["visual.head"].T
    renamed["visual.cls_embedding"] = renamed["visual.cls_embedding"][None, None]
    renamed["visual.pos_embedding"] = renamed["visual.pos_embedding"][None]
    return renamed


def _assert_equal(ours: CLIP, wanted: CLIP) -> None:
    leaves = trees.flatten(ours)
    for path, leaf in trees.flatten(wanted).items():
        np.testing.assert_array_equal(leaves[path], leaf, err_msg=path)


def test_the_original_names_give_the_same_module() -> None:
    state = _original(STATE)
    _assert_equal(_module(jnp.float32, state, "wan"), _module(jnp.float32))
    text = {"log_scale": np.zeros(()), "textual.blocks.0.attn.q.weight": np.zeros((4, 4))}
    _assert_equal(_module(jnp.float32, state | text, "wan"), _module(jnp.float32))
    shapes = {name: array.shape for name, array in (state | text).items()}
    assert clip_weights.config_from_shapes(shapes, "wan") == CONFIG


def test_names_of_every_release_of_transformers() -> None:
    """With the projection or without, with a prefix or without, and with what old ones stored."""
    bare = {name: STATE[PREFIX + name] for name in _shapes(CLIPVisionModel)}
    older = {PREFIX + name: array for name, array in bare.items()}
    positions = {"vision_model.embeddings.position_ids": np.arange(257)[None]}
    wanted = _module(jnp.float32)
    for state in (bare, older, older | positions, STATE | positions):
        _assert_equal(_module(jnp.float32, state), wanted)
        shapes = {name: array.shape for name, array in state.items()}
        assert clip_weights.config_from_shapes(shapes, "diffusers") == CONFIG


def test_config_to_diffusers_is_one_that_transformers_reads() -> None:
    values = clip_weights.config_to_diffusers(CONFIG)
    config = CLIPVisionConfig.from_dict(values)
    for name in set(values) - {"architectures"}:
        assert getattr(config, name) == getattr(TORCH_CONFIG, name) == values[name]
    assert clip_weights.config_from_diffusers(config.to_dict()) == CONFIG
