"""The VAE's table of parameter names, and its dimensions read from a checkpoint.

Wan numbers the stages' parts through, one list a network; Diffusers does so in the encoder only.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from wan_jax.config import VAEConfig
from wan_jax.vae_stages import Stage, decoder_stages, encoder_stages
from wan_jax.weights import facts
from wan_jax.weights.rules import CONV2D, CONV3D, NAMINGS, SAME, Layout, Rule, Shape, Table

_SCALE_3D = Layout(squeeze=(1, 2, 3))  # [c, 1, 1, 1] -> [c]
_SCALE_2D = Layout(squeeze=(1, 2))  # [c, 1, 1] -> [c]
_POINT_3D = Layout(squeeze=(2, 3, 4), permute=(1, 0))  # [o, i, 1, 1, 1] -> [i, o]
_POINT_2D = Layout(squeeze=(2, 3), permute=(1, 0))  # [o, i, 1, 1] -> [i, o]

_Z_DIM_2_2 = 48  # latent channels of Wan2.2's other VAE


def _pair(target: str, wan: str, diffusers: str, layout: Layout) -> tuple[Rule, Rule]:
    return (
        Rule(f"{target}.kernel", f"{wan}.weight", f"{diffusers}.weight", layout),
        Rule(f"{target}.bias", f"{wan}.bias", f"{diffusers}.bias", SAME),
    )


def _scale(target: str, wan: str, diffusers: str, layout: Layout = _SCALE_3D) -> Rule:
    return Rule(f"{target}.scale", f"{wan}.gamma", f"{diffusers}.gamma", layout)


def _block(target: str, wan: str, diffusers: str, *, shortcut: bool = False) -> Iterator[Rule]:
    residual = f"{wan}.residual"
    yield _scale(f"{target}.norm1", f"{residual}.0", f"{diffusers}.norm1")
    yield from _pair(f"{target}.conv1", f"{residual}.2", f"{diffusers}.conv1", CONV3D)
    yield _scale(f"{target}.norm2", f"{residual}.3", f"{diffusers}.norm2")
    yield from _pair(f"{target}.conv2", f"{residual}.6", f"{diffusers}.conv2", CONV3D)
    if shortcut:
        names = f"{wan}.shortcut", f"{diffusers}.conv_shortcut"
        yield from _pair(f"{target}.shortcut", *names, _POINT_3D)


def _ends(net: str) -> Iterator[Rule]:
    """Rules of what encoder and decoder share: both ends and the middle."""
    yield from _pair(f"{net}.conv_in", f"{net}.conv1", f"{net}.conv_in", CONV3D)
    middle, theirs = f"{net}.middle", f"{net}.mid_block"
    yield from _block(f"{middle}.block1", f"{middle}.0", f"{theirs}.resnets.0")
    ours, wan, attention = f"{middle}.attention", f"{middle}.1", f"{theirs}.attentions.0"
    yield _scale(f"{ours}.norm", f"{wan}.norm", f"{attention}.norm", _SCALE_2D)
    yield from _pair(f"{ours}.qkv", f"{wan}.to_qkv", f"{attention}.to_qkv", _POINT_2D)
    yield from _pair(f"{ours}.out", f"{wan}.proj", f"{attention}.proj", _POINT_2D)
    yield from _block(f"{middle}.block2", f"{middle}.2", f"{theirs}.resnets.1")
    yield _scale(f"{net}.norm_out", f"{net}.head.0", f"{net}.norm_out")
    yield from _pair(f"{net}.conv_out", f"{net}.head.2", f"{net}.conv_out", CONV3D)


def _stage(
    stage: Stage, target: str, wan: list[str], diffusers: list[str], resample: str
) -> Iterator[Rule]:
    """Rules of one stage: names of its blocks, in order, and the Diffusers name of its resampling.

    wan holds one name more than there are blocks, that of the resampling.
    """
    for i in range(stage.num_blocks):
        shortcut = i == 0 and stage.d_in != stage.d_out
        yield from _block(f"{target}.blocks.{i}", wan[i], diffusers[i], shortcut=shortcut)
    if not stage.resample:
        return
    ours = f"{target}.resample"
    names = f"{wan[-1]}.resample.1", f"{resample}.resample.1"
    yield from _pair(f"{ours}.space", *names, CONV2D)
    if stage.temporal:
        names = f"{wan[-1]}.time_conv", f"{resample}.time_conv"
        yield from _pair(f"{ours}.time", *names, CONV3D)


def _encoder(config: VAEConfig) -> Iterator[Rule]:
    parts = itertools.count()
    for i, stage in enumerate(encoder_stages(config)):
        numbers = list(itertools.islice(parts, stage.num_blocks + 1))
        wan = [f"encoder.downsamples.{k}" for k in numbers]
        diffusers = [f"encoder.down_blocks.{k}" for k in numbers]
        yield from _stage(stage, f"encoder.stages.{i}", wan, diffusers, diffusers[-1])


def _decoder(config: VAEConfig) -> Iterator[Rule]:
    parts = itertools.count()
    for i, stage in enumerate(decoder_stages(config)):
        wan = [f"decoder.upsamples.{k}" for k in itertools.islice(parts, stage.num_blocks + 1)]
        theirs = f"decoder.up_blocks.{i}"
        diffusers = [f"{theirs}.resnets.{k}" for k in range(stage.num_blocks)]
        yield from _stage(stage, f"decoder.stages.{i}", wan, diffusers, f"{theirs}.upsamplers.0")


def table(config: VAEConfig) -> Table:
    """The rules of a VAE of these dimensions, in both namings."""
    quant = _pair("quant", "conv1", "quant_conv", _POINT_3D)
    post_quant = _pair("post_quant", "conv2", "post_quant_conv", _POINT_3D)
    ends = (*_ends("encoder"), *_ends("decoder"))
    return Table((*ends, *_encoder(config), *_decoder(config), *quant, *post_quant))


def _encoder_parts(shapes: Mapping[str, Shape], naming: str) -> tuple[list[list[int]], list[bool]]:
    """Widths of the blocks of each encoder stage, and whether each but the last halves time."""
    prefix, conv = {
        "wan": ("encoder.downsamples", "residual.2.weight"),
        "diffusers": ("encoder.down_blocks", "conv1.weight"),
    }[naming]
    widths: list[list[int]] = [[]]
    temporal = []
    for k in itertools.count():
        name = f"{prefix}.{k}"
        block = shapes.get(f"{name}.{conv}")
        if block is not None:
            widths[-1].append(facts.sizes(shapes, f"{name}.{conv}", axes=5)[0])
        elif f"{name}.resample.1.weight" in shapes:
            widths.append([])
            temporal.append(f"{name}.time_conv.weight" in shapes)
        else:
            break
    return widths, temporal


def config_from_shapes(shapes: Mapping[str, Shape], naming: str) -> VAEConfig:
    """Dimensions of the VAE whose tensors have these names and shapes.

    naming: "wan" or "diffusers". Latent statistics are in no tensor; they are the released ones.
    ValueError where the tensors are those of no VAE that VAEConfig describes.
    """
    if naming not in NAMINGS:
        raise ValueError(f"naming is {naming!r}; one of {NAMINGS} is needed")
    ends = {
        "wan": ("encoder.conv1.weight", "conv2.weight"),
        "diffusers": ("encoder.conv_in.weight", "post_quant_conv.weight"),
    }[naming]
    for name in ends:
        if name not in shapes:
            raise ValueError(f"no tensor {name}: these are not a VAE's weights in {naming} names")
    base_dim, z_dim = (facts.sizes(shapes, name, axes=5)[0] for name in ends)
    widths, temporal = _encoder_parts(shapes, naming)
    outs = [stage[-1] if stage else 0 for stage in widths]
    if any(stage != [outs[i]] * len(widths[0]) for i, stage in enumerate(widths)) or not all(outs):
        raise ValueError(f"encoder stages of widths {widths}; one width and one length are needed")
    if any(width % base_dim for width in outs):
        raise ValueError(f"encoder widths {outs} are not multiples of the first, {base_dim}")
    if z_dim == _Z_DIM_2_2:
        raise ValueError(f"a VAE of {z_dim} latent channels is that of Wan2.2; Wan2.1's has 16")
    if z_dim != VAEConfig().z_dim:
        raise ValueError(
            f"a VAE of {z_dim} latent channels needs a config.json: the statistics of its latents "
            f"are not in its tensors, and only those of {VAEConfig().z_dim} channels are known"
        )
    return VAEConfig(
        base_dim=base_dim,
        dim_mult=tuple(width // base_dim for width in outs),
        num_res_blocks=len(widths[0]),
        z_dim=z_dim,
        temporal_downsample=tuple(temporal),
    )


# What a Diffusers config.json may hold beside the fields that are read, and the values that fit.
# None is any value: the key says nothing that shapes the network.
_DIFFUSERS_FIXED: dict[str, tuple[Any, ...] | None] = {
    "_class_name": ("AutoencoderKLWan",),
    "attn_scales": ([], None),
    "clip_output": (True,),
    "decoder_base_dim": (None,),
    "dropout": None,
    "in_channels": (3,),
    "is_residual": (False,),
    "out_channels": (3,),
    "patch_size": (None,),
    "scale_factor_spatial": None,
    "scale_factor_temporal": None,
}
_DIFFUSERS_FIELDS = {
    "base_dim": "base_dim",
    "z_dim": "z_dim",
    "dim_mult": "dim_mult",
    "num_res_blocks": "num_res_blocks",
    "temperal_downsample": "temporal_downsample",
    "latents_mean": "latents_mean",
    "latents_std": "latents_std",
}


def config_from_diffusers(values: Mapping[str, Any]) -> VAEConfig:
    """The configuration in a Diffusers vae/config.json, already parsed.

    ValueError for a field that would shape a network other than this one.
    """
    for key, value in values.items():
        if key in _DIFFUSERS_FIELDS or (key.startswith("_") and key not in _DIFFUSERS_FIXED):
            continue
        fits = _DIFFUSERS_FIXED.get(key, (None, False, [], {}))
        if key == "decoder_base_dim" and value == values.get("base_dim", VAEConfig().base_dim):
            continue
        if fits is not None and value not in fits:
            expected = " or ".join(repr(fit) for fit in fits)
            raise ValueError(f"vae/config.json has {key} = {value!r}; only {expected} is supported")
    if values.get("z_dim") == _Z_DIM_2_2:
        raise ValueError(f"a VAE of {_Z_DIM_2_2} latent channels is that of Wan2.2")
    kinds: dict[str, Callable[[Mapping[str, Any], str], Any]] = {
        "base_dim": facts.integer,
        "z_dim": facts.integer,
        "num_res_blocks": facts.integer,
        "dim_mult": facts.integers,
        "temperal_downsample": facts.booleans,
        "latents_mean": facts.numbers,
        "latents_std": facts.numbers,
    }
    found = {
        ours: kinds[key](values, key) for key, ours in _DIFFUSERS_FIELDS.items() if key in values
    }
    if min(found.get("latents_std", (1.0,)), default=1.0) <= 0:
        raise ValueError(
            f"latents_std is {list(found['latents_std'])}; positive numbers are needed"
        )
    return VAEConfig(**found)


def config_to_diffusers(config: VAEConfig) -> dict[str, Any]:
    """vae/config.json of AutoencoderKLWan with this network's dimensions."""
    values = config.to_dict()
    fields = {theirs: values[ours] for theirs, ours in _DIFFUSERS_FIELDS.items()}
    return {"_class_name": "AutoencoderKLWan", **fields}
