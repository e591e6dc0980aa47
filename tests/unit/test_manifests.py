"""Every rule table against what the released checkpoints hold, at full size, without weights."""

import dataclasses
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
from wan_jax.config import T2V_1_3B, T2V_14B, UMT5Config, VAEConfig
from wan_jax.weights import dit, rules, trees, umt5, vae
from wan_jax.weights.rules import MismatchError
from wan_jax.weights.sources import PartConfig, abstract_part, part_table

_IMAGE_DIT = dataclasses.replace(T2V_14B.dit, in_channels=36)
CONFIGS: dict[str, PartConfig] = {
    "t2v_1_3b": T2V_1_3B.dit,
    "t2v_14b": T2V_14B.dit,
    "i2v_14b": _IMAGE_DIT,
    "flf2v_14b": _IMAGE_DIT,
    "vae": VAEConfig(),
    "umt5": UMT5Config(),
}
# Tensors and parameters, in either naming.
COUNTS = {
    "t2v_1_3b": (825, 1_418_996_800),
    "t2v_14b": (1095, 14_288_491_584),
    "i2v_14b": (1303, 16_394_878_784),
    "flf2v_14b": (1304, 16_395_536_704),
    "vae": (194, 126_892_531),
    "umt5": (242, 5_680_910_336),
}
# Bytes of released files, from listings.
FILES = {"t2v_1_3b.wan": 5_676_070_424, "vae.diffusers": 507_591_892}
IMAGE_NETS = ("i2v_14b", "flf2v_14b")
WHOLE = [name for name in manifests.NAMES if name.split(".")[0] not in IMAGE_NETS]
# The image branch, which the DiT does not have yet: every name of it and no other.
_EMBEDDER = r"condition_embedder\.image_embedder"
IMAGE_KEYS = {
    "wan": (
        r"img_emb\.proj\.[0134]\.(weight|bias)",
        r"img_emb\.emb_pos",
        r"blocks\.\d+\.cross_attn\.[kv]_img\.(weight|bias)",
        r"blocks\.\d+\.cross_attn\.norm_k_img\.weight",
    ),
    "diffusers": (
        rf"{_EMBEDDER}\.(norm1|norm2|ff\.net\.0\.proj|ff\.net\.2)\.(weight|bias)",
        rf"{_EMBEDDER}\.pos_embed",
        r"blocks\.\d+\.attn2\.add_[kv]_proj\.(weight|bias)",
        r"blocks\.\d+\.attn2\.norm_added_k\.weight",
    ),
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


def _image_keys(name: str, tensors: Tensors) -> set[str]:
    patterns = IMAGE_KEYS[name.split(".")[1]]
    return {key for key in tensors if any(re.fullmatch(pattern, key) for pattern in patterns)}


@pytest.mark.parametrize("name", manifests.NAMES)
def test_counts(name: str) -> None:
    tensors, head = manifests.load(name), manifests.head(name)
    counts = len(tensors), sum(math.prod(shape) for shape, _ in tensors.values())
    assert counts == COUNTS[name.split(".")[0]] == (head["tensors"], head["parameters"])


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


@pytest.mark.parametrize("name", WHOLE)
def test_tables_are_total(name: str) -> None:
    """Every tensor of the checkpoint is used once, every parameter of ours is filled once."""
    tensors = manifests.load(name)
    plan = _check(name, tensors)
    assert sorted(source for item in plan for source in item.sources) == sorted(tensors)


@pytest.mark.parametrize("stored", [(SHARED,), (TIED,), (SHARED, TIED)])
def test_tied_embeddings(stored: tuple[str, ...]) -> None:
    """transformers has two names for one tensor; files hold the first, other tools write both."""
    tensors = manifests.load("umt5.diffusers")
    embedding = tensors.pop(SHARED)
    _check("umt5.diffusers", tensors | dict.fromkeys(stored, embedding))


@pytest.mark.parametrize("naming", rules.NAMINGS)
@pytest.mark.parametrize("net", IMAGE_NETS)
def test_only_the_image_branch_is_left_over(net: str, naming: str) -> None:
    name = f"{net}.{naming}"
    tensors = manifests.load(name)
    image = _image_keys(name, tensors)
    plan = _check(name, {key: tensors[key] for key in tensors.keys() - image})
    used = {source for item in plan for source in item.sources}
    assert tensors.keys() - used == image
    extra = COUNTS[net][0] - COUNTS["t2v_14b"][0]
    assert len(image) == extra == 5 * 40 + 8 + (net == "flf2v_14b")
    assert tensors["patch_embedding.weight"][0] == (5120, 36, 1, 2, 2)
    with pytest.raises(MismatchError, match=rf"source tensors unused: .* {extra} in all"):
        _check(name, tensors)


@pytest.mark.parametrize("naming", rules.NAMINGS)
def test_configs_from_shapes(naming: str) -> None:
    """The original layout stores no dimensions of the VAE and of UMT5."""
    assert vae.config_from_shapes(_shapes(f"vae.{naming}"), naming) == VAEConfig()
    assert umt5.config_from_shapes(_shapes(f"umt5.{naming}"), naming) == UMT5Config()


@pytest.mark.parametrize("net", ["t2v_1_3b", "t2v_14b"])
def test_configs_of_the_dit(net: str) -> None:
    """From config.json as the original's class and diffusers' write it."""
    values = manifests.head(f"{net}.wan")["config"]
    assert dit.config_from_wan(values, _shapes(f"{net}.wan")) == CONFIGS[net]
    values = manifests.head(f"{net}.diffusers")["config"]
    assert dit.config_from_diffusers(values) == CONFIGS[net]


def test_configs_of_diffusers() -> None:
    assert vae.config_from_diffusers(manifests.head("vae.diffusers")["config"]) == VAEConfig()
    assert umt5.config_from_diffusers(manifests.head("umt5.diffusers")["config"]) == UMT5Config()


def _drop(tensors: Tensors, name: str) -> None:
    del tensors[name]


def _rename(tensors: Tensors, name: str) -> None:
    tensors[f"{name}_renamed"] = tensors.pop(name)


def _reshape(tensors: Tensors, name: str) -> None:
    shape, dtype = tensors[name]
    tensors[name] = (*shape[:-1], shape[-1] + 1), dtype


@pytest.mark.parametrize("change", [_drop, _rename, _reshape])
@pytest.mark.parametrize("name", WHOLE)
def test_one_wrong_entry_is_found(name: str, change: Callable[[Tensors, str], None]) -> None:
    """The check above is no formality: it names the first, a middle and the last tensor."""
    whole = manifests.load(name)
    for victim in (list(whole)[i] for i in (0, len(whole) // 2, -1)):
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
