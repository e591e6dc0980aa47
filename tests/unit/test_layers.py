"""Products and norms as they are written for NVIDIA, where XLA makes one call of several of them.

That it does can only be seen on a card (benchmarks/precision.py); what is written is tested here.
"""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tolerances
from tests.random_weights import relative_l2
from wan_jax import xla
from wan_jax.layers import Linear, LowRank, RMSNorm, gelu_tanh, linear, rms_norm

KINDS = [jnp.bfloat16, jnp.float16]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "traced_for", lambda: xla.Traced("gpu", "NVIDIA H200"))


def _network(dtype: jnp.dtype, *, lora: bool = False) -> Linear:
    p = Linear(48, 80, rngs=nnx.Rngs(0), dtype=dtype)
    p.bias[...] = jax.random.normal(jax.random.key(1), (80,)).astype(dtype)
    if lora:
        down, up = (
            jax.random.normal(jax.random.key(i), s) for i, s in ((2, (48, 4)), (3, (4, 80)))
        )
        p.lora = LowRank(down, up)
    return p


def _wide(p: Linear, x: jax.Array) -> jax.Array:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), p), x.astype(jnp.float32)


def _sums(p: Linear, x: jax.Array) -> list[str]:
    """The dtypes that products of this layer give."""
    return _given(jax.make_jaxpr(lambda p, x: linear(p, x))(p, x))


def _given(jaxpr: Any) -> list[str]:
    products = (line for line in str(jaxpr).splitlines() if " dot_general" in line)
    return [line.split("=")[0].split(":")[-1][:3] for line in products]


@pytest.mark.parametrize("dtype", KINDS)
def test_a_product_and_its_bias_are_of_the_kernels_dtype(dtype: jnp.dtype, card: None) -> None:
    p, x = _network(dtype), jax.random.normal(jax.random.key(4), (2, 7, 48), dtype)
    y = linear(p, x)
    assert y.dtype == dtype
    assert relative_l2(y, linear(*_wide(p, x))) <= tolerances.ATTENTION_BFLOAT16
    expected = {jnp.bfloat16: "bf1", jnp.float16: "f16"}[dtype]
    assert _sums(p, x) == [expected]


def test_elsewhere_and_with_a_lora_sums_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jax.random.normal(jax.random.key(4), (2, 7, 48), jnp.bfloat16)
    assert _sums(_network(jnp.bfloat16), x) == ["f32"]
    monkeypatch.setattr(xla, "traced_for", lambda: xla.Traced("gpu", "NVIDIA H200"))
    with_lora = _network(jnp.bfloat16, lora=True)
    assert _sums(with_lora, x) == ["f32"] * 3
    assert _sums(_network(jnp.float32), x) == ["f32"]
    moved = relative_l2(linear(with_lora, x), linear(*_wide(with_lora, x)))
    assert moved <= tolerances.LAYERS_TWICE_ROUNDED


@pytest.mark.parametrize("dtype", KINDS)
def test_its_gradient_is_that_of_float32(dtype: jnp.dtype, card: None) -> None:
    p, x = _network(dtype), jax.random.normal(jax.random.key(4), (2, 7, 48), dtype)

    def loss(p: Linear, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(gelu_tanh(linear(p, x)).astype(jnp.float32)))

    found, wanted = jax.grad(loss, (0, 1))(p, x), jax.grad(loss, (0, 1))(*_wide(p, x))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == dtype and relative_l2(one, other) <= tolerances.LAYERS_TWICE_ROUNDED


def test_a_bias_has_a_gradient_that_is_summed_in_float32(card: None) -> None:
    p, x = _network(jnp.bfloat16), jnp.ones((512, 48), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(linear(p, x)[:, :3]).astype(jnp.float32)))(p)
    sums = [line for line in str(jaxpr).splitlines() if " reduce_sum" in line]
    assert any(":f32[80]" in line for line in sums) and not any(":bf16[80]" in s for s in sums)


def test_gelu_has_a_gradient_of_float32(card: None) -> None:
    """Where it is not cuBLASLt's: its steps in bfloat16 are 5 % off for x < -1."""
    x = jnp.linspace(-4, -1, 999, dtype=jnp.bfloat16)
    value, slope = (f(jax.vjp(gelu_tanh, x)) for f in (lambda v: v[0], lambda v: v[1](x)[0]))
    wide = x.astype(jnp.float32)
    wanted, back = jax.vjp(lambda x: jax.nn.gelu(x, approximate=True), wide)
    assert value.dtype == slope.dtype == jnp.bfloat16
    assert relative_l2(value, wanted) <= tolerances.ATTENTION_BFLOAT16
    assert relative_l2(slope, back(wide)[0]) <= tolerances.ATTENTION_BFLOAT16


def test_norms_and_gelu_are_the_same_numbers(card: None) -> None:
    x = jax.random.normal(jax.random.key(4), (2, 7, 48), jnp.bfloat16)
    p = RMSNorm(48)
    p.scale[...] = 1 + jax.random.normal(jax.random.key(5), (48,)) / 4
    plain, split = (
        jax.jit(rms_norm, static_argnames=("eps", "goes_on"))(p, x, eps=1e-6, goes_on=g)
        for g in (False, True)
    )
    np.testing.assert_allclose(split, plain, rtol=tolerances.LAYERS_SAME)
    wide = gelu_tanh(x.astype(jnp.float32))
    assert wide.dtype == jnp.float32
    assert relative_l2(gelu_tanh(x), wide) <= 2 * tolerances.ATTENTION_BFLOAT16


def test_a_program_is_written_for_the_devices_it_runs_on() -> None:
    """Also that of a text encoder on the host, beside a card that is jax's first device."""
    p, x = _network(jnp.bfloat16), jnp.ones((4, 48), jnp.bfloat16)
    program = xla.jit(lambda p, x: linear(p, x))
    card = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    for device, expected in ((card, "bf1"), (jax.devices()[0], "f32")):
        assert _given(program.on(device).trace(p, x).jaxpr) == [expected]
    assert xla.traced_for().platform == "cpu"  # nothing is being traced
