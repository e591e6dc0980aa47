"""From noise to latents: guidance, one pure step of a linear multistep solver, and its two drivers.

A solver is a table of scalars (see schedulers.py), so a step knows no solver. The loop driver is
the product: a Python loop over the jitted step that can show progress, be stopped, and find the
step at which a number went wrong. The scan driver is one program, for benchmarks and ahead-of-time
compilation. On the CPU the two give the same bits.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wan_jax import host_memory, spread, xla
from wan_jax.dit import Cond, DiT
from wan_jax.schedulers import Row, Schedule
from wan_jax.sharding import Layout

Array = jax.Array


class State(NamedTuple):
    """The carry: latents x, the last corrected sample, and two data predictions, newest first."""

    x: Array
    last: Array
    m0: Array
    m1: Array


class Carry(NamedTuple):
    """Where a run stands: the solver steps done, and the state after them."""

    done: int
    state: State


OnStep = Callable[[Carry, int], None]
_QUICK = 2.0  # seconds that a step and its on_step may take; see sample()


class DivergedError(ArithmeticError):
    """Latents became NaN or infinite."""


def initial_state(noise_bthwc: Array) -> State:
    """The carry before the first step; the history is zero and its coefficients are too."""
    zeros = jnp.zeros_like(noise_bthwc)
    return State(noise_bthwc, zeros, zeros, zeros)


def velocity(
    dit: DiT,
    x: Array,
    t: Array | float,
    conds: Sequence[Cond],
    guidance: Array,
    *,
    known: Array | None = None,
    implementation: str | None = None,
) -> Array:
    """Guided velocity [b, t, h, w, c] float32 of x at timestep t (0..1000, a scalar).

    known: [1 or b, t, h, w, channels] that the network reads behind those of x: what an image tells
    of the video, the same in both branches.

    conds holds the prompt's conditions and, unless one pass is meant, the negative prompt's:
    v = v_neg + guidance * (v_pos - v_neg). The branches run in turn, as in the reference: at video
    lengths a doubled batch is no faster and needs twice the memory.
    """
    t_b = jnp.full((x.shape[0],), t, jnp.float32)
    if known is not None:
        x = jnp.concatenate([x, jnp.broadcast_to(known, (*x.shape[:-1], known.shape[-1]))], -1)
    fetch = host_memory.fetch_of(dit)
    run = functools.partial(dit, implementation=implementation, fetch=fetch)
    return spread.in_turn(run, x, t_b, conds, guidance, streams=fetch is not None)


def step(
    dit: DiT,
    state: State,
    row: Row,
    conds: spread.Branches,
    guidance: Array,
    noise: Array | None = None,
    *,
    known: Array | None = None,
    implementation: str | None = None,
    layout: Layout | None = None,
) -> State:
    """One solver step: predict data, correct the sample, move on. `row` holds float32 scalars.

    noise is what a row with a coefficient for it adds; every solver here has zero there. known: as
    velocity() has it. layout: of many devices, for which spread.place() has made conds.
    """
    x, last, m0, m1 = state
    guided: Callable[..., Array] = velocity
    if layout is not None:
        guided = functools.partial(spread.velocity, layout=layout)
    v = guided(dit, x, row.timestep, conds, guidance, known=known, implementation=implementation)
    m = x - row.sigma * v
    corrected = row.cx * x + row.cl * last + row.c0 * m0 + row.c1 * m1 + row.cm * m
    moved = row.px * corrected + row.pm * m + row.p0 * m0
    if noise is not None:
        moved = moved + row.noise * noise
    return State(moved, corrected, m, m0)


# Compiled so that the carry's four parts are buffers of their own: the step donates each.
_jitted_start = xla.jit(initial_state)
_jitted_copy = xla.jit(lambda state: jax.tree.map(jnp.copy, state))


def _checked_step(
    dit: DiT,
    state: State,
    row: Array,
    conds: spread.Branches,
    guidance: Array,
    known: Array | None,
    implementation: str | None = None,
    layout: Layout | None = None,
) -> tuple[State, Array]:
    given = dit, state, _row(row), conds, guidance
    state = step(*given, known=known, implementation=implementation, layout=layout)
    return state, jnp.all(jnp.isfinite(state.x))


# Public for who compiles it ahead of time; its row is a vector, one array to bring to the devices.
checked_step = xla.jit(
    _checked_step,
    attention=True,
    exchanges=True,
    static_argnames=("implementation", "layout"),
    donate_argnames="state",
)


def _row(values: Array) -> Row:
    return Row._make(values[i] for i in range(len(Row._fields)))


def sample(
    dit: DiT,
    start: Array | Carry,
    schedule: Schedule,
    conds: Sequence[Cond],
    *,
    guidance: float,
    known: Array | None = None,
    on_step: OnStep | None = None,
    implementation: str | None = None,
    layout: Layout | None = None,
) -> Array:
    """Latents [b, t, h, w, c] float32 from noise of that shape: the loop driver.

    start: the noise, or where an interrupted run stood, whose bits go on as if it had not been.
    known: as velocity() has it. layout: of the devices to spread it over; the weights lie there as
    layout.weights() says, all else is whole on them.
    on_step(carry, steps) is called after every step; what it raises stops the loop. It may keep
    carry.state.x, but must copy what else of the carry it wants to keep, as the next step may take
    those buffers. Raises DivergedError naming the step whose latents are no longer finite.

    Quick steps do not wait for that, some 2 ms of the host on four GPUs: the next is at work while
    it hears of the last. Who stops a run waits for that one, so slow steps are taken singly.
    """
    done, state = start if isinstance(start, Carry) else (0, start)
    # A copy in any case: what copies is then compiled before a quick step asks for it.
    state = _jitted_copy(state if isinstance(state, State) else _jitted_start(state))
    rows = np.asarray(schedule.table, np.float32)
    given: spread.Branches = tuple(conds)
    scale = jnp.float32(guidance)
    if layout is not None:
        given, scale = spread.place(conds, layout), layout.whole(scale)
    del conds
    # Of several processes one may find a step quick that another does not; a step at work in the
    # first, when both have agreed to stop, would wait for the second's for ever.
    may_be_quick = jax.process_count() == 1
    # For its next step a device waits for as little as can be: the host looks for the program once,
    # brings a single array, and has asked whether the latents are finite before they are there.
    run, quick = checked_step.of(dit, state), False
    untold = _Untold(rows, on_step)
    for i, row in enumerate(rows[done:], start=done + 1):
        begun = time.perf_counter()
        untold.keep()
        state, finite = run(
            dit, state, row, given, scale, known, implementation=implementation, layout=layout
        )
        untold.add(Carry(i, state), finite)
        untold.tell(but=int(quick))
        quick = may_be_quick and time.perf_counter() - begun < _QUICK
    untold.tell()
    return state.x


class _Untold:
    """Steps that have been asked for and that on_step has not heard of, for sample()."""

    def __init__(self, rows: np.ndarray, on_step: OnStep | None) -> None:
        self._rows, self._on_step = rows, on_step
        self._steps: list[tuple[Carry, Array]] = []

    def keep(self) -> None:
        """Outlive the next step. What on_step copied itself would be there after that one only."""
        if self._on_step is not None:
            self._steps = [(Carry(i, _jitted_copy(state)), ok) for (i, state), ok in self._steps]

    def add(self, carry: Carry, finite: Array) -> None:
        finite.copy_to_host_async()
        self._steps.append((carry, finite))

    def tell(self, *, but: int = 0) -> None:
        """Wait for all but so many, and tell of them. DivergedError as sample() has it."""
        while len(self._steps) > but:
            (i, state), finite = self._steps.pop(0)
            if not bool(finite):
                timestep = _row(self._rows[i - 1]).timestep
                raise DivergedError(
                    f"latents became NaN or infinite at step {i} of {len(self._rows)} "
                    f"(timestep {timestep:g}); nothing after it can be right"
                )
            if self._on_step is not None:
                if not self._steps:  # nothing was asked for since, so these are no copies yet
                    state = state._replace(x=jnp.copy(state.x))
                self._on_step(Carry(i, state), len(self._rows))


def sample_scan(
    dit: DiT,
    noise_bthwc: Array,
    table: Array,
    conds: Sequence[Cond],
    guidance: Array,
    *,
    known: Array | None = None,
    implementation: str | None = None,
) -> Array:
    """The same as sample(), to be compiled as one program (xla.jit, implementation static).

    table is a Schedule's, as float32 [steps, columns].
    """

    def body(state: State, values: Array) -> tuple[State, None]:
        given = dit, state, _row(values), tuple(conds), guidance
        return step(*given, known=known, implementation=implementation), None

    state, _ = lax.scan(body, initial_state(noise_bthwc), table)
    return state.x
