"""From folders of PyTorch files to our checkpoints: rules, conversion, and what goes wrong."""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import tensorstore
from safetensors.numpy import load_file, save_file

import wan_jax
from tests.random_weights import random_array
from tests.unit.conftest import TINY, TINY_FLF2V, TINY_I2V
from wan_jax import loading
from wan_jax.config import (
    NANO_FLF2V,
    NANO_I2V,
    NANO_T2V,
    PARTS,
    RELEASED,
    Defaults,
    DiTConfig,
    WanConfig,
)
from wan_jax.pipeline import Progress
from wan_jax.weights import checkpoint, clip, dit, rules, trees, umt5, vae
from wan_jax.weights.rules import MismatchError, Rule, Table
from wan_jax.weights.sources import DEFAULTS_FILE, abstract_part, open_folder, part_table

FILES = {
    "dit": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "umt5": "text_encoder/model.safetensors",
}
IMAGE_FILES = FILES | {"clip": "image_encoder/model.safetensors"}
CONFIGS = (TINY, TINY_I2V, TINY_FLF2V, NANO_T2V, NANO_I2V, NANO_FLF2V, *RELEASED.values())
Tensors = dict[str, np.ndarray]


@pytest.fixture
def source(tiny_source: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_source, tmp_path / "source"))


@pytest.fixture
def image_source(tiny_flf2v_source: Path, tmp_path: Path) -> Path:
    """As source, of one that takes two images."""
    return Path(shutil.copytree(tiny_flf2v_source, tmp_path / "image_source"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def _load(source: Path, cache: Path, **arguments: Any) -> wan_jax.Wan:
    """Converted, but nothing put on the device."""
    return wan_jax.load(source, cache_dir=cache, **({"offload": True} | arguments))


def _edit(file: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def _assert_same(wan: wan_jax.Wan, other: wan_jax.Wan) -> None:
    assert wan.loaders.keys() == other.loaders.keys() == set(wan.config.dit.parts)
    for part in wan.loaders:
        leaves, wanted = (trees.flatten(w.loaders[part]()) for w in (wan, other))
        assert leaves.keys() == wanted.keys()
        for path, leaf in leaves.items():
            assert leaf.dtype == wanted[path].dtype
            np.testing.assert_array_equal(leaf, wanted[path], err_msg=path)


# Rules.

LAYOUTS = {
    f"{name}: {rule.target}": rule
    for name, table in {
        "dit": dit.table(TINY_FLF2V.dit),
        "vae": vae.table(TINY.vae),
        "umt5": umt5.table(TINY.umt5),
        "clip": clip.table(TINY_FLF2V.clip),
    }.items()
    for rule in {(rule.layout, rule.stacked): rule for rule in table.rules}.values()
}


def _targets() -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    return {
        part: trees.flatten(abstract_part(getattr(TINY_FLF2V, part), jnp.dtype("float32")))
        for part in PARTS
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_invertible(name: str) -> None:
    """Every layout of every table, on a target of the shape it is used for."""
    rule = LAYOUTS[name]
    leaf = _targets()[name.split(":")[0]][rule.target]
    target = random_array(name, leaf.shape[1:] if rule.stacked else leaf.shape)
    source = rule.layout.invert(target)
    assert source.shape == rule.layout.source_shape(target.shape)
    np.testing.assert_array_equal(rule.layout.apply(source), target)
    np.testing.assert_array_equal(rule.layout.invert(rule.layout.apply(source)), source)


def test_layouts_move_the_axes_that_they_name() -> None:
    x = np.arange(2 * 3 * 4 * 5 * 6).reshape(2, 3, 4, 5, 6)
    assert rules.CONV3D.apply(x)[1, 2, 3, 4, 0] == x[1, 0, 2, 3, 4]
    assert rules.CONV2D.apply(x[0])[2, 1, 3, 0] == x[0][2, 0, 1, 3]
    assert rules.LINEAR.apply(x[0, 0, 0])[5, 4] == x[0, 0, 0][4, 5]
    np.testing.assert_array_equal(rules.SAME.apply(x), x)


@pytest.mark.parametrize("naming", rules.NAMINGS)
@pytest.mark.parametrize("part", PARTS)
def test_export_and_apply_are_inverse(part: str, naming: str) -> None:
    targets = _targets()[part]
    arrays = {path: random_array(path, leaf.shape) for path, leaf in targets.items()}
    table = part_table(getattr(TINY_FLF2V, part))
    tensors = dict(rules.export(table, arrays, naming=naming))
    plan = rules.resolve(table, targets, naming=naming, names=list(tensors))
    read: list[int] = []
    back = dict(rules.apply(plan, _Reader(tensors), progress=read.append))
    assert back.keys() == arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(back[path], array)
    assert sum(read) == sum(tensor.nbytes for tensor in tensors.values())


class _Reader:
    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def shapes(self) -> dict[str, tuple[rules.Shape, str]]:
        return {name: (array.shape, array.dtype.name) for name, array in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name]


A, B = Rule("a", "wan.a", "a.weight"), Rule("b", "wan.b", "b.weight")
STACK = Rule("s", "wan.{i}.s", "s.{i}.weight")
LISTS = (
    "source tensors unused",
    "source tensors absent",
    "source tensors used twice",
    "targets unfilled",
    "targets unknown",
    "targets assigned twice",
)


def _resolve(table: Table, targets: str, names: list[str]) -> list[rules.Assignment]:
    shapes = {name: jax.ShapeDtypeStruct((2, 3), jnp.float32) for name in targets}
    return rules.resolve(table, shapes, naming="diffusers", names=names, what="the file")


@pytest.mark.parametrize(
    ("table", "targets", "names", "found"),
    [
        ((A,), "a", ["a.weight", "x"], {LISTS[0]: "x"}),
        ((A, STACK), "as", ["a.weight", "s.0.weight"], {LISTS[1]: "s.1.weight"}),
        ((STACK,), "s", [f"s.{i}.weight" for i in range(3)], {LISTS[0]: "s.2.weight"}),
        ((A, Rule("b", "w", "a.weight")), "ab", ["a.weight"], {LISTS[2]: "a.weight"}),
        ((A,), "ab", ["a.weight"], {LISTS[3]: "b"}),
        ((A, B), "a", ["a.weight"], {LISTS[4]: "b"}),
        ((A, Rule("a", "w", "c")), "a", ["a.weight", "c"], {LISTS[5]: "a"}),
        ((A,), "a", ["renamed"], {LISTS[0]: "renamed", LISTS[1]: "a.weight"}),
    ],
)
def test_each_list_of_the_report(
    table: tuple[Rule, ...], targets: str, names: list[str], found: dict[str, str]
) -> None:
    with pytest.raises(MismatchError) as error:
        _resolve(Table(table), targets, names)
    title, *lines = str(error.value).splitlines()
    assert title == "the file does not fit:"
    assert lines == [f"  {name}: {found.get(name, '-')}" for name in LISTS]


def test_aliases_and_ignored_names() -> None:
    table = Table((A, B), aliases={"tied": "a.weight"}, ignored={r"stray\.\d+": "read by nothing"})
    for names in (["a.weight"], ["tied"], ["a.weight", "tied"], ["a.weight", "stray.10"]):
        plan = _resolve(table, "ab", [*names, "b.weight"])
        assert [item.sources for item in plan] == [(names[0],), ("b.weight",)]
    with pytest.raises(MismatchError, match=r"unused: stray\.x\n"):
        _resolve(table, "ab", ["a.weight", "b.weight", "stray.x"])


def test_a_long_list_is_cut_and_counted() -> None:
    with pytest.raises(MismatchError, match=r"unused: x00, x01, .*x07, \.\.\. 20 in all\n"):
        _resolve(Table((A,)), "a", ["a.weight", *(f"x{i:02}" for i in range(20))])


# Conversion.


def test_conversion_happens_once(source: Path, cache: Path) -> None:
    said: list[str] = []
    told: list[Progress] = []
    first = _load(source, cache, notify=said.append, callback=told.append)
    assert len(said) == 1
    assert said[0].startswith(f"converting {source} once into {cache}")
    assert {progress.stage for progress in told} == {"convert"}
    (folder,) = cache.iterdir()
    stamps = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    said.clear()
    told.clear()
    second = _load(source, cache, notify=said.append, callback=told.append)
    assert not said
    assert not told
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == stamps
    assert second.config == _load(folder, cache).config  # the folder itself can be loaded
    _assert_same(first, second)
    assert list(cache.iterdir()) == [folder]
    assert loading.read_config(folder) == loading.read_config(source) == first.config == TINY


def test_bytes_are_reported_up_to_the_end(source: Path, cache: Path) -> None:
    told: list[tuple[int, int]] = []
    _load(source, cache, callback=lambda progress: told.append((progress.done, progress.total)))
    assert told[0] == (0, 1)
    total = sum((source / file).stat().st_size for file in FILES.values())
    assert {of for _, of in told[1:]} == {total}
    assert told[-1] == (total, total)
    assert told[1:] == sorted(told[1:])


def test_another_source_is_converted_anew(source: Path, cache: Path) -> None:
    _load(source, cache)
    _edit(source / FILES["vae"], lambda tensors: tensors["quant_conv.bias"].__iadd__(1.0))
    changed = _load(source, cache)
    assert trees.flatten(changed.network("vae"))["quant.bias"].min() == 1.0
    defaults = dataclasses.replace(TINY.defaults, steps=9)
    (source / DEFAULTS_FILE).write_text(json.dumps(defaults.to_dict()))
    assert _load(source, cache).config.defaults == defaults
    assert len(list(cache.iterdir())) == 3


def test_another_tokenizer_is_converted_anew(source: Path, cache: Path) -> None:
    _load(source, cache)
    file = source / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": 300, "content": "fox"})
    tokenizer["model"]["vocab"] += [[f"<{i}>", 0.0] for i in range(259, 300)] + [["fox", 0.0]]
    file.write_text(json.dumps(tokenizer))
    assert _load(source, cache).tokenizer.token_to_id("fox") == 300


def test_another_process_may_finish_first(source: Path, cache: Path, tmp_path: Path) -> None:
    _load(source, tmp_path / "theirs")
    (theirs,) = (tmp_path / "theirs").iterdir()

    def overtake(progress: Progress) -> None:
        if progress.done and not (cache / theirs.name).exists():
            shutil.copytree(theirs, cache / theirs.name)

    assert _load(source, cache, callback=overtake).config == TINY
    assert [path.name for path in cache.iterdir()] == [theirs.name]


def test_an_interrupted_conversion_leaves_nothing(source: Path, cache: Path) -> None:
    class StopError(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.done > progress.total / 2:
            assert any(cache.iterdir())  # something had been written
            raise StopError

    with pytest.raises(StopError):
        _load(source, cache, callback=stop)
    assert not list(cache.iterdir())
    assert _load(source, cache).config == TINY
    assert len(list(cache.iterdir())) == 1


def test_the_source_is_only_read(source: Path, cache: Path) -> None:
    files = sorted(source.rglob("*"))
    stamps = [file.stat().st_mtime_ns for file in files]
    for path in (source, *files):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        wan = _load(source, cache)
        assert wan.config == TINY
        assert sorted(source.rglob("*")) == files
        assert [file.stat().st_mtime_ns for file in files] == stamps
    finally:
        for path in (source, *files, *cache.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_links_are_followed(source: Path, cache: Path, tmp_path: Path) -> None:
    """The hub's cache holds links to files of other names."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, file in enumerate(f for f in source.rglob("*") if f.is_file()):
        file.rename(blobs / str(i))
        file.symlink_to(blobs / str(i))
    wan = _load(source, cache)
    (folder,) = cache.iterdir()
    assert not any(file.is_symlink() for file in folder.rglob("*"))
    shutil.rmtree(blobs)
    assert set(_targets()["vae"]) == set(trees.flatten(wan.network("vae")))


def test_small_groups_give_the_same_checkpoint(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _load(source, cache)
    monkeypatch.setattr(checkpoint, "_GROUP_BYTES", 2**15)
    _assert_same(_load(source, tmp_path / "other"), whole)


def _split(file: Path, *, shards: int = 3) -> Path:
    """Replace a file by shards and their index, which is returned."""
    tensors = load_file(file)
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        shard = file.with_name(f"{file.stem}-{i + 1:05}-of-{shards:05}.safetensors")
        save_file({name: tensors[name] for name in names[i::shards]}, shard)
        weight_map |= dict.fromkeys(names[i::shards], shard.name)
    file.unlink()
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards_give_the_same_checkpoint(source: Path, cache: Path) -> None:
    whole = _load(source, cache)
    for file in FILES.values():
        _split(source / file)
    sharded = _load(source, cache)
    assert len(list(cache.iterdir())) == 2
    _assert_same(sharded, whole)


def test_bfloat16_files_are_read_exactly(source: Path, cache: Path) -> None:
    """Diffusers' folders of the 14B are stored so."""
    narrow = {}
    for part, file in FILES.items():
        arrays = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(source / file).items()}
        save_file(arrays, source / file)
        narrow[part] = arrays
    wan = _load(source, cache, dtype="float32")
    for part in FILES:
        leaves = trees.flatten(wan.network(part))
        table = part_table(getattr(TINY, part))
        arrays = {path: np.asarray(leaf) for path, leaf in leaves.items()}
        for name, array in rules.export(table, arrays, naming="diffusers"):
            np.testing.assert_array_equal(array, narrow[part][name].astype(np.float32))


def _stored(folder: Path, part: str) -> dict[str, str]:
    leaves = ocp.metadata(folder / part).metadata
    return {path: jnp.dtype(leaf.dtype).name for path, leaf in leaves.items()}


def test_dtypes_of_what_is_stored(source: Path, cache: Path) -> None:
    """bfloat16 products and float32 islands, or float32 everywhere."""
    _load(source, cache, dtype="float32")
    (full,) = cache.iterdir()
    for part in FILES:
        assert set(_stored(full, part).values()) == {"float32"}
    _load(source, cache)
    (half,) = set(cache.iterdir()) - {full}
    assert set(_stored(half, "vae").values()) == {"float32"}
    assert set(_stored(half, "umt5").values()) == {"bfloat16"}
    island = re.compile(r"time_.*|head_.*|.*modulation|.*norm.*")
    for path, dtype in _stored(half, "dit").items():
        assert dtype == ("float32" if island.fullmatch(path) else "bfloat16"), path
    manifest = json.loads((half / checkpoint.MANIFEST).read_text())
    assert manifest["dtype"] == "bfloat16"
    assert manifest["parts"]["dit"]["tensors"] == len(load_file(source / FILES["dit"]))


# Images.


@pytest.mark.parametrize("config", [TINY_I2V, TINY_FLF2V], ids=["i2v", "flf2v"])
def test_a_checkpoint_that_takes_images(
    config: WanConfig, tiny_i2v_source: Path, tiny_flf2v_source: Path, cache: Path
) -> None:
    """Converted once, with the tower in float16, and the same when it is read again."""
    source = tiny_i2v_source if config == TINY_I2V else tiny_flf2v_source
    told: list[Progress] = []
    wan = wan_jax.load(source, cache_dir=cache, callback=told.append)
    assert wan.config == config == loading.read_config(source)
    assert tuple(wan.loaders) == PARTS
    assert [p[:3] for p in told if p.stage == "load"] == [("load", n, 4) for n in range(5)]
    (folder,) = cache.iterdir()
    assert loading.known_digest(source, dtype="bfloat16", cache_dir=cache) == wan.digest != ""
    assert loading.read_config(folder) == config
    assert set(json.loads((folder / checkpoint.CONFIG).read_text())) == {*PARTS, "defaults"}
    kinds = _stored(folder, "clip")
    assert {k for name, k in kinds.items() if "norm" in name} == {"float32"}
    assert {k for name, k in kinds.items() if "norm" not in name} == {"float16"}
    _assert_same(wan, _load(folder, cache))
    full = _load(source, cache, dtype="float32")
    for name, leaf in trees.flatten(full.network("clip")).items():
        assert leaf.dtype == jnp.float32, name


def test_parts_of_a_checkpoint_that_takes_images(image_source: Path, tmp_path: Path) -> None:
    """Whole when all that its DiT needs is there, in whatever order it came."""
    path = tmp_path / "out"
    checkpoint.write(open_folder(image_source, ("clip", "vae")), path, dtype="bfloat16")
    missing = r"out has no dit, umt5; add with .* --parts dit,umt5 --dtype bfloat16`$"
    with pytest.raises(ValueError, match=missing):
        checkpoint.check_whole(path, "bfloat16")
    checkpoint.add(open_folder(image_source, ("umt5", "dit")), path, remedy="")
    checkpoint.check_whole(path, "bfloat16")
    assert checkpoint.read_config(path) == TINY_FLF2V
    other = tmp_path / "other"
    checkpoint.write(open_folder(image_source, ("dit", "vae", "umt5")), other, dtype="bfloat16")
    with pytest.raises(ValueError, match="other has no clip; add with .* --parts clip "):
        checkpoint.check_whole(other, "bfloat16")
    checkpoint.add(open_folder(image_source, ("clip",)), other, remedy="")
    digests = [checkpoint.read_manifest(p)["digest"] for p in (path, other)]
    assert digests[0] == digests[1]
    shutil.rmtree(other / "clip")
    with pytest.raises(ValueError, match="other has lost its folder clip; convert it again"):
        checkpoint.check_whole(other, "bfloat16")


def test_parts_that_do_not_belong_to_the_dit(
    source: Path, image_source: Path, tmp_path: Path
) -> None:
    path = tmp_path / "text"
    checkpoint.write(open_folder(source), path, dtype="bfloat16")
    with pytest.raises(ValueError, match="does not fit .*text: a checkpoint has a CLIP tower if"):
        checkpoint.add(open_folder(image_source, ("clip",)), path, remedy="")
    narrow = image_source / "image_encoder" / "config.json"
    values = json.loads(narrow.read_text())
    narrow.write_text(json.dumps(values | {"hidden_size": 32}))
    _fails(image_source, tmp_path / "cache", "image tokens of width 16, CLIP writes 32")


def test_a_checkpoint_from_before_there_were_images(source: Path, cache: Path) -> None:
    """Its config.json has no word of them, and the format is the same."""
    _load(source, cache)
    (folder,) = cache.iterdir()
    file = folder / checkpoint.CONFIG
    values = json.loads(file.read_text())
    assert "clip" not in values
    for name in ("image_dim", "image_positions"):
        del values["dit"][name]
    del values["defaults"]["shift_480p"]
    file.write_text(json.dumps(values))
    assert checkpoint.FORMAT == 3
    wan = _load(folder, cache)
    assert wan.config == TINY
    assert tuple(wan.loaders) == ("dit", "vae", "umt5")


@pytest.mark.parametrize("name", ["nano-t2v", "nano-i2v", "nano-flf2v"])
def test_small_random_networks_have_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = {"nano-t2v": NANO_T2V, "nano-i2v": NANO_I2V, "nano-flf2v": NANO_FLF2V}[name]
    cache = tmp_path / "cache"
    assert loading.fetch(name) == name
    assert loading.built_in(name) == loading.read_config(name) == wanted
    assert loading.known_digest(name, dtype="bfloat16", cache_dir=cache) is None
    said: list[str] = []
    wan = wan_jax.load(name, cache_dir=cache, offload=True, notify=said.append)
    assert wan.config == wanted
    assert said[0].startswith("running a small network of random weights, which shows")
    assert loading.known_digest(name, dtype="bfloat16", cache_dir=cache) == wan.digest


def test_a_folder_of_the_name_of_a_small_network(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    source.rename("nano-i2v")
    assert loading.built_in("nano-i2v") is None
    assert loading.fetch("nano-i2v") == source.parent / "nano-i2v"
    assert wan_jax.load("nano-i2v", cache_dir=cache, offload=True).config == TINY
    assert loading.built_in(source.parent / "nano-t2v") is None
    with pytest.raises(ValueError, match="nano-x2v does not exist; needed is a checkpoint's"):
        wan_jax.load("nano-x2v", cache_dir=cache)


# What is wrong with a folder.


def _fails(source: Path, cache: Path, *messages: str) -> str:
    """load() raises a ValueError with these words and leaves nothing behind."""
    with pytest.raises(ValueError) as error:
        _load(source, cache)
    for message in messages:
        assert message in str(error.value)
    assert not cache.exists() or not list(cache.iterdir())
    return str(error.value)


@pytest.mark.parametrize("file", FILES.values())
@pytest.mark.parametrize("size", [0, 4, 300, -1])
def test_truncated_files_are_named(source: Path, cache: Path, file: str, size: int) -> None:
    path = source / file
    data = path.read_bytes()
    path.write_bytes(data[:size])
    _fails(source, cache, str(path), "is truncated or not a safetensors file")


def test_shards_that_are_missing_or_strange(source: Path, cache: Path) -> None:
    index = _split(source / FILES["dit"])
    text = index.read_text()
    shard = index.parent / "diffusion_pytorch_model-00002-of-00003.safetensors"
    hidden = shard.rename(shard.with_suffix(".hidden"))
    _fails(source, cache, str(shard), "is missing; the checkpoint's index names it")
    hidden.rename(shard)
    values = json.loads(text)
    values["weight_map"]["nowhere"] = shard.name
    index.write_text(json.dumps(values))
    _fails(source, cache, str(index), "disagree about 1 tensors: ['nowhere']")
    for broken in ("{", "[]", "{}", '{"weight_map": [1]}'):
        index.write_text(broken)
        _fails(source, cache, str(index), "is not an index of safetensors shards")
    index.unlink()
    _fails(source, cache, str(index.parent), "found 3 without an index")
    index.write_text(text)
    (index.parent / "other.safetensors.index.json").write_text(text)
    _fails(source, cache, str(index.parent), "has 2 index files")


def _rename(tensors: Tensors, name: str) -> None:
    tensors[f"{name}_renamed"] = tensors.pop(name)


def test_tensors_that_do_not_fit(source: Path, cache: Path) -> None:
    file = source / FILES["dit"]
    data = file.read_bytes()
    name = "blocks.1.attn1.to_q.weight"
    lists = ("unused: {}\n", "absent: {}\n", "twice: -\n", "unfilled: -\n", "unknown: -\n")

    def mismatch(unused: str, absent: str) -> None:
        message = _fails(source, cache, "(dit, diffusers names) does not fit:", str(file.parent))
        found = iter((unused, absent))
        for line in lists:
            assert line.format(next(found, "")) in message
        file.write_bytes(data)

    _edit(file, lambda tensors: tensors.pop(name))
    mismatch("-", name)
    _edit(file, lambda tensors: tensors.update(extra=np.zeros(3, np.float32)))
    mismatch("extra", "-")
    _edit(file, lambda tensors: _rename(tensors, name))
    mismatch(f"{name}_renamed", name)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_checked(image_source: Path, cache: Path, part: str) -> None:
    file = image_source / IMAGE_FILES[part]
    _edit(file, lambda tensors: tensors.update(extra=np.zeros(3, np.float32)))
    with pytest.raises(MismatchError, match="unused: extra\n"):
        _load(image_source, cache)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 16), np.float32), "has shape [3, 16], needed [32, 16]"),
        (np.zeros((16, 32), np.float32), "has shape [16, 32], needed [32, 16]"),
        (np.zeros((32, 16), np.int32), "is stored as i32, needed float32, float16 or bfloat16"),
        (np.zeros((32, 16), np.uint8), "is stored as u8"),
        (np.zeros((32, 16), ml_dtypes.float8_e4m3fn), "is stored as float8_e4m3fn"),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit(
    source: Path, cache: Path, array: np.ndarray, message: str
) -> None:
    name = "condition_embedder.text_embedder.linear_1.weight"
    _edit(source / FILES["dit"], lambda tensors: tensors.update({name: array}))
    _fails(source, cache, f"does not fit: {name} {message}")


def test_a_depth_that_is_not_the_files(source: Path, cache: Path) -> None:
    config = source / "transformer" / "config.json"
    values = json.loads(config.read_text())
    for layers, title in ((1, "unused"), (3, "absent")):
        config.write_text(json.dumps(values | {"num_layers": layers}))
        block = f"source tensors {title}: blocks.{min(layers, 2)}."
        _fails(source, cache, block, "... 27 in all")


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder"])
def test_configs_that_are_missing_or_broken(source: Path, cache: Path, name: str) -> None:
    file = source / name / "config.json"
    values = json.loads(file.read_text())
    size = {"transformer": "ffn_dim", "vae": "base_dim", "text_encoder": "d_model"}[name]
    for text, message in (
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[1]", "holds a list; an object is needed"),
        (json.dumps(values | {size: -1}), "a positive integer is needed"),
        (json.dumps(values | {size: "wide"}), "a positive integer is needed"),
    ):
        file.write_text(text)
        _fails(source, cache, str(file), message)
    del values[size]
    file.write_text(json.dumps(values))
    # Diffusers leaves out what has the released VAE's value, so there the tensors disagree.
    _fails(source, cache, str(file.parent), "does not fit" if name == "vae" else size)
    file.unlink()
    _fails(source, cache, str(file), "is missing")


def test_networks_that_do_not_belong_together(source: Path, cache: Path) -> None:
    config = source / "transformer" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"text_dim": 24}))
    _fails(source, cache, "the DiT reads text of width 24, UMT5 writes 16")
    config.write_text(json.dumps(values | {"image_dim": 1280}))
    _fails(source, cache, str(config), "added_kv_proj_dim = None; 32 is needed")


def test_folders_that_are_missing(source: Path, cache: Path, tmp_path: Path) -> None:
    for name, message in (
        ("transformer", "has neither transformer/*.safetensors"),
        ("vae", "has neither vae/ with safetensors"),
        ("text_encoder", "has neither text_encoder/ with safetensors"),
        ("tokenizer", "has no tokenizer/"),
    ):
        (source / name).rename(tmp_path / "hidden")
        _fails(source, cache, str(source), message)
        (tmp_path / "hidden").rename(source / name)
    _fails(tmp_path / "nowhere", cache, "nowhere does not exist; needed is a checkpoint's folder")


def test_a_tokenizer_without_its_file(source: Path, cache: Path) -> None:
    file = source / "tokenizer" / "tokenizer.json"
    hidden = file.rename(file.with_suffix(".hidden"))
    _fails(source, cache, str(file.parent), "has no tokenizer.json")
    hidden.rename(file)
    assert _load(source, cache).config == TINY


def test_checkpoints_that_are_damaged(source: Path, cache: Path) -> None:
    _load(source, cache)
    (folder,) = cache.iterdir()
    damaged = _load(folder, cache)
    (folder / "vae" / "state").rename(folder / "hidden")
    with pytest.raises(ValueError, match=re.escape(f"{folder / 'vae'} is not a whole Orbax")):
        damaged.network("vae")
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match=re.escape(f"{folder} has lost its folder vae; convert")):
        _load(folder, cache)
    (folder / "vae").mkdir()
    manifest = (folder / checkpoint.MANIFEST).rename(folder / "hidden.json")
    with pytest.raises(ValueError, match="is a converted checkpoint without manifest.json"):
        _load(folder, cache)
    manifest.rename(folder / checkpoint.MANIFEST)
    config = folder / checkpoint.CONFIG
    values = json.loads(config.read_text())
    for text in ("{", "5", json.dumps(values | {"dit": {}}), json.dumps(values | {"clip": {}})):
        config.write_text(text)
        with pytest.raises(ValueError, match=re.escape(f"{config} is not a wan_jax config")):
            _load(folder, cache)


# Configurations.


@pytest.mark.parametrize("config", CONFIGS)
def test_json_round_trip(config: WanConfig) -> None:
    text = config.to_json()
    assert WanConfig.from_json(text) == config
    assert WanConfig.from_json(text).to_json() == text
    assert Defaults.from_dict(config.defaults.to_dict()) == config.defaults


@pytest.mark.parametrize("config", CONFIGS)
def test_diffusers_configs_round_trip(config: WanConfig) -> None:
    assert dit.config_from_diffusers(dit.config_to_diffusers(config.dit)) == config.dit
    assert vae.config_from_diffusers(vae.config_to_diffusers(config.vae)) == config.vae
    assert umt5.config_from_diffusers(umt5.config_to_diffusers(config.umt5)) == config.umt5
    if config.clip is not None:
        assert clip.config_from_diffusers(clip.config_to_diffusers(config.clip)) == config.clip


def test_unknown_fields_are_named() -> None:
    values = json.loads(TINY.to_json())
    with pytest.raises(ValueError, match=r"unknown sections \['lora'\]; known: \['dit', 'vae'"):
        WanConfig.from_json(json.dumps(values | {"lora": {}}))
    values["dit"]["depth"] = 2
    with pytest.raises(ValueError, match=r"DiTConfig has no field \['depth'\]; its fields: \["):
        WanConfig.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "DiTConfig.dim is 0; a positive integer is needed"),
        ({"num_layers": True}, "DiTConfig.num_layers is True"),
        ({"ffn_dim": 1.5}, "DiTConfig.ffn_dim is 1.5"),
        ({"num_heads": 3}, "DiTConfig.dim 32 must be an even multiple of num_heads 3"),
        ({"num_heads": 32}, "DiTConfig.dim 32 must be an even multiple of num_heads 32"),
        ({"freq_dim": 33}, "DiTConfig.freq_dim 33 must be even"),
        ({"patch_size": (1, 2)}, "DiTConfig.patch_size is (1, 2)"),
    ],
)
def test_dimensions_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DiTConfig(**(TINY.dit.to_dict() | change))


def test_parts_that_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match="the DiT predicts 8 channels, the VAE has 16"):
        dataclasses.replace(TINY, dit=dataclasses.replace(TINY.dit, out_channels=8))
    with pytest.raises(ValueError, match="VAEConfig.latents_std needs 16 finite numbers"):
        dataclasses.replace(TINY.vae, latents_std=(1.0,) * 15)


def test_large_arrays_are_stored_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which a host that needs a share reads some, see sharding.weight_spec()."""
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", 1024)
    arrays = {"a": np.arange(8 * 16 * 32, dtype=np.float32).reshape(8, 16, 32)}
    checkpoint.save_arrays(tmp_path / "x", iter(arrays.items()))
    base = {"driver": "ocdbt", "base": f"file://{tmp_path}/x/state/", "path": "a/"}
    stored = tensorstore.open({"driver": "zarr3", "kvstore": base}, open=True).result()
    assert 4 * math.prod(stored.chunk_layout.read_chunk.shape) <= 1024
    np.testing.assert_array_equal(stored.read().result(), arrays["a"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_converted_arrays_are_handed_over_without_a_copy(dtype: str) -> None:
    for shape in ((3, 5), (), (1000, 7)):
        array = rules._empty(shape, np.dtype(jnp.dtype(dtype)))
        array[...] = 2.0
        held = checkpoint._held(array)
        assert held.unsafe_buffer_pointer() == array.ctypes.data
        assert held.shape == shape and held.dtype == array.dtype
        np.testing.assert_array_equal(held, array)


def test_without_a_cpu_backend_arrays_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(**_: Any) -> None:
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", none)
    array = np.ones(3)
    assert checkpoint._held(array) is array
