"""LoRA: every naming, exact round trips, merging against float64, and what is wrong with files."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import wan_jax
from tests import tolerances
from tests.random_weights import random_array, relative_l2
from tests.unit.conftest import TINY, TINY_FLF2V, TINY_I2V
from tests.unit.test_cli import ROOT, parse, script
from wan_jax import jobs, runner
from wan_jax.config import NANO_FLF2V, NANO_I2V, NANO_T2V, DiTConfig
from wan_jax.dit import DiT
from wan_jax.weights import adapters, dit, lora, lora_files, lora_names, trees
from wan_jax.weights.lora import Lora, Pair
from wan_jax.weights.sources import abstract_part

KINDS = {"t2v": TINY.dit, "i2v": TINY_I2V.dit, "flf2v": TINY_FLF2V.dit}
Tensors = dict[str, np.ndarray]
Run = Callable[..., None]


def shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    leaves = trees.flatten(abstract_part(config, jnp.dtype(jnp.float32)))
    return {name: leaf.shape for name, leaf in leaves.items()}


def factors(config: DiTConfig, *, rank: int = 3, seed: int = 0) -> dict[str, Any]:
    """Random ones for every product."""
    found = {}
    for name, shape in shapes(config).items():
        path = name.removesuffix(".kernel")
        if path != name:
            layers = lora.layers_of(name, shape)
            pair = (*shape[:-1], rank), (*layers, rank, shape[-1])
            found[path] = tuple(
                random_array(f"{path}.{half}", s, seed=seed) for half, s in enumerate(pair)
            )
    return found


def some(config: DiTConfig = TINY.dit, *, seed: int = 0, alpha: float = 1.5, rank: int = 3) -> Lora:
    return Lora.of(factors(config, rank=rank, seed=seed), alpha=alpha)


def network(config: DiTConfig = TINY.dit, dtype: str = "float32") -> DiT:
    abstract = abstract_part(config, jnp.dtype(dtype))
    arrays = {
        name: jnp.asarray(random_array(name, leaf.shape), leaf.dtype)
        for name, leaf in trees.flatten(abstract).items()
    }
    return trees.fill(abstract, arrays)


def truth(before: DiT, loras: list[tuple[Lora, float]]) -> dict[str, np.ndarray]:
    """Every parameter with the LoRAs added, float64."""
    found = {name: np.asarray(leaf, np.float64) for name, leaf in trees.flatten(before).items()}
    for one, scale in loras:
        for path, pair in one.pairs.items():
            kernel = found[f"{path}.kernel"]
            layers = lora.layers_of(path, kernel.shape)
            for i in np.ndindex(*layers):
                down, up = (np.asarray(half[i], np.float64) for half in (pair.down, pair.up))
                alpha, rank = float(pair.alpha[i]), int(pair.rank[i])
                delta = down.reshape(-1, down.shape[-1])[:, :rank] @ up[:rank]
                if rank:
                    kernel[i] += (scale * alpha / rank * delta).reshape(kernel[i].shape)
        for name, diff in one.diffs.items():
            found[name] += scale * np.asarray(diff, np.float64)
    return found


def same(one: Lora, two: Lora) -> None:
    """Raise if the two are not the same bit for bit."""
    assert one.pairs.keys() == two.pairs.keys()
    assert one.diffs.keys() == two.diffs.keys()
    for path, pair in one.pairs.items():
        for field in dataclasses.fields(Pair):
            mine, theirs = getattr(pair, field.name), getattr(two.pairs[path], field.name)
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs, err_msg=path)
    for name, diff in one.diffs.items():
        np.testing.assert_array_equal(diff, two.diffs[name], err_msg=name)


def differs(one: Mapping[str, np.ndarray], two: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: relative_l2(one[name], two[name]) for name in one}


def arrays(net: DiT) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in trees.flatten(net).items()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A LoRA for the tiny network in ComfyUI's naming, with alphas."""
    path = tmp_path / "style.safetensors"
    lora.write(path, some(), naming="comfyui")
    return path


# Names


NANO = {"t2v": NANO_T2V.dit, "i2v": NANO_I2V.dit, "flf2v": NANO_FLF2V.dit}


@pytest.mark.parametrize("naming", lora_names.NAMES)
@pytest.mark.parametrize("kind", NANO)
def test_every_product_of_every_kind_goes_out_and_comes_back(
    kind: str, naming: str, tmp_path: Path
) -> None:
    config, path = NANO[kind], tmp_path / "a.safetensors"
    whole = some(config, alpha=1.7)  # no float32 number
    assert len(whole.pairs) == sum(name.endswith(".kernel") for name in shapes(config))
    lora.write(path, whole, naming=naming)
    same(lora_files.read(path, config), whole)
    with safe_open(path, framework="numpy") as handle:
        names = list(handle.keys())
    products = sum(config.num_layers if p.startswith("layers.") else 1 for p in whole.pairs)
    assert len(names) == products * (3 if naming == "comfyui" else 2)


def as_kohya(name: str) -> str:
    module, end = re.fullmatch(r"diffusion_model\.(.+?)(\.lora_.*|\.alpha)", name).groups()
    return f"lora_unet_{module.replace('.', '_')}{end}"


STYLES = {
    "kohya": ("comfyui", as_kohya),
    "comfyui, A and B": (
        "comfyui",
        lambda n: n.replace("lora_down", "lora_A").replace("lora_up", "lora_B"),
    ),
    "original, bare": ("comfyui", lambda n: n.removeprefix("diffusion_model.")),
    "diffusers, bare": ("diffusers", lambda n: n.removeprefix("transformer.")),
    "peft": ("diffusers", lambda n: "base_model.model." + n.removeprefix("transformer.")),
    "diffusers, default": ("diffusers", lambda n: n.replace(".weight", ".default.weight")),
    "original, default": (
        "comfyui",
        lambda n: n.replace("down.weight", "down.default.weight").replace(
            "up.weight", "up.default.weight"
        ),
    ),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_all_namings_read_to_the_same(kind: str, style: str, tmp_path: Path) -> None:
    naming, rename = STYLES[style]
    config, path = KINDS[kind], tmp_path / "a.safetensors"
    whole = some(config, alpha=3.0)  # the rank: what a file without an alpha means
    lora.write(path, whole, naming=naming)
    save_file({rename(name): array for name, array in load_file(path).items()}, path)
    same(lora_files.read(path, config), whole)


def test_the_names_are_those_that_other_programs_write(tmp_path: Path) -> None:
    whole = some(TINY_I2V.dit)
    wanted = {
        "diffusers": {
            "transformer.blocks.1.attn1.to_q.lora_A.weight": (3, 32),
            "transformer.blocks.1.attn2.to_out.0.lora_B.weight": (32, 3),
            "transformer.blocks.0.attn2.add_k_proj.lora_A.weight": (3, 32),
            "transformer.blocks.0.ffn.net.0.proj.lora_B.weight": (64, 3),
            "transformer.condition_embedder.time_proj.lora_B.weight": (192, 3),
            "transformer.condition_embedder.image_embedder.ff.net.2.lora_A.weight": (3, 16),
            "transformer.patch_embedding.lora_A.weight": (3, 36, 1, 2, 2),
            "transformer.patch_embedding.lora_B.weight": (32, 3, 1, 1, 1),
        },
        "comfyui": {
            "diffusion_model.blocks.1.self_attn.q.lora_down.weight": (3, 32),
            "diffusion_model.blocks.1.cross_attn.o.lora_up.weight": (32, 3),
            "diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": (3, 32),
            "diffusion_model.blocks.0.ffn.0.lora_up.weight": (64, 3),
            "diffusion_model.blocks.0.ffn.0.alpha": (),
            "diffusion_model.time_projection.1.lora_up.weight": (192, 3),
            "diffusion_model.img_emb.proj.3.lora_down.weight": (3, 16),
            "diffusion_model.head.head.lora_up.weight": (64, 3),
        },
    }
    for naming, names in wanted.items():
        lora.write(tmp_path / "a.safetensors", whole, naming=naming)
        found = load_file(tmp_path / "a.safetensors")
        assert {name: found[name].shape for name in names} == names


def test_flat_names_are_all_different() -> None:
    for rules in (dit.TABLE.rules, dit.EVERY.rules):
        names = {rule.wan.rpartition(".")[0] for rule in rules}
        assert len({name.replace(".", "_") for name in names}) == len(names)


# What a file holds


def test_layers_may_differ_or_be_left_out(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY.dit, num_layers=4)
    tensors: Tensors = {}
    for i, rank, alpha in ((0, 2, 1.0), (2, 5, None), (3, 1, 8.0)):
        module = f"diffusion_model.blocks.{i}.self_attn.q"
        tensors[f"{module}.lora_down.weight"] = random_array(f"down{i}", (rank, 32))
        tensors[f"{module}.lora_up.weight"] = random_array(f"up{i}", (32, rank))
        if alpha is not None:
            tensors[f"{module}.alpha"] = np.float32(alpha).reshape(1)
    save_file(tensors, tmp_path / "a.safetensors")
    found = lora_files.read(tmp_path / "a.safetensors", config)
    pair = found.pairs["layers.self_attn.q"]
    assert pair.down.shape == (4, 32, 5)
    assert pair.rank.tolist() == [2, 0, 5, 1]
    assert pair.scale.tolist() == [0.5, 0.0, 1.0, 8.0]
    before = network(config)
    after = arrays(lora.merge(before, [(found, 1.0)]))
    assert max(differs(after, truth(before, [(found, 1.0)])).values()) <= tolerances.LORA_MERGE
    kernel = arrays(before)["layers.self_attn.q.kernel"]
    np.testing.assert_array_equal(after["layers.self_attn.q.kernel"][1], kernel[1])
    by_hand = kernel[3] + 8.0 * tensors[
        "diffusion_model.blocks.3.self_attn.q.lora_down.weight"
    ].T @ (tensors["diffusion_model.blocks.3.self_attn.q.lora_up.weight"].T)
    assert relative_l2(after["layers.self_attn.q.kernel"][3], by_hand) <= tolerances.LORA_MERGE
    for naming in lora_names.NAMES:
        lora.write(tmp_path / "b.safetensors", found, naming=naming)
        same(lora_files.read(tmp_path / "b.safetensors", config), found)


def test_differences_of_weights_biases_norms_and_modulation(tmp_path: Path) -> None:
    wanted = {  # name in the file: the parameter, the layer, what becomes of the tensor
        "blocks.1.self_attn.norm_q.diff": ("layers.self_attn.norm_q.scale", 1, lambda x: x),
        "blocks.0.norm3.diff": ("layers.norm3.scale", 0, lambda x: x),
        "blocks.0.norm3.diff_b": ("layers.norm3.bias", 0, lambda x: x),
        "blocks.1.ffn.0.diff_b": ("layers.ffn_in.bias", 1, lambda x: x),
        "blocks.1.diff_m": ("layers.modulation", 1, lambda x: x[0]),
        "head.diff_m": ("head_modulation", None, lambda x: x[0]),
        "head.head.diff": ("head_proj.kernel", None, lambda x: x.T),
        "patch_embedding.diff": ("patch.kernel", None, lambda x: x.transpose(2, 3, 4, 1, 0)),
    }
    sizes = {"blocks.1.diff_m": (1, 6, 32), "head.diff_m": (1, 2, 32), "head.head.diff": (64, 32)}
    sizes |= {"patch_embedding.diff": (32, 16, 1, 2, 2), "blocks.1.ffn.0.diff_b": (64,)}
    tensors = {
        f"diffusion_model.{name}": random_array(name, sizes.get(name, (32,))) for name in wanted
    }
    half = "diffusion_model.head.head.lora_"
    tensors[f"{half}down.weight"] = random_array("d", (2, 32))
    tensors[f"{half}up.weight"] = random_array("u", (64, 2))
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    found = lora_files.read(path, TINY.dit)
    assert set(found.diffs) == {target for target, _, _ in wanted.values()}
    for name, (target, layer, change) in wanted.items():
        whole = np.zeros(shapes(TINY.dit)[target], np.float32)
        whole[... if layer is None else layer] = change(tensors[f"diffusion_model.{name}"])
        np.testing.assert_array_equal(found.diffs[target], whole)
    before = network()
    after = arrays(lora.merge(before, [(found, -0.5)]))
    assert max(differs(after, truth(before, [(found, -0.5)])).values()) <= tolerances.LORA_MERGE
    lora.write(tmp_path / "b.safetensors", found, naming="comfyui")
    same(lora_files.read(tmp_path / "b.safetensors", TINY.dit), found)
    with pytest.raises(ValueError, match="no place for the difference of"):
        lora.write(tmp_path / "c.safetensors", found, naming="diffusers")


def test_a_bias_of_peft_is_scaled_with_its_pair(tmp_path: Path) -> None:
    module = "transformer.blocks.1.attn1.to_q"
    tensors = {
        f"{module}.lora_A.weight": random_array("a", (2, 32)),
        f"{module}.lora_B.weight": random_array("b", (32, 2)),
        f"{module}.lora_B.bias": random_array("c", (32,)),
    }
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata=peft(lora_alpha=5, r=2, lora_bias=True))
    found = lora_files.read(path, TINY.dit)
    bias = found.diffs["layers.self_attn.q.bias"]
    np.testing.assert_array_equal(bias[1], np.float32(2.5) * tensors[f"{module}.lora_B.bias"])
    assert not bias[0].any()


def peft(prefix: str = "transformer.", **values: Any) -> dict[str, str]:
    return {lora.METADATA: json.dumps({f"{prefix}{name}": v for name, v in values.items()})}


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_alpha_comes_from_the_header(prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lora.write(path, some(), naming="diffusers")
    tensors = load_file(path)

    def scales(**values: Any) -> dict[str, list[float]]:
        save_file(tensors, path, metadata=peft(prefix, **values))
        pairs = lora_files.read(path, TINY.dit).pairs
        return {name: np.atleast_1d(pair.scale).tolist() for name, pair in pairs.items()}

    assert set(itertools.chain.from_iterable(scales(lora_alpha=6, r=3).values())) == {2.0}
    patterns = {"attn1.to_q": 9, r"blocks\.1\.ffn\.net\.2": 12, "^proj_out": 15, "to_k": 3.0}
    found = scales(lora_alpha=6, r=3, alpha_pattern=patterns)
    assert found["layers.self_attn.q"] == [3.0, 3.0]
    assert found["layers.cross_attn.q"] == [2.0, 2.0]
    assert found["layers.ffn_out"] == [2.0, 4.0]
    assert found["layers.cross_attn.k"] == [1.0, 1.0]
    assert found["head_proj"] == [5.0]
    root = scales(lora_alpha=6, r=3, use_rslora=True)["head_proj"]
    np.testing.assert_allclose(root, 6 / 3**0.5)
    assert scales(r=3)["head_proj"] == [1.0]
    tensors["transformer.proj_out.alpha"] = np.array(12, np.float32)
    assert scales(lora_alpha=6)["head_proj"] == [4.0]


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:blocks)\.(?:0|1)\.(?:attn1)\.(?:to_q)",  # of which "(?:" is no repetition
        r"(?:.*)attn1\.(?P<name>to_q)",
        r"(?=.*to_q).*attn1.*",
        r"(a|b|c|d|e|f|g|h|i|j|k|l|blocks\.\d\.attn1\.to_q)",
        r"blocks\.\d+\.attn1\.[t]{1,2}o_q?",
    ],
)
def test_alpha_has_patterns(pattern: str, file: Path) -> None:
    lora.write(file, some(), naming="diffusers")
    # As many as a file of its own needs; the first that fits counts.
    plain = {rf"^blocks\.{i}\.attn3\.to_q": 1 for i in range(900)}
    header = peft(lora_alpha=6, r=3, alpha_pattern=plain | {pattern: 9, "to_q": 6})
    save_file(load_file(file), file, metadata=header)
    pairs = lora_files.read(file, TINY.dit).pairs
    assert pairs["layers.self_attn.q"].scale.tolist() == [3.0, 3.0]
    assert pairs["layers.cross_attn.q"].scale.tolist() == [2.0, 2.0]


def test_an_alpha_beside_the_file_is_not_left_out_silently(tmp_path: Path) -> None:
    path, beside = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole = some(alpha=6.0)
    lora.write(path, whole, naming="diffusers")
    tensors = {
        n.replace("transformer.", "base_model.model."): a for n, a in load_file(path).items()
    }
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "alpha_pattern": {}}
    save_file(tensors, path)
    for text in (None, json.dumps(config)):
        if text is not None:
            beside.write_text(text)
        assert lora_files.read(path, TINY.dit).pairs["head_proj"].scale.tolist() == 1.0
    for wrong, words in (
        (config | {"lora_alpha": 6}, "has no alpha, and adapter_config.json beside it.* says 6 at"),
        (
            config | {"alpha_pattern": {r"blocks\.1\.attn1\.to_q": 1}},
            r"says 1 at rank 3 of blocks\.1",
        ),
        (config | {"use_rslora": True}, "says 5.19615 at rank 3"),
        (config | {"use_dora": True}, "is a DoRA"),
        ([], "has a damaged adapter_config.json beside it"),
    ):
        beside.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} .*{words}"):
            lora_files.check(path, TINY.dit)
    header = json.dumps(config | {"lora_alpha": 6})
    save_file(tensors, path, metadata={lora.METADATA: header})
    same(lora_files.read(path, TINY.dit), whole)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_and_whole_numbers_are_read(dtype: str, file: Path) -> None:
    tensors = {
        name: array.astype(jnp.dtype(dtype)) if array.ndim else np.int64(6)
        for name, array in load_file(file).items()
    }
    save_file({name: np.asarray(array) for name, array in tensors.items()}, file)
    pair = lora_files.read(file, TINY.dit).pairs["layers.ffn_in"]
    name = "diffusion_model.blocks.1.ffn.0.lora_down.weight"
    np.testing.assert_array_equal(pair.down[1], tensors[name].astype(np.float32).T)
    assert pair.scale.tolist() == [2.0, 2.0]


def test_factors_of_the_patches_may_be_a_product_or_a_convolution(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    whole = Lora.of({"patch": factors(TINY.dit)["patch"]}, alpha=2.0)
    lora.write(path, whole, naming="comfyui")
    tensors = load_file(path)
    name = "diffusion_model.patch_embedding.lora_{}.weight"
    assert tensors[name.format("down")].shape == (3, 16, 1, 2, 2)
    tensors[name.format("down")] = tensors[name.format("down")].reshape(3, -1)
    tensors[name.format("up")] = tensors[name.format("up")].reshape(32, 3)
    save_file(tensors, path)
    same(lora_files.read(path, TINY.dit), whole)


# Errors


Change = Callable[[Tensors], object]
Q = "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({f"{Q}.lora_mid.weight": np.ones((1, 1))}), "none of a LoRA of this"),
        (lambda t: t.update({f"{Q}.dora_scale": np.ones(1)}), r"which has 2 blocks .*dora_scale"),
        (
            lambda t: t.update(
                {f"diffusion_model.blocks.{i}.x.alpha": np.ones(1) for i in range(9)}
            ),
            r"blocks\.0\.x\.alpha, .* 9 in all",
        ),
        (lambda t: t.update({f"{Q[:-1]}norm_q.lora_A.weight": np.ones((1, 1))}), "none of a LoRA"),
        (lambda t: t.pop(f"{Q}.lora_up.weight"), r"both halves .*self_attn\.q\.lora_down"),
        (lambda t: t.pop(f"{Q}.lora_down.weight"), r"both halves .*self_attn\.q\.lora_up"),
        (
            lambda t: t.update({f"{Q}.lora_up.weight": np.ones((32, 4), np.float32)}),
            r"lora_up\.weight has shape \[32, 4\], needed \[32, 3\]",
        ),
        (
            lambda t: t.update(
                {"diffusion_model.head.head.lora_down.weight": np.ones((3, 9), "f")}
            ),
            r"head\.lora_down\.weight has shape \[3, 9\], needed \['rank', 32\]",
        ),
        (
            lambda t: t.update({f"{Q}.lora_down.weight": np.ones((3, 48), "f")}),
            "a network of width 48, and this one has width 32",
        ),
        (lambda t: t.update({f"{Q}.diff_b": np.ones(31, "f")}), r"diff_b has shape \[31\], needed"),
        (lambda t: t.update({f"{Q}.alpha": np.ones(2, "f")}), "alpha is not one number"),
        (lambda t: t.update({f"{Q}.lora_A.weight": np.ones((3, 32), "f")}), "two tensors for one"),
        (lambda t: t.update({f"{Q}.diff_b": np.ones(32)}), "is stored as float64; needed are"),
        (lambda t: t[f"{Q}.lora_up.weight"].fill(np.nan), "damaged: there are NaN .*lora_up"),
        (lambda t: t.update({f"{Q}.alpha": np.array(np.inf)}), "damaged: there are NaN .*alpha"),
        (
            lambda t: t.update({"lora_te_text_model_encoder_layers_0.alpha": np.ones(1)}),
            "changes a text encoder, which is not supported: lora_te_text",
        ),
        (
            lambda t: t.update({"text_encoder.x.lora_A.weight": np.ones(1)}),
            "changes a text encoder",
        ),
        (lambda t: t.clear(), "is empty"),
    ],
)
def test_a_file_that_is_wrong_says_what(change: Change, words: str, file: Path) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} .*{words}"):
        lora_files.read(file, TINY.dit)


def test_another_kind_of_network_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lora.write(path, some(TINY_I2V.dit), naming="diffusers")
    with pytest.raises(ValueError, match="takes an image.*add_k_proj"):
        lora_files.check(path, TINY.dit)
    without = {name: pair for name, pair in factors(TINY.dit).items() if name != "patch"}
    lora.write(path, Lora.of(without, alpha=1.0), naming="diffusers")
    lora_files.check(path, TINY_FLF2V.dit)  # a LoRA for text fits a network with images as well


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("{", "damaged lora_adapter_metadata"),
        ("[]", "damaged lora_adapter_metadata"),
        ('{"lora_alpha": "8"}', "alpha is '8'; a finite number is needed"),
        ('{"lora_alpha": NaN}', "alpha is nan"),
        ('{"alpha_pattern": {"(": 1}}', "damaged lora_adapter_metadata"),
        ('{"alpha_pattern": {"a)(b": 1, "(?i)c": 1}}', "damaged lora_adapter_metadata"),
        ('{"alpha_pattern": {"(.+)+!": 1}}', "too elaborate"),
        ('{"alpha_pattern": {".*.*.*.*!": 1}}', "too elaborate"),
        (f'{{"alpha_pattern": {{"{"a" * 201}": 1}}}}', "too elaborate"),
        ('{"alpha_pattern": {"(?x:(.+) +)!": 1}}', "too elaborate"),
        (r'{"alpha_pattern": {"\\\\*.*.*.*!": 1}}', "too elaborate"),
        (f'{{"alpha_pattern": {{"{"(.|.)" * 13}!": 1}}}}', "too elaborate; .* and 12 alternatives"),
        ('{"alpha_pattern": {".*.*(.|.)(.|.)(.|.)(.|.)(.|.)!": 1}}', "too elaborate"),
        (json.dumps({"alpha_pattern": {f"x{i}": 1 for i in range(1025)}}), "its 1025 .* too many"),
        (
            json.dumps({"alpha_pattern": {f".*.*.*{i}": 1 for i in range(17)}}),
            "its 17 patterns are",
        ),
        (
            '{"alpha_pattern": {"a{99999999999}": 1}}',
            "metadata: the repetition number is too large",
        ),
        (f'{{"lora_alpha": 1{"0" * 400}}}', "damaged lora_adapter_metadata: int too large"),
        ('{"transformer.use_dora": true}', "is a DoRA"),
    ],
)
def test_a_damaged_header_is_named(values: str, words: str, file: Path) -> None:
    save_file(load_file(file), file, metadata={lora.METADATA: values})
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} .*{words}"):
        lora_files.check(file, TINY.dit)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layers.nose": ((2, 32, 3), (2, 3, 32))}, "layers.nose is no part of a DiT"),
        ({"layers.norm3": ((2, 32, 3), (2, 3, 32))}, "layers.norm3 is no part"),
        ({"head_proj": ((32, 3), (4, 64))}, r"shapes \[32, 3\] and \[4, 64\]"),
        ({"layers.ffn_in": ((32, 3), (3, 64))}, r"layers.ffn_in has factors of shapes"),
        ({"layers.ffn_in": ((2, 32, 3), (1, 3, 64))}, r"layers.ffn_in has factors of shapes"),
    ],
)
def test_factors_that_do_not_belong_together_are_refused(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Lora.of({k: tuple(np.zeros(s) for s in pair) for k, pair in given.items()}, alpha=1.0)
    with pytest.raises(ValueError, match="alpha is nan"):
        Lora.of({}, alpha=float("nan"))


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    whole = some()
    broken = Lora.of({"head_proj": (np.full((32, 2), np.nan), np.ones((2, 64)))}, alpha=1.0)
    for args, words in (
        ((tmp_path / "a.bin", whole, "diffusers"), r"a\.bin is no name"),
        ((tmp_path / "a.safetensors", whole, "kohya"), "naming is 'kohya'; one of"),
        ((tmp_path / "a.safetensors", broken, "comfyui"), "not finite: .*head.head.lora_down"),
        ((tmp_path / "a.safetensors", Lora({}), "comfyui"), "is empty"),
    ):
        with pytest.raises(ValueError, match=words):
            lora.write(args[0], args[1], naming=args[2])
    with pytest.raises(OSError):
        lora.write(tmp_path / "none" / "a.safetensors", whole, naming="comfyui")
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_or_stays(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(lora, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        lora.write(file, some(seed=1), naming="comfyui")
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


# Merging


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_equal_float64(kind: str) -> None:
    config = KINDS[kind]
    before = network(config)
    loras = [(some(config), 0.7), (some(config, seed=1, rank=5, alpha=-2.0), 1.3)]
    wanted = truth(before, loras)
    after = arrays(lora.merge(before, loras))
    assert max(differs(after, wanted).values()) <= tolerances.LORA_MERGE
    changed = {
        name for name, leaf in arrays(before).items() if not np.array_equal(leaf, after[name])
    }
    assert changed == {name for name in after if name.endswith(".kernel")}
    for name, leaf in trees.flatten(before).items():  # still there
        np.testing.assert_array_equal(np.asarray(leaf), arrays(network(config))[name])
    used = arrays(lora.merge(network(config), loras, donate=True))
    for name, leaf in used.items():
        np.testing.assert_array_equal(leaf, after[name])


def test_sums_are_rounded_once() -> None:
    before = network(dtype="bfloat16")
    loras = [(some(), 0.7), (some(seed=1), 1.3)]
    wanted = truth(before, loras)
    after = lora.merge(before, loras)
    twice = lora.merge(lora.merge(before, loras[:1]), loras[1:])
    shares: dict[str, list[float]] = {"once": [], "twice": []}
    for word, net in (("once", after), ("twice", twice)):
        for name, leaf in trees.flatten(net).items():
            assert leaf.dtype == trees.flatten(before)[name].dtype
            if name.startswith("layers.") and name.endswith(".kernel"):
                nearest = wanted[name].astype(np.float32).astype(leaf.dtype)
                shares[word].append(float(np.mean(nearest != np.asarray(leaf))))
    assert max(shares["once"]) <= tolerances.LORA_ROUNDED_SHARE
    assert min(shares["twice"]) >= tolerances.LORA_TWICE_ROUNDED_SHARE


def test_a_lora_that_does_not_fit_is_not_merged() -> None:
    with pytest.raises(ValueError, match=r"changes image\.fc1\.kernel .*no such part"):
        lora.merge(network(), [(some(TINY_I2V.dit), 1.0)])
    wide = dataclasses.replace(TINY.dit, dim=48)
    with pytest.raises(ValueError, match=r"the LoRA changes .* of shape .*; the network's is"):
        lora.merge(network(), [(some(wide), 1.0)])


def test_order_and_places_do_not_matter(tmp_path: Path) -> None:
    before = network(dtype="bfloat16")
    files = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for n, path in enumerate(files):
        lora.write(path, some(seed=n), naming="comfyui")
    found, digests = [], set()
    for order in itertools.permutations(zip(files, (0.3, 1.0, -0.7), strict=True)):
        added = adapters.hashed(adapters.chosen(list(order)))
        digests.add(adapters.digest("base", added))
        found.append(
            arrays(adapters.with_loras(lambda: network(dtype="bfloat16"), TINY.dit, added)())
        )
    assert len(digests) == 1
    for other in found[1:]:
        for name, leaf in other.items():
            np.testing.assert_array_equal(leaf, found[0][name])
    del before
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(files[0].read_bytes())
    two = [adapters.digest("", adapters.hashed(adapters.chosen(p))) for p in (copy, files[0])]
    assert two[0] == two[1]


# What users say


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors:-1e-1", ("a.safetensors", -0.1)),
        (r"C:\loras\a.safetensors", (r"C:\loras\a.safetensors", 1.0)),
        (r"C:\loras\a.safetensors:2", (r"C:\loras\a.safetensors", 2.0)),
        ("gs://bucket/a.safetensors", ("gs://bucket/a.safetensors", 1.0)),
        ("gs://bucket/a.safetensors:0", ("gs://bucket/a.safetensors", 0.0)),
        ("a:b:1", ("a:b", 1.0)),
        ("a.safetensors:inf", ("a.safetensors:inf", 1.0)),
        ("a.safetensors:nan", ("a.safetensors:nan", 1.0)),
        ("a.safetensors:", ("a.safetensors:", 1.0)),
        (":1", (":1", 1.0)),
    ],
)
def test_the_scale_is_what_follows_the_last_colon(text: str, wanted: tuple[str, float]) -> None:
    assert adapters.split(text) == wanted


def test_the_forms_that_load_takes(file: Path) -> None:
    one = adapters.Chosen(file, 1.0)
    half = adapters.Chosen(file, 0.5)
    assert adapters.chosen(None) == ()
    assert adapters.chosen([]) == ()
    assert adapters.chosen(file) == adapters.chosen(str(file)) == (one,)
    assert adapters.chosen(f"{file}:0.5") == adapters.chosen((file, 0.5)) == (half,)
    assert adapters.chosen((file, np.float32(0.5))) == (half,)
    assert adapters.chosen([file, f"{file}:0.5", (str(file), 1)]) == (one, half, one)
    assert adapters.chosen((one, half)) == (one, half)
    for wrong, words in (
        ("none.safetensors", "none.safetensors is not there; needed is a .safetensors file"),
        ("Kijai/WanVideo_comfy", "not a hub id"),
        ("", "is not there"),
        ((file, float("inf")), "has scale inf"),
        ([(file, "1")], "has scale '1'"),
        ([(file, True)], "has scale True"),
        ([file, 0.5], r"lora has 0\.5; a path"),
        ([(0.5, file)], "lora has .*; a path"),
    ):
        with pytest.raises(ValueError, match=words):
            adapters.chosen(wrong)
    file.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        adapters.chosen(file)


def test_load_adds_them_again_whenever_the_network_is_read(
    tiny_source: Path, tiny_cache: Path, wan: wan_jax.Wan, file: Path
) -> None:
    def load(choice: Any, **more: Any) -> wan_jax.Wan:
        return wan_jax.load(tiny_source, lora=choice, dtype="float32", cache_dir=tiny_cache, **more)

    plain = wan.network("dit")
    whole = lora_files.read(file, TINY.dit)
    wanted = arrays(lora.merge(plain, [(whole, 0.5)]))
    added = load(f"{file}:0.5", offload=True)
    for _ in range(2):
        found = arrays(added.network("dit"))
        added._resident.clear()
        for name, leaf in found.items():
            np.testing.assert_array_equal(leaf, wanted[name])
    (adapter,) = added.loras
    assert (adapter.path, adapter.scale, len(adapter.sha256)) == (file, 0.5, 64)
    digests = {load(c, offload=True).digest for c in (None, file, f"{file}:0.5", [file, file])}
    assert len(digests) == 4
    assert wan.digest in digests
    assert load((file, 0.5)).digest == added.digest
    video = {"size": (32, 16), "frames": 1, "steps": 1, "seed": 3, "output": "latents"}
    ours, theirs = (w.generate("a fox", **video) for w in (added, wan))
    assert relative_l2(ours, theirs) >= tolerances.PIPELINE_MATTERS
    lora.write(file, some(seed=1), naming="comfyui")
    with pytest.raises(ValueError, match="changed while it was in use"):
        added.network("dit")


def test_load_refuses_a_lora_before_it_converts(tiny_i2v_source: Path, tmp_path: Path) -> None:
    path, cache = tmp_path / "a.safetensors", tmp_path / "cache"
    wide = dataclasses.replace(TINY.dit, dim=48)
    lora.write(path, some(wide), naming="diffusers")
    with pytest.raises(ValueError, match="a network of width 48, and this one has width 32"):
        wan_jax.load(tiny_i2v_source, lora=path, cache_dir=cache)
    assert not cache.exists()


# The scripts


@pytest.fixture
def run(
    tiny_source: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Runs the script's two halves in this process, on the tiny checkpoint, in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> None:
        given = ["--ckpt_dir", str(tiny_source), "--cache_dir", str(tiny_cache), *arguments]
        values = parse(*given, "--dtype", "float32", "--base_seed", "1")
        runner.execute(values, jobs.plan(values, ROOT / "configs"))

    return run


def test_the_record_tells_the_loras_and_skipping_knows_them(
    run: Run, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.safetensors"
    lora.write(other, some(seed=1), naming="diffusers")
    both = ("--lora", f"{file}:0.5", "--lora", str(other))
    run("--save_file", "a.png", "--frame_num", "1", *both)
    record = json.loads((tmp_path / "a.png.json").read_text())
    assert [(x["path"], x["scale"]) for x in record["loras"]] == [(str(file), 0.5), (str(other), 1)]
    assert all(len(x["sha256"]) == 64 for x in record["loras"])
    shot = ("--save_file", "a.png", "--frame_num", "1", "--skip_existing")

    def skips(*arguments: str) -> bool:
        capsys.readouterr()
        run(*shot, *arguments)
        return "skipped a.png" in capsys.readouterr().err

    assert skips(*both)
    assert skips("--lora", str(other), "--lora", f"{file}:0.5")  # the same sum
    assert not skips(*both[:2])
    assert not skips("--lora", f"{file}:0.6")
    assert not skips()
    assert "loras" not in json.loads((tmp_path / "a.png.json").read_text())
    assert skips()
    assert not skips(*both)


def test_skipping_knows_loras_where_the_checkpoint_is_not_converted(
    tiny_source: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def left(*arguments: str) -> int:
        given = ("--ckpt_dir", str(tiny_source), "--cache_dir", str(tmp_path / "cache"))
        values = parse(*given, "--save_file", "a.png", "--frame_num", "1", "--base_seed", "1",
                       "--skip_existing", *arguments)  # fmt: skip
        return len(jobs.plan(values, ROOT / "configs").jobs)

    values = parse("--ckpt_dir", str(tiny_source), "--save_file", "a.png", "--frame_num", "1",
                   "--base_seed", "1")  # fmt: skip
    (job,) = jobs.plan(values, ROOT / "configs").jobs
    (adapter,) = adapters.hashed(adapters.chosen(file))
    told = {"versions": {}, "checkpoint": str(tiny_source), **job.settings}
    told["loras"] = [{"path": "elsewhere", "scale": 1.0, "sha256": adapter.sha256}]
    job.output.write_bytes(b"image")
    Path("a.png.json").write_text(json.dumps(told))
    assert left("--lora", str(file)) == 0
    assert left("--lora", f"{file}:0.5") == 1
    assert left() == 1
    Path("a.png.json").write_text(json.dumps(told | {"loras": 5}))
    assert left("--lora", str(file)) == 1


def test_a_state_is_taken_up_only_with_the_same_loras(
    run: Run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shot = ("--save_file", "a.npz", "--frame_num", "1", "--resume_dir", "states")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(wan_jax.Wan, "decode", fail)
        with pytest.raises(OSError, match="disk full"):
            run(*shot, "--lora", str(file))
    for arguments, taken in (
        ((), False),
        (("--lora", f"{file}:0.5"), False),
        (("--lora", str(file)), True),
    ):
        capsys.readouterr()
        run(*shot, *arguments)
        assert ("taken up after step" in capsys.readouterr().err) is taken


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("none.safetensors", "--lora none.safetensors: .*is not there"),
        ("text.safetensors:0.5", "--lora text.safetensors:0.5: .*not a safetensors file"),
        ("other.safetensors:2", "--lora other.safetensors:2: .*has tensors that are none of"),
    ],
)
def test_a_wrong_lora_is_one_line_before_anything_starts(
    text: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "text.safetensors").write_text("hello, this is no safetensors")
    save_file({"unet.x.lora_A.weight": np.ones((1, 1))}, tmp_path / "other.safetensors")
    done = script("--lora", text, "--cache_dir", str(tmp_path / "cache"), cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert re.search(words, line)
    assert not (tmp_path / "cache").exists()
