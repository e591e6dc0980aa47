"""Two processes of four devices each, over loopback: one video, agreement, and how they end."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import tolerances
from tests.random_weights import relative_l2
from tests.unit.test_cli import ROOT, environment, script

SMALL = ["--size", "48*32", "--frame_num", "5", "--prompt", "Two cats.", "--dtype", "float32"]
WITHIN = 60  # seconds in which the others end


class Pair:
    """Two processes of one run; `more` flags for the second alone."""

    def __init__(
        self, folder: Path, *arguments: str, more: tuple[str, ...] = (), optimised: bool = False
    ) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{found.getsockname()[1]}"
        self.logs = [folder / f"process{i}.log" for i in range(2)]
        self.processes = []
        for i, log in enumerate(self.logs):
            own = ["--coordinator_address", address, "--num_processes", "2", "--process_id", str(i)]
            with log.open("wb") as file:
                command = [sys.executable, str(ROOT / "run_t2v.py"), *own, *arguments]
                command += more if i else ()
                env = environment(4, optimised=optimised) | {"TF_CPP_MIN_LOG_LEVEL": "2"}
                self.processes.append(
                    subprocess.Popen(command, cwd=folder, env=env, stderr=file, stdout=file)
                )

    def said(self, i: int) -> str:
        return self.logs[i].read_text(errors="replace")

    def wait_for_steps(self) -> None:
        """Until the first has done some steps."""
        deadline = time.monotonic() + 120
        while not re.search(r"denoise:[^\r]* [1-9]\d*/", self.said(0)):
            assert all(p.poll() is None for p in self.processes), self.said(0) + self.said(1)
            assert time.monotonic() < deadline, self.said(0)
            time.sleep(0.1)

    def ends(self, within: float) -> list[int]:
        """How both ended."""
        deadline = time.monotonic() + within
        return [p.wait(max(deadline - time.monotonic(), 0.1)) for p in self.processes]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    """Those that a test starts, ended with it."""
    made: list[Pair] = []
    yield made
    for pair in made:
        pair.stop()


@pytest.mark.parametrize("trained", [True, False], ids=["miniature", "random"])
def test_two_processes_make_what_one_does(
    trained: bool, tiny_source: Path, tmp_path: Path, pairs: list[Pair]
) -> None:
    """The miniature has three heads, which Ulysses does not split in two; the other has four."""
    given = ["--dtype", "float32"] if trained else [*SMALL, "--ckpt_dir", str(tiny_source)]
    given += ["--cache_dir", str(tmp_path / "cache"), "--sample_steps", "8", "--base_seed", "7"]
    pairs.append(pair := Pair(tmp_path, *given, "--save_file", "two.npz", optimised=trained))
    assert pair.ends(300 if trained else 180) == [0, 0], pair.said(0) + pair.said(1)
    split = "ring 4" if trained else "ulysses 2 x ring 2"
    assert f"plan: 8 devices: guidance 2 x {split}" in pair.said(0)
    assert pair.said(0).count("converting ") == 1
    assert "saved two.npz" in pair.said(0)
    for word in ("plan:", "denoise", "saved", "convert", "seconds"):
        assert word not in pair.said(1)
    one = script(*given, "--save_file", "one.npz", cwd=tmp_path, optimised=trained)
    assert one.returncode == 0, one.stderr
    with np.load(tmp_path / "one.npz") as a, np.load(tmp_path / "two.npz") as b:
        assert relative_l2(b["latents"], a["latents"]) <= tolerances.SPREAD
        assert relative_l2(b["frames"], a["frames"]) <= tolerances.SPREAD


def test_a_drawn_seed_is_the_same_in_both(
    tiny_source: Path, tiny_cache: Path, tmp_path: Path, pairs: list[Pair]
) -> None:
    given = [*SMALL, "--ckpt_dir", str(tiny_source), "--cache_dir", str(tiny_cache)]
    given += ["--sample_steps", "1"]
    pairs.append(pair := Pair(tmp_path, *given, "--save_file", "two.npz"))
    assert pair.ends(180) == [0, 0], pair.said(0) + pair.said(1)
    (seed,) = re.findall(r"seed (\d+)", pair.said(0))
    one = script(*given, "--base_seed", seed, "--save_file", "one.npz", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    with np.load(tmp_path / "one.npz") as a, np.load(tmp_path / "two.npz") as b:
        assert relative_l2(b["latents"], a["latents"]) <= tolerances.SPREAD


def test_processes_that_were_asked_for_different_things_say_so(
    tiny_source: Path, tiny_cache: Path, tmp_path: Path, pairs: list[Pair]
) -> None:
    given = [*SMALL, "--ckpt_dir", str(tiny_source), "--cache_dir", str(tiny_cache)]
    pairs.append(pair := Pair(tmp_path, *given, more=("--sample_steps", "3")))
    assert all(pair.ends(120))
    assert "error: the processes were given different flags" in pair.said(0)


@pytest.mark.parametrize(
    ("number", "signum"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)]
)
def test_one_that_is_killed_or_hangs_ends_the_other(
    tiny_source: Path,
    tiny_cache: Path,
    tmp_path: Path,
    pairs: list[Pair],
    number: int,
    signum: signal.Signals,
) -> None:
    given = [*SMALL, "--ckpt_dir", str(tiny_source), "--cache_dir", str(tiny_cache)]
    pairs.append(pair := Pair(tmp_path, *given, "--sample_steps", "1000", "--save_file", "x.npz"))
    pair.wait_for_steps()
    pair.processes[number].send_signal(signum)
    assert pair.processes[1 - number].wait(WITHIN) != 0
    assert re.search("another (process|task)", pair.said(1 - number)), pair.said(1 - number)
    assert not [p.name for p in tmp_path.iterdir() if "x" in p.name and "partial" in p.name]


def test_one_that_fails_tells_the_other_why(
    tiny_source: Path, tiny_cache: Path, tmp_path: Path, pairs: list[Pair]
) -> None:
    given = [*SMALL, "--ckpt_dir", str(tiny_source), "--cache_dir", str(tiny_cache)]
    pairs.append(pair := Pair(tmp_path, *given, more=("--lora", "/nowhere.safetensors")))
    codes = pair.ends(WITHIN)
    assert codes[1] == 2 and codes[0] != 0
    assert "process 1: --lora /nowhere.safetensors" in pair.said(0)


def test_a_signal_to_one_keeps_the_state_that_both_take_up(
    tiny_source: Path, tiny_cache: Path, tmp_path: Path, pairs: list[Pair]
) -> None:
    given = [*SMALL, "--ckpt_dir", str(tiny_source), "--cache_dir", str(tiny_cache)]
    given += ["--sample_steps", "400", "--base_seed", "5", "--resume_dir", "states"]
    given += ["--save_file", "x.npz"]
    pairs.append(pair := Pair(tmp_path, *given))
    pair.wait_for_steps()
    os.kill(pair.processes[1].pid, signal.SIGTERM)
    codes = pair.ends(WITHIN)
    assert all(codes), pair.said(0)
    assert "stopped after step" in pair.said(0)
    assert len(list((tmp_path / "states").iterdir())) == 1
    pairs.append(again := Pair(tmp_path, *given))
    assert again.ends(180) == [0, 0], again.said(0) + again.said(1)
    assert "taken up after step" in again.said(0)
    assert not list((tmp_path / "states").iterdir())
