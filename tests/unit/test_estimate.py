"""What --plan knows: targets, what a video needs of them, whether it fits, what would make it."""

import dataclasses
import os
from typing import Any

import jax
import pytest

from tests import tolerances
from tests.unit.conftest import TINY
from wan_jax import plans, request
from wan_jax.config import I2V_14B, NANO_FLF2V, NANO_T2V, T2V_1_3B, T2V_14B, WanConfig
from wan_jax.planning import changes, estimate, memory, needs, programs, targets
from wan_jax.planning.estimate import Estimate
from wan_jax.planning.memory import Work
from wan_jax.planning.needs import Case
from wan_jax.planning.targets import Target
from wan_jax.plans import Plan

GIB = 2**30
NANO = Work((5, 12, 16, 16), 20)
LARGE = Work((21, 90, 160, 16), 50)
SMALL = Work((21, 60, 104, 16), 50)
WIDE = Work((21, 180, 320, 16), 50)
HUGE = Work((21, 900, 1600, 16), 50)


def case_of(config: WanConfig, work: Work, target: Target, **options: Any) -> Case:
    """A case with the plan that is chosen; options of the plan or of the case."""
    split = {k: options.pop(k) for k in ("dit_fsdp", "t5_fsdp") if k in options}
    heads = config.dit.num_heads
    plan = plans.choose(target.number, heads=heads, branches=work.branches, **split)
    return Case(config, work, plan, target, **options)


def named(config: WanConfig, work: Work, name: str, **options: Any) -> Estimate:
    """By formula alone."""
    case = case_of(config, work, targets.parse(name), **options)
    return estimate.estimate(case, compiled=())


def here(memory: int = 64 * GIB) -> Target:
    """Four of the devices at hand, with so many bytes each."""
    return targets.at_hand()._replace(number=4, memory=memory)


# Targets


@pytest.mark.parametrize(
    ("name", "number", "topology"),
    [
        ("v6e:4x4", 16, "v6e:4x4"),
        ("v5e:2x4", 8, "v5e:2x4"),
        ("v5p:2x2x2", 8, "v5p:2x2x2"),
        ("tpu7x:2x2x1", 8, "tpu7x:2x2x1"),
        ("h100:8", 8, None),
        (" H200:4", 4, None),
        ("a100:1", 1, None),
    ],
)
def test_targets_are_read(name: str, number: int, topology: str | None) -> None:
    found = targets.parse(name)
    assert (found.number, found.topology) == (number, topology)
    assert found.compiles == (topology is not None)
    assert found.chip is not None and found.memory == found.chip.memory


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "plan_target is 'v9:2x2'; one of v5e, v5p, v6e, tpu7x, a100, h100, h200"),
        ("h100", "a colon and its devices are needed: v6e:4x4"),
        ("", "plan_target is ''"),
        ("v6e:4x4x1", "after v6e: 2 numbers of chips is needed"),
        ("v5p:2x2", "after v5p: 3 numbers of chips is needed"),
        ("v6e:0x4", "after v6e: 2 numbers"),
        ("v6e:-2x4", "after v6e: 2 numbers"),
        ("v6e:2x", "after v6e: 2 numbers"),
        ("h100:2x4", "after h100: a number of GPUs is needed"),
        ("h100:0", "a number of GPUs"),
        ("h100:eight", "a number of GPUs"),
    ],
)
def test_names_of_no_target_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        targets.parse(name)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", None),
        ("TPU v4", None),
        ("cpu", None),
    ],
)
def test_devices_are_known_by_their_kind(kind: str, name: str | None) -> None:
    assert targets.chip_of(kind) is (targets.CHIPS[name] if name else None)


def test_larger_targets_are_the_next_that_there_are() -> None:
    names = {
        "v6e:1x1": "v6e:2x2",
        "v6e:2x4": "v6e:4x4",
        "v5p:2x2x1": "v5p:2x2x2",
        "tpu7x:1x1x1": "tpu7x:2x2x1",
        "h100:3": "h100:6",
    }
    for name, expected in names.items():
        assert targets.larger(targets.parse(name)) == targets.parse(expected)
    assert targets.larger(targets.parse("v5e:16x16")) is None
    assert targets.larger(targets.at_hand()) is None


def test_a_gpu_by_name_has_no_devices_to_compile_for() -> None:
    with pytest.raises(ValueError, match="h100:8 is known by its facts only"):
        targets.parse("h100:8").devices()


def test_the_devices_at_hand_are_a_target() -> None:
    found = targets.at_hand()
    assert found.devices() == jax.devices() and found.number == len(jax.devices())
    assert found.compiles and found.chip is None
    assert 0 < found.memory < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_slice_of_a_gpu_at_hand_keeps_its_memory() -> None:
    own = targets.parse("h200:2")._replace(name="2 x NVIDIA H200", memory=7, at_hand=True)
    found = targets.larger(own)
    assert found is not None and (found.name, found.number, found.memory) == ("h200:4", 4, 7)


def test_without_libtpu_a_slice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_has_libtpu", lambda: False)
    with pytest.raises(ValueError, match=r"'v6e:2x4', which libtpu compiles: pip install libtpu"):
        targets.parse("v6e:2x4").devices()


# Work


def test_the_work_of_a_request() -> None:
    choice = {"size": (64, 32), "frames": 9, "steps": 3, "num_videos": 2}
    found = memory.work_of(request.make_request(TINY, ["a cat", "a dog"], **choice))
    assert found == Work((3, 4, 8, 16), 3, branches=2, batch=4, texts=3)
    alone = memory.work_of(request.make_request(TINY, "a cat", guidance=1.0, **choice))
    assert alone == Work((3, 4, 8, 16), 3, branches=1, batch=2, texts=1)


# By formula


@pytest.mark.parametrize(
    ("config", "work", "measured"), [(T2V_14B, LARGE, 10.13), (T2V_1_3B, SMALL, 0.466)]
)
def test_seconds_are_near_those_of_an_h200(config: WanConfig, work: Work, measured: float) -> None:
    """Of a forward; two a step."""
    found = needs.needs(case_of(config, work, targets.parse("h200:1")))["denoise"]
    assert found.seconds is not None
    assert found.seconds / (2 * work.steps) == pytest.approx(measured, rel=tolerances.COSTS_SECONDS)


def test_images_add_their_stages() -> None:
    found = named(I2V_14B, LARGE, "h200:8")
    assert [row.stage for row in found.rows] == list(programs.STAGES)


def test_an_offloaded_network_is_not_there_in_other_stages() -> None:
    resident, offloaded, on_cpu = (
        {row.stage: row.weights for row in named(T2V_14B, LARGE, "h200:1", **how).rows}
        for how in ({}, {"offload": True}, {"text_on_cpu": True})
    )
    assert len(set(resident.values())) == 1
    own = {offloaded[name] for name in ("text", "denoise", "decode")}
    assert sum(own) == resident["text"]
    assert on_cpu["denoise"] == resident["denoise"] - offloaded["text"]


def test_split_weights_take_less_and_are_sent() -> None:
    whole, split = (
        {row.stage: row for row in named(T2V_14B, LARGE, "v6e:4x4", **how).rows}
        for how in ({}, {"dit_fsdp": True, "t5_fsdp": True})
    )
    for name in ("text", "conditions", "denoise"):
        assert split[name].weights < whole[name].weights / 8
        assert split[name].need.sent > whole[name].need.sent
    assert split["decode"].need.sent == whole["decode"].need.sent


SPLIT = {"dit_fsdp": True, "t5_fsdp": True, "offload": True}
CHANGES = [
    ("h100:8", T2V_14B, LARGE, {}, None),
    ("v6e:2x2", T2V_1_3B, SMALL, {}, None),
    ("h100:1", T2V_14B, LARGE, {}, "--offload_model True"),
    ("v6e:2x4", T2V_14B, LARGE, {}, "--dit_fsdp"),
    ("v5e:2x2", T2V_14B, SMALL, {}, "--t5_fsdp --dit_fsdp"),
    ("h100:1", T2V_14B, WIDE, {"offload": True}, "2 devices (h100:2)"),
    ("v5e:1x1", T2V_14B, LARGE, {"offload": True}, "4 devices (v5e:2x2) --dit_fsdp"),
    ("v5e:16x16", T2V_14B, HUGE, SPLIT, "--frame_num 21"),
]


@pytest.mark.parametrize(("name", "config", "work", "options", "change"), CHANGES)
def test_the_smallest_change_is_named(
    name: str, config: WanConfig, work: Work, options: dict[str, Any], change: str | None
) -> None:
    found = named(config, work, name, **options)
    assert found.fits == (change is None)
    if change is not None:
        assert changes.smallest(found) == change


def test_what_nothing_helps_has_no_change() -> None:
    case = case_of(T2V_1_3B, SMALL, targets.parse("a100:1"))
    tiny = case._replace(target=case.target._replace(memory=GIB, chip=None))
    assert changes.smallest(estimate.estimate(tiny, compiled=())) is None


# Compiled


@pytest.mark.parametrize("config", [NANO_T2V, NANO_FLF2V], ids=["t2v", "flf2v"])
@pytest.mark.parametrize("split", [False, True])
def test_every_stage_is_compiled_for_the_devices_at_hand(config: WanConfig, split: bool) -> None:
    case = case_of(config, NANO, here(), dit_fsdp=split, t5_fsdp=split)
    told: list[str] = []
    found = estimate.estimate(case, callback=told.append)
    assert told == [row.stage for row in found.rows]
    assert all(row.compiled and row.activations > 0 for row in found.rows)
    assert all(row.need.seconds is None for row in found.rows)
    assert found.fits


def test_memory_is_the_arguments_what_is_made_and_what_lies_between() -> None:
    """By hand, of the program that makes conditions; it reads a few of the weights."""
    work, plan = NANO._replace(branches=1), Plan(ulysses=2)
    stage = programs.stages(NANO_T2V, work, plan=plan, devices=jax.devices(), dtype="bfloat16")
    made = stage["conditions"]()
    program = made.compile(jax.devices()[0])
    context = NANO_T2V.dit.text_len * NANO_T2V.dit.text_dim * 2
    memory: Any = program.memory_analysis()
    assert memory.argument_size_in_bytes < made.weight_bytes
    found = memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert estimate.used_bytes(made, program) == context + found


def test_one_device_is_a_target() -> None:
    work = NANO._replace(latent_shape=(1, 12, 16, 16), branches=1)
    found = estimate.estimate(
        Case(NANO_T2V, work, Plan(), here(GIB)), compiled=("denoise", "decode")
    )
    assert found.fits
    assert [row.stage for row in found.rows if row.compiled] == ["denoise", "decode"]


@pytest.mark.parametrize("flag", ["t5_fsdp", "dit_fsdp", "offload"])
def test_a_change_that_is_named_makes_the_compiled_programs_fit(flag: str) -> None:
    """The memory is between what the video needs with the flag, by the compiler, and without."""
    deep = dataclasses.replace(NANO_T2V.umt5, ffn_dim=4096, num_layers=24)
    config = dataclasses.replace(NANO_T2V, umt5=deep)
    if flag == "dit_fsdp":
        wide = dataclasses.replace(NANO_T2V.dit, dim=512, ffn_dim=4096, num_layers=6)
        config = dataclasses.replace(NANO_T2V, dit=wide)
    base = case_of(config, NANO, here())
    stages = {"compiled": ("text", "denoise")}
    less = estimate.estimate(case_of(config, NANO, here(), **{flag: True}), **stages)
    more = estimate.estimate(base, **stages)
    assert less.worst.peak < more.worst.peak
    tight = here((less.worst.peak + more.worst.peak) // 2)
    found = estimate.estimate(base._replace(target=tight), **stages)
    change = changes.smallest(found)
    assert not found.fits and change is not None
    options = {name: True for name, text in changes._SWITCHES.items() if text in change}
    again = case_of(config, NANO, tight, **options)
    assert estimate.estimate(again, **stages).fits


def test_a_program_too_large_for_its_device_says_what_it_needs() -> None:
    """As libtpu words it; any other error is one."""
    whole = here()
    made = programs.stages(
        NANO_T2V, NANO, plan=Plan(ulysses=2), devices=whole.devices(), dtype="bfloat16"
    )
    stage = made["denoise"]()

    class Failing:
        def __init__(self, message: str) -> None:
            self.message = message

        def on(self, device: jax.Device, *, streams: bool) -> "Failing":
            raise jax.errors.JaxRuntimeError(self.message)

    message = (
        "RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (45.50G) exceeds available HBM (31.24G)."
    )
    found = estimate.program_bytes(stage._replace(program=Failing(message)), jax.devices()[0])
    assert found == int(45.5 * GIB) - stage.weight_bytes
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
        estimate.program_bytes(stage._replace(program=Failing("another")), jax.devices()[0])
