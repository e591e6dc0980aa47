"""wan_jax.schedulers: schedules, coefficients, order of convergence, and the originals' results."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests import tolerances
from tests.random_weights import relative_l2
from wan_jax import schedulers
from wan_jax.schedulers import COLUMNS, SOLVERS, Row, Schedule, make_schedule

GOLDEN = Path(__file__).parents[1] / "golden" / "solvers.npz"
SHIFTS = (1e-300, 1e-30, 1e-6, 0.01, 0.5, 1, 5, 16, 1000, 1e6, 1e12, 1e30, 1e308)
GRID_STEPS = (*range(1, 21), 49, 50, 99, 100, 251, 500, 999, 1000)

# As the original computes them: two first and the last sigma, three first and last timesteps.
DIFFUSERS = "unipc_diffusers"
PRINTED = {
    ("unipc", 50, 5): ((0.99979985, 0.99573237, 0.09250686), (999, 995, 991, 241, 172, 92)),
    ("dpm++", 50, 5): ((1.0, 0.99593496, 0.09259259), (1000, 995, 991, 241, 172, 92)),
    (DIFFUSERS, 50, 5): ((0.99999899, 0.99593908, 0.09677836), (999, 995, 991, 244, 175, 96)),
    ("unipc", 40, 3): ((0.99966645, 0.99118912, 0.07136054), (999, 991, 982, 195, 136, 71)),
    ("dpm++", 40, 3): ((1.0, 0.99152541, 0.07142857), (1000, 991, 982, 195, 136, 71)),
    (DIFFUSERS, 40, 3): ((0.99999899, 0.99153405, 0.07407671), (999, 991, 982, 197, 138, 74)),
    ("unipc", 50, 16): ((0.99993742, 0.99866247, 0.24596445), (999, 998, 997, 504, 399, 245)),
}
UNIPC_50_5 = """
999 995 991 987 982 978 973 968 963 957 952 946 940 934 927 920 913 906 898 890 882 873 863 854 843
833 821 809 796 783 768 753 737 720 701 681 660 636 611 584 555 522 487 448 405 356 302 241 172 92
"""


def integrate(schedule: Schedule, start: np.ndarray, velocity, *, dtype: type) -> np.ndarray:
    """The final sample, with state and rows in dtype; velocity(x, row) -> array like x."""
    x = start.astype(dtype)
    last = m0 = m1 = np.zeros_like(x)
    for values in schedule.table.astype(dtype):
        row = Row(*values)
        m = x - row.sigma * velocity(x, row)
        c = row.cx * x + row.cl * last + row.c0 * m0 + row.c1 * m1 + row.cm * m
        x, last, m0, m1 = row.px * c + row.pm * m + row.p0 * m0, c, m, m0
    return x


def golden() -> tuple[dict, dict[str, np.ndarray]]:
    with np.load(GOLDEN, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return json.loads(str(arrays.pop("facts"))), arrays


FACTS, ARRAYS = golden()
CASE_IDS = [f"{case['solver']}-{case['steps']}-{case['shift']}" for case in FACTS["cases"]]


def test_columns_are_the_rows_fields_in_order():
    names = "timestep sigma cx cl c0 c1 cm px pm p0 noise"
    assert COLUMNS == Row._fields == tuple(names.split())
    schedule = make_schedule("unipc", 7, shift=3.0)
    assert schedule.table.shape == (7, len(COLUMNS))
    for i, row in enumerate(Row(*values) for values in schedule.table):
        assert row.timestep == schedule.timesteps[i]
        assert row.sigma == schedule.sigmas[i]
        assert row.noise == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_arrays_have_the_documented_types_and_are_read_only(solver):
    schedule = make_schedule(solver, np.int64(6), shift=5)
    assert schedule.solver == solver
    assert schedule.timesteps.dtype == np.int64 and schedule.timesteps.shape == (6,)
    assert schedule.sigmas.dtype == np.float64 and schedule.sigmas.shape == (7,)
    assert schedule.table.dtype == np.float64
    np.testing.assert_array_equal(schedule.sigmas, schedule.sigmas.astype(np.float32))
    assert schedule.sigmas[-1] == 0
    for array in (schedule.timesteps, schedule.sigmas, schedule.table):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize(("solver", "steps", "shift"), PRINTED)
def test_printed_reference_values(solver, steps, shift):
    sigmas, timesteps = PRINTED[solver, steps, shift]
    schedule = make_schedule(solver, steps, shift=shift)
    found = schedule.sigmas[[0, 1, -2]]
    np.testing.assert_allclose(found, sigmas, rtol=0, atol=tolerances.SOLVER_PRINTED_DIGIT)
    assert tuple(schedule.timesteps[[0, 1, 2, -3, -2, -1]]) == timesteps


def test_printed_reference_timesteps_in_full():
    schedule = make_schedule("unipc", 50, shift=5.0)
    assert schedule.timesteps.tolist() == [int(word) for word in UNIPC_50_5.split()]


def test_linspace_rounding_of_the_original_is_kept():
    """At shift 1, 52 timesteps in 9 of the step counts 1..50 are one below the exact quotient."""
    moved = []
    for steps in range(1, 51):
        found = make_schedule("dpm++", steps, shift=1).timesteps.tolist()
        exact = [1000 * (steps - k) // steps for k in range(steps)]
        moved += [(steps, a, b) for a, b in zip(exact, found, strict=True) if a != b]
    assert len(moved) == 52 and len({steps for steps, _, _ in moved}) == 9
    assert all(b == a - 1 for _, a, b in moved)
    assert (5, 400, 399) in moved


@pytest.mark.parametrize("key", FACTS["schedules_1_to_1000"])
def test_schedules_equal_the_originals_for_every_number_of_steps(key):
    """Every timestep and sigma of every N from 1 to 1000, through their digest."""
    solver, shift = key.split("/")
    digest = hashlib.sha256()
    for steps in range(1, 1001):
        levels = schedulers._noise_levels(solver, steps, shift=float(shift))
        digest.update((levels * 1000.0).astype("<i8").tobytes())
        digest.update(np.append(levels, 0.0).astype("<f4").tobytes())
    assert digest.hexdigest() == FACTS["schedules_1_to_1000"][key]


@pytest.mark.parametrize("index", range(len(CASE_IDS)), ids=CASE_IDS)
def test_final_sample_of_the_originals(index):
    case = FACTS["cases"][index]
    steps = case["steps"]
    schedule = make_schedule(case["solver"], steps, shift=case["shift"])
    np.testing.assert_array_equal(schedule.timesteps, ARRAYS["timesteps"][index, :steps])
    np.testing.assert_array_equal(schedule.sigmas, ARRAYS["sigmas"][index, : steps + 1])
    a, b, c, d = (ARRAYS[name] for name in "abcd")

    def velocity(x: np.ndarray, row: Row) -> np.ndarray:
        return a * np.tanh(b * x + c * (row.timestep * np.float32(0.001))) + d * x

    final = integrate(schedule, ARRAYS["x"], velocity, dtype=np.float32)
    assert final.dtype == np.float32
    assert np.isfinite(final).all()
    if case["failure"]:
        pytest.skip(f"the original failed here ({case['failure']}); ours is finite")
    assert relative_l2(final, ARRAYS["finals"][index]) <= tolerances.SOLVER_RELATIVE_L2


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shift", SHIFTS)
def test_tables_are_finite_and_consistent_everywhere(solver, shift):
    """Also where the originals fail: level 1, levels or timesteps repeated, levels of 0."""
    for steps in GRID_STEPS:
        schedule = make_schedule(solver, steps, shift=shift)
        assert np.isfinite(schedule.table).all()
        with np.errstate(under="ignore"):
            assert np.isfinite(schedule.table.astype(np.float32)).all()
        assert (np.diff(schedule.sigmas) <= 0).all() and (np.diff(schedule.timesteps) <= 0).all()
        assert schedule.timesteps[-1] >= 0 and schedule.timesteps[0] <= 1000
        columns = Row(*schedule.table.T)
        # A state equal to its own data prediction must stay where it is.
        kept = (
            columns.cx + columns.cl + columns.c0 + columns.c1 + columns.cm,
            columns.px + columns.pm + columns.p0,
        )
        np.testing.assert_allclose(kept, 1, rtol=0, atol=tolerances.SOLVER_FLOAT64)
        assert tuple(schedule.table[-1, -4:]) == (0, 1, 0, 0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_last_step_returns_the_data_prediction(solver):
    for steps in (1, 2, 9):
        predictions = []

        def velocity(x: np.ndarray, row: Row, seen: list = predictions) -> np.ndarray:
            v = np.cos(x) + row.sigma
            seen.append(x - row.sigma * v)
            return v

        schedule = make_schedule(solver, steps, shift=3.0)
        final = integrate(schedule, np.linspace(-2, 2, 9), velocity, dtype=np.float32)
        assert len(predictions) == steps
        np.testing.assert_array_equal(final, predictions[-1])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("level", [1.0, 0.6, 0.0])
def test_repeated_level_is_an_identity_step_and_drops_to_first_order(solver, level):
    sigmas = {1.0: [1, 1, 0.7, 0.5, 0.2, 0], 0.6: [0.9, 0.6, 0.6, 0.5, 0.2, 0]}
    sigmas[0.0] = [0.9, 0.6, 0.0, 0.0, 0.0, 0]
    values = np.array(sigmas[level], np.float64)
    rows = [Row(*row) for row in schedulers._table(solver, 1000 * values[:-1], values)]
    assert np.isfinite(rows).all()
    repeat = int(np.argmax(values[1:] == values[:-1]))
    assert (rows[repeat].px, rows[repeat].pm, rows[repeat].p0) == (1, 0, 0)
    after = rows[repeat + 1]
    assert (after.cx, after.cl, after.c0, after.c1, after.cm) == (1, 0, 0, 0, 0)
    assert after.p0 == 0
    # A slope is back once two finite gains follow one another; the gain out of level 1 is infinite.
    second = {1.0: 3, 0.6: 3, 0.0: None}[level]
    for i, row in enumerate(rows):
        assert (row.p0 != 0) == (i == second and solver != "euler")


def test_level_one_needs_no_logarithm():
    """From pure noise the first step is first order, and the second has no slope to use."""
    for solver in ("unipc", "dpm++"):
        table = make_schedule(solver, 4, shift=1.0, timesteps=[1000, 700, 400, 200]).table
        rows = [Row(*row) for row in table]
        level = float(np.float32(0.7))
        found = (rows[0].px, rows[0].pm, rows[1].p0, rows[2].c1)
        assert found == (level, 1 - level, 0, 0)
        assert rows[2].c0 == rows[2].cm
        assert rows[2].p0 != 0


class Gaussian:
    """Data N(mean, spread^2), where velocity and trajectory have closed forms; [7] elements."""

    mean = 0.3
    spread = np.linspace(0.3, 1.5, 7)
    start = np.linspace(-1.7, 2.1, 7)

    def deviation(self, sigma: float) -> np.ndarray:
        return np.sqrt(((1 - sigma) * self.spread) ** 2 + sigma**2)

    def velocity(self, x: np.ndarray, row: Row) -> np.ndarray:
        centred = (x - (1 - row.sigma) * self.mean) / self.deviation(row.sigma) ** 2
        data = self.mean + (1 - row.sigma) * self.spread**2 * centred
        return (x - data) / row.sigma

    def exact(self, first: float, sigma: float) -> np.ndarray:
        """Where the trajectory through start at the first noise level is at another."""
        scale = self.deviation(sigma) / self.deviation(first)
        return (1 - sigma) * self.mean + scale * (self.start - (1 - first) * self.mean)


@pytest.mark.parametrize(("solver", "order"), list(zip(SOLVERS, (3, 2, 3, 1), strict=True)))
def test_order_of_convergence_over_a_smooth_stretch(solver, order):
    """From sigma 0.9 to 0.1, without the last step; UniPC's corrector adds one to its order."""
    flow = Gaussian()
    errors = []
    for steps in (80, 160, 320):
        given = np.linspace(900, 100, steps)
        schedule = make_schedule(solver, steps, shift=1, timesteps=given)
        states = []

        def velocity(x: np.ndarray, row: Row, seen: list = states) -> np.ndarray:
            seen.append(x)
            return flow.velocity(x, row)

        integrate(schedule, flow.start, velocity, dtype=np.float64)
        exact = flow.exact(schedule.sigmas[0], schedule.sigmas[-2])
        errors.append(relative_l2(states[-1], exact))
    ratios = np.array(errors[:-1]) / errors[1:]
    np.testing.assert_allclose(ratios, 2.0**order, rtol=tolerances.SOLVER_ORDER_RATIO)


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "unipc_diffusers"])
def test_order_of_convergence_over_a_whole_run(solver):
    """On the solver's own schedule; lambda is singular at both ends, the last step first order."""
    flow = Gaussian()
    errors = []
    for steps in (40, 640):
        schedule = make_schedule(solver, steps, shift=1)
        final = integrate(schedule, flow.start, flow.velocity, dtype=np.float64)
        errors.append(relative_l2(final, flow.exact(schedule.sigmas[0], 0.0)))
    assert np.log(errors[0] / errors[1]) / np.log(16) >= tolerances.SOLVER_WHOLE_RUN_ORDER


def test_euler_is_the_explicit_step():
    schedule = make_schedule("euler", 12, shift=3.0)
    x = expected = np.linspace(-2, 2, 9)
    for low, high in zip(schedule.sigmas[1:], schedule.sigmas[:-1], strict=True):
        expected = expected + (low - high) * np.sin(expected)
    found = integrate(schedule, x, lambda x, row: np.sin(x), dtype=np.float64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerances.SOLVER_FLOAT64)
    np.testing.assert_array_equal(schedule.sigmas, make_schedule("dpm++", 12, shift=3.0).sigmas)


@pytest.mark.parametrize("solver", SOLVERS)
def test_given_timesteps_are_used_as_they_are(solver):
    given = [1000.0, 757.5, 522.0, 0.25]
    schedule = make_schedule(solver, 4, shift=5.0, timesteps=given)
    assert schedule.table[:, 0].tolist() == given
    assert schedule.timesteps.tolist() == [1000, 757, 522, 0]
    expected = np.append(np.array(given) / 1000, 0).astype(np.float32)
    np.testing.assert_array_equal(schedule.sigmas, expected)
    crowded = [1000.0, np.nextafter(1000, 0), 500.0000001, 500.0, 1e-300]
    assert np.isfinite(make_schedule(solver, 5, shift=1, timesteps=crowded).table).all()
    assert np.isfinite(make_schedule(solver, 1, shift=1, timesteps=[5e-324]).table).all()


def test_a_solvers_own_timesteps_given_back_change_the_levels_only_by_truncation():
    own = make_schedule("unipc", 20, shift=5.0)
    given = make_schedule("unipc", 20, shift=5.0, timesteps=own.timesteps)
    np.testing.assert_array_equal(given.timesteps, own.timesteps)
    assert (np.abs(given.sigmas - own.sigmas) < 1 / 1000).all()


BAD = [
    ({"solver": "heun"}, "solver='heun'", "unipc, dpm++, unipc_diffusers, euler"),
    ({"solver": None}, "solver=None", "unipc, dpm++"),
    ({"solver": ["unipc"]}, "solver=['unipc']", "unipc, dpm++"),
    ({"steps": 0}, "steps=0", "1 to 1000"),
    ({"steps": 1001}, "steps=1001", "1 to 1000"),
    ({"steps": 2.0}, "steps=2.0", "1 to 1000"),
    ({"steps": True}, "steps=True", "1 to 1000"),
    ({"steps": "4"}, "steps='4'", "1 to 1000"),
    ({"shift": 0}, "shift=0", "above 0"),
    ({"shift": -1.5}, "shift=-1.5", "above 0"),
    ({"shift": float("nan")}, "shift=nan", "above 0"),
    ({"shift": float("inf")}, "shift=inf", "above 0"),
    ({"shift": 10**400}, "shift=1000", "above 0"),
    ({"shift": None}, "shift=None", "above 0"),
    ({"shift": "3"}, "shift='3'", "above 0"),
    ({"timesteps": [900, 500]}, "timesteps=[900, 500]", "4 (steps) strictly decreasing"),
    ({"timesteps": 7}, "timesteps=7", "strictly decreasing"),
    ({"timesteps": [[4, 3], [2, 1]]}, "timesteps=[[4, 3], [2, 1]]", "strictly decreasing"),
    ({"timesteps": [9, 8, 7, "x"]}, "timesteps=[9, 8, 7, 'x']", "strictly decreasing"),
    ({"timesteps": [900, 500, 500, 1]}, "value 500 at position 2", "strictly decreasing"),
    ({"timesteps": [1000.5, 9, 8, 7]}, "value 1000.5 at position 0", "(0, 1000]"),
    ({"timesteps": [9, 8, 7, 0]}, "value 0 at position 3", "(0, 1000]"),
    ({"timesteps": [9, float("nan"), 7, 6]}, "value nan at position 1", "finite"),
    ({"timesteps": [float("inf"), 8, 7, 6]}, "value inf at position 0", "finite"),
]


@pytest.mark.parametrize(("change", "found", "accepted"), BAD, ids=[str(b[1]) for b in BAD])
def test_bad_input_is_named_with_what_is_accepted(change, found, accepted):
    arguments = {"solver": "unipc", "steps": 4, "shift": 5.0} | change
    with pytest.raises(ValueError, match=re.escape(found)) as caught:
        make_schedule(arguments.pop("solver"), arguments.pop("steps"), **arguments)
    assert "accepted: " in str(caught.value)
    assert accepted in str(caught.value)
