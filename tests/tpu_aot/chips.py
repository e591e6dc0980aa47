"""Compiling for TPUs ahead of time, by libtpu on a machine without one (pip install libtpu)."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# libtpu asks the machine what it is; these answer for one that is not in a cloud.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is held, so none is contended

TOPOLOGIES = ("v6e:1x1x1", "v5p:2x2x1", "v5e:2x4")
KERNEL = 'custom_call_target="tpu_custom_call"'


@functools.cache
def mesh_of(topology: str) -> Mesh:
    """One device of a topology that is not there."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices[:1]), ("x",))


def compile_for(topology: str, function: Callable, *arguments: Any) -> jax.stages.Compiled:
    """The compiled program of function on one chip, every argument whole on it."""
    mesh, whole = mesh_of(topology), PartitionSpec()
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, whole)),
        arguments,
    )
    mapped = jax.shard_map(function, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    return jax.jit(mapped).trace(*placed).lower(lowering_platforms=("tpu",)).compile()
