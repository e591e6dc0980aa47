"""Attention on TPUs, compiled ahead of time; skipped where libtpu is not installed."""

import jax
import jax.numpy as jnp
import pytest

from tests import tolerances
from tests.tpu_aot.chips import KERNEL, TOPOLOGIES, compile_for
from wan_jax.attention import attention, partial_attention

pytest.importorskip("libtpu")

# Queries, keys, heads, head width: 832x480x81 of the 1.3B, its text, and an odd small network.
CASES = {
    "self": (32760, 32760, 12, 128),
    "cross": (32760, 512, 12, 128),
    "odd": (1000, 1000, 4, 48),
}


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
    padded = -(-queries // 2048) * 2048 * n * 128 * jnp.dtype(dtype).itemsize
    temporary = program.memory_analysis().temp_size_in_bytes
    assert temporary <= tolerances.ATTENTION_TPU_OPERANDS * padded


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:1x1", "tpu7x:1x1x1"])
def test_tiles_fit_where_a_member_of_a_ring_keeps_weights_too(topology: str) -> None:
    """The kernel that also gives each query's weight needs more VMEM. Half of 75,600 tokens."""
    q = jax.ShapeDtypeStruct((1, 37800, 5, 128), jnp.bfloat16)
    count = jax.ShapeDtypeStruct((), jnp.int32)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, count: jax.Array) -> tuple:
        return partial_attention(q, k, v, count=count, implementation="splash")

    compile_for(topology, run, q, q, q, count)


def test_tiles_fit_a_core_of_tpu7x() -> None:
    """1280x720x81 of the 14B on one of eight devices; libtpu gives no text of it to look at."""
    q = jax.ShapeDtypeStruct((1, 75600, 5, 128), jnp.bfloat16)
    compile_for("tpu7x:1x1x1", splash, q, q, q)
