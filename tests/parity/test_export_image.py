"""Checkpoints that take images, written back: what Diffusers and transformers make of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.random_weights import random_state_dict
from wan_jax.config import NANO_FLF2V, NANO_I2V, PARTS, WanConfig
from wan_jax.tokenizer import write_byte_tokenizer
from wan_jax.weights import checkpoint, dit, export, layouts, miniature, rules, sources, trees
from wan_jax.weights.sources import TABLES, abstract_part, part_table

TEXT, WIDTH, TOKENS = 32, 160, 5
FLOW_SHIFTS = {None: 5.0, 2 * TOKENS: 16.0}  # the defaults, by the table of positions
State = dict[str, torch.Tensor]


def _modules(images: int) -> dict[str, Any]:
    """torch's networks with random weights, heads of the released sizes where shapes must do."""
    found = {
        "dit": WanTransformer3DModel(
            num_attention_heads=1,
            attention_head_dim=128,
            in_channels=36,
            ffn_dim=80,
            num_layers=2,
            text_dim=TEXT,
            freq_dim=32,
            image_dim=WIDTH,
            added_kv_proj_dim=128,
            pos_embed_seq_len=2 * TOKENS if images == 2 else None,
        ),
        "vae": AutoencoderKLWan(base_dim=8),
        "umt5": UMT5EncoderModel(
            UMT5Config(vocab_size=384, d_model=TEXT, d_kv=16, d_ff=48, num_layers=2, num_heads=3)
        ),
        "clip": CLIPVisionModel._from_config(
            CLIPVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
                hidden_act="gelu",
            )
        ),
    }
    for module in found.values():
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        state = {n: torch.from_numpy(a) for n, a in random_state_dict(shapes).items()}
        module.load_state_dict(state, strict=False)  # UMT5's embedding has two names
        module.eval().requires_grad_(False)
    return found


def _config(part: str, module: Any) -> Any:
    values = module.config.to_dict() if part in ("umt5", "clip") else dict(module.config)
    return TABLES[part].config_from_diffusers(values)


def _wan_state(part: str, module: Any) -> State:
    """The used tensors of a network in the original's names."""
    config = _config(part, module)
    targets = trees.flatten(abstract_part(config, np.dtype(np.float32)))
    table, tensors = part_table(config), {n: t.numpy() for n, t in module.state_dict().items()}
    plan = rules.resolve(table, targets, naming="diffusers", names=list(tensors))
    arrays = {}
    for item in plan:
        parts = [
            item.layout.apply(np.concatenate([tensors[name] for name in group]))
            for group in item.groups
        ]
        arrays[item.target] = np.stack(parts) if item.stacked else parts[0]
    exported = rules.export(table, arrays, naming="wan")
    return {name: torch.from_numpy(array.copy()) for name, array in exported}


def _clip_pth(module: CLIPVisionModel, path: Path) -> None:
    """As the released one: with its last block and what is behind, and with a text tower."""
    state = _wan_state("clip", module)
    block = [name for name in state if name.startswith("visual.transformer.1.")]
    last = {name.replace(".1.", ".2.", 1): torch.randn_like(state[name]) for name in block}
    ones = torch.ones(WIDTH)
    state |= last | {"visual.post_norm.weight": ones, "visual.post_norm.bias": ones}
    state |= {"visual.head": torch.randn(WIDTH, 8), "log_scale": torch.tensor(4.6)}
    for name in ("token_embedding", "blocks.0.attn.q", "norm", "head.2"):
        state[f"textual.{name}.weight"] = torch.randn(8, 8)
    torch.save(state, path)


@pytest.fixture(scope="module", params=[1, 2], ids=["i2v", "flf2v"])
def modules(request: pytest.FixtureRequest) -> dict[str, Any]:
    return _modules(request.param)


@pytest.fixture(scope="module")
def diffusers(modules: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Diffusers and transformers save it themselves."""
    path = tmp_path_factory.mktemp("diffusers") / "checkpoint"
    for part, module in modules.items():
        module.save_pretrained((path / layouts.DIFFUSERS[part]).parent)
    write_byte_tokenizer(path / "tokenizer", vocab_size=384)
    return path


@pytest.fixture(scope="module")
def original(modules: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Wan2.1's own, with the whole .pth of CLIP."""
    path = tmp_path_factory.mktemp("original") / "checkpoint"
    path.mkdir()
    save_file(_wan_state("dit", modules["dit"]), path / "diffusion_pytorch_model.safetensors")
    torch.save(_wan_state("vae", modules["vae"]), path / layouts.VAE_PTH)
    torch.save(_wan_state("umt5", modules["umt5"]), path / layouts.UMT5_PTH)
    _clip_pth(modules["clip"], path / layouts.CLIP_PTH)
    write_byte_tokenizer(path / "google" / "umt5-xxl", vocab_size=384)
    values = dit.config_to_wan(_config("dit", modules["dit"]))
    (path / "config.json").write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def converted(diffusers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "checkpoint"
    checkpoint.write(sources.open_folder(diffusers), path, dtype="float32")
    return path


@pytest.fixture(scope="module")
def exported(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "checkpoint"
    export.write(converted, path, layout="diffusers")
    return path


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a converted checkpoint."""
    config = checkpoint.read_config(path)
    return {
        f"{part} {name}": np.asarray(leaf)
        for part in PARTS
        for name, leaf in trees.flatten(
            checkpoint.restore(path, part, config, dtype="float32", sharding=None)
        ).items()
    }


def test_both_layouts_give_one_checkpoint(converted: Path, original: Path, tmp_path: Path) -> None:
    """The .pth has CLIP's last block, what is behind it, and a text tower: nobody reads them."""
    folder = sources.open_folder(original)
    checkpoint.write(folder, tmp_path / "again", dtype="float32")
    configs = [checkpoint.read_config(path) for path in (converted, tmp_path / "again")]
    assert configs[0] == configs[1]
    assert configs[0].images == 1 + ("img_emb.emb_pos" in folder.sources["dit"].reader.shapes())
    found, wanted = _arrays(tmp_path / "again"), _arrays(converted)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def _kept(name: str) -> bool:
    """Whether a checkpoint keeps this tensor of transformers' tower."""
    return not name.startswith(("encoder.layers.2.", "post_layernorm."))


def test_every_tensor_comes_back_to_the_bit(diffusers: Path, exported: Path) -> None:
    for part, place in layouts.DIFFUSERS.items():
        found, wanted = (load_file(p / f"{place}.safetensors") for p in (exported, diffusers))
        if part == "clip":  # whose names transformers shortens from release 5 on
            found = {name.removeprefix("vision_model."): found[name] for name in found}
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor) or not (part != "clip" or _kept(name)), name


def test_the_dit_comes_back_in_the_names_of_the_original(
    converted: Path, original: Path, tmp_path: Path
) -> None:
    export.write(converted, tmp_path / "dst", layout="original", parts=["dit"])
    name = "diffusion_pytorch_model.safetensors"
    found, wanted = (load_file(path / name) for path in (tmp_path / "dst", original))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    described = [json.loads((p / "config.json").read_text()) for p in (tmp_path / "dst", original)]
    assert described[0] == described[1]


def _copied(module: Any) -> Any:
    """The module with its weights in memory of their own; see test_export.py."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module


@torch.no_grad()
def test_transformers_loads_the_tower(modules: dict[str, Any], exported: Path) -> None:
    """Nothing is missing; the state that Wan2.1 takes is the same, and the last block adds none."""
    module, told = CLIPVisionModel.from_pretrained(
        exported / "image_encoder", dtype=torch.float32, output_loading_info=True
    )
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= told.keys()
    assert not any(told.values()), told
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    found, wanted = (
        m(pixels, output_hidden_states=True) for m in (_copied(module.eval()), modules["clip"])
    )
    assert len(found.hidden_states) == len(wanted.hidden_states) == 4
    for ours, theirs in zip(found.hidden_states[:-1], wanted.hidden_states[:-1], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(found.hidden_states[-1], found.hidden_states[-2])
    assert not torch.equal(wanted.hidden_states[-1], wanted.hidden_states[-2])


@torch.no_grad()
def _generate(pipeline: WanImageToVideoPipeline) -> np.ndarray:
    for name in ("transformer", "vae", "text_encoder", "image_encoder"):
        _copied(getattr(pipeline, name))
    pipeline.set_progress_bar_config(disable=True)
    stream = np.random.RandomState(3)
    latents = stream.standard_normal((1, 16, 2, 4, 6)).astype(np.float32)
    images = [Image.fromarray(stream.randint(0, 256, (40, 60, 3), np.uint8)) for _ in range(2)]
    both = pipeline.transformer.config.pos_embed_seq_len is not None
    return np.asarray(
        pipeline(
            images[0],
            "A cat.",
            "blurry",
            width=48,
            height=32,
            num_frames=5,
            num_inference_steps=2,
            latents=torch.from_numpy(latents),
            last_image=images[1] if both else None,
        ).frames[0]
    )


def test_the_pipeline_loads_and_generates_the_same(modules: dict[str, Any], exported: Path) -> None:
    pipeline = WanImageToVideoPipeline.from_pretrained(exported, dtype=torch.float32)
    processor = pipeline.image_processor
    assert dict(processor.crop_size) == {"height": 28, "width": 28}
    usual = CLIPImageProcessor()  # of which the size alone is another
    for name in ("image_mean", "image_std", "resample", "rescale_factor", "do_convert_rgb"):
        assert getattr(processor, name) == getattr(usual, name), name
    shift = FLOW_SHIFTS[modules["dit"].config.pos_embed_seq_len]
    wanted = WanImageToVideoPipeline(
        tokenizer=AutoTokenizer.from_pretrained(exported / "tokenizer"),
        text_encoder=modules["umt5"],
        vae=modules["vae"],
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        ),
        transformer=modules["dit"],
        image_encoder=modules["clip"],
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
    )
    np.testing.assert_array_equal(_generate(pipeline), _generate(wanted))


@pytest.mark.parametrize("config", [NANO_I2V, NANO_FLF2V], ids=["i2v", "flf2v"])
def test_the_pipeline_loads_the_miniature(config: WanConfig, tmp_path: Path) -> None:
    miniature.write(tmp_path / "source", config=config)
    folder = sources.open_folder(tmp_path / "source")
    checkpoint.write(folder, tmp_path / "converted", dtype="bfloat16")
    export.write(tmp_path / "converted", tmp_path / "dst", layout="diffusers")
    pipeline = WanImageToVideoPipeline.from_pretrained(tmp_path / "dst", dtype=torch.float32)
    assert pipeline.image_encoder.config.num_hidden_layers == 4
    assert _generate(pipeline).shape == (5, 32, 48, 3)
