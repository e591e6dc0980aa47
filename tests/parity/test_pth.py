""".pth files that torch writes, read without it; hostile ones are refused and run nothing."""

import collections
import json
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from wan_jax.loading import load
from wan_jax.weights import layouts, miniature, rules, sources, trees
from wan_jax.weights.pth import PthReader
from wan_jax.weights.rules import export


def _state() -> collections.OrderedDict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = collections.OrderedDict(
        single=torch.randn(6, 5),
        half=torch.randn(3).to(torch.float16),
        brain=torch.randn(2, 3, 4).to(torch.bfloat16),
        turned=torch.randn(5, 6).T,
        last=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        parameter=torch.nn.Parameter(torch.randn(4)),
        scalar=torch.tensor(3.5),
        empty=torch.zeros(0, 3),
    )
    state["tied"] = state["single"]
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  (as a module's has)
    return state


def _views() -> dict[str, torch.Tensor]:
    """Tensors that share storages, or leave some of theirs to nobody."""
    base = torch.randn(6, 5)
    return {
        "base": base,
        "turned": base.T,
        "rows": base[1:4],
        "columns": base[1:4, ::2],
        "slice": torch.randn(100)[40:43],
        "first": torch.randn(4, 4)[0],
    }


@pytest.fixture(params=["zip", "zip4", "unchecked", "legacy"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both forms, another protocol, and torch's option to leave the checksums out."""
    torch.serialization.set_crc32_options(request.param != "unchecked")
    yield request.param
    torch.serialization.set_crc32_options(True)


def _save(file: Path, value: Any, *, kind: str = "zip") -> Path:
    protocol = 4 if kind == "zip4" else 2
    new = kind != "legacy"
    torch.save(value, file, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    return file


def _assert_same(reader: PthReader, state: Mapping[str, torch.Tensor]) -> None:
    shapes = reader.shapes()
    assert list(shapes) == list(state)
    for name, tensor in state.items():
        ours = reader.read(name)
        assert ours.shape == tuple(tensor.shape) == shapes[name][0]
        assert str(tensor.dtype) == f"torch.{ours.dtype.name}" == f"torch.{shapes[name][1]}"
        truth = tensor.detach().double().numpy()
        np.testing.assert_array_equal(ours.astype(np.float64), truth)


def test_every_tensor_is_what_torch_wrote(kind: str, tmp_path: Path) -> None:
    state = _state()
    if not kind.startswith("zip"):
        file = _save(tmp_path / "a.pth", state, kind=kind)
        with pytest.raises(ValueError, match=r"a\.pth.*float16 and bfloat16 and no checksums"):
            PthReader(file)
        del state["half"]
    _assert_same(PthReader(_save(tmp_path / "a.pth", state, kind=kind)), state)


def test_views_need_checksums(kind: str, tmp_path: Path) -> None:
    """A pickle whose numbers may be damaged must explain every byte of its storages."""
    for names in (None, ["base", "turned"], ["base", "rows"], ["slice"], ["first"]):
        state = {name: tensor for name, tensor in _views().items() if not names or name in names}
        file = _save(tmp_path / "a.pth", state, kind=kind)
        if kind.startswith("zip"):
            _assert_same(PthReader(file), state)
        else:
            with pytest.raises(ValueError, match=r"a\.pth.*cannot be told apart in a file without"):
                PthReader(file)


def test_parts_that_fill_a_storage(kind: str, tmp_path: Path) -> None:
    """As chunk() leaves them: they need no checksums."""
    one, two, three = torch.randn(12, 5).chunk(3)
    state = {"three": three, "one": one, "two": two, "again": one}
    _assert_same(PthReader(_save(tmp_path / "a.pth", state, kind=kind)), state)


def test_an_expanded_tensor_is_refused(kind: str, tmp_path: Path) -> None:
    """Of any size from a few bytes, and none of weights."""
    file = _save(tmp_path / "a.pth", {"a": torch.zeros(1).expand(2**40)}, kind=kind)
    with pytest.raises(ValueError, match=r"a has strides \(0,\) for shape"):
        PthReader(file)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16])
def test_types_that_are_no_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    file = _save(tmp_path / "a.pth", {"a": torch.zeros(4).to(dtype)})
    with pytest.raises(ValueError, match="float8 or as narrow; take the file in bfloat16"):
        PthReader(file)


class _Hostile:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def test_nothing_in_a_file_is_run(kind: str, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    hostile = {"a": torch.zeros(2), "b": _Hostile(os.mkdir, str(trace))}
    file = _save(tmp_path / "hostile.pth", hostile, kind=kind)
    with pytest.raises(ValueError, match=r"hostile\.pth.*posix\.mkdir"):
        PthReader(file)
    assert not trace.exists()


def test_a_bare_hostile_pickle_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bare.pth"
    file.write_bytes(pickle.dumps(_Hostile(eval, "1 / 0")))
    with pytest.raises(ValueError, match=r"bare\.pth.*builtins\.eval"):
        PthReader(file)


def test_truncated_files_are_refused(kind: str, tmp_path: Path) -> None:
    whole = _save(tmp_path / "a.pth", _state(), kind=kind).read_bytes()
    for share in (0.0, 0.1, 0.5, 0.9, 0.99):
        (tmp_path / "cut.pth").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"cut\.pth"):
            PthReader(tmp_path / "cut.pth")


def test_what_is_no_state_dict_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing"):
        PthReader(tmp_path / "absent.pth")
    for value in ({"epoch": 3}, {"model": {"a": torch.zeros(2)}}, [torch.zeros(2)]):
        file = _save(tmp_path / "other.pth", value)
        with pytest.raises(ValueError, match=r"other\.pth"):
            PthReader(file)


def test_a_storage_that_is_too_short_is_refused(tmp_path: Path) -> None:
    file = _save(tmp_path / "a.pth", {"a": torch.zeros(64)})
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, data[:8] if info.filename.endswith("data/0") else data)
    with pytest.raises(ValueError, match="the storage of a has another length"):
        PthReader(tmp_path / "b.pth")


def _original_layout(diffusers: Path, original: Path) -> None:
    """The folder with every network under the original's names and files."""
    original.mkdir()
    folder = sources.open_folder(diffusers)
    files = {"vae": layouts.VAE_PTH, "umt5": layouts.UMT5_PTH}
    for part, source in folder.sources.items():
        targets = trees.flatten(sources.abstract_part(source.config, np.dtype(np.float32)))
        names = list(source.reader.shapes())
        plan = rules.resolve(source.table, targets, naming="diffusers", names=names)
        arrays = dict(export(source.table, dict(rules.apply(plan, source.reader)), naming="wan"))
        if part == "dit":
            save_file(arrays, original / "diffusion_pytorch_model.safetensors")
        else:
            torch.save({k: torch.from_numpy(v) for k, v in arrays.items()}, original / files[part])
    dit = folder.config.dit
    values = {"model_type": "t2v", "dim": dit.dim, "ffn_dim": dit.ffn_dim, "eps": dit.eps}
    values |= {"num_heads": dit.num_heads, "num_layers": dit.num_layers, "in_dim": 16}
    values |= {"out_dim": 16, "freq_dim": dit.freq_dim, "text_len": dit.text_len}
    (original / "config.json").write_text(json.dumps(values))
    (original / "google").mkdir()
    (diffusers / "tokenizer").rename(original / "google" / "umt5-xxl")


def test_the_original_layout_gives_the_same_networks(tmp_path: Path) -> None:
    miniature.write(tmp_path / "diffusers")
    one = load(tmp_path / "diffusers", cache_dir=tmp_path / "cache")
    _original_layout(tmp_path / "diffusers", tmp_path / "original")
    two = load(tmp_path / "original", cache_dir=tmp_path / "cache")
    assert (one.config.dit, one.config.vae, one.config.umt5) == (
        two.config.dit,
        two.config.vae,
        two.config.umt5,
    )
    for part in one.loaders:
        theirs = trees.flatten(two.network(part))
        for name, array in trees.flatten(one.network(part)).items():
            assert array.dtype == theirs[name].dtype
            np.testing.assert_array_equal(np.asarray(array), np.asarray(theirs[name]))


def test_a_file_given_by_itself(tmp_path: Path) -> None:
    """Also under the prefix that wrapper nodes give the VAE."""
    miniature.write(tmp_path / "diffusers")
    _original_layout(tmp_path / "diffusers", tmp_path / "original")
    file = tmp_path / "original" / layouts.VAE_PTH
    one = sources.open_folder(file, ("vae",))
    state = torch.load(file, weights_only=True)
    other = tmp_path / "other.pth"
    torch.save({f"model.{name}": tensor for name, tensor in state.items()}, other)
    two = sources.open_folder(other, ("vae",))
    assert one.sources["vae"].config == two.sources["vae"].config
    readers = [folder.sources["vae"].reader for folder in (one, two)]
    assert readers[0].shapes() == readers[1].shapes()
    for name in state:
        np.testing.assert_array_equal(*(reader.read(name) for reader in readers))
    with pytest.raises(ValueError, match=r"other\.pth holds no UMT5 of Wan2\.1; .*those of VAE$"):
        sources.open_folder(other, ("umt5",))
