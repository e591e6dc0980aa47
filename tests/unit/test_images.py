"""Images in: what is read from files and arrays, and how it is resized and fitted."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import tolerances
from wan_jax import fitting, images

COLOURS = {
    "a": (255, 0, 0),
    "b": (0, 255, 0),
    "c": (0, 0, 255),
    "d": (255, 255, 0),
    "e": (0, 128, 255),
    "f": (60, 70, 80),
}
UPRIGHT = "abc/def"
STORED = {  # how UPRIGHT lies in a file of each orientation
    1: "abc/def",
    2: "cba/fed",
    3: "fed/cba",
    4: "def/abc",
    5: "ad/be/cf",
    6: "cf/be/ad",
    7: "fc/eb/da",
    8: "da/eb/fc",
}


def drawn(layout: str, block: int = 1) -> np.ndarray:
    """Letters as blocks of their colours, uint8 [y, x, 3]."""
    pixels = np.array([[COLOURS[letter] for letter in row] for row in layout.split("/")], np.uint8)
    return np.kron(pixels, np.ones((block, block, 1), np.uint8))


def scaled(levels: object) -> np.ndarray:
    """Levels of 255 in [-1, 1], float64."""
    return np.asarray(levels, np.float64) / 127.5 - 1


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (height, width, 3)).astype(np.float32)


def png(width: int, height: int, depth: int, colour: int, data: bytes, extra: bytes = b"") -> bytes:
    """A .png by hand; data: rows of big-endian samples, extra: chunks before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row for row in _split(data, height))
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + check


def _split(data: bytes, parts: int) -> list[bytes]:
    step = len(data) // parts if parts else 0
    return [data[k * step : (k + 1) * step] for k in range(parts)]


def check(image: np.ndarray, levels: object, tolerance: float = tolerances.IMAGE_LEVEL) -> None:
    """float32 [y, x, 3], these levels of 255."""
    expected = scaled(levels)
    assert image.dtype == np.float32
    assert image.shape == expected.shape
    np.testing.assert_allclose(image, expected, rtol=0, atol=tolerance)


# Files


@pytest.mark.parametrize("ending", ["png", "bmp", "tiff", "gif", "webp"])
def test_lossless_files_are_read_as_they_are(tmp_path, ending):
    path = tmp_path / f"cat.{ending}"
    options = {"lossless": True} if ending == "webp" else {}
    Image.fromarray(drawn(UPRIGHT)).save(path, **options)
    check(images.read_image(path), drawn(UPRIGHT))
    check(images.read_image(str(path)), drawn(UPRIGHT))


def test_the_content_counts_and_not_the_name(tmp_path):
    Image.fromarray(drawn(UPRIGHT)).save(tmp_path / "cat", format="png")
    check(images.read_image(tmp_path / "cat"), drawn(UPRIGHT))


@pytest.mark.parametrize("ending", ["png", "tiff", "webp", "jpg"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation_of_exif_is_followed(tmp_path, ending, orientation):
    path = tmp_path / f"cat.{ending}"
    exif = Image.Exif()
    exif[0x112] = orientation
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    stored = Image.fromarray(drawn(STORED[orientation], 16))
    stored.save(path, exif=exif, **options.get(ending, {}))
    bound = tolerances.IMAGE_JPEG if ending == "jpg" else tolerances.IMAGE_LEVEL
    check(images.read_image(path), drawn(UPRIGHT, 16), bound)


def test_orientation_of_grey_words_and_of_palettes_is_followed(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    words = np.array([[257, 0, 65535]], np.uint16)
    Image.fromarray(words).save(tmp_path / "words.png", exif=exif)
    check(images.read_image(tmp_path / "words.png"), [[[v] * 3] for v in (1, 0, 255)])
    palette = Image.fromarray(drawn(STORED[6])).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "palette.png", exif=exif)
    check(images.read_image(tmp_path / "palette.png"), drawn(UPRIGHT))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_mean_nothing_are_passed_over(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(drawn(UPRIGHT)).save(tmp_path / "a.png", exif=exif)
    check(images.read_image(tmp_path / "a.png"), drawn(UPRIGHT))


def test_exif_that_cannot_be_read_spoils_no_image(tmp_path):
    Image.fromarray(drawn(UPRIGHT)).save(tmp_path / "a.png", exif=b"Exif\0\0rubbish of some length")
    check(images.read_image(tmp_path / "a.png"), drawn(UPRIGHT))


# 0.2 opaque: 200 and 100 and 0 over white are 244, 224 and 204.
RGBA = np.array([[[200, 100, 0, 51], [200, 100, 0, 255], [200, 100, 0, 0]]], np.uint8)
OVER_WHITE = [[[244, 224, 204], [200, 100, 0], [255, 255, 255]]]


@pytest.mark.parametrize("ending", ["png", "tiff", "webp"])
def test_alpha_is_over_white(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    options = {"lossless": True, "exact": True} if ending == "webp" else {}
    Image.fromarray(RGBA).save(path, **options)
    check(images.read_image(path), OVER_WHITE)


def test_grey_with_alpha_is_over_white(tmp_path):
    grey = np.array([[[100, 51], [100, 255], [100, 0]]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    check(images.read_image(tmp_path / "a.png"), [[[v] * 3 for v in (224, 100, 255)]])


def test_opaque_alpha_changes_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    opaque = np.concatenate([pixels, np.full((5, 6, 1), 255, np.uint8)], -1)
    np.testing.assert_array_equal(images.read_image(opaque), images.read_image(pixels))


@pytest.mark.parametrize(("ending", "kind"), [("png", "one"), ("png", "each"), ("gif", "one")])
def test_transparent_palettes_are_over_white(tmp_path, ending, kind):
    indexed = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    indexed.putpalette([200, 100, 0, 255, 0, 0, 0, 0, 255])
    transparency = 1 if kind == "one" else bytes([51, 0, 255])
    path = tmp_path / f"a.{ending}"
    indexed.save(path, transparency=transparency)
    first = [200, 100, 0] if kind == "one" else [244, 224, 204]
    check(images.read_image(path), [[first, [255, 255, 255], [0, 0, 255]]])


def test_a_transparent_colour_is_white(tmp_path):
    Image.fromarray(drawn(UPRIGHT)).save(tmp_path / "a.png", transparency=COLOURS["b"])
    expected = drawn(UPRIGHT)
    expected[0, 1] = 255
    check(images.read_image(tmp_path / "a.png"), expected)
    Image.fromarray(np.array([[0, 7, 9]], np.uint8)).save(tmp_path / "b.png", transparency=7)
    check(images.read_image(tmp_path / "b.png"), [[[0] * 3, [255] * 3, [9] * 3]])
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    bits.save(tmp_path / "c.png", transparency=0)
    check(images.read_image(tmp_path / "c.png"), [[[255] * 3, [255] * 3]])


def test_grey_and_bits(tmp_path):
    for name, mode, levels in (("a", "L", (0, 7, 255)), ("b", "1", (0, 255, 255))):
        for ending in ("png", "tiff", "bmp", "gif"):
            path = tmp_path / f"{name}.{ending}"
            Image.fromarray(np.array([levels], np.uint8)).convert(mode).save(path)
            check(images.read_image(path), [[[v] * 3 for v in levels]])


WORDS = (0, 257, 1000, 32768, 65535)


@pytest.mark.parametrize("kind", ["png", "tiff", "tiff of the other order"])
def test_16_bit_grey_keeps_its_bits(tmp_path, kind):
    path = tmp_path / f"a.{kind[:4].strip()}"
    words = np.array([WORDS], np.uint16)
    image = Image.fromarray(words)
    if kind.endswith("order"):
        image = Image.frombytes("I;16B", (len(WORDS), 1), words.astype(">u2").tobytes())
    image.save(path)
    check(images.read_image(path), [[[v / 257] * 3 for v in WORDS]])
    with Image.open(path) as opened:
        check(images.read_image(opened), [[[v / 257] * 3 for v in WORDS]])


def test_a_transparent_word_is_white(tmp_path):
    data = np.array(WORDS, ">u2").tobytes()
    extra = chunk(b"tRNS", struct.pack(">H", 1000))
    (tmp_path / "a.png").write_bytes(png(5, 1, 16, 0, data, extra))
    expected = [0, 1, 255, 32768 / 257, 255]
    check(images.read_image(tmp_path / "a.png"), [[[v] * 3 for v in expected]])


@pytest.mark.parametrize("alpha", [False, True])
def test_16_bit_colour_is_read_by_its_upper_bits(tmp_path, alpha):
    words = np.array([[0, 257, 65535], [200 * 256, 100 * 256 + 255, 0]], ">u2")
    levels = np.array([[[0, 1, 255], [200, 100, 0]]])
    if alpha:
        words = np.insert(words, 3, [65535, 51 * 257], axis=1)
        levels = np.array([[[0, 1, 255], [244, 224, 204]]])
    # A transparent colour has 16 bits a channel, which Pillow would look for among the 8.
    extra = b"" if alpha else chunk(b"tRNS", struct.pack(">HHH", 0x1200, 0x1201, 0x12FF))
    (tmp_path / "a.png").write_bytes(png(2, 1, 16, 6 if alpha else 2, words.tobytes(), extra))
    check(images.read_image(tmp_path / "a.png"), levels)


INKS = [(255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0)]
OF_INKS = [(0, 255, 255), (255, 0, 255), (255, 255, 0), (0, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("ending", ["jpg", "tiff"])
def test_cmyk(tmp_path, ending):
    blocks = np.kron(np.array([INKS], np.uint8), np.ones((16, 16, 1), np.uint8))
    path = tmp_path / f"a.{ending}"
    options = {"quality": 100, "subsampling": 0} if ending == "jpg" else {}
    Image.frombytes("CMYK", (80, 16), blocks.tobytes()).save(path, **options)
    with Image.open(path) as opened:
        assert opened.mode == "CMYK"
    bound = tolerances.IMAGE_JPEG if ending == "jpg" else tolerances.IMAGE_LEVEL
    expected = np.kron(np.array([OF_INKS], np.uint8), np.ones((16, 16, 1), np.uint8))
    check(images.read_image(path), expected, bound)


def test_of_several_frames_the_first(tmp_path):
    red, blue = (Image.fromarray(drawn(letter, 4)) for letter in "ac")
    for ending, options in (("gif", {}), ("webp", {"lossless": True}), ("png", {}), ("tiff", {})):
        path = tmp_path / f"a.{ending}"
        red.save(path, save_all=True, append_images=[blue], **options)
        check(images.read_image(path), drawn("a", 4))


def test_a_jpeg_with_pictures_behind_it(tmp_path):
    red, blue = (Image.fromarray(drawn(letter, 16)) for letter in "ac")
    red.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[blue], quality=100)
    check(images.read_image(tmp_path / "a.jpg"), drawn("a", 16), tolerances.IMAGE_JPEG)


# Images and arrays


def test_pil_images_of_every_mode_are_taken():
    base = Image.fromarray(drawn(UPRIGHT))
    for mode in ("RGB", "RGBA", "RGBX", "RGBa", "CMYK"):
        check(images.read_image(base.convert(mode)), drawn(UPRIGHT))
    # 100 grey at 0.2 over white is 224, and premultiplied it is 20.
    grey = Image.frombytes("LA", (1, 1), bytes([100, 51]))
    check(images.read_image(grey), [[[224] * 3]])
    check(
        images.read_image(Image.frombytes("RGBa", (1, 1), bytes([20, 20, 20, 51]))), [[[224] * 3]]
    )
    bands = (Image.new("P", (1, 1), 1), Image.new("L", (1, 1), 51))
    palette = Image.merge("PA", bands)
    palette.putpalette([0, 0, 0, 200, 100, 0])
    check(images.read_image(palette), [[[244, 224, 204]]])
    check(images.read_image(Image.new("YCbCr", (1, 1), (128, 128, 128))), [[[128] * 3]])
    check(images.read_image(Image.new("HSV", (1, 1), (0, 0, 90))), [[[90] * 3]])


def test_a_pil_image_is_left_as_it_was(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(drawn(STORED[6])).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        for _ in range(2):
            check(images.read_image(opened), drawn(UPRIGHT))
        assert opened.size == (2, 3)


def test_arrays():
    pixels = drawn(UPRIGHT)
    check(images.read_image(pixels), pixels)
    check(images.read_image(pixels[:, ::-1]), pixels[:, ::-1])
    check(images.read_image(pixels[..., 0]), pixels[..., :1].repeat(3, -1))
    check(images.read_image(RGBA), OVER_WHITE)
    floats = random_image(4, 5)
    floats.flags.writeable = False
    read = images.read_image(floats)
    np.testing.assert_array_equal(read, floats)
    assert read.flags.writeable
    assert not np.shares_memory(read, floats)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 9), np.uint8), r"shape \(3, 8, 9\)"),
        (np.zeros((1, 8, 9, 3), np.float32), r"shape \(1, 8, 9, 3\)"),
        (np.zeros((8, 9), np.float32), r"shape \(8, 9\) and dtype float32"),
        (np.zeros((0, 9, 3), np.uint8), r"shape \(0, 9, 3\)"),
        (np.zeros(9, np.uint8), r"shape \(9,\)"),
        (np.zeros((8, 9, 3)), "dtype float64"),
        (np.zeros((8, 9, 3), np.uint16), "dtype uint16"),
        (np.full((8, 9, 3), 1.01, np.float32), "outside"),
        (np.full((8, 9, 3), np.nan, np.float32), "NaN"),
        (None, "dtype object"),
    ],
)
def test_other_arrays_are_refused(array, message):
    with pytest.raises(ValueError, match=message) as caught:
        images.read_image(array)
    assert "accepted: uint8 [y, x]" in str(caught.value)
    assert "\n" not in str(caught.value)


# Bad files


def encoded(ending: str) -> bytes:
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    kind = {"jpg": "jpeg"}.get(ending, ending)
    Image.fromarray(rng.integers(0, 256, (70, 90, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.3, 0.6, 0.99])
def test_truncated_files_are_refused(tmp_path, ending, share):
    path = tmp_path / f"a.{ending}"
    whole = encoded(ending)
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="a whole .png, .jpg") as caught:
        images.read_image(path)
    assert str(caught.value).startswith(f"image {str(path)!r} ")
    assert "\n" not in str(caught.value)


BAD = {
    "text.png": (b"not an image\n", "is not an image, or truncated"),
    "drawing.svg": (b"<svg/>", "is not an image, or truncated"),
    "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
    "zero.png": (png(0, 5, 8, 2, b""), "is not an image, or truncated"),
    "broken.png": (png(2, 2, 8, 2, b"", chunk(b"IDAT", b"rubbish")), "cannot be read: broken"),
    "bomb.png": (png(20000, 20000, 1, 0, b""), "400000000 pixels"),
    # Above where Pillow warns, which here would be an error of its own.
    "large.png": (png(10000, 10000, 1, 0, b""), "truncated"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(tmp_path, name):
    data, message = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        images.read_image(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bomb_is_told_from_its_header_whatever_pillow_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "a.png").write_bytes(png(20000, 20000, 1, 0, b""))
    with pytest.raises(ValueError, match="20000x20000 pixels; accepted: at most 178956970"):
        images.read_image(tmp_path / "a.png")


def test_places_that_are_no_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    places = {"none.png": "does not exist", "": "is a folder", "pipe.png": "is not a file"}
    for name, message in places.items():
        with pytest.raises(ValueError, match=message):
            images.read_image(tmp_path / name)
    with pytest.raises(ValueError, match="'a\\\\nb.png' does not exist"):
        images.read_image("a\nb.png")
    with pytest.raises(ValueError, match="does not exist"):
        images.read_image("a\0b.png")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_scale_are_refused(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="whose white is not defined; accepted: 8 or 16 bits"):
        images.read_image(tmp_path / "a.tiff")


def test_an_image_of_nothing_is_refused():
    with pytest.raises(ValueError, match="image has 0x5 pixels; accepted: 1x1"):
        images.read_image(Image.new("RGB", (0, 5)))


# Resizing


def test_the_kernel_is_that_of_a_three_quarter_slope():
    impulse = np.zeros((1, 7, 1), np.float32)
    impulse[0, 3] = 1
    doubled = fitting.resize_bicubic(impulse, height=1, width=14)[0, :, 0]
    # The cubic at distances of 0.25, 0.75, 1.25 and 1.75.
    half = [0.87890625, 0.26171875, -0.10546875, -0.03515625]
    np.testing.assert_array_equal(doubled, [0, 0, 0, *half[::-1], *half, 0, 0, 0])


def test_the_edge_is_repeated():
    step = np.float32([[[1], [0], [0], [0]]])
    doubled = fitting.resize_bicubic(step, height=1, width=8)[0, :, 0]
    # At -0.25 and at 0.25: pixel 0 stands in for those at -1 and -2.
    assert doubled[0] == 0.87890625 - 0.10546875 - 0.03515625 + 0.26171875 + 0.10546875
    assert doubled[1] == 0.87890625 - 0.10546875


def test_no_size_changes_the_same_size_or_one_colour():
    image = random_image(7, 9)
    same = fitting.resize_bicubic(image, height=7, width=9)
    np.testing.assert_array_equal(same, image)
    assert not np.shares_memory(same, image)
    for height, width in ((1, 1), (3, 40), (50, 2)):
        flat = fitting.resize_bicubic(
            np.full((5, 6, 3), 0.3, np.float32), height=height, width=width
        )
        np.testing.assert_allclose(flat, 0.3, rtol=0, atol=tolerances.IMAGE_FLAT)


def test_overshoot_is_kept():
    step = np.sign(np.arange(8, dtype=np.float32) - 3.5)[None, :, None].repeat(3, 2)
    assert np.abs(fitting.resize_bicubic(step, height=1, width=16)).max() > 1.05


def test_batches_are_their_members():
    batch = np.stack([random_image(7, 9, seed) for seed in range(3)])
    resized = fitting.resize_bicubic(batch, height=5, width=12)
    assert resized.shape == (3, 5, 12, 3)
    for k in range(3):
        alone = fitting.resize_bicubic(batch[k], height=5, width=12)
        np.testing.assert_array_equal(resized[k], alone)
    np.testing.assert_array_equal(
        fitting.clip_view(batch, 224)[1], fitting.clip_view(batch[1], 224)
    )
    for how in ("keep", "crop", "pad"):
        fitted = fitting.fit(batch, (32, 48), how)
        np.testing.assert_array_equal(fitted[1], fitting.fit(batch[1], (32, 48), how))


def test_clip_view_squashes_all_of_it():
    image = random_image(30, 80)
    expected = fitting.resize_bicubic(image, height=224, width=224)
    np.testing.assert_array_equal(fitting.clip_view(image, 224), expected)


@pytest.mark.parametrize(
    ("image", "height", "width", "message"),
    [
        (np.zeros((4, 4, 3)), 2, 2, "dtype float64"),
        (np.zeros((4, 4), np.float32), 2, 2, r"shape \(4, 4\)"),
        (np.zeros((0, 4, 3), np.float32), 2, 2, r"shape \(0, 4, 3\)"),
        (random_image(4, 4), 0, 2, "height is 0"),
        (random_image(4, 4), 2, -1, "width is -1"),
        (random_image(4, 4), 2, 2.0, "width is 2.0"),
    ],
)
def test_what_cannot_be_resized_is_refused(image, height, width, message):
    for resize in (fitting.resize_bicubic, fitting.cover):
        with pytest.raises(ValueError, match=message):
            resize(image, height=height, width=width)


# Fitting


@pytest.mark.parametrize(
    ("source", "area", "video"),  # (height, width), pixels
    [
        ((720, 1280), 480 * 832, (464, 832)),
        ((1280, 720), 480 * 832, (832, 464)),
        ((720, 1280), 720 * 1280, (720, 1280)),
        ((1080, 1920), 720 * 1280, (720, 1280)),
        ((999, 999), 720 * 1280, (960, 960)),
        ((512, 512), 480 * 832, (624, 624)),
        ((3000, 4000), 480 * 832, (544, 720)),
        ((1, 100), 480 * 832, (48, 6304)),
    ],
)
def test_fit_size(source, area, video):
    assert fitting.fit_size(*source, area=area) == video


def test_fit_size_is_the_references_arithmetic():
    rng = np.random.default_rng(0)
    sizes = [tuple(pair) for pair in rng.integers(1, 6000, (3000, 2)).tolist()]
    sizes += [(16 * a, 16 * b) for a in range(1, 80, 3) for b in range(1, 80, 3)]
    sizes += [(480, 832), (832, 480), (464, 832), (720, 1280), (1, 1), (9, 16), (1, 1500)]
    for height, width in sizes:
        for area in (480 * 832, 720 * 1280):
            ratio = height / width
            rows = round(np.sqrt(area * ratio) // 8 // 2 * 2)
            columns = round(np.sqrt(area / ratio) // 8 // 2 * 2)
            if rows and columns:
                assert fitting.fit_size(height, width, area=area) == (rows * 8, columns * 8)
            else:
                with pytest.raises(ValueError, match="times the other"):
                    fitting.fit_size(height, width, area=area)


def test_fit_size_names_the_ratio_it_accepts():
    limit = 480 * 832 // 256
    assert fitting.fit_size(1, limit, area=480 * 832)[0] == 16
    for source in ((1, limit + 1), (limit + 1, 1)):
        with pytest.raises(ValueError, match=f"accepted at an area of 399360 .* {limit} times"):
            fitting.fit_size(*source, area=480 * 832)


def test_fit_size_refuses_what_is_no_size():
    with pytest.raises(ValueError, match="height is 0"):
        fitting.fit_size(0, 5, area=399360)
    with pytest.raises(ValueError, match="area is 0"):
        fitting.fit_size(5, 5, area=0)


def test_keep_takes_the_area_alone():
    image = random_image(72, 128)
    kept = fitting.fit(image, (832, 480))
    np.testing.assert_array_equal(kept, fitting.resize_bicubic(image, height=464, width=832))


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (40, 40), (17, 5)])
@pytest.mark.parametrize("source", [(30, 50), (50, 30), (64, 64), (7, 11)])
def test_crop_is_the_middle_of_what_covers(source, size):
    width, height = size
    image = random_image(*source)
    ratio = max(height / source[0], width / source[1])
    tall, wide = round(source[0] * ratio), round(source[1] * ratio)
    whole = fitting.resize_bicubic(image, height=tall, width=wide)
    top, left = (tall - height) // 2, (wide - width) // 2
    cropped = fitting.fit(image, size, "crop")
    assert cropped.shape == (height, width, 3)
    expected = whole[top : top + height, left : left + width]
    np.testing.assert_allclose(cropped, expected, rtol=0, atol=tolerances.IMAGE_FLAT)


@pytest.mark.parametrize("source", [(30, 50), (50, 30), (48, 64), (7, 11)])
def test_pad_is_all_of_it_between_black_bars(source):
    image = random_image(*source)
    padded = fitting.fit(image, (64, 48), "pad")
    ratio = min(48 / source[0], 64 / source[1])
    tall, wide = round(source[0] * ratio), round(source[1] * ratio)
    assert 48 in (tall,) or 64 in (wide,)
    top, left = (48 - tall) // 2, (64 - wide) // 2
    expected = np.full((48, 64, 3), -1, np.float32)
    inside = fitting.resize_bicubic(image, height=tall, width=wide)
    expected[top : top + tall, left : left + wide] = inside
    np.testing.assert_array_equal(padded, expected)


def test_strips_take_little_memory():
    import tracemalloc

    for shape in ((2, 20000, 3), (20000, 2, 3)):
        strip = np.zeros(shape, np.float32)
        for how in ("crop", "pad"):
            tracemalloc.start()
            fitted = fitting.fit(strip, (1280, 720), how)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert fitted.shape == (720, 1280, 3)
            assert peak < 4 * fitted.nbytes


@pytest.mark.parametrize(
    ("size", "how", "message"),
    [
        ((32, 32), "stretch", "fit is 'stretch'; accepted: keep, crop, pad"),
        ((0, 32), "crop", "width is 0"),
        ((32, 0), "pad", "height is 0"),
    ],
)
def test_fit_refuses(size, how, message):
    with pytest.raises(ValueError, match=message):
        fitting.fit(random_image(4, 4), size, how)


# The module


def test_images_imports_no_jax():
    # With a package of nothing in its place, as the real one's __init__ may import what it likes.
    code = (
        "import sys, types; package = types.ModuleType('wan_jax'); "
        f"package.__path__ = [{str(Path(images.__file__).parent)!r}]; "
        "sys.modules['wan_jax'] = package; import wan_jax.images, wan_jax.conditioning; "
        "assert not {'jax', 'torch', 'imageio'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
