"""Metadata in files: it comes back exactly, and the pictures are as without it."""

import json
import subprocess
import zipfile
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest

from tests.unit.test_media import Broken, decode, floats, folder_bytes, names, pattern
from wan_jax import ffmpeg, labels, media

HELD = ["mp4", "png", "npz"]
DROPPED = ["gif", "webp"]
NASTY = {
    "quotes": "\"double\" 'single' `back` “curly”",
    "lines": "one\ntwo\r\nthree\rfour\n\n  five\n",
    "signs": "a=b;c#d\\e\\\\ ;comment #hash\n;FFMETADATA1\n[STREAM]\ntitle=x\\",
    "Chinese": "两只拟人化的猫咪身穿舒适的拳击装备，在聚光灯照亮的舞台上激烈对战。🐱🥊",
    "controls": "nul \0 bell \a tab \t escape \x1b delete \x7f line \u2028 next \x85",
    "ends": "\\",
    "spaces": "   ",
    "empty": "",
    "not UTF-8": "caf\udce9",  # as an argument of bytes that are not UTF-8 arrives
    "braces": '{"prompt": "\\u0041"}',
    "option": "-y %d {} $HOME",
    "long": "猫=;#\\\n\"' 犬" * 2_000,  # 20,000 characters
    "very long": "cat " * 50_000,  # longer than an argument may be
}


def about(prompt: str) -> dict:
    return {
        "prompt": prompt,
        "seed": 2**63 - 1,
        "guidance": 5.0,
        "seconds": {"denoise": 0.1 + 0.2},
        "peak_bytes": None,
        "size": [832, 480],
        "猫": True,
    }


def save(path: Path, prompt: str) -> None:
    media.save_video(floats(1), path, metadata=lambda: about(prompt))


@pytest.mark.parametrize("ending", HELD)
@pytest.mark.parametrize("name", list(NASTY))
def test_metadata_comes_back_exactly(tmp_path, ending, name):
    save(tmp_path / f"a.{ending}", NASTY[name])
    assert names(tmp_path) == [f"a.{ending}"]
    assert labels.read_metadata(tmp_path / f"a.{ending}") == about(NASTY[name])


def test_the_long_prompts_are_long():
    assert len(NASTY["long"]) == 20_000
    assert len(NASTY["very long"]) > 128 * 1024


@pytest.mark.parametrize("values", [{}, {"prompt": ["a", "b"]}, {"prompt": None}])
@pytest.mark.parametrize("ending", HELD)
def test_metadata_without_a_prompt_of_text(tmp_path, ending, values):
    media.save_video(floats(1), tmp_path / f"a.{ending}", metadata=lambda: values)
    assert labels.read_metadata(tmp_path / f"a.{ending}") == values


@pytest.mark.parametrize("ending", HELD)
def test_no_metadata_is_none(tmp_path, ending):
    media.save_video(floats(1), tmp_path / f"a.{ending}")
    assert labels.read_metadata(tmp_path / f"a.{ending}") is None


# Where it is called, and where it is dropped


@pytest.mark.parametrize("ending", [*HELD, *DROPPED, "folder"])
@pytest.mark.parametrize("streamed", [False, True])
def test_metadata_is_asked_for_once_between_the_last_frame_and_the_name(tmp_path, ending, streamed):
    path = tmp_path / ("a.png" if ending == "folder" else f"a.{ending}")
    video = floats(1 if ending == "png" else 3)
    log = []

    def decoder():
        for k in range(len(video)):
            log.append(f"frame {k}")
            yield video[k : k + 1]
        log.append("end")

    def metadata():
        log.append("metadata")
        assert all(name.startswith(".") for name in names(tmp_path))
        if ending in ("mp4", "gif", "webp"):  # whole already: ffmpeg has ended
            (partial,) = tmp_path.iterdir()
            assert partial.stat().st_size > 0
        return {"prompt": "cats"}

    media.save_video(decoder() if streamed else video, path, metadata=metadata)
    assert log == ([f"frame {k}" for k in range(len(video))] + ["end"]) * streamed + ["metadata"]
    assert names(tmp_path) == ["a" if ending == "folder" else path.name]


def test_endings_without_a_place_for_metadata_are_the_same_with_it(tmp_path):
    for name in ("a.gif", "a.webp", "a.png"):
        media.save_video(pattern(3, 16, 16), tmp_path / name)
        media.save_video(pattern(3, 16, 16), tmp_path / f"b{name}", metadata=dict)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "ba") != {}
    files = folder_bytes(tmp_path)
    assert files["a.gif"] == files["ba.gif"]
    assert files["a.webp"] == files["ba.webp"]


# The formats


def stream(path: Path, *form: str) -> bytes:
    """The video stream of a file, copied as it is."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", f"file:{path}", "-c", "copy"]
    return subprocess.run([*command, *form, "-"], capture_output=True, check=True).stdout


def test_the_stream_of_an_mp4_is_the_same_bytes_with_metadata(tmp_path):
    video = pattern(20, 64, 48)
    media.save_video(video, tmp_path / "without.mp4", fps=24)
    media.save_video(video, tmp_path / "with.mp4", fps=24, metadata=lambda: about(NASTY["long"]))
    without, tagged = tmp_path / "without.mp4", tmp_path / "with.mp4"
    assert without.read_bytes() != tagged.read_bytes()
    assert stream(without, "-f", "h264") == stream(tagged, "-f", "h264") != b""
    # And the moment at which each packet is decoded and shown.
    assert stream(without, "-f", "framemd5") == stream(tagged, "-f", "framemd5")
    meta, frames = decode(tagged)
    assert meta == decode(without)[0]
    np.testing.assert_array_equal(frames, decode(without)[1])


@pytest.mark.parametrize("name", list(NASTY))
def test_the_title_of_an_mp4_is_its_prompt_on_one_line(tmp_path, name):
    save(tmp_path / "a.mp4", NASTY[name])
    tags = ffmpeg.read_tags(tmp_path / "a.mp4")
    title = tags.get("title", "")
    words = NASTY[name].replace("\0", " ").replace("\udce9", "?").rstrip("\\").split()
    assert title.split() == words
    assert "\n" not in title and "\r" not in title
    assert json.loads(tags["comment"])["prompt"] == NASTY[name]
    assert not {"artist", "STREAM"} & set(tags)


def test_a_png_keeps_its_pixels_and_has_one_text(tmp_path):
    image = floats(1, 18, 15)
    media.save_video(image, tmp_path / "without.png")
    media.save_video(image, tmp_path / "with.png", metadata=lambda: about(NASTY["lines"]))
    np.testing.assert_array_equal(
        iio.imread(tmp_path / "with.png"), iio.imread(tmp_path / "without.png")
    )
    text = iio.immeta(tmp_path / "with.png", plugin="pillow")["wan_jax"]
    assert json.loads(text) == about(NASTY["lines"])
    assert "wan_jax" not in iio.immeta(tmp_path / "without.png", plugin="pillow")


def test_an_npz_holds_metadata_as_text_without_pickle(tmp_path):
    video = floats(3)
    media.save_video(
        iter([video]), tmp_path / "a.npz", latents=video, metadata=lambda: about(NASTY["Chinese"])
    )
    with np.load(tmp_path / "a.npz", allow_pickle=False) as saved:
        assert sorted(saved) == ["frames", "latents", "metadata"]
        assert saved["metadata"].shape == () and saved["metadata"].dtype.kind == "U"
        assert json.loads(str(saved["metadata"])) == about(NASTY["Chinese"])
        np.testing.assert_array_equal(saved["frames"], video)


# Errors


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            lambda: {"a": object()},
            "metadata: .*object is not JSON.*; accepted: a dict of",
        ),
        (lambda: {"a": float("nan")}, "metadata: .*; accepted: .*finite"),
        (lambda: {"a": np.float32(1)}, "metadata: .*float32"),
        (lambda: ["a"], r"metadata returned \['a'\]; accepted: a dict"),
        (lambda: None, "metadata returned None; accepted: a dict"),
    ],
)
@pytest.mark.parametrize("ending", [*HELD, *DROPPED, "folder"])
def test_metadata_that_json_cannot_hold(tmp_path, metadata, message, ending):
    path = tmp_path / ("a.png" if ending == "folder" else f"a.{ending}")
    with pytest.raises(ValueError, match=message):
        media.save_video(floats(2 if ending == "folder" else 1), path, metadata=metadata)
    assert names(tmp_path) == []


def test_metadata_is_a_function(tmp_path):
    def never():
        raise AssertionError("asked")
        yield

    with pytest.raises(ValueError, match="metadata is {}; accepted: a function that returns"):
        media.save_video(never(), tmp_path / "a.mp4", metadata={})


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("ending", [*HELD, *DROPPED, "folder"])
def test_a_failure_at_the_last_moment_leaves_nothing(tmp_path, ending, error):
    path = tmp_path / ("a.png" if ending == "folder" else f"a.{ending}")
    video = floats(2 if ending == "folder" else 1)

    def metadata():
        raise error("stopped")

    with pytest.raises(error, match="stopped"):
        media.save_video(video, path, metadata=metadata)
    assert names(tmp_path) == []
    media.save_video(video, path)
    before = folder_bytes(tmp_path), folder_bytes(tmp_path / "a")
    with pytest.raises(error, match="stopped"):
        media.save_video(-video, path, metadata=metadata)
    assert (folder_bytes(tmp_path), folder_bytes(tmp_path / "a")) == before
    assert len(names(tmp_path)) == 1


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_copy_leaves_nothing(tmp_path, monkeypatch, error, when):
    (tmp_path / "a.mp4").write_bytes(b"older")
    add = ffmpeg.add_tags
    seen = []

    def interrupted(source, target, *, tags):
        if when == "after":
            add(source, target, tags=tags)
        seen.append(target.exists())
        raise error("stopped")

    monkeypatch.setattr(ffmpeg, "add_tags", interrupted)
    with pytest.raises(error, match="stopped"):
        media.save_video(floats(1), tmp_path / "a.mp4", metadata=lambda: {"a": 1})
    assert seen == [when == "after"]
    assert names(tmp_path) == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"older"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_is_full_when_metadata_is_added(tmp_path):
    def metadata():
        (partial,) = tmp_path.iterdir()
        # The copy has the same name but for the kind.
        partial.with_name(partial.name.replace("partial", "tagged")).symlink_to("/dev/full")
        return {"a": 1}

    with pytest.raises(OSError, match=r"adding tags to the \.mp4 .*No space left on device"):
        media.save_video(floats(4), tmp_path / "a.mp4", metadata=metadata)
    assert names(tmp_path) == []


# read_metadata


def test_files_that_hold_no_metadata_are_refused(tmp_path):
    for name in ("a.gif", "a.webp", "a", "a.txt", "a.json"):
        with pytest.raises(ValueError, match=rf"{name}' holds no metadata; accepted: \.mp4, \.png"):
            labels.read_metadata(tmp_path / name)


@pytest.mark.parametrize("ending", HELD)
@pytest.mark.parametrize("kind", ["missing", "empty", "text", "cut", "folder"])
def test_files_that_cannot_be_read(tmp_path, ending, kind):
    path = tmp_path / f"a.{ending}"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        save(tmp_path / f"b.{ending}", "cats")
        whole = (tmp_path / f"b.{ending}").read_bytes()
        path.write_bytes({"empty": b"", "text": b"not a video", "cut": whole[:40]}[kind])
    with pytest.raises(ValueError, match=rf"a\.{ending}' cannot be read: .*; accepted: an \.mp4"):
        labels.read_metadata(path)


@pytest.mark.parametrize("comment", ["made by someone else", "[1, 2]", '"text"', "{", "7"])
def test_a_comment_of_someone_else_is_no_metadata(tmp_path, comment):
    media.save_video(floats(1), tmp_path / "b.mp4")
    ffmpeg.add_tags(tmp_path / "b.mp4", tmp_path / "a.mp4", tags={"comment": comment})
    assert ffmpeg.read_tags(tmp_path / "a.mp4")["comment"] == comment
    assert labels.read_metadata(tmp_path / "a.mp4") is None


def test_an_npz_is_not_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", metadata=np.array({"a": 1}, dtype=object))
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.namelist() == ["metadata.npy"]
    with pytest.raises(ValueError, match="cannot be read: .*allow_pickle"):
        labels.read_metadata(tmp_path / "a.npz")


# write_json


@pytest.mark.parametrize("name", list(NASTY))
def test_write_json_comes_back_exactly(tmp_path, name):
    labels.write_json(about(NASTY[name]), tmp_path / "a.json")
    assert names(tmp_path) == ["a.json"]
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == about(NASTY[name])
    assert text.startswith('{\n  "prompt": ') and text.endswith('"猫": true\n}\n')


def test_write_json_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    labels.write_json({"a": 1}, path)
    with pytest.raises(ValueError, match="not JSON serializable; accepted: a dict of what JSON"):
        labels.write_json({"a": object()}, path)

    def full(self, text, **kwargs):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        labels.write_json({"a": 2}, path)
    monkeypatch.undo()
    assert names(tmp_path) == ["a.json"]
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(OSError, match="missing"):
        labels.write_json({}, tmp_path / "missing" / "a.json")
