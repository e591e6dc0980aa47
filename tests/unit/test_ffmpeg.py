"""Running ffmpeg: finding it, what is said when it fails, and the tags it writes."""

import signal
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from tests.unit.test_media import Broken, breaks, floats, names, pattern
from wan_jax import ffmpeg, media


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
    with pytest.raises(ValueError, match="/bin/true has no libwebp_anim encoder"):
        media.check_output(tmp_path / "a.webp", 1)
    with pytest.raises(ValueError, match=r"a\.gif'.*/bin/true has no gif encoder.*accepted: \.npz"):
        media.save_video([floats()], tmp_path / "a.gif")


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


def test_an_ffmpeg_that_stops_reading(tmp_path, monkeypatch):
    """It says why, on more lines than are kept, and leaves; or lingers, and is not waited for."""
    script = tmp_path / "ffmpeg"
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
    monkeypatch.setattr(ffmpeg, "_EXIT_SECONDS", 1.0)
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


# Tags


def test_tags_of_one_line_come_back_and_others_are_gone(tmp_path):
    media.save_video(pattern(2, 16, 16), tmp_path / "a.mp4")
    given = {"comment": "a=b;c#d\\e \"'猫", "title": " spaces "}
    ffmpeg.add_tags(tmp_path / "a.mp4", tmp_path / "b.mp4", tags={"artist": "x", **given})
    ffmpeg.add_tags(tmp_path / "b.mp4", tmp_path / "c.mp4", tags=given)
    for name, artist in [("a.mp4", None), ("b.mp4", "x"), ("c.mp4", None)]:
        tags = ffmpeg.read_tags(tmp_path / name)
        assert tags.get("artist") == artist
        if name != "a.mp4":
            assert {key: tags[key] for key in given} == given


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\0b", "a\\"])
def test_tags_that_ffmpeg_would_mangle_are_refused(tmp_path, value):
    media.save_video(pattern(1, 16, 16), tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="tag comment=.*; accepted: one line"):
        ffmpeg.add_tags(tmp_path / "a.mp4", tmp_path / "b.mp4", tags={"comment": value})
    assert names(tmp_path) == ["a.mp4"]


def test_tags_of_a_file_that_is_no_video(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"text")
    with pytest.raises(OSError, match=r"ffmpeg failed while reading .*a\.mp4 .*Invalid data"):
        ffmpeg.read_tags(tmp_path / "a.mp4")
    with pytest.raises(OSError, match=r"ffmpeg failed while adding tags to .*Invalid data"):
        ffmpeg.add_tags(tmp_path / "a.mp4", tmp_path / "b.mp4", tags={})


def test_names_that_mean_something_to_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-y.gif", "file:a%03d.webp", "pipe:1.gif", "a b'ü猫.WEBP"):
        media.save_video(pattern(2, 16, 16), name)
        assert names(tmp_path) == [name]
        Path(name).unlink()
    media.save_video(pattern(2, 16, 16), "pipe:1%d.mp4", metadata=lambda: {"a": 1})
    assert names(tmp_path) == ["pipe:1%d.mp4"]
    assert "comment" in ffmpeg.read_tags(Path("pipe:1%d.mp4"))
