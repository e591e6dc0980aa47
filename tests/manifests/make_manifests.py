"""Writes the manifests of the released checkpoints from the modules that made them.

    python -m tests.manifests.make_manifests --wan_repo /path/to/Wan2.1

Needs torch, diffusers and transformers; what reads the manifests needs none. The networks of the
original code and of diffusers are built at the released sizes on torch's meta device, which
allocates nothing, and their state_dict() is listed. wan_jax is not imported.
"""

import argparse
import importlib
import json
import math
import platform
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import torch
import transformers

from tests.golden.make_dit import load_original
from tests.manifests import DITS, Shape, expand

_LAYER = re.compile(r"(?<![^.])(?:blocks?|visual\.transformer|encoder\.layers)\.(\d+)(?=\.)")
_TIED = "encoder.embed_tokens.weight", "shared.weight"


class Size(NamedTuple):
    """What tells one released DiT from another, in the original's words."""

    model_type: str
    in_dim: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int


SIZES = {
    "t2v_1_3b": Size("t2v", 16, 1536, 8960, 12, 30),
    "t2v_14b": Size("t2v", 16, 5120, 13824, 40, 40),
    "i2v_14b": Size("i2v", 36, 5120, 13824, 40, 40),
    "flf2v_14b": Size("flf2v", 36, 5120, 13824, 40, 40),
}

# As text_encoder/config.json of the Diffusers repositories says.
UMT5 = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

# The vision tower of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which Diffusers' conversion takes.
CLIP = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1024,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}

# name: repositories of Wan-AI, files, stored dtype or None, and what the dtype is known from.
_ONE, _SHARDS = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*.safetensors"
_I2V, _FLF2V = ("Wan2.1-I2V-14B-480P", "Wan2.1-I2V-14B-720P"), ("Wan2.1-FLF2V-14B-720P",)
_FOUR = ("Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", *_I2V)
_UNKNOWN = "not determined"
STORED: dict[str, tuple[tuple[str, ...], str, str | None, str]] = {
    "t2v_1_3b.wan": (("Wan2.1-T2V-1.3B",), _ONE, "float32", "a file of 5,676,070,424 bytes"),
    "t2v_1_3b.diffusers": (
        ("Wan2.1-T2V-1.3B-Diffusers",),
        f"transformer/{_SHARDS}",
        "float32",
        "shards of 5,675,987,200 bytes by their index",
    ),
    "t2v_14b.wan": (
        ("Wan2.1-T2V-14B",),
        _SHARDS,
        "float32",
        "listings of 6 float32 shards",
    ),
    "t2v_14b.diffusers": (
        ("Wan2.1-T2V-14B-Diffusers",),
        f"transformer/{_SHARDS}",
        None,
        _UNKNOWN,
    ),
    "i2v_14b.wan": (
        _I2V,
        _SHARDS,
        "float32",
        "listings of 7 shards, about 70 GB; float32 is 65.6 GB",
    ),
    "i2v_14b.diffusers": (
        tuple(f"{name}-Diffusers" for name in _I2V),
        f"transformer/{_SHARDS}",
        None,
        _UNKNOWN,
    ),
    "flf2v_14b.wan": (_FLF2V, _SHARDS, None, _UNKNOWN),
    "flf2v_14b.diffusers": (
        tuple(f"{name}-diffusers" for name in _FLF2V),
        f"transformer/{_SHARDS}",
        None,
        _UNKNOWN,
    ),
    "vae.wan": ((*_FOUR, *_FLF2V), "Wan2.1_VAE.pth", "float32", "a file of 507,609,880 bytes"),
    "vae.diffusers": (
        (*(f"{name}-Diffusers" for name in _FOUR), f"{_FLF2V[0]}-diffusers"),
        f"vae/{_ONE}",
        "float32",
        "a file of 507,591,892 bytes in T2V-1.3B",
    ),
    "umt5.wan": (
        (*_FOUR, *_FLF2V),
        "models_t5_umt5-xxl-enc-bf16.pth",
        "bfloat16",
        "a file of 11,361,920,418 bytes",
    ),
    "umt5.diffusers": (
        (*(f"{name}-Diffusers" for name in _FOUR), f"{_FLF2V[0]}-diffusers"),
        "text_encoder/model-*.safetensors",
        "float32",
        "shards of 22,723,641,344 bytes by the index of T2V-1.3B",
    ),
    "clip.wan": (
        (*_I2V, *_FLF2V),
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        "float32",
        "listings of 4.77 GB, which 1,193,014,785 parameters are in float32",
    ),
    "clip.diffusers": (
        (*(f"{name}-Diffusers" for name in _I2V), f"{_FLF2V[0]}-diffusers"),
        "image_encoder/*.safetensors",
        None,
        _UNKNOWN,
    ),
}
NOTES = {
    "i2v_14b.wan": "480P and 720P are the same architecture",
    "i2v_14b.diffusers": "480P and 720P are the same architecture",
    "umt5.diffusers": (
        "transformers' state_dict() also has encoder.embed_tokens.weight, the same tensor. The "
        "released shards hold shared.weight only: with both they would be 4.2 GB larger, and "
        "transformers reports the other as missing from them (its issue 43992, its fix 43880)"
    ),
    "clip.wan": "the vision tower; the file also holds textual.* and log_scale",
    "clip.diffusers": (
        "files of CLIPVisionModel have no visual_projection.weight; from transformers 5 on it "
        "writes its names without vision_model."
    ),
}


def original_dit(repo: Path, size: Size) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The original's DiT, and its config.json, which the class itself chooses the fields of."""
    model = load_original(repo).WanModel(**size._asdict(), out_dim=16, text_len=512, freq_dim=256)
    return model, _public(model.config)


def diffusers_dit(size: Size) -> tuple[torch.nn.Module, dict[str, Any]]:
    image = {} if size.model_type == "t2v" else {"image_dim": 1280, "added_kv_proj_dim": size.dim}
    if size.model_type == "flf2v":
        image["pos_embed_seq_len"] = 514
    model = diffusers.WanTransformer3DModel(
        in_channels=size.in_dim,
        ffn_dim=size.ffn_dim,
        num_attention_heads=size.num_heads,
        attention_head_dim=size.dim // size.num_heads,
        num_layers=size.num_layers,
        **image,
    )
    return model, _public(model.config)


def original_part(repo: Path, name: str) -> ModuleType:
    """wan/modules/NAME.py of the original, without what only its forward passes need."""
    package = load_original(repo).__name__.rpartition(".")[0]
    einops = ModuleType("einops")
    einops.rearrange = None
    # t5.py asks for the current CUDA device when it is imported.
    with (
        mock.patch.dict(sys.modules, einops=einops),
        mock.patch("torch.cuda.current_device", return_value=0),
    ):
        return importlib.import_module(f"{package}.{name}")


def original_vae(repo: Path) -> tuple[torch.nn.Module, None]:
    """As wan/modules/vae.py builds it in _video_vae()."""
    sizes = {"dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    down = [False, True, True]
    module = original_part(repo, "vae")
    return module.WanVAE_(**sizes, attn_scales=[], temperal_downsample=down, dropout=0.0), None


def diffusers_vae() -> tuple[torch.nn.Module, dict[str, Any]]:
    model = diffusers.AutoencoderKLWan()
    return model, _public(model.config)


def original_umt5(repo: Path) -> tuple[torch.nn.Module, None]:
    module = original_part(repo, "t5")
    return module.umt5_xxl(encoder_only=True, return_tokenizer=False, device="meta"), None


def diffusers_umt5() -> tuple[torch.nn.Module, dict[str, Any]]:
    model = transformers.UMT5EncoderModel(transformers.UMT5Config(**UMT5))
    return model, {"model_type": "umt5", "architectures": ["UMT5EncoderModel"], **UMT5}


def original_clip(repo: Path) -> tuple[torch.nn.Module, None]:
    """The vision tower of what wan/modules/clip.py builds."""
    # What it takes from these only prepares its inputs.
    strangers = {name: ModuleType(name) for name in ("torchvision", "torchvision.transforms")}
    with mock.patch.dict(sys.modules, strangers):
        module = original_part(repo, "clip")
    model = module.clip_xlm_roberta_vit_h_14(device="meta")
    del model.textual, model.log_scale
    return model, None


def diffusers_clip() -> tuple[torch.nn.Module, dict[str, Any]]:
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**CLIP))
    kind = {"model_type": "clip_vision_model", "architectures": [type(model).__name__]}
    return model, kind | CLIP


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def list_tensors(model: torch.nn.Module) -> dict[str, Shape]:
    """{name: shape} of the tensors that a file of the model holds."""
    state = model.state_dict()
    if not all(tensor.is_meta for tensor in state.values()):
        raise SystemExit(f"{type(model).__name__} is not on the meta device")
    alias, name = _TIED
    if alias in state:
        if model.get_parameter(alias) is not model.get_parameter(name):
            raise SystemExit(f"{alias} and {name} are not one tensor")
        del state[alias]
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    counted = sum(parameter.numel() for parameter in model.parameters())
    if sum(map(math.prod, shapes.values())) != counted:
        raise SystemExit(f"state_dict() of {type(model).__name__} is not its parameters")
    return shapes


def collapse(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """One entry for the layers that have one shape and number from 0 to the last, else one each."""
    layers = defaultdict(list)
    for name in shapes:
        if found := _LAYER.search(name):
            layers[name[: found.start(1)], name[found.end(1) :]].append(int(found[1]))
    entries = dict(shapes)
    for (start, end), numbers in layers.items():
        names = [f"{start}{i}{end}" for i in range(len(numbers))]
        if set(numbers) == set(range(len(numbers))) and len({shapes[n] for n in names}) == 1:
            shape = {entries.pop(name) for name in names}.pop()
            entries[f"{start}{{0..{len(numbers) - 1}}}{end}"] = shape
    if {name: shape for entry, shape in entries.items() for name in expand(entry)} != shapes:
        raise SystemExit("the collapsed entries do not expand to what they were made from")
    return entries


def write(path: Path, facts: Mapping[str, Any], entries: Iterable[tuple[str, Any]]) -> None:
    """JSON with one fact and one entry a line."""

    def lines(values: Iterable[tuple[str, Any]], indent: str) -> str:
        return ",\n".join(f"{indent}{json.dumps(k)}: {json.dumps(v)}" for k, v in values)

    text = f'{{\n{lines(facts.items(), " ")},\n "entries": {{\n{lines(entries, "  ")}\n }}\n}}\n'
    path.write_text(text, encoding="utf-8")


def builders(repo: Path) -> dict[str, Callable[[], tuple[torch.nn.Module, Any]]]:
    """What makes the network of each manifest."""
    made: dict[str, Callable[[], tuple[torch.nn.Module, Any]]] = {
        "vae.wan": lambda: original_vae(repo),
        "vae.diffusers": diffusers_vae,
        "umt5.wan": lambda: original_umt5(repo),
        "umt5.diffusers": diffusers_umt5,
        "clip.wan": lambda: original_clip(repo),
        "clip.diffusers": diffusers_clip,
    }
    for name in DITS:
        made[f"{name}.wan"] = lambda size=SIZES[name]: original_dit(repo, size)
        made[f"{name}.diffusers"] = lambda size=SIZES[name]: diffusers_dit(size)
    return made


def manifest(
    name: str, model: torch.nn.Module, config: dict[str, Any] | None
) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Head and entries of one manifest."""
    shapes = list_tensors(model)
    repositories, files, dtype, basis = STORED[name]
    facts = {
        "repositories": [f"Wan-AI/{repository}" for repository in repositories],
        "layout": "original" if name.endswith(".wan") else "diffusers",
        "files": files,
        "dtype_from": basis,
        "tensors": len(shapes),
        "parameters": sum(map(math.prod, shapes.values())),
        "class": type(model).__name__,
        "config": config,
    }
    if name in NOTES:
        facts["note"] = NOTES[name]
    return facts, [(entry, [dtype, shape]) for entry, shape in sorted(collapse(shapes).items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wan_repo", type=Path, required=True, help="checkout of Wan2.1")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "-C", str(options.wan_repo), "rev-parse", "HEAD"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    made_by = {"script": "tests/manifests/make_manifests.py", "python": platform.python_version()}
    for package in (torch, diffusers, transformers):
        made_by[package.__name__] = package.__version__
    for name, build in builders(options.wan_repo).items():
        with torch.device("meta"):
            model, config = build()
        facts, entries = manifest(name, model, config)
        facts["made_by"] = made_by | ({"wan_commit": commit} if name.endswith(".wan") else {})
        path = options.out / f"{name}.json"
        write(path, facts, entries)
        sys.stdout.write(
            f"{path}: {path.stat().st_size} bytes, {facts['tensors']} tensors, "
            f"{facts['parameters']} parameters\n"
        )


if __name__ == "__main__":
    main()
