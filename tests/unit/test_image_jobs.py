"""The script of images: tasks and their settings, images in flags and files, whole runs."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags
from PIL import Image

import wan_jax
from tests.unit.test_cli import ROOT, script
from wan_jax import cli, jobs, outputs, runner, shipped, tasks
from wan_jax.config import (
    FLF2V_14B,
    FLF2V_NEGATIVE_PROMPT,
    I2V_14B,
    I2V_NEGATIVE_PROMPT,
    NEGATIVE_PROMPT,
    WanConfig,
)
from wan_jax.tasks import IMAGE_TASKS

PROMPT = ["--prompt", "The bud opens."]


def parse(*arguments: str) -> flags.FlagValues:
    values = flags.FlagValues()
    cli.define_flags(IMAGE_TASKS, values, images=True)
    assert values(["run_i2v.py", *arguments]) == ["run_i2v.py"]
    return values


def plans(*arguments: str) -> jobs.Plan:
    return jobs.plan(parse(*arguments, *PROMPT), ROOT / "configs")


def plan(*arguments: str) -> outputs.Job:
    (job,) = plans(*arguments).jobs
    return job


@pytest.fixture(autouse=True)
def _pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """a.png of 160x90, b.jpg of 60x80, text.png that is no image, cut.png that ends early."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for name, width, height in (("a.png", 160, 90), ("b.jpg", 60, 80)):
        pixels = np.random.RandomState(width).randint(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(name)
    Path("text.png").write_text("not an image")
    Path("cut.png").write_bytes(Path("a.png").read_bytes()[:2000])


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> Callable[[WanConfig], None]:
    """Says of which kind the checkpoint is that --ckpt_dir real names."""
    Path("real").mkdir()

    def is_of(config: WanConfig) -> None:
        monkeypatch.setattr(jobs.loading, "read_config", lambda path: config)

    return is_of


SIZED = ("--task", "i2v-14B", "--size", "832*480")
I2V = ("--ckpt_dir", "real", "--image", "a.png")
FLF2V = ("--ckpt_dir", "real", "--first_frame", "a.png", "--last_frame", "b.jpg")


@pytest.mark.parametrize(
    ("arguments", "config", "grid", "steps", "shift", "negative"),
    [
        (("--task", "i2v-14B", *I2V), I2V_14B, (90, 160), 40, 5.0, I2V_NEGATIVE_PROMPT),
        ((*SIZED, *I2V), I2V_14B, (58, 104), 40, 3.0, I2V_NEGATIVE_PROMPT),
        (("--task", "i2v-14B-480P", *I2V), I2V_14B, (58, 104), 40, 3.0, I2V_NEGATIVE_PROMPT),
        (("--task", "i2v-14B-720P", *I2V), I2V_14B, (90, 160), 40, 5.0, I2V_NEGATIVE_PROMPT),
        (I2V, I2V_14B, (90, 160), 40, 5.0, I2V_NEGATIVE_PROMPT),
        (("--size", "480*832", *I2V), I2V_14B, (58, 104), 40, 3.0, I2V_NEGATIVE_PROMPT),
        (("--task", "flf2v-14B", *FLF2V), FLF2V_14B, (90, 160), 50, 16.0, FLF2V_NEGATIVE_PROMPT),
    ],
)
def test_defaults_are_the_reference_s(
    arguments: tuple[str, ...],
    config: WanConfig,
    grid: tuple[int, int],
    steps: int,
    shift: float,
    negative: str,
    released: Callable[[WanConfig], None],
) -> None:
    """16:9 images at the areas of 480P and 720P: 832x464, as the reference's floor has it."""
    released(config)
    job = plan(*arguments)
    assert job.request.latent_shape == (21, *grid, 16)
    assert len(job.request.schedule.table) == steps
    assert job.settings["shift"] == shift
    assert job.request.guidance == 5.0
    assert job.request.negative == negative
    assert job.request.schedule.solver == "unipc"


def test_negative_prompts_begin_as_the_reference_s() -> None:
    assert f"镜头晃动，{NEGATIVE_PROMPT}" == I2V_NEGATIVE_PROMPT
    assert f"镜头切换，镜头晃动，{NEGATIVE_PROMPT}" == FLF2V_NEGATIVE_PROMPT


def test_a_line_s_own_size_has_its_shift(released: Callable[[WanConfig], None]) -> None:
    released(I2V_14B)
    lines = [{"prompt": "x"}, {"prompt": "x", "size": "480*832"}, {"prompt": "x", "shift": 4}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    values = parse("--task", "i2v-14B", *I2V, "--prompts_file", "p.jsonl")
    made = jobs.plan(values, ROOT / "configs").jobs
    assert [job.settings["shift"] for job in made] == [5.0, 3.0, 4.0]


def test_every_task_has_settings_and_an_own_repository() -> None:
    for name, task in {**tasks.TEXT_TASKS, **IMAGE_TASKS}.items():
        found = tasks.read_settings(ROOT / "configs" / f"{task.config}.py")
        assert found["steps"] == (40 if name.startswith("i2v") else 50)
        assert found["size"] in found["sizes"]
        defaults = task.network.defaults
        for setting in ("shift", "shift_480p", "guidance", "solver", "steps", "frames"):
            usual = 1 if (name, setting) == ("t2i-14B", "frames") else getattr(defaults, setting)
            assert found.get(setting) == usual, (name, setting)
        kind = name.split("-")[0].replace("t2i", "t2v").upper()
        assert task.repository.startswith(f"Wan-AI/Wan2.1-{kind}-")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--ckpt_dir", "nano-i2v"),
            "--image is missing; this checkpoint makes a video of a text and an image",
        ),
        (("--first_frame", "a.png"), "--last_frame is missing; this checkpoint makes a video betw"),
        (("--last_frame", "a.png"), "--first_frame is missing; this checkpoint makes a video bet"),
        (
            ("--image", "a.png", "--last_frame", "a.png"),
            "--image a.png is given; a first-and-last-frame checkpoint takes --first_frame and",
        ),
        (("--image", "nothing.png"), "--image 'nothing.png' does not exist; accepted: a whole"),
        (("--image", "."), "--image '.' is a folder; accepted"),
        (("--image", ""), "--image '' does not exist"),
        (("--image", "text.png"), "--image 'text.png' is not an image"),
        (("--image", "cut.png"), "--image 'cut.png' cannot be read: "),
        (("--first_frame", "a.png", "--last_frame", "text.png"), "--last_frame 'text.png' is not"),
        (("--first_frame", "a.png", "--last_frame", "b.jpg", "--frame_num", "1"), "--frame_num is"),
        (("--image", "a.png", "--size", "100*96"), "--size is (100, 96); width and height in mul"),
        (("--image", "a.png", "--size", "99200*99200"), "--size is (99200, 99200); sides up to 16"),
        (("--task", "i2v-14B", "--image", "a.png"), "needs --ckpt_dir: a folder, or Wan-AI/Wan2.1"),
        (("--task", "flf2v-14B"), "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers"),
        ((*SIZED, "--image", "a.png"), "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"),
        (("--ckpt_dir", "nano-t2v", "--image", "a.png"), "is a text-to-video checkpoint; run_t2v"),
        (
            ("--task", "i2v-14B", "--ckpt_dir", "nano-flf2v", "--image", "a.png"),
            "is a first-and-last-frame checkpoint and --task i2v-14B is for an image-to-video one; "
            "use --task flf2v-14B",
        ),
        (
            ("--ckpt_dir", "nano-i2v", "--first_frame", "a.png"),
            "--first_frame a.png is given; an image-to-video checkpoint takes --image",
        ),
    ],
)
def test_wrong_images_are_named(arguments: tuple[str, ...], words: str) -> None:
    before = sorted(Path().iterdir())
    with pytest.raises(ValueError, match=".") as caught:
        plans("--cache_dir", "cache", *arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path for path in Path().iterdir() if path.name not in ("cache", "home")) == before


def test_sizes_of_both_checkpoints_are_those_of_the_task(
    released: Callable[[WanConfig], None], capsys: pytest.CaptureFixture[str]
) -> None:
    released(I2V_14B)
    for size in ("832*480", "480*832", "1280*720", "720*1280"):
        plan("--task", "i2v-14B", "--size", size, *I2V)
    assert "warning" not in capsys.readouterr().err
    plan("--task", "i2v-14B-720P", "--size", "832*480", *I2V)
    assert "warning: size 832*480 is not one" in capsys.readouterr().err


def test_a_prompt_is_needed() -> None:
    with pytest.raises(ValueError, match="--prompt is missing; a text"):
        jobs.plan(parse("--image", "a.png"), ROOT / "configs")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "x", "image": "text.png"}, "line 1: image 'text.png' is not an image"),
        ({"prompt": "x", "image": 3}, "line 1: image is 3; a text is needed"),
        ({"prompt": "x", "fit": "squash"}, "line 1: fit is 'squash'; accepted: keep, crop, pad"),
        ({"prompt": "x", "last_image": "a.png"}, "--image a.png is given; a first-and-last-frame"),
        ({"prompt": "x", "first_frame": "a.png"}, "unknown keys ['first_frame']; known: ['prompt'"),
    ],
)
def test_a_wrong_line_is_named(line: dict[str, Any], words: str) -> None:
    Path("p.jsonl").write_text(json.dumps(line))
    values = parse("--image", "a.png", "--prompts_file", "p.jsonl")
    with pytest.raises(ValueError, match=".") as caught:
        jobs.plan(values, ROOT / "configs")
    assert words in str(caught.value)


def test_a_script_of_texts_does_not_take_a_checkpoint_of_images() -> None:
    values = flags.FlagValues()
    cli.define_flags(tasks.TEXT_TASKS, values)
    values(["run_t2v.py", "--ckpt_dir", "nano-i2v"])
    with pytest.raises(ValueError, match="is an image-to-video checkpoint; run_i2v.py runs those"):
        jobs.plan(values, ROOT / "configs")


def test_images_of_a_file_and_how_they_fit() -> None:
    lines: list[Any] = [
        {"prompt": "1"},
        {"prompt": "2", "image": "b.jpg"},
        {"prompt": "3", "image": "b.jpg", "fit": "crop"},
        {"prompt": "4", "fit": "pad", "num_videos": 2},
    ]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    values = parse("--image", "a.png", "--size", "64*48", "--prompts_file", "p.jsonl")
    made = jobs.plan(values, ROOT / "configs").jobs
    facts = [(job.images, job.settings["fit"], job.settings["resolution"]) for job in made]
    assert facts == [
        (("a.png",), "keep", [64, 32]),
        (("b.jpg",), "keep", [48, 64]),
        (("b.jpg",), "crop", [64, 48]),
        (("a.png",), "pad", [64, 48]),
        (("a.png",), "pad", [64, 48]),
    ]
    assert [job.request.latent_shape[1:3] for job in made] == [(4, 8), (8, 6)] + [(6, 8)] * 3
    first, second, third, fourth, fifth = (job.settings["image_sha256"] for job in made)
    assert first == fourth == fifth != second == third


def test_images_in_a_file_tell_the_kind_of_the_miniature() -> None:
    line = {"prompt": "x", "image": "a.png", "last_image": "b.jpg"}
    Path("p.jsonl").write_text(json.dumps(line))
    made = jobs.plan(parse("--prompts_file", "p.jsonl"), ROOT / "configs")
    assert made.source == shipped.ASSETS / "flf2v"
    assert made.jobs[0].images == ("a.png", "b.jpg")
    assert set(made.jobs[0].settings) >= {"image_sha256", "last_image_sha256"}


def test_prompts_of_one_image_share_its_pixels() -> None:
    lines = [json.dumps({"prompt": str(i)}) for i in range(20)]
    Path("p.jsonl").write_text("\n".join(lines))
    made = jobs.plan(parse("--image", "a.png", "--prompts_file", "p.jsonl"), ROOT / "configs").jobs
    assert len({id(job.request.images[0].pixels) for job in made}) == 1


@pytest.mark.parametrize("name", ["a.png", "./a.png", "link.png"])
def test_an_image_to_read_is_not_written_over(name: str) -> None:
    Path("link.png").symlink_to("a.png")
    before = Path("a.png").read_bytes()
    for more in ((), ("--skip_existing",)):
        with pytest.raises(ValueError, match="is an image to read; give another name"):
            plans("--image", "a.png", "--frame_num", "1", "--save_file", name, *more)
    assert Path("a.png").read_bytes() == before


def test_an_enormous_file_is_not_read() -> None:
    with open("sparse.png", "wb") as file:
        file.truncate(2**38)
    with pytest.raises(ValueError, match=r"--image 'sparse.png' has 274877906944 bytes; accepted"):
        plans("--image", "sparse.png")


def test_a_strip_is_named() -> None:
    Image.new("RGB", (3000, 1)).save("strip.png")
    with pytest.raises(ValueError, match="^--image is of 3000x1 pixels, for a video of "):
        plans("--image", "strip.png")
    Image.new("RGB", (3000, 10)).save("strip.png")
    with pytest.raises(ValueError, match=r"^--image makes a video of size \(16624, 48\); sides"):
        plans("--image", "strip.png", "--size", "1280*720")


def test_an_image_that_changes_is_read_again() -> None:
    before = plan("--image", "a.png")
    Path("b.jpg").rename("a.png")
    after = plan("--image", "a.png")
    assert before.settings["image_sha256"] != after.settings["image_sha256"]
    assert before.request.images[0].pixels.shape != after.request.images[0].pixels.shape


@pytest.fixture
def run(tiny_i2v_source: Path, tiny_cache: Path) -> Callable[..., None]:
    """Runs the script's two halves in this process on a tiny checkpoint."""

    def run(*arguments: str) -> None:
        given = ["--ckpt_dir", str(tiny_i2v_source), "--cache_dir", str(tiny_cache), *arguments]
        values = parse(*given)
        runner.execute(values, jobs.plan(values, ROOT / "configs"))

    return run


def test_a_batch_of_images(run: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    """What the record tells, what is skipped, and that another image is another video."""
    lines = [{"prompt": "x", "image": name} for name in ("a.png", "b.jpg", "a.png")]
    lines[2]["prompt"] = "y"
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    batch = ["--prompts_file", "p.jsonl", "--base_seed", "1", "--skip_existing"]
    batch += ["--size", "64*48"]
    run(*batch, "--save_file", "v.npz")
    record = json.loads(Path("v_001.npz.json").read_text())
    assert record["images"] == ["b.jpg"]
    assert (record["size"], record["resolution"], record["fit"]) == ([64, 48], [48, 64], "keep")
    assert record["seconds"]["image"] > 0
    assert record["seconds"]["clip"] > 0
    with np.load("v_001.npz") as saved:
        assert saved["frames"].shape == (5, 64, 48, 3)
    capsys.readouterr()
    run(*batch, "--save_file", "v.npz")
    assert capsys.readouterr().err.count("skipped ") == 3
    Path("b.jpg").write_bytes(Path("a.png").read_bytes())
    run(*batch, "--save_file", "w.npz")
    with np.load("v_000.npz") as one, np.load("w_000.npz") as other:
        np.testing.assert_array_equal(one["latents"], other["latents"])
    with np.load("w_001.npz") as moved:
        assert moved["frames"].shape == (5, 32, 64, 3)


def test_an_interrupted_video_of_an_image_is_taken_up(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["--image", "a.png", "--base_seed", "4", "--sample_steps", "3", *PROMPT]
    run(*line, "--save_file", "whole.npz")
    whole = cli.Reporter.__call__

    def stop(self: cli.Reporter, progress: Any) -> None:
        whole(self, progress)
        if progress.carry is not None and progress.done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(cli.Reporter, "__call__", stop)
        with pytest.raises(cli.Stopped, match="after step 2"):
            run(*line, "--save_file", "two.npz", "--resume_dir", "states")
    # The state of another image is not this one's.
    run(*[word.replace("a.png", "b.jpg") for word in line], "--resume_dir", "states",
        "--save_file", "other.npz")  # fmt: skip
    assert json.loads(Path("other.npz.json").read_text())["resumed_after"] is None
    run(*line, "--save_file", "two.npz", "--resume_dir", "states")
    assert json.loads(Path("two.npz.json").read_text())["resumed_after"] == 2
    with np.load("whole.npz") as one, np.load("two.npz") as two:
        np.testing.assert_array_equal(one["latents"], two["latents"])
        np.testing.assert_array_equal(one["frames"], two["frames"])


def test_the_script_runs_small_networks(tmp_path: Path) -> None:
    """On random weights: one image, two images, and bad input in one line with status 2."""
    small = ["--cache_dir", "cache", "--size", "64*48", "--frame_num", "5", "--sample_steps", "1"]
    one = ["--ckpt_dir", "nano-i2v", "--image", "a.png"]
    two = ["--ckpt_dir", "nano-flf2v", "--first_frame", "a.png", "--last_frame", "b.jpg"]
    for name, given in (("i.mp4", one), ("f.mp4", two)):
        done = script(*small, *PROMPT, *given, "--save_file", name, cwd=tmp_path, name="run_i2v.py")
        assert done.returncode == 0, done.stderr
        assert "random weights" in done.stderr
        assert (tmp_path / name).stat().st_size > 500
    done = script(*small, *PROMPT, "--image", "cut.png", cwd=tmp_path, name="run_i2v.py")
    assert done.returncode == 2
    assert done.stderr.strip().startswith("run_i2v.py: error: --image 'cut.png' cannot be read")
    assert done.stderr.strip().count("\n") == 0


def test_images_are_encoded_once_for_all_videos_of_them(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, told = wan_jax.Wan.encode_images, []

    def counted(self: wan_jax.Wan, request: Any, callback: Any = None) -> Any:
        told.append(request)
        return encode(self, request, callback)

    lines = [{"prompt": "x", "num_videos": 2}, {"prompt": "y"}, {"prompt": "z", "image": "b.jpg"}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    line = ["--image", "a.png", "--base_seed", "1", "--sample_steps", "1", "--size", "64*48"]
    with monkeypatch.context() as patch:
        patch.setattr(wan_jax.Wan, "encode_images", counted)
        run(*line, "--prompts_file", "p.jsonl", "--save_file", "v.npz")
    assert len(told) == 2
    run(*line, "--prompt", "y", "--save_file", "alone.npz")
    with np.load("v_002.npz") as one, np.load("alone.npz") as alone:
        np.testing.assert_array_equal(one["latents"], alone["latents"])
