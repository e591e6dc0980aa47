"""--plan and --plan_target: what is printed, the exit status, and what is left alone."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from absl import flags
from PIL import Image

from tests.unit import test_cli, test_image_jobs
from tests.unit.test_cli import ROOT, script
from wan_jax import loading
from wan_jax.planning import command as planning
from wan_jax.planning import programs, targets
from wan_jax.weights import checkpoint, remote

Show = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def _nothing_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, without a network, and with weights that cannot be read."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a plan reads no weights and downloads nothing")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for module, name in (
        (checkpoint, "restore"),
        (loading, "prepare"),
        (remote, "peek"),
        (remote, "download_hub"),
    ):
        monkeypatch.setattr(module, name, refuse)


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Show:
    """The status and the text of a plan, which leaves nothing behind."""

    def run(*arguments: str, images: bool = False) -> tuple[int, str]:
        before = sorted(tmp_path.rglob("*"))
        parse: Callable[..., flags.FlagValues] = test_image_jobs.parse if images else test_cli.parse
        values = parse("--plan", *arguments)
        assert planning.asked(values)
        with pytest.raises(SystemExit) as error:
            planning.show(values, ROOT / "configs")
        assert sorted(tmp_path.rglob("*")) == before
        return int(str(error.value.code)), capsys.readouterr().out

    return run


def test_a_script_plans_the_miniature_for_the_devices_at_hand(tmp_path: Path) -> None:
    done = script("--plan", cwd=tmp_path, devices=2)
    assert done.returncode == 0, done.stderr
    stages = [stage for stage in programs.STAGES if stage not in ("views", "image")]
    lines = done.stdout.splitlines()
    assert lines[1] == "2 x cpu: 2 devices: guidance 2"
    assert lines[2].split("  ")[0] == "on each device"
    assert [line.split()[0] for line in lines[3:-4]] == [*stages, "whole"]
    assert lines[-2].startswith("it fits: 0.0")
    assert done.stderr.splitlines()[-len(stages) :] == [f"compiling {stage}" for stage in stages]
    assert not list(tmp_path.iterdir())


def test_a_signal_ends_a_plan_while_the_compiler_works(tmp_path: Path) -> None:
    """At once, and not when it is done: for a TPU that may be ten minutes later."""
    given = [sys.executable, str(ROOT / "run_t2v.py"), "--plan"]
    options = {"cwd": tmp_path, "env": test_cli.environment(1), "text": True}
    with subprocess.Popen(given, stderr=subprocess.PIPE, **options) as process:
        assert process.stderr is not None
        assert any(line.startswith("compiling") for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == -signal.SIGTERM


def test_what_takes_long_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for name, slow in (("v6e:1x1", ", which takes ten minutes and more"), ("h200:1", "")):
        for stage in ("denoise", "decode"):
            planning._compiling(targets.parse(name), stage)
        assert capsys.readouterr().err == f"compiling denoise\ncompiling decode{slow}\n"


def test_the_script_of_images_plans_too(tmp_path: Path) -> None:
    done = script("--plan", "--plan_target", "h200:2", cwd=tmp_path, name="run_i2v.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "h200:2: 2 devices: guidance 2"


def test_a_video_that_does_not_fit_is_the_status_1(tmp_path: Path) -> None:
    """Nothing of the checkpoint need be there."""
    given = ["--plan", "--plan_target", "h100:1", "--task", "t2v-14B", "--offload_model", "False"]
    done = script(*given, "--ckpt_dir", "Wan-AI/Wan2.1-T2V-14B-Diffusers", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.endswith(
        "\nit does not fit: decode needs 62.75 of 59.70 GiB; it would with --offload_model True\n\n"
    )
    assert done.stderr == ""


TASKS = [
    ("t2v-1.3B", False, "81 frames of 832x480 in 50 steps"),
    ("t2v-14B", False, "81 frames of 1280x720 in 50 steps"),
    ("t2i-14B", False, "an image of 1280x720 in 50 steps"),
    ("i2v-14B", True, "81 frames of 1280x720 in 40 steps"),
    ("i2v-14B-480P", True, "81 frames of 832x480 in 40 steps"),
    ("flf2v-14B", True, "81 frames of 1280x720 in 50 steps"),
]


@pytest.mark.parametrize(("task", "images", "title"), TASKS)
def test_a_task_needs_neither_checkpoint_nor_prompt_nor_images(
    task: str, images: bool, title: str, show: Show
) -> None:
    status, text = show("--task", task, "--plan_target", "h200:8", images=images)
    assert status == 0
    assert text.startswith(f"{title}, bfloat16\nh200:8: 8 devices: guidance 2 x ulysses 4\n")
    assert "roofline" not in text and "GB sent by formula\n" in text
    assert "of 989 TFLOP/s, shares that are measured on an H200" in text
    assert "memory: what JAX takes of a card, see XLA_PYTHON_CLIENT_MEM_FRACTION\n" in text
    assert "\nit fits: " in text


def test_weights_of_8_bits_are_told(show: Show) -> None:
    status, text = show("--task", "t2v-14B", "--plan_target", "h100:1", "--quantize", "fp8")
    assert status == 0 and "in 50 steps, bfloat16 and fp8\nh100:1: 1 device\n" in text
    assert re.search(r"\ndenoise +17\.\d+ ", text)
    assert "seconds are those without --quantize" in text


def test_how_devices_share_is_by_the_flags_or_by_the_target(show: Show) -> None:
    task = ("--task", "t2v-14B", "--plan_target")
    plans = {
        ("h200:8",): "8 devices: guidance 2 x ulysses 4",
        ("h100:8",): "8 devices: guidance 2 x ulysses 4; weights of dit split",
        ("h100:8", "--nodit_fsdp"): "8 devices: guidance 2 x ulysses 4",
        ("h200:8", "--dit_fsdp", "--t5_fsdp"): (
            "8 devices: guidance 2 x ulysses 4; weights of dit and umt5 split"
        ),
        ("h200:8", "--ulysses_size", "8"): "8 devices: ulysses 8",
        ("h200:8", "--ulysses_size", "2", "--ring_size", "4"): "8 devices: ulysses 2 x ring 4",
        ("h200:8", "--sample_guide_scale", "1"): "8 devices: ulysses 8",
        ("h200:1",): "1 device",
    }
    for given, expected in plans.items():
        _, text = show(*task, *given)
        assert text.splitlines()[1] == f"{given[0]}: {expected}"


def test_kinds_of_videos_have_a_table_each(show: Show) -> None:
    lines = [{"prompt": "a"}, {"prompt": "b", "frames": 5}, {"prompt": "c", "size": "480*480"}]
    lines += [{"prompt": "d", "steps": 3, "frames": 5}, {"prompt": "e"}]
    Path("prompts").write_text("\n".join(map(json.dumps, lines)))
    given = ("--task", "t2v-1.3B", "--size", "832*480", "--prompts_file", "prompts")
    _, text = show(*given, "--num_videos", "2", "--plan_target", "a100:2")
    assert re.findall(r"(?m)^.* in \d+ steps, bfloat16$", text) == [
        "4 times 81 frames of 832x480 in 50 steps, bfloat16",
        "2 times 5 frames of 832x480 in 50 steps, bfloat16",
        "2 times 81 frames of 480x480 in 50 steps, bfloat16",
        "2 times 5 frames of 832x480 in 3 steps, bfloat16",
    ]
    assert text.count("it fits: ") == 4


def test_one_of_several_that_does_not_fit_is_the_status_1(show: Show) -> None:
    lines = [{"prompt": "a", "frames": 1601}, {"prompt": "b", "frames": 5}]
    Path("prompts").write_text("\n".join(map(json.dumps, lines)))
    given = ("--task", "t2v-14B", "--prompts_file", "prompts", "--plan_target", "h100:1")
    status, text = show(*given)
    assert status == 1
    assert text.index("it does not fit: denoise") < text.index("it fits: ")


def test_the_size_follows_an_image_that_is_given(show: Show) -> None:
    Image.new("RGB", (640, 480)).save("a.png")
    target = ("--plan_target", "h200:8")
    _, text = show("--task", "i2v-14B", "--image", "a.png", *target, images=True)
    assert text.startswith("81 frames of 1104x816 in 40 steps")
    frames = ("--first_frame", "a.png")
    _, text = show("--task", "flf2v-14B", *frames, *target, images=True)
    assert text.startswith("81 frames of 1104x816 in 50 steps")
    _, text = show(*target, images=True)  # the miniature, with its own picture
    assert text.startswith("33 frames of 160x96 in 20 steps")


def test_a_checkpoint_that_is_there_tells_its_networks(tiny_source: Path, show: Show) -> None:
    status, text = show("--ckpt_dir", str(tiny_source), "--plan_target", "h200:1")
    assert status == 0 and text.startswith("5 frames of 32x16 in 2 steps, bfloat16\nh200:1: ")


def test_a_stage_on_the_cpu_takes_no_memory_and_no_time(show: Show) -> None:
    _, text = show("--task", "t2v-1.3B", "--t5_cpu", "--plan_target", "h200:1")
    line = next(line for line in text.splitlines() if line.startswith("text"))
    assert line.split()[1:] == ["0.00", "0.00", "0.00", "0.0%", "0.00", "0.00", "-"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--plan_target", "v6e:4x4"), "--plan_target v6e:4x4 is given without --plan; add --plan"),
        (("--plan", "--plan_target", "b2:8"), "--plan_target is 'b2:8'; one of v5e, v5p, v6e, tpu"),
        (("--plan", "--plan_target", "v6e:8"), "--plan_target is 'v6e:8'; after v6e: 2 numbers"),
        (("--plan", "--plan_target", "h100:8", "--ring_size", "3"), "--ulysses_size 1, ring_size"),
        (("--plan", "--plan_target", "h100:8", "--frame_num", "6"), "--frame_num is 6; 4n + 1"),
        (("--plan", "--plan_target", "h100:8", "--ulysses_size", "0"), "--ulysses_size is 0; 1"),
        (("--plan", "--task", "t2v-14B", "--config", "x.py"), "--task t2v-14B and --config x.py"),
    ],
)
def test_wrong_flags_are_named(given: tuple[str, ...], message: str) -> None:
    values = test_cli.parse(*given)
    with pytest.raises(ValueError) as error:
        planning.asked(values) and planning.show(values, ROOT / "configs")
    assert str(error.value).startswith(message)


def test_a_slice_without_libtpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_has_libtpu", lambda: False)
    with pytest.raises(ValueError, match="--plan_target is 'v6e:4x4', .*: pip install libtpu$"):
        planning.show(test_cli.parse("--plan", "--plan_target", "v6e:4x4"), ROOT / "configs")


def test_a_plan_for_a_slice_of_tpus_is_compiled(tmp_path: Path) -> None:
    """The whole way, of the miniature; its convolutions take a minute."""
    pytest.importorskip("libtpu")
    size = ["--size", "32*32", "--frame_num", "1", "--sample_steps", "2"]
    done = script("--plan", "--plan_target", "v5e:2x2", *size, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "v5e:2x2: 4 devices: guidance 2 x ring 2" in done.stdout  # of three heads
    assert "activations as the compiled programs need them; TFLOP" in done.stdout
    assert os.listdir(tmp_path) == []
