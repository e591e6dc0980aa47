"""A limit of memory: stacks of layers in the host's memory, and the bits they leave alone."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wan_jax
from tests.unit import test_lora
from tests.unit.conftest import TINY, TINY_I2V
from tests.unit.test_estimate import LARGE, case_of
from wan_jax import host_memory, plans, xla
from wan_jax.config import T2V_14B, WanConfig
from wan_jax.planning import budget, memory, programs, targets
from wan_jax.planning.budget import Budget
from wan_jax.planning.command import table
from wan_jax.planning.estimate import estimate, used_bytes
from wan_jax.planning.memory import Setup, Work
from wan_jax.planning.needs import needs
from wan_jax.request import make_request
from wan_jax.weights import lora, miniature, quantization, sources, trees

SHAPE = (2, 2, 4, 16)


def deep(config: WanConfig) -> WanConfig:
    """The configuration with stacks that outweigh all else."""
    return dataclasses.replace(
        config,
        dit=dataclasses.replace(config.dit, dim=64, ffn_dim=512, num_layers=8),
        umt5=dataclasses.replace(config.umt5, ffn_dim=512, num_layers=8),
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deep") / "t2v"
    miniature.write(path, config=deep(TINY), seed=4)
    return path


@pytest.fixture(scope="module")
def i2v_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deep") / "i2v"
    miniature.write(path, config=deep(TINY_I2V), seed=5)
    return path


def limits(config: WanConfig, batch: int = 1, **options: Any) -> dict[tuple[str, ...], int]:
    """{what is streamed: the least memory that a video needs then}."""
    of = Budget(1, Setup(config, **options))
    work = Work(SHAPE, 2, batch=batch)
    choices: list[tuple[str, ...]] = [(), ("umt5",), ("dit",), ("umt5", "dit")]
    return {c: max(budget._sizes(of, work, 1, c).values()) for c in choices}


def kinds(network: Any) -> set[str]:
    """Of memory, in which the matrices of the stack lie."""
    leaves = trees.flatten(network).items()
    return {leaf.sharding.memory_kind for name, leaf in leaves if host_memory.is_streamed(name)}


# The choice


@pytest.mark.parametrize("offload", [False, True])
def test_no_more_is_streamed_than_must_be(offload: bool) -> None:
    setup = Setup(deep(TINY), dtype="float32", offload=offload)
    found = limits(setup.config, dtype="float32", offload=offload)
    work = Work(SHAPE, 2)
    for wanted, limit in found.items():
        chosen = Budget(limit, setup).streamed([work])
        assert found[chosen] <= limit and len(chosen) <= len(wanted)
    assert Budget(max(found.values()), setup).streamed([work]) == ()
    least = min(found.values())
    with pytest.raises(ValueError, match="max_memory is .*; to encode a text takes at least"):
        Budget(least - 1, setup).streamed([work])
    # What is streamed already stays so, and several videos have what all of them need.
    assert Budget(10**12, setup).streamed([work], already=["dit"]) == ("dit",)
    larger = work._replace(latent_shape=(41, 8, 16, 16))
    both = Budget(found[()], setup)
    with pytest.raises(ValueError, match="to denoise 161 frames of 128x64 takes at least"):
        both.streamed([work, larger])


def test_the_released_models_fit_where_they_are_said_to() -> None:
    setup = Setup(T2V_14B, offload=True)
    work = Work((21, 60, 104, 16), 50)
    assert Budget(8 * 10**9, setup).streamed([work]) == ("umt5", "dit")
    assert Budget(24 * 10**9, setup).streamed([work]) == ("dit",)
    assert Budget(80 * 10**9, setup).streamed([work]) == ()
    large = work._replace(latent_shape=(21, 90, 160, 16))
    with pytest.raises(ValueError, match=r"to denoise 81 frames of 1280x720 takes at least 14\."):
        Budget(8 * 10**9, setup).streamed([large])
    assert Budget(12 * 10**9, setup._replace(nvidia=True)).streamed([large]) == ("dit",)
    narrow = Budget(24 * 10**9, setup._replace(nvidia=True, quantize="fp8"))
    assert narrow.streamed([work]) == ()
    assert narrow._replace(limit=12 * 10**9).streamed([work]) == ("dit",)
    with pytest.raises(ValueError, match=r"the DiT of 8 bits takes at least 4\.\d+GB, 3\.6\dGB"):
        narrow._replace(limit=4 * 10**9).streamed([work._replace(latent_shape=(1, 8, 8, 16))])
    streamed = setup._replace(streamed=("dit",))
    assert setup.resident("dit") - streamed.resident("dit") == streamed.brought("dit")
    two = memory.denoise(streamed, work).fetched
    assert 1.0e9 < two < 1.3e9  # two layers without what makes the text's keys and values


# The bits


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_batch_with_guidance_has_the_same_bits(
    dtype: str, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    options: dict[str, Any] = {"dtype": dtype, "cache_dir": tmp_path_factory.mktemp("cache")}
    asked: dict[str, Any] = {"seed": 1, "num_videos": 2, "guidance": 3.0}
    expected = wan_jax.load(source, **options).generate("A fox.", **asked)
    limit = min(limits(deep(TINY), batch=2, dtype=dtype).values())
    wan = wan_jax.load(source, max_memory=limit, **options)
    np.testing.assert_array_equal(wan.generate("A fox.", **asked), expected)
    assert wan.streamed == ("umt5", "dit")
    assert kinds(wan.network("umt5")) == kinds(wan.network("dit")) == {host_memory.KIND}


def test_a_larger_video_makes_a_network_leave_the_device(source: Path, tmp_path: Path) -> None:
    """And it stays in the host's memory for the smaller ones that follow."""
    setup = Setup(deep(TINY), dtype="float32")
    large = Work((12, 16, 26, 16), 2)
    limit = budget._sizes(Budget(1, setup), large, 1, ("dit",))["denoise"]
    wan = wan_jax.load(source, dtype="float32", cache_dir=tmp_path, max_memory=limit)
    assert wan.streamed == () and not wan._resident
    small = make_request(wan.config, "A fox.", seed=1)
    wan.make_room([small])
    assert kinds(wan.network("dit")) == {"device"}
    wan.make_room([make_request(wan.config, "A fox.", seed=1, size=(208, 128), frames=45)])
    assert wan.streamed == ("dit",) and kinds(wan.network("dit")) == {host_memory.KIND}
    wan.make_room([small])
    assert wan.streamed == ("dit",) and kinds(wan.network("dit")) == {host_memory.KIND}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_image_to_video_has_the_same_bits(
    dtype: str, i2v_source: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    options: dict[str, Any] = {"dtype": dtype, "cache_dir": tmp_path_factory.mktemp("cache")}
    image = np.random.RandomState(0).randint(0, 255, (16, 32, 3), np.uint8)
    asked: dict[str, Any] = {"seed": 1, "image": image, "output": "latents"}
    expected = wan_jax.load(i2v_source, offload=True, **options).generate("A fox.", **asked)
    limit = min(limits(deep(TINY_I2V), dtype=dtype, offload=True).values())
    wan = wan_jax.load(i2v_source, offload=True, max_memory=limit, **options)
    np.testing.assert_array_equal(wan.generate("A fox.", **asked), expected)
    assert "umt5" in wan.streamed


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_lora_is_added_on_the_way_to_the_same_bits(
    dtype: str, source: Path, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    lora.write(file, test_lora.some(deep(TINY).dit), naming="diffusers")
    options: dict[str, Any] = {"dtype": dtype, "cache_dir": tmp_path, "lora": (file, 0.7)}
    limit = min(limits(deep(TINY), dtype=dtype).values())
    whole, streamed = (wan_jax.load(source, max_memory=most, **options) for most in (None, limit))
    assert streamed.streamed == ("umt5", "dit")
    found = trees.flatten(streamed.network("dit"))
    assert kinds(streamed.network("dit")) == {host_memory.KIND}
    for name, leaf in trees.flatten(whole.network("dit")).items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(leaf), err_msg=name)


@pytest.mark.parametrize("way", ["at once", "by layers", "streamed"])
def test_weights_of_8_bits_are_made_layer_by_layer_to_the_same_bits(
    way: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRAs added; and so is a video with them."""
    made: list[bool] = []
    in_turn = quantization._in_turn
    monkeypatch.setattr(quantization, "_in_turn", lambda *x: made.append(True) or in_turn(*x))
    file = tmp_path / "a.safetensors"
    lora.write(file, test_lora.some(deep(TINY).dit), naming="diffusers")
    options: dict[str, Any] = {"quantize": "fp8", "cache_dir": tmp_path, "lora": (file, 0.7)}
    of_each = limits(deep(TINY), quantize="fp8")
    limit = {"at once": 10**12, "streamed": min(of_each.values())}.get(way, of_each[()])
    if way == "by layers":
        monkeypatch.setattr(Budget, "by_layers", True)
    whole, limited = (wan_jax.load(source, max_memory=most, **options) for most in (None, limit))
    asked: dict[str, Any] = {"seed": 1, "output": "latents"}
    np.testing.assert_array_equal(
        limited.generate("A fox.", **asked), whole.generate("A fox.", **asked)
    )
    assert ("dit" in limited.streamed) == (way == "streamed")
    assert len(made) == (0 if way == "at once" else len(quantization.PRODUCTS))
    own = trees.flatten(limited.network("dit"))
    assert kinds(limited.network("dit")) == {host_memory.KIND if way == "streamed" else "device"}
    for name, leaf in trees.flatten(whole.network("dit")).items():
        assert own[name].dtype == leaf.dtype
        as_bytes = (np.asarray(x).view(np.uint8) for x in (own[name], leaf))
        np.testing.assert_array_equal(*as_bytes, err_msg=name)


def test_a_layer_is_quantised_without_the_others() -> None:
    config = dataclasses.replace(TINY.dit, dim=256, ffn_dim=2048, num_layers=16)
    layers = sources.abstract_part(config, jnp.dtype(jnp.bfloat16)).layers
    made = jax.eval_shape(quantization._each, layers.ffn_in)
    step = jax.jit(quantization._layer, donate_argnums=1)
    found = step.lower(layers.ffn_in, made, 3).compile().memory_analysis()
    assert found.temp_size_in_bytes <= 12 * 256 * 2048  # a layer's numbers
    assert found.alias_size_in_bytes >= 16 * 256 * 2048  # the stack of 8 bits is written in place


def test_a_plan_tells_how_weights_of_8_bits_are_made() -> None:
    """At once if there is room, else by layers, and of streamed ones a stack before it leaves."""
    small = Work((21, 60, 104, 16), 50)
    case = case_of(T2V_14B, small, targets.parse("h100:1"), quantize="fp8", offload=True)
    found = [
        needs(case._replace(max_memory=limit))["load"].memory
        for limit in (None, 70 * 10**9, 24 * 10**9, 12 * 10**9)
    ]
    assert found[0] == found[1] and found[0].weights > 28e9
    assert found[2].weights < 20e9 and found[2].fetched == 0
    assert found[3].weights < 1e9 and 2.8e9 < found[3].fetched < 2.9e9


def test_kernels_that_do_not_divide_are_made_whole_on_every_device() -> None:
    setups = [Setup(T2V_14B, plans.Plan(ulysses=n, dit_fsdp=True), quantize="fp8") for n in (7, 8)]
    seven, eight = (memory.load_by_layers(setup).working for setup in setups)
    assert seven == 8 * eight


# Several devices


@pytest.mark.parametrize("quantize", [None, "fp8_linear"])
@pytest.mark.parametrize(
    "plan",
    [plans.Plan(ulysses=2, dit_fsdp=True, t5_fsdp=True), plans.Plan(guidance=2)],
    ids=["split", "whole"],
)
def test_devices_that_share_a_video_have_the_same_bits(
    plan: plans.Plan, quantize: str | None, source: Path, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    lora.write(file, test_lora.some(deep(TINY).dit), naming="diffusers")
    dtype = "float32" if quantize is None else "bfloat16"
    options: dict[str, Any] = {"dtype": dtype, "plan": plan, "quantize": quantize}
    limit = min(limits(deep(TINY), **options).values())
    found = []
    for most in (None, limit):
        wan = wan_jax.load(source, max_memory=most, lora=file, cache_dir=tmp_path, **options)
        found.append(wan.generate("A fox.", seed=1, output="latents"))
    assert wan.streamed == ("umt5", "dit") and kinds(wan.network("dit")) == {host_memory.KIND}
    np.testing.assert_array_equal(*found)


# What XLA is told


def test_programs_of_streamed_weights_have_the_options_for_it() -> None:
    option = "xla_gpu_enable_pipelined_host_offloading"
    for platform in ("gpu", "cuda"):
        assert option not in xla.compiler_options(platform)
        options = xla.compiler_options(platform, streams=True)
        assert options[option] is True and set(xla.compiler_options(platform)) < set(options)
        # An option that this jaxlib does not know would be refused.
        assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    assert xla.compiler_options("cpu", streams=True) == xla.compiler_options("cpu")


def test_programs_that_trade_heads_have_the_options_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    option = "xla_gpu_collective_permute_mode"
    for platform in ("gpu", "cuda"):
        assert option not in xla.compiler_options(platform, attention=True)
        options = xla.compiler_options(platform, attention=True, exchanges=True)
        assert options[option] == "COLLECTIVES_PEER_MEMORY"
        assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2  # this jaxlib knows them
    assert xla.compiler_options("cpu", exchanges=True) == xla.compiler_options("cpu")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert xla.compiler_options("gpu", exchanges=True) == xla.compiler_options("gpu")


@pytest.mark.parametrize(("platform", "count"), [("gpu", 1), ("gpu", 2), ("tpu", 1), ("cpu", 1)])
def test_gpus_of_one_process_write_to_each_other(
    monkeypatch: pytest.MonkeyPatch, platform: str, count: int
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(xla, "traced_for", lambda: xla.Traced(platform, ""))
    assert xla.writes_to_peers() == (platform == "gpu" and count == 1)


def test_a_program_is_told_by_where_its_arrays_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    given = xla.compiler_options
    monkeypatch.setattr(
        xla, "compiler_options", lambda *a, **k: asked.append(k["streams"]) or given(*a, **k)
    )
    program = xla.jit(lambda tree: tree["a"] + 1)
    array = jnp.ones(4)
    on_host = jax.device_put(array, array.sharding.with_memory_kind(host_memory.KIND))
    program({"a": array})
    program({"a": on_host})
    program({"a": array})
    assert asked == [False, True]


def test_a_layer_is_brought_only_from_the_host() -> None:
    network = test_lora.network()
    assert host_memory.fetch_of(network) is None
    leaves = {
        name: jax.device_put(leaf, host_memory.where(name, leaf.sharding))
        for name, leaf in trees.flatten(network).items()
    }
    fetch = host_memory.fetch_of(trees.fill(network, leaves))
    assert fetch is not None
    brought = fetch(trees.fill(network, leaves).layers)
    assert kinds(network) == {leaf.sharding.memory_kind for leaf in jax.tree.leaves(brought)}


# --plan


def test_a_plan_tells_what_is_streamed() -> None:
    target = targets.parse("h100:1")
    case = case_of(T2V_14B, LARGE, target, offload=True, max_memory=16 * 10**9)
    found = estimate(case)
    rows = {row.stage: row for row in found.rows}
    assert rows["denoise"].peak <= 16 * 10**9 and case.setup.streamed == ("dit",)
    need = rows["denoise"].need
    assert need.brought == pytest.approx(100 * 40 * 0.6e9, rel=0.02)
    free = needs(case._replace(max_memory=None))["denoise"]
    assert need.seconds == free.seconds  # under the products
    quick = case._replace(work=case.work._replace(latent_shape=(1, 30, 52, 16)))
    assert needs(quick._replace(max_memory=8 * 10**9))["denoise"].seconds == pytest.approx(
        need.brought / 50e9
    )
    text = table(found)
    assert "in the host's memory: dit 26.17 GiB, of which two layers are on a device" in text
    assert "GB come from there at 50 GB/s, under all that is computed" in text


def test_compiled_programs_need_no_less_for_weights_that_are_elsewhere() -> None:
    """Bytes beside the weights of a program for the devices at hand."""
    target = targets.at_hand()._replace(number=1)
    used = []
    for streamed in ((), ("dit",)):
        made = programs.stages(
            deep(TINY),
            Work(SHAPE, 2),
            plan=plans.Plan(),
            devices=target.devices()[:1],
            dtype="float32",
            streamed=streamed,
        )
        stage = made["denoise"]()
        used.append(used_bytes(stage, stage.compile(target.devices()[0])))
    assert used[0] > 0 and used[1] == pytest.approx(used[0], rel=0.5)
