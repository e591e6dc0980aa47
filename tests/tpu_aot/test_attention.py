"""The TPU programs, compiled ahead of time by libtpu on a machine without a TPU.

Skipped where libtpu is not installed (pip install libtpu).
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests import tolerances
from wan_jax import clip, sampler
from wan_jax.attention import attention
from wan_jax.clip import CLIP
from wan_jax.config import I2V_14B, T2V_1_3B
from wan_jax.dit import DiT
from wan_jax.schedulers import Row
from wan_jax.weights import trees

pytest.importorskip("libtpu")

# libtpu asks the machine what it is; these answer for one that is not in a cloud.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is held, so none is contended

TOPOLOGIES = ("v6e:1x1x1", "v5p:2x2x1", "v5e:2x4")
KERNEL = 'custom_call_target="tpu_custom_call"'
# Queries, keys, heads, head width: 832x480x81 of the 1.3B, its text, and an odd small network.
CASES = {
    "self": (32760, 32760, 12, 128),
    "cross": (32760, 512, 12, 128),
    "odd": (1000, 1000, 4, 48),
}


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


def splash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return attention(q, k, v, implementation="splash")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_splash_compiles_and_never_holds_the_scores(
    topology: str, case: str, dtype: jnp.dtype
) -> None:
    queries, keys, n, k = CASES[case]
    q, kv = (jax.ShapeDtypeStruct((1, length, n, k), dtype) for length in (queries, keys))
    program = compile_for(topology, splash, q, kv, kv)
    assert KERNEL in program.as_text()
    padded = -(-queries // 1024) * 1024 * n * 128 * jnp.dtype(dtype).itemsize
    temporary = program.memory_analysis().temp_size_in_bytes
    assert temporary <= tolerances.ATTENTION_TPU_OPERANDS * padded


def test_the_tower_of_images_compiles() -> None:
    """In float16, as the original runs it, which the flash kernel does not take."""
    config = I2V_14B.clip
    assert config is not None
    tower = trees.abstract(lambda: CLIP(config, rngs=nnx.Rngs(0), dtype=jnp.float16))
    pixels = jax.ShapeDtypeStruct((2, config.image_size, config.image_size, 3), jnp.float32)
    program = compile_for(TOPOLOGIES[0], clip.encode, tower, pixels)
    (tokens,) = jax.tree.leaves(program.out_info)
    assert (tokens.shape, tokens.dtype) == ((2, 257, 1280), jnp.float16)


def test_a_step_of_image_to_video_fits_one_chip_at_480p() -> None:
    """14B in bfloat16: what the text and the image need but once is not among the arguments."""
    config = I2V_14B.dit
    dit = trees.abstract(lambda: DiT(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    x, known = (jax.ShapeDtypeStruct((1, 21, 60, 104, c), jnp.float32) for c in (16, 20))
    text = jax.ShapeDtypeStruct((1, config.text_len, config.text_dim), jnp.bfloat16)
    image = jax.ShapeDtypeStruct((1, 257, 1280), jnp.float32)
    cond = jax.eval_shape(DiT.prepare, dit, text, image)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    row = Row(*(scalar for _ in Row._fields))

    def step(known: jax.Array, *arguments: Any) -> sampler.State:
        return sampler.step(*arguments, known=known, implementation="splash")

    state = sampler.State(x, x, x, x)
    program = compile_for(TOPOLOGIES[0], step, known, dit, state, row, (cond, cond), scalar)
    memory = program.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert total <= tolerances.IMAGE_TPU_STEP_GIB * 2**30


def test_a_step_of_the_released_small_model_fits_one_chip() -> None:
    config = T2V_1_3B.dit
    dit = trees.abstract(lambda: DiT(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    x = jax.ShapeDtypeStruct((1, 21, 60, 104, config.in_channels), jnp.float32)
    text = jax.ShapeDtypeStruct((1, config.text_len, config.text_dim), jnp.bfloat16)
    cond = jax.eval_shape(DiT.prepare, dit, text)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    row = Row(*(scalar for _ in Row._fields))
    step = functools.partial(sampler.step, implementation="splash")
    program = compile_for(
        TOPOLOGIES[0], step, dit, sampler.State(x, x, x, x), row, (cond, cond), scalar
    )
    assert KERNEL in program.as_text()
    memory = program.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert total <= tolerances.ATTENTION_TPU_STEP_GIB * 2**30
