"""Checkpoints from the hub and from buckets, against servers that live in this process."""

import collections
import gc
import importlib.util
import json
import logging
import os
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import wan_jax
from tests.unit import fake_gcs, fake_hub
from tests.unit.conftest import TINY, TINY_I2V
from tests.unit.test_cli import ROOT, parse
from tests.unit.test_image_jobs import parse as parse_images
from wan_jax import jobs, loading
from wan_jax.weights import checkpoint, export, remote, trees
from wan_jax.weights.layouts import CLIP_PTH
from wan_jax.weights.sources import open_folder

ID = "organisation/tiny-model"
PARTS = TINY.dit.parts
GB = 10**9


class Clock:
    """The time module, or asyncio, for code that waits before it tries again."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def sleep(self, seconds: float) -> Any:
        """Not at all."""
        return self._module.sleep(0)


@pytest.fixture
def source(tiny_source: Path, tmp_path: Path) -> Path:
    """A checkpoint with files beside it that nobody needs."""
    folder = tmp_path / "source"
    shutil.copytree(tiny_source, folder)
    for name in ("README.md", "assets/teaser.png", "examples/i2v.safetensors", "config.yaml"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    return folder


@pytest.fixture
def hub(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[fake_hub.FakeHub]:
    """A hub with one model, and an empty cache."""
    from huggingface_hub import constants, file_download, utils

    server = fake_hub.FakeHub(ID, source)
    # The variables that say so are read once, when the library is imported.
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_XET_CACHE": str(tmp_path / "xet"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(file_download, "time", Clock(file_download.time))
    utils.close_session()  # it may be another test's
    yield server
    utils.close_session()
    server.close()


@pytest.fixture(scope="module")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fake_gcs.FakeGCS]:
    """The one server that the clients of this process know."""
    if importlib.util.find_spec("gcsfs") is None:  # importing it would read the environment
        pytest.skip("gs:// needs gcsfs")
    server = fake_gcs.shared()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment(str(tmp_path_factory.mktemp("nowhere"))).items():
            patch.setenv(name, value)
        patch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
        yield server


@pytest.fixture
def gcs(gcs_server: fake_gcs.FakeGCS, monkeypatch: pytest.MonkeyPatch) -> fake_gcs.FakeGCS:
    """Google Cloud Storage with one empty bucket, "bucket"."""
    import gcsfs.retry

    monkeypatch.setattr(gcsfs.retry, "asyncio", Clock(gcsfs.retry.asyncio))
    gcs_server.reset("bucket")
    return gcs_server


def fill(gcs: fake_gcs.FakeGCS, folder: Path, prefix: str) -> None:
    """Put a folder's files into the bucket."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = f"{prefix}/{path.relative_to(folder).as_posix()}"
            gcs.put("bucket", name, path.read_bytes())


def tree(folder: Path) -> dict[str, bytes]:
    """The contents of every file."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def disk_of(free: int) -> Callable[[Any], Any]:
    """A stand-in for shutil.disk_usage."""
    usage = collections.namedtuple("usage", "total used free")
    return lambda _: usage(free, 0, free)


@pytest.mark.parametrize(
    "text",
    ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "a/b", "a/b@main", "a/b@refs/pr/1", "a_b/c.d@v1.0"],
)
def test_ids_of_the_hub(text: str) -> None:
    assert remote.is_hub_id(text)
    assert not remote.is_bucket(text)


@pytest.mark.parametrize(
    "text",
    ["model", "/a/b", "./a", "../a", "~/a", "a/b/c", "a/b/", "a//b", "gs://a/b", "a b/c", "a/b@",
     "a/..", "a/x--y", "a/é", "a/" + "b" * 97, "", "C:\\a/b"],
)  # fmt: skip
def test_what_is_no_id(text: str) -> None:
    assert not remote.is_hub_id(text)


def test_paths_in_buckets() -> None:
    assert remote.is_bucket("gs://bucket/folder")
    assert not remote.is_bucket("/gs/bucket")


NAMES = {
    "transformer/a-00001-of-2.safetensors", "transformer/a.safetensors.index.json",
    "transformer/config.json", "vae/a.safetensors", "vae/config.json",
    "text_encoder/a.safetensors", "text_encoder/config.json", "tokenizer/tokenizer.json",
    "tokenizer/spiece.model", "model_index.json",
}  # fmt: skip
ORIGINAL = {
    "diffusion_pytorch_model-00001-of-2.safetensors",
    "diffusion_pytorch_model.safetensors.index.json", "config.json", "Wan2.1_VAE.pth",
    "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json",
}  # fmt: skip
OTHERS = {"README.md", "scheduler/scheduler_config.json", CLIP_PTH, "examples/a.safetensors"}


@pytest.mark.parametrize("names", [NAMES, ORIGINAL])
def test_files_of_both_layouts_are_wanted_and_nothing_else(names: set[str]) -> None:
    found = remote.wanted_files(names | OTHERS, ("dit", "vae", "umt5"), what="it")
    assert set(found) == names
    assert len(found) == len(names)


def test_of_two_layouts_only_one_is_wanted() -> None:
    assert set(remote.wanted_files(NAMES | ORIGINAL, None, what="it")) == NAMES


IMAGE = {"image_encoder/model.safetensors", "image_encoder/config.json"}


@pytest.mark.parametrize("clip", [IMAGE, {CLIP_PTH}, {CLIP_PTH.replace(".pth", ".safetensors")},
                                  {"clip_vision/clip_vision_h.safetensors"}])  # fmt: skip
@pytest.mark.parametrize("names", [NAMES, ORIGINAL])
def test_the_tower_is_wanted_where_it_is(names: set[str], clip: set[str]) -> None:
    """And missed only by those who ask for it."""
    others = OTHERS - {CLIP_PTH} | {"image_processor/preprocessor_config.json"}
    assert set(remote.wanted_files(names | others, None, what="it")) == names
    assert set(remote.wanted_files(names | others | clip, None, what="it")) == names | clip
    found = remote.wanted_files(names | others | clip, PARTS, what="it")
    assert set(found) == names
    with pytest.raises(ValueError, match=rf"^it is not .* no image_encoder/.* and no {CLIP_PTH}$"):
        remote.wanted_files(names | others, ("clip",), what="it")


def test_patterns_of_every_part() -> None:
    """Spelled out: Diffusers, the original and what this project writes of it, ComfyUI."""
    assert remote._FILES == {
        "dit": (
            ("transformer/*.safetensors", "transformer/*.json"),
            ("diffusion_pytorch_model*.safetensors*", "config.json"),
            ("diffusion_models/*.safetensors",),
        ),
        "vae": (
            ("vae/*.safetensors", "vae/*.json"),
            ("Wan2.1_VAE.pth",),
            ("Wan2.1_VAE.safetensors",),
        ),
        "umt5": (
            ("text_encoder/*.safetensors", "text_encoder/*.json"),
            ("models_t5_umt5-xxl-enc-bf16.pth",),
            ("models_t5_umt5-xxl-enc-bf16.safetensors",),
            ("text_encoders/*.safetensors",),
        ),
        "clip": (
            ("image_encoder/*.safetensors", "image_encoder/*.json"),
            ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",),
            ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors",),
            ("clip_vision/*.safetensors",),
        ),
        "tokenizer": (("tokenizer/*",), ("google/umt5-xxl/*",)),
    }


def test_what_is_exported_is_wanted(source: Path, tmp_path: Path) -> None:
    checkpoint.write(open_folder(source), tmp_path / "orbax", dtype="float32")
    for layout in export.LAYOUTS:
        export.write(tmp_path / "orbax", tmp_path / layout, layout=layout)
        names = set(tree(tmp_path / layout))
        wanted = remote.wanted_files(names, PARTS, what="x")
        assert set(wanted) >= {name for name in names if name.endswith(".safetensors")}


def test_parts_choose_the_files() -> None:
    assert remote.wanted_files(ORIGINAL, ("vae",), what="it") == ["Wan2.1_VAE.pth"]
    with_clip = remote.wanted_files(ORIGINAL | OTHERS, ("vae", "clip"), what="it")
    assert with_clip == ["Wan2.1_VAE.pth", CLIP_PTH]
    assert remote.wanted_files(NAMES, ("umt5",), what="it") == [
        "model_index.json", "text_encoder/a.safetensors", "text_encoder/config.json",
        "tokenizer/spiece.model", "tokenizer/tokenizer.json",
    ]  # fmt: skip


def test_what_is_missing_is_named_before_anything_is_fetched() -> None:
    with pytest.raises(ValueError, match=r"^it is not .* no vae/.* and no Wan2.1_VAE.pth$"):
        remote.wanted_files({n for n in NAMES if "vae" not in n}, None, what="it")
    with pytest.raises(ValueError, match=r"^it has a second transformer"):
        remote.wanted_files(NAMES | {"transformer_2/config.json"}, None, what="it")


def test_space_is_asked_for_where_the_folder_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", disk_of(2 * GB))
    remote.check_space(tmp_path / "not" / "yet", 2 * GB, remedy="do")
    with pytest.raises(ValueError, match=f"^needs 3.0 GB, 2.0 GB free at {tmp_path}; do$"):
        remote.check_space(tmp_path / "not" / "yet", 3 * GB, remedy="do")


def test_hub_brings_what_is_read_once(hub: fake_hub.FakeHub, tmp_path: Path) -> None:
    said: list[str] = []
    folder = remote.download_hub(ID, notify=said.append)
    assert folder.is_relative_to(tmp_path / "hub")
    expected = {
        n for n in hub.files() if n.split("/")[0] not in ("README.md", "assets", "examples")
    }
    assert set(tree(folder)) == expected - {"config.yaml", "scheduler/scheduler_config.json"}
    assert all(data == hub.files()[name].read_bytes() for name, data in tree(folder).items())
    assert open_folder(folder).path == folder
    assert len(said) == 1
    assert ID in said[0]
    hub.requests.clear()
    assert remote.download_hub(ID, notify=said.append) == folder
    assert remote.download_hub(f"{ID}@{fake_hub.COMMIT}", notify=said.append) == folder
    assert [r.method for r in hub.requests] == ["GET", "GET"]
    assert len(said) == 1


def test_hub_brings_the_tower(hub: fake_hub.FakeHub, tiny_i2v_source: Path, tmp_path: Path) -> None:
    """Also again, when there is no network."""
    shutil.copytree(tiny_i2v_source, hub.folder, dirs_exist_ok=True)
    wan = wan_jax.load(ID, cache_dir=tmp_path / "cache", **PLAIN)
    assert wan.config == TINY_I2V
    assert {"image_encoder/config.json", "image_encoder/model.safetensors"} < set(hub.fetched())
    hub.close()
    assert wan_jax.load(ID, cache_dir=tmp_path / "cache", **PLAIN).config == TINY_I2V


def test_hub_brings_the_parts_asked_for(hub: fake_hub.FakeHub) -> None:
    folder = remote.download_hub(f"{ID}@v1", notify=lambda _: None, parts=("vae",))
    names = {"model_index.json", "wan_jax.json"}
    assert {n for n in tree(folder) if not n.startswith("vae/")} == names


def test_hub_goes_on_inside_a_file(hub: fake_hub.FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    cut = "/vae/diffusion_pytorch_model.safetensors"
    seen: list[str] = []

    def once(request: fake_hub.Request) -> int | None:
        if request.method == "GET" and request.path.endswith(cut):
            seen.append(request.headers.get("range", ""))
            return 1000 if len(seen) == 1 else None
        return None

    hub.fault = once
    folder = remote.download_hub(ID, notify=lambda _: None)
    assert seen == ["", "bytes=1000-"]
    assert (folder / cut[1:]).read_bytes() == hub.files()[cut[1:]].read_bytes()


def test_hub_keeps_whole_files_of_a_download_that_stopped(hub: fake_hub.FakeHub) -> None:
    cut = "vae/diffusion_pytorch_model.safetensors"
    hub.fault = lambda r: 0 if r.method == "GET" and r.path.endswith(cut) else None
    with pytest.raises(ValueError, match=rf"^downloading {ID} stopped \(.*\); run again") as error:
        remote.download_hub(ID, notify=lambda _: None)
    assert "\n" not in str(error.value)
    hub.fault = lambda _: None
    done = set(hub.fetched()) - {cut}
    hub.requests.clear()
    folder = remote.download_hub(ID, notify=lambda _: None)
    assert cut in hub.fetched()
    assert not done & set(hub.fetched())
    assert open_folder(folder).path == folder


def test_hub_is_not_needed_for_what_is_here(hub: fake_hub.FakeHub) -> None:
    folder = remote.download_hub(ID, notify=lambda _: None)
    hub.fault = lambda _: (503, "")
    assert remote.download_hub(ID, notify=lambda _: None) == folder
    hub.close()
    assert remote.download_hub(ID, notify=lambda _: None) == folder
    with pytest.raises(ValueError, match=r"^other/one is not a folder here.*local folder is"):
        remote.download_hub("other/one", notify=lambda _: None)


def test_hub_that_cannot_be_reached_has_half_of_it(hub: fake_hub.FakeHub) -> None:
    remote.download_hub(ID, notify=lambda _: None, parts=("vae",))
    hub.close()
    remote.download_hub(ID, notify=lambda _: None, parts=("vae",))
    with pytest.raises(ValueError, match="hub cannot be reached"):
        remote.download_hub(ID, notify=lambda _: None)


@pytest.mark.parametrize(
    ("text", "fault", "match"),
    [
        ("no/such", None, rf"^no/such is neither a folder .* looks like {remote.EXAMPLE}"),
        (f"{ID}@v9", None, rf"^{ID} has no revision 'v9'; "),
        (ID, (401, "GatedRepo"), rf"^{ID} is gated: .*`hf auth login`$"),
        (ID, (403, "GatedRepo"), rf"^{ID} is gated: .*`hf auth login`$"),
        (ID, (401, ""), rf"^{ID} may not be read with your token; .*`hf auth login`"),
        (ID, (403, ""), rf"^{ID} may not be read with your token; .*`hf auth login`"),
        (ID, (503, ""), rf"^downloading {ID} stopped \(.*503"),
    ],
)
def test_hub_errors_are_one_line(
    hub: fake_hub.FakeHub, text: str, fault: tuple[int, str] | None, match: str
) -> None:
    hub.fault = lambda _: fault
    with pytest.raises(ValueError, match=match) as error:
        remote.download_hub(text, notify=lambda _: None)
    assert "\n" not in str(error.value)


def test_hub_tells_gated_only_when_files_are_asked_for(hub: fake_hub.FakeHub) -> None:
    hub.fault = lambda r: (403, "GatedRepo") if "/resolve/" in r.path else None
    with pytest.raises(ValueError, match="is gated: accept its terms at"):
        remote.download_hub(ID, notify=lambda _: None)


def test_hub_model_of_another_kind_is_not_fetched(hub: fake_hub.FakeHub) -> None:
    shutil.rmtree(hub.folder / "text_encoder")
    with pytest.raises(ValueError, match=f"^{ID} is not a Wan2.1 checkpoint: .*text_encoder/"):
        remote.download_hub(ID, notify=lambda _: None)
    assert not hub.fetched()


def test_hub_looks_for_space_for_what_is_missing(
    hub: fake_hub.FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", disk_of(100))
    with pytest.raises(ValueError, match=r"^needs .* GB free at .*; set HF_HOME to"):
        remote.download_hub(ID, notify=lambda _: None)
    assert not hub.fetched()


def test_hub_with_all_files_here_needs_no_space(
    hub: fake_hub.FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = remote.download_hub(ID, notify=lambda _: None)
    monkeypatch.setattr(shutil, "disk_usage", disk_of(0))
    assert remote.download_hub(ID, notify=lambda _: None) == folder


def test_bucket_brings_what_is_read_once(
    gcs: fake_gcs.FakeGCS, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(gcs, source, "models/tiny")
    gcs.page = 3
    monkeypatch.setattr(remote, "_PIECE", 20_000)
    told: list[tuple[int, int]] = []
    said: list[str] = []

    def call(path: str = "gs://bucket/models/tiny") -> Path:
        return remote.download_bucket(
            path, tmp_path / "cache", notify=said.append, callback=lambda *n: told.append(n)
        )

    folder = call()
    assert folder.parent == tmp_path / "cache"
    assert folder.name.startswith("tiny-")
    assert open_folder(folder).path == folder
    assert set(tree(folder).items()) < set(tree(source).items())
    assert "README.md" not in tree(folder)
    total = sum(map(len, tree(folder).values()))
    assert told[-1] == (total, total)
    assert told == sorted(told)
    assert len(said) == 1
    before = len([r for r in gcs.requests if r.query.get("alt") == "media"])
    assert call("gs://bucket/models/tiny/") == folder
    assert len([r for r in gcs.requests if r.query.get("alt") == "media"]) == before
    assert len(said) == 1
    gcs.put("bucket", "models/tiny/wan_jax.json", (source / "wan_jax.json").read_bytes())
    assert call() != folder


def test_bucket_download_goes_on_with_the_files_that_are_missing(
    gcs: fake_gcs.FakeGCS, source: Path, tmp_path: Path
) -> None:
    fill(gcs, source, "tiny")
    cut = "vae%2Fdiffusion_pytorch_model.safetensors"
    gcs.fault = lambda r: -10 if "download" in r.path and r.path.endswith(cut) else None
    with pytest.raises(ValueError, match=r"^gs://bucket/tiny/vae/.* cannot be used: "):
        remote.download_bucket("gs://bucket/tiny", tmp_path, notify=lambda _: None)
    assert not list(tmp_path.rglob("*.partial*"))
    gcs.fault = lambda _: None
    gcs.requests.clear()
    folder = remote.download_bucket("gs://bucket/tiny", tmp_path, notify=lambda _: None)
    fetched = [r.path for r in gcs.requests if r.query.get("alt") == "media"]
    assert fetched[0].endswith(cut)
    assert len(fetched) < len(tree(folder))
    assert open_folder(folder).path == folder


def test_bucket_looks_for_space(
    gcs: fake_gcs.FakeGCS, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(gcs, source, "tiny")
    monkeypatch.setattr(shutil, "disk_usage", disk_of(100))
    with pytest.raises(ValueError, match=r"^needs .* GB free at .*; set cache_dir to"):
        remote.download_bucket("gs://bucket/tiny", tmp_path / "c", notify=lambda _: None)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("path", "fault", "match"),
    [
        ("gs://none/tiny", None, r"^gs://none/tiny is not there"),
        ("gs://bucket/none", None, r"^gs://bucket/none is not there"),
        ("gs://bucket/other", None, r"^gs://bucket/other is not a Wan2.1 checkpoint: "),
        ("gs://bucket/tiny", 401, r"^gs://bucket/tiny may not be used .*`gcloud auth "),
        ("gs://bucket/tiny", 403, r"^gs://bucket/tiny may not be used .*`gcloud auth "),
        ("gs://bucket/tiny", 503, r"^gs://bucket/tiny cannot be used: "),
    ],
)
def test_bucket_errors_are_one_line(
    gcs: fake_gcs.FakeGCS,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    path: str,
    fault: int | None,
    match: str,
) -> None:
    gcs.put("bucket", "other/notes.txt", b"")
    gcs.fault = lambda _: fault
    with pytest.raises(ValueError, match=match) as error:
        remote.download_bucket(path, tmp_path, notify=lambda _: None)
    assert "\n" not in str(error.value)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_bucket_without_gcsfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def absent(protocol: str) -> None:
        raise ImportError(f"install gcsfs for {protocol}")

    monkeypatch.setattr(fsspec, "filesystem", absent)
    with pytest.raises(ValueError, match=r"^gs://bucket/tiny needs gcsfs: `pip install gcsfs`"):
        remote.download_bucket("gs://bucket/tiny", tmp_path, notify=lambda _: None)
    with pytest.raises(ValueError, match="needs gcsfs"):
        remote.bucket_path("gs://bucket/tiny")


def test_bucket_path_sees_what_others_write(gcs: fake_gcs.FakeGCS) -> None:
    gcs.put("bucket", "c/config.json", b"{}")
    path = remote.bucket_path("gs://bucket/c")
    assert os.fspath(path) == "gs://bucket/c"
    assert [child.name for child in path.iterdir()] == ["config.json"]
    gcs.put("bucket", "c/manifest.json", b"{}")
    assert (path / "manifest.json").is_file()
    assert (path / "config.json").read_text(encoding="utf-8") == "{}"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder as conversion leaves it, with one network of two groups of arrays."""
    from orbax.checkpoint.experimental.v1 import partial

    folder = tmp_path_factory.mktemp("converted") / "whole"
    arrays = {f"blocks.{n}.kernel": np.full((3, 5), n, np.float32) for n in range(4)}
    for names in (list(arrays)[:2], list(arrays)[2:]):
        partial.save(folder / "dit", {name: arrays[name] for name in names})
    partial.finalize(folder / "dit")
    (folder / "config.json").write_text("{}")
    (folder / "manifest.json").write_text("{}")
    return folder, arrays


def test_arrays_are_restored_from_a_bucket(
    gcs: fake_gcs.FakeGCS, converted: tuple[Path, dict[str, np.ndarray]]
) -> None:
    import jax
    import orbax.checkpoint.experimental.v1 as ocp

    folder, arrays = converted
    told: list[tuple[int, int]] = []
    remote.upload_folder(
        folder, "gs://bucket/whole/", last="manifest.json", callback=lambda *n: told.append(n)
    )
    blobs = gcs.buckets["bucket"]
    assert {name: blob.data for name, blob in blobs.items()} == {
        f"whole/{name}": data for name, data in tree(folder).items()
    }
    total = sum(map(len, tree(folder).values()))
    assert told == sorted(told)
    assert told[-1] == (total, total)
    order = sorted(blobs, key=lambda name: blobs[name].generation)
    assert order[-1] == "whole/manifest.json"
    index = [n for n, name in enumerate(order) if name.endswith("manifest.ocdbt")]
    assert max(n for n, name in enumerate(order) if "/d/" in name) < min(index)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where) for n, a in arrays.items()}
    restored = ocp.load(remote.bucket_path("gs://bucket/whole") / "dit", wanted)
    for name, array in arrays.items():
        np.testing.assert_array_equal(restored[name], array)


def test_an_upload_that_stops_leaves_nothing_behind(
    gcs: fake_gcs.FakeGCS, converted: tuple[Path, dict[str, np.ndarray]]
) -> None:
    gcs.put("bucket", "whole/other.txt", b"another's")

    def fault(request: fake_gcs.Request) -> int | None:
        late = len(gcs.buckets["bucket"]) > 6
        return 403 if request.path.startswith("/upload/") and late else None

    gcs.fault = fault
    with pytest.raises(ValueError, match=r"^gs://bucket/whole may not be used"):
        remote.upload_folder(converted[0], "gs://bucket/whole", last="manifest.json")
    assert set(gcs.buckets["bucket"]) == {"whole/other.txt"}


def test_an_upload_that_stops_leaves_what_another_host_has_finished(
    gcs: fake_gcs.FakeGCS, converted: tuple[Path, dict[str, np.ndarray]]
) -> None:
    remote.upload_folder(converted[0], "gs://bucket/whole", last="manifest.json")
    whole = set(gcs.buckets["bucket"])
    gcs.fault = lambda r: 403 if r.path.startswith("/upload/") else None
    with pytest.raises(ValueError, match=r"^gs://bucket/whole may not be used"):
        remote.upload_folder(converted[0], "gs://bucket/whole", last="manifest.json")
    assert set(gcs.buckets["bucket"]) == whole


# load() and the scripts.

PLAIN: dict[str, Any] = {"offload": True}


def same(wan: wan_jax.Wan, arrays: dict[str, np.ndarray]) -> None:
    found = {
        f"{part}.{name}": np.asarray(leaf)
        for part in PARTS
        for name, leaf in trees.flatten(wan.network(part)).items()
    }
    assert found.keys() == arrays.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> dict[str, np.ndarray]:
    """The arrays of `source`, converted as any folder is."""
    wan = wan_jax.load(source, cache_dir=tmp_path / "plain", **PLAIN)
    return {
        f"{part}.{name}": np.asarray(leaf)
        for part in PARTS
        for name, leaf in trees.flatten(wan.network(part)).items()
    }


def test_load_takes_a_hub_id(
    hub: fake_hub.FakeHub, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    said: list[str] = []
    wan = wan_jax.load(ID, cache_dir=tmp_path / "cache", notify=said.append, **PLAIN)
    same(wan, expected)
    assert [text.split()[0] for text in said] == ["downloading", "converting"]
    said.clear()
    same(wan_jax.load(ID, cache_dir=tmp_path / "cache", notify=said.append, **PLAIN), expected)
    assert not said


def test_wrong_flags_are_said_before_a_download(
    hub: fake_hub.FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = parse("--ckpt_dir", ID, "--frame_num", "80")
    with pytest.raises(ValueError, match="--frame_num is 80"):
        jobs.plan(values, ROOT / "configs")
    assert set(hub.fetched()) <= {"transformer/config.json"}
    values = parse("--ckpt_dir", "organisation/nothing")
    with pytest.raises(ValueError, match=r"--ckpt_dir organisation/nothing: .* neither a folder"):
        jobs.plan(values, ROOT / "configs")
    (job,) = jobs.plan(parse("--ckpt_dir", ID), ROOT / "configs").jobs
    assert job.settings["frames"] == 5
    assert job.output.name.startswith("tiny-model_32*16_1_1_")


@pytest.mark.parametrize("place", [ID, "gs://bucket/tiny"])
def test_a_checkpoint_of_another_kind_is_refused_before_a_download(
    place: str,
    hub: fake_hub.FakeHub,
    gcs: fake_gcs.FakeGCS,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48)).save("a.png")
    fill(gcs, source, "tiny")
    line = ("--ckpt_dir", place, "--image", "a.png", "--prompt", "x")
    with pytest.raises(ValueError, match=f"--ckpt_dir {place} is a text-to-video checkpoint; run_"):
        jobs.plan(parse_images(*line), ROOT / "configs")
    with pytest.raises(ValueError, match="is a text-to-video checkpoint; run_t2v.py runs those"):
        jobs.plan(parse_images(*line, "--task", "i2v-14B"), ROOT / "configs")
    file = source / "transformer" / "config.json"
    two = {"image_dim": 1280, "added_kv_proj_dim": 32, "pos_embed_seq_len": 514}
    for more, kind in ((two, "a first-and-last-frame"), ({"image_dim": 1280}, "an image-to-video")):
        changed = json.dumps(json.loads(file.read_text()) | more)
        monkeypatch.setattr(remote, "peek", lambda text: json.loads(changed))  # noqa: B023
        with pytest.raises(ValueError, match=f"is {kind} checkpoint; run_i2v.py runs those"):
            jobs.plan(parse("--ckpt_dir", place), ROOT / "configs")
    assert set(hub.fetched()) <= {"transformer/config.json"}
    assert not [r for r in gcs.requests if "safetensors" in r.path]


def test_load_takes_pytorch_files_in_a_bucket(
    gcs: fake_gcs.FakeGCS, source: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    fill(gcs, source, "tiny")
    told: list[str] = []
    wan = wan_jax.load(
        "gs://bucket/tiny",
        cache_dir=tmp_path / "cache",
        callback=lambda progress: told.append(progress.stage),
        **PLAIN,
    )
    same(wan, expected)
    assert {"download", "convert"} <= set(told)


def test_a_cache_in_a_bucket_serves_every_machine(
    gcs: fake_gcs.FakeGCS,
    source: Path,
    expected: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    said: list[str] = []
    other = shutil.copytree(source, tmp_path / "other" / source.name)  # as on another machine
    for file in other.rglob("*.*"):
        os.utime(file, (1, 1))
    for folder in (source, other):
        same(wan_jax.load(folder, cache_dir="gs://bucket/c", notify=said.append, **PLAIN), expected)
    assert len(said) == 1
    assert said[0].startswith(f"converting {source} once into gs://bucket/c/source-bfloat16-")
    assert not list((tmp_path / "home").rglob("*.json"))  # nothing stays on this machine
    (place,) = {str(path.parent) for path in remote.bucket_path("gs://bucket/c").glob("*/*.json")}
    same(wan_jax.load(place, **PLAIN), expected)
    assert loading.read_config(loading.fetch(place)) == TINY


# Orbax drops the reads that follow a failed one.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_conversion_goes_into_a_bucket(
    gcs: fake_gcs.FakeGCS,
    source: Path,
    expected: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    target = remote.bucket_path("gs://bucket/out")
    scratch = tmp_path / "scratch"
    loading.convert(open_folder(source), target, dtype="bfloat16", scratch=scratch)
    assert not list(scratch.iterdir())
    same(wan_jax.load("gs://bucket/out", **PLAIN), expected)
    with pytest.raises(ValueError, match=r"gs://bucket/none"):
        wan_jax.load("gs://bucket/none", cache_dir=tmp_path / "cache")
    for name in [name for name in gcs.objects("bucket") if "/dit/" in name and "/d/" in name]:
        del gcs.objects("bucket")[name]
    with pytest.raises(ValueError, match=r"gs://bucket/out/dit is not a whole Orbax checkpoint"):
        wan_jax.load("gs://bucket/out", **PLAIN).network("dit")
    gc.collect()
