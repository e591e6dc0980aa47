"""Videos and images out: what is written, when, and what is left on failure."""

import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from tests import tolerances
from wan_jax import ffmpeg, media

SIZES = [(832, 480), (480, 832), (126, 94)]
UNPRIVILEGED = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


def pattern(frames: int, width: int, height: int) -> np.ndarray:
    """A smooth moving pattern in three different colours, uint8 [f, y, x, 3]."""
    f, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [
        np.sin(2 * np.pi * (x / width + 0.02 * f)),
        np.cos(2 * np.pi * (y / height - 0.03 * f)),
        np.sin(2 * np.pi * ((x + y) / (width + height) + 0.05 * f)),
    ]
    return np.round(127.5 + 100 * np.stack(waves, -1)).astype(np.uint8)


def floats(frames: int = 3, width: int = 16, height: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (frames, height, width, 3)).astype(np.float32)


def decode(path: Path) -> tuple[dict, np.ndarray]:
    """What ffmpeg says of a file, and its frames, uint8 [f, y, x, 3].

    ffmpeg is run directly: imageio's readers leave pipes open for whichever test comes next.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", f"file:{path}", "-f", "rawvideo"]
    done = subprocess.run([*command, "-pix_fmt", "rgb24", "-"], capture_output=True, check=True)
    said = done.stderr.decode(errors="replace")
    found = re.search(r"Video: (\w+).*?, (\w+)(?:\(.*?\))?, (\d+)x(\d+).*?, ([\d.]+) fps", said)
    assert found is not None, said
    codec, pixels, width, height, fps = found.groups()
    size = (int(width), int(height))
    meta = {"codec": codec, "pix_fmt": pixels, "size": size, "fps": float(fps)}
    return meta, np.frombuffer(done.stdout, np.uint8).reshape(-1, size[1], size[0], 3)


def animation(path: Path) -> tuple[np.ndarray, list[int], int]:
    """Frames, uint8 [f, y, x, 3], of a .gif or .webp, what each lasts in ms, and how it loops."""
    frames, durations = [], []
    with Image.open(path) as image:
        for k in range(image.n_frames):
            image.seek(k)
            frames.append(np.asarray(image.convert("RGB")))  # a .webp's duration comes with it
            durations.append(image.info.get("duration", 0))
        return np.stack(frames), durations, image.info.get("loop", -1)


def coarse(video: np.ndarray) -> np.ndarray:
    """Means of 4 by 4 pixels, float64 [f, y // 4, x // 4, 3]; what is over at the edges is left."""
    f, y, x, _ = video.shape
    whole = video[:, : y // 4 * 4, : x // 4 * 4].astype(float)
    return whole.reshape(f, y // 4, 4, x // 4, 4, 3).mean((2, 4))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """What each file of a folder holds; of one that is no folder, nothing."""
    files = folder.iterdir() if folder.is_dir() else []
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


class Broken(Exception):
    pass


def breaks(chunks: int = 3, dtype: type = np.float32, error: type[BaseException] = Broken):
    for k in range(chunks):
        yield floats(2, seed=k) if dtype == np.float32 else pattern(2, 16, 16)
    raise error("decoding failed")


# quantize


def edges() -> np.ndarray:
    """Values around every boundary of both roundings, and beyond the range."""
    levels = np.arange(256, dtype=np.float32)
    exact = np.concatenate([levels, levels + np.float32(0.5)]) / np.float32(255) * 2 - 1
    exact = exact.astype(np.float32)
    near = [np.nextafter(exact, np.float32(side)) for side in (-9, 9)]
    return np.concatenate([exact, *near, np.float32([-9, -1, -0.0, 0, 1, 9, np.inf, -np.inf])])


def test_quantize_truncates_videos_and_rounds_images():
    x = np.float32([-2, -1, -0.5, 0, 0.5, 0.999, 1, 2])
    truncated = media.quantize(x, rounding="truncate")
    rounded = media.quantize(x, rounding="round")
    # (0.25, 0.5, 0.75) * 255 = 63.75, 127.5, 191.25; 0.9995 * 255 = 254.87
    assert truncated.tolist() == [0, 0, 63, 127, 191, 254, 255, 255]
    assert rounded.tolist() == [0, 0, 64, 128, 191, 255, 255, 255]
    assert truncated.dtype == rounded.dtype == np.uint8


def test_quantize_is_the_references_arithmetic_in_float32():
    x = edges()
    # make_grid's norm_ip: clamp_(low, high).sub_(low).div_(max(high - low, 1e-5))
    unit = (np.clip(x, np.float32(-1), np.float32(1)) - np.float32(-1)) / np.float32(2)
    video = (unit * np.float32(255)).astype(np.uint8)
    image = np.clip(unit * np.float32(255) + np.float32(0.5), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(media.quantize(x, rounding="truncate"), video)
    np.testing.assert_array_equal(media.quantize(x, rounding="round"), image)


def test_quantize_leaves_its_input_alone():
    x = floats()
    before = x.copy()
    x.flags.writeable = False  # as an array from jax
    assert media.quantize(x, rounding="round").shape == x.shape
    np.testing.assert_array_equal(x, before)


def test_rounding_returns_every_byte_to_itself():
    levels = np.arange(256, dtype=np.uint8)
    x = levels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    np.testing.assert_array_equal(media.quantize(x, rounding="round"), levels)


def test_quantize_errors():
    with pytest.raises(ValueError, match="2 NaN among 3 values"):
        media.quantize(np.float32([0, np.nan, np.nan]), rounding="round")
    with pytest.raises(ValueError, match="dtype float64; accepted: float32"):
        media.quantize(np.zeros(3), rounding="round")
    with pytest.raises(ValueError, match="'floor'; accepted: 'truncate', 'round'"):
        media.quantize(np.float32([0]), rounding="floor")


# .mp4


@pytest.mark.parametrize("size", SIZES)
def test_mp4_round_trip(tmp_path, size):
    video = pattern(9, *size)
    path = tmp_path / "cats.mp4"
    media.save_video(video, path)
    assert names(tmp_path) == ["cats.mp4"]
    meta, decoded = decode(path)
    assert (meta["codec"], meta["pix_fmt"]) == ("h264", "yuv420p")
    assert meta["fps"] == 16
    assert meta["size"] == size
    assert decoded.shape == video.shape
    errors = np.abs(decoded.astype(int) - video)
    assert errors.mean() < tolerances.MEDIA_MP4_MEAN_ERROR
    # Frames in order: each is nearest to its own, not to a neighbour.
    distances = np.abs(decoded[:, None].astype(np.int16) - video[None]).mean((2, 3, 4))
    assert distances.argmin(1).tolist() == list(range(9))


@pytest.mark.parametrize("fps", [16, 24, 30000 / 1001])
def test_mp4_is_the_references_file_byte_for_byte(tmp_path, fps):
    video = pattern(20, 208, 112)
    np.save(tmp_path / "video.npy", video)
    theirs = (  # in a process of its own: imageio's writer leaves a pipe open for the next test
        "import imageio, numpy, sys; source, target, fps = sys.argv[1:]\n"
        "w = imageio.get_writer(target, fps=float(fps), codec='libx264', quality=8)\n"
        "for frame in numpy.load(source): w.append_data(frame)\n"
        "w.close()"
    )
    names = [str(tmp_path / "video.npy"), str(tmp_path / "ref.mp4"), repr(float(fps))]
    subprocess.run([sys.executable, "-c", theirs, *names], capture_output=True, check=True)
    media.save_video(video, tmp_path / "ours.mp4", fps=fps)
    assert (tmp_path / "ours.mp4").read_bytes() == (tmp_path / "ref.mp4").read_bytes()


def test_mp4_truncates_floats_however_they_come(tmp_path):
    video = floats(6, 32, 16)
    as_bytes = media.quantize(video, rounding="truncate")
    given = {
        "bytes": as_bytes,
        "floats": video,
        "batch": video[None],
        "chunks": iter([video[:1], video[None, 1:5], video[5:]]),
        "list": [as_bytes[:4], as_bytes[4:4], as_bytes[4:]],
        "strided": np.asfortranarray(video),
    }
    files = set()
    for name, value in given.items():
        media.save_video(value, tmp_path / f"{name}.mp4")
        files.add((tmp_path / f"{name}.mp4").read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize("name", ["-y.mp4", "file:a%03d.mp4", "pipe:1.mp4", "a b'ü猫.MP4"])
def test_mp4_names_that_mean_something_to_ffmpeg(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    media.save_video(pattern(2, 16, 16), name)
    assert names(tmp_path) == [name]
    monkeypatch.chdir("/")
    assert len(decode(tmp_path / name)[1]) == 2


@pytest.mark.parametrize("size", [(17, 16), (16, 17), (833, 481)])
def test_mp4_odd_sides_are_refused(tmp_path, size):
    with pytest.raises(ValueError, match=f"{size[0]} by {size[1]} pixels; .* even sides"):
        media.save_video(pattern(1, *size), tmp_path / "a.mp4")
    assert names(tmp_path) == []


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_fps_must_be_a_rate(tmp_path, fps):
    with pytest.raises(ValueError, match="fps=.*above 0"):
        media.save_video(pattern(1, 16, 16), tmp_path / "a.mp4", fps=fps)
    assert names(tmp_path) == []


# Streaming


@pytest.mark.parametrize("ending", ["mp4", "gif", "webp"])
def test_a_chunk_is_asked_for_when_the_one_before_is_with_the_encoder(
    tmp_path, monkeypatch, ending
):
    log = []
    alive = set()
    most = 0

    class Chunk(np.ndarray):
        pass

    def decoder():
        nonlocal most
        for k in range(6):
            log.append(f"ask {k}")
            chunk = pattern(2, 64, 32).view(Chunk)
            alive.add(k)
            weakref.finalize(chunk, alive.discard, k)
            most = max(most, len(alive))
            yield chunk
            del chunk
        log.append("end")

    class Pipe:
        """ffmpeg's input, logging what went down it."""

        def __init__(self, pipe):
            self.pipe, self.frames = pipe, 0

        def write(self, data):
            log.append(f"frame {self.frames}")
            self.frames += 1
            return self.pipe.write(data)

        def flush(self):
            self.pipe.flush()

        def close(self):
            log.append("close")
            self.pipe.close()

    popen = subprocess.Popen

    def logged(command, **kwargs):
        process = popen(command, **kwargs)
        if "rawvideo" in command:
            process.stdin = Pipe(process.stdin)
        return process

    monkeypatch.setattr(subprocess, "Popen", logged)
    media.save_video(decoder(), tmp_path / f"a.{ending}")
    chunks = [(f"ask {k}", f"frame {2 * k}", f"frame {2 * k + 1}") for k in range(6)]
    assert log[:-1] == [*(line for chunk in chunks for line in chunk), "end", "close"]
    assert log[-1] == "close"  # the second close, harmless
    assert most <= 2  # the one in hand and the one before
    monkeypatch.undo()
    assert names(tmp_path) == [f"a.{ending}"]


def test_nothing_is_asked_for_before_the_place_is_known_to_be_good(tmp_path):
    def never():
        raise AssertionError("asked")
        yield

    for name, fps in [("a.gif", 51), ("no/a.mp4", 16), ("a.mp4", 0)]:
        with pytest.raises(ValueError):
            media.save_video(never(), tmp_path / name, fps=fps)


# .png


def test_png_holds_one_frame(tmp_path):
    image = floats(1, 18, 15)
    media.save_video(image, tmp_path / "float.png")
    media.save_video(iter([image[None]]), tmp_path / "stream.png")
    expected = media.quantize(image, rounding="round")[0]
    assert not np.array_equal(expected, media.quantize(image, rounding="truncate")[0])
    media.save_video(expected[None], tmp_path / "bytes.PNG")
    assert names(tmp_path) == ["bytes.PNG", "float.png", "stream.png"]
    for name in names(tmp_path):
        np.testing.assert_array_equal(iio.imread(tmp_path / name), expected)


def test_png_of_more_frames_is_a_numbered_folder(tmp_path):
    video = floats(5, 18, 15)
    expected = media.quantize(video, rounding="truncate")
    assert not np.array_equal(expected, media.quantize(video, rounding="round"))
    given = {
        "floats": video,
        "bytes": expected,
        "ones": (video[k : k + 1] for k in range(5)),
        "more.dots": iter([video[:1], video[1:]]),
    }
    for name, value in given.items():
        media.save_video(value, tmp_path / f"{name}.png")
        assert media.output_path(tmp_path / f"{name}.png", 5) == tmp_path / name
        assert names(tmp_path / name) == [f"0000{k}.png" for k in range(5)]
        for k in range(5):
            saved = iio.imread(tmp_path / name / f"0000{k}.png")
            np.testing.assert_array_equal(saved, expected[k])
    assert names(tmp_path) == sorted(given)


def test_output_path_is_what_appears(tmp_path):
    for name in ("a.mp4", "b.gif", "c.webp", "d.npz", "e.PNG"):
        for frames in (1, 2):
            media.save_video(floats(frames), tmp_path / name)
            assert media.output_path(tmp_path / name, frames).exists()
    assert names(tmp_path) == ["a.mp4", "b.gif", "c.webp", "d.npz", "e", "e.PNG"]
    assert media.output_path("x/e.PNG", 2) == Path("x/e")
    assert media.output_path("x/e.PNG", 1) == Path("x/e.PNG")


def test_frames_are_written_while_later_ones_are_decoded(tmp_path):
    partial = tmp_path / f".a.partial-{os.getpid()}"
    seen = []

    def decoder():
        for k in range(5):
            seen.append(names(partial) if partial.exists() else None)
            yield floats(1, seed=k)

    media.save_video(decoder(), tmp_path / "a.png")
    assert seen[:2] == [None, None]
    assert seen[2:] == [[f"0000{j}.png" for j in range(k)] for k in (2, 3, 4)]


def test_a_numbered_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "a.png"
    media.save_video(floats(4), path)
    media.check_output(path, 2)
    media.save_video(floats(2, seed=1), path)
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["00000.png", "00001.png"]  # none of the four is left
    expected = media.quantize(floats(2, seed=1), rounding="truncate")
    np.testing.assert_array_equal(iio.imread(tmp_path / "a" / "00001.png"), expected[1])
    # A single frame is a file beside it, and a folder of no frames is in nobody's way.
    media.save_video(floats(1), path)
    (tmp_path / "b").mkdir()
    media.save_video(floats(2), tmp_path / "b.png")
    assert names(tmp_path) == ["a", "a.png", "b"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("a file", "not a folder"),
        ("a link", "not a folder"),
        ("text", "notes.txt"),
        ("other numbers", "0001.png"),
        ("a folder in it", "00003.png"),
        ("hidden", ".git"),
    ],
)
def test_a_folder_of_other_things_is_refused(tmp_path, kind, message):
    folder = tmp_path / "a"
    media.save_video(floats(2), tmp_path / "older.png")
    (tmp_path / "older").rename(folder)
    if kind == "a file":
        folder.rename(tmp_path / "elsewhere")
        folder.touch()
    elif kind == "a link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    elif kind in ("a folder in it", "hidden"):
        (folder / message).mkdir()
    else:
        (folder / message).touch()
    before = names(tmp_path), folder_bytes(folder)
    said = rf"a\.png': 3 frames go to the folder '.*a', where .*\({re.escape(message)}\); accepted"
    for check in (
        lambda path: media.check_output(path, 3),
        lambda path: media.save_video(floats(3), path),
        lambda path: media.save_video(iter([floats(1), floats(2)]), path),
    ):
        with pytest.raises(ValueError, match=said.replace("3 frames", r"\d frames")):
            check(tmp_path / "a.png")
    assert (names(tmp_path), folder_bytes(folder)) == before
    media.check_output(tmp_path / "a.png", 1)


def test_what_comes_into_a_folder_meanwhile_is_not_removed(tmp_path):
    path = tmp_path / "a.png"
    media.save_video(floats(2), path)

    def decoder():
        yield floats(2, seed=1)
        (tmp_path / "a" / "notes.txt").write_text("mine")
        yield floats(2, seed=2)

    with pytest.raises(OSError, match="not empty"):
        media.save_video(decoder(), path)
    assert len(names(tmp_path / "a")) == 4
    assert [file.read_text() for file in tmp_path.glob(".a.older-*/*")] == ["mine"]


def test_a_folder_left_by_a_killed_run_is_in_nobodys_way(tmp_path):
    partial = tmp_path / f".a.partial-{os.getpid()}"
    partial.mkdir()
    (partial / "00007.png").touch()
    media.save_video(floats(2), tmp_path / "a.png")
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["00000.png", "00001.png"]


# .gif and .webp


@pytest.mark.parametrize("size", [(126, 94), (33, 17)])
@pytest.mark.parametrize(
    ("ending", "bound"),
    [("gif", tolerances.MEDIA_GIF_MEAN_ERROR), ("webp", tolerances.MEDIA_WEBP_MEAN_ERROR)],
)
def test_animations_round_trip(tmp_path, ending, bound, size):
    video = pattern(9, *size)
    media.save_video(video, tmp_path / f"a.{ending}")
    assert names(tmp_path) == [f"a.{ending}"]
    decoded, _, loop = animation(tmp_path / f"a.{ending}")
    assert loop == 0  # for ever
    assert decoded.shape == video.shape
    # Means of 4 by 4 pixels, as the eye takes them: a .gif's pixels are deliberately off.
    ours, theirs = coarse(decoded), coarse(video)
    assert np.abs(ours - theirs).mean() < bound
    distances = np.abs(ours[:, None] - theirs[None]).mean((2, 3, 4))
    assert distances.argmin(1).tolist() == list(range(9))


@pytest.mark.parametrize("fps", [8, 16, 24, 30000 / 1001, 50])
@pytest.mark.parametrize(("ending", "unit"), [("gif", 10), ("webp", 1)])
def test_animations_keep_time(tmp_path, ending, unit, fps):
    frames = 40
    media.save_video(pattern(frames, 32, 32), tmp_path / f"a.{ending}", fps=fps)
    _, durations, _ = animation(tmp_path / f"a.{ending}")
    assert len(durations) == frames
    # Every frame, and the end, is at most a unit of the format, in ms, from where it should be.
    ends = np.cumsum(durations)
    assert np.abs(ends - 1000 / fps * np.arange(1, frames + 1)).max() <= unit
    if (ending, fps) == ("gif", 16):
        assert set(durations) == {60, 70}


def test_a_gif_that_viewers_would_slow_down_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fps=60; accepted for a .gif: at most 50"):
        media.save_video(pattern(2, 16, 16), tmp_path / "a.gif", fps=60)
    media.save_video(pattern(2, 16, 16), tmp_path / "a.webp", fps=60)
    assert names(tmp_path) == ["a.webp"]


def few_colours(frames: int) -> np.ndarray:
    """Floats of eight colours far apart, that round and truncate to different bytes."""
    squares = np.indices((frames, 16, 16)).sum(0)[..., None] >> np.arange(2, 5) & 1
    return np.where(squares, 0.6, -0.6).astype(np.float32)


def test_a_gif_of_few_colours_is_exact_and_one_frame_is_rounded(tmp_path):
    for frames, rounding, other in [(1, "round", "truncate"), (4, "truncate", "round")]:
        video = few_colours(frames)
        expected = media.quantize(video, rounding=rounding)
        assert not np.array_equal(expected, media.quantize(video, rounding=other))
        media.save_video(iter([video[:1], video[1:]]), tmp_path / "a.gif")
        decoded, durations, _ = animation(tmp_path / "a.gif")
        assert len(durations) == frames
        np.testing.assert_array_equal(decoded, expected)


def test_one_frame_of_webp_is_a_still(tmp_path, monkeypatch):
    image = pattern(1, 64, 48)
    media.save_video(image, tmp_path / "a.webp")
    decoded, _, _ = animation(tmp_path / "a.webp")
    assert np.abs(decoded.astype(int) - image).mean() < tolerances.MEDIA_WEBP_MEAN_ERROR
    assert b"ANIM" not in (tmp_path / "a.webp").read_bytes()
    given = []
    monkeypatch.setattr(ffmpeg, "encode", lambda frames, path, fps: given.extend(frames))
    for frames, rounding in [(1, "round"), (3, "truncate")]:
        with pytest.raises(FileNotFoundError):  # as nothing was encoded
            media.save_video(floats(frames), tmp_path / "a.webp")
        np.testing.assert_array_equal(given, media.quantize(floats(frames), rounding=rounding))
        given.clear()


# .npz


@pytest.mark.parametrize("streamed", [False, True])
def test_npz_keeps_floats_exactly(tmp_path, streamed):
    video = floats(5, 15, 7)
    latents = floats(2, 4, 4)[None]
    given = (video[None, k : k + 2] for k in range(0, 5, 2)) if streamed else video
    media.save_video(given, tmp_path / "a.npz", latents=latents)
    assert names(tmp_path) == ["a.npz"]
    with np.load(tmp_path / "a.npz", allow_pickle=False) as saved:
        assert sorted(saved) == ["frames", "latents"]
        assert saved["frames"].dtype == saved["latents"].dtype == np.float32
        np.testing.assert_array_equal(saved["frames"], video)
        np.testing.assert_array_equal(saved["latents"], latents)


def test_npz_without_latents_and_with_other_floats(tmp_path):
    media.save_video(floats(1), tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as saved:
        assert list(saved) == ["frames"]
    half = np.float16([0.5, 2])
    media.save_video(floats(1), tmp_path / "a.npz", latents=half)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as saved:
        assert saved["latents"].dtype == np.float32
        assert saved["latents"].tolist() == [0.5, 2]


def test_npz_errors(tmp_path):
    with pytest.raises(ValueError, match="video is uint8; accepted for an .npz: float32"):
        media.save_video(pattern(1, 16, 16), tmp_path / "a.npz")
    with pytest.raises(ValueError, match="latents: .*; accepted: an array of numbers"):
        media.save_video(floats(1), tmp_path / "a.npz", latents=np.array([{}]))
    for ending in ("mp4", "gif", "webp", "png"):
        with pytest.raises(ValueError, match=rf"latents .*'a\.{ending}'; accepted: an \.npz"):
            media.save_video(floats(1), tmp_path / f"a.{ending}", latents=floats(1))
    assert names(tmp_path) == []


# Errors of users


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (
            np.zeros((2, 3, 16, 16, 3), np.uint8),
            r"a batch of 2, .*accepted: one video .*video\[k\]",
        ),
        (np.zeros((16, 16, 3), np.uint8), r"shape \(16, 16, 3\); accepted: \[f, y, x, 3\]"),
        (np.zeros((3, 16, 16, 4), np.uint8), r"shape \(3, 16, 16, 4\)"),
        (np.zeros((3, 0, 16, 3), np.uint8), r"shape \(3, 0, 16, 3\)"),
        (np.zeros((1, 16, 16, 3)), "dtype float64; accepted: uint8, or float32"),
        (None, r"shape \(\)"),
        ([np.zeros((16, 16, 3), np.uint8)], r"chunk of it\) has shape \(16, 16, 3\)"),
        (np.zeros((0, 16, 16, 3), np.uint8), "frames=0; accepted: 1 or more"),
        ([], "no frames; accepted: 1 or more"),
        ([pattern(1, 16, 16), pattern(1, 32, 16)], "accepted: one size"),
        ([np.full((1, 16, 16, 3), np.nan, np.float32)], "NaN"),
    ],
)
@pytest.mark.parametrize("ending", ["mp4", "gif", "webp", "png"])
def test_videos_that_are_refused(tmp_path, video, message, ending):
    with pytest.raises(ValueError, match=message):
        media.save_video(video, tmp_path / f"a.{ending}")
    assert names(tmp_path) == []


@pytest.mark.parametrize("check", [media.check_output, lambda path, n: media.save_video([], path)])
def test_places_that_are_refused(tmp_path, check):
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    before = names(tmp_path)
    for name in ("a.avi", "a", "a.npy", ".mp4", "..png", "...mp4"):
        with pytest.raises(ValueError, match=r"ends in '.*'; accepted: \.mp4, \.gif, \.webp, "):
            check(tmp_path / name, 1)
    for name in ("missing/a.mp4", "file/a.mp4"):
        with pytest.raises(ValueError, match="there is no folder '.*'; accepted"):
            check(tmp_path / name, 1)
    with pytest.raises(ValueError, match="no folder 'gs:/bucket'; .* local"):
        media.check_output("gs://bucket/a.mp4", 1)
    with pytest.raises(ValueError, match=r"folder\.mp4' is a folder; accepted"):
        check(tmp_path / "folder.mp4", 1)
    with pytest.raises(ValueError, match="cannot be written to.*long"):
        check(tmp_path / f"{'a' * 250}.mp4", 1)
    assert names(tmp_path) == before


@UNPRIVILEGED
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written to .Permission denied"):
        media.check_output(tmp_path / "a.mp4", 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no /proc")
def test_a_folder_that_only_looks_writable_is_refused():
    with pytest.raises(ValueError, match="'/proc/a.png' cannot be written to"):
        media.check_output("/proc/a.png", 1)


def test_check_output_accepts_and_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.npz").write_bytes(b"older")
    for name, frames in [("a.mp4", 81), ("b.npz", 81), ("c.PNG", 1), (tmp_path / "d.mp4", 1)]:
        assert media.check_output(name, frames) is None
    assert names(tmp_path) == ["b.npz"]
    assert (tmp_path / "b.npz").read_bytes() == b"older"
    for frames in (0, -3):
        with pytest.raises(ValueError, match=f"frames={frames}; accepted: 1 or more"):
            media.check_output("a.npz", frames)


@pytest.mark.parametrize(
    ("name", "frames", "size", "needed"),
    [
        ("a.npz", 81, (832, 480), 2 * 81 * 832 * 480 * 12 + 2**20),
        ("a.npz", 81, None, 2**20),
        ("a.mp4", 81, (832, 480), 2**20),
        ("a.png", 81, (832, 480), 2**20),
        ("a.png", 1, (832, 480), 2**20),
        ("a.gif", 81, None, 2**20),
        ("a.webp", 81, None, 2**20),
    ],
)
def test_a_disk_without_room_is_refused(tmp_path, monkeypatch, name, frames, size, needed):
    asked = []

    def disk(free):
        def usage(folder):
            asked.append(Path(folder))
            return SimpleNamespace(total=1 << 60, used=0, free=free)

        monkeypatch.setattr(shutil, "disk_usage", usage)

    disk(needed)
    media.check_output(tmp_path / name, frames, size=size)
    disk(needed - 1)
    said = rf"{name}': {needed} bytes are needed and {needed - 1} are free; accepted"
    with pytest.raises(ValueError, match=said):
        media.check_output(tmp_path / name, frames, size=size)
    assert asked == [tmp_path, tmp_path]
    assert names(tmp_path) == []


def test_the_room_for_an_npz_is_what_it_takes(tmp_path):
    media.save_video(floats(5, 64, 32), tmp_path / "a.npz")
    size = (tmp_path / "a.npz").stat().st_size
    assert 0 < size - 5 * 64 * 32 * 12 < 1024


def test_odd_sides_are_refused_beforehand(tmp_path):
    with pytest.raises(ValueError, match="833 by 480 pixels; accepted for an .mp4: even sides"):
        media.check_output(tmp_path / "a.mp4", 81, size=(833, 480))
    for name in ("a.gif", "a.webp", "a.png", "a.npz"):
        media.check_output(tmp_path / name, 81, size=(833, 481))


# Failures


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt, BrokenPipeError, SystemExit])
@pytest.mark.parametrize("ending", ["mp4", "gif", "webp", "npz"])
def test_a_decoder_that_fails_leaves_nothing(tmp_path, ending, error):
    path = tmp_path / f"a.{ending}"
    with pytest.raises(error, match="decoding failed"):
        media.save_video(breaks(error=error), path)
    assert names(tmp_path) == []
    path.write_bytes(b"older")
    with pytest.raises(error, match="decoding failed"):
        media.save_video(breaks(error=error), path)
    assert names(tmp_path) == [path.name]
    assert path.read_bytes() == b"older"


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_decoder_that_fails_leaves_no_folder(tmp_path, chunks, error):
    path = tmp_path / "a.png"
    with pytest.raises(error, match="decoding failed"):
        media.save_video(breaks(chunks, error=error), path)
    assert names(tmp_path) == []
    media.save_video(pattern(2, 16, 16), path)
    before = folder_bytes(tmp_path / "a")
    with pytest.raises(error, match="decoding failed"):
        media.save_video(breaks(chunks, error=error), path)
    assert names(tmp_path) == ["a"]
    assert folder_bytes(tmp_path / "a") == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("ending", ["mp4", "gif", "webp", "npz", "png"])
@pytest.mark.parametrize("frames", [1, 60])
def test_full_disk(tmp_path, ending, frames):
    path = tmp_path / f"a.{ending}"
    partial = tmp_path / f".a.partial-{os.getpid()}"

    def decoder():
        # The name under which the file is written, while it is: every write to it now fails.
        if ending != "png" or frames == 1:
            partial.with_name(f"{partial.name}.{ending}").symlink_to("/dev/full")
        for k in range(frames):
            if ending == "png" and k == 3:
                (partial / "00003.png").symlink_to("/dev/full")
            yield floats(1, 208, 112)

    with pytest.raises(OSError, match="No space left on device"):
        media.save_video(decoder(), path)
    assert names(tmp_path) == []


# The module


def test_media_imports_neither_jax_nor_ffmpeg():
    # With a package of nothing in its place, as the real one's __init__ may import what it likes.
    code = (
        "import sys, types; package = types.ModuleType('wan_jax'); "
        f"package.__path__ = [{str(Path(media.__file__).parent)!r}]; "
        "sys.modules['wan_jax'] = package; import wan_jax.media, wan_jax.noise_file; "
        "assert not {'jax', 'torch', 'imageio_ffmpeg'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
