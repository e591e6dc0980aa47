"""Modules to {path: array} and back."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import tree_util

Module = TypeVar("Module", bound=nnx.Module)


def _path(keys: tuple[Any, ...]) -> str:
    def name(key: Any) -> str:
        return str(next(getattr(key, a) for a in ("name", "key", "idx") if hasattr(key, a)))

    return ".".join(part for part in map(name, keys) if part != "value")


def abstract(build: Callable[[], Module]) -> Module:
    """The module that build() returns, with shapes in place of arrays; nothing is allocated."""
    return jax.eval_shape(build)


def flatten(module: nnx.Module) -> dict[str, jax.Array]:
    """{dotted path: leaf}, e.g. layers.self_attn.q.kernel."""
    leaves, _ = tree_util.tree_flatten_with_path(module)
    return {_path(keys): leaf for keys, leaf in leaves}


def fill(module: Module, arrays: Mapping[str, jax.Array]) -> Module:
    """The module with every leaf replaced by arrays[path]; KeyError for a path that is missing."""
    leaves, treedef = tree_util.tree_flatten_with_path(module)
    return tree_util.tree_unflatten(treedef, [arrays[_path(keys)] for keys, _ in leaves])


def fill_as(module: Module, arrays: Mapping[str, Any]) -> Module:
    """fill() with every array in the dtype of the leaf whose place it takes."""
    kinds = flatten(module)
    return fill(module, {k: jnp.asarray(arrays[k], leaf.dtype) for k, leaf in kinds.items()})


def cast(module: Module, dtype: jnp.dtype) -> Module:
    """The module with every leaf in another dtype, where it was."""
    return jax.jit(lambda given: jax.tree.map(lambda leaf: leaf.astype(dtype), given))(module)
