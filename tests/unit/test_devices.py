"""The flags about devices, in whole runs of the script."""

from pathlib import Path

import numpy as np
import pytest

from tests import tolerances
from tests.random_weights import relative_l2
from tests.unit.test_cli import script

SMALL = ["--size", "48*32", "--frame_num", "5", "--sample_steps", "2", "--prompt", "Two cats."]
SMALL += ["--cache_dir", "cache", "--dtype", "float32", "--base_seed", "7"]


def test_a_script_uses_all_devices_and_gives_what_one_gives(
    tiny_source: Path, tmp_path: Path
) -> None:
    given = [*SMALL, "--ckpt_dir", str(tiny_source)]
    one = script(*given, "--save_file", "one.npz", cwd=tmp_path)
    four = script(*given, "--save_file", "four.npz", cwd=tmp_path, devices=4)
    assert one.returncode == four.returncode == 0, one.stderr + four.stderr
    assert "plan: " not in one.stderr
    assert "plan: 4 devices: guidance 2 x ulysses 2\n" in four.stderr
    with np.load(tmp_path / "one.npz") as a, np.load(tmp_path / "four.npz") as b:
        assert relative_l2(b["latents"], a["latents"]) <= tolerances.SPREAD


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--ulysses_size", "4"],
            "--ulysses_size 4, ring_size 1 cannot be had with the 2 heads",
        ),
        (["--ring_size", "3"], "--ulysses_size 1, ring_size 3 cannot be had with 4 devices"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_the_nearest(
    tiny_source: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    given = [*SMALL, "--ckpt_dir", str(tiny_source), *flags]
    done = script(*given, cwd=tmp_path, devices=4)
    assert done.returncode == 2
    assert f"error: {message}" in done.stderr
    assert "the nearest is ulysses_size " in done.stderr
