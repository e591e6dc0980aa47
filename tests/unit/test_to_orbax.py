"""convert/to_orbax.py and what a conversion keeps: parts, hashes, locks, and what is refused."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import wan_jax
from tests.unit.conftest import TINY, TINY_I2V
from tests.unit.test_cli import ROOT
from wan_jax import loading
from wan_jax.weights import checkpoint, folders, trees
from wan_jax.weights.sources import open_folder

SCRIPT = ROOT / "convert" / "to_orbax.py"
DIT = "transformer/diffusion_pytorch_model.safetensors"


def convert(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def source(tiny_source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_source, tmp_path / "source"))


def arrays(path: Path) -> dict[str, np.ndarray]:
    wan = wan_jax.load(path, offload=True)
    return {
        f"{part}.{name}": np.asarray(leaf)
        for part in wan.loaders
        for name, leaf in trees.flatten(wan.loaders[part]()).items()
    }


def test_the_script_converts_at_once_or_part_by_part(source: Path, tmp_path: Path) -> None:
    done = convert("--src", "source", "--dry_run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"dit: \d+ tensors \(diffusers names, float32\) -> \d+ arrays", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    done = convert("--src", "source", "--dst", "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "convert: 100%" in done.stderr
    for parts in ("vae", "dit,umt5"):
        done = convert("--src", "source", "--dst", "parts", "--parts", parts, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        if parts == "vae":
            with pytest.raises(ValueError, match=r"has no dit, umt5; add with .*--parts dit,umt5"):
                wan_jax.load(tmp_path / "parts")
    one, two = arrays(tmp_path / "whole"), arrays(tmp_path / "parts")
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name])
    digests = [checkpoint.read_manifest(tmp_path / n)["digest"] for n in ("whole", "parts")]
    assert digests[0] == digests[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "source", "whole"]
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        "config.json",
        "dit",
        "manifest.json",
        "tokenizer",
        "umt5",
        "vae",
    ]


def test_the_script_converts_what_takes_images(tiny_i2v_source: Path, tmp_path: Path) -> None:
    """All that there is, if nothing is said; and one part more, where it is missing."""
    source = str(tiny_i2v_source)
    done = convert("--src", source, "--dry_run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^clip: 37 tensors \(diffusers names, float32\) -> 17 arrays \(float16, float32\)",
        done.stderr,
        re.MULTILINE,
    )
    done = convert("--src", source, "--dst", "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert wan_jax.load(tmp_path / "whole", offload=True).config == TINY_I2V
    done = convert("--src", source, "--dst", "whole", cwd=tmp_path)
    assert done.returncode == 2
    assert "whole has dit, vae, umt5, clip already; give another name" in done.stderr
    for parts in ("dit,vae,umt5", "clip"):
        done = convert("--src", source, "--dst", "parts", "--parts", parts, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        if parts != "clip":
            with pytest.raises(ValueError, match=r"parts has no clip; add with .*--parts clip"):
                wan_jax.load(tmp_path / "parts")
    one, two = arrays(tmp_path / "whole"), arrays(tmp_path / "parts")
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--src is missing"),
        (["--src", "source"], "--dst is missing"),
        (["--src", "nowhere", "--dst", "x"], "--src nowhere: "),
        (["--src", "nano-i2v", "--dst", "x"], "--src nano-i2v: it is made of random numbers"),
        (["--src", "source", "--dst", "source"], "source exists and is no checkpoint"),
        (["--src", "source", "--dst", "/proc/1/x"], "--dst /proc/1/x: /proc/1 is no folder"),
        (["--src", "source", "--dst", "x", "--parts", "lora"], "--parts has ['lora']; some of dit"),
        (["--src", "source", "--dst", "x", "--parts", "clip"], "has neither image_encoder/ with"),
        (["--src", "source", "--dst", "x", "--parts", ""], "--parts"),
        (["--src", "source", "--dst", "x", "--dtype", "float16"], "--dtype"),
        (["--src", "source/vae", "--dst", "x"], "--src source/vae: "),
    ],
)
def test_what_the_script_refuses(
    arguments: list[str], words: str, source: Path, tmp_path: Path
) -> None:
    done = convert(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.startswith("to_orbax.py: error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_manifest_tells_where_everything_came_from(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / DIT)
    tensors["proj_out.bias"] = tensors["proj_out.bias"].astype(np.float16)
    save_file(tensors, source / DIT)
    checkpoint.write(open_folder(source), tmp_path / "out", dtype="bfloat16")
    manifest = checkpoint.read_manifest(tmp_path / "out")
    assert set(manifest["parts"]) == set(TINY.dit.parts)
    entry = manifest["parts"]["dit"]
    data = (source / DIT).read_bytes()
    facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert entry["files"] == {Path(DIT).name: facts}
    assert entry["tensors"] == len(tensors)
    assert entry["rules"] == len(trees.flatten(wan_jax.load(tmp_path / "out").network("dit")))
    assert (entry["dtype"], entry["dtypes"]) == ("float32", {"proj_out.bias": "float16"})
    assert wan_jax.load(tmp_path / "out", offload=True).digest == manifest["digest"]
    moved = Path(shutil.copytree(source, tmp_path / "elsewhere"))
    checkpoint.write(open_folder(moved), tmp_path / "again", dtype="float32")
    assert checkpoint.read_manifest(tmp_path / "again")["digest"] == manifest["digest"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tensor_with_nan_is_named(value: float, source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / DIT)
    name = "blocks.1.attn1.to_q.weight"
    tensors[name][3, 4] = value
    save_file(tensors, source / DIT)
    with pytest.raises(ValueError, match=rf"{re.escape(str(source / DIT))} is damaged: {name}"):
        checkpoint.write(open_folder(source), tmp_path / "out", dtype="bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_too_little_disk_is_said_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    with pytest.raises(
        ValueError, match=r"needs 0\.1 GB, 0\.0 GB free at .*choose another cache_dir"
    ):
        wan_jax.load(source, cache_dir=tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_parts_that_do_not_fit_are_not_added(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    checkpoint.write(open_folder(source, ("dit", "vae")), out, dtype="bfloat16")
    before = sorted(path for path in out.rglob("*") if path.is_file())
    other = json.loads((source / "text_encoder" / "config.json").read_text())
    with pytest.raises(ValueError, match="has vae already"):
        checkpoint.add(open_folder(source, ("vae",)), out, remedy="")
    folder = open_folder(source, ("umt5",))
    narrow = folder.sources["umt5"].config.__class__(**(TINY.umt5.to_dict() | {"dim": 8}))
    object.__setattr__(folder.sources["umt5"], "config", narrow)
    with pytest.raises(
        ValueError, match="source does not fit .*out: the DiT reads text of width 16"
    ):
        checkpoint.add(folder, out, remedy="")
    assert sorted(path for path in out.rglob("*") if path.is_file()) == before
    assert other["d_model"] == 16


def test_a_source_that_changes_meanwhile_is_refused(source: Path, tmp_path: Path) -> None:
    def change(done: int, total: int) -> None:
        (source / DIT).touch()

    with pytest.raises(ValueError, match=rf"{re.escape(str(source / DIT))} changed while it was"):
        checkpoint.write(open_folder(source), tmp_path / "out", dtype="bfloat16", on_bytes=change)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_digest_tells_configurations_and_tokenizers_apart(source: Path, tmp_path: Path) -> None:
    def digest(name: str) -> str:
        checkpoint.write(open_folder(source), tmp_path / name, dtype="bfloat16")
        return str(checkpoint.read_manifest(tmp_path / name)["digest"])

    digests = [digest("a")]
    config = source / "transformer" / "config.json"
    values = json.loads(config.read_text())
    heads = {"num_attention_heads": 1, "attention_head_dim": 32}
    config.write_text(json.dumps(values | heads))
    digests.append(digest("b"))
    config.write_text(json.dumps(values))
    tokenizer = source / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    digests.append(digest("c"))
    assert len(set(digests)) == 3


def test_numbers_that_the_dtype_cannot_hold_are_refused(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / DIT)
    name = "blocks.1.attn1.to_q.weight"
    tensors[name][0, 0] = 3.4e38
    save_file(tensors, source / DIT)
    with pytest.raises(ValueError, match=rf"{name} goes up to 3\.[34].*e\+38, beyond bfloat16"):
        checkpoint.write(open_folder(source), tmp_path / "out", dtype="bfloat16")
    checkpoint.write(open_folder(source), tmp_path / "full", dtype="float32")
    tensors[name] = tensors[name].astype(np.float64)
    save_file(tensors, source / DIT)
    with pytest.raises(ValueError, match=rf"{name} is stored as float64"):
        checkpoint.write(open_folder(source), tmp_path / "out", dtype="float32")


def test_links_and_files_are_no_place_for_a_checkpoint(source: Path, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big")
    (tmp_path / "file").touch()
    wrong = {"link": "is a link", "file": "exists and is no checkpoint", "x[1]": "Orbax cannot"}
    for name, words in wrong.items():
        with pytest.raises(ValueError, match=words):
            checkpoint.write(open_folder(source), tmp_path / name, dtype="bfloat16")
    checkpoint.write(open_folder(source), tmp_path / "big", dtype="bfloat16")
    assert checkpoint.is_checkpoint(tmp_path / "big")


def test_a_second_name_of_other_shape_is_refused(source: Path, tmp_path: Path) -> None:
    file = source / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.embed_tokens.weight"] = np.zeros((3, 3), np.float32)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"encoder\.embed_tokens\.weight is not the same as"):
        checkpoint.plan(open_folder(source), "bfloat16")


# Processes that are killed, or race.


def test_two_that_add_parts_at_once_lose_nothing(source: Path, tmp_path: Path) -> None:
    """Whoever comes second waits and finds the other's part there, whatever the order."""
    runs = [
        subprocess.Popen(
            [sys.executable, SCRIPT, "--src", "source", "--dst", "x", "--parts", part],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.DEVNULL,
        )
        for part in ("dit", "vae", "umt5")
    ]
    assert [run.wait(120) for run in runs] == [0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "x"]
    assert wan_jax.load(tmp_path / "x", offload=True).config == TINY
    assert set(arrays(tmp_path / "x")) == set(arrays_of(source, tmp_path))


def arrays_of(source: Path, tmp_path: Path) -> dict[str, np.ndarray]:
    checkpoint.write(open_folder(source), tmp_path / "whole", dtype="bfloat16")
    return arrays(tmp_path / "whole")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_one_line_and_nothing_else_to_stay(
    signum: int, source: Path, tmp_path: Path
) -> None:
    for _ in range(3):
        # A thread of Orbax may write on when its folder has been removed; the next run sweeps that.
        (tmp_path / "cache").mkdir(exist_ok=True)
        before = set((tmp_path / "cache").glob(".out.partial-*"))
        with subprocess.Popen(
            [sys.executable, SCRIPT, "--src", "source", "--dst", "cache/out"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        ) as run:
            while not set((tmp_path / "cache").glob(".out.partial-*")) - before:
                assert run.poll() is None
                time.sleep(0.005)
            run.send_signal(signum)
            assert run.stderr is not None
            said = run.stderr.read()
        if checkpoint.is_checkpoint(tmp_path / "cache" / "out"):  # it had come to its end
            assert run.returncode in (0, -signum)  # a signal finds no handler while Python exits
            shutil.rmtree(tmp_path / "cache" / "out")
            continue
        assert run.returncode == 128 + signum
        assert "the same command starts anew" in said
    out = tmp_path / "cache" / "out"
    with folders.alone(out):
        pass
    assert not list((tmp_path / "cache").iterdir())


def test_what_a_killed_process_left_is_swept(source: Path, tmp_path: Path) -> None:
    """SIGKILL at moments from the first write on; nothing that loads, then everything."""
    out = tmp_path / "cache" / "out"
    for moment in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, str(source), str(out), str(moment)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        )
        deadline = time.monotonic() + 60
        while len(list(out.parent.glob(".out.partial-*/reached"))) <= moment:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(list(out.parent.glob(".out.partial-*"))) == 1 + moment  # nobody has swept yet
        assert not checkpoint.is_checkpoint(out)
        with pytest.raises(ValueError):
            wan_jax.load(out)
    with folders.alone(out):
        checkpoint.write(open_folder(source), out, dtype="bfloat16")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert wan_jax.load(out, offload=True).config == TINY


# A conversion that stops for good at its Nth network, having told where it is.
SLOW = """
import sys, time
from pathlib import Path
from wan_jax.weights import checkpoint
from wan_jax.weights.sources import open_folder

source, out, moment = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
save, seen = checkpoint.save_arrays, []

def slow(path, arrays):
    if len(seen) == moment:
        (path.parent / "reached").touch()
        time.sleep(600)
    seen.append(path)
    save(path, arrays)

checkpoint.save_arrays = slow
checkpoint.write(open_folder(source), out, dtype="bfloat16")
"""


def test_a_second_process_waits_for_the_first(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    said: list[str] = []
    started, go = threading.Event(), threading.Event()

    def hold(progress: Any) -> None:
        if progress.stage == "convert" and progress.done:
            started.set()
            assert go.wait(60)

    first = threading.Thread(
        target=lambda: wan_jax.load(source, cache_dir=cache, offload=True, callback=hold)
    )

    def notify(message: str) -> None:
        said.append(message)
        if message.startswith("waiting"):
            go.set()

    first.start()
    assert started.wait(60)
    wan = wan_jax.load(source, cache_dir=cache, offload=True, notify=notify)
    first.join()
    assert len(said) == 1
    assert said[0].startswith("waiting for another process")
    assert len(list(cache.iterdir())) == 1
    assert wan.config == TINY


def test_a_disk_without_locks_sweeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError("no locks")

    monkeypatch.setattr(folders.fcntl, "flock", none)
    (tmp_path / ".out.partial-x").mkdir()
    with folders.alone(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial-x"]
    with folders.written_whole(tmp_path / "out", is_whole=Path.is_dir) as work:
        (work / "file").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_a_hash_that_cannot_be_had_ends_the_conversion(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_folder(source)
    whole = Path.open

    def refuse(self: Path, *arguments: Any, **named: Any) -> Any:
        if self.suffix == ".safetensors":
            raise OSError("gone")
        return whole(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError, match="gone"):
        checkpoint.write(folder, tmp_path / "out", dtype="bfloat16")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_fetch_answers_for_what_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a hub id such as Wan-AI"):
        loading.fetch(tmp_path / "nowhere")
