"""Random weights that depend on nothing but parameter names, for tests in any framework.

Every tensor is drawn from its own legacy NumPy stream, seeded by the name, so a state dict has the
same values whatever order it is built in, on every NumPy version. Norm scales lie away from 1 and
biases away from 0: with the usual initial values a missing scale or bias would go unnoticed.
"""

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

_UNIT_SCALES = ("norm", "gamma", "layer_norm")
_TABLES = ("modulation", "scale_shift_table")


def random_array(name: str, shape: Sequence[int], *, seed: int = 0) -> np.ndarray:
    """float32 values for one parameter, chosen by its name and shape."""
    stream = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()))
    values = stream.standard_normal(tuple(shape)).astype(np.float64)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "bias":
        values = 0.2 * values
    elif leaf == "gamma" or (len(shape) == 1 and any(word in name for word in _UNIT_SCALES)):
        values = 1.0 + 0.3 * values
    elif leaf in _TABLES:
        values = 0.4 * values
    elif "relative_attention_bias" in name or "embed_tokens" in name or "shared" in name:
        pass
    else:
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        values = values / math.sqrt(fan_in)
    return values.astype(np.float32)


def random_state_dict(
    shapes: Mapping[str, Sequence[int]], *, seed: int = 0
) -> dict[str, np.ndarray]:
    """{parameter name: float32 array} for {parameter name: shape}."""
    return {name: random_array(name, shape, seed=seed) for name, shape in shapes.items()}


def relative_l2(value: np.ndarray, truth: np.ndarray) -> float:
    """||value - truth|| / ||truth||, computed in float64; NaN if anything is NaN."""
    value = np.asarray(value, np.float64)
    truth = np.asarray(truth, np.float64)
    if value.shape != truth.shape:
        raise AssertionError(f"shapes differ: {value.shape} against {truth.shape}")
    return float(np.linalg.norm(value - truth) / np.linalg.norm(truth))
