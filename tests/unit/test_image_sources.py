"""Checkpoints that take images, in every layout: what is found, and what is taken for something."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import manifests
from tests.unit import test_sources as layouts
from tests.unit.conftest import TINY, TINY_FLF2V, TINY_I2V
from tests.unit.test_sources import Checkpoint, Layout, Tensors, assert_same, read
from wan_jax.config import PARTS, CLIPConfig, WanConfig
from wan_jax.weights import clip, dit, miniature, repacks, rules, trees
from wan_jax.weights.layouts import CLIP_PTH
from wan_jax.weights.sources import DEFAULTS_FILE, abstract_part, open_folder, part_table

# Heads have 128 and 80 in all that is released, and no shape shows them.
WIDE = dataclasses.replace(
    TINY_FLF2V,
    dit=dataclasses.replace(TINY_FLF2V.dit, dim=128, num_heads=1, image_dim=80),
    clip=CLIPConfig(image_size=28, dim=80, num_heads=1, num_layers=3, ffn_dim=32),
)
NAMES = {
    "wan": dit.config_to_wan(WIDE.dit),
    "diffusers": dit.config_to_diffusers(WIDE.dit),
}


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide") / "diffusers"
    miniature.write(path, config=WIDE, seed=3)
    return path


@pytest.fixture(scope="module")
def arrays(diffusers: Path) -> dict[str, Tensors]:
    found = read(diffusers)
    assert tuple(found) == PARTS
    return found


def _exported(arrays: dict[str, Tensors], part: str, naming: str) -> Tensors:
    table = part_table(getattr(WIDE, part))
    tensors = dict(rules.export(table, arrays[part], naming=naming))
    return _released(tensors, naming) if part == "clip" else tensors


def _released(tensors: Tensors, naming: str) -> Tensors:
    """With what the released files have and nobody reads."""
    ones = np.ones(80, np.float32)
    if naming == "diffusers":
        more = {name: tensors[like].copy() for name, like in clip.stand_ins(WIDE.clip).items()}
        return tensors | more | {"visual_projection.weight": np.ones((8, 80), np.float32)}
    last = {n.replace(".1.", ".2.", 1): a for n, a in tensors.items() if "transformer.1." in n}
    more = {"visual.post_norm.weight": ones, "visual.post_norm.bias": ones, "log_scale": ones}
    text = {f"textual.{name}": ones for name in ("token_embedding.weight", "head.2.weight")}
    return tensors | last | more | text | {"visual.head": np.ones((80, 8), np.float32)}


@pytest.fixture(scope="module")
def state(arrays: dict[str, Tensors]) -> Checkpoint:
    return {(p, naming): _exported(arrays, p, naming) for p in PARTS for naming in rules.NAMINGS}


@pytest.fixture
def folder(diffusers: Path, tmp_path: Path) -> Path:
    """A folder with the tokenizer and the defaults, and no network."""
    path = tmp_path / "copy"
    shutil.copytree(diffusers / "tokenizer", path / "tokenizer")
    shutil.copy(diffusers / DEFAULTS_FILE, path)
    return path


def _described(path: Path, state: Checkpoint) -> Path:
    """As in Wan2.1's repositories, where config.json is the DiT's."""
    layouts._original(path, state)
    (path / "config.json").write_text(json.dumps(NAMES["wan"]))
    return path


def _bare_names(path: Path, state: Checkpoint) -> Path:
    """As transformers writes the tower from release 5 on."""
    tensors = state["clip", "diffusers"]
    bare = {name.removeprefix("vision_model."): array for name, array in tensors.items()}
    return layouts._bare_diffusers(path, {**state, ("clip", "diffusers"): bare})


LAYOUTS: tuple[Layout, ...] = (
    layouts._original, layouts._sharded, layouts._bare_diffusers, layouts._comfy, layouts._flat,
    layouts._one_file, _described, _bare_names,
)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_arrays(
    layout: Layout, folder: Path, state: Checkpoint, arrays: dict[str, Tensors]
) -> None:
    path = layout(folder, state)
    assert open_folder(path).config == WIDE
    assert list(open_folder(path).sources) == list(PARTS)
    assert_same(read(path), arrays)


@pytest.mark.parametrize("config", [TINY, TINY_I2V, TINY_FLF2V])
def test_what_a_checkpoint_is_opened_with(
    config: WanConfig,
    tiny_source: Path,
    tiny_i2v_source: Path,
    tiny_flf2v_source: Path,
) -> None:
    path = (tiny_source, tiny_i2v_source, tiny_flf2v_source)[config.images]
    folder = open_folder(path)
    assert folder.config == config
    assert (folder.config.clip is None) == (config.images == 0)
    assert tuple(folder.sources) == config.dit.parts
    assert folder.missing == []
    assert open_folder(path, ("vae",)).missing == ["dit"]
    some = open_folder(path, ("dit", "vae"))
    assert some.missing == ["umt5", "clip"][: 1 + (config.images > 0)]
    with pytest.raises(ValueError, match=r"tiny.* was opened without \['umt5'"):
        _ = some.config


def test_a_tower_that_is_not_needed(folder: Path, state: Checkpoint, tiny_source: Path) -> None:
    """ComfyUI's folders hold those of other models."""
    shutil.copytree(tiny_source, folder, dirs_exist_ok=True)
    (folder / "model_index.json").unlink()  # or each network needs a config.json
    layouts._save(folder / layouts.COMFY["clip"], state["clip", "diffusers"])
    assert open_folder(folder).config == TINY
    with pytest.raises(ValueError, match="has a CLIP tower if its DiT takes an image, and only"):
        _ = open_folder(folder, PARTS).config


# What is missing, or something else.


def _fails(path: Path, *messages: str, parts: tuple[str, ...] | None = None) -> None:
    layouts._fails(path, *messages, parts=parts)


def test_a_missing_tower_is_named(folder: Path, state: Checkpoint) -> None:
    comfy = layouts._comfy(folder, state)
    (folder / layouts.COMFY["clip"]).unlink()
    words = (
        f"{comfy} has neither image_encoder/ with safetensors and config.json",
        f"nor {CLIP_PTH} or .safetensors (original",
        "nor clip_vision/*.safetensors (ComfyUI) with a vision tower of CLIP",
    )
    _fails(comfy, *words)
    _fails(comfy, *words, parts=("clip",))
    assert open_folder(comfy, ("dit", "vae", "umt5")).missing == ["clip"]


def test_a_single_file(folder: Path, state: Checkpoint) -> None:
    path = layouts._save(folder / "one.safetensors", state["dit", "wan"])
    _fails(path, "one.safetensors holds no CLIP of Wan2.1; its", "those of DiT", parts=("clip",))
    for naming in rules.NAMINGS:
        path = layouts._save(folder / "clip.safetensors", state["clip", naming])
        assert open_folder(path, ("clip",)).sources["clip"].config == WIDE.clip
        _fails(path, "clip.safetensors holds no DiT of Wan2.1; its", "those of CLIP")


def test_towers_of_other_models(folder: Path, state: Checkpoint, arrays: Any) -> None:
    """SigLIP and others lie in clip_vision/ too; one more CLIP is one too many."""
    comfy = layouts._comfy(folder, state)
    tower = state["clip", "diffusers"]
    known = ("class_embedding", "pre_layrnorm", "visual_projection")
    siglip = {n: a for n, a in tower.items() if not any(word in n for word in known)}
    open_clip = {
        f"visual.{name}": np.ones(8, np.float32)
        for name in ("class_embedding", "positional_embedding", "ln_pre.weight", "proj")
    }
    text = {n.replace("vision_model.", "text_model."): a for n, a in tower.items()}
    for name, tensors in (("siglip", siglip), ("open_clip", open_clip), ("text", text)):
        assert repacks.find_claims(tensors) == {}
        layouts._save(comfy / "clip_vision" / f"{name}.safetensors", tensors)
    assert_same(read(comfy), arrays)
    layouts._save(comfy / "clip_vision" / "clip_l.safetensors", tower)
    _fails(comfy, "has 2 files with a CLIP: ['clip_l.safetensors', 'clip_vision_h.safetensors']")


@pytest.mark.parametrize("naming", rules.NAMINGS)
def test_signs_of_a_tower(naming: str) -> None:
    """One that is lost does not hide the others; text towers alone are none."""
    names = set(manifests.load(f"clip.{naming}"))
    found = {"clip": repacks.Claim(naming, "")}
    assert repacks.find_claims(names) == found
    for sign in repacks._SIGNS["clip", naming]:
        assert repacks.find_claims(names - {sign}) == found
    assert repacks.find_claims({f"cond_stage_model.{name}" for name in names}) == {}
    assert repacks.find_claims({"textual.token_embedding.weight", "textual.norm.weight"}) == {}


def test_a_tower_of_another_width(folder: Path, state: Checkpoint) -> None:
    comfy = layouts._comfy(folder, state)
    config = dataclasses.replace(WIDE.clip, dim=160, num_heads=2)
    targets = trees.flatten(abstract_part(config, jnp.dtype("float32")))
    zeros = {name: np.zeros(leaf.shape, np.float32) for name, leaf in targets.items()}
    tensors = dict(rules.export(clip.table(config), zeros, naming="diffusers"))
    more = {name: tensors[like].copy() for name, like in clip.stand_ins(config).items()}
    save_file(tensors | more, comfy / layouts.COMFY["clip"])
    with pytest.raises(ValueError, match="reads image tokens of width 80, CLIP writes 160"):
        _ = open_folder(comfy).config


def test_a_description_beside_the_tower(folder: Path, state: Checkpoint) -> None:
    """A config.json at the top is that of the network it describes, and of no other."""
    layouts._flat(folder, state)
    values = clip.config_to_diffusers(dataclasses.replace(WIDE.clip, num_heads=2))
    (folder / "config.json").write_text(json.dumps(values))
    found = open_folder(folder)
    assert found.config.dit == WIDE.dit
    assert found.config.clip == dataclasses.replace(WIDE.clip, num_heads=2)
    (folder / "config.json").write_text(json.dumps(values | {"hidden_act": "quick_gelu"}))
    _fails(folder, str(folder / "config.json"), "hidden_act = 'quick_gelu'; 'gelu' is needed")


def test_a_diffusers_folder_that_lost_the_config_of_its_tower(
    diffusers: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(diffusers, tmp_path / "copy"))
    (path / "image_encoder" / "config.json").unlink()
    _fails(path, f"{path / 'image_encoder' / 'config.json'} is missing")


# The DiT.


def test_image_tensors_that_are_lost(folder: Path, state: Checkpoint) -> None:
    """The sizes come from two of them; without any the network is another, and named."""
    tensors = state["dit", "wan"]
    (folder / "config.json").write_text(json.dumps(NAMES["wan"]))
    for lost, words in (
        ({"img_emb.proj.0.weight"}, "there is no tensor img_emb.proj.0.weight"),
        ({"img_emb.emb_pos"}, "has model_type 'flf2v'; the tensors are those of 'i2v'"),
        ({n for n in tensors if n.startswith("img_emb")}, "the tensors are those of 't2v'"),
    ):
        kept = {name: array for name, array in tensors.items() if name not in lost}
        path = layouts._save(folder / "x.safetensors", kept)
        _fails(path, str(folder / "config.json"), words, parts=("dit",))
    kept = {n: a for n, a in tensors.items() if "img" not in n}
    _fails(layouts._save(folder / "x.safetensors", kept), "is a Wan2.2 or Fun checkpoint")


@pytest.mark.parametrize("naming", rules.NAMINGS)
@pytest.mark.parametrize("config", [TINY, TINY_I2V, TINY_FLF2V])
def test_configs_round_trip(naming: str, config: WanConfig) -> None:
    targets = trees.flatten(abstract_part(config.dit, jnp.dtype("float32")))
    shapes = {
        name: rule.source_shape(naming, targets[rule.target].shape)
        for rule in dit.table(config.dit).rules
        for group in rule.names(naming, targets[rule.target].shape)
        for name in group
    }
    values = dit.config_to_wan(config.dit)
    assert values["model_type"] == ("t2v", "i2v", "flf2v")[config.images]
    assert values["in_dim"] == (36 if config.images else 16)
    assert dit.config_from_wan(values, shapes, naming=naming) == config.dit
    del values["model_type"]  # the tensors say it too
    assert dit.config_from_wan(values, shapes, naming=naming) == config.dit
    for kind in {"t2v", "i2v", "flf2v"} - {("t2v", "i2v", "flf2v")[config.images]}:
        with pytest.raises(ValueError, match=f"model_type '{kind}'; the tensors are those of"):
            dit.config_from_wan(values | {"model_type": kind}, shapes, naming=naming)
    with pytest.raises(ValueError, match="model_type 'vace'; only checkpoints of t2v, i2v, flf2v"):
        dit.config_from_wan(values | {"model_type": "vace"}, shapes, naming=naming)
    assert dit.config_from_diffusers(dit.config_to_diffusers(config.dit)) == config.dit


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"added_kv_proj_dim": None}, "added_kv_proj_dim = None; 128 is needed"),
        ({"added_kv_proj_dim": 64}, "added_kv_proj_dim = 64; 128 is needed, as in image-to-video"),
        ({"image_dim": None, "pos_embed_seq_len": None}, "added_kv_proj_dim = 128; None is needed"),
        ({"image_dim": None}, "image_positions needs an image_dim"),
        ({"image_dim": 0}, "image_dim is 0; a positive integer is needed"),
        ({"image_dim": "80"}, "image_dim is '80'"),
        ({"pos_embed_seq_len": 10.0}, "pos_embed_seq_len is 10.0"),
        ({"pos_embed_seq_len": 12}, "positions for 12 image tokens, two images have 10"),
        ({"in_channels": 16}, "reads 16 channels; 16 of noise and 20 of known frames are needed"),
    ],
)
def test_values_of_the_dit_config(
    change: dict[str, Any], words: str, diffusers: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(diffusers, tmp_path / "copy"))
    file = path / "transformer" / "config.json"
    file.write_text(json.dumps(NAMES["diffusers"] | change))
    with pytest.raises(ValueError) as error:
        _ = open_folder(path).config
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["3", True, [3.0], float("inf")])
def test_a_second_shift_of_another_kind(value: Any, diffusers: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(diffusers, tmp_path / "copy"))
    file = path / DEFAULTS_FILE
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"shift_480p": 3.0}))
    assert open_folder(path).config.defaults.shift_480p == 3.0
    file.write_text(json.dumps(values | {"shift_480p": value}))
    with pytest.raises(ValueError, match=r"wan_jax\.json (has shift_480p|is not JSON)"):
        open_folder(path)


# Precision.


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "float16"), ("float32", "float32")])
def test_the_tower_is_kept_in_float16(dtype: str, stored: str) -> None:
    """As it runs in the original; its norms are float32 in either mode."""
    assert WIDE.clip is not None
    for name, leaf in trees.flatten(abstract_part(WIDE.clip, jnp.dtype(dtype))).items():
        assert leaf.dtype == ("float32" if "norm" in name else stored), name


# Miniatures.


def test_a_miniature_of_a_tower(tiny_i2v_source: Path) -> None:
    tensors = load_file(tiny_i2v_source / "image_encoder" / "model.safetensors")
    for name, array in tensors.items():
        if "embedding" in name and "patch" not in name:
            assert 0.1 < array.std() < 0.5, name  # beside patches of about 1
    assert miniature.name(TINY) != miniature.name(TINY_I2V) != miniature.name(TINY_FLF2V)
    assert miniature.name(TINY_I2V).startswith("random-nano-i2v-")
    index = json.loads((tiny_i2v_source / "model_index.json").read_text())
    assert index["_class_name"] == "WanImageToVideoPipeline"
