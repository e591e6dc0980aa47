"""What describes an exported checkpoint: config.json, model_index.json and what these name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_jax.config import CLIPConfig, Defaults, DiTConfig
from wan_jax.weights import clip, dit
from wan_jax.weights.facts import read_json
from wan_jax.weights.rules import Shape
from wan_jax.weights.sources import TABLES, PartConfig

LAYOUTS = ("original", "diffusers")


def describe(
    part: str, config: PartConfig, shapes: Mapping[str, Shape], *, layout: str
) -> dict[str, Any] | None:
    """What config.json says about a network, None if it has none in this layout.

    shapes: {tensor name: shape} of what is written. Raises ValueError for a network that would not
    be the same when it is read again.
    """
    values: dict[str, Any] | None = None
    again: PartConfig
    if layout == "diffusers":
        described: dict[str, Any] = TABLES[part].config_to_diffusers(config)
        values, again = described, TABLES[part].config_from_diffusers(described)
    elif isinstance(config, DiTConfig):
        values = dit.config_to_wan(config)
        again = dit.config_from_wan(values, shapes)
    else:
        again = TABLES[part].config_from_shapes(shapes, "wan")
    before, after = config.to_dict(), again.to_dict()
    lost = [name for name in before if before[name] != after[name]]
    if lost:
        other = next(name for name in LAYOUTS if name != layout)
        raise ValueError(
            f"layout {layout} has no place for {', '.join(lost)} of the {part}, and readers take "
            f"it for granted; use --layout {other}"
        )
    return values


def pipeline(
    clip_config: CLIPConfig | None, defaults: Defaults, tokenizer: Path
) -> dict[Path, dict[str, Any]]:
    """{file: contents} of a pipeline of Diffusers: for images if there is a CLIP tower.

    tokenizer: the folder of the checkpoint's.
    """
    index: dict[str, Any] = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", _tokenizer_class(tokenizer)],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    # What diffusers' scripts/convert_wan_to_diffusers.py sets; the rest are its defaults.
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": defaults.shift,
    }
    files = {Path("model_index.json"): index, Path("scheduler/scheduler_config.json"): scheduler}
    if clip_config is not None:
        index["_class_name"] = "WanImageToVideoPipeline"
        index["image_encoder"] = ["transformers", "CLIPVisionModel"]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
        processor = clip.processor_to_diffusers(clip_config)
        files[Path("image_processor/preprocessor_config.json")] = processor
    return files


def _tokenizer_class(folder: Path) -> str:
    """The class of transformers that reads a tokenizer folder, named as releases 4 and 5 know it.

    The released checkpoints' is T5TokenizerFast, in their model_index.json too.
    """
    file = folder / "tokenizer_config.json"
    named = read_json(file).get("tokenizer_class") if file.is_file() else None
    plain = named in ("PreTrainedTokenizerFast", "TokenizersBackend")
    return "PreTrainedTokenizerFast" if plain else "T5TokenizerFast"
