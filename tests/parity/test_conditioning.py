"""What images tell of a video, against the reference's steps in torch: files in, channels out.

The reference makes the whole video, encodes it at once and puts the mask in front. Where it would
fail it is completed as it means to be: two images at other lengths than 81 frames, and a last
image of another size than the first.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from flax import nnx
from PIL import Image

from tests import tolerances
from tests.parity.convert import load_torch
from tests.random_weights import random_array, random_state_dict
from wan_jax.clip import CLIP
from wan_jax.config import CLIPConfig, DiTConfig, UMT5Config, WanConfig
from wan_jax.pipeline import Wan
from wan_jax.request import make_request
from wan_jax.vae import VAE
from wan_jax.weights import trees
from wan_jax.weights import vae as vae_weights

SIZE = (64, 48)
SHAPES = {  # (height, width) of the first image, and what the reference makes of it
    "landscape": ((70, 100), (32, 64)),
    "portrait": ((101, 67), (64, 32)),
    "square": ((61, 61), (48, 48)),
    "panorama": ((20, 211), (16, 176)),
    "tiny": ((3, 5), (32, 64)),
}


pytestmark = pytest.mark.usefixtures("one_thread")


# The reference, in torch.


def read(path: Path) -> torch.Tensor:
    """[3, y, x] in -1..1."""
    with Image.open(path) as opened:
        levels = torch.from_numpy(np.array(opened.convert("RGB")))
    return (levels.permute(2, 0, 1).contiguous().float().div(255) - 0.5) / 0.5


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[3, y, x] by torch's bicubic, without antialiasing or clamping."""
    return torch.nn.functional.interpolate(image[None], size=(height, width), mode="bicubic")[0]


def cover(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resized until both sides suffice, and its middle."""
    rows, columns = image.shape[1:]
    ratio = max(height / rows, width / columns)
    whole = resize(image, round(rows * ratio), round(columns * ratio))
    top, left = ((a - b) // 2 for a, b in zip(whole.shape[1:], (height, width), strict=True))
    return whole[:, top : top + height, left : left + width]


def video_size(image: torch.Tensor, area: int) -> tuple[int, int]:
    """(height, width) of about this area at the image's aspect ratio, in multiples of 16."""
    ratio = image.shape[1] / image.shape[2]
    return int(math.sqrt(area * ratio) / 8) // 2 * 16, int(math.sqrt(area / ratio) / 8) // 2 * 16


def mask(frames: int, height: int, width: int, *, last: bool) -> torch.Tensor:
    """[4, t, h, w]: the frames that are known, the first one four times, in groups of four."""
    known = torch.zeros(frames, height, width)
    known[0] = 1
    if last:
        known[-1] = 1
    counted = torch.cat([known[:1].expand(4, -1, -1), known[1:]])
    return counted.unflatten(0, (-1, 4)).transpose(0, 1)


def encode(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """[1, z, t, h, w] of [3, f, y, x]: the mean, normalised."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (vae.encode(video[None]).latent_dist.mode() - mean) * (1 / std)


def channels(
    vae: AutoencoderKLWan, images: Sequence[torch.Tensor], *, area: int, frames: int
) -> torch.Tensor:
    """[1, 4 + z, t, h, w] of one image or two."""
    height, width = video_size(images[0], area)
    video = torch.zeros(3, frames, height, width)
    video[:, 0] = resize(images[0], height, width)
    for last in images[1:]:
        alike = last.shape == images[0].shape
        video[:, -1] = (resize if alike else cover)(last, height, width)
    known = mask(frames, height // 8, width // 8, last=len(images) > 1)
    return torch.cat([known[None], encode(vae, video)], dim=1)


# What is compared.


@functools.cache
def reference_vae() -> AutoencoderKLWan:
    vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    arrays = random_state_dict({k: tuple(v.shape) for k, v in vae.state_dict().items()})
    vae.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return vae.eval().requires_grad_(False)


def _vae() -> VAE:
    theirs = reference_vae()
    config = vae_weights.config_from_diffusers(dict(theirs.config))
    abstract = trees.abstract(lambda: VAE(config, rngs=nnx.Rngs(0)))
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    return load_torch(vae_weights.table(config), abstract, state)


def _clip(config: CLIPConfig) -> CLIP:
    abstract = trees.abstract(lambda: CLIP(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    leaves = trees.flatten(abstract)
    arrays = {name: jnp.asarray(random_array(name, leaf.shape)) for name, leaf in leaves.items()}
    return trees.fill(abstract, arrays)


@functools.cache
def ours(images: int) -> Wan:
    """A checkpoint of this many images, as far as encode_images() needs one."""
    clip = CLIPConfig(image_size=28, dim=16, num_heads=2, num_layers=2, ffn_dim=32)
    dit = DiTConfig(
        dim=32,
        ffn_dim=64,
        num_heads=2,
        num_layers=1,
        in_channels=36,
        text_dim=16,
        image_dim=clip.dim,
        image_positions=2 * clip.num_tokens if images == 2 else None,
    )
    vae = _vae()
    umt5 = UMT5Config(dim=16, num_heads=2, head_dim=8, ffn_dim=32, num_layers=1)
    config = WanConfig(dit=dit, vae=vae.config, umt5=umt5, clip=clip)
    loaders = {"vae": lambda: vae, "clip": lambda: _clip(clip)}
    return Wan(config, None, loaders, dtype="float32")  # type: ignore[arg-type]


def photographs(folder: Path, *shapes: tuple[int, int]) -> list[Path]:
    """Photographs of noise: what resizes of neighbours differ by is at its largest."""
    stream = np.random.RandomState(5)
    paths = [folder / f"{k}.png" for k in range(len(shapes))]
    for path, shape in zip(paths, shapes, strict=True):
        Image.fromarray(stream.randint(0, 256, (*shape, 3)).astype(np.uint8)).save(path)
    return paths


def _channels(paths: Sequence[Path], frames: int) -> np.ndarray:
    """[1, t, h, w, 4 + z]."""
    wan = ours(len(paths))
    arguments: dict[str, Any] = dict(zip(("image", "last_image"), paths, strict=False))
    known = wan.encode_images(
        make_request(wan.config, "a fox", size=SIZE, frames=frames, **arguments)
    )
    assert known is not None
    return known.channels


def _assert_alike(paths: Sequence[Path], frames: int) -> None:
    area = math.prod(SIZE)
    found = channels(reference_vae(), [read(path) for path in paths], area=area, frames=frames)
    expected = found.permute(0, 2, 3, 4, 1).numpy()
    given = _channels(paths, frames)
    assert given.shape == expected.shape and given.dtype == np.float32
    np.testing.assert_array_equal(given[..., :4], expected[..., :4])
    error = np.abs(given[..., 4:] - expected[..., 4:]).max()
    assert error <= tolerances.CONDITIONING_LATENTS


@pytest.mark.parametrize("count", [1, 2], ids=["i2v", "flf2v"])
@pytest.mark.parametrize("frames", [5, 17, 81])
@pytest.mark.parametrize("shape", SHAPES)
def test_channels_are_the_references(tmp_path: Path, shape: str, frames: int, count: int) -> None:
    source, (height, width) = SHAPES[shape]
    paths = photographs(tmp_path, *[source] * count)
    assert video_size(read(paths[0]), math.prod(SIZE)) == (height, width)
    _assert_alike(paths, frames)


@pytest.mark.parametrize("other", [(100, 70), (35, 50), (140, 201), (9, 150), (71, 100)])
def test_a_last_image_of_another_size_covers_the_first(
    tmp_path: Path, other: tuple[int, int]
) -> None:
    _assert_alike(photographs(tmp_path, (70, 100), other), 9)
