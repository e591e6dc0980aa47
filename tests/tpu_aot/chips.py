"""Compiling for TPUs ahead of time, by libtpu on a machine without one (pip install libtpu)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wan_jax import xla
from wan_jax.planning import targets

TOPOLOGIES = ("v6e:1x1", "v5p:2x2x1", "v5e:2x4")
KERNEL = 'custom_call_target="tpu_custom_call"'


@functools.cache
def mesh_of(topology: str) -> Mesh:
    """One device of a topology that is not there."""
    return Mesh(np.array(targets.parse(topology).devices()[:1]), ("x",))


def compile_for(topology: str, function: Callable, *arguments: Any) -> jax.stages.Compiled:
    """The compiled program of function on one chip, every argument whole on it."""
    mesh, whole = mesh_of(topology), PartitionSpec()
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, whole)),
        arguments,
    )
    mapped = jax.shard_map(function, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    kind = mesh.devices.flat[0].device_kind
    options = xla.compiler_options("tpu", kind, attention=True)
    traced = jax.jit(mapped, compiler_options=options).trace(*placed)
    return traced.lower(lowering_platforms=("tpu",)).compile()
