""".pth files that torch wrote and something damaged, and those that somebody made to do damage.

As in tests/unit/test_mutations.py: one line that names the file, or what was saved; and nothing
that a file asks for is ever done.
"""

import builtins
import collections
import contextlib
import functools
import io
import operator
import os
import pickle
import random
import shutil
import struct
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import wan_jax
from tests.unit.conftest import TINY
from tests.unit.test_mutations import REFUSED, SAME, Site, read
from wan_jax.weights import miniature, rules
from wan_jax.weights.archive import Archive
from wan_jax.weights.layouts import UMT5_PTH, VAE_PTH
from wan_jax.weights.pth import PthReader
from wan_jax.weights.sources import part_table

KINDS = ("zip", "zip4", "unchecked", "legacy")


def _torch_bytes(value: Any, kind: str) -> bytes:
    """What torch.save writes: a zip by two protocols, one without checksums, or the older form."""
    torch.serialization.set_crc32_options(kind != "unchecked")
    stream = io.BytesIO()
    protocol = 4 if kind == "zip4" else 2
    new = kind != "legacy"
    torch.save(value, stream, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    torch.serialization.set_crc32_options(True)
    return stream.getvalue()


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Site]:
    """{kind: a folder of the original layout with the VAE and UMT5 in .pth files of that kind}."""
    base = tmp_path_factory.mktemp("original")
    miniature.write(base / "diffusers", config=TINY, seed=7)
    arrays = read(base / "diffusers")
    found = {}
    for kind in KINDS:
        path = Path(shutil.copytree(base / "diffusers", base / kind))
        for part, folder, file in (("vae", "vae", VAE_PTH), ("umt5", "text_encoder", UMT5_PTH)):
            shutil.rmtree(path / folder)
            ours = {n.split(": ")[1]: a for n, a in arrays.items() if n.startswith(f"{part}: ")}
            state = collections.OrderedDict(
                (name, torch.from_numpy(array.copy()))
                for name, array in rules.export(part_table(getattr(TINY, part)), ours, naming="wan")
            )
            state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
            (path / file).write_bytes(_torch_bytes(state, kind))
        found[kind] = Site(path)
        assert found[kind].wanted.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[kind].wanted[name], array)
    return found


@pytest.fixture(params=KINDS)
def site(request: pytest.FixtureRequest, sites: dict[str, Site]) -> Site:
    return sites[request.param]


PTHS = (("vae", VAE_PTH), ("umt5", UMT5_PTH))


def _is_checked(file: Path) -> bool:
    return zipfile.is_zipfile(file) and Archive(file).checked


def _plain(file: Path) -> list[int]:
    """Places in the file that are no tensor's numbers."""
    data = bytearray(file.stat().st_size)
    for start, length in PthReader(file)._places.values():
        data[start : start + length] = b"\1" * length
    return [place for place, used in enumerate(data) if not used]


# Damage.


@pytest.mark.parametrize("seed", range(2))
def test_truncated(seed: int, site: Site) -> None:
    for part, name in PTHS:
        data = (site.path / name).read_bytes()
        stream = random.Random(seed)
        for size in (*(stream.randrange(len(data)) for _ in range(8)), len(data) - 1, 0):
            assert site.mutate(site.path / name, data[:size], (part,)) == REFUSED


@pytest.mark.parametrize("seed", range(3))
def test_flips_around_the_numbers(seed: int, site: Site) -> None:
    """In headers, pickles, counts, padding and the directory; 25 a file."""
    stream = random.Random(seed)
    for part, name in PTHS:
        file = site.path / name
        data, places = file.read_bytes(), _plain(file)
        for _ in range(25):
            place = stream.choice(places)
            old = data[place]
            new = stream.choice([stream.randrange(256), old ^ 1 << stream.randrange(8), old + 1])
            site.mutate(file, data[:place] + bytes([new % 256]) + data[place + 1 :], (part,))


@pytest.mark.parametrize("seed", range(2))
def test_flips_in_the_pickle(seed: int, site: Site) -> None:
    """Refused wherever there is a checksum; else most are, and no other gives other arrays."""
    stream = random.Random(seed)
    for part, name in PTHS:
        file = site.path / name
        data = file.read_bytes()
        start = data.index(b"torch._utils")
        stop = data.rindex(b"_rebuild_tensor", 0, start + 4000)
        for _ in range(20):
            place = stream.randrange(start, stop)
            new = bytes([data[place] ^ 1 << stream.randrange(8)])
            found = site.mutate(file, data[:place] + new + data[place + 1 :], (part,))
            assert found == REFUSED or not _is_checked(file)


def test_flips_in_the_numbers(sites: dict[str, Site]) -> None:
    """The checksum of the storage finds each, when it is read."""
    for kind in ("zip", "zip4"):
        stream = random.Random(kind)
        for part, name in PTHS:
            file = sites[kind].path / name
            data = file.read_bytes()
            places = list(PthReader(file)._places.values())
            for _ in range(15):
                start, length = stream.choice(places)
                place = start + stream.randrange(length)
                new = bytes([data[place] ^ 1 << stream.randrange(8)])
                changed = data[:place] + new + data[place + 1 :]
                assert sites[kind].mutate(file, changed, (part,)) == REFUSED


@pytest.mark.parametrize("seed", range(3))
def test_bytes_lost_added_and_repeated(seed: int, site: Site) -> None:
    stream = random.Random(seed)
    part, name = PTHS[seed % 2]
    file = site.path / name
    data, places = file.read_bytes(), _plain(file)
    zipped = zipfile.is_zipfile(file)
    for _ in range(12):
        place, count = stream.choice(places), stream.randrange(1, 9)
        lost = site.mutate(file, data[:place] + data[place + count :], (part,))
        added = site.mutate(file, data[:place] + stream.randbytes(count) + data[place:], (part,))
        assert not zipped or (lost, added) == (REFUSED, REFUSED)
    for more in (b"\0", b"PK", data[:100], data):
        assert site.mutate(file, data + more, (part,)) == REFUSED
        assert site.mutate(file, more + data, (part,)) == REFUSED


# Zips that are whole, and not those of weights.


def _weights(**tensors: torch.Tensor) -> bytes:
    return _torch_bytes(tensors, "zip")


def _rezipped(data: bytes, change: Callable[[dict[str, bytes]], Any], **options: Any) -> bytes:
    """Another zip of the entries after a change, its checksums right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return stream.getvalue()


def _read(file: Path) -> dict[str, np.ndarray]:
    reader = PthReader(file)
    return {name: reader.read(name) for name in reader.shapes()}


def _refused(file: Path, data: bytes, *words: str) -> None:
    file.write_bytes(data)
    with pytest.raises(ValueError) as error:
        _read(file)
    message = str(error.value)
    assert message.startswith(f"{file} is not a readable .pth of weights: "), message
    assert "\n" not in message
    assert len(message) < 600
    for word in words:
        assert word in message


def _rename(old: str, new: str) -> Callable[[dict[str, bytes]], None]:
    def change(entries: dict[str, bytes]) -> None:
        (name,) = (name for name in entries if name.endswith(old))
        entries[name.removesuffix(old) + new] = entries.pop(name)

    return change


def _put(suffix: str, content: bytes) -> Callable[[dict[str, bytes]], None]:
    def change(entries: dict[str, bytes]) -> None:
        root = next(iter(entries)).split("/")[0]
        entries[f"{root}/{suffix}"] = content

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_rename("data/0", "data/7"), "used by no tensor"),
        (_rename("data.pkl", "data.bin"), "0 data.pkl in place of one"),
        (_put("more/data.pkl", b"\x80\x02}."), "2 data.pkl in place of one"),
        (_put("data/2", bytes(8)), "['2'] are used by no tensor"),
        (_put("data/0", bytes(8)), "another length"),
        (_put("data/0", bytes(400)), "another length"),
        (_put("byteorder", b"big"), "big-endian"),
        (_put("code/x.py", b"import os"), "code/x.py, which is no part of weights"),
        (_put("data.pkl", b"\x80\x02}." + bytes(2**22)), "at most"),
        (_put("data.pkl", b"\x80\x02}.x"), "1 bytes follow its pickle"),
        (_put("data.pkl", b""), "exhausted"),
        (lambda entries: entries.update(other=b""), "holds other, which is no part"),
    ],
)
def test_zips_of_something_else(change: Any, words: str, tmp_path: Path) -> None:
    data = _weights(a=torch.arange(64.0), b=torch.zeros(3))
    _refused(tmp_path / "x.pth", _rezipped(data, change), words)
    file = tmp_path / "same.pth"
    file.write_bytes(_rezipped(data, lambda entries: None))
    np.testing.assert_array_equal(PthReader(file).read("a"), np.arange(64.0))


def test_packed_and_commented_zips(tmp_path: Path) -> None:
    data = _weights(a=torch.zeros(2**16))
    packed = _rezipped(data, lambda entries: None, compression=zipfile.ZIP_DEFLATED)
    assert len(packed) < len(data) / 50
    _refused(tmp_path / "x.pth", packed, "is compressed")
    stream = io.BytesIO(_rezipped(data, lambda entries: None))
    with zipfile.ZipFile(stream, "a") as archive:
        archive.comment = b"!"
    _refused(tmp_path / "x.pth", stream.getvalue(), "truncated, or damaged")


def test_headers_that_disagree(tmp_path: Path) -> None:
    """Two entries exchanged in the directory alone, or before their bytes alone."""
    data = _weights(a=torch.zeros(4), b=torch.ones(4))
    directory = data.index(b"PK\x01\x02")
    for change in (
        lambda part: part.replace(b"data/0", b"data/#").replace(b"data/1", b"data/0"),
        lambda part: part.replace(b"data/0", b"data/1"),
    ):
        _refused(tmp_path / "x.pth", data[:directory] + change(data[directory:]))
        _refused(tmp_path / "x.pth", change(data[:directory]) + data[directory:])


def test_sizes_beyond_the_file_are_not_allocated(tmp_path: Path) -> None:
    """Every 4 bytes of a file made the largest number, and a count of the older form."""
    began = time.monotonic()
    for kind in ("zip", "unchecked", "legacy"):
        data = _torch_bytes({"a": torch.zeros(3), "b": torch.ones(2, 2)}, kind)
        for place in range(0, len(data) - 4, 3 if kind == "legacy" else 7):
            for value in (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"):
                file = tmp_path / "x.pth"
                file.write_bytes(data[:place] + value + data[place + 4 :])
                with contextlib.suppress(ValueError):
                    assert all(array.nbytes <= 32 for array in _read(file).values())
    assert time.monotonic() - began < 60


# Malice.


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _call(module: str, name: str, *arguments: str) -> bytes:
    """A pickle's fragment that leaves module.name(*arguments) on the stack."""
    inner = b"".join(map(_text, arguments))
    return f"c{module}\n{name}\n".encode() + b"(" + inner + b"tR"


def _short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def _payloads(canary: Path) -> dict[str, bytes]:
    """Fragments that leave one object; for pickle.loads many of them write the file."""
    touch, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    module = _call("builtins", "__import__", "os")
    ordered = b"ccollections\nOrderedDict\n"
    calls = {
        "os.system": _call("os", "system", touch),
        "posix.system": _call("posix", "system", touch),
        "nt.system": _call("nt", "system", touch),
        "os.popen": _call("os", "popen", touch),
        "eval": _call("builtins", "eval", code),
        "exec": _call("builtins", "exec", code),
        "python 2": _call("__builtin__", "eval", code),
        "open": _call("builtins", "open", str(canary), "w"),
        "import": _call("builtins", "__import__", "this"),
        "subprocess": _call("subprocess", "getoutput", touch),
        "check_output": b"csubprocess\ncheck_output\n((" + _text("touch")
        + _text(str(canary)) + b"ltR",
        "timeit": _call("timeit", "timeit", code),
        "run": _call("cProfile", "run", code),
        "loads": _call("pickle", "loads", "x"),
        "torch.load": _call("torch", "load", str(canary)),
        "torch.hub": _call("torch.hub", "load", str(canary)),
        "serialization": _call("torch.serialization", "_load", str(canary)),
        "rebuild": _call("torch._tensor", "_rebuild_from_type_v2", touch),
        "torch.os": _call("torch.serialization", "os.system", touch),
        "numpy": _call("numpy", "load", str(canary)),
        "partial": b"cfunctools\npartial\n(cos\nsystem\n" + _text(touch) + b"tR)R",
        "attrgetter": _call("operator", "attrgetter", "system") + b"(" + module + b"tR",
    }  # fmt: skip
    chains = {
        "getattr": b"cbuiltins\ngetattr\n(" + module + _text("system") + b"tR("
        + _text(touch) + b"tR",
        "stack global": _short("posix") + _short("system") + b"\x93" + _text(touch) + b"\x85R",
        "dotted": _short("collections") + _short("OrderedDict.fromkeys") + b"\x93"
        + _text(touch) + b"\x85R",
        "dunder": _short("collections") + _short("OrderedDict.__init__.__globals__") + b"\x93",
        "torch dotted": _short("torch._utils") + _short("_rebuild_tensor_v2.__globals__") + b"\x93",
        "inst": b"(" + _text(touch) + b"ios\nsystem\n",
        "obj": b"(cos\nsystem\n" + _text(touch) + b"o",
        "newobj": b"csubprocess\nPopen\n" + _text(touch) + b"\x85\x81",
        "newobj ex": b"csubprocess\nPopen\n" + _text(touch) + b"\x85}\x92",
        "ext1": b"\x82\x01", "ext2": b"\x83\x01\x00", "ext4": b"\x84\x01\x00\x00\x00",
        "persid": b"P" + touch.encode() + b"\n",
        "binpersid": _text(touch) + b"Q",
        "binpersid global": b"(" + _text("storage") + b"cos\nsystem\n" + _text("0")
        + _text("cpu") + b"K\x01tQ",
        "ordered with items": ordered + b"(](](" + _text("a") + module + b"eetR",
        "ordered with setstate": ordered + b")R}" + _text("__reduce__") + b"cos\nsystem\nsb",
        "ordered with slots": ordered + b")R(N}" + _text("__class__") + b"cos\nsystem\nstb",
        "build on a global": b"cos\nsystem\n}" + _text("x") + _text("y") + b"sb",
        "reduce of a tuple": b"(" + _text("os") + _text("system") + b"t" + _text(touch) + b"\x85R",
        "parameter of it": b"ctorch._utils\n_rebuild_parameter\n(" + calls["os.system"] + b"\x89"
        + ordered + b")RtR",
        "tensor of it": b"ctorch._utils\n_rebuild_tensor_v2\n(" + calls["os.system"]
        + b"K\x00))\x89" + ordered + b")RtR",
        "buffers": b"\x97\x98", "bytearray": b"\x96" + struct.pack("<Q", 2**40),
        "frozen set": b"(" + _text("a") + b"\x91",
        "memo": b"h\x07", "long memo": b"j\xff\xff\xff\x7f", "dup": b")2",
    }  # fmt: skip
    return calls | chains


def _placed(payload: bytes) -> dict[str, bytes]:
    """Whole pickles with the fragment in every place that an object can be in."""
    ordered = b"ccollections\nOrderedDict\n)R"
    start, name = b"\x80\x04", _text("a")
    return {
        "top": start + payload + b".",
        "value": start + b"}" + name + payload + b"s.",
        "key": start + b"}" + payload + b"K\x01s.",
        "in an ordered one": start + ordered + b"(" + name + payload + b"u.",
        "in a list": start + b"}" + name + b"](" + payload + b"es.",
        "in a tuple": start + b"}" + name + b"K\x01" + payload + b"\x86s.",
        "metadata": start + ordered + b"}" + _text("_metadata") + payload + b"sb.",
        "state": start + ordered + payload + b"b.",
        "and dropped": start + payload + b"0}.",
        "hooks": start + b"}" + name + b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89"
        + payload + b"tRs.",
        "device": start + b"}" + name + b"(" + _text("storage") + b"ctorch\nFloatStorage\n"
        + _text("0") + payload + b"K\x01tQs.",
    }  # fmt: skip


def _zip(tree: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", tree)
        archive.writestr("archive/data/0", bytes(4))
    return stream.getvalue()


def _containers(tree: bytes) -> Iterator[bytes]:
    """The pickle in a zip, by itself, and in each place of the older form."""
    yield _zip(tree)
    yield tree
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    whole = [pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, system, {}, [])]
    for i in range(len(whole)):
        yield b"".join([*whole[:i], tree, *whole[i + 1 :]])


NAMES = sorted(_payloads(Path("x")))


@pytest.mark.parametrize("name", NAMES)
def test_hostile_pickles(name: str, tmp_path: Path) -> None:
    """Eleven places in seven containers."""
    canary = tmp_path / "canary"
    before = set(os.environ)
    for tree in _placed(_payloads(canary)[name]).values():
        for data in _containers(tree):
            _refused(tmp_path / "x.pth", data)
            assert not canary.exists()
    assert set(os.environ) == before


def test_the_payloads_would_do_harm(tmp_path: Path) -> None:
    """With pickle they do: the canary lives where it should."""
    alive = 0
    for name in ("os.system", "posix.system", "eval", "getattr", "stack global", "inst", "obj"):
        canary = tmp_path / "canary"
        pickle.loads(_placed(_payloads(canary)[name])["value"])
        alive += canary.exists()
        canary.unlink(missing_ok=True)
    assert alive == 7


class _Reduced:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self._reduced = (call, arguments)

    def __reduce__(self) -> Any:
        return self._reduced

    def __hash__(self) -> int:
        return 1


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_objects_that_torch_saves(kind: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    touch = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w')"
    objects = (
        _Reduced(os.system, touch),
        _Reduced(eval, code),
        _Reduced(exec, code),
        _Reduced(getattr, builtins, "eval"),
        _Reduced(subprocess.call, ["touch", str(canary)]),
        _Reduced(functools.partial, os.system, touch),
        _Reduced(operator.methodcaller("system", touch), os),
        _Reduced(torch.load, str(canary)),
        _Reduced(torch.hub.load, str(tmp_path), "x"),
        _Reduced(torch.jit.load, str(canary)),
        np.zeros(3),
        torch.nn.Linear(2, 2),
        torch.Size([2]),
        torch.device("cpu"),
        torch.float32,
        collections.Counter("ab"),
        os.environ,
    )
    for harm in objects:
        values: list[Any] = [{"a": torch.zeros(2), "b": harm}, [harm], harm]
        if isinstance(harm, _Reduced):
            values.append({harm: torch.zeros(2)})
        for value in values:
            try:
                data = _torch_bytes(value, kind)
            except (TypeError, pickle.PicklingError, AttributeError):
                continue
            canary.unlink(missing_ok=True)
            _refused(tmp_path / "x.pth", data)
            assert not canary.exists()


def test_pickles_that_grow(tmp_path: Path) -> None:
    """Objects that are few bytes in the file and many in memory, or long to hash or to print."""
    began = time.monotonic()
    laugh = b"\x80\x02)" + b"q\x00h\x00\x86" * 200
    for tree in (
        laugh + b".",
        b"\x80\x02}" + laugh[2:] + b"K\x01s.",
        b"\x80\x02}" + _text("a") + laugh[2:] + b"s.",
        b"\x80\x02" + b"]" * 10**5 + b"." ,
        b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".",
        b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b".",
        b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"a",
        b"\x80\x02\x8d" + struct.pack("<Q", 2**62) + b"a",
        b"\x80\x02I" + b"9" * 10**6 + b"\n.",
        b"c" + b"a" * 2**23,
    ):  # fmt: skip
        for data in _containers(tree):
            _refused(tmp_path / "x.pth", data)
    assert time.monotonic() - began < 30


# The whole of load(), for one of each.


def test_load_leaves_nothing_of_a_damaged_pth(sites: dict[str, Site], tmp_path: Path) -> None:
    cache, canary = tmp_path / "cache", tmp_path / "canary"
    hostile = _zip(_placed(_payloads(canary)["os.system"])["value"])
    for part, name in PTHS:
        source = Path(shutil.copytree(sites["zip"].path, tmp_path / part))
        data = (source / name).read_bytes()
        start, _ = next(iter(PthReader(source / name)._places.values()))
        flipped = data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :]
        for wrong in (data[:-1], flipped, hostile, b""):
            (source / name).write_bytes(wrong)
            with pytest.raises(ValueError, match=name):
                wan_jax.load(source, cache_dir=cache, offload=True)
            assert not cache.exists() or not list(cache.iterdir())
    assert not canary.exists()
    assert sites["zip"].mutate(sites["zip"].path / VAE_PTH, None) == REFUSED
    assert sites["zip"].mutate(sites["zip"].path / "model_index.json", None) == SAME
