"""Files and folders of frames appear whole or not at all, and nothing else is ever removed."""

import os
from pathlib import Path

import pytest

from wan_jax import files


def write_frames(folder: Path, *texts: str) -> None:
    folder.mkdir()
    for k, text in enumerate(texts):
        (folder / files.frame_name(k)).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    """Every file under a folder, by its relative name; folders end in a slash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found.update({f"{name}/": ""} if path.is_dir() else {name: path.read_text()})
    return found


def stop_half_way(path: Path) -> None:
    with files.whole_or_nothing(path) as partial:
        partial.write_text("newest")
        raise KeyboardInterrupt


def test_frame_names_sort_as_they_count():
    assert [files.frame_name(k) for k in (0, 9, 99_999)] == ["00000.png", "00009.png", "99999.png"]
    assert files.frame_name(100_000) == "100000.png"


def test_hidden_names_keep_folder_and_ending(tmp_path):
    pid = os.getpid()
    assert files.hidden(tmp_path / "a b.mp4", "kind") == tmp_path / f".a b.kind-{pid}.mp4"
    assert files.hidden(tmp_path / "a", "kind") == tmp_path / f".a.kind-{pid}"


@pytest.mark.parametrize("older", [False, True])
def test_a_file_appears_when_it_is_whole(tmp_path, older):
    path = tmp_path / "a.txt"
    if older:
        path.write_text("older")
    with files.whole_or_nothing(path) as partial:
        partial.write_text("newer")
        assert path.exists() == older
    assert contents(tmp_path) == {"a.txt": "newer"}
    with pytest.raises(KeyboardInterrupt):
        stop_half_way(path)
    assert contents(tmp_path) == {"a.txt": "newer"}


def test_a_folder_replaces_an_older_one(tmp_path):
    write_frames(tmp_path / "a", "old 0", "old 1")
    with files.whole_or_nothing(tmp_path / "a") as partial:
        write_frames(partial, "new 0")
        assert len(list((tmp_path / "a").iterdir())) == 2
    assert contents(tmp_path) == {"a/": "", "a/00000.png": "new 0"}


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("before", [False, True])
def test_an_interrupted_rename_leaves_one_whole_folder(tmp_path, monkeypatch, older, call, before):
    """A signal just before or after either of the two renames: the older or the newer is there."""
    if older:
        write_frames(tmp_path / "a", "old")
    calls = 0
    rename = os.rename

    def interrupted(source, target):
        nonlocal calls
        calls += 1
        if calls - 1 == call and before:
            raise KeyboardInterrupt
        rename(source, target)
        if calls - 1 == call:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    if call == 1 and not older:  # there is but one rename
        with files.whole_or_nothing(tmp_path / "a") as partial:
            write_frames(partial, "new")
    else:
        with pytest.raises(KeyboardInterrupt), files.whole_or_nothing(tmp_path / "a") as partial:
            write_frames(partial, "new")
    moved = (not before and (call == 1 or not older)) or (call == 1 and not older)
    expected = {"a/": "", "a/00000.png": "new" if moved else "old"} if moved or older else {}
    assert contents(tmp_path) == expected


def test_remove_takes_frames_only(tmp_path):
    files.remove(tmp_path / "missing")
    write_frames(tmp_path / "a", "x", "y")
    files.remove(tmp_path / "a")
    assert contents(tmp_path) == {}
    write_frames(tmp_path / "b", "x")
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="not empty"):
        files.remove(tmp_path / "b")
    assert contents(tmp_path) == {"b/": "", "b/notes.txt": "mine"}


def test_in_the_way(tmp_path):
    folder = tmp_path / "a"
    assert files.in_the_way(folder) == ""
    write_frames(folder, "x", "y")
    assert files.in_the_way(folder) == ""
    for name in ("z", "0000.png", "00000.PNG", "x00000.png"):
        (folder / name).touch()
    assert files.in_the_way(folder) == "0000.png, 00000.PNG, x00000.png"  # the first three
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert files.in_the_way(tmp_path / "dangling") == "not a folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may change anything")
def test_a_folder_that_may_not_be_changed_is_in_the_way(tmp_path):
    write_frames(tmp_path / "a", "x")
    (tmp_path / "a").chmod(0o500)
    assert files.in_the_way(tmp_path / "a") == "a folder that you may not change"
    (tmp_path / "a").chmod(0o700)
