"""The two drivers, guidance, and what happens when a number or a caller goes wrong.

Where the network's own mathematics does not matter, its place is taken by a function of a line: a
jax.tree_util.Partial is, like a network, a pytree that can be called.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from tests import tolerances
from tests.random_weights import random_array, relative_l2
from wan_jax import sampler, xla
from wan_jax.config import DiTConfig
from wan_jax.dit import Cond, DiT
from wan_jax.sampler import Carry, DivergedError, State, initial_state, sample
from wan_jax.schedulers import COLUMNS, Row, Schedule, make_schedule
from wan_jax.weights import trees

CONFIG = DiTConfig(
    dim=48,
    ffn_dim=80,
    num_heads=2,
    num_layers=2,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    text_len=12,
    freq_dim=32,
)
SHAPE = (2, 3, 4, 6, 4)
STEPS = 4
scan = xla.jit(sampler.sample_scan, static_argnames="implementation")
prepare = xla.jit(DiT.prepare)


def _weights(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Kernels of unit gain: enough of text and time reaches the velocity to be seen."""
    values = random_array(path, shape)
    if not path.endswith("kernel"):
        return values
    rows = shape[1:-1] if path.startswith("layers.") else shape[:-1]
    return values / values.std() / np.sqrt(np.prod(rows)).astype(np.float32)


def _dit(dtype: str) -> DiT:
    kernels = jnp.dtype(dtype)
    module = trees.abstract(lambda: DiT(CONFIG, rngs=nnx.Rngs(0), dtype=kernels))
    leaves = trees.flatten(module)
    arrays = {k: jnp.asarray(_weights(k, v.shape), v.dtype) for k, v in leaves.items()}
    return trees.fill(module, arrays)


@pytest.fixture(scope="module")
def dit() -> DiT:
    return _dit("float32")


def _conds(dit: DiT) -> tuple[Cond, Cond]:
    context = np.random.RandomState(1).standard_normal((3, 7, CONFIG.text_dim))
    context = jnp.asarray(context, jnp.float32)
    return prepare(dit, context[:2]), prepare(dit, context[1:])


def _noise(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).standard_normal(SHAPE), jnp.float32)


def _schedule(solver: str = "unipc", steps: int = STEPS) -> Schedule:
    return make_schedule(solver, steps, shift=5.0)


def _scan(dit: Any, noise: jax.Array, schedule: Schedule, conds: Any, guidance: float) -> Any:
    table = jnp.asarray(schedule.table, jnp.float32)
    return np.asarray(scan(dit, noise, table, conds, jnp.float32(guidance)))


def _line(function: Callable[[Any, Any, Any], Any]) -> Partial:
    """A network with velocity function(x, t of the first member, cond)."""

    def network(
        x: Any, t_b: Any, cond: Any, *, implementation: str | None = None, fetch: None = None
    ) -> Any:
        assert implementation is fetch is None
        assert t_b.shape == x.shape[:1]
        return function(x, t_b[0], cond)

    return Partial(network)


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize(
    ("dtype", "guidance"), [("float32", 5.0), ("float32", 1.0), ("bfloat16", 5.0)]
)
def test_loop_and_scan_give_the_same_bits(dtype: str, guidance: float, solver: str) -> None:
    dit = _dit(dtype)
    conds = _conds(dit)[: 1 if guidance == 1.0 else 2]
    schedule = _schedule(solver)
    looped = np.asarray(sample(dit, _noise(), schedule, conds, guidance=guidance))
    assert looped.shape == SHAPE
    assert looped.dtype == np.float32
    np.testing.assert_array_equal(_scan(dit, _noise(), schedule, conds, guidance), looped)


def test_conditions_and_guidance_matter(dit: DiT) -> None:
    positive, negative = _conds(dit)
    results = [
        sample(dit, _noise(), _schedule(), conds, guidance=guidance)
        for conds, guidance in (
            ((positive, negative), 5.0),
            ((positive, negative), 3.0),
            ((negative, positive), 5.0),
            ((positive,), 1.0),
            ((negative,), 1.0),
        )
    ]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert relative_l2(one, other) > tolerances.SAMPLER_MATTERS


def test_guidance_of_one_in_two_passes_is_the_single_pass(dit: DiT) -> None:
    conds = _conds(dit)
    double = sample(dit, _noise(), _schedule(), conds, guidance=1.0)
    single = sample(dit, _noise(), _schedule(), conds[:1], guidance=1.0)
    assert relative_l2(double, single) <= tolerances.SAMPLER_STEP


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5, -1.0])
def test_guidance_formula(guidance: float) -> None:
    """v = v_neg + g * (v_pos - v_neg), with the prompt's condition first."""
    network = _line(lambda x, t, cond: cond * x + t)
    conds = jnp.float32(3.0), jnp.float32(-2.0)
    x, t = _noise(), jnp.float32(10.0)
    v = sampler.velocity(network, x, t, conds, jnp.float32(guidance))
    wanted = (-2.0 + guidance * 5.0) * np.asarray(x) + 10.0
    np.testing.assert_allclose(v, wanted, rtol=tolerances.SAMPLER_STEP, atol=tolerances.SAMPLER_RUN)


@pytest.mark.parametrize("conds", [(1.0,), (1.0, 2.0)])
def test_passes_of_the_network(conds: tuple[float, ...]) -> None:
    seen: list[float] = []

    def network(x: Any, t: Any, cond: Any) -> Any:
        jax.debug.callback(lambda own: seen.append(float(own)), cond)
        return cond * x

    sample(_line(network), _noise(), _schedule(), jax.tree.map(jnp.float32, conds), guidance=1.0)
    jax.effects_barrier()
    assert sorted(seen) == sorted(conds * STEPS)


def test_both_branches_are_traced_once() -> None:
    traced = []

    def network(x: Any, t: Any, cond: Any) -> Any:
        traced.append(cond)
        return cond * x

    sample(_line(network), _noise(), _schedule(), (jnp.float32(1), jnp.float32(2)), guidance=2.0)
    assert len(traced) == 1


def test_a_step_is_its_row() -> None:
    stream = np.random.RandomState(5)
    row = Row(*stream.uniform(-1, 1, len(COLUMNS)).astype(np.float32))
    x, last, m0, m1, noise = stream.standard_normal((5, *SHAPE)).astype(np.float32)
    state = sampler.State(*map(jnp.asarray, (x, last, m0, m1)))
    network = _line(lambda x, t, cond: cond * x + t)
    after = sampler.step(
        network, state, row, (jnp.float32(0.5),), jnp.float32(1.0), jnp.asarray(noise)
    )
    m = x - row.sigma * (0.5 * x + row.timestep)
    corrected = row.cx * x + row.cl * last + row.c0 * m0 + row.c1 * m1 + row.cm * m
    moved = row.px * corrected + row.pm * m + row.p0 * m0 + row.noise * noise
    for value, wanted in zip(after, (moved, corrected, m, m0), strict=True):
        assert relative_l2(value, wanted) <= tolerances.SAMPLER_STEP


@pytest.mark.parametrize("solver", ["unipc", "unipc_diffusers", "dpm++", "euler"])
def test_a_perfect_network_gives_the_data(solver: str) -> None:
    """The velocity towards one known picture lands on it, whatever the solver."""
    noise = _noise()
    data = jnp.asarray(np.random.RandomState(9).standard_normal(SHAPE), jnp.float32)
    network = _line(lambda x, t, cond: cond[0] - cond[1])
    schedule = make_schedule(solver, 6, shift=3.0)
    start = data + jnp.float32(schedule.sigmas[0]) * (noise - data)
    result = sample(network, start, schedule, ((noise, data),), guidance=1.0)
    assert relative_l2(result, data) <= tolerances.SAMPLER_RUN


def test_nan_weights_name_the_first_step(dit: DiT) -> None:
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), dit)
    with pytest.raises(DivergedError, match=rf"NaN or infinite at step 1 of {STEPS} \(timestep"):
        sample(broken, _noise(), _schedule(), _conds(dit), guidance=5.0)


@pytest.mark.parametrize("step", [1, 3, STEPS])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_the_step_that_diverges_is_named(step: int, value: float) -> None:
    schedule = _schedule()
    t = int(schedule.timesteps[step - 1])

    def network(x: Any, now: Any, cond: Any) -> Any:
        spoilt = x.at[1, 2, 3, 5, 0].set(value)  # a single number of one member
        return jnp.where(now == t, spoilt, x)

    steps: list[int] = []
    with pytest.raises(DivergedError, match=rf"step {step} of {STEPS} \(timestep {t}\)"):
        sample(
            _line(network),
            _noise(),
            schedule,
            (jnp.float32(0.0),),
            guidance=1.0,
            on_step=lambda carry, total: steps.append(carry.done),
        )
    assert steps == list(range(1, step))
    assert issubclass(DivergedError, ArithmeticError)


def test_on_step_sees_every_step_and_its_latents() -> None:
    network = _line(lambda x, t, cond: cond * x)
    conds = (jnp.float32(0.7),)
    seen = []

    def on_step(carry: Carry, steps: int) -> None:
        seen.append((carry.done, steps, np.array(carry.state.x)))

    schedule = _schedule("euler")
    result = sample(network, _noise(), schedule, conds, guidance=1.0, on_step=on_step)
    assert [(i, steps) for i, steps, _ in seen] == [(i, STEPS) for i in range(1, STEPS + 1)]
    np.testing.assert_array_equal(seen[-1][2], result)
    x = np.asarray(_noise())
    sigmas = schedule.sigmas
    for (_, _, latents), high, low in zip(seen, sigmas[:-1], sigmas[1:], strict=True):
        x = x + (low - high) * 0.7 * x
        assert relative_l2(latents, x) <= tolerances.SAMPLER_STEP


@pytest.mark.parametrize("seconds", [0.0, 60.0])
@pytest.mark.parametrize("processes", [1, 2])
def test_quick_steps_are_asked_for_before_the_last_is_told_of(
    seconds: float, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the third on, as the first is never quick; latents that were told of may be kept."""
    monkeypatch.setattr(sampler, "_QUICK", seconds)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    asked: list[int] = []
    told: list[tuple[int, int]] = []
    latents: list[jax.Array] = []
    copy, copied = sampler._jitted_copy, []
    of = sampler.checked_step.of

    def counted(*args: Any) -> Callable[..., Any]:
        run = of(*args)

        def ask(*args: Any, **named: Any) -> Any:
            asked.append(len(asked) + 1)
            return run(*args, **named)

        return ask

    def on_step(carry: Carry, steps: int) -> None:
        told.append((carry.done, len(asked)))
        latents.append(carry.state.x)

    def counted_copy(state: State) -> State:
        copied.append(len(asked))
        return copy(state)

    monkeypatch.setattr(sampler, "_jitted_copy", counted_copy)
    monkeypatch.setattr(sampler.checked_step, "of", counted)
    network = _line(lambda x, t, cond: cond * x)
    last = sample(
        network, _noise(), _schedule(), (jnp.float32(0.7),), guidance=1.0, on_step=on_step
    )
    np.testing.assert_array_equal(latents[-1], last)
    assert len({np.array(x).tobytes() for x in latents}) == STEPS
    # What copies is compiled before the first step.
    assert copied[0] == 0
    quick = seconds > 0 and processes == 1
    ahead = [(1, 1), *((i, i + 1) for i in range(2, STEPS)), (STEPS, STEPS)]
    assert told == (ahead if quick else [(i, i) for i in range(1, STEPS + 1)])


def test_what_on_step_raises_stops_the_loop() -> None:
    steps: list[int] = []

    class StopError(Exception):
        pass

    def on_step(carry: Carry, total: int) -> None:
        steps.append(carry.done)
        if carry.done == 2:
            raise StopError

    network = _line(lambda x, t, cond: cond * x)
    with pytest.raises(StopError):
        sample(network, _noise(), _schedule(), (jnp.float32(0.7),), guidance=1.0, on_step=on_step)
    assert steps == [1, 2]


@pytest.mark.parametrize("steps", [1, 2])
def test_the_callers_noise_stays_usable(steps: int) -> None:
    noise = _noise()
    before = np.array(noise)
    network = _line(lambda x, t, cond: cond * x)
    schedule = _schedule("unipc", steps)
    results = [
        np.asarray(sample(network, noise, schedule, (jnp.float32(0.7),), guidance=1.0))
        for _ in range(2)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(noise, before)


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("done", [0, 1, 3, STEPS])
def test_a_run_that_is_taken_up_again_gives_the_same_bits(solver: str, done: int) -> None:
    network = _line(lambda x, t, cond: cond * jnp.sin(3.0 * x) + x * (t / 1000.0))
    conds, schedule = (jnp.float32(0.7),), _schedule(solver)
    kept: list[Carry] = [Carry(0, State(*map(np.array, initial_state(_noise()))))]

    def on_step(carry: Carry, steps: int) -> None:
        kept.append(Carry(carry.done, State(*map(np.array, carry.state))))

    whole = sample(network, _noise(), schedule, conds, guidance=1.0, on_step=on_step)
    later: list[int] = []
    resumed = sample(
        network,
        kept[done],
        schedule,
        conds,
        guidance=1.0,
        on_step=lambda carry, steps: later.append(carry.done),
    )
    np.testing.assert_array_equal(resumed, whole)
    assert later == list(range(done + 1, STEPS + 1))
