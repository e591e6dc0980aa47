"""Initial noise: a function of the seed and the sample's number alone."""

import numpy as np
import pytest

from tests import tolerances
from wan_jax.noise import MAX_SEED, initial_noise

SHAPE = (2, 3, 4, 16)
# First and last value of a sample, by (seed, sample), of jax 0.10.2 and 0.12: never to change.
GOLDEN = {
    (0, 0): (1.0040143, 0.73721504),
    (2**63 + 5, 1): (0.61451477, 0.42111036),
}


def _noise(seed: int, samples: int = 1, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.asarray(initial_noise(seed, samples, shape=shape))


@pytest.mark.parametrize("seed", [0, 7, 2**63, MAX_SEED])
def test_a_sample_does_not_depend_on_its_batch(seed: int) -> None:
    batch = _noise(seed, 4)
    assert batch.shape == (4, *SHAPE)
    assert batch.dtype == np.float32
    for count in (1, 2, 3):
        np.testing.assert_array_equal(_noise(seed, count), batch[:count])


def test_seeds_and_samples_differ() -> None:
    """Also seeds of which 32-bit arithmetic would see only the lower half, or the sign."""
    seeds = [0, 1, 2, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**63 + 1, MAX_SEED]
    samples = np.concatenate([_noise(seed, 2) for seed in seeds]).reshape(2 * len(seeds), -1)
    correlation = np.abs(np.corrcoef(samples) - np.eye(len(samples)))
    assert correlation.max() < tolerances.NOISE_CORRELATION


def test_the_same_seed_gives_the_same_bits() -> None:
    np.testing.assert_array_equal(_noise(123, 2), _noise(123, 2))
    np.testing.assert_array_equal(_noise(123), _noise(np.int64(123)))


@pytest.mark.parametrize("where", GOLDEN)
def test_golden_values(where: tuple[int, int]) -> None:
    seed, sample = where
    values = _noise(seed, sample + 1)[sample].ravel()[[0, -1]]
    np.testing.assert_allclose(values, GOLDEN[where], rtol=tolerances.NOISE_GOLDEN, atol=0)


def test_values_are_standard_normal() -> None:
    values = _noise(3, 2, (4, 32, 32, 16)).astype(np.float64)
    share = np.mean(np.abs(values) < 1.0)
    moments = (values.mean(), values.std(), np.mean(values**3), np.mean(values**4), share)
    np.testing.assert_allclose(
        moments, (0.0, 1.0, 0.0, 3.0, 0.682689), atol=tolerances.NOISE_MOMENTS, rtol=0
    )


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, -(2**63)])
def test_a_seed_out_of_range_is_named(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed is {seed}; an integer from 0 to {MAX_SEED}"):
        initial_noise(seed, 1, shape=SHAPE)
