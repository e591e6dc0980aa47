"""One checkpoint in every layout that people have it in gives one set of arrays."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import wan_jax
from tests import manifests
from tests.unit.conftest import TINY
from wan_jax.config import RELEASED, CLIPConfig, UMT5Config, VAEConfig
from wan_jax.weights import clip, dit, miniature, repacks, rules, trees, umt5, vae
from wan_jax.weights.readers import SafetensorsReader
from wan_jax.weights.sources import DEFAULTS_FILE, abstract_part, open_folder, part_table

# The one size that no shape shows is that of a head, which has 128 in all that is released.
WIDE = dataclasses.replace(TINY, dit=dataclasses.replace(TINY.dit, dim=128, num_heads=1))
PARTS = WIDE.dit.parts
Tensors = dict[str, np.ndarray]
# {(part, naming): tensors}, as rules.export gives them
Checkpoint = Mapping[tuple[str, str], Tensors]
SPIECE = np.frombuffer(b"a sentencepiece model", np.uint8)


def read(path: Path, parts: tuple[str, ...] | None = None) -> dict[str, Tensors]:
    """{part: arrays in our layout}, through everything that a conversion goes through."""
    found = {}
    for part, source in open_folder(path, parts).sources.items():
        targets = trees.flatten(abstract_part(source.config, jnp.dtype("float32")))
        names = list(source.reader.shapes())
        plan = rules.resolve(source.table, targets, naming=source.naming, names=names)
        rules.check_shapes(plan, source.reader)
        found[part] = dict(rules.apply(plan, source.reader))
    return found


def assert_same(found: Mapping[str, Tensors], wanted: Mapping[str, Tensors]) -> None:
    for part, arrays in found.items():
        assert arrays.keys() == wanted[part].keys()
        for path, array in arrays.items():
            np.testing.assert_array_equal(array, wanted[part][path], err_msg=path)


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide") / "diffusers"
    miniature.write(path, config=WIDE, seed=3)
    return path


@pytest.fixture(scope="module")
def arrays(diffusers: Path) -> dict[str, Tensors]:
    return read(diffusers)


@pytest.fixture(scope="module")
def state(arrays: dict[str, Tensors]) -> Checkpoint:
    return {
        (part, naming): dict(
            rules.export(part_table(getattr(WIDE, part)), arrays[part], naming=naming)
        )
        for part in PARTS
        for naming in rules.NAMINGS
    }


@pytest.fixture
def folder(diffusers: Path, tmp_path: Path) -> Path:
    """A folder with the tokenizer and the defaults, and no network."""
    path = tmp_path / "copy"
    shutil.copytree(diffusers / "tokenizer", path / "tokenizer")
    shutil.copy(diffusers / DEFAULTS_FILE, path)
    return path


def _save(file: Path, *groups: Tensors) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: array for group in groups for name, array in group.items()}, file)
    return file


def _prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: array for name, array in tensors.items()}


def _shard(file: Path, tensors: Tensors, *, shards: int = 3) -> Path:
    """Shards and their index, which is returned."""
    names = sorted(tensors)
    mapping = {}
    for i in range(shards):
        shard = f"{file.stem}-{i + 1:05}-of-{shards:05}.safetensors"
        _save(file.with_name(shard), {name: tensors[name] for name in names[i::shards]})
        mapping |= dict.fromkeys(names[i::shards], shard)
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    return index


ORIGINAL = {
    "dit": "diffusion_pytorch_model.safetensors",
    "vae": "Wan2.1_VAE.safetensors",
    "umt5": "models_t5_umt5-xxl-enc-bf16.safetensors",
    "clip": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors",
}
DIFFUSERS = {
    "dit": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "umt5": "text_encoder/model.safetensors",
    "clip": "image_encoder/model.safetensors",
}
COMFY = {
    "dit": "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors",
    "vae": "vae/wan_2.1_vae.safetensors",
    "umt5": "text_encoders/umt5_xxl_fp16.safetensors",
    "clip": "clip_vision/clip_vision_h.safetensors",
}
VALUES = {
    "diffusers": {
        "dit": dit.config_to_diffusers(WIDE.dit),
        "vae": vae.config_to_diffusers(WIDE.vae),
        "umt5": umt5.config_to_diffusers(WIDE.umt5),
    },
    "wan": {
        "model_type": "t2v", "dim": 128, "ffn_dim": 64, "num_heads": 1, "num_layers": 2,
        "in_dim": 16, "out_dim": 16, "freq_dim": 32, "text_len": 512, "eps": 1e-6,
    },
}  # fmt: skip


def _of(state: Checkpoint, files: Mapping[str, str]) -> list[tuple[str, str]]:
    """(part, file) of the parts that a checkpoint has."""
    return [(part, file) for part, file in files.items() if (part, "wan") in state]


def _original(path: Path, state: Checkpoint) -> Path:
    for part, file in _of(state, ORIGINAL):
        _save(path / file, state[part, "wan"])
    (path / "google").mkdir()
    (path / "tokenizer").rename(path / "google" / "umt5-xxl")
    return path


def _with_config(path: Path, state: Checkpoint) -> Path:
    _original(path, state)
    (path / "config.json").write_text(json.dumps(VALUES["wan"]))
    return path


def _sharded(path: Path, state: Checkpoint) -> Path:
    _original(path, state)
    for part, file in _of(state, ORIGINAL):
        (path / file).unlink()
        _shard(path / file, state[part, "wan"])
    return path


def _bare_diffusers(path: Path, state: Checkpoint) -> Path:
    """Without any config.json, and without the model_index.json that promises them."""
    for part, file in _of(state, DIFFUSERS):
        _save(path / file, state[part, "diffusers"])
    return path


def _crossed(path: Path, state: Checkpoint) -> Path:
    """Each naming under the other's files, each kind of config.json beside the other's names."""
    for part, file in _of(state, DIFFUSERS):
        _save(path / file, state[part, "wan"])
        values = VALUES["diffusers"][part]
        (path / file).with_name("config.json").write_text(json.dumps(values))
    return path


def _crossed_original(path: Path, state: Checkpoint) -> Path:
    for part, file in _of(state, ORIGINAL):
        _save(path / file, state[part, "diffusers"])
    (path / "config.json").write_text(json.dumps(VALUES["wan"]))
    return path


def _comfy(path: Path, state: Checkpoint) -> Path:
    _save(path / COMFY["dit"], state["dit", "wan"])
    _save(path / COMFY["vae"], state["vae", "wan"])
    _save(path / COMFY["umt5"], state["umt5", "diffusers"], {"spiece_model": SPIECE})
    if ("clip", "diffusers") in state:
        _save(path / COMFY["clip"], state["clip", "diffusers"])
    return path


def _comfy_prefixed(path: Path, state: Checkpoint) -> Path:
    """As in ComfyUI's repository, in its older folders, beside networks of other models."""
    base = path / "split_files"
    _save(base / "unet/wan.safetensors", _prefixed("model.diffusion_model.", state["dit", "wan"]))
    _save(base / "vae/wan.safetensors", _prefixed("first_stage_model.", state["vae", "wan"]))
    _save(base / "vae/flux.safetensors", {"decoder.conv_in.weight": np.zeros((4, 4), np.float32)})
    umt5 = _prefixed("text_encoders.umt5xxl.transformer.", state["umt5", "diffusers"])
    _save(base / "clip/umt5.safetensors", umt5, {"text_encoders.spiece_model": SPIECE})
    return path


def _flat(path: Path, state: Checkpoint) -> Path:
    """One folder with a file for each network, as for the wrapper nodes, beside a LoRA."""
    _save(path / "Wan2_1-T2V-1_3B_bf16.safetensors", state["dit", "wan"])
    _save(path / "Wan2_1_VAE_fp32.safetensors", _prefixed("model.", state["vae", "wan"]))
    _save(path / "umt5-xxl-enc-bf16.safetensors", state["umt5", "wan"])
    if ("clip", "wan") in state:
        _save(path / "clip_visual_fp16.safetensors", state["clip", "wan"])
    lora = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": np.zeros((4, 4), np.float32)}
    _save(path / "lora.safetensors", lora)
    return path


def _one_file(path: Path, state: Checkpoint) -> Path:
    return _save(
        path / "all.safetensors",
        _prefixed("model.diffusion_model.", state["dit", "wan"]),
        _prefixed("vae.", state["vae", "wan"]),
        _prefixed("text_encoders.umt5xxl.transformer.", state["umt5", "diffusers"]),
        {"text_encoders.spiece_model": SPIECE},
        {"text_encoders.umt5xxl.logit_scale": np.array(4.6, np.float32)},
        state.get(("clip", "diffusers"), {}),
    )


def _one_file_other(path: Path, state: Checkpoint) -> Path:
    """Other prefixes, the other naming; the DiT's prefix begins with the VAE's."""
    return _save(
        path / "other.safetensors",
        _prefixed("model.diffusion_model.", state["dit", "diffusers"]),
        _prefixed("model.", state["vae", "diffusers"]),
        _prefixed("umt5xxl.transformer.", state["umt5", "wan"]),
    )


def _one_file_bare_dit(path: Path, state: Checkpoint) -> Path:
    return _save(
        path / "bare.safetensors",
        state["dit", "wan"],
        _prefixed("vae.", state["vae", "wan"]),
        _prefixed("text_encoders.umt5xxl.transformer.", state["umt5", "diffusers"]),
    )


def _mixture(path: Path, state: Checkpoint) -> Path:
    _bare_diffusers(path, state)
    shutil.rmtree(path / "vae")
    shutil.rmtree(path / "text_encoder")
    _save(path / ORIGINAL["vae"], state["vae", "wan"])
    _save(path / COMFY["umt5"], state["umt5", "diffusers"])
    return path


def _variant(path: Path, state: Checkpoint) -> Path:
    """As diffusers names what it saves as a variant."""
    _bare_diffusers(path, state)
    file = path / DIFFUSERS["dit"]
    file.unlink()
    index = _shard(
        file.with_name("diffusion_pytorch_model.fp16.safetensors"), state["dit", "diffusers"]
    )
    index.rename(file.with_name("diffusion_pytorch_model.safetensors.index.fp16.json"))
    return path


def _tied(path: Path, state: Checkpoint) -> Path:
    """The embedding under its second name, and under both."""
    _bare_diffusers(path, state)
    tensors = dict(state["umt5", "diffusers"])
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    _save(path / DIFFUSERS["umt5"], tensors)
    return path


Layout = Callable[[Path, Checkpoint], Path]
LAYOUTS: tuple[Layout, ...] = (
    _original, _with_config, _sharded, _bare_diffusers, _crossed, _crossed_original, _comfy,
    _comfy_prefixed, _flat, _one_file, _one_file_other, _one_file_bare_dit, _mixture, _variant,
    _tied,
)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_arrays(
    layout: Layout, folder: Path, state: Checkpoint, arrays: dict[str, Tensors]
) -> None:
    path = layout(folder, state)
    assert open_folder(path).config == WIDE
    assert_same(read(path), arrays)


@pytest.mark.parametrize("layout", [_original, _comfy, _one_file])
def test_every_layout_gives_the_same_checkpoint(
    layout: Layout, folder: Path, state: Checkpoint, arrays: dict[str, Tensors], tmp_path: Path
) -> None:
    """Written by Orbax and read back."""
    path = layout(folder, state)
    wan = wan_jax.load(path, dtype="float32", cache_dir=tmp_path / "cache", offload=True)
    assert wan.config == WIDE
    found = {
        part: {name: np.asarray(leaf) for name, leaf in trees.flatten(wan.loaders[part]()).items()}
        for part in PARTS
    }
    assert_same(found, arrays)


def test_links_and_read_only_folders(
    folder: Path, state: Checkpoint, arrays: dict[str, Tensors], tmp_path: Path
) -> None:
    """The hub's cache: every file is a link to one of another name, elsewhere."""
    _sharded(folder, state)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, file in enumerate(file for file in sorted(folder.rglob("*")) if file.is_file()):
        file.rename(blobs / str(i))
        file.symlink_to(blobs / str(i))
    places = [folder, *(p for p in folder.rglob("*") if p.is_dir()), blobs, *blobs.iterdir()]
    for place in places:
        place.chmod(0o555 if place.is_dir() else 0o444)
    try:
        assert_same(read(folder), arrays)
        shutil.rmtree(tmp_path / "link", ignore_errors=True)
        (tmp_path / "link").symlink_to(folder)
        assert_same(read(tmp_path / "link"), arrays)
    finally:
        for place in places:
            place.chmod(0o755 if place.is_dir() else 0o644)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_files_are_read_exactly(dtype: Any, folder: Path, state: Checkpoint) -> None:
    narrow = {key: {n: a.astype(dtype) for n, a in group.items()} for key, group in state.items()}
    found = read(_comfy(folder, narrow))
    for part in PARTS:
        tensors = rules.export(part_table(getattr(WIDE, part)), found[part], naming="wan")
        for name, array in tensors:
            np.testing.assert_array_equal(array, narrow[part, "wan"][name].astype(np.float32))


# Parts.


def test_only_the_parts_asked_for(folder: Path, state: Checkpoint) -> None:
    path = _one_file(folder, state)
    whole = open_folder(path)
    assert whole.path == path
    assert list(whole.sources) == list(PARTS)
    assert whole.tokenizer == folder / "tokenizer"
    assert whole.defaults == TINY.defaults
    for part in PARTS:
        one = open_folder(path, (part,))
        assert list(one.sources) == [part]
        assert (one.tokenizer is not None) == (part == "umt5")
        assert (one.defaults is not None) == (part == "dit")
        with pytest.raises(ValueError, match=r"all\.safetensors was opened without \['"):
            _ = one.config
    match = r"no parts \['lora'\]; it has \['dit', 'vae', 'umt5', 'clip'\]"
    with pytest.raises(ValueError, match=match):
        open_folder(path, ("dit", "lora"))
    shutil.rmtree(folder / "tokenizer")
    assert open_folder(path, ("dit", "vae")).tokenizer is None
    with pytest.raises(ValueError, match=r"all\.safetensors has no tokenizer/ and no google/"):
        open_folder(path)


def test_bytes_of_parts_of_one_file(folder: Path, state: Checkpoint) -> None:
    sources = open_folder(_one_file(folder, state)).sources
    for part, source in sources.items():
        naming = "diffusers" if part == "umt5" else "wan"
        assert source.naming == naming
        wanted = sum(array.nbytes for array in state[part, naming].values())
        assert source.reader.nbytes() == wanted
        assert [file.name for file in source.reader.files] == ["all.safetensors"]


@pytest.mark.parametrize("part", PARTS)
def test_a_single_file_of_one_part(part: str, folder: Path, state: Checkpoint) -> None:
    path = _save(folder / "one.safetensors", state[part, "wan"])
    assert list(open_folder(path, (part,)).sources) == [part]
    other = PARTS[PARTS.index(part) - 1]
    title = {"dit": "DiT", "vae": "VAE", "umt5": "UMT5"}
    message = rf"one\.safetensors holds no {title[other]} of Wan2\.1; .*those of {title[part]}$"
    with pytest.raises(ValueError, match=message):
        open_folder(path, (other,))


def test_a_shard_or_the_index_stands_for_all(
    folder: Path, state: Checkpoint, arrays: dict[str, Tensors]
) -> None:
    index = _shard(folder / "x.safetensors", state["dit", "wan"])
    assert_same(read(folder / "x-00002-of-00003.safetensors", ("dit",)), arrays)
    index.rename(folder / "hidden")
    with pytest.raises(ValueError, match="x-00002-of-00003"):
        read(folder / "x-00002-of-00003.safetensors", ("dit",))


def test_the_tokenizer_of_comfyui_folders(folder: Path, state: Checkpoint) -> None:
    """Beside the encoder's folder, for the folder and for the file."""
    _comfy(folder, state)
    assert open_folder(folder).tokenizer == folder / "tokenizer"
    assert open_folder(folder / COMFY["umt5"], ("umt5",)).tokenizer == folder / "tokenizer"
    (folder / "tokenizer").rename(folder / "text_encoders" / "tokenizer")
    assert open_folder(folder).tokenizer == folder / "text_encoders" / "tokenizer"


def test_a_tokenizer_of_another_encoder(diffusers: Path, folder: Path, state: Checkpoint) -> None:
    _comfy(folder, state)
    shape = (128, WIDE.umt5.dim)
    tensors = state["umt5", "diffusers"] | {"shared.weight": np.zeros(shape, np.float32)}
    _save(folder / COMFY["umt5"], tensors)
    with pytest.raises(ValueError, match="tokenizer has 259 tokens and the text encoder 128"):
        open_folder(folder)


# What is missing or not one thing.


def _fails(path: Path, *messages: str, parts: tuple[str, ...] | None = None) -> None:
    with pytest.raises(ValueError) as error:
        open_folder(path, parts)
    assert "\n" not in str(error.value)
    for message in messages:
        assert message in str(error.value)


def test_what_is_missing_is_named(folder: Path, state: Checkpoint, tmp_path: Path) -> None:
    _comfy(folder, state)
    for part, words in (
        ("dit", "has neither transformer/*.safetensors (Diffusers layout) nor diffusion_pytorch"),
        ("vae", "has neither vae/ with safetensors and config.json (Diffusers layout) nor Wan2.1_"),
        ("umt5", "has neither text_encoder/ with safetensors and config.json (Diffusers layout)"),
    ):
        (folder / COMFY[part]).rename(tmp_path / "hidden")
        _fails(folder, str(folder), words)
        _fails(folder, str(folder), words, parts=(part,))
        open_folder(folder, tuple(set(PARTS) - {part}))
        (tmp_path / "hidden").rename(folder / COMFY[part])
    _fails(tmp_path / "nowhere", "nowhere is not a folder")
    _fails(folder / DEFAULTS_FILE, f"{DEFAULTS_FILE} is not a folder and not a .safetensors")


def test_two_files_of_one_part(folder: Path, state: Checkpoint) -> None:
    _flat(folder, state)
    shutil.copy(folder / "Wan2_1_VAE_fp32.safetensors", folder / "another.safetensors")
    _fails(folder, "has 2 files with a VAE: ['Wan2_1_VAE_fp32", "another.safetensors']")
    assert open_folder(folder / "another.safetensors", ("vae",))


def test_t5_is_no_umt5(folder: Path, state: Checkpoint, arrays: dict[str, Tensors]) -> None:
    """Of three layers, as it lies beside UMT5 in ComfyUI's folders."""
    _comfy(folder, state)
    umt5 = state["umt5", "diffusers"]
    t5 = {
        name.replace("block.0.", f"block.{i}."): array
        for i in range(3)
        for name, array in umt5.items()
        if "block.1." not in name and (i == 0 or "relative" not in name)
    }
    file = _save(folder / "text_encoders" / "t5xxl_fp16.safetensors", t5)
    assert_same(read(folder), arrays)
    _fails(file, "t5xxl_fp16.safetensors holds no UMT5", parts=("umt5",))
    (folder / COMFY["umt5"]).unlink()
    _fails(folder, "has neither text_encoder/", parts=("umt5",))


def test_a_folder_that_may_not_be_entered(
    folder: Path, state: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    _comfy(folder, state)

    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    _fails(folder, str(folder), "cannot be read: [Errno 13] Permission denied")


def test_a_broken_link(folder: Path, state: Checkpoint) -> None:
    _flat(folder, state)
    (folder / "gone.safetensors").symlink_to(folder / "nowhere")
    _fails(folder, "gone.safetensors is missing")


def test_a_diffusers_folder_that_lost_a_config(diffusers: Path, tmp_path: Path) -> None:
    for name in ("transformer", "vae", "text_encoder"):
        path = Path(shutil.copytree(diffusers, tmp_path / name))
        (path / name / "config.json").unlink()
        _fails(path, f"{path / name / 'config.json'} is missing")


def test_heads_that_no_shape_shows(tiny_source: Path, tmp_path: Path) -> None:
    file = tmp_path / "dit.safetensors"
    shutil.copy(tiny_source / DIFFUSERS["dit"], file)
    _fails(file, "dit.safetensors: the DiT has width 32", "config.json", parts=("dit",))
    shutil.copy(tiny_source / "transformer" / "config.json", tmp_path)
    assert open_folder(file, ("dit",)).sources["dit"].config == TINY.dit


# Other networks and other numbers.


def _dit(folder: Path, tensors: Tensors, name: str = "x.safetensors") -> Path:
    return _save(folder / name, tensors)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_other_tasks(prefix: str, folder: Path, state: Checkpoint) -> None:
    tensors = state["dit", "wan"]
    bias = np.zeros(128, np.float32)
    wide = {n: np.zeros((128, n, 1, 2, 2), np.float32) for n in (36, 48)}
    for change, words in (
        ({"patch_embedding.weight": wide[36]}, "is a Wan2.2 or Fun checkpoint (its DiT has 36"),
        ({"patch_embedding.weight": wide[48]}, "is a Wan2.2 or control checkpoint"),
        ({"vace_blocks.0.before_proj.bias": bias}, "is a VACE checkpoint"),
    ):
        path = _dit(folder, _prefixed(prefix, tensors | change))
        words_of_all = "x.safetensors is a", "first-last-frame checkpoints of Wan2.1 are supported"
        _fails(path, words, *words_of_all, parts=("dit",))
    path = _dit(folder, {"vace_blocks.0.before_proj.bias": bias})
    _fails(path, "is a VACE checkpoint", parts=("dit",))


def test_wan_2_2(folder: Path, state: Checkpoint) -> None:
    path = _dit(folder, state["dit", "wan"], "wan2.2_t2v_high_noise_14B_fp16.safetensors")
    _fails(path, "is, by its name, half of a Wan2.2 checkpoint", parts=("dit",))
    tensors = state["vae", "wan"] | {"conv2.weight": np.zeros((48, 48, 1, 1, 1), np.float32)}
    path = _save(folder / "vae.safetensors", tensors)
    _fails(path, "48 latent channels is that of Wan2.2", parts=("vae",))
    for name in ("transformer_2", "high_noise_model"):
        (folder / name).mkdir()
        _fails(folder, "has a second transformer, as Wan2.2 does")
        (folder / name).rmdir()


WEIGHT = "blocks.1.ffn.0.weight"
SCALE = np.ones((), np.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({WEIGHT: np.zeros((64, 128), ml_dtypes.float8_e4m3fn)}, "float8_e4m3fn, so its weights"),
        ({WEIGHT: np.zeros((64, 128), ml_dtypes.float8_e5m2)}, "are fp8"),
        ({WEIGHT: np.zeros((64, 128), np.int8)}, "is stored as i8"),
        ({WEIGHT: np.zeros((64, 64), np.uint8)}, "are quantised"),
        ({"scaled_fp8": SCALE}, "fp8 with scales"),
        ({"blocks.0.ffn.0.scale_weight": SCALE}, "fp8 with scales"),
        ({"blocks.0.ffn.0.weight_scale": SCALE}, "fp8 with scales"),
        ({f"{WEIGHT}.absmax": SCALE}, "nf4"),
        ({f"{WEIGHT}.quant_state.bitsandbytes__nf4": SCALE}, "nf4"),
        ({"blocks.0.ffn.0.SCB": SCALE}, "int8"),
    ],
)
def test_quantised_weights(change: Tensors, words: str, folder: Path, state: Checkpoint) -> None:
    for prefix in ("", "model.diffusion_model."):
        path = _dit(folder, _prefixed(prefix, state["dit", "wan"] | change))
        _fails(path, "x.safetensors", words, "take the file in bfloat16", parts=("dit",))


def test_gguf(folder: Path) -> None:
    (folder / "unet").mkdir()
    for file in (folder / "unet" / "wan.gguf", folder / "wan.gguf"):
        file.write_bytes(b"GGUF")
        _fails(file, "wan.gguf is GGUF", "take the file in bfloat16")
        _fails(folder, "wan.gguf is GGUF")
        file.unlink()


def test_tensors_of_no_part(folder: Path, state: Checkpoint) -> None:
    path = _one_file(folder, state)
    tensors = load_file(path)
    _save(path, tensors, {"clip_vision.x": SCALE, "vaex.y": SCALE})
    for parts in (PARTS, ("dit",), ("vae",)):
        _fails(path, "all.safetensors holds 2 tensors that belong to none", "clip", parts=parts)
    path = _save(folder / "mixed.safetensors", state["dit", "wan"], state["vae", "wan"])
    _fails(path, "mixed.safetensors mixes ['dit', 'vae'] without prefixes", parts=("vae",))


# Descriptions.


@pytest.mark.parametrize("naming", rules.NAMINGS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ffn_dim", 10**12), ("ffn_dim", 64.0), ("ffn_dim", True), ("ffn_dim", None),
        ("ffn_dim", [64]), ("num_layers", 10**6), ("num_layers", "2"), ("num_layers", 0),
        ("eps", "1e-6"), ("eps", 1), ("eps", 0.0), ("eps", [1e-6]), ("freq_dim", {}),
    ],
)  # fmt: skip
def test_values_of_the_dit_config(
    naming: str, name: str, value: Any, folder: Path, state: Checkpoint
) -> None:
    path = _dit(folder, state["dit", "wan"])
    values = VALUES["wan"] if naming == "wan" else VALUES["diffusers"]["dit"]
    (folder / "config.json").write_text(json.dumps(values | {name: value}))
    _fails(path, str(folder), name, parts=("dit",))
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k != name}))
    _fails(path, str(folder / "config.json"), name, parts=("dit",))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("dit", "patch_size", [1, 2.0, 2]), ("dit", "patch_size", "122"),
        ("dit", "patch_size", [1, 2]), ("dit", "num_attention_heads", "1"),
        ("dit", "_class_name", "WanVACETransformer3DModel"),
        ("vae", "dim_mult", [1, 2, 2, 2.5]), ("vae", "dim_mult", [1, 2, 2, 10**9]),
        ("vae", "dim_mult", []), ("vae", "dim_mult", [1] * 4000), ("vae", "num_res_blocks", 10**6),
        ("vae", "temperal_downsample", [0, 1, 1]), ("vae", "base_dim", 4.0),
        ("vae", "latents_std", [0.0] * 16), ("vae", "latents_mean", ["a"] * 16),
        ("vae", "latents_mean", [True] * 16), ("vae", "latents_std", 1.0),
        ("umt5", "d_model", "16"), ("umt5", "num_layers", 10**6), ("umt5", "num_heads", 2.0),
        ("umt5", "layer_norm_epsilon", "1"), ("umt5", "relative_attention_num_buckets", 0),
    ],
)  # fmt: skip
def test_values_of_diffusers_configs(
    part: str, name: str, value: Any, diffusers: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(diffusers, tmp_path / "copy"))
    file = (path / DIFFUSERS[part]).with_name("config.json")
    file.write_text(json.dumps(VALUES["diffusers"][part] | {name: value}))
    _fails(path, str(file))


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[1]", "5", '"x"', "null", '{"dim": NaN}', '{"dim": Infinity}', "[" * 10**5,
        '{"dim": 1, "dim": 2}', '{"dim": 1e999}', "\x00", '{"dim": ' + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_json_that_is_none(text: str, folder: Path, state: Checkpoint) -> None:
    path = _dit(folder, state["dit", "wan"])
    for name in ("config.json", DEFAULTS_FILE):
        before = (folder / name).read_text() if (folder / name).exists() else None
        (folder / name).write_text(text)
        _fails(path, str(folder / name), parts=("dit",))
        (folder / name).unlink()
        if before is not None:
            (folder / name).write_text(before)
    (folder / "config.json").write_bytes(b"\xff\xfe")
    _fails(path, str(folder / "config.json"), parts=("dit",))


@pytest.mark.parametrize(
    "change",
    [
        {"size": [832]}, {"size": 832}, {"size": [832, 480.0]}, {"frames": 81.0}, {"steps": "50"},
        {"guidance": "5"}, {"shift": [5.0]}, {"solver": None}, {"fps": True}, {"speed": 3},
        {"negative_prompt": 5}, {"size": ["832", "480"]},
    ],
)  # fmt: skip
def test_defaults_of_the_wrong_kind(
    change: dict[str, Any], folder: Path, state: Checkpoint
) -> None:
    path = _dit(folder, state["dit", "wan"])
    values = json.loads((folder / DEFAULTS_FILE).read_text())
    (folder / DEFAULTS_FILE).write_text(json.dumps(values | change))
    _fails(path, str(folder / DEFAULTS_FILE), next(iter(change)), parts=("dit",))


# Indices.


def test_indices_that_are_wrong(folder: Path, state: Checkpoint) -> None:
    index = _shard(folder / "x.safetensors", state["dit", "wan"])
    text = index.read_text()
    mapping = json.loads(text)["weight_map"]
    first, second, *_ = sorted(mapping)
    shard = {name: mapping[name] for name in (first, second)}
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / mapping[first], outside)
    for change, words in (
        ({first: shard[second], second: shard[first]}, "disagree about 2 tensors"),
        ({first: f"../{outside.name}"}, "it names the file"),
        ({first: str(outside)}, "it names the file"),
        ({first: 3}, "it names the file"),
        ({first: ""}, "it names the file"),
        ({first: index.name}, "it names the file"),
        ({first: "none.safetensors"}, "none.safetensors is missing"),
        ({"more": shard[first]}, "disagree about 1 tensors: ['more']"),
    ):
        index.write_text(json.dumps({"weight_map": mapping | change}))
        _fails(folder, str(folder), words, parts=("dit",))
    index.write_text(json.dumps({"weight_map": {n: f for n, f in mapping.items() if n != first}}))
    _fails(folder, f"disagree about 1 tensors: ['{first}']", parts=("dit",))
    index.write_text(text.replace(f'"{second}"', f'"{first}"'))
    _fails(folder, str(index), "is there twice", parts=("dit",))


def test_files_beside_an_index(folder: Path, state: Checkpoint, arrays: dict[str, Tensors]) -> None:
    """What no index names is no part of the network, unless it is another whole one."""
    _shard(folder / "x.safetensors", state["dit", "wan"])
    some = {WEIGHT: state["dit", "wan"][WEIGHT] + 1}
    _save(folder / "x-00004-of-00004.safetensors", some)
    assert_same(read(folder, ("dit",)), arrays)
    _save(folder / "y.safetensors", state["dit", "wan"])
    _fails(folder, "has 2 files with a DiT", parts=("dit",))
    (folder / "x.safetensors.index.json").unlink()
    _fails(folder, "found 5 without an index", parts=("dit",))


# safetensors itself: what the library checks, and what it does with names.


def _header(file: Path, header: bytes, data: bytes) -> Path:
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return file


def _entry(start: int, end: int, shape: str = "[2]", dtype: str = "F32") -> str:
    return f'{{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [{start}, {end}]}}'


@pytest.mark.parametrize(
    ("header", "size"),
    [
        (f'{{"a": {_entry(0, 8)}, "a": {_entry(8, 16)}}}', 16),  # a name twice, and a hole
        (f'{{"a": {_entry(0, 8)}, "b": {_entry(0, 8)}}}', 8),  # one place for two
        (f'{{"a": {_entry(0, 8)}}}', 16),  # more data
        (f'{{"a": {_entry(0, 8)}}}', 7),  # less data
        (f'{{"a": {_entry(0, 8, "[3]")}}}', 8),
        (f'{{"a": {_entry(0, 8, "[-2]")}}}', 8),
        (f'{{"a": {_entry(0, 8, "[1099511627776, 1099511627776]")}}}', 8),
        (f'{{"a": {_entry(0, 8, dtype="F33")}}}', 8),
        (f'{{"a": {_entry(0, 8, dtype="F16")}}}', 8),
        (f'{{"a\\n": {_entry(0, 8)}}}', 8),  # would break a report's lines
        (f'{{"": {_entry(0, 8)}}}', 8),
        ("[" * 10**5, 0),
        ('{"a": 3}', 0),
    ],
)
def test_headers_that_are_wrong(header: str, size: int, tmp_path: Path) -> None:
    file = _header(tmp_path / "a.safetensors", header.encode(), bytes(size))
    with pytest.raises(ValueError, match=r"^\S*a\.safetensors .{1,500}$"):
        SafetensorsReader([file])


def test_a_name_twice_gives_the_last_of_it(tmp_path: Path) -> None:
    """Only where both are the same bytes: anything else leaves a hole, which is an error."""
    header = f'{{"a": {_entry(0, 8)}, "a": {_entry(0, 8, "[1, 2]")}}}'
    file = _header(tmp_path / "a.safetensors", header.encode(), bytes(8))
    assert SafetensorsReader([file]).shapes() == {"a": ((1, 2), "float32")}


# Released checkpoints, from their names and shapes.

CONFIGS = {
    **{name.lower().replace("-", "_").replace(".", "_"): c.dit for name, c in RELEASED.items()},
    "vae": VAEConfig(),
    "umt5": UMT5Config(),
    "clip": CLIPConfig(),
}
FROM_SHAPES = {
    "dit": dit.config_from_shapes,
    "vae": vae.config_from_shapes,
    "umt5": umt5.config_from_shapes,
    "clip": clip.config_from_shapes,
}


@pytest.mark.parametrize("name", manifests.NAMES)
def test_released_checkpoints_are_recognised(name: str) -> None:
    net, naming = name.split(".")
    part = net if net in FROM_SHAPES else "dit"
    shapes = {tensor: shape for tensor, (shape, _) in manifests.load(name).items()}
    assert repacks.find_claims(shapes) == {part: repacks.Claim(naming, "")}
    for prefix in ("model.", "x."):
        claims = repacks.find_claims([prefix + tensor for tensor in shapes])
        known = prefix == "model." and part not in ("umt5", "clip")
        assert claims == ({part: repacks.Claim(naming, prefix)} if known else {})
    assert FROM_SHAPES[part](shapes, naming) == CONFIGS[net]
    repacks.check_task(shapes, Path("x.safetensors"))
