"""Attention on TPUs, compiled ahead of time; skipped where libtpu is not installed."""

import jax
import jax.numpy as jnp
import pytest

from tests import tolerances
from tests.tpu_aot.chips import KERNEL, TOPOLOGIES, compile_for
from wan_jax.attention import attention

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
    padded = -(-queries // 1024) * 1024 * n * 128 * jnp.dtype(dtype).itemsize
    temporary = program.memory_analysis().temp_size_in_bytes
    assert temporary <= tolerances.ATTENTION_TPU_OPERANDS * padded
