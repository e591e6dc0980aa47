"""Damaged checkpoints are refused in one line that names the file, or load as if they were whole.

Each mutation goes through everything that a conversion goes through but Orbax: opening, planning,
reading every tensor. What a .pth adds is in tests/parity/test_mutations.py.
"""

import json
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import wan_jax
from tests.unit.conftest import TINY_FLF2V
from wan_jax.config import PARTS, WanConfig
from wan_jax.weights import checkpoint, clip, dit, miniature, rules, umt5, vae
from wan_jax.weights.sources import open_folder, part_table

Tensors = dict[str, np.ndarray]
Arrays = dict[str, np.ndarray]
LIST = re.compile(r"  (source tensors|targets) [a-z]+( twice)?: .+")
FILES = {
    "dit": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "umt5": "text_encoder/model.safetensors",
    "clip": "image_encoder/model.safetensors",
}
REFUSED, SAME = "refused", "same"


def read(path: Path, parts: tuple[str, ...] | None = None) -> Arrays:
    """{part and path: array}, as a conversion to float32 would write them."""
    folder = open_folder(path, parts)
    found = {}
    for part, plan in checkpoint.plan(folder, "float32").items():
        reader = folder.sources[part].reader
        arrays = rules.apply(plan, reader, what=str(reader.files[0]))
        found |= {f"{part}: {name}": array for name, array in arrays}
    return found


def outcome(
    path: Path, wanted: Arrays, *, parts: tuple[str, ...] | None = None, names: tuple[str, ...] = ()
) -> str:
    """REFUSED or SAME; fails if the error is no clear one, or what loads is something else.

    names: of a file and its folder; the error must have one of them, or that of the checkpoint.
    """
    try:
        found = read(path, parts)
    except ValueError as caught:
        error = str(caught)
    else:
        assert found.keys() == wanted.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, wanted[name], err_msg=name)
        return SAME
    title, *lists = error.splitlines()
    assert not lists or [bool(LIST.fullmatch(line)) for line in lists] == [True] * 6, error
    assert any(name in title for name in (path.name, *names)), error
    assert len(title) < 1000, error
    return REFUSED


class Site:
    """A whole checkpoint, of which one file at a time is replaced for a moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.wanted = read(path)

    def files(self) -> list[Path]:
        return sorted(file for file in self.path.rglob("*") if file.is_file())

    def mutate(self, file: Path, data: bytes | None, parts: tuple[str, ...] | None = None) -> str:
        """outcome() with the file's bytes replaced, or the file removed."""
        before = file.read_bytes()
        file.unlink()
        try:
            if data is not None:
                file.write_bytes(data)
            wanted = {n: a for n, a in self.wanted.items() if n.split(":")[0] in (parts or PARTS)}
            return outcome(self.path, wanted, parts=parts, names=(file.name, file.parent.name))
        finally:
            file.write_bytes(before)

    def edit(
        self, file: Path, change: Callable[[Tensors], Any], parts: tuple[str, ...] | None = None
    ) -> str:
        """outcome() with other tensors in the file."""
        tensors = load_file(file)
        change(tensors)
        spare = self.path.parent / "edited"
        save_file(tensors, spare)
        return self.mutate(file, spare.read_bytes(), parts)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    path = tmp_path_factory.mktemp("diffusers") / "checkpoint"
    miniature.write(path, config=TINY_FLF2V, seed=5)
    return Site(path)


def _state(site: Site, part: str, naming: str) -> Tensors:
    arrays = {n.split(": ")[1]: a for n, a in site.wanted.items() if n.startswith(f"{part}: ")}
    return dict(rules.export(part_table(getattr(TINY_FLF2V, part)), arrays, naming=naming))


def _shard(folder: Path, tensors: Tensors, *, shards: int = 3) -> Path:
    mapping = {}
    names = sorted(tensors)
    for i in range(shards):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
        mapping |= dict.fromkeys(names[i::shards], file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": mapping}))
    return index


@pytest.fixture(scope="module")
def original(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The original layout: a sharded DiT, the others in one file each and without config.json.

    But for CLIP, whose heads no shape shows where they are not as in the released tower.
    """
    path = tmp_path_factory.mktemp("original") / "checkpoint"
    path.mkdir()
    shutil.copytree(site.path / "tokenizer", path / "google" / "umt5-xxl")
    shutil.copytree(site.path / "image_encoder", path / "image_encoder")
    _shard(path, _state(site, "dit", "wan"))
    save_file(_state(site, "vae", "wan"), path / "Wan2.1_VAE.safetensors")
    save_file(_state(site, "umt5", "wan"), path / "models_t5_umt5-xxl-enc-bf16.safetensors")
    values = {
        "model_type": "flf2v", "dim": 32, "ffn_dim": 64, "num_heads": 2, "num_layers": 2,
        "in_dim": 36, "out_dim": 16, "freq_dim": 32, "text_len": 512, "eps": 1e-6,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(values))
    return Site(path)


PREFIXES = {
    "dit": "model.diffusion_model.",
    "vae": "vae.",
    "umt5": "text_encoders.umt5xxl.transformer.",
}


@pytest.fixture(scope="module")
def single(site: Site, original: Site, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """One file with everything but CLIP, and the DiT's config.json."""
    path = tmp_path_factory.mktemp("single") / "checkpoint"
    for name in ("tokenizer", "image_encoder"):
        shutil.copytree(site.path / name, path / name)
    shutil.copy(original.path / "config.json", path)
    tensors = {
        prefix + name: array
        for part, prefix in PREFIXES.items()
        for name, array in _state(site, part, "wan").items()
    }
    save_file(tensors, path / "all.safetensors")
    return Site(path)


@pytest.fixture(params=["site", "original", "single"])
def each(request: pytest.FixtureRequest) -> Site:
    return request.getfixturevalue(request.param)


def test_the_layouts_are_one_checkpoint(site: Site, original: Site, single: Site) -> None:
    for other in (original, single):
        assert other.wanted.keys() == site.wanted.keys()
        for name, array in site.wanted.items():
            np.testing.assert_array_equal(array, other.wanted[name])


# Bytes.

# Nothing is read from these: the first two describe what the files show, the last are a library's.
UNREAD = (
    "model_index.json",
    "tokenizer_config.json",
    "scheduler_config.json",
    "preprocessor_config.json",
)


@pytest.mark.parametrize("seed", range(4))
def test_truncated(seed: int, each: Site) -> None:
    """Every file, at a random length, and at one byte less than it has without a last newline."""
    for file in each.files():
        data = file.read_bytes()
        for size in (
            random.Random(f"{seed}{file.name}").randrange(len(data)),
            len(data.rstrip(b"\n")) - 1,
        ):
            found = each.mutate(file, data[:size])
            assert found == (SAME if file.name in UNREAD else REFUSED), (file, size)


def test_removed(each: Site) -> None:
    for file in each.files():
        optional = (*UNREAD, "wan_jax.json")
        assert each.mutate(file, None) == (SAME if file.name in optional else REFUSED), file


def _header(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def _flipped(data: bytes, stream: random.Random, start: int, stop: int) -> bytes:
    """One byte of a range changed: to any other, or in one bit, or by one."""
    place = stream.randrange(start, stop)
    old = data[place]
    other = stream.choice([stream.randrange(256), old ^ 1 << stream.randrange(8), (old + 1) % 256])
    return data[:place] + bytes([other]) + data[place + 1 :]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("seed", range(4))
def test_flips_in_headers(part: str, seed: int, site: Site) -> None:
    """30 a group; spaces that pad the header are all that may change."""
    file = site.path / FILES[part]
    data, stop = file.read_bytes(), _header(file)
    stream = random.Random(f"{part}{seed}")
    found = [site.mutate(file, _flipped(data, stream, 0, stop), (part,)) for _ in range(30)]
    assert found.count(REFUSED) > 25


@pytest.mark.parametrize("seed", range(3))
def test_flips_in_headers_without_descriptions(seed: int, original: Site) -> None:
    """Where the sizes come from the header itself."""
    stream = random.Random(seed)
    for part, name in (("vae", "Wan2.1_VAE"), ("umt5", "models_t5_umt5-xxl-enc-bf16")):
        file = original.path / f"{name}.safetensors"
        data, stop = file.read_bytes(), _header(file)
        for _ in range(15):
            original.mutate(file, _flipped(data, stream, 8, stop), (part,))


@pytest.mark.parametrize("seed", range(2))
def test_flips_in_the_header_of_a_single_file(seed: int, single: Site) -> None:
    stream = random.Random(seed)
    file = single.path / "all.safetensors"
    data, stop = file.read_bytes(), _header(file)
    for _ in range(20):
        single.mutate(file, _flipped(data, stream, 8, stop))


def test_header_lengths(site: Site) -> None:
    file = site.path / FILES["vae"]
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for other in (0, 1, length - 1, length + 1, length + 8, len(data), 2**31, 2**63, 2**64 - 1):
        changed = other.to_bytes(8, "little") + data[8:]
        assert site.mutate(file, changed, ("vae",)) == REFUSED
    for changed in (data + b"\0", data + data, b"\0" + data, b"", bytes(len(data))):
        assert site.mutate(file, changed, ("vae",)) == REFUSED


@pytest.mark.parametrize("seed", range(3))
def test_bytes_lost_and_added_in_headers(seed: int, site: Site) -> None:
    stream = random.Random(seed)
    file = site.path / FILES["umt5"]
    data, stop = file.read_bytes(), _header(file)
    for _ in range(10):
        place, count = stream.randrange(8, stop), stream.randrange(1, 6)
        more = stream.randbytes(count)
        assert site.mutate(file, data[:place] + data[place + count :], ("umt5",)) == REFUSED
        assert site.mutate(file, data[:place] + more + data[place:], ("umt5",)) == REFUSED


def test_numbers_that_are_none(site: Site) -> None:
    """Flips in the data have no checksum; those that give NaN are found."""
    for part, file in FILES.items():
        for value in (np.nan, np.inf, -np.inf):

            def spoil(tensors: Tensors, value: float = value) -> None:
                next(iter(tensors.values())).reshape(-1)[0] = value

            assert site.edit(site.path / file, spoil, (part,)) == REFUSED


# Tensors.


def _rename(tensors: Tensors, name: str, stream: random.Random) -> None:
    place = stream.randrange(len(name))
    new = name[:place] + stream.choice("abcxyz019._ ") + name[place + 1 :]
    tensors[new if new != name else f"{name}."] = tensors.pop(name)


def _remove(tensors: Tensors, name: str, stream: random.Random) -> None:
    del tensors[name]


def _add(tensors: Tensors, name: str, stream: random.Random) -> None:
    tensors[stream.choice(["extra", f"{name}_", f"model.{name}", "blocks.9.norm3.bias"])] = tensors[
        name
    ].copy()


def _reshape(tensors: Tensors, name: str, stream: random.Random) -> None:
    shape = tensors[name].shape
    others = [(*shape, 1), (1, *shape), (tensors[name].size,), shape[::-1]]
    tensors[name] = tensors[name].reshape(stream.choice([s for s in others if s != shape]))


def _cut(tensors: Tensors, name: str, stream: random.Random) -> None:
    array = tensors[name]
    tensors[name] = array[:-1] if len(array) > 1 else np.concatenate([array, array])


def _swap(tensors: Tensors, name: str, stream: random.Random) -> None:
    shape = tensors[name].shape
    other = stream.choice([n for n, array in sorted(tensors.items()) if array.shape != shape])
    tensors[name], tensors[other] = tensors[other], tensors[name]


def _retype(tensors: Tensors, name: str, stream: random.Random) -> None:
    kinds = [np.int8, np.uint8, np.int32, np.int64, np.bool_, ml_dtypes.float8_e4m3fn]
    tensors[name] = tensors[name].astype(stream.choice([*kinds, ml_dtypes.float8_e5m2]))


def _double(tensors: Tensors, name: str, stream: random.Random) -> None:
    """The one that has no effect: more precise numbers of the same value."""
    tensors[name] = tensors[name].astype(np.float64)


CHANGES = (_rename, _remove, _add, _reshape, _cut, _swap, _retype, _double)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("change", CHANGES)
def test_tensors_changed(change: Any, part: str, site: Site) -> None:
    """Five tensors each."""
    stream = random.Random(f"{part}{change.__name__}")
    names = stream.sample(sorted(load_file(site.path / FILES[part])), 5)
    for name in names:
        found = site.edit(site.path / FILES[part], lambda t, n=name: change(t, n, stream), (part,))
        assert found == REFUSED, name


@pytest.mark.parametrize("part", PREFIXES)
@pytest.mark.parametrize("change", CHANGES)
def test_tensors_changed_where_shapes_are_all(change: Any, part: str, single: Site) -> None:
    """One file for all parts, of which two have no description but their shapes; three each."""
    stream = random.Random(f"{part}{change.__name__}")
    file = single.path / "all.safetensors"
    names = [name for name in load_file(file) if name.startswith(PREFIXES[part])]
    for name in stream.sample(sorted(names), 3):
        found = single.edit(file, lambda t, n=name: change(t, n, stream))
        assert found == REFUSED, name


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_other_sizes(part: str, site: Site, tmp_path: Path) -> None:
    """A whole network, and not the one that its config.json describes."""
    sizes: dict[str, dict[str, Any]] = {
        "dit": {"ffn_dim": 96},
        "vae": {"base_dim": 8},
        "umt5": {"ffn_dim": 48},
        "clip": {"ffn_dim": 48},
    }
    values = json.loads(TINY_FLF2V.to_json())
    values[part] |= sizes[part]
    miniature.write(tmp_path / "other", config=WanConfig.from_json(json.dumps(values)))
    data = (tmp_path / "other" / FILES[part]).read_bytes()
    assert site.mutate(site.path / FILES[part], data, (part,)) == REFUSED
    for wrong in set(PARTS) - {part}:
        assert site.mutate(site.path / FILES[wrong], data, (wrong,)) == REFUSED


# Indices.


def _moved(mapping: dict[str, str], stream: random.Random) -> None:
    name = stream.choice(sorted(mapping))
    mapping[name] = stream.choice(sorted(set(mapping.values()) - {mapping[name]}))


def _named(mapping: dict[str, str], stream: random.Random) -> None:
    mapping[stream.choice(["extra", "blocks.2.norm3.bias"])] = stream.choice(list(mapping.values()))


def _lost(mapping: dict[str, str], stream: random.Random) -> None:
    del mapping[stream.choice(sorted(mapping))]


def _shard_lost(mapping: dict[str, str], stream: random.Random) -> None:
    gone = stream.choice(sorted(set(mapping.values())))
    for name in [name for name, file in mapping.items() if file == gone]:
        del mapping[name]


def _elsewhere(mapping: dict[str, str], stream: random.Random) -> None:
    name = stream.choice(sorted(mapping))
    mapping[name] = stream.choice(
        ["../x.safetensors", "/x.safetensors", "none.safetensors", "config.json", "", "."]
    )


def _renamed(mapping: dict[str, str], stream: random.Random) -> None:
    name = stream.choice(sorted(mapping))
    mapping[f"{name}x"] = mapping.pop(name)


@pytest.mark.parametrize("change", [_moved, _named, _lost, _shard_lost, _elsewhere, _renamed])
def test_indices_changed(change: Any, original: Site) -> None:
    (index,) = original.path.glob("*.index.json")
    for seed in range(6):
        mapping: dict[str, str] = json.loads(index.read_text())["weight_map"]
        change(mapping, random.Random(seed))
        data = json.dumps({"weight_map": mapping}).encode()
        assert original.mutate(index, data, ("dit",)) == REFUSED


def test_shards_exchanged(original: Site) -> None:
    first, second, third = sorted(original.path.glob("diffusion_*.safetensors"))
    for file, data in ((first, second), (second, third), (third, first)):
        assert original.mutate(file, data.read_bytes(), ("dit",)) == REFUSED


# Descriptions.


@pytest.mark.parametrize("seed", range(3))
def test_characters_lost_in_json(seed: int, site: Site, original: Site) -> None:
    """Most give no JSON; no other may give other arrays or another shape."""
    stream = random.Random(seed)
    files = [(site, (site.path / file).with_name("config.json")) for file in FILES.values()]
    files += [(original, original.path / "config.json")]
    files += [(original, next(original.path.glob("*.index.json")))]
    for place, file in files:
        data = file.read_bytes()
        for _ in range(8):
            at = stream.randrange(len(data))
            place.mutate(file, data[:at] + data[at + 1 :])
            place.mutate(file, data[:at] + bytes([stream.randrange(32, 127)]) + data[at:])


IMAGE = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")


@pytest.mark.parametrize("value", [None, True, -1, 0, 1.5, "2", [], {}, 10**30])
def test_sizes_of_another_kind(value: Any, site: Site) -> None:
    described: Mapping[str, dict[str, Any]] = {
        "dit": dit.config_to_diffusers(TINY_FLF2V.dit),
        "vae": vae.config_to_diffusers(TINY_FLF2V.vae),
        "umt5": umt5.config_to_diffusers(TINY_FLF2V.umt5),
        "clip": clip.config_to_diffusers(TINY_FLF2V.clip),
    }
    counts = {
        "dit": ("num_attention_heads", "attention_head_dim", "ffn_dim", "num_layers", *IMAGE),
        "vae": ("base_dim", "z_dim", "num_res_blocks", "dim_mult"),
        "umt5": ("vocab_size", "d_model", "num_heads", "d_kv", "d_ff", "num_layers"),
        "clip": (
            "image_size", "patch_size", "hidden_size", "num_attention_heads", "num_hidden_layers",
            "intermediate_size",
        ),
    }  # fmt: skip
    for part, file in FILES.items():
        config = (site.path / file).with_name("config.json")
        for name in counts[part]:
            data = json.dumps(described[part] | {name: value}).encode()
            assert site.mutate(config, data, (part,)) == REFUSED, (name, value)


# The whole of load(), for some of each.


def test_load_leaves_nothing_of_a_damaged_checkpoint(site: Site, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for part, file in FILES.items():
        source = Path(shutil.copytree(site.path, tmp_path / part))
        path = source / file
        data = path.read_bytes()
        tensors = load_file(path)
        first = next(iter(tensors))
        save_file(tensors | {first: np.full_like(tensors[first], np.nan)}, path)
        spoilt = path.read_bytes()
        for wrong in (data[:-1], data[:200], data + b"\0", spoilt):
            path.write_bytes(wrong)
            with pytest.raises(ValueError, match=path.parent.name):
                wan_jax.load(source, cache_dir=cache, offload=True)
            assert not cache.exists() or not list(cache.iterdir())
