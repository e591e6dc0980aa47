"""Images and conditioning against torch: the reference's own operations, written anew."""

import numpy as np
import pytest
from PIL import Image

from tests import tolerances
from wan_jax import conditioning, fitting, images

torch = pytest.importorskip("torch")

RESIZES = [  # (height, width) to (height, width)
    ((720, 1280), (464, 832)),
    ((480, 832), (720, 1280)),
    ((37, 53), (224, 224)),
    ((601, 333), (224, 224)),
    ((1279, 641), (1280, 640)),
    ((100, 99), (99, 100)),
    ((3, 5000), (48, 6304)),
    ((2999, 2), (17, 33)),
    ((1, 1), (7, 9)),
    ((2, 3), (720, 1)),
    ((1201, 1801), (1, 1)),
    ((64, 48), (64, 48)),
]
SHAPES = [(720, 1280), (1280, 720), (640, 640), (333, 1000), (1001, 499)]


def torch_resize(image, height, width):
    """[y, x, 3] through torch's interpolate."""
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
    resized = torch.nn.functional.interpolate(planes, size=(height, width), mode="bicubic")
    return resized[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("values", ["even", "extreme"])
@pytest.mark.parametrize(("source", "target"), RESIZES)
def test_resize_is_torchs(source, target, values):
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (*source, 3)).astype(np.float32)
    if values == "extreme":  # neighbours as far apart as can be: positions must agree
        image = np.sign(image)
    height, width = target
    resized = fitting.resize_bicubic(image, height=height, width=width)
    expected = torch_resize(image, height, width)
    assert np.abs(resized - expected).max() <= tolerances.IMAGE_RESIZE


def test_clip_view_is_torchs():
    image = np.random.default_rng(0).uniform(-1, 1, (451, 677, 3)).astype(np.float32)
    distance = np.abs(fitting.clip_view(image, 224) - torch_resize(image, 224, 224)).max()
    assert distance <= tolerances.IMAGE_RESIZE


@pytest.mark.parametrize(
    ("mode", "ending"),
    [
        ("RGB", "png"), ("RGB", "jpg"), ("RGB", "webp"), ("RGB", "bmp"), ("RGB", "tiff"),
        ("RGB", "gif"), ("L", "png"), ("L", "jpg"), ("P", "png"), ("1", "png"), ("CMYK", "jpg"),
        ("CMYK", "tiff"), ("YCbCr", "tiff"),
    ],
)  # fmt: skip
def test_plain_files_give_the_references_numbers(tmp_path, mode, ending):
    path = tmp_path / f"a.{ending}"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 61, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    with Image.open(path) as opened:
        planes = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1).contiguous()
    expected = planes.to(torch.float32).div(255).sub_(0.5).div_(0.5).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(images.read_image(path), expected)


def conditions(shape, frames, last):
    """The reference's video of random images, ours in chunks, and height and width of both."""
    rng = np.random.default_rng(1)
    first, other = (rng.uniform(-1, 1, (*shape, 3)).astype(np.float32) for _ in range(2))
    height, width = fitting.fit_size(*shape, area=48 * 80)
    video = np.zeros((1, frames, height, width, 3), np.float32)
    video[0, 0] = torch_resize(first, height, width)
    if last:
        video[0, -1] = torch_resize(other, height, width)
    first, other = (fitting.fit(image, (80, 48)) for image in (first, other))
    chunks = conditioning.pixel_chunks(first, frames=frames, last=other if last else None)
    return video, list(chunks), height, width


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("frames", [5, 17, 81])
@pytest.mark.parametrize("last", [False, True])
def test_the_video_to_encode_is_the_references(shape, frames, last):
    video, chunks, _, _ = conditions(shape, frames, last)
    distance = np.abs(np.concatenate(chunks, 1) - video).max()
    assert distance <= tolerances.IMAGE_RESIZE
