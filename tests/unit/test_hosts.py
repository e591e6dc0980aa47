"""How a process finds the others, without any."""

from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_cli import script
from wan_jax import hosts

SLURM = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
MPI = {"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
EVERY: dict[str, Any] = {"local_device_ids": []}  # it may use all devices that it sees


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "2"}, None),  # a shell within an allocation, not a step of it
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (SLURM, EVERY),
        (SLURM | {"SLURM_NTASKS": "16"}, {}),
        (SLURM | {"SLURM_NTASKS": "16", "CUDA_VISIBLE_DEVICES": "3"}, EVERY),
        (SLURM | {"SLURM_NTASKS": "16", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, None),
        (MPI, {}),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, EVERY),
    ],
)
def test_a_launcher_is_told_from_its_environment(
    environment: dict[str, str], expected: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "CUDA_VISIBLE_DEVICES")
    for name in (*names, *MPI):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts._launched() == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes", "2"], "--coordinator_address and --process_id must be given too"),
        (["here", "2", "0"], "--coordinator_address is 'here'; host:port is needed"),
        (["here:1", "0", "0"], "--num_processes is 0; 1 or more is needed"),
        (["here:1", "2", "2"], "--process_id is 2; 0 to 1 is needed"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tmp_path: Path, flags: list[str], message: str) -> None:
    if len(flags) == 3:
        names = ("--coordinator_address", "--num_processes", "--process_id")
        flags = [text for pair in zip(names, flags, strict=True) for text in pair]
    done = script(*flags, cwd=tmp_path)
    assert done.returncode == 2
    assert f"error: {message}" in done.stderr


def test_alone_it_agrees_with_itself() -> None:
    assert (hosts.index(), hosts.count(), hosts.is_first()) == (0, 1, True)
    assert hosts.tell("a") == "a"
    assert hosts.exchange("a") == ["a"]
    assert hosts.tell_bytes(b"ab") == b"ab"
    assert hosts.any_of(True) and not hosts.any_of(False)
    with hosts.in_turn():
        pass
