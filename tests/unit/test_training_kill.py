"""The trainer's command, killed at any moment and taken up, ends in the bits of an undisturbed run.

The real command in a process of its own, on a tiny checkpoint and tiny videos.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

import wan_jax
from tests.unit.conftest import TINY
from tests.unit.test_cli import ROOT
from tests.unit.test_media import pattern
from wan_jax.training import metrics
from wan_jax.weights import miniature, trees

STEPS, EVERY = 60, 3
PATIENCE = 240.0  # seconds
CONFIG = {
    "size": (32, 16), "frames": 5, "fps": 16, "batch_size": 2, "accumulate": 2, "steps": STEPS,
    "learning_rate": 1e-3, "warmup_steps": 3, "log_every": 1, "checkpoint_every": EVERY,
    "keep": 2, "seed": 5, "sample_prompts": ["A cat."], "sample_steps": 1, "sample_guidance": 1.0,
}  # fmt: skip

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny checkpoint, three videos, and a configuration."""
    folder = tmp_path_factory.mktemp("kill")
    miniature.write(folder / "tiny", config=TINY, seed=4)
    (folder / "data").mkdir()
    lines = []
    for k in range(3):
        wan_jax.save_video(pattern(5 + 4 * k, 32, 16)[4 * k :], folder / "data" / f"{k}.mp4")
        lines.append(json.dumps({"file_name": f"{k}.mp4", "text": [f"Clip {k}.", "A clip."]}))
    (folder / "data" / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "full.py").write_text(f"config = {CONFIG!r}\n")
    (folder / "lora.py").write_text(f"config = {CONFIG | {'lora_rank': 2}!r}\n")
    return folder


@pytest.fixture
def start(place: Path) -> Start:
    """start(out, kind) runs the command."""

    def start(out: str, kind: str = "full", *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "wan_jax.training", "--config", f"{kind}.py"]
        command += ["--data", "data", "--out", out, "--ckpt_dir", "tiny", "--cache_dir", "cache"]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            # One device; and most of the time would be compiling.
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        return subprocess.Popen(
            [*command, *more], cwd=place, env=environment, stderr=subprocess.PIPE, text=True
        )

    return start


def finish(process: subprocess.Popen[str]) -> str:
    """The errors of a process that ends well."""
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, errors
    return errors


def lines(out: Path) -> list[dict[str, Any]]:
    file = out / metrics.FILE
    return metrics.read(file) if file.exists() else []


def wait(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """Wait until something is so, or the process is at its end."""
    begun = time.monotonic()
    while process.poll() is None and not ready():
        assert time.monotonic() - begun < PATIENCE
        time.sleep(0.002)


def writing(out: Path) -> bool:
    """Whether a checkpoint is half there."""
    folder = out / "checkpoints"
    names = [item.name for item in folder.iterdir()] if folder.is_dir() else []
    return any(not name.isdigit() for name in names)


def state(out: Path) -> dict[str, np.ndarray]:
    """{path: array} of all of the last checkpoint."""
    found = ocp.StandardCheckpointer().restore(out / "checkpoints" / str(STEPS) / "state")
    leaves = jax.tree_util.tree_flatten_with_path(found)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def test_killed_and_taken_up_it_ends_in_the_same_bits(place: Path, start: Start) -> None:
    finish(start("whole"))
    whole, out = place / "whole", place / "killed"
    assert [line["step"] for line in lines(whole)] == list(range(1, STEPS + 1))
    chance = random.Random(7)
    targets = sorted(chance.sample(range(2, STEPS - 15), 4))
    reached = []
    for number in range(5):
        process = start("killed")
        if number == 0:
            time.sleep(chance.uniform(1.0, 6.0))  # still while it starts or encodes
        else:
            target = targets[number - 1]
            wait(process, lambda: len(lines(out)) >= target)  # noqa: B023
            if number % 2:
                wait(process, lambda: writing(out))
            else:
                time.sleep(chance.uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        reached.append(len(lines(out)))
    assert any(reached) and max(reached) < STEPS
    finish(start("killed"))
    assert lines(out) == lines(whole)
    one, two = state(whole), state(out)
    assert one.keys() == two.keys() and len(one) > 50
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    first, second = (wan_jax.load(folder / "checkpoint", offload=True) for folder in (whole, out))
    assert first.digest == second.digest
    assert sorted(p.name for p in (out / "samples").iterdir()) == [f"step_{STEPS:06}_0.mp4"]
    names = {"checkpoint", "checkpoints", "encoded", "metrics.jsonl", "samples"}
    assert {p.name for p in out.iterdir()} == names
    made = subprocess.run(
        [sys.executable, str(ROOT / "run_t2v.py"), "--ckpt_dir", "killed/checkpoint", "--size",
         "32*16", "--frame_num", "5", "--sample_steps", "1", "--save_file", "killed.mp4"],
        cwd=place, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert trees.flatten(first.network("dit")).keys() == trees.flatten(second.network("dit")).keys()


def test_a_signal_leaves_a_checkpoint_and_the_file(place: Path, start: Start) -> None:
    out = place / "signal"
    process = start("signal", "lora")
    wait(process, lambda: len(lines(out)) >= 4)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 143, errors
    last = errors.strip().splitlines()[-1]
    done = len(lines(out))
    assert f"stopped after step {done} of {STEPS}, with a checkpoint in {out}" in last
    assert str(done) in {item.name for item in (out / "checkpoints").iterdir()}
    assert (out / "lora.safetensors").is_file()
    finish(start("signal", "lora"))
    finish(start("undisturbed", "lora"))
    one, two = (load_file(place / k / "lora.safetensors") for k in ("signal", "undisturbed"))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    assert lines(out) == lines(place / "undisturbed")
    refused = start("signal", "full")
    errors = refused.communicate(timeout=PATIENCE)[1]
    assert refused.returncode == 2
    assert "is of a training with lora.lora_" in errors.splitlines()[-1]
    assert "another --out" in errors.splitlines()[-1]


def test_wrong_flags_are_one_line(start: Start) -> None:
    process = start("never", "none")
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 2
    assert len(errors.strip().splitlines()) == 1
    assert errors.startswith("wan_jax.training: error: --config none.py is not a file")
