"""The benchmarks run, at shapes whose numbers mean nothing, and their table is up to date."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
Rows = list[dict[str, Any]]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], ModuleType]:
    """A benchmark as a module; what it writes goes elsewhere."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("WAN_JAX_RESULTS", str(tmp_path))
    return importlib.import_module


def reported(capsys: pytest.CaptureFixture[str]) -> Rows:
    """What a child has reported in this process."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def peer(load: Callable[[str], ModuleType], name: str, system: str, case: str) -> Rows:
    """What the peer's child reports, in a process of its own."""
    own = ["--tiny", "--child", system, "--case", case]
    return list(load("measure").rows(str(FOLDER / f"{name}.py"), own))


def test_a_benchmark_from_the_command_to_the_file(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    command = [sys.executable, str(FOLDER / "attention.py"), "--tiny", "--systems", "wan_jax"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "attention.json").read_text())
    ways = {row["how"]: row for row in found["rows"]}
    assert {"picked", "chunked", "@"} <= set(ways) and found["device"] == "cpu"
    assert ways["picked"]["deviation"] < 0.01 and ways["picked"]["tflop_per_s"] > 0
    assert "needs an NVIDIA GPU" in ways["cudnn"]["error"]
    assert "written to" in done.stdout
    assert "attention | tiny, picked |" in load("table").render(tmp_path)


def test_vae(load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    load("vae").run_ours("decode", "16x16", "bfloat16", tiny=True)
    (row,) = reported(capsys)
    assert row["how"] == "whole" and row["seconds"] > 0


def test_vae_as_a_run(load: Callable[[str], ModuleType]) -> None:
    benchmark, shape = load("vae"), (2, 2, 2, 16)
    network = load("random_checkpoint").network(benchmark.vae_of(tiny=True))
    assert [latent.shape for latent in benchmark.streamed(network, "encode", shape)()] == [
        (1, 1, 2, 2, 16)
    ] * 2


def test_umt5(load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    load("umt5").run_ours(2, tiny=True)
    assert [row["how"] for row in reported(capsys) if row["seconds"] > 0] == [
        "as a run",
        "one batch",
    ]


def test_fp8(load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load("fp8")
    benchmark.run_kernel(benchmark.TINY["kernel"])
    benchmark.run_product(*benchmark.TINY["product"])
    benchmark.run_program("program", benchmark.TINY["program"], tiny=True)
    kernel, same, _, wide, narrow, _, *programs = reported(capsys)
    assert "needs an NVIDIA GPU" in kernel["error"] and 0 < same["deviation"] < 0.1
    assert narrow["deviation"] < 0.01 < wide["deviation"] and narrow["seconds"] > 0
    assert [(p["how"], p["products"], p["attentions"]) for p in programs] == [
        ("fp8", 0, 0),
        ("fp8_linear", 0, 0),
    ]


def test_startup_and_memory(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    assert load("startup").write("tiny", folder)["gb"] > 0
    own = ["--tiny", "--model", "tiny", "--folder", str(folder), "--kept", "nothing kept"]
    subprocess.run([sys.executable, str(FOLDER / "startup.py"), *own], check=True)
    (row,) = json.loads((tmp_path / "startup_tiny.json").read_text())["rows"]
    assert row["cache_misses"] > 0 and row["compile"] > 0 and "error" not in row
    assert row["seconds"] > row["import"] + row["start"] + row["load"]
    mp4 = tmp_path / "video.mp4"
    found = load("memory").run_stage("text", folder, steps=1, mp4=mp4, tiny=True)
    assert found["seconds"] > 0


@pytest.mark.parametrize(
    ("package", "name", "system", "case"),
    [
        ("torch", "attention", "torch", "tiny"),
        ("diffusers", "vae", "diffusers", "encode 16x16 float32"),
        ("transformers", "umt5", "transformers", "1"),
    ],
)
def test_peers(
    load: Callable[[str], ModuleType], package: str, name: str, system: str, case: str
) -> None:
    if importlib.util.find_spec(package) is None or importlib.util.find_spec("torch") is None:
        pytest.skip(f"needs {package} and torch")
    (row,) = peer(load, name, system, case)
    assert row.get("seconds", 0.0) > 0, row


def test_a_child_that_fails_or_is_slow_keeps_its_rows(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import sys, time\nprint('{\"a\": 1}', flush=True)\nprint('text')\n"
        "time.sleep(float(sys.argv[1]))\nraise SystemExit('it broke')\n"
    )
    rows = load("measure").rows
    assert list(rows(str(script), ["0"])) == [{"a": 1}, {"error": "exit status 1: it broke"}]
    assert list(rows(str(script), ["60"], seconds=3.0)) == [
        {"a": 1},
        {"error": "stopped after 3 s"},
    ]


def test_rows_of_an_earlier_run_are_kept(load: Callable[[str], ModuleType]) -> None:
    measure = load("measure")
    rows = [{"case": "a", "seconds": 1.0}, {"case": "b", "seconds": 2.0}]
    measure.save("some", rows, {"device": "cpu"})
    case = measure.Case({"case": "b"}, [])
    assert measure.kept("some", {"device": "cpu"}, [case], tiny=False) == rows[:1]
    assert not measure.kept("some", {"device": "another"}, [case], tiny=False)
    assert not measure.kept("none", {"device": "cpu"}, [case], tiny=False)


def test_rates_shares_and_ratios(load: Callable[[str], ModuleType]) -> None:
    work = {"case": "a", "tflop": 79.0, "kind": "product bfloat16"}
    ours, peer, slow = load("measure").compare(
        [
            {**work, "system": "wan_jax", "seconds": 0.5},
            {**work, "system": "torch", "seconds": 0.25},
            {**work, "system": "torch", "seconds": 1.0},
        ],
        "NVIDIA H200",
    )
    assert (ours["ratio"], peer["ratio"], slow["ratio"]) == (2.0, 1.0, 4.0)
    assert (ours["tflop_per_s"], ours["share"]) == (158.0, 0.2)


def test_the_table_is_that_of_the_results(load: Callable[[str], ModuleType]) -> None:
    table = load("table")
    text = table.DOCUMENT.read_text()
    assert table.filled(text, table.render(table.RESULTS)) == text, "run benchmarks/table.py"


def test_the_table_tells_what_found_no_memory(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    rows = [{"case": "decode", "how": "8 GiB", "error": "XlaRuntimeError: RESOURCE_EXHAUSTED: x"}]
    load("measure").save("memory_1.3B", rows, {"device": "cpu"})
    assert "| memory | decode, 8 GiB | no memory |" in load("table").render(tmp_path)
