"""The miniature that comes with the package, generating here and in diffusers from one folder.

Random weights take the place of what is not trained yet.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from transformers import AutoTokenizer

import wan_jax
from tests import tolerances
from tests.random_miniature import write_networks
from wan_jax import shipped
from wan_jax.config import KINDS
from wan_jax.tokenizer import load_tokenizer, tokenize
from wan_jax.training.miniature import captions
from wan_jax.training.miniature.pack import pack

pytestmark = pytest.mark.usefixtures("one_thread")

# Square, for diffusers shows CLIP the middle of an image and the original shows it all of it.
SIZE, FRAMES, STEPS, GUIDANCE = (128, 128), 33, 20, 3.0
SMALL = (64, 64), 9, 3  # of random weights, which mean nothing anyway


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three checkpoints; those that are not trained yet have random weights."""
    path = tmp_path_factory.mktemp("miniature")
    write_networks(path / "networks")
    pack(path / "networks", path / "assets")
    trained = {kind: shipped.ASSETS / kind for kind in KINDS}
    return {
        kind: own if (own / "model_index.json").is_file() else path / "assets" / kind
        for kind, own in trained.items()
    }


def _images(count: int, size: tuple[int, int]) -> list[Image.Image]:
    stream = np.random.RandomState(5)
    coarse = [stream.randint(0, 256, (4, 4, 3), np.uint8) for _ in range(count)]
    return [Image.fromarray(pixels).resize(size) for pixels in coarse]


def _theirs(folder: Path, noise: np.ndarray, images: list[Image.Image], steps: int) -> np.ndarray:
    """Frames [b, f, y, x, 3] in -1..1 by diffusers."""
    _, t, h, w, _ = noise.shape
    kind: Any = WanImageToVideoPipeline if images else WanPipeline
    pipeline = kind.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        prompt=shipped.PROMPT,
        negative_prompt=captions.NEGATIVE_PROMPT,
        width=8 * w,
        height=8 * h,
        num_frames=4 * t - 3,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        latents=torch.from_numpy(np.ascontiguousarray(noise.transpose(0, 4, 1, 2, 3))),
        **dict(zip(("image", "last_image"), images)),
    ).frames
    return 2.0 * np.asarray(frames) - 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_diffusers(assets: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """With the checkpoint's own negative prompt, guidance and shift, which diffusers reads too."""
    trained = assets[kind].parent == shipped.ASSETS
    size, count, steps = (SIZE, FRAMES, STEPS) if trained else SMALL
    images = _images(KINDS.index(kind), size)
    shape = (1, (count + 3) // 4, size[1] // 8, size[0] // 8, 16)
    noise = np.random.RandomState(3).standard_normal(shape).astype(np.float32)
    wanted = _theirs(assets[kind], noise, images, steps)
    wan = wan_jax.load(assets[kind], dtype="float32", cache_dir=tmp_path, offload=True)
    defaults = wan.config.defaults
    assert (defaults.guidance, defaults.negative_prompt) == (GUIDANCE, captions.NEGATIVE_PROMPT)
    latents = wan.generate(
        shipped.PROMPT,
        size=size,
        frames=count,
        steps=steps,
        solver="unipc_diffusers",
        noise=noise,
        output="latents",
        **dict(zip(("image", "last_image"), images)),
    )
    frames = np.concatenate(list(wan.decode(latents, dtype="float32")), axis=1)
    assert frames.shape == wanted.shape == (1, count, size[1], size[0], 3)
    assert np.std(frames) > tolerances.MINIATURE_SHOWS
    error = np.mean(np.square(frames.astype(np.float64) - wanted))
    assert 10.0 * np.log10(2.0**2 / error) >= tolerances.MINIATURE_PSNR


def test_the_tokenizer_is_transformers_too(assets: dict[str, Path]) -> None:
    texts = [*captions.corpus(200, 1), *captions.NEGATIVE_PROMPT.split(", "), "Zürich 猫 🙂", ""]
    texts += ["A RED circle, medium-sized!", "<0x41> </s> &", "two anthropomorphic cats"]
    theirs = AutoTokenizer.from_pretrained(assets["t2v"] / "tokenizer")
    ids, mask = tokenize(load_tokenizer(assets["t2v"] / "tokenizer"), texts, length=64)
    for text, row, used in zip(texts, ids, mask):
        assert theirs(text).input_ids == row[: used.sum()].tolist(), text
