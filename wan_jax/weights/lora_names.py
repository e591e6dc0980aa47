"""What the names in a LoRA's file mean, and how to write them.

A name is a prefix, a module and what it holds of the module. The modules are those of the DiT's
table, in either naming, so none is listed here:

    transformer.blocks.0.attn1.to_q.lora_A.weight         Diffusers and PEFT; the prefix may lack
    diffusion_model.blocks.0.self_attn.q.lora_down.weight  ComfyUI, with the original's names
    lora_unet_blocks_0_self_attn_q.lora_down.weight        kohya's trainers (musubi-tuner)

PEFT without Diffusers puts base_model.model. before each.

Checked against diffusers 0.42.1 (loaders/lora_conversion_utils.py), ComfyUI (comfy/lora.py,
comfy/weight_adapter/lora.py), musubi-tuner (convert_lora.py), and, for the modulation's `diff_m`,
the files of lightx2v (ComfyUI's issue 8922).
"""

import functools
import re
from typing import NamedTuple

from wan_jax.config import DiTConfig
from wan_jax.weights import dit
from wan_jax.weights.rules import NAMINGS, Rule

NAMES = ("diffusers", "comfyui")  # that can be written
_PREFIXES = {"diffusers": "transformer.", "comfyui": "diffusion_model."}
_TABLES = {"diffusers": "diffusers", "comfyui": "wan"}
_PEFT = "base_model.model."
_FLAT = "lora_unet_"  # of names with all dots as underscores, as kohya's trainers write them
_TEXT = ("text_encoder", "lora_te")
# PEFT puts the adapter's name before the last word: lora_A.default.weight.
_SUFFIXES = (
    (re.compile(r"\.lora_(A|down)(\.\w+)?\.weight\Z"), "down", ".weight"),
    (re.compile(r"\.lora_(B|up)(\.\w+)?\.weight\Z"), "up", ".weight"),
    (re.compile(r"\.lora_(B|up)(\.\w+)?\.bias\Z"), "bias", ".bias"),
    (re.compile(r"\.alpha\Z"), "alpha", ".weight"),
    (re.compile(r"\.diff\Z"), "diff", ".weight"),
    (re.compile(r"\.diff_b\Z"), "diff", ".bias"),
    (re.compile(r"\.diff_m\Z"), "diff", ".modulation"),
)
_WRITTEN = {
    "diffusers": {"down": ".lora_A.weight", "up": ".lora_B.weight"},
    "comfyui": {"down": ".lora_down.weight", "up": ".lora_up.weight", "alpha": ".alpha"},
}
_DIFFERENCES = {".weight": ".diff", ".bias": ".diff_b", ".modulation": ".diff_m"}


class Meaning(NamedTuple):
    """What one tensor of a LoRA's file is for.

    rule: of the parameter that it changes. layer: which of a stack, else 0. kind: "down", "up" and
    "alpha" of a product's factors; "bias", added to the bias and scaled with the factors; "diff",
    added to the parameter as it is. module: its name in the table's naming, without a prefix.
    """

    rule: Rule
    layer: int
    kind: str
    module: str


class Names:
    """The names that may be in the file of a LoRA.

    rules: of the DiT. layers: how many it has.
    """

    def __init__(self, rules: tuple[Rule, ...], layers: int) -> None:
        self._tensors: dict[str, tuple[Rule, int]] = {}
        self._flat: dict[str, str] = {}
        for rule in rules:
            for naming in NAMINGS:
                for i in range(layers if rule.stacked else 1):
                    name = rule.source(naming).replace("{i}", str(i))
                    self._tensors[name] = rule, i
                    if naming == "wan":
                        module = name.rpartition(".")[0]
                        self._flat[module.replace(".", "_")] = module

    def meaning(self, key: str) -> Meaning | None:
        """What a tensor of this name is for; None if this DiT has no use for it."""
        for pattern, kind, end in _SUFFIXES:
            found = pattern.search(key)
            if found is None:
                continue
            module = self._module(key[: found.start()])
            rule, layer = self._tensors.get(f"{module}{end}", (None, 0))
            factor = kind in ("down", "up", "alpha")
            if rule is not None and (not factor or rule.target.endswith(".kernel")):
                return Meaning(rule, layer, kind, module)
        return None

    def _module(self, name: str) -> str:
        """The module's name without a prefix, with its dots."""
        name = name.removeprefix(_PEFT)
        if name.startswith(_FLAT):
            return self._flat.get(name.removeprefix(_FLAT), "")
        prefix = next((p for p in _PREFIXES.values() if name.startswith(p)), "")
        return name.removeprefix(prefix)


@functools.lru_cache(maxsize=8)
def names_of(config: DiTConfig) -> Names:
    """The names that a LoRA of this network may have."""
    return Names(dit.table(config).rules, config.num_layers)


@functools.lru_cache(maxsize=8)
def all_names(layers: int) -> Names:
    """The names that a LoRA of any kind of DiT with so many layers may have."""
    return Names(dit.EVERY.rules, layers)


def is_text(key: str) -> bool:
    """Whether a name is one of a text encoder's LoRA."""
    return key.startswith(_TEXT)


def is_peft(key: str) -> bool:
    """Whether a name is one that PEFT writes without Diffusers."""
    return key.startswith(_PEFT)


def module(rule: Rule, layer: int, naming: str) -> str:
    """The name of a parameter's module as `naming` has it, without a prefix."""
    return rule.source(_TABLES[naming]).replace("{i}", str(layer)).rpartition(".")[0]


def key(rule: Rule, layer: int, kind: str, *, naming: str) -> str | None:
    """The name of a tensor in a file; None if the naming has none for it.

    kind: "down", "up", "alpha" or "diff", as in Meaning. naming: one of NAMES.
    """
    ends = _WRITTEN[naming]
    if kind == "diff" and naming == "comfyui":
        end = _DIFFERENCES.get("." + rule.wan.rpartition(".")[2])
    else:
        end = ends.get(kind)
    return None if end is None else f"{_PREFIXES[naming]}{module(rule, layer, naming)}{end}"
