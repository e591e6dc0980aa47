"""PyTorch state dicts into our modules, through the rules that convert real checkpoints."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from wan_jax.weights import rules, trees


class DictReader:
    """rules.Reader over {name: array}."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays

    def shapes(self) -> dict[str, tuple[rules.Shape, str]]:
        return {name: (array.shape, array.dtype.name) for name, array in self._arrays.items()}

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]


def load_torch(
    table: rules.Table,
    module_abstract: Any,
    state_dict: Mapping[str, np.ndarray],
    naming: str = "diffusers",
) -> Any:
    """The abstract module filled from {name: NumPy array}; fails on any name left over."""
    reader = DictReader(state_dict)
    targets = trees.flatten(module_abstract)
    plan = rules.resolve(table, targets, naming=naming, names=list(state_dict))
    rules.check_shapes(plan, reader)
    arrays = {path: jnp.asarray(array) for path, array in rules.apply(plan, reader)}
    return trees.fill(module_abstract, arrays)
