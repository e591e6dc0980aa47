"""The trainer's data: listings, clips, the cache of what the networks make of them, and batches."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import jax
import numpy as np
import pytest
from PIL import Image

import wan_jax
from tests import tolerances
from tests.random_weights import relative_l2
from tests.unit.test_media import pattern
from wan_jax import ffmpeg, images, vae
from wan_jax.request import make_request
from wan_jax.training import batches, cache, dataset, entries
from wan_jax.training.batches import Batch, Batches
from wan_jax.training.dataset import Example, read_clip, read_listing
from wan_jax.training.entries import Cache, Entry

Wan = wan_jax.Wan
SIZE, FRAMES = (32, 16), 5
CONTENTS = ("latents", "context", "known", "tokens")


def video(path: Path, *, frames: int = FRAMES, fps: float = 16, start: int = 0) -> Path:
    wan_jax.save_video(pattern(start + frames, *SIZE)[start:], path, fps=fps)
    return path


def image(path: Path, seed: int = 0) -> Path:
    pixels = np.random.RandomState(seed).randint(0, 256, (24, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def listing(folder: Path, lines: Iterable[Any], name: str = "metadata.jsonl") -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / name).write_text("\n".join(texts))
    return folder


# Listings


def test_every_bad_line_is_named_and_left_out(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "notes.txt").write_text("x")
    for name in ("a.mp4", "b.mp4", "../outside.mp4"):
        (data / name).write_bytes(b"x")
    wrong = {
        "{not JSON": "line 2: not JSON",
        "[1]": "line 3: a list; an object is needed",
        '{"text": "x"}': r"line 4: no file_name; its keys are \['text'\]",
        '{"file_name": "b.mp4"}': "line 5: no text; its keys",
        '{"file_name": "gone.mp4", "text": "x"}': "line 6: 'gone.mp4' does not exist",
        '{"file_name": "../outside.mp4", "text": "x"}': "line 7: .* leads out of the folder",
        '{"file_name": "/etc/passwd.mp4", "text": "x"}': "line 8: .* leads out of the folder",
        '{"file_name": "./a.mp4", "text": "x"}': "line 9: './a.mp4' was named in line 1",
        '{"file_name": "b.mp4", "text": " "}': "line 10: text is ' '; a text or a list",
        '{"file_name": "b.mp4", "text": []}': r"line 11: text is \[\]",
        '{"file_name": "b.mp4", "text": ["x", 1]}': r"line 12: text is \['x', 1\]",
        '{"file_name": "b.mp4", "text": "\\ud800"}': "line 13: .* half a character",
        '{"file_name": "notes.txt", "text": "x"}': "line 14: .* ends in '.txt'; accepted: .mp4",
        '{"file_name": ".", "text": "x"}': "line 15: file_name '.' ends in ''",
        '{"file_name": 3, "text": "x"}': "line 16: file_name is 3; a path",
        '{"file_name": "a\\u0000.mp4", "text": "x"}': "line 17: file_name is ",
        f'{{"file_name": "{"x" * 300}.mp4", "text": "x"}}': "line 18: .* does not exist",
        "[" * 100_000: "line 19: not JSON",
    }
    listing(data, ['{"file_name": "a.mp4", "text": "A."}', *wrong])
    told: list[str] = []
    found = read_listing(data, notify=told.append)
    assert found == [Example(data / "a.mp4", ("A.",), "a.mp4")]
    assert told[-1] == f"left out: 8 more lines of {data / 'metadata.jsonl'}"
    for start in (0, 10):
        some = list(wrong)[start : start + 10]
        lines = [""] * (start + 1) + some  # the numbers stay
        listing(data, ['{"file_name": "a.mp4", "text": "A."}', *lines[1:]])
        told.clear()
        read_listing(data, notify=told.append)
        for sentence, line in zip(told, some, strict=True):
            assert pytest.raises(ValueError, match=wrong[line]).matches(ValueError(sentence))


def test_bytes_that_are_no_text_spoil_one_line(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    good = b'{"file_name": "a.png", "text": "caf\xc3\xa9"}'
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\n\xff\xfe{}\n")
    told: list[str] = []
    (example,) = read_listing(tmp_path, notify=told.append)
    assert example.captions == ("café",)
    assert len(told) == 1 and "line 3: not JSON" in told[0]


def test_what_a_listing_may_be(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    image(tmp_path / "sub" / "a.PNG")
    elsewhere = tmp_path.parent / f"{tmp_path.name}.png"
    (tmp_path / "b.png").symlink_to(image(elsewhere))
    lines = [
        {"file": "sub/a.PNG", "caption": ["One.", "Two."], "more": 1},
        {"file_name": "b.png", "file": "x", "text": "Three.", "caption": "x"},
    ]
    wanted = [("One.", "Two."), ("Three.",)]
    listing(tmp_path, lines, name="captions.jsonl")
    assert [e.captions for e in read_listing(tmp_path)] == wanted
    listing(tmp_path, [], name="others.jsonl")
    with pytest.raises(ValueError, match=r"has captions.jsonl, others.jsonl; needed is metadata"):
        read_listing(tmp_path)
    listing(tmp_path, lines[:1])
    assert [e.name for e in read_listing(tmp_path)] == ["sub/a.PNG"]


def test_no_listing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no file of that ending; needed is metadata.jsonl"):
        read_listing(tmp_path)
    with pytest.raises(ValueError, match="--data .*gone is no folder"):
        read_listing(tmp_path / "gone")
    listing(tmp_path, ["x", "y"])
    with pytest.raises(ValueError, match="no line that can be used: .*line 1: .*line 2: not JSON"):
        read_listing(tmp_path)
    listing(tmp_path, [])
    with pytest.raises(ValueError, match="no line that can be used: it is empty"):
        read_listing(tmp_path)


# Clips


def _run_ffmpeg(*arguments: str) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *arguments]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def _levels(first: np.ndarray, second: np.ndarray) -> float:
    """The mean difference of pixels in -1..1, in levels of 255."""
    return float(np.abs(first - second).mean()) * 127.5


def _clip(path: Path, **arguments: Any) -> np.ndarray:
    return read_clip(path, **({"size": SIZE, "frames": FRAMES, "fps": 16} | arguments))


@pytest.mark.parametrize("ending", [".mp4", ".gif", ".mkv", ".webm"])
def test_a_clip_is_the_video(tmp_path: Path, ending: str) -> None:
    source, path = tmp_path / "source.mp4", tmp_path / f"a{ending}"
    wan_jax.save_video(pattern(9, 64, 32), source if ending != ".gif" else path, fps=16)
    if ending in (".mkv", ".webm"):
        codec = ["copy"] if ending == ".mkv" else ["libvpx-vp9", "-crf", "10", "-b:v", "0"]
        _run_ffmpeg("-i", str(source), "-c:v", *codec, str(path))
    elif ending == ".mp4":
        path = source
    clip = _clip(path, size=(64, 32), frames=9)
    assert clip.dtype == np.float32 and clip.shape == (9, 32, 64, 3)
    assert np.abs(clip).max() <= 1
    wanted = np.stack([images.read_image(frame) for frame in pattern(9, 64, 32)])
    nearest = [int(np.argmin([_levels(frame, other) for other in wanted])) for frame in clip]
    assert nearest == list(range(9))
    if ending != ".gif":  # whose 256 colours are further off
        assert _levels(clip, wanted) < tolerances.MEDIA_MP4_MEAN_ERROR


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (128, 128)])
def test_a_clip_covers_its_size_and_is_cut_at_the_centre(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    frames = pattern(3, 192, 128)
    wan_jax.save_video(frames, tmp_path / "a.mp4")
    Image.fromarray(frames[1]).save(tmp_path / "a.png")
    clip = _clip(tmp_path / "a.mp4", size=size, frames=3)
    still = _clip(tmp_path / "a.png", size=size, frames=3)
    assert still.shape == (1, size[1], size[0], 3)
    assert _levels(clip[1], still[0]) < tolerances.DATA_SCALED
    width, height = size
    scale = min(192 / width, 128 / height)
    left, top = (192 - scale * width) / 2, (128 - scale * height) / 2
    box = tuple(round(edge) for edge in (left, top, 192 - left, 128 - top))
    cut = Image.fromarray(frames[1]).crop(box).resize(size, Image.Resampling.BICUBIC)
    assert _levels(still[0], images.read_image(cut)) < tolerances.DATA_SCALED


def test_what_is_larger_is_not_aliased(tmp_path: Path) -> None:
    board = (np.indices((128, 256)).sum(0) % 2 * 255).astype(np.uint8)
    frames = np.repeat(np.repeat(board[None, ..., None], 3, axis=-1), 3, axis=0)
    Image.fromarray(frames[0]).save(tmp_path / "a.png")
    wan_jax.save_video(frames, tmp_path / "a.mp4")
    for name in ("a.png", "a.mp4"):
        assert _clip(tmp_path / name, size=(64, 32), frames=1).std() < tolerances.DATA_ALIAS


def test_frames_are_taken_at_the_pace_of_the_clip(tmp_path: Path) -> None:
    frames = pattern(20, 64, 32)
    shown = np.stack([images.read_image(frame) for frame in frames])
    for fps, step in ((32, 2), (8, 0.5)):
        wan_jax.save_video(frames, tmp_path / "a.mp4", fps=fps)
        clip = _clip(tmp_path / "a.mp4", size=(64, 32), frames=9)
        nearest = [int(np.argmin([_levels(frame, other) for other in shown])) for frame in clip]
        assert nearest == [int(k * step) for k in range(9)]


def test_a_clip_is_upright(tmp_path: Path) -> None:
    wan_jax.save_video(pattern(3, 64, 32), tmp_path / "a.mp4")
    turned = tmp_path / "turned.mp4"
    _run_ffmpeg(
        *("-display_rotation", "90", "-i", str(tmp_path / "a.mp4"), "-c", "copy", str(turned))
    )
    wanted = np.rot90(_clip(tmp_path / "a.mp4", size=(64, 32), frames=3), axes=(1, 2))
    assert _levels(_clip(turned, size=(32, 64), frames=3), wanted) < tolerances.DATA_SCALED


def test_a_clip_has_square_pixels_and_an_even_pace(tmp_path: Path) -> None:
    source, odd = tmp_path / "a.mp4", tmp_path / "odd.mp4"
    wan_jax.save_video(pattern(20, 128, 64), source)
    lossless = ("-c:v", "libx264", "-qp", "0", "-fps_mode", "vfr", str(odd))
    _run_ffmpeg(
        "-i", str(source), "-vf", "select='not(between(n,3,5))',scale=64:64,setsar=2", *lossless
    )
    clip, whole = (_clip(path, size=(128, 64), frames=9) for path in (odd, source))
    nearest = [int(np.argmin([_levels(frame, other) for other in whole])) for frame in clip]
    assert nearest == [0, 1, 2, 2, 2, 2, 6, 7, 8]
    assert _levels(clip[0], whole[0]) < tolerances.DATA_SCALED


def test_a_video_that_is_too_short(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", frames=4)
    with pytest.raises(ValueError, match=r"a.mp4 has 4 frames at 16 a second \(0.25 s\); 5 are"):
        _clip(path)
    assert _clip(path, fps=32).shape[0] == FRAMES


def _halved(path: Path) -> None:
    video(path, frames=48)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _damaged(path: Path) -> None:
    """Frames that start whole and end with bytes turned over."""
    frames = np.random.RandomState(0).randint(0, 256, (24, 16, 32, 3)).astype(np.uint8)
    wan_jax.save_video(frames, path)
    data = bytearray(path.read_bytes())
    for k in range(len(data) // 2, len(data) // 2 + 1000):
        data[k] ^= 0xFF
    path.write_bytes(data)


def _playlist(path: Path) -> None:
    video(path.with_name("inner.mp4"))
    path.write_text("ffconcat version 1.0\nfile inner.mp4\n")


def _sound(path: Path) -> None:
    _run_ffmpeg("-f", "lavfi", "-i", "anullsrc", "-t", "1", "-c:a", "aac", str(path))


BROKEN: dict[str, Callable[[Path], Any]] = {
    "halved": _halved,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a video"),
    "damaged": _damaged,
    "playlist": _playlist,
    "sound": _sound,
    "image": lambda path: image(path.with_suffix(".png")).rename(path),
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_video_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "broken.mp4"
    BROKEN[kind](path)
    with pytest.raises(ValueError, match=r"broken\.mp4 (cannot be read: ffmpeg failed|is missing)"):
        _clip(path, frames=24)


def test_damage_past_the_clip_is_no_matter(tmp_path: Path) -> None:
    _damaged(tmp_path / "a.mp4")
    assert _clip(tmp_path / "a.mp4", frames=2).shape[0] == 2


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    for data in (b"", b"text", image(tmp_path / "whole.png").read_bytes()[:600]):
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.png"):
            _clip(tmp_path / "a.png")


# The cache


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two videos, one of them with two captions, and an image."""
    folder = tmp_path / "data"
    folder.mkdir()
    video(folder / "a.mp4")
    video(folder / "b.mp4", frames=7, start=20)
    image(folder / "c.png")
    lines = [
        {"file_name": "a.mp4", "text": "A red fox."},
        {"file_name": "b.mp4", "text": ["Waves.", "Waves, of which there are more and more."]},
        {"file_name": "c.png", "text": "Noise."},
    ]
    return listing(folder, lines)


def _build(wan: Wan, data: Path, **arguments: Any) -> Cache:
    given = {"folder": data.parent / "cache", "size": SIZE, "frames": FRAMES} | arguments
    return cache.build(wan, read_listing(data), **given)


def _tensors(entry: Entry) -> dict[str, np.ndarray]:
    return entries.read(entry.path, sorted(entries.names(entry.path)))


def _counted(run: Callable[..., Any], name: str, found: dict[str, int]) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        found[name] = found.get(name, 0) + 1
        return run(*arguments)

    return counted


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each network ran."""
    found: dict[str, int] = {}
    for name in ("encode_video", "encode_views", "encode_text"):
        monkeypatch.setattr(Wan, name, _counted(getattr(Wan, name), name, found))
    return found


def test_the_cache_is_what_the_networks_give(wan: Wan, data: Path) -> None:
    built = _build(wan, data)
    assert [entry.name for entry in built.entries] == ["a.mp4", "b.mp4", "c.png"]
    assert [entry.shape for entry in built.entries] == [(2, 2, 4, 16)] * 2 + [(1, 2, 4, 16)]
    assert [entry.captions for entry in built.entries] == [1, 2, 1]
    assert not built.skipped and not (built.folder / "skipped.jsonl").exists()
    encode = jax.jit(vae.encode)
    for entry, example in zip(built.entries, read_listing(data), strict=True):
        tensors = _tensors(entry)
        assert set(tensors) == {"latents", "context"}
        clip = _clip(example.path)
        wanted = np.asarray(encode(wan.network("vae"), clip[None]))[0]
        assert tensors["latents"].dtype == np.float32
        assert relative_l2(tensors["latents"], wanted) <= tolerances.DATA_LATENTS
        states = wan.encode_text(example.captions)
        np.testing.assert_array_equal(tensors["context"], states[:, : entry.rows])
        assert not states[:, entry.rows :].any() and states[:, entry.rows - 1].any()
    empty = wan.encode_text([""])[0]
    np.testing.assert_array_equal(built.null, empty[: len(built.null)])
    assert not empty[len(built.null) :].any()
    assert not list(built.folder.glob(".*"))


@pytest.mark.parametrize("kind", ["i2v", "flf2v"])
def test_what_images_tell_is_what_generation_is_told(
    kind: str, data: Path, request: pytest.FixtureRequest
) -> None:
    wan = request.getfixturevalue(kind)
    built = _build(wan, data)
    assert [entry.name for entry in built.entries] == ["a.mp4", "b.mp4"]
    assert "c.png is one frame, which is also the image" in built.skipped["c.png"]
    for entry in built.entries:
        clip = _clip(data / entry.name)
        last = clip[-1] if kind == "flf2v" else None
        asked = make_request(
            wan.config, "x", image=clip[0], last_image=last, size=SIZE, frames=len(clip)
        )
        known = wan.encode_images(asked)
        assert known is not None
        tensors = _tensors(entry)
        assert set(tensors) == set(CONTENTS)
        np.testing.assert_array_equal(tensors["known"], known.channels[0])
        np.testing.assert_array_equal(tensors["tokens"], known.tokens[0])


def test_an_image_that_an_earlier_release_encoded_is_left_out(i2v: Wan, data: Path) -> None:
    built = _build(i2v, data)
    content = hashlib.sha256((data / "c.png").read_bytes()).hexdigest()
    key = cache._digest(i2v, content, ("Noise.",), SIZE, 1, None)
    shutil.copyfile(built.entries[0].path, built.folder / f"{key}.safetensors")
    again = _build(i2v, data)
    assert again.entries == built.entries and again.skipped == built.skipped
    lines = (built.folder / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["file_name"] for line in lines] == ["c.png"]


def test_one_frame_is_no_video_of_an_image(i2v: Wan, data: Path, counts: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"frames is 1, only the image .* needs 5 or more"):
        _build(i2v, data, frames=1)
    examples = [Example(data / "c.png", ("Noise.",), "c.png")]
    with pytest.raises(ValueError, match=r"none of 1 examples can be used: .*c\.png is one frame"):
        cache.build(i2v, examples, folder=data.parent / "cache", size=SIZE, frames=FRAMES)
    assert not counts


def test_states_keep_the_dtype_of_the_run(
    tiny_source: Path, tiny_cache: Path, data: Path, counts: dict[str, int]
) -> None:
    """And networks leave the device where they are to."""
    wan = wan_jax.load(tiny_source, dtype="bfloat16", cache_dir=tiny_cache, offload=True)
    loads: list[str] = []
    for part, loader in wan.loaders.items():

        def load(part: str = part, loader: Any = loader) -> Any:
            assert not wan._resident
            loads.append(part)
            return loader()

        wan.loaders[part] = load
    built = _build(wan, data)
    assert loads == ["vae", "umt5"] and not wan._resident
    assert counts == {"encode_video": 3, "encode_text": 4}
    states = wan.encode_text(["A red fox."])
    assert _tensors(built.entries[0])["context"].dtype == states.dtype == built.null.dtype
    assert states.dtype.name == "bfloat16"
    with Batches(built, batch_size=2, seed=0) as made:
        assert made.batch(0).context.dtype == states.dtype
        assert made.batch(0).latents.dtype == np.float32


def test_nothing_is_encoded_twice(wan: Wan, data: Path, counts: dict[str, int]) -> None:
    built = _build(wan, data)
    counts.clear()
    again = _build(wan, data)
    assert again.entries == built.entries and not counts
    np.testing.assert_array_equal(again.null, built.null)
    lines = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(lines.replace("A red fox.", "A grey fox."))
    changed = _build(wan, data)
    assert counts == {"encode_video": 1, "encode_text": 1}
    assert changed.entries[1:] == built.entries[1:] and changed.entries[0] != built.entries[0]
    video(data / "b.mp4", start=3)
    assert _build(wan, data).entries[1] != built.entries[1]
    assert counts == {"encode_video": 2, "encode_text": 2}
    _build(wan, data, frames=1)  # the image stays
    assert counts == {"encode_video": 4, "encode_text": 4}
    _build(dataclasses.replace(wan, digest="another"), data)
    assert counts == {"encode_video": 7, "encode_text": 8}  # the empty prompt too
    built.entries[1].path.write_bytes(built.entries[1].path.read_bytes()[:-1])
    video(data / "b.mp4", frames=7, start=20)
    _build(wan, data)
    assert counts == {"encode_video": 8, "encode_text": 9}


@pytest.mark.parametrize("stage", ["read", "image", "clip", "encode"])
def test_an_interrupted_build_goes_on(
    i2v: Wan, data: Path, counts: dict[str, int], stage: str
) -> None:
    def interrupt(progress: wan_jax.Progress) -> None:
        if (progress.stage, progress.done) == (stage, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _build(i2v, data, callback=interrupt)
    told: list[tuple[str, int, int]] = []
    built = _build(i2v, data, callback=lambda p: told.append((p.stage, p.done, p.total)))
    assert counts == {"encode_video": 2, "encode_views": 2, "encode_text": 3}
    assert len(built.entries) == 2 and not list(built.folder.glob(".*"))
    assert told[:4] == [("read", k, 3) for k in range(4)]
    assert told[-1][0] == "encode" and told[-1][1] == told[-1][2]


def test_what_killed_builds_left_is_removed(wan: Wan, data: Path) -> None:
    built = _build(wan, data)
    old, new = (built.folder / f".x.partial-{k}.safetensors" for k in range(2))
    merged = built.folder / f".{built.entries[0].path.stem}.parts.safetensors"
    for path in (old, new, merged):
        path.touch()
    os.utime(old, (0, 0))
    _build(wan, data)
    assert [path for path in (old, new, merged) if path.exists()] == [new]


def test_what_cannot_be_used_is_listed(wan: Wan, data: Path, counts: dict[str, int]) -> None:
    for kind in ("halved", "empty", "text"):
        BROKEN[kind](data / f"{kind}.mp4")
    video(data / "short.mp4", frames=4)
    video(data / "gone.mp4")
    names = ["halved.mp4", "empty.mp4", "text.mp4", "short.mp4", "gone.mp4"]
    good = {"file_name": "a.mp4", "text": "A."}
    listing(data, [good, *({"file_name": name, "text": "A."} for name in names)])
    told: list[str] = []
    examples = read_listing(data)
    (data / "gone.mp4").unlink()
    options = {"folder": data.parent / "cache", "size": SIZE, "frames": FRAMES}
    built = cache.build(wan, examples, notify=told.append, **options)
    assert [entry.name for entry in built.entries] == ["a.mp4"]
    lines = (built.folder / "skipped.jsonl").read_text().splitlines()
    found = {line["file_name"]: line["reason"] for line in map(json.loads, lines)}
    assert found == built.skipped and sorted(found) == sorted(names)
    assert all(str(data / name) in reason for name, reason in found.items())
    assert len(told) == 1 and told[0].startswith("left out 5 files: ")
    counts.clear()
    with pytest.raises(ValueError, match=r"none of 5 examples can be used: .*short\.mp4 has 4"):
        cache.build(wan, examples[1:], **options | {"folder": data.parent / "other"})
    assert not counts  # the large networks are not loaded for it
    listing(data, [good])
    assert not _build(wan, data).skipped
    assert not (built.folder / "skipped.jsonl").exists()


def test_copies_share_a_file(wan: Wan, data: Path, counts: dict[str, int]) -> None:
    (data / "copy.mp4").write_bytes((data / "a.mp4").read_bytes())
    for name in ("short.mp4", "too.mp4"):
        (data / name).write_bytes(b"x")
    names = ("a.mp4", "copy.mp4", "short.mp4", "too.mp4")
    built = _build(wan, listing(data, [{"file_name": name, "text": "A."} for name in names]))
    first, second = built.entries
    assert first.path == second.path and second.name == "copy.mp4"
    assert counts["encode_video"] == 1 and set(built.skipped) == set(names[2:])


def test_a_full_disk_says_so(wan: Wan, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="no room for .* bytes in .*cache; .* goes on from it"):
            _build(wan, data)
    assert [p.name for p in (data.parent / "cache").iterdir()] == []
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: os.terminal_size((0, 0)))
        patch.setattr(os.terminal_size, "free", 0, raising=False)
        with pytest.raises(ValueError, match="0.0 GB free at .*choose another folder"):
            _build(wan, data)


def test_settings_that_cannot_be(wan: Wan, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, message in (
        ({"size": (30, 16)}, r"size is \(30, 16\); width and height in multiples of 16"),
        ({"frames": 6}, r"frames is 6; 4n \+ 1 is needed"),
        ({"fps": 0}, "fps is 0; a number"),
        ({"folder": "gs://bucket/x"}, "gs://bucket/x is in a bucket"),
        ({"folder": data / "a.mp4"}, "a.mp4 is no folder that you may write to"),
    ):
        with pytest.raises(ValueError, match=message):
            _build(wan, data, **wrong)
    with pytest.raises(ValueError, match="examples are none"):
        cache.build(wan, [], folder=data.parent / "x", size=SIZE, frames=FRAMES)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(data / "nowhere"))
    with pytest.raises(ValueError, match="reading videos needs ffmpeg .*nowhere"):
        _build(wan, data)


# Batches


def _cache(folder: Path, videos: int = 7, stills: int = 0, known: bool = False) -> Cache:
    """A cache whose latents tell which example they are, and whose states which caption."""
    made = []
    for k in range(videos + stills):
        t, captions = (2, 1 + k % 3) if k < videos else (1, 1)
        tensors = {
            "latents": np.full((t, 1, 1, 16), k, np.float32),
            "context": np.arange(captions, dtype=np.float32)[:, None, None]
            * np.ones((1, 2 + k % 2, 3), np.float32),
        }
        if known:
            tensors["known"] = np.full((t, 1, 1, 20), k, np.float32)
            tensors["tokens"] = np.full((5, 4), k, np.float32)
        path = folder / f"{k:03}.safetensors"
        entries.write(path, tensors, about={})
        made.append(Entry(path, str(k), (t, 1, 1, 16), captions, 2 + k % 2))
    return Cache(folder, tuple(made), np.ones((1, 3), np.float32), {})


def _ids(batch: Batch) -> list[int]:
    return [int(k) for k in batch.latents[:, 0, 0, 0, 0]]


def _equal(first: Batch, second: Batch) -> bool:
    return all(
        (a is None and b is None) or np.array_equal(a, b)
        for a, b in zip(first, second, strict=True)
    )


def test_a_batch_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    made = _cache(tmp_path, videos=7, stills=3, known=True)
    with Batches(made, batch_size=2, seed=5) as one, Batches(made, batch_size=2, seed=6) as other:
        walked = [one.batch(step) for step in range(20)]
        turned = made._replace(entries=made.entries[::-1])
        for prefetch in (0, 3):
            with Batches(turned, batch_size=2, seed=5, prefetch=prefetch) as again:
                for step in (13, 2, 3, 4, 19, 0):
                    assert _equal(again.batch(step), walked[step])
        assert not all(_equal(other.batch(step), walked[step]) for step in range(20))
    assert walked[0].known is not None and walked[0].tokens is not None
    assert walked[0].known.shape[-1] == 20 and walked[0].tokens.shape == (2, 5, 4)


def test_an_epoch_has_every_example_once_and_wraps(tmp_path: Path) -> None:
    with Batches(_cache(tmp_path), batch_size=3, seed=0) as made:
        assert made.steps_per_epoch == 3 and made.examples == 7
        assert made.shapes == ((2, 1, 1, 16),)
        ids = [k for step in range(14) for k in _ids(made.batch(step))]
        assert made.batch(0).known is None
    epochs = [ids[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_buckets_take_turns_in_proportion(tmp_path: Path) -> None:
    with Batches(_cache(tmp_path, videos=12, stills=4), batch_size=2, seed=3) as made:
        assert made.shapes == ((1, 1, 1, 16), (2, 1, 1, 16))
        taken = [made.batch(step) for step in range(32)]
    still = [batch.latents.shape[1] == 1 for batch in taken]
    assert [sum(still[k : k + 4]) for k in range(0, 32, 4)] == [1] * 8
    for part, count in ((True, 4), (False, 12)):
        ids = [k for batch, s in zip(taken, still, strict=True) if s == part for k in _ids(batch)]
        whole = [sorted(ids[k : k + count]) for k in range(0, len(ids), count)]
        assert all(epoch == whole[0] for epoch in whole) and len(set(whole[0])) == count
    assert taken[0].context.shape[1] == 3


def test_a_bucket_smaller_than_a_batch_repeats(tmp_path: Path) -> None:
    with Batches(_cache(tmp_path, videos=2), batch_size=5, seed=0) as made:
        ids = [k for step in range(2) for k in _ids(made.batch(step))]
    assert sorted(ids) == [0] * 5 + [1] * 5


def test_captions_are_drawn(tmp_path: Path) -> None:
    with Batches(_cache(tmp_path, videos=3), batch_size=3, seed=0) as made:
        found: dict[int, set[int]] = {k: set() for k in range(3)}
        for step in range(30):
            batch = made.batch(step)
            for k, caption in zip(_ids(batch), batch.context[:, 0, 0], strict=True):
                found[k].add(int(caption))
        assert found == {0: {0}, 1: {0, 1}, 2: {0, 1, 2}}
        assert batch.context.shape == (3, 3, 3)
        assert made.null.shape == (3, 3) and made.null[:, 0].tolist() == [1, 0, 0]


def test_shards_are_the_rows_of_a_batch(tmp_path: Path) -> None:
    with Batches(_cache(tmp_path, stills=2), batch_size=4, seed=0) as made:
        for step in range(6):
            parts = [made.batch(step, shard=(i, 2)) for i in range(2)]
            joined = Batch(*(None if a is None else np.concatenate([a, b]) for a, b in zip(*parts)))
            assert _equal(joined, made.batch(step))
        for shard in ((2, 2), (-1, 2), (0, 3)):
            with pytest.raises(ValueError, match=r"shard is .* of a batch of 4; \(i, n\)"):
                made.batch(0, shard=shard)


def test_reading_runs_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    run = Batches._read
    monkeypatch.setattr(Batches, "_read", lambda self, *key: read.append(key[0]) or run(self, *key))
    with Batches(_cache(tmp_path), batch_size=2, seed=0, prefetch=2) as made:
        made.batch(0)
        made._waiting[2, 0, 1].result()
        assert read == [0, 1, 2]
        made.batch(1)
        made._waiting[3, 0, 1].result()
        assert read == [0, 1, 2, 3]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_file_that_is_lost_is_named_in_its_turn(tmp_path: Path, prefetch: int) -> None:
    built = _cache(tmp_path, videos=4)
    with Batches(built, batch_size=1, seed=0, prefetch=0) as made:
        lost = _ids(made.batch(1))[0]
    (tmp_path / f"{lost:03}.safetensors").write_bytes(b"x")
    with Batches(built, batch_size=1, seed=0, prefetch=prefetch) as made:
        made.batch(0)
        for _ in range(2):
            with pytest.raises(ValueError, match=f"{lost:03}.safetensors cannot be read"):
                made.batch(1)
        made.batch(2)


def test_arguments_that_cannot_be(tmp_path: Path) -> None:
    built = _cache(tmp_path, videos=1)
    for wrong in ({"batch_size": 0}, {"seed": -1}, {"prefetch": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is "):
            Batches(built, **({"batch_size": 1, "seed": 0} | wrong))
    with pytest.raises(ValueError, match="has no examples"):
        Batches(built._replace(entries=()), batch_size=1, seed=0)
    with (
        Batches(built, batch_size=1, seed=0) as made,
        pytest.raises(ValueError, match="step is -1"),
    ):
        made.batch(-1)


def test_random_numbers_stay_what_they_are() -> None:
    """A run is taken up by a later release, too: its order must not change."""
    order, _ = batches._epoch(7, (2, 1, 1, 16), 8, 3)
    assert order.tolist() == [1, 6, 5, 7, 0, 2, 4, 3]
    turns = [batches._turn(7, (4, 12), step) for step in range(8)]
    assert turns == [(0, 0), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (0, 1), (1, 5)]


def test_kinds_are_told_by_their_endings() -> None:
    assert not set(dataset.VIDEOS) & set(dataset.IMAGES)
    assert dataset.is_image(Path("a.JPG")) and not dataset.is_image(Path("a.gif"))
    ffmpeg.check_decoder(Path("a.mp4"))
