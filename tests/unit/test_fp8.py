"""Numbers of 8 bits: how they round, products and attention of them, what a GPU is told."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tolerances
from tests.random_weights import relative_l2
from wan_jax import attention as attention_module
from wan_jax import fp8, xla
from wan_jax.attention import attention, partial_attention
from wan_jax.layers import Linear, QuantizedLinear, linear


def draw(*shape: int, seed: int = 0, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape), dtype)


# Arrays


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [1.0, 448.0, 449.0, 3e-5, 7e6])
def test_rounding_is_to_the_nearest_of_four_bits(size: float, dtype: jnp.dtype) -> None:
    x = draw(41, 29, dtype=dtype) * jnp.asarray(size, dtype)
    narrow = jax.jit(fp8.quantize)(x)
    assert narrow.values.dtype == jnp.float8_e4m3fn and narrow.scale.shape == ()
    assert np.frexp(float(narrow.scale))[0] == 0.5  # a power of two
    top = float(jnp.max(jnp.abs(narrow.values.astype(jnp.float32))))
    assert 224.0 <= top <= 448.0
    wide, given = (np.asarray(a, np.float64) for a in (narrow.widened(jnp.float32), x))
    # Half a step of four bits or, of what is small, of the even steps.
    step = np.maximum(np.abs(given) * 2.0**-4, float(narrow.scale) * 2.0**-10)
    assert (np.abs(wide - given) <= step).all()
    np.testing.assert_array_equal(narrow.widened(jnp.bfloat16).astype(jnp.float32), wide)


def test_largest_value_of_any_size_is_held() -> None:
    """Next to powers of two and to 448, where the scale changes."""
    edges = [2.0**k * m for k in (-30, 0, 9, 40) for m in (0.875, 0.8750001, 1.0, 1.0000001)]
    for edge in edges:
        wide = fp8.quantize(jnp.asarray([edge, -edge / 3], jnp.float32)).widened(jnp.float32)
        assert abs(float(wide[0]) / edge - 1) <= 2.0**-4, edge


def test_a_power_of_two_changes_the_scale_only() -> None:
    x = draw(50)
    narrow, larger = fp8.quantize(x), fp8.quantize(x * 2.0**9)
    np.testing.assert_array_equal(narrow.values.view(jnp.uint8), larger.values.view(jnp.uint8))
    assert float(larger.scale) == float(narrow.scale) * 2.0**9


def test_what_is_quantised_stays_as_it_is() -> None:
    wide = fp8.quantize(draw(50)).widened(jnp.float32)
    np.testing.assert_array_equal(fp8.quantize(wide).widened(jnp.float32), wide)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zeros_stay_zeros_and_what_is_not_finite_shows(dtype: jnp.dtype) -> None:
    assert not fp8.quantize(jnp.zeros((3,), dtype)).widened(jnp.float32).any()
    for wrong in (jnp.nan, jnp.inf, -jnp.inf):
        x = jnp.asarray([1.0, wrong, 0.0], dtype)
        assert jnp.isnan(fp8.quantize(x).widened(jnp.bfloat16)).all()


# Products


def test_a_product_is_that_of_the_widened_operands() -> None:
    x, kernel = fp8.quantize(draw(2, 7, 64)), fp8.quantize(draw(48, 64, seed=1))
    wide = (np.asarray(a.widened(jnp.float32), np.float64) for a in (x, kernel))
    found = jax.jit(fp8.product)(x, kernel)
    assert found.dtype == jnp.bfloat16
    assert relative_l2(found, np.einsum("bld,ed->ble", *wide)) <= tolerances.FP8_BFLOAT16


def _linear(d_in: int, d_out: int, *, bias: bool = True) -> Linear:
    p = Linear(d_in, d_out, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, bias=bias)
    if bias:
        p.bias = nnx.Param(draw(d_out, dtype=jnp.bfloat16))
    return p


@pytest.mark.parametrize("bias", [True, False])
def test_linear_takes_either(bias: bool) -> None:
    p, x = _linear(96, 80, bias=bias), draw(2, 13, 96)
    narrow = QuantizedLinear.of(p)
    assert narrow.kernel.shape == (80, 96) and narrow.kernel.dtype == jnp.float8_e4m3fn
    found, exact = jax.jit(linear)(narrow, x), jax.jit(linear)(p, x)
    assert found.dtype == exact.dtype == jnp.bfloat16 and found.shape == exact.shape
    apart = relative_l2(found, exact)
    assert tolerances.FP8_MATTERS <= apart <= tolerances.FP8_PRODUCT


def test_a_batch_equals_its_members() -> None:
    """Scales are of all members, and of each alone; only small values know the difference."""
    p, x = QuantizedLinear.of(_linear(96, 80)), draw(2, 13, 96)
    x = x.at[1].multiply(5.0)
    both, one = linear(p, x), linear(p, x[:1])
    assert relative_l2(both[:1], one) <= tolerances.FP8_BFLOAT16


def test_a_gpu_is_told_of_a_product_in_the_form_that_it_knows() -> None:
    """Both operands widened by a scalar and contracted along their last axes, bfloat16 out."""
    shapes = jax.eval_shape(lambda: (QuantizedLinear.of(_linear(96, 80)), draw(1, 40, 96)))
    text = lowered(linear, *shapes)
    (dot,) = re.findall(r"stablehlo.dot_general (.*)", text)
    assert "contracting_dims = [1] x [1]" in dot
    assert "(tensor<40x96xbf16>, tensor<80x96xbf16>) -> tensor<40x80xbf16>" in dot
    assert len(re.findall(r"stablehlo.convert .*f8E4M3FN>\) -> tensor<.*xbf16>", text)) == 2


def lowered(function: Callable[..., Any], *arguments: Any) -> str:
    """StableHLO for an NVIDIA GPU that is not there."""
    traced = jax.jit(function).trace(*arguments)
    return str(traced.lower(lowering_platforms=("cuda",)).as_text())


def test_a_gpu_makes_them_without_triton() -> None:
    """Which would take the products of 8 bits first and widen their operands."""
    assert xla.compiler_options("gpu")["xla_gpu_enable_triton_gemm"] is False


# Attention


def qkv(queries: int, keys: int, *, n: int = 2, k: int = 32) -> tuple[jax.Array, ...]:
    """As in a network: not of mean 0, and with a few large numbers in every head of q and k."""
    q, key, v = (draw(2, s, n, k, seed=i) for i, s in enumerate((queries, keys, keys)))
    large = jnp.where(jnp.arange(k) % 11 == 3, 4.0, 1.0)
    return q * large, key * large + 3.0 * draw(1, 1, n, k, seed=7), v + draw(1, 1, n, k, seed=8)


def exact(q: jax.Array, k: jax.Array, v: jax.Array) -> np.ndarray:
    """Softmax attention in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bsnk,btnk->bnst", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnst,btnk->bsnk", weights / weights.sum(-1, keepdims=True), v)


def narrow_attention(*operands: jax.Array) -> jax.Array:
    return jax.jit(lambda q, k, v: attention(q, k, v, implementation="chunked_fp8"))(*operands)


@pytest.mark.parametrize("k", [32, 48, 128])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_stays_near_the_exact_one(k: int, dtype: jnp.dtype) -> None:
    operands = [x.astype(dtype) for x in qkv(45, 70, k=k)]
    found = narrow_attention(*operands)
    assert found.dtype == dtype and found.shape == operands[0].shape
    apart = relative_l2(found, exact(*operands))
    assert tolerances.FP8_MATTERS <= apart <= tolerances.FP8_ATTENTION


def test_attention_rounds_where_the_kernel_does() -> None:
    """In plain NumPy: scores of e4m3, weights times 256 as e4m3, the result as e4m3."""
    operands = qkv(20, 30)
    q, k, v, mean = fp8.attention_operands(*operands)
    wide = [np.asarray(x.widened(jnp.float32), np.float64) for x in (q, k, v)]
    scores = np.einsum("bsnk,btnk->bnst", *wide[:2]) / np.sqrt(32)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    eight = (weights.astype(np.float32) * 256).astype(jnp.float8_e4m3fn).astype(np.float64) / 256
    out = np.einsum("bnst,btnk->bsnk", eight, wide[2])
    out /= weights.sum(-1).transpose(0, 2, 1)[..., None]
    scale = float(v.scale)
    rounded = (out / scale).astype(np.float32).astype(jnp.float8_e4m3fn).astype(np.float64) * scale
    found = narrow_attention(*operands)
    # A few numbers may lie at the middle of two steps.
    assert relative_l2(found, rounded + np.asarray(mean)) <= tolerances.FP8_SAME


def test_the_operands_have_the_scores_of_the_given_ones() -> None:
    """But for a number of each query's own, which no softmax knows, and rounding."""
    q, k, v = qkv(9, 40)
    narrow = fp8.attention_operands(q, k, v)
    wide = [np.asarray(x.widened(jnp.float32), np.float64) for x in narrow[:2]]
    found, true = (np.einsum("bsnk,btnk->bnst", *pair) for pair in (wide, (q, k)))
    found, true = (x - x.mean(-1, keepdims=True) for x in (found, true))
    assert relative_l2(found, true) <= tolerances.FP8_PRODUCT
    np.testing.assert_allclose(narrow.mean[:, 0], np.asarray(v).mean(1), rtol=1e-5)


def test_means_of_keys_and_values_cost_nothing() -> None:
    q, k, v = qkv(33, 40)
    plain = narrow_attention(q, k, v)
    moved = narrow_attention(q, k + 64.0, v - 32.0) + 32.0
    assert relative_l2(moved, plain) <= tolerances.FP8_MEANS


@pytest.mark.parametrize("alike", [0.0, 1.0])
def test_padding_of_long_videos_hardly_shows(alike: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """alike 0: all keys weigh the same, and padding as much as it can."""
    q, k, v = (x[:1, :, :1] for x in qkv(2046, 2046, k=16))
    padded = fp8.attention_operands(q * alike, k, v)
    assert padded.k.values.shape[1] == 2048 and not padded.k.values[:, 2046:].any()
    found = narrow_attention(q * alike, k, v)
    monkeypatch.setattr(fp8, "_REAL_KEYS", 10**9)
    assert fp8.attention_operands(q * alike, k, v).k.values.shape[1] == 2046
    unpadded = narrow_attention(q * alike, k, v)
    assert found.shape == unpadded.shape
    assert relative_l2(found, unpadded) <= tolerances.FP8_PADDING


def test_few_tokens_are_not_padded() -> None:
    assert fp8.attention_operands(*qkv(300, 300)).k.values.shape[1] == 300


def test_what_is_picked_on_a_cpu() -> None:
    operands = qkv(12, 14)
    picked = jax.jit(lambda q, k, v: attention(q, k, v, in_fp8=True))(*operands)
    np.testing.assert_array_equal(picked, narrow_attention(*operands))


def test_a_gpu_is_told_of_one_kernel_of_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(xla, "traced_for", lambda: xla.Traced("gpu", "NVIDIA H100"))
    shape = jax.ShapeDtypeStruct((1, 2046, 3, 128), jnp.bfloat16)
    text = lowered(lambda q, k, v: attention(q, k, v, in_fp8=True), shape, shape, shape)
    (call,) = re.findall(r"custom_call @__cudnn\$fmhaSoftmaxF8\((.*)", text)
    operands = "tensor<1x2048x3x128xf8E4M3FN>, " * 3 + ", ".join(["tensor<1x1x1x1xf32>"] * 6)
    assert f"({operands}) -> (tensor<1x3x2048x128xf8E4M3FN>" in call
    scale = re.search(r"fmha_scale\\22: ([\d.]+)", call)
    assert scale is not None and float(scale[1]) == pytest.approx(128**-0.5)


@pytest.mark.parametrize("width", [24, 144])
def test_heads_that_the_kernel_does_not_take(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "traced_for", lambda: xla.Traced("gpu", "NVIDIA H100"))
    q = jnp.zeros((1, 4, 1, width), jnp.bfloat16)
    assert attention_module._pick(q, q, weighed=False, in_fp8=True) == "cudnn"
    with pytest.raises(ValueError, match=f"'cudnn_fp8' has heads of width {width}; a multiple"):
        attention(q, q, q, implementation="cudnn_fp8")


def test_what_cannot_run_raises() -> None:
    operands = [x.astype(jnp.bfloat16) for x in qkv(4, 4)]
    with pytest.raises(ValueError, match="'cudnn_fp8' needs an NVIDIA GPU, this is cpu"):
        attention(*operands, implementation="cudnn_fp8")
    for name in ("cudnn_fp8", "chunked_fp8"):
        with pytest.raises(ValueError, match=f"'{name}'; one of .*'chunked'\\) is needed"):
            partial_attention(*operands, implementation=name)
