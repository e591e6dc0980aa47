"""Videos and images out, noise in: what is written, when, and what is left on failure."""

import os
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest

from tests import tolerances
from wan_jax import media

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


def test_a_chunk_is_asked_for_when_the_one_before_is_with_the_encoder(tmp_path, monkeypatch):
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
    media.save_video(decoder(), tmp_path / "a.mp4")
    chunks = [(f"ask {k}", f"frame {2 * k}", f"frame {2 * k + 1}") for k in range(6)]
    assert log[:-1] == [*(line for chunk in chunks for line in chunk), "end", "close"]
    assert log[-1] == "close"  # the second close, harmless
    assert most <= 2  # the one in hand and the one before
    monkeypatch.undo()
    assert len(decode(tmp_path / "a.mp4")[1]) == 12


def test_nothing_is_asked_for_before_the_place_is_known_to_be_good(tmp_path):
    def never():
        raise AssertionError("asked")
        yield

    for name, fps in [("a.gif", 16), ("no/a.mp4", 16), ("a.mp4", 0)]:
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


def test_png_of_more_frames_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"exactly one frame and the video has 5; .*\.mp4"):
        media.save_video(pattern(5, 16, 16), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png.* has more than one;"):
        media.save_video(iter([pattern(1, 16, 16)] * 2), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"has 81;"):
        media.check_output(tmp_path / "a.png", 81)
    assert names(tmp_path) == []


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
    for ending in ("mp4", "png"):
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
@pytest.mark.parametrize("ending", ["mp4", "png"])
def test_videos_that_are_refused(tmp_path, video, message, ending):
    if ending == "png" and "one size" in message:
        message = "more than one|one size"
    with pytest.raises(ValueError, match=message):
        media.save_video(video, tmp_path / f"a.{ending}")
    assert names(tmp_path) == []


@pytest.mark.parametrize("check", [media.check_output, lambda path, n: media.save_video([], path)])
def test_places_that_are_refused(tmp_path, check):
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    before = names(tmp_path)
    for name in ("a.gif", "a", "a.npy", ".mp4"):
        with pytest.raises(ValueError, match=r"ends in '.*'; accepted: \.mp4, \.png, \.npz"):
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


def test_no_ffmpeg_names_what_to_install(tmp_path, monkeypatch):
    def absent():
        raise RuntimeError("No ffmpeg exe could be found.")

    with monkeypatch.context() as patch:
        patch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", absent)
        with pytest.raises(ValueError, match=r"No ffmpeg exe.*pip install imageio\[ffmpeg\]"):
            media.check_output(tmp_path / "a.mp4", 1)
        media.check_output(tmp_path / "a.png", 1)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "imageio_ffmpeg", None)
        with pytest.raises(ValueError, match=r"pip install imageio\[ffmpeg\]"):
            media.check_output(tmp_path / "a.mp4", 1)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere.*IMAGEIO_FFMPEG_EXE"):
        media.check_output(tmp_path / "a.mp4", 1)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/true")
    with pytest.raises(ValueError, match="/bin/true has no libx264 encoder"):
        media.check_output(tmp_path / "a.mp4", 1)


# Failures


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt, BrokenPipeError, SystemExit])
@pytest.mark.parametrize("ending", ["mp4", "npz"])
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


def test_png_decoder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(Broken):
        media.save_video((chunk[:1] for chunk in breaks(1)), tmp_path / "a.png")
    assert names(tmp_path) == []


@pytest.fixture
def encoders(monkeypatch) -> list[subprocess.Popen]:
    """The encoders that were started."""
    started = []
    popen = subprocess.Popen

    def remembered(command, **kwargs):
        process = popen(command, **kwargs)
        if "rawvideo" in command:
            started.append(process)
        return process

    monkeypatch.setattr(subprocess, "Popen", remembered)
    return started


@pytest.mark.parametrize("chunks_after", [0, 1, 20])
@pytest.mark.parametrize("size", [(208, 112), (16, 16)])  # above and below a pipe's buffer
def test_ffmpeg_killed(tmp_path, encoders, chunks_after, size):
    def decoder():
        yield pattern(2, *size)
        encoders[0].send_signal(signal.SIGKILL)
        encoders[0].wait()
        for _ in range(chunks_after):
            yield pattern(2, *size)

    (tmp_path / "a.mp4").write_bytes(b"older")
    with pytest.raises(OSError, match="ffmpeg failed .*killed by SIGKILL.*said: nothing") as info:
        media.save_video(decoder(), tmp_path / "a.mp4")
    assert not isinstance(info.value, BrokenPipeError)
    assert names(tmp_path) == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"older"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("ending", ["mp4", "npz", "png"])
@pytest.mark.parametrize("frames", [1, 60])
def test_full_disk(tmp_path, ending, frames):
    path = tmp_path / f"a.{ending}"

    def decoder():
        # The name under which the file is written, while it is: every write to it now fails.
        (tmp_path / f".a.partial-{os.getpid()}.{ending}").symlink_to("/dev/full")
        for _ in range(frames):
            yield floats(1, 208, 112)

    if ending == "png" and frames > 1:
        pytest.skip("one frame only")
    with pytest.raises(OSError, match="No space left on device"):
        media.save_video(decoder(), path)
    assert names(tmp_path) == []


def test_an_ffmpeg_that_stops_reading(tmp_path, monkeypatch):
    """It says why, on more lines than are kept, and leaves; or lingers, and is not waited for."""
    script = tmp_path / "ffmpeg"
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
    monkeypatch.setattr(media, "_EXIT_SECONDS", 1.0)
    listing = '#!/bin/sh\n[ "$2" = -encoders ] && echo " V... libx264 x" && exit\n'
    noise = (
        "i=0; while [ $i -lt 3000 ]; do echo line $i of many words and more >&2; i=$((i+1)); done\n"
    )
    for ending, message in [
        ("exit 3\n", "exit status 3.*line 2992 of.*line 2999 of"),
        ("exec <&- 2>&-; exec sleep 60\n", "it stopped reading.*line 2999 of"),
    ]:
        script.unlink(missing_ok=True)
        script.write_text(listing + noise + ending)
        script.chmod(0o755)
        with pytest.raises(OSError, match=message) as info:
            media.save_video([pattern(40, 208, 112)], out / "a.mp4")
        assert "line 2991 " not in str(info.value)
        assert names(out) == []


def test_no_encoder_outlives_a_failure(tmp_path, encoders):
    with pytest.raises(Broken):
        media.save_video(breaks(dtype=np.uint8), tmp_path / "a.mp4")
    assert len(encoders) == 1
    assert encoders[0].returncode is not None


# load_noise

SHAPE = (1, 3, 4, 5, 16)  # b, T, h, w, c


def stored(batch: int | None = None, dtype: str = "<f4") -> np.ndarray:
    rng = np.random.default_rng(1)
    lead = () if batch is None else (batch,)
    return rng.standard_normal((*lead, 16, 3, 4, 5)).astype(dtype)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8"])
@pytest.mark.parametrize("fortran", [False, True])
def test_load_noise_moves_channels_last(tmp_path, dtype, fortran):
    noise = stored(dtype=dtype)
    np.save(tmp_path / "n.npy", np.asfortranarray(noise) if fortran else noise)
    loaded = media.load_noise(tmp_path / "n.npy", shape=SHAPE)
    assert loaded.shape == SHAPE
    assert loaded.dtype == np.float32 and loaded.dtype.isnative
    assert loaded.flags.c_contiguous
    for c, t in [(0, 0), (3, 1), (15, 2)]:
        np.testing.assert_array_equal(loaded[0, t, :, :, c], noise[c, t].astype(np.float32))


def test_load_noise_batches(tmp_path):
    np.save(tmp_path / "one.npy", stored(1))
    np.save(tmp_path / "two.npy", stored(2))
    assert media.load_noise(tmp_path / "one.npy", shape=SHAPE).shape == SHAPE
    loaded = media.load_noise(str(tmp_path / "two.npy"), shape=(2, *SHAPE[1:]))
    np.testing.assert_array_equal(loaded[1, 2, 3, 4], stored(2)[1, :, 2, 3, 4])


def damaged(path: Path, kind: str) -> None:
    """Writes a noise file with one thing wrong with it."""
    noise = stored()
    arrays = {
        "latent layout": np.moveaxis(noise, 0, -1),
        "short": noise[:, :2],
        "batch": stored(2),
        "integers": noise.astype(np.int32),
        "complex": noise.astype(np.complex64),
        "nan": np.where(np.arange(5) == 2, np.nan, noise),
        "overflow": np.full(noise.shape, 1e300),
    }
    if kind in arrays:
        np.save(path, arrays[kind])
    elif kind == "pickled":
        np.save(path, noise.astype(object), allow_pickle=True)
    elif kind == "npz":
        with open(path, "wb") as file:
            np.savez(file, noise=noise)
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        np.save(path, noise)
        data = path.read_bytes()
        path.write_bytes(
            {
                "truncated": data[:-5],
                "only a header": data[:128],
                "half a header": data[:60],
                "empty": b"",
                "text": b"not an array",
                "bad zip": b"PK\x03\x04 and no more",
                "huge": data.replace(b"(16, 3, 4, 5)", b"(9999999999999,)").replace(
                    b" " * 3, b"", 1
                ),
            }[kind]
        )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("latent layout", r"shape \(3, 4, 5, 16\)"),
        ("short", r"shape \(16, 2, 4, 5\)"),
        ("batch", r"shape \(2, 16, 3, 4, 5\)"),
        ("integers", "dtype int32"),
        ("complex", "dtype complex64"),
        ("nan", "192 of 960 values that are not finite"),
        ("overflow", "960 of 960 values that are not finite"),
        ("pickled", "cannot be read: .*allow_pickle"),
        ("npz", "an .npz archive"),
        ("folder", "cannot be read: .*Is a directory"),
        ("missing", "cannot be read: .*No such file"),
        ("truncated", "cannot be read"),
        ("only a header", "cannot be read"),
        ("half a header", "cannot be read"),
        ("empty", "cannot be read"),
        ("text", "cannot be read"),
        ("bad zip", "cannot be read"),
        ("huge", "cannot be read"),
    ],
)
def test_load_noise_errors(tmp_path, kind, message):
    damaged(tmp_path / "n.npy", kind)
    accepted = r"accepted: a .npy file of floats, shape \(1, 16, 3, 4, 5\) or \(16, 3, 4, 5\)"
    with pytest.raises(ValueError, match=rf"noise file '.*n\.npy' .*{message}.*; {accepted}"):
        media.load_noise(tmp_path / "n.npy", shape=SHAPE)


def test_load_noise_without_a_batch_is_one_sample(tmp_path):
    np.save(tmp_path / "n.npy", stored())
    with pytest.raises(ValueError, match=r"shape \(16, 3, 4, 5\); .* shape \(2, 16, 3, 4, 5\)$"):
        media.load_noise(tmp_path / "n.npy", shape=(2, *SHAPE[1:]))


# The module


def test_media_is_a_leaf():
    # Alone, as a file: the package's own __init__ may import what it likes.
    code = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('media', "
        f"{media.__file__!r}); module = importlib.util.module_from_spec(spec); "
        "spec.loader.exec_module(module); "
        "assert not {'jax', 'torch', 'wan_jax', 'imageio_ffmpeg'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
