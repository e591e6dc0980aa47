"""The benchmarks run, at shapes whose numbers mean nothing, and their table is up to date."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from wan_jax.training import config

FOLDER = Path(__file__).parents[2] / "benchmarks"
Rows = list[dict[str, Any]]
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Load:
    """A benchmark as a module; what it writes goes elsewhere."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("WAN_JAX_RESULTS", str(tmp_path))
    return importlib.import_module


def reported(capsys: pytest.CaptureFixture[str]) -> Rows:
    """What a child has reported in this process."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def gone(pid: int) -> bool:
    """Whether a process ends in time; one that nobody has waited for has ended."""
    for _ in range(400):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


# Each of them


def test_a_benchmark_from_the_command_to_the_file(load: Load, tmp_path: Path) -> None:
    own = [sys.executable, str(FOLDER / "attention.py"), "--tiny", "--systems", "wan_jax"]
    own += ["--name", "attention_ours"]
    done = subprocess.run(own, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "attention_ours.json").read_text())
    ways = {row["how"]: row for row in found["rows"]}
    assert {"picked", "chunked", "chunked_fp8", "@"} <= set(ways) and found["device"] == "cpu"
    assert ways["picked"]["deviation"] < 0.01 and ways["picked"]["tflop_per_s"] > 0
    assert "needs an NVIDIA GPU" in ways["cudnn"]["error"]
    assert "written to" in done.stdout
    assert found["command"].startswith("python benchmarks/attention.py --tiny")
    assert "attention | tiny, picked |" in load("table").render(tmp_path)


def test_vae(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark, shape = load("vae"), (2, 2, 2, 16)
    benchmark.run_ours("decode", "16x16", "bfloat16", tiny=True)
    (row,) = reported(capsys)
    assert row["how"] == "whole" and row["seconds"] > 0 and row["peak_gib"] > 0
    network = load("random_checkpoint").network(benchmark.vae_of(tiny=True))
    encode, _ = benchmark.streamed(network, "encode", shape)
    assert [latent.shape for latent in encode()] == [(1, 1, 2, 2, 16)] * 2


def test_tiles_beside_the_whole(load: Load) -> None:
    benchmark = load("tiles")
    video = benchmark.Video.of(benchmark.TINY[1])
    row = benchmark.against(video, frames=9, exact=True, tiny=True)
    assert row["tiles"] > 1 and row["compared"] == 9 and 0 < row["apart"] < 2e-6
    options: dict[str, Any] = {"frames": 9, "exact": True}
    first, second = benchmark.cases_of("decode 64x16 17 1.0MB", ["time", "apart"], **options)
    assert (first.labels["how"], second.labels["how"]) == ("1.0MB", "1.0MB, exact")
    assert not list(benchmark.cases_of("decode 64x16 17 whole", ["apart"], **options))


def test_residual(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load("residual")
    benchmark.run_ours("tiny")
    rows = reported(capsys)
    assert [row["how"] for row in rows] == ["XLA", "hopper"] * len(benchmark.WHAT)
    assert all(0 < row["deviation"] < 0.01 and row["gb_per_s"] > 0 for row in rows)


def test_spread(load: Load, tmp_path: Path) -> None:
    """A plan of two beside two devices that compute each by itself."""
    benchmark = load("spread")
    alone, two = benchmark.plans_of("dit", ["guidance2"])
    one, found = (
        benchmark.run_plan(plan, "dit tiny", tmp_path, steps=3, tiny=True) for plan in (alone, two)
    )
    assert len(one["cards"]) == 2 and min(one["cards"]) > 0 and "apart" not in one
    assert found["seconds"] > 0 and float(found["apart"]) < 0.01
    assert benchmark.plans_of("dit", ["ulysses4", "ring2", "ulysses2"])[:2] == ["each 2", "each 4"]
    assert benchmark.plans_of("vae", ["ulysses4"]) == ["1", "ulysses4"]


def test_efficiency_is_by_the_mean_of_the_cards_that_are_used(load: Load) -> None:
    two, four = [8.0, 12.0], [8.0, 12.0, 20.0, 20.0]
    rows = [
        {"what": "a step", "plan": "each 4", "seconds": 15.0, "cards": four},
        {"what": "a step", "plan": "each 2", "seconds": 10.0, "cards": two},
        {"what": "a step", "plan": "guidance2", "seconds": 5.0},
        {"what": "a step", "plan": "guidance2xulysses2", "seconds": 4.0},
        {"what": "a step", "plan": "ring2", "error": "no memory"},
        {"what": "VAE", "plan": "1", "seconds": 3.0},
        {"what": "VAE", "plan": "ulysses4", "seconds": 1.0},
    ]
    found = [
        (r.get("speedup"), r.get("efficiency"), r.get("of_first"))
        for r in load("spread").faster(rows)
    ]
    nothing = (None, None, None)
    assert found[:4] == [nothing, nothing, (2.0, 1.0, 0.8), (3.75, 0.9375, 0.5)]
    assert found[4:] == [nothing, nothing, (3.0, 0.75, 0.75)]


def test_umt5(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    load("umt5").run_ours(2, tiny=True)
    rows = [row for row in reported(capsys) if row["seconds"] > 0]
    assert [row["how"] for row in rows] == ["as a run", "one batch"]


def test_fp8(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load("fp8")
    benchmark.run_kernel(benchmark.TINY["kernel"])
    benchmark.run_product(*benchmark.TINY["product"], tiny=True)
    benchmark.run_program("program", benchmark.TINY["program"], tiny=True)
    kernel, same, _, wide, narrow, _, *programs = reported(capsys)
    assert "needs an NVIDIA GPU" in kernel["error"] and 0 < same["deviation"] < 0.1
    assert narrow["deviation"] < 0.01 < wide["deviation"] and narrow["seconds"] > 0
    found = [(p["how"], p["products"], p["attentions"]) for p in programs]
    assert found == [("fp8", 0, 0), ("fp8_linear", 0, 0)]


def test_dit(load: Load) -> None:
    benchmark = load("dit")
    row = benchmark.run_ours("tiny", benchmark.BFLOAT16)
    assert row["peak_gib"] > row["temp_gib"] > 0 and row["seconds"] > 0
    peer, ours, narrow = benchmark.cases_of("tiny", ["wan_jax", "diffusers"], [], ["fp8"])
    assert (peer.labels["system"], narrow.labels["how"]) == ("diffusers", "fp8")
    assert (ours.labels["kind"], narrow.labels["kind"]) == ("product bfloat16", "product fp8")


def test_precision(load: Load) -> None:
    row = load("precision").errors("tiny", 2)
    assert 0 < row["as a run"] < 0.01 and row["ratio"] == pytest.approx(1.0, abs=0.2)


def test_lora_is_trained_by_the_commands_of_the_docs(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark, typed = load("lora"), []
    monkeypatch.setattr(benchmark, "_run", lambda *own: typed.append(" ".join(own)))
    assert benchmark.train(tmp_path, tiny=False) == tmp_path / "lora" / "lora.safetensors"
    assert len(typed) == 2
    told = " ".join((FOLDER.parent / "docs" / "training.md").read_text().split())
    for own in typed:
        own = own.replace(str(tmp_path), "DIR").replace(f"{FOLDER.parent}/", "")
        assert f"python -m {own}" in told
    benchmark.train(tmp_path, tiny=True)
    assert config.read(tmp_path / "tiny.py").steps == 2


def test_startup_and_memory(load: Load, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    assert load("startup").write("tiny", folder)["gb"] > 0
    own = ["--tiny", "--folder", str(folder), "--kept", "nothing kept"]
    subprocess.run([sys.executable, str(FOLDER / "startup.py"), *own], check=True)
    (row,) = json.loads((tmp_path / "startup_tiny.json").read_text())["rows"]
    assert row["cache_misses"] > 0 and row["compile"] > 0 and "error" not in row
    parts = sum(row[name] for name in load("startup").PARTS)
    assert parts == pytest.approx(row["seconds"]) and min(row["load"], row["later_step"]) > 0
    options = {"mp4": tmp_path / "video.mp4", "tiny": True}
    found = load("memory").run_stage("denoise", folder, steps=3, limit="64MB", **options)
    assert found["step_seconds"] > 0 and found["streamed"] == "-"


def test_a_checkpoint_may_be_written_twice_at_once(load: Load, tmp_path: Path) -> None:
    checkpoint = load("random_checkpoint")
    other = tmp_path / "unfinished-1" / "dit"
    other.mkdir(parents=True)
    checkpoint.write("tiny", tmp_path)
    assert other.exists() and {path.name for path in tmp_path.iterdir()} == {"dit", "unfinished-1"}
    with pytest.raises(FileExistsError):
        checkpoint._appear(other, tmp_path / "dit")


@pytest.mark.parametrize(
    ("package", "name", "system", "case"),
    [
        ("torch", "attention", "torch", "tiny"),
        ("diffusers", "vae", "diffusers", "encode 16x16 float32"),
        ("transformers", "umt5", "transformers", "1"),
    ],
)
def test_peers(load: Load, package: str, name: str, system: str, case: str) -> None:
    if importlib.util.find_spec(package) is None or importlib.util.find_spec("torch") is None:
        pytest.skip(f"needs {package} and torch")
    own = ["--tiny", "--child", system, "--case", case]
    (row,) = load("children").rows(str(FOLDER / f"{name}.py"), own)
    assert row.get("seconds", 0.0) > 0, row


def test_parts_of_a_start_do_not_overlap(load: Load) -> None:
    startup = load("startup")
    making = startup.joined([(3.0, 4.0), (0.0, 2.0), (1.0, 2.5), (3.5, 5.0)])
    assert making == [(0.0, 2.5), (3.0, 5.0)]
    assert startup.covered(making, (2.0, 4.0)) == 1.5
    assert startup.covered([(1.0, 6.0)], (0.0, 5.5), without=making) == 1.0


# Their processes


def test_a_child_that_fails_or_is_slow_keeps_its_rows(load: Load, tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import sys, time\nprint('{\"a\": 1}', flush=True)\nprint('text')\n"
        "time.sleep(float(sys.argv[1]))\nraise SystemExit('it broke')\n"
    )
    rows, child = load("children").rows, load("children").child
    assert list(rows(str(script), ["0"])) == [{"a": 1}, {"error": "exit status 1: it broke"}]
    late = {"error": "stopped after 3 s"}
    assert list(rows(str(script), ["60"], seconds=3.0)) == [{"a": 1}, late]
    assert child(str(script), ["0"]) == {"a": 1}
    silent = tmp_path / "silent.py"
    silent.write_text("import time\ntime.sleep(60)\n")
    assert child(str(silent), [], seconds=0.0) == {"error": "stopped after 0 s"}


def test_errors_that_tell_of_memory_are_found(load: Load, tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import sys\n"
        "print('pkg.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory', file=sys.stderr)\n"
        "raise SystemExit('For simplicity, frames were removed')\n"
    )
    assert "RESOURCE_EXHAUSTED" in load("children").child(str(script), [])["error"]
    records = load("records")
    text = records.shortened("x " * 400 + "RESOURCE_EXHAUSTED: 3 GiB " + "y " * 400)
    assert len(text) < 400 and "RESOURCE_EXHAUSTED: 3 GiB" in text
    assert records.lacks_memory({"error": text}) and not records.lacks_memory({"seconds": 1.0})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_children_end_with_their_parent(tmp_path: Path, number: int) -> None:
    (tmp_path / "child.py").write_text(
        "import children, os, time\nchildren.follow_parent()\n"
        "print('{\"pid\": %d}' % os.getpid(), flush=True)\n"
        "time.sleep(100)\n"
    )
    parent = (
        "import children\nchildren.end_with_signals()\n"
        "for row in children.rows('child.py', []):\n    print(row['pid'], flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
    own: dict[str, Any] = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", parent], **own) as process:
        pid = int(process.stdout.readline())  # type: ignore[union-attr]
        process.send_signal(number)
        expected = 128 + number if number == signal.SIGTERM else -number
        assert process.wait(20.0) == expected and gone(pid)


def test_a_child_has_one_limit_of_memory(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    environment_of, fraction = load("children").environment_of, load("card").fraction
    for name in (new, old):
        monkeypatch.delenv(name, raising=False)
    assert environment_of()[old] == "0.93"
    assert environment_of(fraction(0.5))[old] == "0.500000"
    monkeypatch.setenv(new, "0.2")
    assert environment_of()[new] == "0.2" and old not in environment_of()
    limited = environment_of(fraction(0.5))
    assert new not in limited and limited["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"


# Their results


def test_rows_of_an_earlier_run_are_kept(load: Load) -> None:
    make = load("records").Results
    rows = [{"case": "a", "seconds": 1.0}, {"case": "b", "seconds": float("nan")}]
    labels, facts = [{"case": "a"}, {"case": "b"}], {"device": "cpu"}
    first = make("some", facts, labels)
    first.write(rows)
    written = json.loads(first.path.read_text())
    assert written["rows"] == [rows[0], {"case": "b", "seconds": None}]
    again = make("some", facts, labels[1:], keep=True)
    assert again.kept == rows[:1] and again.path == first.path
    for other in (
        make("some", facts, labels[1:]),
        make("some", {"device": "another"}, labels[1:], keep=True),
    ):
        assert other.path.name == "some_2.json" and not other.kept
    assert make("some", facts, labels).path == first.path
    assert make("none", facts, labels, keep=True).kept == []
    same = load("records").same_case
    ours = {"model": "14B", "system": "wan_jax", "how": "@", "tflop": 2.0, "kind": "product"}
    assert same(ours, {"model": "14B", "system": "wan_jax", "tflop": 1.0})
    assert not same(ours, {"model": "14B", "system": "wan_jax", "how": "fp8"})
    assert not same({"kind": "t2v"}, {"kind": "i2v"})


def test_rates_shares_and_ratios(load: Load) -> None:
    work = {"case": "a", "tflop": 79.0, "kind": "product bfloat16"}
    ours, narrow, peer, slow = load("records").compare(
        [
            {**work, "system": "wan_jax", "seconds": 0.5},
            {**work, "system": "wan_jax", "seconds": 0.125, "kind": "product fp8"},
            {**work, "system": "torch", "seconds": 0.25},
            {**work, "system": "torch", "seconds": 1.0},
        ],
        "NVIDIA H200",
    )
    assert (ours["ratio"], peer["ratio"], slow["ratio"]) == (2.0, 1.0, 4.0)
    assert (ours["tflop_per_s"], ours["share"]) == (158.0, 0.2)
    assert narrow["to_bfloat16"] == 0.5 and not {"ratio", "share"} & narrow.keys()


def test_the_table_is_that_of_the_results(load: Load) -> None:
    table = load("table")
    text = table.DOCUMENT.read_text()
    assert table.filled(text, table.render(table.RESULTS)) == text, "run benchmarks/table.py"


def test_the_table_tells_what_is_not_alike(load: Load, tmp_path: Path) -> None:
    make, same = load("records").Results, {"model": "14B", "seconds": 2.0}
    rows: Rows = [
        {"case": "decode", "how": "8 GiB", "error": "XlaRuntimeError: RESOURCE_EXHAUSTED: x"},
        {"case": "all", "how": "6GB", "seconds": 9.0, "step_seconds": 3.0, "step_ratio": 1.25},
    ]
    make("memory_1.3B", {"device": "cpu"}, [{}]).write(rows)
    rows = [
        {**same, "system": "diffusers", "backend": "native", "kind": "product bfloat16"},
        {**same, "system": "wan_jax", "how": "@", "kind": "product bfloat16", "share": 0.5},
        {**same, "system": "wan_jax", "how": "fp8", "kind": "product fp8"},
    ]
    make("dit_14B", {"device": "NVIDIA H200"}, [{}]).write(rows)
    rows = [{"what": "14B, a guided step", "plan": "ring2", "seconds": 2.0, "efficiency": 0.9754}]
    make("spread", {"device": "2 x NVIDIA H200"}, [{}]).write(rows)
    rows = [{"system": "wan_jax", "denoise": 2.0, "to_mp4": 3.0}]
    make("end_to_end_1.3B", {"device": "cpu", "model": "1.3B", "steps": 9}, [{}]).write(rows)
    found = load("table").render(tmp_path)
    assert "| memory | 1.3B, decode, 8 GiB | no memory |" in found
    assert "| memory | 1.3B, all, 6GB: a step | 3 s | - | 1.25 to no limit |" in found
    peer = "2 s (diffusers, native)"
    assert f"| dit | 14B, one forward | 2 s | {peer} | 1.00 | 50 % |" in found
    assert f"| dit | 14B, one forward, fp8 | 2 s | {peer} | 1.00 to bfloat16 | - |" in found
    assert "| spread | 14B, a guided step, plan ring2 | 2 s | - | 0.975 efficient |" in found
    assert (
        "| end_to_end | denoising, 1.3B, 9 steps: all, to the mp4 | 3 s | - | - | - | - |" in found
    )


# All of them

STAND_IN = """
import json, os, pathlib, sys, time
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--child" in given:
    place = pathlib.Path(given["--folder"]) / "manifest.json"
    place.parent.mkdir(parents=True)
    place.write_text("{}")
    raise SystemExit(0)
place = pathlib.Path(os.environ["WAN_JAX_RESULTS"]) / (given["--name"] + ".json")
place.parent.mkdir(parents=True)
row = {"card": os.environ["CUDA_VISIBLE_DEVICES"], "begun": time.time()}
for seconds in (0.0, float(given.get("--sleep", 0.0))):
    time.sleep(seconds)
    rows = [{**row, "ended": time.time()}, {"error": "x"}]
    place.with_suffix(".partial").write_text(json.dumps({"rows": rows}))
    place.with_suffix(".partial").rename(place)
print("the last line")
raise SystemExit(int(given.get("--status", 0)))
"""


@pytest.fixture
def queue(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """A queue of all.py whose jobs are stand-ins."""
    module = load("all")
    (tmp_path / "benchmarks").mkdir()
    for name in ("job", "startup"):
        (tmp_path / "benchmarks" / f"{name}.py").write_text(STAND_IN)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "_LEAST", 0.0)
    monkeypatch.setattr(module, "_GRACE", 0.5)

    def make(jobs: dict[str, Any], *, cards: int = 2, seconds: float = 60.0) -> Any:
        own = {name: module.Job(*job) for name, job in jobs.items()}
        places = {"out": tmp_path / "out", "checkpoints": tmp_path / "checkpoints"}
        return module.Queue(own, module.cards_of(cards), seconds=seconds, **places)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return make


def gathered(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """The first row of each job's results."""
    files = sorted((tmp_path / "out").glob("*.json"))
    return {path.stem: json.loads(path.read_text())["rows"][0] for path in files}


def test_jobs_run_beside_each_other_on_cards_of_their_own(
    queue: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = {
        "whole": ("job.py", 1, -1),
        "reads": ("job.py --folder CKPT", 1, 1, "tiny"),
        "a": ("job.py --sleep 1", 1),
        "b": ("job.py --sleep 1 --status 3", 1),
    }
    made = queue(jobs)
    made.run()
    found = gathered(tmp_path)
    assert set(found) == set(jobs) and made.failed == ["b"]
    assert found["whole"]["card"] == "0,1"
    assert {found["a"]["card"], found["b"]["card"]} == {"0", "1"}
    assert found["a"]["begun"] < found["b"]["ended"] and found["b"]["begun"] < found["a"]["ended"]
    assert all(found["whole"]["begun"] > row["ended"] for n, row in found.items() if n != "whole")
    said = capsys.readouterr().out
    assert "exit status 3, 2 rows, 1 of them errors; the last line" in said
    assert (tmp_path / "out" / "reads.log").read_text() == "the last line\n"


def test_time_stops_jobs_and_keeps_what_they_wrote(
    queue: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = time.monotonic()
    made = queue({"slow": ("job.py --sleep 100", 1), "never": ("job.py", 1)}, cards=1, seconds=4.0)
    made.run()
    assert time.monotonic() - begun < 15.0 and set(gathered(tmp_path)) == {"slow"}
    assert made.failed == ["slow", "never"] and "never: not begun" in capsys.readouterr().out


def test_a_checkpoint_that_fails_keeps_only_its_readers(
    queue: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    jobs = {"reads": ("job.py --folder CKPT", 1, 1, "tiny"), "whole": ("job.py", 1, -1)}
    made = queue(jobs)
    made.run()
    assert set(gathered(tmp_path)) == {"whole"} and made.failed == ["write_tiny", "reads"]


def test_jobs_name_scripts_that_are_there(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("all")
    known = load("table").NAMES
    for name, job in module.JOBS.items():
        assert (FOLDER / job.command.split()[0]).is_file() and name.startswith(known)
        assert (module.FOLDER in job.command) == bool(job.model)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert module.cards_of(4) == ["2", "3"] and module.cards_of(1) == ["2"]
