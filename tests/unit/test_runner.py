"""Whole runs of the script: videos, records, failures, interruption and what is taken up."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest

import wan_jax
from tests.unit.test_cli import ROOT, environment, parse, script
from tests.unit.test_media import decode
from wan_jax import cli, devices, jobs, labels, media, resume, runner, sampler
from wan_jax.sampler import Carry, State

Run = Callable[..., None]
SMALL = ["--cache_dir", "cache", "--size", "64*48", "--frame_num", "5", "--sample_steps", "2"]
SMALL += ["--prompt", "Two cats."]


def test_script_makes_a_video_and_says_how_long_it_took(tmp_path: Path) -> None:
    noise = np.random.RandomState(0).standard_normal((16, 2, 6, 8)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    nano = [*SMALL, "--ckpt_dir", "nano-t2v"]
    runs = [
        script(*nano, "--noise_file", "noise.npy", "--save_file", name, cwd=tmp_path)
        for name in ("a.mp4", "a.npz")
    ]
    for done in runs:
        assert done.returncode == 0, done.stderr
    first, second = (done.stderr.replace("\r", "\n") for done in runs)
    assert "random weights" in first
    assert "converting" in first
    assert "converting" not in second
    for stage in ("load", "encode", "denoise", "decode"):
        assert f"{stage}:" in first
    assert "seconds: " in first
    assert decode(tmp_path / "a.mp4")[1].shape == (5, 48, 64, 3)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as saved:
        assert saved["frames"].shape == (5, 48, 64, 3)
        assert saved["frames"].dtype == np.float32
        assert np.abs(saved["frames"]).max() <= 1.0
        assert saved["latents"].shape == (2, 6, 8, 16)
    converted = next(path for path in (tmp_path / "cache").iterdir() if "bfloat16" in path.name)
    plain = [*SMALL, "--ckpt_dir", f"cache/{converted.name}", "--save_file", "b.npz"]
    done = script(*plain, "--dtype", "float32", cwd=tmp_path)
    assert done.returncode == 2
    assert "was converted to bfloat16" in done.stderr
    done = script(*plain, "--noise_file", "noise.npy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "a.npz") as one, np.load(tmp_path / "b.npz") as two:
        np.testing.assert_array_equal(one["frames"], two["frames"])
    left = {path.name for path in tmp_path.iterdir()}
    videos = {"a.mp4", "a.npz", "b.npz"}
    assert left == {"cache", "noise.npy", *videos, *(f"{name}.json" for name in videos)}


@pytest.fixture
def run(
    tiny_source: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Runs the script's two halves in this process, on the tiny checkpoint and one device."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "plan", lambda *_: None)

    def run(*arguments: str) -> None:
        given = ["--ckpt_dir", str(tiny_source), "--cache_dir", str(tiny_cache), *arguments]
        values = parse(*given)
        runner.execute(values, jobs.plan(values, ROOT / "configs"))

    return run


def test_the_record_tells_what_made_the_video(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = 'A "fox"; = #1\\ 狐狸'
    run("--save_file", "a.mp4", "--prompt", prompt)
    record = json.loads((tmp_path / "a.mp4.json").read_text(encoding="utf-8"))
    assert labels.read_metadata(tmp_path / "a.mp4") == record
    assert record["prompt"] == prompt
    assert (record["size"], record["frames"], record["steps"]) == ([32, 16], 5, 2)
    assert f"seed {record['seed']}" in capsys.readouterr().err
    assert record["seed_drawn"] is True
    assert len(record["checkpoint_digest"]) == 64
    assert record["versions"]["jax"]
    assert record["device"]["platform"] == "cpu"
    assert record["seconds"]["denoise"] > 0
    assert record["seconds"]["decode"] > 0
    assert record["peak_memory_bytes"]["host"] > 2**26
    run("--base_seed", str(record["seed"]), "--prompt", prompt, "--save_file", "b.mp4")
    np.testing.assert_array_equal(decode(tmp_path / "a.mp4")[1], decode(tmp_path / "b.mp4")[1])


def test_several_videos_in_one_run(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        json.dumps({"prompt": "a", "save_file": "one.gif"}),
        json.dumps({"prompt": "b", "save_file": "two.png", "num_videos": 2}),
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    batch = ["--base_seed", "3", "--prompts_file", "p.jsonl", "--skip_existing"]
    run(*batch)
    assert (tmp_path / "one.gif").stat().st_size > 500
    for name in ("two_0", "two_1"):
        assert len(list((tmp_path / name).iterdir())) == 5
    assert capsys.readouterr().err.count("saved ") == 3
    run("--base_seed", "3", "--prompt", "b", "--num_videos", "2", "--save_file", "c.npz")
    run("--base_seed", "3", "--prompt", "b", "--save_file", "d.npz")
    with np.load("c_000.npz") as first, np.load("c_001.npz") as second, np.load("d.npz") as alone:
        np.testing.assert_array_equal(first["latents"], alone["latents"])
        assert not np.array_equal(first["latents"], second["latents"])
    capsys.readouterr()
    run(*batch)
    said = capsys.readouterr().err
    assert said.count("skipped ") == 3
    assert "denoise" not in said


def test_one_that_fails_does_not_keep_the_others_back(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = media.save_video

    def refuse(frames: Any, path: Any, **arguments: Any) -> None:
        if "bad" in str(path):
            raise OSError("no space\nleft")
        whole(frames, path, **arguments)

    monkeypatch.setattr(media, "save_video", refuse)
    lines = [json.dumps({"prompt": name, "save_file": f"{name}.npz"}) for name in ("bad", "good")]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    with pytest.raises(RuntimeError, match="1 of 2 videos failed"):
        run("--prompts_file", "p.jsonl")
    assert "failed bad.npz: bad.npz cannot be written: no space left" in capsys.readouterr().err
    assert (tmp_path / "good.npz").exists()
    with pytest.raises(OSError, match=r"bad\.npz cannot be written: no space"):
        run("--save_file", "bad.npz")


# Interruption.


def test_a_drawn_seed_is_taken_up_with_the_state(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also: what fails after denoising leaves the latents, and the next run only decodes."""
    arguments = ["--resume_dir", "states", "--save_file", "x.npz", "--num_videos", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(media, "save_video", fails)
        with pytest.raises(RuntimeError, match="2 of 2 videos failed"):
            run(*arguments)
    said = capsys.readouterr().err
    assert said.count("the latents so far are in") == 2
    (seed,) = set(re.findall(r"seed (\d+)", said))
    assert len(list((tmp_path / "states").iterdir())) == 2
    networks: list[str] = []
    monkeypatch.setattr(wan_jax.Wan, "network", watched(wan_jax.Wan.network, networks))
    run(*arguments)
    assert set(networks) == {"vae"}
    said = capsys.readouterr().err
    assert said.count(f"seed {seed}, taken up after step 2") == 2
    record = json.loads((tmp_path / "x_001.npz.json").read_text())
    assert (record["seed"], record["resumed_after"]) == (int(seed), 2)
    assert record["seconds"]["denoise"] > 0
    assert not list((tmp_path / "states").iterdir())
    run("--base_seed", seed, "--save_file", "y.npz", "--num_videos", "2")
    for k in ("000", "001"):
        with np.load(f"x_{k}.npz") as one, np.load(f"y_{k}.npz") as two:
            np.testing.assert_array_equal(one["frames"], two["frames"])


def fails(*_: Any, **__: Any) -> None:
    raise OSError("full")


def watched(method: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    def network(self: wan_jax.Wan, part: str, callback: Any = None) -> Any:
        names.append(part)
        return method(self, part, callback)

    return network


def test_latents_that_diverge_are_not_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would do so again."""
    sample = sampler.sample

    def diverges(*args: Any, on_step: sampler.OnStep, **named: Any) -> Any:
        def hear(carry: sampler.Carry, steps: int) -> None:
            on_step(carry, steps)
            raise sampler.DivergedError("at step 2")

        return sample(*args, on_step=hear, **named)

    monkeypatch.setattr(sampler, "sample", diverges)
    with pytest.raises(sampler.DivergedError, match="at step 2"):
        run("--resume_dir", "states", "--save_file", "x.npz")
    assert not list(tmp_path.glob("states/*"))
    assert "takes them up" not in capsys.readouterr().err


def test_the_first_error_is_told_when_the_state_cannot_be_saved_either(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(media, "save_video", fails)
    monkeypatch.setattr(resume.Store, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="full"):
        run("--resume_dir", "states", "--save_file", "x.npz")
    assert "the state cannot be saved: no" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["load", "denoise", "decode"])
def test_a_signal_in_any_stage_keeps_what_there_is(
    stage: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """load: that of the DiT; the signal comes while it is told; denoise: after the last step."""
    told: list[str] = []
    tell = cli.Reporter.__call__

    def signalled(self: cli.Reporter, progress: Any) -> None:
        told.append(progress.stage)
        ready = {
            "load": told.count("encode") > 2 and progress.stage == "load" and not progress.done,
            "denoise": progress.stage == "denoise" and progress.done == progress.total,
            "decode": progress.stage == "decode" and progress.done == 1,
        }[stage]
        if ready and "sent" not in told:
            told.append("sent")
            os.kill(os.getpid(), signal.SIGTERM)
        tell(self, progress)

    arguments = ["--resume_dir", "states", "--save_file", "x.npz", "--base_seed", "1"]
    before = signal.signal(signal.SIGTERM, cli._terminated)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(cli.Reporter, "__call__", signalled)
            patch.setattr(cli, "_received", [])
            with pytest.raises(cli.Stopped) as stopped:
                run(*arguments)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.status == 128 + signal.SIGTERM
    assert "the same command takes it up from" in str(stopped.value)
    assert not (tmp_path / "x.npz").exists()
    run(*arguments)
    run("--save_file", "y.npz", "--base_seed", "1")
    with np.load("x.npz") as one, np.load("y.npz") as two:
        np.testing.assert_array_equal(one["frames"], two["frames"])


def test_a_record_never_tells_of_another_video(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("--save_file", "c.npz", "--prompt", "first")
    with monkeypatch.context() as patch:
        patch.setattr(labels, "write_json", fails)
        with pytest.raises(OSError, match="full"):
            run("--save_file", "c.npz", "--prompt", "second")
    assert not (tmp_path / "c.npz.json").exists()
    made = labels.read_metadata(tmp_path / "c.npz")
    assert made is not None
    assert made["prompt"] == "second"


def test_a_single_frame_is_truncated_in_a_video_and_rounded_in_an_image(
    run: Run, tmp_path: Path
) -> None:
    one = ["--frame_num", "1", "--base_seed", "1"]
    for name in ("a.npz", "a.png"):
        run(*one, "--save_file", name)
    with np.load("a.npz") as arrays:
        frame = arrays["frames"]
    image = media.quantize(frame, rounding="round")[0]
    np.testing.assert_array_equal(iio.imread("a.png"), image)


def interrupted(*arguments: str, cwd: Path, signum: int) -> tuple[int, str]:
    """A run that gets a signal once its first step is on stderr; its status and what it said."""
    with subprocess.Popen(
        [sys.executable, str(ROOT / "run_t2v.py"), *arguments],
        cwd=cwd,
        env=environment(),
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        said = b""
        while not re.search(rb"denoise:[^\r]* [1-9]\d*/", said):
            more = os.read(process.stderr.fileno(), 4096)
            assert more, f"ended too early: {said.decode()}"
            said += more
        process.send_signal(signum)
        said += process.stderr.read()
    return process.returncode, said.decode()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_taken_up_bit_for_bit(
    signum: int, run: Run, tiny_source: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    arguments = ["--ckpt_dir", str(tiny_source), "--cache_dir", str(tiny_cache)]
    arguments += ["--base_seed", "5", "--sample_steps", "900", "--sample_solver", "unipc"]
    rest = [*arguments, "--save_file", "x.npz", "--resume_dir", "states"]
    status, said = interrupted(*rest, cwd=tmp_path, signum=signum)
    assert status == 128 + signum, said
    assert "error: stopped after step" in said
    assert "Traceback" not in said
    (state,) = (tmp_path / "states").iterdir()
    assert not (tmp_path / "x.npz").exists()
    done = script(*rest, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "taken up after step" in done.stderr
    assert not state.exists()
    whole = script(*arguments, "--save_file", "whole.npz", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    with np.load(tmp_path / "whole.npz") as one, np.load(tmp_path / "x.npz") as two:
        np.testing.assert_array_equal(one["latents"], two["latents"])
        np.testing.assert_array_equal(one["frames"], two["frames"])


def test_without_a_place_for_the_state_nothing_is_left(
    tiny_source: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    arguments = ["--ckpt_dir", str(tiny_source), "--cache_dir", str(tiny_cache)]
    arguments += ["--sample_steps", "900", "--save_file", "x.mp4"]
    status, said = interrupted(*arguments, cwd=tmp_path, signum=signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert "error: terminated" in said
    assert not list(tmp_path.iterdir())


# The state on disk.

ARRAYS = np.random.RandomState(0).standard_normal((4, 1, 2, 4, 4, 16)).astype(np.float32)
CARRY = Carry(3, State(*ARRAYS))


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    store = resume.Store(tmp_path / "a" / "b", {"prompt": "狐狸", "steps": 5})
    assert store.load() is None
    store.save(CARRY, seed=2**63, seconds={"denoise": 2.5}, made_by={"jax": "1"})
    saved = store.load()
    assert saved is not None
    assert (saved.carry.done, saved.seed, saved.made_by) == (3, 2**63, {"jax": "1"})
    assert saved.seconds == {"denoise": 2.5}
    for mine, theirs in zip(saved.carry.state, CARRY.state, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert resume.Store(tmp_path / "a" / "b", {"prompt": "狐狸", "steps": 6}).load() is None
    store.remove()
    store.remove()
    assert store.load() is None


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "shape"])
def test_a_damaged_state_is_named(damage: str, tmp_path: Path) -> None:
    store = resume.Store(tmp_path, {"prompt": "a"})
    store.save(CARRY, seed=1, seconds={}, made_by={})
    data = store.file.read_bytes()
    if damage == "shape":
        with np.load(store.file) as arrays:
            changed: dict[str, Any] = {**arrays, "m0": arrays["m0"][:, :1]}
        np.savez(store.file, **changed)
    else:
        store.file.write_bytes({"cut": data[:-900], "empty": b"", "text": b"x" * 100}[damage])
    with pytest.raises(ValueError, match=f"{store.file.name} cannot be read .*remove it"):
        store.load()
