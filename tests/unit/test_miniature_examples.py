"""The clips that the demonstration of a LoRA is trained on."""

from pathlib import Path

import numpy as np
import pytest

from wan_jax.training import config
from wan_jax.training.dataset import read_clip, read_listing
from wan_jax.training.lora import LoraConfig
from wan_jax.training.miniature import examples, judge, world

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("examples")
    examples.write(found, count=4, seed=3)
    return found


def test_they_are_what_the_trainer_reads_and_show_the_colour(folder: Path) -> None:
    listed = read_listing(folder)
    scenes = examples.scenes(4, colour="lime", seed=3)
    assert [example.name for example in listed] == [f"00{k}.mp4" for k in range(4)]
    for example, scene in zip(listed, scenes, strict=True):
        assert len(example.captions) == 4 and all("lime" in text for text in example.captions)
        clip = read_clip(example.path, size=scene.size, frames=scene.frames, fps=16)
        frames = np.round((clip + 1) * 127.5).astype(np.uint8)
        assert all(judge.verdict(frames, scene).values())


def test_the_configuration_that_goes_with_them() -> None:
    found = config.read(ROOT / "configs" / "train_lora_mini.py")
    assert found.ckpt_dir is None and found.part(LoraConfig).scale == 1.0
    assert found.sample_prompts and "lime" in found.sample_prompts[0]


def test_a_colour_of_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"one of {', '.join(world.PALETTE)} is needed"):
        examples.write(tmp_path, colour="mauve", count=1)
