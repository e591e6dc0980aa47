"""What a file of tensors holds: which networks, in which naming, under which prefix.

People repack checkpoints: one network to a file or all in one, under the prefixes of the program it
is for, with or without the files that describe it. So what a file is for is read from its names.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from wan_jax.weights.readers import Excerpt, FileReader
from wan_jax.weights.rules import NAMINGS, Shape

# Of CLIP's tower, and not of SigLIP's, which programs keep beside it.
_TOWER = ("embeddings.class_embedding", "pre_layrnorm.weight", "pre_layrnorm.bias")
# Names that only this network has, in either naming. A file holds it if it has two of them, so
# that one lost or misspelled name is reported among the others, not as a network that is absent.
_SIGNS = {
    ("dit", "wan"): (
        "text_embedding.0.weight",
        "time_projection.1.weight",
        "head.modulation",
        "head.head.weight",
    ),
    ("dit", "diffusers"): (
        "condition_embedder.text_embedder.linear_1.weight",
        "condition_embedder.time_proj.weight",
        "scale_shift_table",
        "proj_out.weight",
    ),
    ("vae", "wan"): (
        "encoder.middle.1.to_qkv.weight",
        "decoder.middle.0.residual.0.gamma",
        "decoder.head.0.gamma",
        "decoder.conv1.weight",
    ),
    ("vae", "diffusers"): (
        "encoder.mid_block.attentions.0.to_qkv.weight",
        "decoder.mid_block.resnets.0.norm1.gamma",
        "decoder.norm_out.gamma",
        "post_quant_conv.weight",
    ),
    ("umt5", "wan"): (
        "token_embedding.weight",
        "blocks.0.pos_embedding.embedding.weight",
        "blocks.0.attn.q.weight",
        "blocks.0.ffn.gate.0.weight",
    ),
    ("umt5", "diffusers"): (
        "encoder.final_layer_norm.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
    ),
    ("clip", "wan"): (
        "visual.cls_embedding",
        "visual.pos_embedding",
        "visual.pre_norm.weight",
        "visual.transformer.0.attn.to_qkv.weight",
    ),
    # transformers writes its names with this prefix up to release 4, and without from 5 on.
    ("clip", "diffusers"): (*_TOWER, *(f"vision_model.{name}" for name in _TOWER)),
}
_PREFIXES = {
    "dit": ("", "model.diffusion_model.", "diffusion_model.", "model."),
    "vae": ("", "vae.", "first_stage_model.", "model."),
    "umt5": ("", "text_encoders.umt5xxl.transformer.", "umt5xxl.transformer."),
    "clip": ("",),
}
# The DiT's tensors for an image, in either naming.
_IMAGE = r"img_emb\..*|.*\.k_img\..*|.*\.image_embedder\..*|.*\.add_k_proj\..*"
# Regular expressions of whole names that belong to no network, and why they are left out.
IGNORED = {
    r"(.*\.)?spiece_model": "ComfyUI's copy of the tokenizer, as bytes",
    r"text_encoders\.umt5xxl\.logit_scale": "written by ComfyUI for every text encoder; CLIP's",
}
_KINDS = {
    r"(.*\.)?(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale)": "fp8 with scales",
    r"(.*\.)?(comfy_quant|weight_scale_2)": "quantised for ComfyUI",
    r".*\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)": "nf4 or fp4",
    r".*\.(SCB|weight_format)": "int8",
    r".*\.(qweight|qzeros|g_idx|wscales|qscale)": "of 4 or 8 bits",
}
_TAKE = "take the file in bfloat16, float16 or float32"


class Claim(NamedTuple):
    """How a file holds a network."""

    naming: str
    prefix: str


def find_claims(names: Collection[str]) -> dict[str, Claim]:
    """{part: claim} of the networks whose tensors are among these names."""
    claims = {}
    for part, prefixes in _PREFIXES.items():
        counts = {
            Claim(naming, prefix): sum(prefix + sign in names for sign in _SIGNS[part, naming])
            for prefix in prefixes
            for naming in NAMINGS
        }
        best = max(counts, key=lambda claim: counts[claim])
        if counts[best] >= 2 and not _is_t5(names, best):
            claims[part] = best
    return claims


def _is_t5(names: Collection[str], claim: Claim) -> bool:
    """Whether these are T5's names: UMT5's but for position tables, of which only one is there.

    Other models have T5 as their encoder, so ComfyUI's folders hold it beside UMT5.
    """
    layers = [f"{claim.prefix}encoder.block.{i}.layer.0.SelfAttention." for i in (1, 2, 3)]
    tables = [f"{layer}relative_attention_bias.weight" in names for layer in layers]
    return f"{layers[1]}q.weight" in names and not any(tables)


def take(reader: FileReader, claims: Mapping[str, Claim], part: str) -> FileReader:
    """The tensors of one network of a file, under the names of its naming.

    Each name belongs to the network with the longest prefix that it has. Raises ValueError naming
    the file and those that belong to none, or if two networks share a prefix.
    """
    names = list(reader.shapes())
    kept = [name for name in names if not any(re.fullmatch(p, name) for p in IGNORED)]
    prefixes = {claim.prefix: part for part, claim in claims.items()}
    if len(prefixes) < len(claims):
        raise ValueError(f"{reader.files[0]} mixes {sorted(claims)} without prefixes")
    if set(prefixes) == {""} and len(kept) == len(names):
        return reader
    order = sorted(prefixes, key=len, reverse=True)
    owners = {name: next((p for p in order if name.startswith(p)), None) for name in kept}
    stray = sorted(name for name, owner in owners.items() if owner is None)
    if stray:
        raise ValueError(
            f"{reader.files[0]} holds {len(stray)} tensors that belong to none of its networks "
            f"({', '.join(sorted(claims))}): {stray[:5]}"
        )
    prefix = claims[part].prefix
    chosen = {name.removeprefix(prefix): name for name in kept if owners[name] == prefix}
    return Excerpt(reader, chosen)


def check_precision(reader: FileReader) -> None:
    """Raise ValueError for weights of 8 bits or fewer, saying what to take in their place."""
    file = reader.files[0]
    for name, (_, dtype) in reader.shapes().items():
        if re.match(r"float8|f8|f6|f4|int8|uint8|i8|u8", dtype):
            kind = "fp8" if dtype.startswith(("float8", "f8")) else "quantised"
            raise ValueError(
                f"{file} does not fit: {name} is stored as {dtype}, so its weights are {kind}; "
                f"{_TAKE}"
            )
        for pattern, kind in _KINDS.items():
            if re.fullmatch(pattern, name):
                raise ValueError(
                    f"{file} does not fit: it holds {name}, so its weights are {kind}; {_TAKE}"
                )


def check_gguf(files: Collection[Path]) -> None:
    """Raise ValueError if one of the files is GGUF, saying what to take in its place."""
    for file in files:
        if file.suffix.lower() == ".gguf":
            raise ValueError(f"{file} is GGUF, whose weights are quantised; {_TAKE}, .safetensors")


def check_task(shapes: Mapping[str, Shape], file: Path) -> None:
    """Raise ValueError for a DiT of the Wan family that is none that is supported."""
    channels = shapes.get("patch_embedding.weight", (0, 0))[1:2]
    image = any(re.fullmatch(_IMAGE, name) for name in shapes)
    if any("vace_" in name for name in shapes):
        kind = "is a VACE checkpoint (it has vace_ tensors)"
    elif channels == (36,) and not image:
        kind = (
            "is a Wan2.2 or Fun checkpoint (its DiT has 36 input channels and no tensors for "
            "CLIP's tokens of an image)"
        )
    elif channels == (48,):
        kind = "is a Wan2.2 or control checkpoint (its DiT has 48 input channels)"
    elif re.search(r"wan[-_.]?2[-_.]2|(high|low)_noise", "/".join(file.parts[-2:]).lower()):
        kind = "is, by its name, half of a Wan2.2 checkpoint"
    else:
        return
    raise ValueError(
        f"{file} {kind}; only text-to-video, image-to-video and first-last-frame checkpoints of "
        "Wan2.1 are supported"
    )
