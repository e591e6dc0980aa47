"""Converted checkpoints written back: to the bit what they were, and what Diffusers loads."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy then knows bfloat16 by its name)
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from tests.parity.test_pipeline import DIFFUSERS_TO_WAN
from tests.random_weights import random_state_dict
from wan_jax.config import Defaults
from wan_jax.tokenizer import write_byte_tokenizer
from wan_jax.weights import checkpoint, export, miniature, sources, trees
from wan_jax.weights.sources import abstract_part, part_table

VOCAB, TEXT = 384, 32
DEFAULTS = Defaults(size=(48, 32), frames=5, steps=2, shift=4.5, solver="unipc")
# bfloat16 in a file that is float32 otherwise; of some stacks one layer, of none all.
COARSE = {"patch_embedding.weight", "blocks.0.ffn.0.weight", "blocks.1.cross_attn.q.bias"}
FOLDERS = {"dit": "transformer", "vae": "vae", "umt5": "text_encoder"}
PARTS = tuple(FOLDERS)
CLASSES = {"dit": WanTransformer3DModel, "vae": AutoencoderKLWan, "umt5": UMT5EncoderModel}
State = dict[str, torch.Tensor]
Export = Callable[..., Path]


def _modules() -> dict[str, Any]:
    return {
        "dit": WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            ffn_dim=80,
            num_layers=2,
            text_dim=TEXT,
            freq_dim=32,
        ),
        "vae": AutoencoderKLWan(base_dim=8),
        "umt5": UMT5EncoderModel(
            UMT5Config(vocab_size=VOCAB, d_model=TEXT, d_kv=16, d_ff=48, num_layers=2, num_heads=3)
        ),
    }


def _dtype(part: str, wan_name: str) -> torch.dtype:
    """As in Wan2.1's repositories, and a few tensors that are not."""
    coarse = part == "umt5" or wan_name in COARSE
    return torch.bfloat16 if coarse else torch.float32


def _wan_names(part: str, config: Any) -> dict[str, str]:
    """{Diffusers name: original name}."""
    targets = trees.flatten(abstract_part(config, np.dtype(np.float32)))
    pairs = {}
    for rule in part_table(config).rules:
        for i in range(targets[rule.target].shape[0] if rule.stacked else 1):
            name, wan = (text.replace("{i}", str(i)) for text in (rule.diffusers, rule.wan))
            pairs[name] = wan
    if part == "dit":  # spelled out elsewhere, for the table must not be its own witness
        for name, wan in pairs.items():
            for theirs, ours in DIFFUSERS_TO_WAN:
                name = re.sub(theirs, ours, name)
            assert name == wan
    return pairs


@pytest.fixture(scope="module")
def modules() -> dict[str, Any]:
    """torch's networks with random weights that their dtypes on disk hold exactly."""
    found = _modules()
    for part, module in found.items():
        config = {
            "dit": lambda m: sources.dit.config_from_diffusers(dict(m.config)),
            "vae": lambda m: sources.vae.config_from_diffusers(dict(m.config)),
            "umt5": lambda m: sources.umt5.config_from_diffusers(m.config.to_dict()),
        }[part](module)
        module.names = _wan_names(part, config)
        shapes = {name: tuple(module.state_dict()[name].shape) for name in module.names}
        state = {
            name: torch.from_numpy(array).to(_dtype(part, module.names[name])).float()
            for name, array in random_state_dict(shapes).items()
        }
        module.load_state_dict(state, strict=part != "umt5")  # its embedding has two names
        module.eval().requires_grad_(False)
    return found


def _state(modules: Mapping[str, Any], part: str, naming: str) -> State:
    """{name: tensor} as on disk."""
    module = modules[part]
    state = module.state_dict()
    return {
        (wan if naming == "wan" else name): state[name].to(_dtype(part, wan)).clone()
        for name, wan in module.names.items()
    }


@pytest.fixture(scope="module")
def original(modules: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Wan2.1's own."""
    path = tmp_path_factory.mktemp("original") / "checkpoint"
    path.mkdir()
    dit = _state(modules, "dit", "wan")
    save_file(dit, path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    torch.save(_state(modules, "vae", "wan"), path / "Wan2.1_VAE.pth")
    torch.save(_state(modules, "umt5", "wan"), path / "models_t5_umt5-xxl-enc-bf16.pth")
    write_byte_tokenizer(path / "google" / "umt5-xxl", vocab_size=VOCAB)
    (path / "wan_jax.json").write_text(json.dumps(DEFAULTS.to_dict()))
    config = {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "text_len": 512,
        "in_dim": 16,
        "dim": 48,
        "ffn_dim": 80,
        "freq_dim": 32,
        "out_dim": 16,
        "num_heads": 2,
        "num_layers": 2,
        "eps": 1e-6,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def converted(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{dtype: checkpoint}."""
    root = tmp_path_factory.mktemp("converted")
    for dtype in ("float32", "bfloat16"):
        checkpoint.write(sources.open_folder(original), root / dtype, dtype=dtype)
    return {dtype: root / dtype for dtype in ("float32", "bfloat16")}


@pytest.fixture(scope="module")
def exported(converted: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Writes the float32 checkpoint, each way once."""
    root = tmp_path_factory.mktemp("exported")

    def write(layout: str, **settings: Any) -> Path:
        path = root / "-".join([layout, *(f"{k}={v}" for k, v in settings.items())])
        if not path.exists():
            export.write(converted["float32"], path, layout=layout, **settings)
        return path

    return write


def _read(path: Path, part: str, layout: str) -> State:
    if layout == "diffusers":
        files = sorted((path / FOLDERS[part]).glob("*.safetensors"))
    else:
        stem = {"dit": "diffusion_pytorch_model", "vae": "Wan2.1_VAE", "umt5": "models_t5"}[part]
        files = sorted(path.glob(f"{stem}*.safetensors"))
    state: State = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        tensors = load_file(file)
        assert not state.keys() & tensors.keys()
        state |= tensors
    return state


def _assert_same(state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("layout", export.LAYOUTS)
@pytest.mark.parametrize("part", PARTS)
def test_every_tensor_comes_back_to_the_bit(
    modules: dict[str, Any], exported: Export, part: str, layout: str
) -> None:
    naming = {"original": "wan", "diffusers": "diffusers"}[layout]
    _assert_same(_read(exported(layout), part, layout), _state(modules, part, naming))


def test_the_other_files_of_the_original_come_back(original: Path, exported: Export) -> None:
    path = exported("original")
    for file in ("config.json", "wan_jax.json"):
        assert json.loads((path / file).read_text()) == json.loads((original / file).read_text())
    for file in (original / "google" / "umt5-xxl").iterdir():
        assert (path / "google" / "umt5-xxl" / file.name).read_bytes() == file.read_bytes()
    assert {file.name for file in path.iterdir()} == {
        "Wan2.1_VAE.safetensors",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "google",
        "models_t5_umt5-xxl-enc-bf16.safetensors",
        "wan_jax.json",
    }


@torch.no_grad()
def _output(part: str, module: Any) -> torch.Tensor:
    """Of a fixed random input."""
    stream = np.random.RandomState(7)
    if part == "umt5":
        ids = torch.from_numpy(stream.randint(0, VOCAB, (2, 9)))
        return module(ids).last_hidden_state
    if part == "vae":
        video = torch.from_numpy(stream.uniform(-1, 1, (1, 3, 5, 16, 24)).astype(np.float32))
        return module.decode(module.encode(video).latent_dist.mode()).sample
    latents = torch.from_numpy(stream.standard_normal((1, 16, 2, 4, 6)).astype(np.float32))
    text = torch.from_numpy(stream.standard_normal((1, 5, TEXT)).astype(np.float32))
    return module(latents, torch.tensor([500.0]), text).sample


def _load(part: str, path: Path) -> Any:
    """By the library's from_pretrained; nothing may be missing, left over or mismatched."""
    module, told = CLASSES[part].from_pretrained(
        path / FOLDERS[part], dtype=torch.float32, output_loading_info=True
    )
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= told.keys()
    assert not any(told.values()), told
    return _copied(module.eval())


def _copied(module: Any) -> Any:
    """The module with its weights in memory of their own.

    Those of a mapped file lie on other boundaries, for which torch takes kernels that round
    otherwise; these tests compare bits.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module


@pytest.mark.parametrize("settings", [{}, {"max_shard": 60_000}], ids=["whole", "shards"])
@pytest.mark.parametrize("part", PARTS)
def test_diffusers_loads_it_and_computes_the_same(
    modules: dict[str, Any], exported: Export, part: str, settings: dict[str, int]
) -> None:
    path = exported("diffusers", **settings)
    if settings:
        assert len(list((path / FOLDERS[part]).glob("*-00001-of-000*.safetensors"))) == 1
        assert len(list((path / FOLDERS[part]).glob("*.safetensors.index.json"))) == 1
    module = _load(part, path)
    assert torch.equal(_output(part, module), _output(part, modules[part]))


def test_shards_keep_their_size_and_their_index(exported: Export, modules: dict[str, Any]) -> None:
    limit = 60_000
    path = exported("diffusers", max_shard=limit) / "transformer"
    index = json.loads((path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(path.glob("*.safetensors"))
    assert len(files) > 3
    count = f"{len(files):05d}"
    for i, file in enumerate(files):
        assert file.name == f"diffusion_pytorch_model-{i + 1:05d}-of-{count}.safetensors"
        tensors = load_file(file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert 0 < size <= limit or len(tensors) == 1
        assert all(index["weight_map"][name] == file.name for name in tensors)
    state = _state(modules, "dit", "diffusers")
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())


@torch.no_grad()
def _generate(pipeline: WanPipeline) -> np.ndarray:
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        _copied(module)
    pipeline.set_progress_bar_config(disable=True)
    latents = np.random.RandomState(3).standard_normal((1, 16, 1, 4, 6)).astype(np.float32)
    return np.asarray(
        pipeline(
            "A cat.",
            "blurry",
            width=48,
            height=32,
            num_frames=1,
            num_inference_steps=3,
            latents=torch.from_numpy(latents),
        ).frames[0]
    )


def test_the_pipeline_loads_and_generates_the_same(
    modules: dict[str, Any], exported: Export, original: Path
) -> None:
    pipeline = WanPipeline.from_pretrained(exported("diffusers"), dtype=torch.float32)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=DEFAULTS.shift
    )
    built = pipeline.scheduler.config
    assert {k: built[k] for k in scheduler.config if k[0] != "_"} == {
        k: v for k, v in scheduler.config.items() if k[0] != "_"
    }
    wanted = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(original / "google" / "umt5-xxl"),
        text_encoder=modules["umt5"],
        vae=modules["vae"],
        scheduler=scheduler,
        transformer=modules["dit"],
    )
    np.testing.assert_array_equal(_generate(pipeline), _generate(wanted))


def test_the_pipeline_loads_the_miniature(tmp_path: Path) -> None:
    miniature.write(tmp_path / "source")
    checkpoint.write(
        sources.open_folder(tmp_path / "source"), tmp_path / "converted", dtype="bfloat16"
    )
    export.write(tmp_path / "converted", tmp_path / "dst", layout="diffusers")
    pipeline = WanPipeline.from_pretrained(tmp_path / "dst", dtype=torch.float32)
    assert pipeline.tokenizer("Wan").input_ids == [3 + byte for byte in b"Wan"] + [1]
    assert pipeline.transformer.config.num_layers == len(pipeline.transformer.blocks) == 3


def _assert_same_checkpoint(path: Path, wanted: Path) -> None:
    config = checkpoint.read_config(wanted)
    assert checkpoint.read_config(path) == config
    for part in PARTS:
        ours, theirs = (
            trees.flatten(checkpoint.restore(p, part, config, dtype="float32", sharding=None))
            for p in (path, wanted)
        )
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            assert array.dtype == theirs[name].dtype
            np.testing.assert_array_equal(array, theirs[name], err_msg=f"{part} {name}")


@pytest.mark.parametrize("settings", [{}, {"max_shard": 60_000}], ids=["whole", "shards"])
@pytest.mark.parametrize("layout", export.LAYOUTS)
def test_an_export_converts_to_the_same_checkpoint(
    converted: dict[str, Path],
    exported: Export,
    tmp_path: Path,
    layout: str,
    settings: dict[str, int],
) -> None:
    folder = sources.open_folder(exported(layout, **settings))
    checkpoint.write(folder, tmp_path / "again", dtype="float32")
    _assert_same_checkpoint(tmp_path / "again", converted["float32"])
    entries = [
        checkpoint.read_manifest(path)["parts"]
        for path in (tmp_path / "again", converted["float32"])
    ]
    for part in PARTS:
        assert len({entry[part]["dtype"] for entry in entries}) == 1
        assert len({len(entry[part]["dtypes"]) for entry in entries}) == 1


@pytest.mark.parametrize("dtype", ["source", "float32"])
@pytest.mark.parametrize("part", PARTS)
def test_a_coarser_checkpoint_keeps_what_it_stores(
    converted: dict[str, Path], modules: dict[str, Any], tmp_path: Path, part: str, dtype: str
) -> None:
    """Stored bfloat16 is written in the source's float32, and is still the stored number."""
    path = tmp_path / "dst"
    export.write(converted["bfloat16"], path, layout="original", parts=[part], dtype=dtype)
    source = _state(modules, part, "wan")
    state = _read(path, part, "original")
    assert state.keys() == source.keys()
    rounded = 0
    for name, tensor in state.items():
        assert tensor.dtype == (source[name].dtype if dtype == "source" else torch.float32), name
        stored = source[name].to(torch.bfloat16).float()
        if not torch.equal(stored, source[name].float()) and torch.equal(tensor.float(), stored):
            rounded += 1
        else:
            assert torch.equal(tensor.float(), source[name].float()), name
    assert (rounded > 20) == (part == "dit")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_that_is_asked_for_is_that_of_every_tensor(
    modules: dict[str, Any], exported: Export, dtype: str
) -> None:
    path = exported("diffusers", dtype=dtype)
    for part in PARTS:
        state = _state(modules, part, "diffusers")
        wanted = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
        _assert_same(_read(path, part, "diffusers"), wanted)
