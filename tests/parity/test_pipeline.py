"""Text to video as a whole against diffusers' WanPipeline on the CPU, both from one folder on disk.

The folder is written by diffusers' own save_pretrained, so this also proves that load() takes what
diffusers writes, whole or in shards, and the original layout's DiT in its place.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

import wan_jax
from tests import tolerances
from tests.random_weights import random_state_dict, relative_l2
from wan_jax.tokenizer import write_byte_tokenizer
from wan_jax.weights import dit, rules, trees

VOCAB, TEXT = 384, 64
# Two lengths, one with letters of several bytes and an entity; none fills the 512 tokens.
PROMPTS = [
    "Two anthropomorphic cats in comfy boxing gear fight on a spotlighted stage.",
    "猫 &amp; dog",
]
NEGATIVE = "blurry, static, 低质量"
SHIFT = 5.0

# In this order; spelled out here, for the production table must not be its own witness. Source:
# diffusers scripts/convert_wan_to_diffusers.py, read backwards.
DIFFUSERS_TO_WAN = (
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"scale_shift_table", "modulation"),
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"\.norm2\.", ".norm3."),
    (r"attn1", "self_attn"),
    (r"attn2", "cross_attn"),
    (r"to_out\.0", "o"),
    (r"to_([qkv])\.", r"\1."),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is generated; size is (width, height)."""

    prompts: list[str]
    size: tuple[int, int]
    frames: int
    steps: int
    guidance: float

    @property
    def noise(self) -> np.ndarray:
        """[b, t, h, w, c] float32."""
        width, height = (n // 8 for n in self.size)
        shape = (len(self.prompts), 1 + (self.frames - 1) // 4, height, width, 16)
        return np.random.RandomState(3).standard_normal(shape).astype(np.float32)


VIDEO = Case(PROMPTS, (96, 64), 9, 8, 5.0)
IMAGE = Case(PROMPTS[1:], (48, 80), 1, 5, 1.0)


def _randomised(model: Any) -> Any:
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    arrays = random_state_dict(shapes)
    if "decoder.conv_out.weight" in arrays:
        # Fainter frames than these weights would give: what the clamp cuts cannot differ.
        arrays["decoder.conv_out.weight"] *= 0.3
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return model.eval().requires_grad_(False)


def _pipeline(tokenizer: Path) -> WanPipeline:
    write_byte_tokenizer(tokenizer, vocab_size=VOCAB)
    transformer = WanTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        ffn_dim=160,
        num_layers=3,
        text_dim=TEXT,
        freq_dim=64,
        rope_max_seq_len=64,
    )
    text = UMT5Config(vocab_size=VOCAB, d_model=TEXT, d_kv=16, d_ff=128, num_layers=3, num_heads=4)
    return WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(tokenizer),
        text_encoder=_randomised(UMT5EncoderModel(text)),
        vae=_randomised(AutoencoderKLWan(base_dim=16)),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        ),
        transformer=_randomised(transformer),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{"single", "sharded", "original": a checkpoint folder}, all of the same weights."""
    root = tmp_path_factory.mktemp("checkpoints")
    pipeline = _pipeline(root / "bytes")
    paths = {name: root / name for name in ("single", "sharded", "original")}
    pipeline.save_pretrained(paths["single"])
    pipeline.save_pretrained(paths["sharded"], max_shard_size="500KB")
    _write_original(paths["single"], paths["original"], pipeline.transformer)
    return paths


def _wan_name(name: str) -> str:
    for theirs, wan in DIFFUSERS_TO_WAN:
        name = re.sub(theirs, wan, name)
    return name


def _write_original(source: Path, path: Path, transformer: WanTransformer3DModel) -> None:
    """The folder with the DiT as Wan2.1 stores it: at the top, under its own names."""
    path.mkdir()
    for name in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(source / name, path / name)
    config = dit.config_from_diffusers(dict(transformer.config))
    tensors = {_wan_name(k): v.numpy() for k, v in transformer.state_dict().items()}
    save_file(tensors, path / "diffusion_pytorch_model.safetensors")
    values = {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "out_dim": config.out_channels,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "eps": config.eps,
        "text_len": 512,
    }
    (path / "config.json").write_text(json.dumps(values))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def ours(folders: dict[str, Path], cache: Path) -> wan_jax.Wan:
    return wan_jax.load(folders["sharded"], dtype="float32", cache_dir=cache)


@pytest.fixture(scope="module")
def theirs(folders: dict[str, Path]) -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(folders["sharded"], dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _generate_torch(pipeline: WanPipeline, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Latents [b, t, h, w, c] and frames [b, f, y, x, 3] in -1..1."""
    kept = {}

    def keep(_pipeline: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        kept["latents"] = values["latents"].permute(0, 2, 3, 4, 1).numpy().copy()
        return {}

    frames = pipeline(
        case.prompts,
        [NEGATIVE] * len(case.prompts),
        width=case.size[0],
        height=case.size[1],
        num_frames=case.frames,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance,
        latents=torch.from_numpy(np.ascontiguousarray(case.noise.transpose(0, 4, 1, 2, 3))),
        max_sequence_length=512,
        callback_on_step_end=keep,
    ).frames
    return kept["latents"], 2.0 * np.asarray(frames) - 1.0


def _latents(wan: wan_jax.Wan, case: Case, **changes: Any) -> np.ndarray:
    arguments: dict[str, Any] = {
        "negative_prompt": NEGATIVE,
        "size": case.size,
        "frames": case.frames,
        "steps": case.steps,
        "guidance": case.guidance,
        "shift": SHIFT,
        "solver": "unipc_diffusers",
        "noise": case.noise,
        "output": "latents",
    }
    return wan.generate(case.prompts, **(arguments | changes))


def _psnr(value: np.ndarray, truth: np.ndarray) -> float:
    error = np.mean(np.square(value.astype(np.float64) - truth))
    return float(10.0 * np.log10(2.0**2 / error))


@pytest.mark.parametrize("case", [VIDEO, IMAGE], ids=["video", "image"])
def test_generation_equals_diffusers(ours: wan_jax.Wan, theirs: WanPipeline, case: Case) -> None:
    their_latents, their_frames = _generate_torch(theirs, case)
    latents = _latents(ours, case)
    frames = np.concatenate(list(ours.decode(latents, dtype="float32")), axis=1)
    width, height = case.size
    assert frames.shape == their_frames.shape == (len(case.prompts), case.frames, height, width, 3)
    assert np.mean(np.abs(their_frames) == 1.0) < tolerances.PIPELINE_CLAMPED_SHARE
    assert relative_l2(latents, their_latents) <= tolerances.PIPELINE_LATENTS
    assert _psnr(frames, their_frames) >= tolerances.PIPELINE_PSNR


def test_the_comparison_sees_text_and_solver(ours: wan_jax.Wan) -> None:
    """Every part that the comparison is to prove moves the latents far more than its bound."""
    latents = _latents(ours, VIDEO)
    for changes in ({"negative_prompt": ""}, {"guidance": 5.5}, {"solver": "unipc"}):
        moved = relative_l2(_latents(ours, VIDEO, **changes), latents)
        assert moved >= tolerances.PIPELINE_MATTERS, changes
    swapped = dataclasses.replace(VIDEO, prompts=PROMPTS[::-1])
    moved = relative_l2(_latents(ours, swapped), latents)
    assert moved >= tolerances.PIPELINE_MATTERS


def test_every_layout_gives_the_same_bits(
    ours: wan_jax.Wan, folders: dict[str, Path], cache: Path
) -> None:
    for name in ("single", "original"):
        wan = wan_jax.load(folders[name], dtype="float32", cache_dir=cache, offload=True)
        assert wan.config == ours.config
        for part in wan.loaders:
            leaves, wanted = (trees.flatten(w.network(part)) for w in (wan, ours))
            assert leaves.keys() == wanted.keys()
            for path, leaf in leaves.items():
                np.testing.assert_array_equal(leaf, wanted[path], err_msg=f"{name} {path}")


def test_export_gives_the_original_file_back(ours: wan_jax.Wan, folders: dict[str, Path]) -> None:
    arrays = {path: np.asarray(leaf) for path, leaf in trees.flatten(ours.network("dit")).items()}
    exported = dict(rules.export(dit.TABLE, arrays, naming="wan"))
    original = load_file(folders["original"] / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == original.keys()
    for name, array in exported.items():
        np.testing.assert_array_equal(array, original[name], err_msg=name)
