"""The command line: flags, how errors end a run, and the reference's own command lines."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from wan_jax import cli
from wan_jax.tasks import TEXT_TASKS

ROOT = Path(__file__).parents[2]


def parse(*arguments: str) -> flags.FlagValues:
    values = flags.FlagValues()
    cli.define_flags(TEXT_TASKS, values)
    rest = values(["run_t2v.py", *arguments])
    assert rest == ["run_t2v.py"]
    return values


def environment(devices: int = 1, *, optimised: bool = False) -> dict[str, str]:
    """That of a script which finds so many devices; optimised: its programs are, as a user's."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    if not optimised:
        flags += " --xla_backend_optimization_level=0"
    own = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return {**os.environ, **own}


def script(
    *arguments: str,
    cwd: Path,
    name: str = "run_t2v.py",
    devices: int = 1,
    optimised: bool = False,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / name), *arguments],
        cwd=cwd,
        env=environment(devices, optimised=optimised),
        capture_output=True,
        text=True,
        check=False,
    )


# Every text-to-video and text-to-image command of the reference's README (the prompts shortened):
# what stands before the script's name is the launcher's, and one JAX process drives all devices.
T2V, T2I = "Two cats in boxing gear fight.", "一个朴素端庄的美人"
REFERENCE = [
    (
        "python generate.py  --task t2v-14B --size 1280*720 --ckpt_dir ./Wan2.1-T2V-14B "
        f'--prompt "{T2V}"',
        {"task": "t2v-14B", "size": "1280*720", "ckpt_dir": "./Wan2.1-T2V-14B", "prompt": [T2V]},
    ),
    (
        "python generate.py  --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B "
        f'--offload_model True --t5_cpu --sample_shift 8 --sample_guide_scale 6 --prompt "{T2V}"',
        {
            "task": "t2v-1.3B",
            "size": "832*480",
            "ckpt_dir": "./Wan2.1-T2V-1.3B",
            "offload_model": True,
            "t5_cpu": True,
            "sample_shift": 8.0,
            "sample_guide_scale": 6.0,
            "prompt": [T2V],
        },
    ),
    (
        "torchrun --nproc_per_node=8 generate.py --task t2v-14B --size 1280*720 --ckpt_dir "
        f'./Wan2.1-T2V-14B --dit_fsdp --t5_fsdp --ulysses_size 8 --prompt "{T2V}"',
        {
            "task": "t2v-14B",
            "size": "1280*720",
            "ckpt_dir": "./Wan2.1-T2V-14B",
            "dit_fsdp": True,
            "t5_fsdp": True,
            "ulysses_size": 8,
            "prompt": [T2V],
        },
    ),
    *(
        (
            f"{key}python generate.py  --task t2v-14B --size 1280*720 --ckpt_dir ./Wan2.1-T2V-14B "
            f"--prompt \"{T2V}\" --use_prompt_extend --prompt_extend_method '{method}' "
            "--prompt_extend_target_lang 'zh'",
            {
                "task": "t2v-14B",
                "size": "1280*720",
                "ckpt_dir": "./Wan2.1-T2V-14B",
                "prompt": [T2V],
                "use_prompt_extend": True,
                "prompt_extend_method": method,
                "prompt_extend_target_lang": "zh",
            },
        )
        for key, method in (("DASH_API_KEY=your_key ", "dashscope"), ("", "local_qwen"))
    ),
    *(
        (
            "python generate.py --task t2i-14B --size 1024*1024 --ckpt_dir ./Wan2.1-T2V-14B  "
            f"--prompt '{T2I}'{extend}",
            {
                "task": "t2i-14B",
                "size": "1024*1024",
                "ckpt_dir": "./Wan2.1-T2V-14B",
                "prompt": [T2I],
                "use_prompt_extend": bool(extend),
            },
        )
        for extend in ("", " --use_prompt_extend")
    ),
    *(
        (
            "torchrun --nproc_per_node=8 generate.py --dit_fsdp --t5_fsdp --ulysses_size 8 "
            "--base_seed 0 --frame_num 1 --task t2i-14B  --size 1024*1024 --ckpt_dir "
            f"./Wan2.1-T2V-14B --prompt '{T2I}'{extend}",
            {
                "task": "t2i-14B",
                "size": "1024*1024",
                "ckpt_dir": "./Wan2.1-T2V-14B",
                "prompt": [T2I],
                "dit_fsdp": True,
                "t5_fsdp": True,
                "ulysses_size": 8,
                "base_seed": 0,
                "frame_num": 1,
                "use_prompt_extend": bool(extend),
            },
        )
        for extend in ("", " --use_prompt_extend")
    ),
]
# What the reference takes a flag for that is not given; None is the task's own.
UNSAID = {
    "size": None,
    "frame_num": None,
    "offload_model": True,  # on one device
    "ulysses_size": 1,  # both 1: chosen
    "ring_size": 1,
    "t5_fsdp": None,  # chosen, on one device False
    "t5_cpu": False,
    "dit_fsdp": None,
    "save_file": None,
    "use_prompt_extend": False,
    "prompt_extend_method": "local_qwen",
    "prompt_extend_model": None,
    "prompt_extend_target_lang": "zh",
    "base_seed": -1,
    "sample_solver": None,
    "sample_steps": None,
    "sample_shift": None,
    "sample_guide_scale": None,
}


@pytest.mark.parametrize(("line", "meaning"), REFERENCE)
def test_the_reference_s_command_lines(line: str, meaning: dict[str, object]) -> None:
    words = shlex.split(line)
    values = parse(*words[words.index("generate.py") + 1 :])
    assert {name: values[name].value for name in UNSAID | meaning} == UNSAID | meaning


@pytest.mark.parametrize(
    ("word", "meaning"), [("False", False), ("True", True), ("0", False), ("yes", True)]
)
def test_offload_model_takes_words(word: str, meaning: bool) -> None:
    assert parse("--offload_model", word).offload_model is meaning


def test_help_lists_the_flags(tmp_path: Path) -> None:
    done = script("--help", cwd=tmp_path)
    assert "--ckpt_dir" in done.stdout
    assert "--sample_shift" in done.stdout


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
