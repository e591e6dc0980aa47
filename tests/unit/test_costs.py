"""What a video costs by formula is what its programs hold."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests import tolerances
from tests.counting import collectives, products
from wan_jax import vae
from wan_jax.config import NANO_FLF2V, NANO_T2V, T2V_1_3B, T2V_14B, VAEConfig, WanConfig
from wan_jax.planning import costs, programs, vae_costs
from wan_jax.planning.memory import Work
from wan_jax.plans import Plan
from wan_jax.weights.sources import abstract_part

GIB = 2**30
F32 = jnp.dtype("float32")
# The kernels are large enough to be split, and the heads divide by 4.
WIDE = dataclasses.replace(
    NANO_T2V, dit=dataclasses.replace(NANO_T2V.dit, dim=128, num_heads=4, ffn_dim=512)
)
TWO_IMAGES = dataclasses.replace(
    NANO_FLF2V, dit=dataclasses.replace(NANO_FLF2V.dit, dim=128, num_heads=4, ffn_dim=512)
)
# 240 tokens, which divide, and 75, which do not.
GRIDS = ((5, 12, 16, 16), (5, 6, 10, 16))
PLANS = (
    Plan(),
    Plan(guidance=2),
    Plan(ulysses=4),
    Plan(guidance=2, ring=2, ulysses=2),
    Plan(ulysses=2, dit_fsdp=True),
    Plan(guidance=2, ulysses=4, dit_fsdp=True, t5_fsdp=True),
)


def traced(config: WanConfig, name: str, *, plan: Plan, grid: tuple[int, ...] = GRIDS[0]) -> object:
    """A stage's program with its arguments, in float32."""
    work = Work((grid[0], grid[1], grid[2], grid[3]), 20)
    made = programs.stages(config, work, plan=plan, devices=jax.devices(), dtype="float32")
    stage = made[name]()
    return stage.program.on(jax.devices()[0]).trace(*stage.arguments, **stage.options)


@pytest.mark.parametrize(
    ("config", "tokens", "attention", "linear"),
    [
        (T2V_1_3B, 32760, 198 + 3, 82),
        (T2V_14B, 32760, 879 + 14, 785),
        (T2V_14B, 75600, 4682 + 32, 1810),
    ],
)
def test_a_forward_of_the_released_models(
    config: WanConfig, tokens: int, attention: float, linear: float
) -> None:
    """TFLOP as reckoned by hand."""
    found = costs.dit(config.dit, tokens).times(1e-12)
    expected = (attention, linear)
    assert found[:2] == pytest.approx(expected, rel=tolerances.COSTS_PRINTED)


def test_the_decoder_of_a_720p_video() -> None:
    found = vae_costs.decode(VAEConfig(), (21, 90, 160, 16)).flops.total
    assert found == pytest.approx(640e12, rel=tolerances.COSTS_PRINTED)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("config", [WIDE, TWO_IMAGES], ids=["t2v", "flf2v"])
def test_products_of_a_step_are_counted_exactly(
    config: WanConfig, plan: Plan, grid: tuple[int, ...]
) -> None:
    images = costs.image_tokens(config.dit, config.clip)
    forward = costs.dit(config.dit, costs.tokens_of(config.dit, grid), images=images, plan=plan)
    found = products(traced(config, "denoise", plan=plan, grid=grid).jaxpr.jaxpr)
    assert found == forward.times(2 // plan.guidance).total


def test_products_of_the_other_stages_are_counted_exactly() -> None:
    images = costs.image_tokens(TWO_IMAGES.dit, TWO_IMAGES.clip)
    assert TWO_IMAGES.clip is not None
    expected = {
        "text": costs.text(TWO_IMAGES.umt5, TWO_IMAGES.dit.text_len),
        "views": costs.views(TWO_IMAGES.clip).times(2),
        "conditions": costs.conditions(TWO_IMAGES.dit, images=images),
    }
    for name, flops in expected.items():
        found = products(traced(TWO_IMAGES, name, plan=Plan()).jaxpr.jaxpr)
        assert found == flops.total, name


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("base", [8, 96])
def test_products_of_the_vae_are_counted_exactly(base: int, count: int) -> None:
    """With few channels, whose convolutions over time go by frames, and with the real ones."""
    config = VAEConfig(base_dim=base)
    network = abstract_part(config, F32)
    latents = jax.ShapeDtypeStruct((1, count, 4, 6, 16), jnp.float32)
    frames = jax.ShapeDtypeStruct((1, 4 * count - 3, 32, 48, 3), jnp.float32)
    shape = latents.shape[1:]
    decoded = products(jax.make_jaxpr(vae.decode)(network, latents).jaxpr)
    assert decoded == vae_costs.decode(config, shape).flops.total
    encoded = products(jax.make_jaxpr(vae.encode)(network, frames).jaxpr)
    assert encoded == vae_costs.encode(config, shape).flops.total


# Of 16 columns among 8 and of 10 among 4, where some are padding.
@pytest.mark.parametrize(("grid", "devices"), [(GRIDS[0], 8), (GRIDS[1], 4)])
@pytest.mark.parametrize("name", ["image", "decode"])
def test_a_share_of_the_columns_costs_what_its_programs_hold(
    name: str, grid: tuple[int, ...], devices: int
) -> None:
    """Of a chunk after the first: what a longer video adds."""
    count, rest = 1 if name == "image" else 2, grid[1:]
    cost = {"image": vae_costs.encode, "decode": vae_costs.decode}[name]
    more, less = (cost(TWO_IMAGES.vae, (n, *rest), devices=devices) for n in (1 + count, 1))
    plan = Plan(guidance=2, ulysses=devices // 2)
    program = traced(TWO_IMAGES, name, plan=plan, grid=(1 + count, *rest))
    assert products(program.jaxpr.jaxpr) == more.flops.total - less.flops.total
    told = [c for c in collectives(program.lower().compile().as_text()) if c.kind != "all-reduce"]
    assert sum(c.sent * c.times for c in told) == more.sent - less.sent


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_bytes_of_a_step_are_those_of_its_collectives(plan: Plan, grid: tuple[int, ...]) -> None:
    """In float32, as the CPU's collectives of bfloat16 are."""
    program = traced(WIDE, "denoise", plan=plan, grid=grid).lower().compile()
    found = sum(c.sent * c.times for c in collectives(program.as_text()))
    network = abstract_part(WIDE.dit, F32)
    expected = costs.step_sent(WIDE.dit, grid, plan=plan, branches=2, network=network, itemsize=4)
    assert found == expected


def test_bytes_of_split_weights_are_those_of_the_collectives() -> None:
    plan = Plan(guidance=2, ulysses=4, dit_fsdp=True, t5_fsdp=True)
    network = abstract_part(WIDE.dit, F32)
    program = traced(WIDE, "conditions", plan=plan).lower().compile()
    found = sum(c.sent * c.times for c in collectives(program.as_text()))
    assert found == costs.conditions_sent(network, 8)
    text = abstract_part(WIDE.umt5, F32)
    program = traced(WIDE, "text", plan=plan).lower().compile()
    found = sum(c.sent * c.times for c in collectives(program.as_text()))
    assert found == costs.sent_weights(text, 8, lambda _: True)


@pytest.mark.parametrize("split", [False, True])
def test_bytes_of_weights_are_those_of_the_arrays(split: bool) -> None:
    layout = Plan(ulysses=4).layout().of_weights(split=split)
    network = abstract_part(WIDE.dit, jnp.dtype("bfloat16"))
    arrays = jax.tree.map(
        lambda leaf, where: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), where),
        network,
        layout.weights(network),
    )
    own = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(arrays))
    assert own == costs.weight_bytes(network, 4 if split else 1)


@pytest.mark.parametrize(
    ("config", "tokens", "plan", "options", "needed"),
    [
        (T2V_14B, 75600, Plan(), {"nvidia": False}, 8.2),  # a TPU v6e
        (T2V_14B, 75600, Plan(), {}, 5.90),
        (T2V_14B, 75600, Plan(), {"quantized": True}, 6.04),
        (T2V_14B, 75600, Plan(ulysses=4), {}, 1.91),
        (T2V_14B, 75600, Plan(guidance=2, ulysses=2), {}, 3.50),
        (T2V_14B, 75600, Plan(ring=2), {}, 3.67),
        (T2V_14B, 75600, Plan(ring=4), {}, 2.52),
        (T2V_14B, 75600, Plan(ring=8), {}, 1.42),
        (T2V_14B, 75600, Plan(ring=2, ulysses=4), {}, 1.19),
        (T2V_14B, 75600, Plan(ulysses=8), {}, 1.16),
        (T2V_1_3B, 32760, Plan(), {}, 1.12),
        (T2V_1_3B, 32760, Plan(), {"quantized": True}, 1.23),
    ],
)
def test_working_memory_is_what_programs_need(
    config: WanConfig, tokens: int, plan: Plan, options: dict[str, bool], needed: float
) -> None:
    """GiB of temporaries of a step of bfloat16, compiled for a v6e and for H200s."""
    options = {"nvidia": True, **options}
    found = costs.dit_working_bytes(config.dit, tokens, plan, **options) / GIB
    assert found == pytest.approx(needed, rel=tolerances.COSTS_MEMORY)
    assert found > needed / tolerances.COSTS_LESS


def test_float32_takes_as_much_on_every_device() -> None:
    one, other = (
        costs.dit_working_bytes(T2V_14B.dit, 75600, Plan(), itemsize=4, nvidia=kind)
        for kind in (False, True)
    )
    assert one == other
