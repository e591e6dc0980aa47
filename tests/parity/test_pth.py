""".pth files that torch writes, read without it; hostile ones are refused and run nothing."""

import collections
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from wan_jax.loading import load
from wan_jax.weights import miniature, rules, sources, trees
from wan_jax.weights.pth import PthReader
from wan_jax.weights.rules import export


def _state() -> collections.OrderedDict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 5)
    state = collections.OrderedDict(
        single=base,
        half=torch.randn(3).to(torch.float16),
        brain=torch.randn(2, 3, 4).to(torch.bfloat16),
        view=base[1:4, ::2],
        turned=base.T,
        parameter=torch.nn.Parameter(torch.randn(4)),
        scalar=torch.tensor(3.5),
        empty=torch.zeros(0, 3),
    )
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  (as a module's has)
    return state


def _save(file: Path, value: Any, *, legacy: bool) -> Path:
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file


@pytest.mark.parametrize("legacy", [False, True])
def test_every_tensor_is_what_torch_wrote(legacy: bool, tmp_path: Path) -> None:
    state = _state()
    reader = PthReader(_save(tmp_path / "a.pth", state, legacy=legacy))
    shapes = reader.shapes()
    assert list(shapes) == list(state)
    for name, tensor in state.items():
        ours = reader.read(name)
        assert ours.shape == tuple(tensor.shape) == shapes[name][0]
        assert str(tensor.dtype) == f"torch.{ours.dtype.name}" == f"torch.{shapes[name][1]}"
        truth = tensor.detach().double().numpy()
        np.testing.assert_array_equal(ours.astype(np.float64), truth)


class _Hostile:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_file_is_run(legacy: bool, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    hostile = {"a": torch.zeros(2), "b": _Hostile(os.mkdir, str(trace))}
    file = _save(tmp_path / "hostile.pth", hostile, legacy=legacy)
    with pytest.raises(ValueError, match=r"hostile\.pth.*posix\.mkdir"):
        PthReader(file)
    assert not trace.exists()


def test_a_bare_hostile_pickle_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bare.pth"
    file.write_bytes(pickle.dumps(_Hostile(eval, "1 / 0")))
    with pytest.raises(ValueError, match=r"bare\.pth.*builtins\.eval"):
        PthReader(file)


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_files_are_refused(legacy: bool, tmp_path: Path) -> None:
    whole = _save(tmp_path / "a.pth", _state(), legacy=legacy).read_bytes()
    for share in (0.0, 0.1, 0.5, 0.9, 0.99):
        (tmp_path / "cut.pth").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"cut\.pth"):
            PthReader(tmp_path / "cut.pth")


def test_what_is_no_state_dict_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing"):
        PthReader(tmp_path / "absent.pth")
    for value in ({"epoch": 3}, {"model": {"a": torch.zeros(2)}}, [torch.zeros(2)]):
        file = _save(tmp_path / "other.pth", value, legacy=False)
        with pytest.raises(ValueError, match=r"other\.pth"):
            PthReader(file)


def test_a_storage_that_is_too_short_is_refused(tmp_path: Path) -> None:
    file = _save(tmp_path / "a.pth", {"a": torch.zeros(64)}, legacy=False)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, data[:8] if info.filename.endswith("data/0") else data)
    with pytest.raises(ValueError, match="beyond its storage"):
        PthReader(tmp_path / "b.pth")


def _original_layout(diffusers: Path, original: Path) -> None:
    """The folder with every network under the original's names and files."""
    original.mkdir()
    folder = sources.open_folder(diffusers)
    files = {"vae": sources.VAE_PTH, "umt5": sources.UMT5_PTH}
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
    for part in sources.PARTS:
        theirs = trees.flatten(two.network(part))
        for name, array in trees.flatten(one.network(part)).items():
            assert array.dtype == theirs[name].dtype
            np.testing.assert_array_equal(np.asarray(array), np.asarray(theirs[name]))
