"""Exports as a user meets them: what is written, what is refused, and what an interruption leaves.

That the tensors are right is in tests/parity.
"""

import collections
import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.unit.conftest import TINY, TINY_FLF2V
from wan_jax.weights import checkpoint, export, layouts, miniature, rules, sources

ROOT = Path(__file__).parents[2]
DIT_FILE = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def converted(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_source in float32; tests copy it before they change it."""
    path = tmp_path_factory.mktemp("converted") / "tiny"
    checkpoint.write(sources.open_folder(tiny_source), path, dtype="float32")
    return path


@pytest.fixture(scope="module")
def image_converted(tiny_flf2v_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As converted, of a checkpoint that takes two images; bfloat16, and CLIP float16."""
    path = tmp_path_factory.mktemp("converted") / "tiny"
    checkpoint.write(sources.open_folder(tiny_flf2v_source), path, dtype="bfloat16")
    return path


@pytest.fixture
def src(converted: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(converted, tmp_path / "src"))


@pytest.fixture
def dst(tmp_path: Path) -> Path:
    """Where nothing is, in a folder of its own."""
    return tmp_path / "exports" / "dst"


def _refused(src: Path, dst: Path, match: str, **settings: Any) -> None:
    """The export fails with this error, of one line, and leaves nothing."""
    before = sorted(dst.parent.rglob("*"))
    with pytest.raises(ValueError, match=match) as caught:
        export.write(src, dst, **({"layout": "diffusers"} | settings))
    assert "\n" not in str(caught.value)
    assert sorted(dst.parent.rglob("*")) == before


def _files(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def _edit_manifest(src: Path, part: str, changes: dict[str, Any]) -> None:
    file = src / checkpoint.MANIFEST
    manifest = json.loads(file.read_text())
    manifest["parts"][part] |= changes
    file.write_text(json.dumps(manifest))


# What is written.


def test_a_whole_checkpoint(converted: Path, dst: Path) -> None:
    export.write(converted, dst, layout="diffusers")
    assert _files(dst) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "transformer/config.json",
        DIT_FILE,
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "wan_jax.json",
    }
    assert not [file for file in dst.parent.iterdir() if file != dst]
    assert (dst / DIT_FILE).stat().st_mode & 0o777 == 0o644
    scheduler = json.loads((dst / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["flow_shift"] == TINY.defaults.shift
    assert sources.open_folder(dst).config == TINY


@pytest.mark.parametrize(
    ("layout", "part", "files"),
    [
        ("diffusers", "dit", {"transformer/config.json", DIT_FILE, "wan_jax.json"}),
        ("diffusers", "vae", {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}),
        ("original", "vae", {"Wan2.1_VAE.safetensors"}),
        (
            "original",
            "umt5",
            {
                "models_t5_umt5-xxl-enc-bf16.safetensors",
                "google/umt5-xxl/tokenizer.json",
                "google/umt5-xxl/tokenizer_config.json",
            },
        ),
    ],
)
def test_a_part(converted: Path, dst: Path, layout: str, part: str, files: set[str]) -> None:
    export.write(converted, dst, layout=layout, parts=[part])
    assert _files(dst) == files
    assert sources.open_folder(dst, [part]).sources[part].config == getattr(TINY, part)


def test_a_checkpoint_of_some_parts(tiny_source: Path, tmp_path: Path) -> None:
    src = tmp_path / "some"
    checkpoint.write(sources.open_folder(tiny_source, ["umt5", "vae"]), src, dtype="bfloat16")
    export.write(src, tmp_path / "dst", layout="original")
    assert set(sources.open_folder(tmp_path / "dst", ["umt5", "vae"]).sources) == {"umt5", "vae"}
    _refused(src, tmp_path / "other", "parts has dit and .*some has not; it has vae,umt5",
             parts=["dit", "vae"])  # fmt: skip


def test_the_original_has_one_file_for_each_but_the_dit(converted: Path, dst: Path) -> None:
    export.write(converted, dst, layout="original", max_shard=20_000)
    names = {file.name for file in dst.glob("*.safetensors")}
    assert {"Wan2.1_VAE.safetensors", "models_t5_umt5-xxl-enc-bf16.safetensors"} < names
    shards = {name for name in names if name.startswith("diffusion_pytorch_model-000")}
    assert len(shards) == len(names) - 2 > 2
    assert sources.open_folder(dst).config == TINY


def test_progress_counts_every_byte_once(converted: Path, dst: Path) -> None:
    told: list[tuple[int, int]] = []
    export.write(
        converted, dst, layout="original", on_bytes=lambda done, total: told.append((done, total))
    )
    done = [pair[0] for pair in told]
    total = sum(array.nbytes for array in _tensors(dst).values())
    assert done == sorted(done)
    assert done[0] == 0 and done[-1] == total
    assert {pair[1] for pair in told} == {total}
    assert done.count(total) == 1


def _tensors(path: Path) -> dict[str, np.ndarray]:
    return {
        f"{file.name} {name}": array
        for file in path.rglob("*.safetensors")
        for name, array in load_file(file).items()
    }


def test_one_parameter_is_in_memory_at_a_time(
    converted: Path, dst: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is gone before the next is read; the tensors of a file are copies."""
    load, kept, alive = export._load, [], []

    def watched(network: Any, targets: Sequence[str]) -> dict[str, np.ndarray]:
        alive.append([name for name, array in kept if array() is not None])
        arrays = load(network, targets)
        assert list(arrays) == list(targets) and len(targets) == 1
        for name, array in arrays.items():
            assert type(array) is np.ndarray
            if "kernel" in name:
                kept.append((name, weakref.ref(array)))
        return arrays

    monkeypatch.setattr(export, "_load", watched)
    monkeypatch.setattr(export, "_GROUP_BYTES", 1)
    export.write(converted, dst, layout="original", parts=["dit"])
    assert len(kept) == 17
    assert not any(alive)


# Images.

DIFFUSERS_FILES = {
    "model_index.json",
    "image_encoder/config.json",
    "image_encoder/model.safetensors",
    "image_processor/preprocessor_config.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    DIT_FILE,
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "wan_jax.json",
}


def test_a_whole_checkpoint_that_takes_images(image_converted: Path, dst: Path) -> None:
    export.write(image_converted, dst, layout="diffusers")
    assert _files(dst) == DIFFUSERS_FILES
    assert sources.open_folder(dst).config == TINY_FLF2V
    index = json.loads((dst / "model_index.json").read_text())
    assert index["_class_name"] == "WanImageToVideoPipeline"
    assert index["image_encoder"] == ["transformers", "CLIPVisionModel"]
    assert index["image_processor"] == ["transformers", "CLIPImageProcessor"]
    processor = json.loads((dst / "image_processor" / "preprocessor_config.json").read_text())
    assert processor["crop_size"] == {"height": 28, "width": 28}
    values = json.loads((dst / "transformer" / "config.json").read_text())
    assert values["added_kv_proj_dim"] == 32 and values["pos_embed_seq_len"] == 10


def test_what_is_written_of_the_tower(
    image_converted: Path, tiny_flf2v_source: Path, dst: Path, tmp_path: Path
) -> None:
    """Its tensors in their own dtype, and a last block that adds nothing; read again, the same."""
    export.write(image_converted, dst, layout="diffusers", parts=["clip"], max_shard=2000)
    assert len(list(dst.glob("image_encoder/model-*.safetensors"))) > 3
    found = {n: a for f in dst.rglob("*.safetensors") for n, a in load_file(f).items()}
    source = load_file(tiny_flf2v_source / "image_encoder" / "model.safetensors")
    assert {array.dtype.name for array in found.values()} == {"float32"}
    for name, array in source.items():
        rounded = array if "norm" in name else array.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(found[name], rounded, err_msg=name)
    more = found.keys() - source.keys()
    last = {name for name in more if name.startswith("vision_model.encoder.layers.2.")}
    norms = {f"vision_model.post_layernorm.{leaf}" for leaf in ("weight", "bias")}
    assert len(last) == 16 and more == last | norms
    for name in more:
        value = float("norm" in name and name.endswith("weight"))
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    again = sources.open_folder(dst, ("clip",))
    checkpoint.write(again, tmp_path / "again", dtype="bfloat16")
    entries = [
        checkpoint.read_manifest(path)["parts"]["clip"]
        for path in (image_converted, tmp_path / "again")
    ]
    for name in ("rules", "tensors", "dtype", "dtypes", "facts_sha256"):
        assert entries[0][name] == entries[1][name], name


def test_the_original_has_no_file_for_the_tower_alone(image_converted: Path, dst: Path) -> None:
    match = rf"text tower.* take the released {layouts.CLIP_PTH} and .* --parts dit,vae,umt5$"
    for parts in (None, ["clip"], ["dit", "clip"]):
        _refused(image_converted, dst, match, layout="original", parts=parts)
    export.write(image_converted, dst, layout="original", parts=["dit", "vae", "umt5"])
    values = json.loads((dst / "config.json").read_text())
    assert (values["model_type"], values["in_dim"]) == ("flf2v", 36)
    assert sources.open_folder(dst, ("dit",)).sources["dit"].config == TINY_FLF2V.dit


def test_a_pipeline_has_all_that_the_dit_needs(image_converted: Path, dst: Path) -> None:
    export.write(image_converted, dst, layout="diffusers", parts=["dit", "vae", "umt5"])
    assert "model_index.json" not in _files(dst)


# Dtypes.


def _converted_half(tmp_path: Path, value: float) -> Path:
    """A checkpoint in bfloat16 of a DiT in float16 with this value in one kernel's first layer."""
    miniature.write(tmp_path / "half", config=TINY)
    file = tmp_path / "half" / DIT_FILE
    tensors = {name: array.astype(np.float16) for name, array in load_file(file).items()}
    tensors["blocks.0.attn1.to_q.weight"][0, 0] = value
    save_file(tensors, file)
    folder = sources.open_folder(tmp_path / "half", ["dit"])
    checkpoint.write(folder, tmp_path / "src", dtype="bfloat16")
    return tmp_path / "src"


def test_a_tensor_keeps_its_stored_dtype_where_its_own_would_lose(
    tmp_path: Path, dst: Path
) -> None:
    """The largest float16 is 65536 in bfloat16, and that is more than float16 holds."""
    src = _converted_half(tmp_path, 65504.0)
    export.write(src, dst, layout="diffusers")
    source, tensors = (load_file(path / DIT_FILE) for path in (tmp_path / "half", dst))
    assert tensors.keys() == source.keys()
    name = "blocks.0.attn1.to_q.weight"
    assert tensors[name].dtype == ml_dtypes.bfloat16
    assert float(tensors[name][0, 0]) == 65536.0
    assert {array.dtype for other, array in tensors.items() if other != name} == {
        np.dtype(np.float16)
    }


def test_a_dtype_that_cannot_hold_the_weights_is_refused(tmp_path: Path, dst: Path) -> None:
    src = _converted_half(tmp_path, 65504.0)
    dst.parent.mkdir()
    match = r"dtype float16 cannot hold blocks\.0\.attn1\.to_q\.weight of the dit.* 6\.55e\+04; "
    _refused(src, dst, match, dtype="float16")
    export.write(src, dst, layout="diffusers", dtype="float32")
    assert {array.dtype.name for array in load_file(dst / DIT_FILE).values()} == {"float32"}


def test_second_names_of_tied_tensors_are_known(src: Path, dst: Path) -> None:
    """The exception stands under the source's name, which is one that is not written."""
    exceptions = {"encoder.embed_tokens.weight": "bfloat16"}
    _edit_manifest(src, "umt5", {"dtypes": exceptions, "naming": "diffusers"})
    # Random float32 numbers would lose in bfloat16, and so would stay.
    kinds = export._open(src, "umt5", layout="original", dtype="source").kinds
    assert kinds["token_embedding.weight"] == ml_dtypes.bfloat16
    assert {kind for name, kind in kinds.items() if name != "token_embedding.weight"} == {
        np.dtype(np.float32)
    }
    export.write(src, dst, layout="original", parts=["umt5"])
    tensors = load_file(dst / "models_t5_umt5-xxl-enc-bf16.safetensors")
    assert tensors["token_embedding.weight"].dtype == np.float32


# What is refused.


def test_what_is_no_checkpoint(tiny_source: Path, tmp_path: Path, dst: Path) -> None:
    for src in (tiny_source, tmp_path / "absent"):
        _refused(
            src, dst, f"src {src} is not a converted checkpoint; needed is a local folder that"
        )


def test_a_dst_that_exists(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "link"):
        _refused(converted, tmp_path / name, f"dst .*{name} exists already; give the name of")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"parts": ["lora"]}, "parts is 'lora'; needed are some of dit,vae,umt5,clip"),
        ({"parts": ["clip"]}, "parts has clip and .*tiny has not; it has dit,vae,umt5"),
        ({"parts": []}, "parts is ''; needed are some of dit,vae,umt5,clip"),
        ({"layout": "comfyui"}, "layout 'comfyui'.*'original', 'diffusers'"),
        ({"dtype": "int8"}, "dtype 'int8'.*'source', 'float32', 'bfloat16', 'float16'"),
        ({"max_shard": 0}, "max_shard_size of 0 bytes .* a positive size"),
    ],
)
def test_wrong_settings(converted: Path, dst: Path, settings: dict[str, Any], match: str) -> None:
    _refused(converted, dst, match, **settings)


def test_a_full_disk(converted: Path, dst: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 2**26))
    _refused(converted, dst, "needs 0.1 GB, 0.1 GB free at .*; choose another --dst")


def test_what_a_layout_has_no_place_for(tmp_path: Path, dst: Path) -> None:
    umt5 = dataclasses.replace(TINY.umt5, eps=1e-5)
    miniature.write(tmp_path / "m", config=dataclasses.replace(TINY, umt5=umt5))
    checkpoint.write(sources.open_folder(tmp_path / "m"), tmp_path / "src", dtype="float32")
    match = "layout original has no place for eps of the umt5.*; use --layout diffusers"
    _refused(tmp_path / "src", dst, match, layout="original")
    export.write(tmp_path / "src", dst, layout="diffusers")
    assert sources.open_folder(dst).config.umt5 == umt5


@pytest.mark.parametrize("layout", export.LAYOUTS)
def test_a_damaged_manifest(src: Path, dst: Path, layout: str) -> None:
    for changes in ({"dtypes": None}, {"dtype": "colour"}, {"naming": "comfyui"}):
        _edit_manifest(src, "vae", changes)
        _refused(src, dst, r"manifest\.json does not say what the vae was", layout=layout)


def test_a_config_of_another_network(src: Path, dst: Path) -> None:
    file = src / checkpoint.CONFIG
    values = json.loads(file.read_text())
    values["dit"]["num_layers"] = 3
    file.write_text(json.dumps(values))
    _refused(src, dst, r"src/dit does not hold the arrays that .*config\.json says")


# Orbax drops the reads that follow a failed one.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_lost_arrays(src: Path, dst: Path) -> None:
    for folder in (src / "vae").rglob("d"):
        shutil.rmtree(folder)
    dst.parent.mkdir()
    _refused(src, dst, "src/vae is not a whole Orbax checkpoint")
    shutil.rmtree(src / "vae")
    _refused(src, dst, "src/vae is not a whole Orbax checkpoint")
    gc.collect()


def test_a_lost_tokenizer(src: Path, dst: Path) -> None:
    shutil.rmtree(src / checkpoint.TOKENIZER)
    _refused(src, dst, "src/tokenizer is missing, which belongs to the umt5")
    export.write(src, dst, layout="diffusers", parts=["dit", "vae"])
    assert sources.open_folder(dst, ["dit", "vae"]).sources.keys() == {"dit", "vae"}


# Interruptions.


def test_an_interrupted_run_leaves_nothing(converted: Path, dst: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            assert list(dst.parent.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export.write(converted, dst, layout="original", max_shard=20_000, on_bytes=interrupt)
    assert not list(dst.parent.iterdir())


def test_what_a_killed_run_left_is_removed(converted: Path, dst: Path) -> None:
    left = dst.parent / f".{dst.name}.partial-abc"
    left.mkdir(parents=True)
    (left / ".writing").touch()
    export.write(converted, dst, layout="original", parts=["vae"])
    assert list(dst.parent.iterdir()) == [dst]


# The script.


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "convert" / "to_safetensors.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"},
        cwd=Path("/"),
    )


def test_the_script_writes_and_says_so(converted: Path, dst: Path) -> None:
    done = _run(
        f"--src={converted}", f"--dst={dst}", "--layout=original", "--parts=vae,dit",
        "--dtype=bfloat16", "--max_shard_size=0.00002",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "export: 100%" in done.stderr and f"wrote {dst}" in done.stderr
    assert {array.dtype.name for array in _tensors(dst).values()} == {"bfloat16"}
    assert len(list(dst.glob("diffusion_pytorch_model-*"))) > 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--dst=x", "--layout=original"], "--src"),
        (["--src={src}", "--dst={src}", "--layout=original"], "exists already"),
        (["--src={src}", "--dst=x", "--layout=comfyui"], "original|diffusers"),
        (["--src={src}", "--dst=x", "--layout=original", "--max_shard_size=-1"], "max_shard_size"),
    ],
)
def test_the_script_refuses_in_one_line(converted: Path, arguments: list[str], text: str) -> None:
    done = _run(*(argument.format(src=converted) for argument in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith("to_safetensors.py: error: ") and text in done.stderr
    assert done.stderr.count("\n") == 1


def test_every_name_of_the_tables_is_written(converted: Path, tmp_path: Path) -> None:
    """In either layout, and no other."""
    for layout, naming in (("original", "wan"), ("diffusers", "diffusers")):
        for part in TINY.dit.parts:
            dst = tmp_path / layout / part
            export.write(converted, dst, layout=layout, parts=[part])
            (file,) = dst.rglob("*.safetensors")
            network = export._open(converted, part, layout=layout, dtype="source")
            shapes = {name: array.shape for name, array in load_file(file).items()}
            assert shapes == network.shapes
            wanted = {name for rule in network.table.rules for name in _expanded(rule, naming)}
            assert shapes.keys() == wanted


def _expanded(rule: rules.Rule, naming: str) -> set[str]:
    layers = TINY.dit.num_layers
    return {rule.source(naming).replace("{i}", str(i)) for i in range(layers)}
