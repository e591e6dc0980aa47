"""Every rule table against what the released checkpoints hold, at full size, without weights."""

import json
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import manifests
from tests.manifests import Tensors
from wan_jax.config import FLF2V_14B, I2V_14B, T2V_1_3B, T2V_14B, CLIPConfig, UMT5Config, VAEConfig
from wan_jax.weights import clip, dit, rules, trees, umt5, vae
from wan_jax.weights.rules import MismatchError
from wan_jax.weights.sources import PartConfig, abstract_part, part_table

CONFIGS: dict[str, PartConfig] = {
    "t2v_1_3b": T2V_1_3B.dit,
    "t2v_14b": T2V_14B.dit,
    "i2v_14b": I2V_14B.dit,
    "flf2v_14b": FLF2V_14B.dit,
    "vae": VAEConfig(),
    "umt5": UMT5Config(),
    "clip": CLIPConfig(),
}
# Tensors and parameters, in either naming; CLIP's products are joined in one of them.
COUNTS = {
    "t2v_1_3b": (825, 1_418_996_800),
    "t2v_14b": (1095, 14_288_491_584),
    "i2v_14b": (1303, 16_394_878_784),
    "flf2v_14b": (1304, 16_395_536_704),
    "vae": (194, 126_892_531),
    "umt5": (242, 5_680_910_336),
    "clip.wan": (392, 632_076_800),
    "clip.diffusers": (520, 632_076_800),
}
# Bytes of released files, from listings.
FILES = {"t2v_1_3b.wan": 5_676_070_424, "vae.diffusers": 507_591_892}
# What the tables leave out: of CLIP what comes after the state that Wan2.1 takes.
IGNORED = {
    "clip.wan": r"visual\.(transformer\.31\..*|post_norm\.(weight|bias)|head)",
    "clip.diffusers": r"vision_model\.(encoder\.layers\.31\..*|post_layernorm\.(weight|bias))"
    r"|visual_projection\.weight",
}
SHARED, TIED = "shared.weight", "encoder.embed_tokens.weight"


class _Reader:
    """The header of a file with these tensors."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def shapes(self) -> dict[str, tuple[rules.Shape, str]]:
        return {name: (shape, dtype or "float32") for name, (shape, dtype) in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        raise AssertionError(f"{name} was read; names and shapes must do")


def _check(name: str, tensors: Tensors) -> list[rules.Assignment]:
    """What a conversion checks before it reads; MismatchError unless these tensors are right."""
    net, naming = name.split(".")
    config = CONFIGS[net]
    targets = trees.flatten(abstract_part(config, jnp.dtype("bfloat16")))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in targets.values())
    plan = rules.resolve(part_table(config), targets, naming=naming, names=list(tensors))
    rules.check_shapes(plan, _Reader(tensors))
    assert sorted(item.target for item in plan) == sorted(targets)
    filled = sum(math.prod(leaf.shape) for leaf in targets.values())
    sources = {source for item in plan for source in item.sources}
    assert filled == sum(math.prod(tensors[source][0]) for source in sources)
    return plan


def _shapes(name: str) -> dict[str, rules.Shape]:
    return {tensor: shape for tensor, (shape, _) in manifests.load(name).items()}


def _left_out(name: str) -> set[str]:
    return {
        tensor for tensor in manifests.load(name) if re.fullmatch(IGNORED.get(name, ""), tensor)
    }


@pytest.mark.parametrize("name", manifests.NAMES)
def test_counts(name: str) -> None:
    tensors, head = manifests.load(name), manifests.head(name)
    counts = len(tensors), sum(math.prod(shape) for shape, _ in tensors.values())
    wanted = COUNTS.get(name) or COUNTS[name.split(".")[0]]
    assert counts == wanted == (head["tensors"], head["parameters"])


@pytest.mark.parametrize("name", FILES)
def test_sizes_of_released_files(name: str) -> None:
    """To the byte, and the header is part of it: the names are as long as the released ones."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, (shape, dtype) in sorted(manifests.load(name).items()):
        assert dtype == "float32"
        start, end = end, end + 4 * math.prod(shape)
        header[tensor] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"))
    assert 8 + len(text) + -len(text) % 8 + end == FILES[name]


@pytest.mark.parametrize("name", manifests.NAMES)
def test_tables_are_total(name: str) -> None:
    """Every tensor of the checkpoint is used once, every parameter of ours is filled once."""
    tensors = manifests.load(name)
    plan = _check(name, tensors)
    used = sorted(source for item in plan for source in item.sources)
    assert used == sorted(tensors.keys() - _left_out(name))


@pytest.mark.parametrize("naming", rules.NAMINGS)
def test_what_images_add(naming: str) -> None:
    """Five tensors a block and the MLP before them; two images have a table of positions more."""
    text, one, two = (manifests.load(f"{n}_14b.{naming}") for n in ("t2v", "i2v", "flf2v"))
    assert len(one.keys() - text.keys()) == 5 * 40 + 8
    assert not text.keys() - one.keys() and not one.keys() - two.keys()
    (table,) = two.keys() - one.keys()
    assert two[table][0] == (1, 2 * CLIPConfig().num_tokens, 1280)
    for tensors, name in ((one, "flf2v_14b"), (two, "i2v_14b"), (text, "i2v_14b")):
        with pytest.raises(MismatchError, match="source tensors (unused|absent): [^-]"):
            _check(f"{name}.{naming}", tensors)


@pytest.mark.parametrize("stored", [(SHARED,), (TIED,), (SHARED, TIED)])
def test_tied_embeddings(stored: tuple[str, ...]) -> None:
    """transformers has two names for one tensor; files hold the first, other tools write both."""
    tensors = manifests.load("umt5.diffusers")
    embedding = tensors.pop(SHARED)
    _check("umt5.diffusers", tensors | dict.fromkeys(stored, embedding))


@pytest.mark.parametrize("naming", rules.NAMINGS)
def test_configs_from_shapes(naming: str) -> None:
    """The original layout stores no dimensions of the VAE, of UMT5 and of CLIP."""
    assert vae.config_from_shapes(_shapes(f"vae.{naming}"), naming) == VAEConfig()
    assert umt5.config_from_shapes(_shapes(f"umt5.{naming}"), naming) == UMT5Config()
    assert clip.config_from_shapes(_shapes(f"clip.{naming}"), naming) == CLIPConfig()
    for net in manifests.DITS:
        assert dit.config_from_shapes(_shapes(f"{net}.{naming}"), naming) == CONFIGS[net]


@pytest.mark.parametrize("net", manifests.DITS)
def test_configs_of_the_dit(net: str) -> None:
    """From config.json as the original's class and diffusers' write it."""
    values = manifests.head(f"{net}.wan")["config"]
    assert dit.config_from_wan(values, _shapes(f"{net}.wan")) == CONFIGS[net]
    assert dit.config_to_wan(CONFIGS[net]).items() >= values.items()
    values = manifests.head(f"{net}.diffusers")["config"]
    assert dit.config_from_diffusers(values) == CONFIGS[net]
    assert dit.config_to_diffusers(CONFIGS[net]).items() >= values.items()


def test_configs_of_diffusers() -> None:
    assert vae.config_from_diffusers(manifests.head("vae.diffusers")["config"]) == VAEConfig()
    assert umt5.config_from_diffusers(manifests.head("umt5.diffusers")["config"]) == UMT5Config()
    assert clip.config_from_diffusers(manifests.head("clip.diffusers")["config"]) == CLIPConfig()


def _drop(tensors: Tensors, name: str) -> None:
    del tensors[name]


def _rename(tensors: Tensors, name: str) -> None:
    tensors[f"{name}_renamed"] = tensors.pop(name)


def _reshape(tensors: Tensors, name: str) -> None:
    shape, dtype = tensors[name]
    tensors[name] = (*shape[:-1], shape[-1] + 1), dtype


@pytest.mark.parametrize("change", [_drop, _rename, _reshape])
@pytest.mark.parametrize("name", manifests.NAMES)
def test_one_wrong_entry_is_found(name: str, change: Callable[[Tensors, str], None]) -> None:
    """The check above is no formality: it names the first, a middle and the last tensor."""
    whole = manifests.load(name)
    used = [tensor for tensor in whole if tensor not in _left_out(name)]
    for victim in (used[i] for i in (0, len(used) // 2, -1)):
        tensors = dict(whole)
        change(tensors, victim)
        with pytest.raises(MismatchError, match=re.escape(victim)):
            _check(name, tensors)


def test_swapped_axes_are_found() -> None:
    """Products are stored [out, in]; a square one cannot tell, an oblong one must."""
    tensors = manifests.load("t2v_14b.wan")
    victim = "blocks.39.ffn.2.weight"
    shape, dtype = tensors[victim]
    tensors[victim] = shape[::-1], dtype
    with pytest.raises(MismatchError, match=r"\[13824, 5120\], needed \[5120, 13824\]"):
        _check("t2v_14b.wan", tensors)


def test_lines_stand_for_layers() -> None:
    assert manifests.expand("blocks.{0..2}.b") == ["blocks.0.b", "blocks.1.b", "blocks.2.b"]
    assert manifests.expand("head.0.gamma") == ["head.0.gamma"]
    with pytest.raises(ValueError, match="no manifest 't2v'"):
        manifests.load("t2v")
