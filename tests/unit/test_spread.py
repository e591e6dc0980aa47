"""The same video on one device and on many, whatever each of them does."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import wan_jax
from tests import tolerances
from tests.random_weights import random_array, relative_l2
from tests.unit.conftest import TINY, TINY_I2V
from wan_jax import dit as dit_module
from wan_jax import host_memory, plans, sampler, schedulers, sequence, spread, ulysses, xla
from wan_jax.config import DiTConfig
from wan_jax.dit import Cond, DiT
from wan_jax.parts import Parts
from wan_jax.plans import Plan
from wan_jax.sharding import AXES, RING, ULYSSES, Layout
from wan_jax.stack import scan_by_kernels
from wan_jax.weights import miniature, trees

HEADS = 12
CONFIG = DiTConfig(
    dim=96, ffn_dim=128, num_heads=HEADS, num_layers=2, text_dim=16, text_len=16, freq_dim=32
)
# 5 x 3 x 5 tokens divide by none of these numbers of devices but 3 and 5, 2 x 6 x 4 by all but 5.
GRIDS = {"75 tokens": (5, 6, 10), "48 tokens": (2, 12, 8)}
PLANS = [
    Plan(guidance=2),
    Plan(ulysses=2),
    Plan(ring=2),
    Plan(ulysses=4),
    Plan(ring=4),
    Plan(ulysses=6),
    Plan(ring=5),
    Plan(guidance=2, ulysses=2),
    Plan(guidance=2, ring=2, ulysses=2),
    Plan(guidance=2, ulysses=4),
    Plan(ring=2, ulysses=4),
    Plan(ring=8),
    Plan(batch=2, guidance=2, ulysses=2),
]
BATCH = 2


def layout_of(plan: Plan, *, split: bool = False) -> Layout:
    return plan.layout()._replace(small=64).of_weights(split=split)


@pytest.fixture(scope="module")
def dit() -> DiT:
    return network(CONFIG)


def network(config: DiTConfig) -> DiT:
    abstract = trees.abstract(lambda: DiT(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    shapes = {name: leaf.shape for name, leaf in trees.flatten(abstract).items()}
    return trees.fill(abstract, {k: jnp.asarray(random_array(k, v)) for k, v in shapes.items()})


def conditions(dit: DiT, count: int) -> list[Cond]:
    stream = np.random.RandomState(1)
    texts = [stream.standard_normal((BATCH, 16, CONFIG.text_dim)) for _ in range(count)]
    return [dit.prepare(jnp.asarray(text, jnp.float32)) for text in texts]


def noise(grid: str) -> jax.Array:
    stream = np.random.RandomState(2)
    return jnp.asarray(stream.standard_normal((BATCH, *GRIDS[grid], 16)), jnp.float32)


def sample(dit: DiT, grid: str, *, branches: int = 2, layout: Layout | None = None) -> jax.Array:
    """Eight steps."""
    schedule = schedulers.make_schedule("unipc", 8, shift=5.0)
    start, conds = noise(grid), conditions(dit, branches)
    if layout is not None:
        dit, start = jax.device_put(dit, layout.weights(dit)), layout.whole(start)
    return sampler.sample(dit, start, schedule, conds, guidance=3.0, layout=layout)


@pytest.fixture(scope="module")
def alone(dit: DiT) -> dict[str, jax.Array]:
    return {grid: sample(dit, grid) for grid in GRIDS}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_plan_gives_the_same_latents(
    dit: DiT, alone: dict[str, jax.Array], plan: Plan, grid: str
) -> None:
    found = sample(dit, grid, layout=layout_of(plan))
    assert relative_l2(found, alone[grid]) <= tolerances.SPREAD


@pytest.mark.parametrize("plan", [Plan(guidance=2), Plan(guidance=2, ring=2, ulysses=2)], ids=str)
def test_split_weights_give_the_same_latents(
    dit: DiT, alone: dict[str, jax.Array], plan: Plan
) -> None:
    layout = layout_of(plan, split=True)
    placed = jax.device_put(dit, layout.weights(dit))
    large = [leaf for leaf in jax.tree.leaves(placed) if leaf.size >= 64]
    assert all(leaf.addressable_shards[0].data.size * plan.devices == leaf.size for leaf in large)
    found = sample(dit, "75 tokens", layout=layout)
    assert relative_l2(found, alone["75 tokens"]) <= tolerances.SPREAD


def test_as_many_layers_as_devices_are_not_split_among_them() -> None:
    """The biases of the hidden layer, [3, 128], divide among three along the layers alone."""
    dit = network(dataclasses.replace(CONFIG, num_layers=3))
    layout = layout_of(Plan(ulysses=3), split=True)
    placed = jax.device_put(dit, layout.weights(dit))
    assert placed.layers.ffn_in.bias[...].addressable_shards[0].data.shape == (3, 128)
    found = sample(dit, "48 tokens", branches=1, layout=layout)
    alone = sample(dit, "48 tokens", branches=1)
    assert relative_l2(found, alone) <= tolerances.SPREAD


@pytest.mark.parametrize("plan", [Plan(guidance=2, ulysses=2), Plan(ring=2, ulysses=2)], ids=str)
def test_one_branch_gives_the_same_latents(dit: DiT, plan: Plan) -> None:
    """Without guidance, on a mesh that may have devices for it."""
    found = sample(dit, "75 tokens", branches=1, layout=layout_of(plan))
    assert relative_l2(found, sample(dit, "75 tokens", branches=1)) <= tolerances.SPREAD


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("plan", [None, Plan(guidance=2), Plan(ulysses=2), Plan(ring=2)], ids=str)
def test_rows_in_tiles_give_the_same_latents(
    dit: DiT,
    alone: dict[str, jax.Array],
    plan: Plan | None,
    hopper: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a ring where the kernel counts keys at no cost."""
    asked: list[int] = []

    def tile(tokens: int, dtype: jnp.dtype) -> int:
        asked.append(tokens)
        return 64

    monkeypatch.setattr(sequence, "row_tile", tile)
    monkeypatch.setattr(xla, "on_hopper", lambda: hopper)
    jax.clear_caches()  # programs of another tile
    layout = None if plan is None else layout_of(plan)
    found = sample(dit, "75 tokens", layout=layout)
    assert relative_l2(found, alone["75 tokens"]) <= tolerances.SPREAD
    assert set(asked) == (set() if plan == Plan(ring=2) and not hopper else {75})
    jax.clear_caches()


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that write into each other's memory, as GPUs of one process do."""
    monkeypatch.setattr(xla, "writes_to_peers", lambda: True)


@pytest.fixture
def traced_anew() -> Iterator[None]:
    """Without what was traced for devices of another kind, and nothing left behind."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize("plan", [Plan(guidance=2), Plan(batch=2), Plan(batch=2, ring=2)], ids=str)
def test_a_step_is_compiled_once(dit: DiT, plan: Plan) -> None:
    """Latents lie behind it as before it: whole, of every video, on all devices."""
    layout = layout_of(plan)
    found = sample(dit, "48 tokens", layout=layout)
    assert sampler.checked_step.of(dit)._cache_size() == 1
    assert found.sharding.is_fully_replicated
    assert found.sharding.device_set == {*layout.mesh.devices.flat}


@pytest.mark.usefixtures("peers", "traced_anew")
@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan.ulysses > 1], ids=str)
def test_devices_that_write_to_each_other_give_the_same_latents(
    dit: DiT, alone: dict[str, jax.Array], plan: Plan
) -> None:
    found = sample(dit, "75 tokens", layout=layout_of(plan))
    assert relative_l2(found, alone["75 tokens"]) <= tolerances.SPREAD


def written_to_peers(members: int, *qkv: jax.Array) -> jax.Array:
    """What attention is given is added up; one comes from where it lay among all heads."""
    parts = []
    for i, x in enumerate(qkv):
        part, upcoming = ulysses.send(x, qkv[i + 1 :], members, in_place=i == 1)
        assert len(upcoming) == len(qkv) - i - 1
        parts.append(part)
    return ulysses.gather(parts[0].apart(sum(part.joined() for part in parts)))


@pytest.mark.parametrize("members", [2, 3, 8])
def test_devices_that_write_to_each_other_trade_as_others(members: int) -> None:
    layout = layout_of(Plan(ulysses=members))
    where = PartitionSpec(None, ULYSSES)

    def spread_over(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        mapped = jax.shard_map(
            run, mesh=layout.mesh, in_specs=(where,) * 3, out_specs=where, check_vma=False
        )
        return jax.jit(mapped)

    written = spread_over(functools.partial(written_to_peers, members))
    traded = spread_over(functools.partial(ulysses.trade, lambda q, k, v: q + k + v, members))
    stream = np.random.RandomState(members)
    shape = (2, 3 * members, 3 * members, 4)
    qkv = [jnp.asarray(stream.randint(-9, 9, shape), jnp.float32) for _ in range(3)]
    program = str(jax.make_jaxpr(written)(*qkv))
    assert "all_to_all" not in program and "ppermute" in program
    for run in (written, traded):
        np.testing.assert_array_equal(run(*qkv), sum(qkv))
    back = jax.jit(jax.grad(lambda *x: jnp.sum(written(*x) * qkv[0]), argnums=(0, 1, 2)))
    of_each = back(*qkv)
    for gradient in of_each:
        np.testing.assert_array_equal(gradient, qkv[0])


@pytest.mark.usefixtures("peers", "traced_anew")
def test_what_is_made_next_waits_for_what_is_sent() -> None:
    """And not for its journey: one barrier holds both, and what leaves it travels."""
    layout = layout_of(Plan(ulysses=2))

    def send(x: jax.Array, upcoming: jax.Array) -> tuple[jax.Array, jax.Array]:
        parts, upcoming = sequence.Share(8, ulysses=2).send(x, upcoming)
        assert isinstance(parts, Parts) and parts.own.shape == (1, 4, 1, 4)
        return parts.others[0], upcoming

    mapped = jax.shard_map(
        send, mesh=layout.mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
    )
    program = jax.make_jaxpr(mapped)(jnp.ones((1, 4, 2, 4)), jnp.ones(3)).jaxpr
    inner = program.eqns[0].params["jaxpr"]
    equations = {equation.primitive.name: equation for equation in inner.eqns}
    sent, upcoming = equations["optimization_barrier"].outvars
    assert equations["ppermute"].invars == [sent]
    assert inner.outvars == [*equations["ppermute"].outvars, upcoming]


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "plan",
    [Plan(), Plan(guidance=2), Plan(ulysses=2), Plan(ring=2, ulysses=2), Plan(ring=2)],
    ids=str,
)
def test_nvidias_gpus_that_share_tokens_cut_layers_by_kernels(
    dit: DiT,
    alone: dict[str, jax.Array],
    plan: Plan,
    streamed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But not out of the host's memory."""
    taken: list[str] = []

    def counted(*args: Any) -> Any:
        taken.append("kernels")
        return scan_by_kernels(*args)

    monkeypatch.setattr(dit_module, "scan_by_kernels", counted)
    monkeypatch.setattr(xla, "on_nvidia", lambda: True)
    if streamed:
        monkeypatch.setattr(host_memory, "fetch_of", lambda network: lambda layer: layer)
    found = sample(dit, "75 tokens", layout=layout_of(plan))
    assert relative_l2(found, alone["75 tokens"]) <= tolerances.SPREAD
    assert bool(taken) == (plan.ulysses * plan.ring > 1 and not streamed)


@pytest.mark.parametrize(("plan", "guards"), [(Plan(ulysses=6), 2), (Plan(), 0)], ids=str)
def test_queries_and_keys_that_travel_are_made_apart(dit: DiT, plan: Plan, guards: int) -> None:
    """Or one product and one pass make both."""
    layout = layout_of(plan)
    placed = spread.place(conditions(dit, 1), layout)
    run = functools.partial(spread.velocity, layout=layout)
    program = jax.make_jaxpr(run)(dit, noise("75 tokens"), 500.0, placed, jnp.float32(3.0))
    assert str(program).count("optimization_barrier") == guards


def test_each_device_of_the_guidance_holds_its_branch_only(dit: DiT) -> None:
    placed = spread.place(conditions(dit, 2), layout_of(Plan(guidance=2, ulysses=2)))
    assert all(leaf.addressable_shards[0].data.shape[0] == 1 for leaf in jax.tree.leaves(placed))


@pytest.mark.parametrize("tile", [1, 3])
@pytest.mark.parametrize("tokens", [1, 5, 8, 11])
def test_a_share_and_its_join_are_each_others_reverse(tokens: int, tile: int) -> None:
    layout = layout_of(Plan(ring=2, ulysses=2))
    share = sequence.Share(tokens, 2, 2, tile)
    assert share.rows % tile == 0
    x = jnp.arange(3 * tokens, dtype=jnp.float32).reshape(3, tokens)

    def run(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = share.take(x, axis=1)
        assert own.shape == (3, share.rows)
        return own, share.join(own, axis=1)

    out = (PartitionSpec(None, (RING, ULYSSES)), PartitionSpec())
    mapped = jax.shard_map(
        run, mesh=layout.mesh, in_specs=PartitionSpec(), out_specs=out, check_vma=False
    )
    owned, joined = jax.jit(mapped)(x)
    np.testing.assert_array_equal(joined, x)
    np.testing.assert_array_equal(owned[:, :tokens], x)
    assert not np.any(owned[:, tokens:])


# The whole pipeline


@pytest.fixture(scope="module", params=["t2v", "i2v"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("twelve") / request.param
    base = {"t2v": TINY, "i2v": TINY_I2V}[request.param]
    own = dataclasses.replace(base.dit, dim=96, num_heads=HEADS)
    miniature.write(path, config=dataclasses.replace(base, dit=own), seed=4)
    return path


def test_a_video_on_eight_devices_is_that_of_one(source: Path, tmp_path: Path) -> None:
    choice: dict[str, object] = {"steps": 8, "seed": 3, "size": (48, 32)}
    if source.name == "i2v":
        stream = np.random.RandomState(5)
        choice |= {"image": stream.randint(0, 256, (32, 48, 3)).astype(np.uint8), "fit": "crop"}
    own = {"dtype": "float32", "cache_dir": tmp_path}
    wan = wan_jax.load(source, **own)
    plan = plans.choose(8, heads=HEADS, branches=2, dit_fsdp=True, t5_fsdp=True)
    assert (plan.guidance, plan.ulysses) == (2, 4)
    several = wan_jax.load(source, plan=plan, **own)
    expected, found = (w.generate("a cat", output="latents", **choice) for w in (wan, several))
    assert relative_l2(found, expected) <= tolerances.SPREAD
    frames, others = (
        np.concatenate(list(w.decode(expected, dtype="float32")), 1) for w in (wan, several)
    )
    np.testing.assert_allclose(others, frames, atol=tolerances.SPREAD)


# Plans


@pytest.mark.parametrize(
    ("devices", "heads", "branches", "expected"),
    [
        (8, 12, 2, Plan(guidance=2, ulysses=4)),
        (8, 12, 1, Plan(ring=2, ulysses=4)),
        (16, 40, 2, Plan(guidance=2, ulysses=8)),
        (64, 40, 2, Plan(guidance=2, ring=4, ulysses=8)),
        (3, 12, 2, Plan(ulysses=3)),
        (5, 12, 2, Plan(ring=5)),
        (1, 12, 2, Plan()),
    ],
)
def test_plans_are_chosen(devices: int, heads: int, branches: int, expected: Plan) -> None:
    assert plans.choose(devices, heads=heads, branches=branches) == expected


@pytest.mark.parametrize("devices", range(1, 65))
def test_every_number_of_devices_has_a_plan(devices: int) -> None:
    for heads in (12, 40):
        plan = plans.choose(devices, heads=heads, branches=2)
        assert plan.devices == devices and heads % plan.ulysses == 0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ulysses": 8}, "ulysses_size 8 cannot be had with the 12 heads; .*ulysses_size 4"),
        ({"ring": 3}, "ring_size 3 cannot be had with 8 devices; .*ring_size 4"),
        ({"ulysses": 2, "ring": 8}, "cannot be had with 8 devices; the nearest is"),
        ({"ulysses": 0}, "ulysses_size is 0; a positive number"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plans.choose(8, heads=12, branches=2, **sizes)


@pytest.mark.parametrize(
    ("given", "split"),
    [({}, ("umt5",)), ({"t5_fsdp": False, "dit_fsdp": True}, ("dit",)), ({"memory": None}, ())],
)
def test_weights_that_are_large_for_a_device_are_split(
    given: dict[str, Any], split: tuple[str, ...]
) -> None:
    facts = {"weights": {"dit": 3, "umt5": 11, "vae": 12}, "memory": 16} | given
    assert plans.choose(8, heads=12, branches=2, **facts).split == split
    assert plans.choose(1, heads=12, branches=2, **(facts | {"dit_fsdp": False})).split == ()


def test_a_plan_for_more_devices_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="for 16 devices; there are 8"):
        Plan(ulysses=16).layout()


def test_axes_are_in_their_order() -> None:
    assert Plan(batch=1, guidance=2, ring=2, ulysses=2).layout().mesh.axis_names == AXES
