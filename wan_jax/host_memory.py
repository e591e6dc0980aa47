"""Weights in the host's pinned memory: those of a stack of layers, which visit the device in turn.

A network is streamed whose stack has its matrices there. The scan over the stack brings each
layer's to the device, under the computation of the layer before it where the compiler copies
asynchronously. Values do not change. Vectors and small tables stay on the device: they are next to
nothing, and a TPU cannot slice rows of packed bfloat16 where it cannot reach.
"""

from collections.abc import Callable
from typing import Any

import jax

KIND = "pinned_host"
STACK = "layers"  # in every network that has one


def is_streamed(path: str) -> bool:
    """Whether a weight of this dotted path lies there if its network is streamed."""
    return path.startswith(f"{STACK}.") and path.endswith(".kernel")


def where(path: str, usual: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Where a weight of a streamed network lies, which else would lie where it is usual."""
    return usual.with_memory_kind(KIND) if is_streamed(path) else usual


def fetch_of(network: Any) -> Callable[[Any], Any] | None:
    """Inside jit: what brings a layer of the network's stack to the device; None if it is there.

    By the memory that the arrays are traced in.
    """
    if not any(map(_is_on_host, jax.tree.leaves(getattr(network, STACK, None)))):
        return None

    return to_device


def _is_on_host(leaf: Any) -> bool:
    return bool(jax.typeof(leaf).memory_space == jax.memory.Space.Host)


def to_device(layer: Any) -> Any:
    """Inside jit: a layer whose arrays are on the device, whichever memory they lie in."""

    def brought(leaf: Any) -> Any:
        return jax.device_put(leaf, jax.memory.Space.Device) if _is_on_host(leaf) else leaf

    return jax.tree.map(brought, layer)


def lies_in(tree: Any) -> bool:
    """Whether any array, or shape with a sharding, of a tree lies in the host's pinned memory."""
    leaves = jax.tree.leaves(tree)
    return any(getattr(getattr(x, "sharding", None), "memory_kind", None) == KIND for x in leaves)
