"""From flags and prompt files to checked videos: defaults, names, and what is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.unit.test_cli import ROOT, parse
from wan_jax import jobs, loading, outputs
from wan_jax.weights import miniature


def plans(*arguments: str) -> jobs.Plan:
    return jobs.plan(parse(*arguments), ROOT / "configs")


def plan(*arguments: str) -> outputs.Job:
    (job,) = plans(*arguments).jobs
    return job


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("checkpoint") / "nano"
    miniature.write(path)
    return str(path)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


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
    assert job.settings["shift"] == 5.0
    assert job.request.schedule.solver == "unipc"
    assert job.output.suffix == (".png" if task == "t2i-14B" else ".mp4")


def test_reference_command_line_keeps_its_meaning(checkpoint: str, tmp_path: Path) -> None:
    line = (
        f"--task t2v-1.3B --size 832*480 --ckpt_dir {checkpoint} --offload_model True --t5_cpu "
        "--sample_shift 8 --sample_guide_scale 6 --sample_solver dpm++ --sample_steps 7 "
        f"--frame_num 5 --base_seed 42 --save_file {tmp_path}/x.mp4 --ulysses_size 1 --ring_size 1"
    )
    values = parse(*line.split(), "--prompt", "Two cats")
    (job,) = jobs.plan(values, ROOT / "configs").jobs
    assert values.offload_model is True
    assert values.t5_cpu is True
    assert job.settings["prompt"] == "Two cats"
    assert job.request.guidance == 6.0
    assert job.settings["shift"] == 8.0
    assert job.request.schedule.solver == "dpm++"
    assert len(job.request.schedule.table) == 7
    assert job.request.latent_shape == (2, 60, 104, 16)
    assert job.request.seed == 42


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
        (["--ulysses_size", "0"], "--ulysses_size is 0"),
        (["--ring_size", "-1"], "--ring_size is -1"),
        (["--task", "t2v-14B"], "--ckpt_dir: a folder, or Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        (["--task", "t2i-14B"], "--ckpt_dir: a folder, or Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        (["--ckpt_dir", "/nowhere"], "/nowhere does not exist"),
        (["--num_videos", "0"], "--num_videos is 0"),
        (["--use_prompt_extend"], "--use_prompt_extend is not supported"),
        (["--prompts_file", "/nowhere.txt"], "--prompts_file /nowhere.txt"),
        (["--prompts_file", "x", "--prompt", "y"], "--prompt and --prompts_file"),
        (["--prompts_file", "x", "--noise_file", "y"], "--noise_file y is for one prompt"),
        (["--resume_dir", "/proc/1/x"], "--resume_dir /proc/1/x"),
        (["--save_file", "/nowhere/x.mp4"], "--save_file /nowhere/x.mp4"),
        (["--save_file", ""], "--save_file"),
        (["--save_file", "/"], "--save_file /"),
        (["--size", "1" * 5000 + "*16"], "--size is"),
        (["--ckpt_dir", ""], "--ckpt_dir : the path is empty"),
        (["--cache_dir", "/proc/1/x"], "--cache_dir /proc/1/x"),
        (["--config", "/nowhere.py"], "--config /nowhere.py"),
        (["--save_file", "x.avi"], "--save_file x.avi"),
        (["--noise_file", "/nowhere.npy"], "--noise_file /nowhere.npy"),
        (["--ckpt_dir", "/nowhere"], "--ckpt_dir /nowhere"),
    ],
)
def test_bad_values_are_named(arguments: list[str], words: str, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("size", ["720*1280", "1280*720", "480*832", "832*480", "1024*1024"])
def test_several_images_of_every_size(
    size: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--task", "t2i-14B", "--ckpt_dir", checkpoint, "--size", size, "--num_videos", "3"]
    made = plans(*line).jobs
    assert "warning" not in capsys.readouterr().err
    width, height = map(int, size.split("*"))
    assert {job.request.latent_shape for job in made} == {(1, height // 8, width // 8, 16)}
    assert [job.settings["video"] for job in made] == [0, 1, 2]
    assert {job.output.suffix for job in made} == {".png"}
    assert len({job.output for job in made}) == 3


@pytest.mark.parametrize("text", ["config = 5", 'config = {"sizes": 5}', "", "config = {"])
def test_a_broken_config_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match="mine.py"):
        plan("--config", str(tmp_path / "mine.py"))


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


# Several videos.


def test_several_prompts_and_videos(checkpoint: str) -> None:
    texts = ("--prompt", "a", "--prompt", "b", "--num_videos", "2", "--save_file", "x.mp4")
    made = plans("--ckpt_dir", checkpoint, *texts, "--base_seed", "7").jobs
    assert [(j.settings["prompt"], j.settings["video"], j.request.seed) for j in made] == [
        ("a", 0, 7),
        ("a", 1, 7),
        ("b", 0, 7),
        ("b", 1, 7),
    ]
    assert [str(job.output) for job in made] == [f"x_{n:03}.mp4" for n in range(4)]
    assert {job.request.num_videos for job in made} == {1}
    assert not any(job.seed_drawn for job in made)


def test_a_drawn_seed_is_one_a_prompt() -> None:
    made = plans("--prompt", "a", "--prompt", "b", "--num_videos", "2").jobs
    seeds = [job.request.seed for job in made]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert all(job.seed_drawn for job in made)
    assert [job.settings["seed"] for job in made] == seeds


def test_prompts_that_begin_alike_have_names_of_their_own() -> None:
    made = plans("--prompt", "x" * 60 + "a", "--prompt", "x" * 60 + "b").jobs
    assert len({job.output for job in made}) == 2


def test_a_file_of_prompts(tmp_path: Path) -> None:
    lines = [
        "A plain text, with a comma.",
        "",
        json.dumps({"prompt": "own", "seed": 3, "size": "64*32", "steps": 4, "frames": 5}),
        json.dumps({"prompt": "two", "size": [32, 32], "save_file": "two.gif", "num_videos": 2}),
        json.dumps({"prompt": "sharp", "guidance": 2, "shift": 1, "solver": "euler", "seed": None}),
    ]
    (tmp_path / "p.txt").write_text("\n".join(lines), encoding="utf-8-sig")
    made = plans("--prompts_file", "p.txt", "--base_seed", "9", "--sample_steps", "6").jobs
    assert [job.settings["prompt"] for job in made] == [lines[0], "own", "two", "two", "sharp"]
    assert [job.settings["steps"] for job in made] == [6, 4, 6, 6, 6]
    assert [job.request.seed for job in made] == [9, 3, 9, 9, 9]
    assert made[1].request.latent_shape == (2, 4, 8, 16)
    assert [str(job.output) for job in made[2:4]] == ["two_0.gif", "two_1.gif"]
    last = made[4].settings
    assert (last["guidance"], last["shift"], last["solver"]) == (2.0, 1.0, "euler")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a"', "line 2 is not a JSON object"),
        ('{"prompt": "a", "stepz": 3}', "line 2 has unknown keys ['stepz']"),
        ('{"steps": 3}', "line 2: prompt is None"),
        ('{"prompt": null}', "line 2: prompt is None"),
        ('{"prompt": ["a", "b"]}', "line 2: prompt is ['a', 'b']"),
        ('{"prompt": "a", "negative_prompt": 5}', "line 2: negative_prompt is 5"),
        ('{"prompt": "a", "save_file": ""}', "--save_file"),
        ('{"prompt": "a", "steps": 0}', "line 2: steps=0"),
        ('{"prompt": "a", "steps": "many"}', "line 2: steps"),
        ('{"prompt": "a", "size": "64x32"}', "line 2: size is '64x32'"),
        ('{"prompt": "a", "size": 64}', "line 2: size is 64"),
        ('{"prompt": "a", "frames": 6}', "line 2: frames is 6"),
        ('{"prompt": "a", "seed": -1}', "line 2: seed is -1"),
        ('{"prompt": "a", "seed": 1.5}', "line 2: seed is 1.5"),
        ('{"prompt": 5}', "line 2: prompt is 5"),
        ('{"prompt": "a", "save_file": 5}', "line 2: save_file is 5"),
        ('{"prompt": "a", "save_file": "a.avi"}', "--save_file a.avi"),
        ('{"prompt": "a", "num_videos": 0}', "line 2: num_videos is 0"),
    ],
)
def test_a_wrong_line_is_named(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(f"fine\n{line}\n")
    with pytest.raises(ValueError) as caught:
        plans("--prompts_file", "p.txt")
    assert words in str(caught.value)


def test_files_of_prompts_without_any(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="has no line with a prompt"):
        plans("--prompts_file", "p.txt")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"p\.txt cannot be read"):
        plans("--prompts_file", "p.txt")


def test_two_videos_of_one_name_are_refused(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "a", "save_file": "a.mp4"})
    (tmp_path / "p.txt").write_text(f"{line}\n{line}\n")
    with pytest.raises(ValueError, match=r"--save_file a\.mp4 would hold two videos"):
        plans("--prompts_file", "p.txt")


def test_noise_for_every_video_of_a_prompt(tmp_path: Path) -> None:
    noise = np.random.RandomState(0).standard_normal((2, 16, 2, 4, 4)).astype(np.float32)
    np.save(tmp_path / "n.npy", noise)
    small = ("--size", "32*32", "--frame_num", "5", "--noise_file", "n.npy")
    made = plans(*small, "--num_videos", "2").jobs
    for k, job in enumerate(made):
        assert job.noise is not None
        np.testing.assert_array_equal(job.noise[0], np.moveaxis(noise[k], 0, -1))
    with pytest.raises(ValueError, match=r"--noise_file n\.npy"):
        plans(*small)


# Finished ones.


def finish(job: outputs.Job, **changes: object) -> None:
    job.output.write_bytes(b"video")
    told = {"versions": {}, "checkpoint": None, "checkpoint_digest": "5", **job.settings, **changes}
    outputs.record_path(job.output.absolute()).write_text(json.dumps(told))


def test_finished_videos_are_skipped_by_their_record() -> None:
    arguments = ("--prompt", "a", "--prompt", "b", "--skip_existing")
    first, second = plans(*arguments, "--base_seed", "3").jobs
    finish(first)
    again = plans(*arguments, "--base_seed", "3")
    assert again.skipped == (first.output,)
    assert [job.settings["prompt"] for job in again.jobs] == ["b"]
    finish(second)
    assert not plans(*arguments, "--base_seed", "3").jobs
    assert not plans(*arguments).jobs  # any seed will do where none is asked for
    for other in (("--base_seed", "4"), ("--base_seed", "3", "--sample_steps", "5")):
        assert len(plans(*arguments, *other).jobs) == 2
    assert len(plans(*arguments[:-1], "--base_seed", "3").jobs) == 2


def test_finished_videos_of_a_given_name_are_skipped() -> None:
    arguments = ("--save_file", "x.gif", "--skip_existing", "--base_seed", "3")
    (job,) = plans(*arguments).jobs
    job.output.write_bytes(b"from elsewhere")
    assert plans(*arguments).skipped == (Path("x.gif"),)
    finish(job)
    assert plans(*arguments).skipped == (Path("x.gif"),)
    finish(job, steps=99)
    assert len(plans(*arguments).jobs) == 1
    finish(job, checkpoint="elsewhere")
    assert len(plans(*arguments).jobs) == 1


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"prompt": "mine"}'])
def test_what_is_no_record_is_not_replaced(text: str) -> None:
    Path("x.mp4.json").write_text(text)
    with pytest.raises(ValueError, match=r"--save_file x\.mp4: .*x\.mp4\.json is in the way"):
        plans("--save_file", "x.mp4")
    assert Path("x.mp4.json").read_text() == text
    Path("x.mp4.json").unlink()
    Path("x.mp4.json").mkdir()
    with pytest.raises(ValueError, match="is in the way"):
        plans("--save_file", "x.mp4")


def test_what_a_file_tells_of_itself_counts_without_a_record() -> None:
    arguments = ("--save_file", "x.npz", "--skip_existing", "--base_seed", "3")
    (job,) = plans(*arguments).jobs
    told = {"versions": {}, "checkpoint": None, **job.settings}
    np.savez("x.npz", metadata=np.array(json.dumps(told)))
    assert plans(*arguments).skipped == (Path("x.npz"),)
    assert len(plans(*arguments, "--sample_steps", "9").jobs) == 1


def test_the_same_checkpoint_is_known_by_its_contents(checkpoint: str, tmp_path: Path) -> None:
    cache = ("--cache_dir", str(tmp_path / "cache"))
    arguments = ("--prompt", "a", "--base_seed", "3", "--skip_existing", *cache)
    (job,) = plans("--ckpt_dir", checkpoint, *arguments).jobs
    finish(job, checkpoint=f"{checkpoint}/../{Path(checkpoint).name}")
    # Not converted here: its name has to do.
    assert plans("--ckpt_dir", checkpoint, *arguments).skipped == (job.output,)
    wan = loading.load(checkpoint, cache_dir=tmp_path / "cache", offload=True)
    assert len(plans("--ckpt_dir", checkpoint, *arguments).jobs) == 1  # other weights, then
    finish(job, checkpoint="moved", checkpoint_digest=wan.digest)
    assert plans("--ckpt_dir", checkpoint, *arguments).skipped == (job.output,)


def test_two_spellings_of_one_output_are_refused(tmp_path: Path) -> None:
    for one, two in (("a.png", "a.PNG"), ("a.mp4", str(tmp_path / "a.mp4"))):
        lines = [json.dumps({"prompt": "a", "save_file": name}) for name in (one, two)]
        (tmp_path / "p.txt").write_text("\n".join(lines))
        with pytest.raises(ValueError, match="would hold two videos"):
            plans("--prompts_file", "p.txt")


def test_a_folder_of_others_is_not_taken_for_finished(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "holiday.jpg").touch()
    with pytest.raises(ValueError, match=r"holiday\.jpg"):
        plans("--save_file", "cats.png", "--skip_existing")


def test_videos_of_a_prompt_share_the_seed_of_a_finished_one() -> None:
    arguments = ("--prompt", "a", "--num_videos", "2", "--skip_existing")
    first, _ = plans(*arguments).jobs
    finish(first)
    (again,) = plans(*arguments).jobs
    assert again.settings["video"] == 1
    assert again.request.seed == again.settings["seed"] == first.request.seed


def test_equal_jobs_are_told_apart() -> None:
    made = plans("--prompt", "a", "--prompt", "a", "--prompt", "b").jobs
    assert [job.copy for job in made] == [0, 1, 0]


@pytest.mark.parametrize("prompt", ["狐" * 50, "🦊" * 50, "a\x00\ud800\n/b", "." * 60])
def test_any_prompt_has_a_name(prompt: str) -> None:
    job = plan("--prompt", prompt)
    assert len(job.output.name.encode()) < 220
    assert job.output.parent == Path()


def test_prompts_with_separators_of_unicode_stay_whole(tmp_path: Path) -> None:
    text = "a cat\u2028on a mat\x0band a\x85dog"
    lines = [text, json.dumps({"prompt": text}, ensure_ascii=False)]
    (tmp_path / "p.txt").write_bytes("\r\n".join(lines).encode())
    assert [job.settings["prompt"] for job in plans("--prompts_file", "p.txt").jobs] == [text] * 2


def test_noise_has_no_seed_and_is_known_by_its_contents(tmp_path: Path) -> None:
    noise = np.random.RandomState(0).standard_normal((16, 2, 4, 4)).astype(np.float32)
    arguments = ("--size", "32*32", "--frame_num", "5", "--noise_file", "n.npy")
    np.save(tmp_path / "n.npy", noise)
    one = plan(*arguments)
    np.save(tmp_path / "n.npy", noise + 1)
    two = plan(*arguments)
    assert one.settings["seed"] is None
    assert not one.seed_drawn
    assert one.wanted != two.wanted
    with pytest.raises(ValueError, match=r"--noise_file n\.npy is for one prompt"):
        plan(*arguments, "--prompt", "a", "--prompt", "b")


def test_one_frame_of_a_video_task_is_a_video(checkpoint: str) -> None:
    task = ("--ckpt_dir", checkpoint, "--frame_num", "1")
    assert plan("--task", "t2v-14B", *task).output.suffix == ".mp4"
    assert plan("--task", "t2i-14B", *task).output.suffix == ".png"
    assert plan(*task).output.suffix == ".png"


def test_one_finished_video_does_not_stand_for_two() -> None:
    (job,) = plans("--prompt", "a").jobs
    finish(job)
    again = plans("--prompt", "a", "--prompt", "a", "--skip_existing")
    assert len(again.skipped) == len(again.jobs) == 1


def test_settings_are_json_and_tell_all() -> None:
    job = plan("--prompt", "a", "--base_seed", "1")
    assert json.loads(json.dumps(job.settings)) == job.settings
    for name in ("dtype", "size", "frames", "steps", "shift", "guidance", "solver"):
        assert job.settings[name] is not None
