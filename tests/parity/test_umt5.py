"""UMT5 and its tokenizer against transformers on the CPU, through the production rules."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoTokenizer
from transformers import UMT5Config as TorchConfig
from transformers.models.umt5.modeling_umt5 import UMT5Attention, UMT5EncoderModel, UMT5LayerNorm

from tests import tolerances
from tests.parity.convert import load_torch
from tests.random_weights import random_state_dict, relative_l2
from wan_jax import umt5 as umt5_module
from wan_jax.tokenizer import clean_prompt, load_tokenizer, tokenize, write_byte_tokenizer
from wan_jax.umt5 import UMT5, position_buckets
from wan_jax.weights import trees
from wan_jax.weights import umt5 as umt5_weights

TORCH_CONFIG = TorchConfig(vocab_size=199, d_model=80, d_kv=24, d_ff=160, num_layers=8, num_heads=4)
CONFIG = umt5_weights.config_from_diffusers(TORCH_CONFIG.to_dict())
# Longer than max_distance, so the widest buckets are used; lengths differ; one row has no padding.
TOTAL, LENGTHS = 190, (61, 190)


def _norm64(module: UMT5LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """transformers takes the mean in float32 whatever the dtype; the truth needs float64."""
    mean = x.pow(2).mean(-1, keepdim=True)
    return module.weight * (x * torch.rsqrt(mean + module.variance_epsilon))


def _torch_model(dtype: torch.dtype) -> UMT5EncoderModel:
    model = UMT5EncoderModel._from_config(TORCH_CONFIG, attn_implementation="eager").eval()
    state = {name: torch.from_numpy(array) for name, array in STATE.items()}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert set(missing) <= {"encoder.embed_tokens.weight"}
    if dtype == torch.float64:
        for module in model.modules():
            if isinstance(module, UMT5LayerNorm):
                module.forward = partial(_norm64, module)
    return model.to(dtype)


def _state_dict() -> dict[str, np.ndarray]:
    with torch.device("meta"):
        shapes = {
            name: tuple(p.shape) for name, p in UMT5EncoderModel(TORCH_CONFIG).named_parameters()
        }
    state = random_state_dict(shapes)
    # T5 draws queries so that its unscaled logits are about 1. At 5 eight layers amplify rounding
    # tenfold, and smaller mistakes would hide behind it.
    for name in state:
        if name.endswith("SelfAttention.q.weight"):
            state[name] = state[name] / np.float32(TORCH_CONFIG.d_kv**0.5)
    return state


encode = jax.jit(umt5_module.encode)
STATE = _state_dict()
_IDS = np.random.RandomState(0).randint(2, CONFIG.vocab_size, (2, TOTAL))
MASK = (np.arange(TOTAL) < np.array(LENGTHS)[:, None]).astype(np.int32)
IDS = (_IDS * MASK).astype(np.int32)


def _torch_context(dtype: torch.dtype, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        output = _torch_model(dtype)(
            input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask)
        )
    return output.last_hidden_state.double().numpy()


def _module(
    dtype: jnp.dtype, state: Mapping[str, np.ndarray] = STATE, naming: str = "diffusers"
) -> UMT5:
    abstract = trees.abstract(lambda: UMT5(CONFIG, rngs=nnx.Rngs(0), dtype=dtype))
    return load_torch(umt5_weights.table(CONFIG), abstract, state, naming)


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return _torch_context(torch.float64, IDS, MASK)


def test_float32_is_as_close_to_float64_as_torch(truth: np.ndarray) -> None:
    ours = np.asarray(encode(_module(jnp.float32), IDS, MASK))
    theirs = _torch_context(torch.float32, IDS, MASK)
    for row, length in enumerate(LENGTHS):
        real = (row, slice(length))
        bound = tolerances.UMT5_TORCH_MULTIPLE * relative_l2(theirs[real], truth[real])
        assert relative_l2(ours[real], truth[real]) <= bound
    assert not ours[MASK == 0].any()


def test_float32_without_padding(truth: np.ndarray) -> None:
    """The first row cut to its length: no key is masked."""
    ids, mask = IDS[:1, : LENGTHS[0]], MASK[:1, : LENGTHS[0]]
    ours = np.asarray(encode(_module(jnp.float32), ids, mask))
    theirs = _torch_context(torch.float32, ids, mask)
    exact = _torch_context(torch.float64, ids, mask)
    assert relative_l2(exact[0], truth[0, : LENGTHS[0]]) < tolerances.UMT5_FLOAT64
    bound = tolerances.UMT5_TORCH_MULTIPLE * relative_l2(theirs, exact)
    assert relative_l2(ours, exact) <= bound


def test_bfloat16_is_as_close_to_float64_as_torch(truth: np.ndarray) -> None:
    ours = np.asarray(encode(_module(jnp.bfloat16), IDS, MASK), np.float64)
    theirs = _torch_context(torch.bfloat16, IDS, MASK)
    real = MASK == 1
    bound = tolerances.UMT5_TORCH_MULTIPLE_BFLOAT16 * relative_l2(theirs[real], truth[real])
    assert relative_l2(ours[real], truth[real]) <= bound


_ATTENTION = r"encoder\.block\.(\d+)\.layer\.0\."
_FFN = r"encoder\.block\.(\d+)\.layer\.1\."
_WAN_NAMES = {  # Diffusers name to the name in Wan2.1
    r"shared\.weight": "token_embedding.weight",
    _ATTENTION + r"layer_norm\.weight": r"blocks.\1.norm1.weight",
    _ATTENTION + r"SelfAttention\.([qkvo])\.weight": r"blocks.\1.attn.\2.weight",
    _ATTENTION + r"SelfAttention\.relative_attention_bias\.weight": (
        r"blocks.\1.pos_embedding.embedding.weight"
    ),
    _FFN + r"layer_norm\.weight": r"blocks.\1.norm2.weight",
    _FFN + r"DenseReluDense\.wi_0\.weight": r"blocks.\1.ffn.gate.0.weight",
    _FFN + r"DenseReluDense\.wi_1\.weight": r"blocks.\1.ffn.fc1.weight",
    _FFN + r"DenseReluDense\.wo\.weight": r"blocks.\1.ffn.fc2.weight",
    r"encoder\.final_layer_norm\.weight": "norm.weight",
}


def test_the_original_names_give_the_same_module() -> None:
    renamed = {}
    for name, array in STATE.items():
        (new,) = (
            re.sub(old, new, name) for old, new in _WAN_NAMES.items() if re.fullmatch(old, name)
        )
        renamed[new] = array
    assert len(renamed) == len(STATE)
    wan = trees.flatten(_module(jnp.float32, renamed, "wan"))
    diffusers = trees.flatten(_module(jnp.float32))
    for path, leaf in diffusers.items():
        np.testing.assert_array_equal(wan[path], leaf)
    shapes = {name: array.shape for name, array in renamed.items()}
    assert umt5_weights.config_from_shapes(shapes, "wan") == CONFIG


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 64), (16, 128)])
def test_buckets(num_buckets: int, max_distance: int) -> None:
    config = TorchConfig(
        relative_attention_num_buckets=num_buckets, relative_attention_max_distance=max_distance
    )
    attention = UMT5Attention(config, has_relative_attention_bias=True)
    position = torch.arange(600)
    theirs = attention._relative_position_bucket(position[None] - position[:, None])
    ours = position_buckets(600, num_buckets=num_buckets, max_distance=max_distance)
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_token_ids_of_transformers(tmp_path: Path) -> None:
    """The folder of our byte tokenizer also loads in transformers, and gives the same ids."""
    write_byte_tokenizer(tmp_path)
    prompts = ["Two cats box.", "两只猫", "", "x" * 50, " a\n&amp;amp; b"]
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)(
        [clean_prompt(prompt) for prompt in prompts],
        padding="max_length",
        truncation=True,
        max_length=24,
        return_tensors="np",
    )
    ids, mask = tokenize(load_tokenizer(tmp_path), prompts, length=24)
    np.testing.assert_array_equal(ids, theirs.input_ids)
    np.testing.assert_array_equal(mask, theirs.attention_mask)
