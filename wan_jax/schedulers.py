"""Noise schedules and solver steps as tables of scalars, in NumPy float64.

Wan is a rectified flow: x = (1 - sigma) * data + sigma * noise, and the network predicts the
velocity v = noise - data. Every solver here works on the data prediction m = x - sigma * v, and is
linear in what it remembers, so that one step is one row of scalars (`Row`) and the carry is four
arrays (x, last, m0, m1), zeros at the start but for x:

    m  = x - sigma * v(x, timestep)
    c  = cx * x + cl * last + c0 * m0 + c1 * m1 + cm * m
    x' = px * c + pm * m + p0 * m0 + noise * fresh_noise
    x, last, m0, m1 = x', c, m, m0

The mathematics in three lines. With a = 1 - sigma and lambda = ln(a / sigma), the exponential
integrator's factor (1 - s') * (exp(-h) - 1) = a * s' / s - a' is just s' / s - 1: first order is
x' = (s'/s) * x + (1 - s'/s) * m, which is also Euler, and needs no logarithm. The predictors of
UniPC (bh2) and of DPM++ 2M (midpoint) at second order are the same update.

Source: the solvers of Wan2.1 (wan/utils/fm_solvers_unipc.py and fm_solvers.py), the schedule of
Diffusers' UniPCMultistepScheduler with use_flow_sigmas; UniPC, arXiv 2302.04867; DPM-Solver++,
arXiv 2211.01095.
"""

import itertools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SOLVERS = ("unipc", "dpm++", "unipc_diffusers", "euler")
MAX_STEPS = 1000
TIME_SCALE = 1000.0

# The original takes the largest level of its training schedule from a float32 tensor.
_UNIPC_START = float(np.float32(0.999))
_DIFFUSERS_END = 1e-3
_DIFFUSERS_MARGIN = 1e-6
_SMALL_SHIFT = 1e-6
_SERIES_BELOW = 1.0


class Row(NamedTuple):
    """Scalars of one solver step; see the module's docstring for the update they stand in.

    timestep: what the network sees, 0..1000. sigma: noise level, 0..1, exact in float32.
    cx cl c0 c1 cm: corrected sample from x, last, m0, m1, m. px pm p0: next sample from the
    corrected one, m, m0. noise: coefficient of fresh noise, 0 for every solver here.
    """

    timestep: float
    sigma: float
    cx: float
    cl: float
    c0: float
    c1: float
    cm: float
    px: float
    pm: float
    p0: float
    noise: float


COLUMNS = Row._fields


# No generated comparison: == on a dataclass of arrays raises.
@dataclass(frozen=True, eq=False)
class Schedule:
    """A solver's steps, ready to run; the arrays are read-only.

    solver: one of SOLVERS. shift: of the noise levels, unless timesteps were given.
    timesteps: [N] int64, 0..1000; given ones that are no integers are truncated here, not in table.
    sigmas: [N+1] float64 with float32 values, non-increasing, the last one 0.
    table: [N, len(COLUMNS)] float64; row i is Row(*table[i]).
    """

    solver: str
    shift: float
    timesteps: np.ndarray
    sigmas: np.ndarray
    table: np.ndarray


def make_schedule(
    solver: str, steps: int, *, shift: float, timesteps: Sequence[float] | None = None
) -> Schedule:
    """The table of a solver for a number of steps.

    solver: one of SOLVERS. steps: 1..1000. shift: finite and above 0; larger ones spend more steps
    at high noise; not used with timesteps. timesteps: [steps] strictly decreasing values in
    (0, 1000], in place of the solver's own; sigma is then timestep / 1000.

    Raises ValueError for anything else, naming the argument, the value and what is accepted.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is unknown; accepted: {', '.join(SOLVERS)}")
    if not isinstance(steps, numbers.Integral) or isinstance(steps, bool):
        raise ValueError(f"steps={steps!r} is not an integer; accepted: 1 to {MAX_STEPS}")
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps={steps} is out of range; accepted: 1 to {MAX_STEPS}")
    shift_value = _as_float(shift)
    if not (math.isfinite(shift_value) and shift_value > 0):
        raise ValueError(f"shift={shift!r} is not usable; accepted: any finite number above 0")
    if timesteps is None:
        levels = _noise_levels(solver, int(steps), shift=shift_value)
        # Truncated, not rounded: the integer the network was sampled with in the original.
        seen = (levels * TIME_SCALE).astype(np.int64).astype(np.float64)
    else:
        seen = _given_timesteps(timesteps, int(steps))
        levels = seen / TIME_SCALE
    # The original keeps its levels in float32; the coefficients must belong to those values.
    sigmas = np.append(levels, 0.0).astype(np.float32).astype(np.float64)
    schedule = Schedule(
        solver=solver,
        shift=shift_value,
        timesteps=seen.astype(np.int64),
        sigmas=sigmas,
        table=_table(solver, seen, sigmas),
    )
    for array in (schedule.timesteps, schedule.sigmas, schedule.table):
        array.setflags(write=False)
    return schedule


def _as_float(value: object) -> float:
    """value as a float; NaN for what is not a real number or too large for one."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _given_timesteps(timesteps: Sequence[float], steps: int) -> np.ndarray:
    """timesteps as [steps] float64, or ValueError."""
    accepted = f"{steps} (steps) strictly decreasing finite numbers in (0, {TIME_SCALE:g}]"
    try:
        values = np.array(timesteps, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"timesteps={timesteps!r} are not numbers; accepted: {accepted}") from None
    if values.shape != (steps,):
        raise ValueError(
            f"timesteps={timesteps!r} have shape {values.shape} with steps={steps}; "
            f"accepted: {accepted}"
        )
    inside = np.isfinite(values) & (values > 0) & (values <= TIME_SCALE)
    falling = np.append(True, values[1:] < values[:-1])
    if not (inside & falling).all():
        bad = int(np.argmin(inside & falling))
        raise ValueError(
            f"timesteps={timesteps!r}: value {values[bad]:g} at position {bad} is out of range or "
            f"not below the one before; accepted: {accepted}"
        )
    return values


def _noise_levels(solver: str, steps: int, *, shift: float) -> np.ndarray:
    """[steps] float64 noise levels, shifted, before the rounding to float32."""
    # np.linspace, as in the originals: k/N written otherwise differs in the last bit, which
    # truncation turns into a whole timestep (DPM++ at shift 1).
    if solver == "unipc":
        return _shifted(np.linspace(_UNIPC_START, 0.0, steps + 1)[:-1], shift)
    if solver == "unipc_diffusers":
        levels = _shifted(np.linspace(1.0, _DIFFUSERS_END, steps + 1)[:-1], shift)
        levels[0] -= _DIFFUSERS_MARGIN
        # Diffusers would step back up where later levels lie within the margin of 1 (shift 999 at
        # 1000 steps); here they become duplicates of the first one.
        return np.minimum.accumulate(levels)
    return _shifted(np.linspace(1.0, 0.0, steps + 1)[:-1], shift)


def _shifted(levels: np.ndarray, shift: float) -> np.ndarray:
    """shift * s / (1 + (shift - 1) * s) for each s of [N] levels in (0, 1]."""
    if shift < _SMALL_SHIFT:
        # The original's denominator cancels near s = 1 and is 0 at 1e-17. Above the threshold its
        # own form is kept: another one rounds differently, which moves truncated timesteps.
        return shift * levels / ((1.0 - levels) + shift * levels)
    return shift * levels / (1.0 + (shift - 1.0) * levels)


def _table(solver: str, seen: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """[N, len(COLUMNS)] float64 rows for [N] timesteps and [N+1] sigmas."""
    steps = len(seen)
    levels = sigmas.tolist()
    # Rows are addressed by position only. The originals look their first step up by timestep,
    # which starts in the wrong place or fails where two timesteps are equal.
    gains = [_lambda_gain(high, low) for high, low in itertools.pairwise(levels)]
    orders = [1 if solver == "euler" else _order(gains, i) for i in range(steps)]
    correct = solver in ("unipc", "unipc_diffusers")
    rows = []
    for i in range(steps):
        cx, cl, c0, c1, cm = 1.0, 0.0, 0.0, 0.0, 0.0
        if correct and i > 0:
            cx, cl, c0, c1, cm = _corrector(levels, gains, i, order=orders[i - 1])
        px, pm, p0 = _predictor(levels, gains, i, order=orders[i])
        rows.append(Row(float(seen[i]), levels[i], cx, cl, c0, c1, cm, px, pm, p0, 0.0))
    return np.array(rows, dtype=np.float64)


def _lambda_gain(high: float, low: float) -> float:
    """lambda(low) - lambda(high) for noise levels 1 >= high >= low >= 0; inf at either end."""
    if high == low:
        return 0.0
    if high == 1.0 or low == 0.0:
        return math.inf
    # log1p of a quotient without cancellation: close levels keep all their digits.
    return math.log1p((high - low) / ((1.0 - high) * low))


def _order(gains: list[float], i: int) -> int:
    """Order, 1 or 2, of the predictor at step i and of the corrector after it."""
    # The second-order term compares the gains of this step and the one before. A gain of 0
    # (levels equal in float32) or of infinity (from a level of exactly 1, or to 0: the last step)
    # leaves no slope to extrapolate: first order. DPM++ always starts at level 1, and the
    # original's second step, with a slope over an infinite gain, comes to the same.
    usable = i > 0 and 0 < gains[i - 1] < math.inf and 0 < gains[i] < math.inf
    return 2 if usable else 1


def _predictor(
    levels: list[float], gains: list[float], i: int, *, order: int
) -> tuple[float, float, float]:
    """(px, pm, p0) of step i, from levels[i] to levels[i + 1]."""
    if i == len(gains) - 1:
        # Exactly the data prediction, also where the last level underflowed to 0.
        return 0.0, 1.0, 0.0
    if gains[i] == 0:
        # Equal levels: nothing to integrate.
        return 1.0, 0.0, 0.0
    pull = (levels[i] - levels[i + 1]) / levels[i]
    slope = 0.5 * pull * gains[i] / gains[i - 1] if order == 2 else 0.0
    return levels[i + 1] / levels[i], pull + slope, 0.0 - slope


def _corrector(
    levels: list[float], gains: list[float], i: int, *, order: int
) -> tuple[float, float, float, float, float]:
    """(cx, cl, c0, c1, cm) at the start of step i >= 1: UniC, bh2, of the given order."""
    gain = gains[i - 1]
    if gain == 0:
        # The step before was the identity, so there is nothing to correct.
        return 1.0, 0.0, 0.0, 0.0, 0.0
    keep = levels[i] / levels[i - 1]
    pull = (levels[i - 1] - levels[i]) / levels[i - 1]
    if order == 1:
        return 0.0, keep, 0.5 * pull, 0.0, 0.5 * pull
    b1, b2 = _bh2_weights(gain)
    ratio = gains[i - 2] / gain
    older = (b1 - b2) / (1.0 + ratio)
    c1 = -pull * older / ratio
    cm = pull * (b1 - older)
    return 0.0, keep, pull - c1 - cm, c1, cm


def _bh2_weights(gain: float) -> tuple[float, float]:
    """Right-hand sides b1, b2 of UniPC's order conditions for B(h) = exp(-h) - 1, h = gain > 0."""
    # b_k = k! * phi_{k+1}(-h) / phi_1(-h), with phi_k(z) = sum_j z^j / (j + k)!. The closed forms
    # lose three powers of h to cancellation, so small gains sum the series instead.
    if gain < _SERIES_BELOW:
        phi3 = math.fsum((-gain) ** j / math.factorial(j + 3) for j in range(18))
        phi2 = 0.5 - gain * phi3
        phi1 = 1.0 - gain * phi2
    else:
        phi1 = -math.expm1(-gain) / gain
        phi2 = (1.0 - phi1) / gain
        phi3 = (0.5 - phi2) / gain
    return phi2 / phi1, 2.0 * phi3 / phi1
