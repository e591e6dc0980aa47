"""The miniatures that come with the package, generating here and in diffusers from one folder."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from transformers import AutoTokenizer, BatchFeature

import wan_jax
from tests import tolerances
from wan_jax import clip, fitting, shipped
from wan_jax.config import KINDS
from wan_jax.images import read_image
from wan_jax.tokenizer import load_tokenizer, tokenize
from wan_jax.training.miniature import captions, evaluate, networks, pack

pytestmark = pytest.mark.usefixtures("one_thread", "optimised")

# Square, for diffusers shows CLIP the middle of an image and the original shows it all of it.
SIZE, FRAMES, STEPS, GUIDANCE = (128, 128), 33, 20, 3.0


def _images(count: int) -> list[Image.Image]:
    """What the miniature knows: the circle of the prompt, and where it ends."""
    scene = dataclasses.replace(pack.SCENE, size=SIZE)
    frames = evaluate.truth(scene)
    return [Image.fromarray(frames[i]) for i in (0, -1)][:count]


def _views(images: Any, **_: Any) -> BatchFeature:
    """What CLIP sees of images by the original's resize; diffusers' smooths them before."""
    every = images if isinstance(images, list) else [images]
    found = [fitting.clip_view(read_image(image), networks.CLIP.image_size) for image in every]
    pixels = np.asarray(clip.normalise(np.stack(found))).transpose(0, 3, 1, 2)
    return BatchFeature({"pixel_values": torch.from_numpy(pixels.copy())})


def _theirs(folder: Path, noise: np.ndarray, images: list[Image.Image]) -> np.ndarray:
    """Frames [b, f, y, x, 3] in -1..1 by diffusers."""
    _, t, h, w, _ = noise.shape
    kind: Any = WanImageToVideoPipeline if images else WanPipeline
    pipeline = kind.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if images:
        pipeline.image_processor = _views
    frames = pipeline(
        prompt=shipped.PROMPT,
        negative_prompt=captions.NEGATIVE_PROMPT,
        width=8 * w,
        height=8 * h,
        num_frames=4 * t - 3,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torch.from_numpy(np.ascontiguousarray(noise.transpose(0, 4, 1, 2, 3))),
        **dict(zip(("image", "last_image"), images)),
    ).frames
    return 2.0 * np.asarray(frames) - 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_diffusers(kind: str, tmp_path: Path) -> None:
    """With the checkpoint's own negative prompt, guidance and shift, which diffusers reads too."""
    images = _images(KINDS.index(kind))
    shape = (1, (FRAMES + 3) // 4, SIZE[1] // 8, SIZE[0] // 8, 16)
    noise = np.random.RandomState(3).standard_normal(shape).astype(np.float32)
    wanted = _theirs(shipped.ASSETS / kind, noise, images)
    wan = wan_jax.load(f"mini-{kind}", dtype="float32", cache_dir=tmp_path, offload=True)
    defaults = wan.config.defaults
    assert (defaults.guidance, defaults.negative_prompt) == (GUIDANCE, captions.NEGATIVE_PROMPT)
    latents = wan.generate(
        shipped.PROMPT,
        size=SIZE,
        frames=FRAMES,
        steps=STEPS,
        solver="unipc_diffusers",
        noise=noise,
        output="latents",
        **dict(zip(("image", "last_image"), images)),
    )
    frames = np.concatenate(list(wan.decode(latents, dtype="float32")), axis=1)
    assert frames.shape == wanted.shape == (1, FRAMES, SIZE[1], SIZE[0], 3)
    assert np.std(frames) > tolerances.MINIATURE_SHOWS
    error = np.mean(np.square(frames.astype(np.float64) - wanted))
    assert 10.0 * np.log10(2.0**2 / error) >= tolerances.MINIATURE_PSNR


def test_the_tokenizer_is_transformers_too() -> None:
    folder = shipped.ASSETS / "t2v" / "tokenizer"
    texts = [*captions.corpus(200, 1), *captions.NEGATIVE_PROMPT.split(", "), "Zürich 猫 🙂", ""]
    texts += ["A RED circle, medium-sized!", "<0x41> </s> &", "two anthropomorphic cats"]
    theirs = AutoTokenizer.from_pretrained(folder)
    ids, mask = tokenize(load_tokenizer(folder), texts, length=64)
    for text, row, used in zip(texts, ids, mask):
        assert theirs(text).input_ids == row[: used.sum()].tolist(), text
