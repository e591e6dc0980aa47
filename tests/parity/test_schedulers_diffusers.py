"""The unipc_diffusers solver against Diffusers' own scheduler, live."""

import numpy as np
import pytest

from tests import tolerances
from tests.random_weights import relative_l2
from wan_jax.schedulers import Row, make_schedule

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def velocity(x: np.ndarray, timestep: float) -> np.ndarray:
    """A curved flow with other coefficients in every element; [b, c] float32."""
    slopes = np.linspace(-1.4, 1.4, x.size, dtype=np.float32).reshape(x.shape)
    time = np.float32(timestep) * np.float32(0.001)
    return slopes * np.tanh(np.float32(1.5) * x + np.float32(2) * time * slopes) - slopes * time


@pytest.mark.parametrize("steps", [1, 2, 4, 14, 15, 30, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 16.0])
def test_every_sample_on_the_way(steps, shift):
    theirs = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    theirs.set_timesteps(steps)
    ours = make_schedule("unipc_diffusers", steps, shift=shift)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
    np.testing.assert_array_equal(ours.sigmas, theirs.sigmas.numpy())

    x = np.random.RandomState(7).standard_normal((2, 48)).astype(np.float32)
    sample = torch.from_numpy(x)
    last = m0 = m1 = np.zeros_like(x)
    for timestep, values in zip(theirs.timesteps, ours.table.astype(np.float32), strict=True):
        row = Row(*values)
        output = torch.from_numpy(velocity(sample.numpy(), float(timestep)))
        sample = theirs.step(output, timestep, sample, return_dict=False)[0]
        m = x - row.sigma * velocity(x, row.timestep)
        c = row.cx * x + row.cl * last + row.c0 * m0 + row.c1 * m1 + row.cm * m
        x, last, m0, m1 = row.px * c + row.pm * m + row.p0 * m0, c, m, m0
        assert relative_l2(x, sample.numpy()) <= tolerances.SOLVER_RELATIVE_L2
