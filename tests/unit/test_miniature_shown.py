"""The trained miniatures that come with the package show what they are told.

Of every other network the weights in the tests are random, and videos mean nothing.
"""

from pathlib import Path

import numpy as np
import pytest

import wan_jax
from tests import tolerances
from wan_jax import conditioning, shipped, streaming
from wan_jax.config import KINDS
from wan_jax.pipeline import Wan
from wan_jax.training.miniature import captions, evaluate, judge, pack

pytestmark = pytest.mark.usefixtures("optimised")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Wan:
    return wan_jax.load("mini-t2v", cache_dir=tmp_path_factory.mktemp("cache"))


def test_videos_show_what_captions_say(wan: Wan) -> None:
    """Captions of combinations that were never trained on; all defaults, guidance among them.

    One may be wrong in motion, size or shape: of those with two objects 2 to 6 % are.
    """
    square = [scene for n in (1, 2) for scene in evaluate.held_out(2, n)]
    assert all(scene.size == wan.config.defaults.size for scene in square)
    rng = np.random.default_rng(4)
    told = [captions.caption(scene, rng) for scene in square]
    videos = wan.generate(told, seed=0)
    wrong = []
    for text, video, scene in zip(told, videos, square, strict=True):
        seen = judge.verdict(video, scene)
        assert all(seen[claim] for claim in ("count", "colour", "background")), (text, seen)
        wrong += [] if all(seen.values()) else [(text, seen)]
    assert len(wrong) <= 1, wrong


def test_the_vae_draws_held_out_clips(wan: Wan) -> None:
    """Through the latents and back, as the product encodes and decodes them."""
    vae = wan.network("vae")
    for scene in (evaluate.held_out(2, n)[0] for n in (1, 2)):
        drawn = evaluate.truth(scene)
        chunks = conditioning.video_chunks(drawn.astype(np.float32) / 127.5 - 1)
        coded = streaming.encode(vae, chunks, dtype=wan.dtype, what="the clip")
        latents = np.concatenate(list(coded), axis=1)
        again = streaming.decode(vae, latents, dtype=wan.dtype, pixels="uint8")
        frames = np.concatenate([chunk for chunk, _ in again], axis=1)[0]
        assert evaluate.psnr(frames, drawn) >= tolerances.MINIATURE_VAE, scene


def test_bfloat16_shows_what_float32_does(wan: Wan, tmp_path: Path) -> None:
    exact = wan_jax.load("mini-t2v", cache_dir=tmp_path, dtype="float32", offload=True)
    one, other = (x.generate(shipped.PROMPT, seed=0) for x in (wan, exact))
    assert evaluate.psnr(one, other) >= tolerances.MINIATURE_BFLOAT16


@pytest.mark.parametrize(("kind", "seed"), [("i2v", 1), ("flf2v", 2)])
def test_videos_go_on_from_images(kind: str, seed: int, tmp_path: Path) -> None:
    """The first frame is the given one, so is the last, and what lies between is the caption's."""
    wan = wan_jax.load(f"mini-{kind}", cache_dir=tmp_path, offload=True)
    scene = next(s for s in evaluate.held_out(8, 1) if s.size == wan.config.defaults.size)
    drawn = evaluate.truth(scene)
    given = dict(zip(("image", "last_image"), drawn[:: len(drawn) - 1][: wan.config.images]))
    text = captions.caption(scene, np.random.default_rng(seed))
    clip = wan.generate(text, seed=seed, **given)[0]
    seen = judge.verdict(clip, scene)
    assert all(seen.values()), (text, seen)
    assert evaluate.psnr(clip[0], drawn[0]) >= tolerances.MINIATURE_FIRST_FRAME
    if wan.config.images == 2:
        assert evaluate.psnr(clip[-1], drawn[-1]) >= tolerances.MINIATURE_LAST_FRAME


def test_they_are_small() -> None:
    files = [path for path in shipped.ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= pack.LIMIT
    folders = {path.parent for path in files if path.name == "model_index.json"}
    assert folders == {shipped.ASSETS / kind for kind in KINDS}
