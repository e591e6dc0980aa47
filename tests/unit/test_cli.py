"""The command line: the reference's flags and meanings, errors in a line, nothing half-written."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from tests.unit.test_media import decode
from wan_jax import cli
from wan_jax.weights import miniature

ROOT = Path(__file__).parents[2]
TASKS = ("t2v-1.3B", "t2v-14B", "t2i-14B")


def parse(*arguments: str) -> flags.FlagValues:
    values = flags.FlagValues()
    cli.define_flags(TASKS, values)
    rest = values(["run_t2v.py", *arguments])
    assert rest == ["run_t2v.py"]
    return values


def plan(*arguments: str) -> cli.Job:
    return cli.plan(parse(*arguments), ROOT / "configs")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("checkpoint") / "nano"
    miniature.write(path)
    return str(path)


def script(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "run_t2v.py"), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("task", "size", "frames"),
    [("t2v-1.3B", (832, 480), 21), ("t2v-14B", (1280, 720), 21), ("t2i-14B", (1280, 720), 1)],
)
def test_task_defaults_are_the_reference_s(
    task: str, size: tuple[int, int], frames: int, checkpoint: str
) -> None:
    job = plan("--task", task, "--ckpt_dir", checkpoint)
    t, h, w, _ = job.request.latent_shape
    assert (8 * w, 8 * h, t) == (*size, frames)
    assert len(job.request.schedule.table) == 50
    assert job.request.guidance == 5.0
    assert job.arguments["shift"] == 5.0
    assert job.request.schedule.solver == "unipc"
    assert job.output.suffix == (".png" if task == "t2i-14B" else ".mp4")


def test_reference_command_line_keeps_its_meaning(checkpoint: str, tmp_path: Path) -> None:
    line = (
        f"--task t2v-1.3B --size 832*480 --ckpt_dir {checkpoint} --offload_model True --t5_cpu "
        "--sample_shift 8 --sample_guide_scale 6 --sample_solver dpm++ --sample_steps 7 "
        f"--frame_num 5 --base_seed 42 --save_file {tmp_path}/x.mp4 --ulysses_size 1 --ring_size 1"
    )
    values = parse(*line.split(), "--prompt", "Two cats")
    job = cli.plan(values, ROOT / "configs")
    assert values.offload_model is True
    assert values.t5_cpu is True
    assert job.arguments["prompt"] == "Two cats"
    assert job.request.guidance == 6.0
    assert job.arguments["shift"] == 8.0
    assert job.request.schedule.solver == "dpm++"
    assert len(job.request.schedule.table) == 7
    assert job.request.latent_shape == (2, 60, 104, 16)
    assert job.request.seed == 42


@pytest.mark.parametrize(
    ("word", "meaning"), [("False", False), ("True", True), ("0", False), ("yes", True)]
)
def test_offload_model_takes_words(word: str, meaning: bool) -> None:
    assert parse("--offload_model", word).offload_model is meaning


def test_default_name_is_the_reference_s(checkpoint: str) -> None:
    job = plan("--task", "t2v-1.3B", "--ckpt_dir", checkpoint, "--prompt", "a b/c " + "x" * 80)
    assert job.output.name.startswith("t2v-1.3B_832*480_1_1_a_b_c_" + "x" * 44 + "_2")


def test_checkpoint_s_own_defaults_without_a_task(checkpoint: str) -> None:
    job = plan("--ckpt_dir", checkpoint)
    assert job.request.latent_shape == (5, 12, 16, 16)
    assert job.request.negative == "blurry, static"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--frame_num", "80"], "--frame_num is 80"),
        (["--size", "832x480"], "--size is '832x480'"),
        (["--size", "833*480"], "--size is (833, 480)"),
        (["--sample_steps", "0"], "--sample_steps=0"),
        (["--sample_steps", "1001"], "--sample_steps=1001"),
        (["--sample_shift", "-1"], "--sample_shift=-1"),
        (["--sample_shift", "nan"], "--sample_shift=nan"),
        (["--sample_guide_scale", "inf"], "--sample_guide_scale is inf"),
        (["--sample_solver", "heun"], "--sample_solver='heun'"),
        (["--prompt", "  "], "--prompt is '  '"),
        (["--base_seed", "-2"], "--base_seed is -2"),
        (["--ulysses_size", "2"], "--ulysses_size is 2"),
        (["--dit_fsdp"], "--dit_fsdp"),
        (["--task", "t2v-14B"], "hf download Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        (["--task", "t2i-14B"], "hf download Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        (["--ckpt_dir", "/nowhere"], "/nowhere is not a folder"),
        (["--save_file", "x.avi"], ".mp4"),
        (["--save_file", "/nowhere/x.mp4"], "/nowhere"),
        (["--save_file", "x.png"], "17"),
        (["--noise_file", "/nowhere.npy"], "/nowhere.npy"),
        (["--config", "/nowhere.py"], "/nowhere.py"),
        (["--save_file", "x.avi"], "--save_file x.avi"),
        (["--noise_file", "/nowhere.npy"], "--noise_file /nowhere.npy"),
        (["--ckpt_dir", "/nowhere"], "--ckpt_dir /nowhere"),
    ],
)
def test_bad_values_are_named(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        plan(*arguments)
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_odd_size_of_a_task_only_warns(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan("--task", "t2v-1.3B", "--ckpt_dir", checkpoint, "--size", "128*96")
    assert "warning: size 128*96" in capsys.readouterr().err


def test_an_image_is_one_frame(checkpoint: str) -> None:
    with pytest.raises(ValueError, match="--frame_num is 5; --task t2i-14B makes 1"):
        plan("--task", "t2i-14B", "--ckpt_dir", checkpoint, "--frame_num", "5")


@pytest.mark.parametrize("text", ["config = 5", 'config = {"sizes": 5}', "", "config = {"])
def test_a_broken_config_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match="mine.py"):
        plan("--config", str(tmp_path / "mine.py"))


def test_help_lists_the_flags(tmp_path: Path) -> None:
    done = script("--help", cwd=tmp_path)
    assert "--ckpt_dir" in done.stdout
    assert "--sample_shift" in done.stdout


def test_config_file_is_read_and_not_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text('"""Mine."""\n\nconfig = {"steps": 3, "size": (64, 32)}\n')
    job = plan("--config", str(file))
    assert len(job.request.schedule.table) == 3
    assert job.request.latent_shape[1:3] == (4, 8)
    file.write_text('config = {"steps": __import__("os").getpid()}\n')
    with pytest.raises(ValueError, match="mine.py"):
        plan("--config", str(file))
    file.write_text('config = {"step": 3}\n')
    with pytest.raises(ValueError, match="unknown settings"):
        plan("--config", str(file))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--frame_num", "80"],
        ["--frame_num", "many"],
        ["--frame_nun", "5"],
        ["--offload_model", "maybe"],
        ["stray"],
        ["--task", "t2v-7B"],
    ],
)
def test_wrong_flags_are_one_line_and_exit_2(arguments: list[str], tmp_path: Path) -> None:
    done = script(*arguments, "--cache_dir", str(tmp_path / "cache"), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("run_t2v.py: error: ")
    assert not list(tmp_path.iterdir())


def test_script_makes_a_video_and_says_how_long_it_took(tmp_path: Path) -> None:
    small = ["--cache_dir", "cache", "--size", "64*48", "--frame_num", "5", "--sample_steps", "2"]
    noise = np.random.RandomState(0).standard_normal((16, 2, 6, 8)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    runs = [
        script(*small, "--noise_file", "noise.npy", "--save_file", name, cwd=tmp_path)
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
    plain = [*small, "--ckpt_dir", f"cache/{converted.name}", "--save_file", "b.npz"]
    done = script(*plain, "--dtype", "float32", cwd=tmp_path)
    assert done.returncode == 2
    assert "was converted to bfloat16" in done.stderr
    done = script(*plain, "--noise_file", "noise.npy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "a.npz") as one, np.load(tmp_path / "b.npz") as two:
        np.testing.assert_array_equal(one["frames"], two["frames"])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"cache", "noise.npy", "a.mp4", "a.npz", "b.npz"}
