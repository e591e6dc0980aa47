"""The 14B's largest video on slices of TPUs, compiled ahead of time as --plan does.

81 frames of 1280x720, which are 75,600 tokens, both branches of guidance, all layers, the flags as
they are by default. Compiling a step takes a minute of a core, so every run does it for one slice;
with WAN_JAX_ALL_TPUS=1 for all of SLICES. The VAE's decoder takes ten minutes and more (its
convolutions), so it too runs only then; the miniature's is compiled by test_planning. Skipped where
libtpu is not installed.
"""

import functools
import math
import os

import jax
import jax.numpy as jnp
import pytest

from tests import tolerances
from tests.counting import collectives
from tests.tpu_aot.chips import KERNEL
from wan_jax import plans
from wan_jax.config import T2V_14B
from wan_jax.planning import costs, estimate, memory, needs, programs, targets
from wan_jax.planning.memory import Work
from wan_jax.planning.needs import Case
from wan_jax.plans import Plan
from wan_jax.weights import sources

pytest.importorskip("libtpu")

WORK = Work((21, 90, 160, 16), 50)
DIT = T2V_14B.dit
# How the devices share a video; on v6e the weights do not fit beside all else and are split.
SLICES = {
    "v6e:2x4": Plan(guidance=2, ulysses=4, dit_fsdp=True),
    "v6e:4x4": Plan(guidance=2, ulysses=8, dit_fsdp=True),
    "v5p:2x2x1": Plan(guidance=2, ulysses=2),
    "v5p:2x2x4": Plan(guidance=2, ulysses=8),
    "tpu7x:2x2x1": Plan(guidance=2, ulysses=4),
}
ALL = os.environ.get("WAN_JAX_ALL_TPUS") == "1"
COMPILED = tuple(SLICES) if ALL else ("v6e:2x4",)
# XLA copies the stacks of weights into another layout before the scan there: 24 and 8.5 GiB.
_COPIES = ("tpu7x:2x2x1",)


@functools.cache
def case_of(name: str) -> Case:
    """The whole run on a slice, with the plan that is chosen for it."""
    target = targets.parse(name)
    plan = plans.choose(
        target.number,
        heads=DIT.num_heads,
        branches=WORK.branches,
        weights=sources.sizes(T2V_14B, jnp.dtype("bfloat16")),
        memory=target.memory,
    )
    return Case(T2V_14B, WORK, plan, target, offload=True)


@functools.cache
def compiled(name: str, stage: str) -> tuple[programs.Stage, jax.stages.Compiled]:
    """A stage and its program."""
    case = case_of(name)
    devices = case.target.devices()
    made = programs.stages(T2V_14B, WORK, plan=case.plan, devices=devices, dtype=case.dtype)
    found = made[stage]()
    return found, found.compile(devices[0])


def peak_bytes(name: str, stage: str) -> int:
    """On a device, with what lies there beside the program."""
    case = case_of(name)
    used = estimate.used_bytes(*compiled(name, stage))
    held = memory.held(case.setup, case.work) if stage == "denoise" else 0
    return needs.needs(case)[stage].weights + used + held


@pytest.mark.parametrize("name", SLICES)
def test_the_plan_that_is_chosen(name: str) -> None:
    assert case_of(name).plan == SLICES[name]


@pytest.mark.parametrize("stage", ["text", "denoise"])
@pytest.mark.parametrize("name", COMPILED)
def test_it_fits_with_room(name: str, stage: str) -> None:
    used = peak_bytes(name, stage)
    assert used <= tolerances.AOT_ROOM * case_of(name).target.memory
    if stage == "denoise" and name not in _COPIES:
        formula = needs.needs(case_of(name))[stage]
        expected = formula.weights + formula.activations
        assert used == pytest.approx(expected, rel=tolerances.AOT_MEMORY)


@pytest.mark.parametrize("name", COMPILED)
def test_a_step_gathers_weights_and_results_only(name: str) -> None:
    """Of activations an all-gather would be larger than any of these."""
    made, program = compiled(name, "denoise")
    text = text_of(program)
    assert text.count(KERNEL) >= 2  # self-attention and that to the text
    gathered = {c.bytes for c in collectives(text) if c.kind == "all-gather"}
    weights = set()
    if case_of(name).plan.dit_fsdp:
        sizes = {leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made.arguments[0])}
        weights = sizes | {n // DIT.num_layers for n in sizes if n % DIT.num_layers == 0}
    velocity = 4 * WORK.branches * math.prod(WORK.latent_shape)
    tokens = costs.tokens_of(DIT, WORK.latent_shape)
    activation = 2 * tokens * DIT.dim // case_of(name).plan.ulysses
    assert velocity < activation
    assert {n for n in gathered if n > velocity} <= weights


@pytest.mark.parametrize("name", COMPILED)
def test_the_exchange_is_in_the_program(name: str) -> None:
    """Four all-to-alls, each of a device's tokens or heads in bfloat16."""
    _, program = compiled(name, "denoise")
    found = [c for c in collectives(text_of(program)) if c.kind == "all-to-all"]
    tokens = costs.tokens_of(DIT, WORK.latent_shape)
    share = tokens // case_of(name).plan.ulysses * DIT.dim * 2
    assert [c.bytes for c in found] == [share] * 4


@pytest.mark.skipif(not ALL, reason="takes ten minutes and more; WAN_JAX_ALL_TPUS=1 runs it")
@pytest.mark.parametrize("name", SLICES)
def test_the_decoder_fits_with_room(name: str) -> None:
    assert peak_bytes(name, "decode") <= tolerances.AOT_ROOM * case_of(name).target.memory


def text_of(program: jax.stages.Compiled) -> str:
    """The program's text, which libtpu 0.0.52 cannot give for tpu7x."""
    try:
        return program.as_text()
    except jax.errors.JaxRuntimeError as error:
        pytest.skip(f"libtpu gives no text: {str(error).splitlines()[0]}")
