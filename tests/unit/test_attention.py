"""Attention on the CPU: the chunked form against float64, and every refusal."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tolerances
from tests.random_weights import relative_l2
from wan_jax import attention as module
from wan_jax import cudnn, xla
from wan_jax.attention import attention, partial_attention
from wan_jax.partials import merge


def draw(
    queries: int, keys: int, *, b: int = 2, n: int = 3, k: int = 16, dtype: jnp.dtype = jnp.float32
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k, v of random values."""
    stream = np.random.RandomState(queries * 10007 + keys)
    return tuple(
        jnp.asarray(stream.standard_normal((b, length, n, k)).astype(np.float32), dtype)
        for length in (queries, keys, keys)
    )


def exact(q: jax.Array, k: jax.Array, v: jax.Array) -> np.ndarray:
    """Softmax attention in float64 NumPy."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bsnk,btnk->bnst", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bnst,btnk->bsnk", weights, v)


def chunked(*operands: jax.Array) -> jax.Array:
    # A fresh function: jit would remember the chunk sizes of another test.
    return jax.jit(lambda q, k, v: attention(q, k, v, implementation="chunked"))(*operands)


def small_chunks(monkeypatch: pytest.MonkeyPatch, elements: int, keys: int) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(module, "_CHUNK_KEYS", keys)


LENGTHS = [(1, 1), (7, 1), (1, 7), (13, 13), (29, 31), (45, 20), (5, 129)]
BOUNDS = {jnp.float32: tolerances.ATTENTION_FLOAT32, jnp.bfloat16: tolerances.ATTENTION_BFLOAT16}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_default_on_the_cpu_equals_float64(lengths: tuple[int, int], dtype: jnp.dtype) -> None:
    operands = draw(*lengths, dtype=dtype)
    out = jax.jit(attention)(*operands)
    assert out.shape == operands[0].shape and out.dtype == dtype
    assert relative_l2(out, exact(*operands)) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("chunk", [(1, 1), (2 * 3 * 4 * 5, 4), (2 * 3 * 8 * 13, 8), (10**6, 16)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_chunks_of_any_size_equal_float64(
    lengths: tuple[int, int],
    chunk: tuple[int, int],
    dtype: jnp.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_chunks(monkeypatch, *chunk)
    operands = draw(*lengths, dtype=dtype)
    out = chunked(*operands)
    assert out.shape == operands[0].shape and out.dtype == dtype
    assert relative_l2(out, exact(*operands)) <= BOUNDS[dtype]


@pytest.mark.parametrize("k", [2, 48, 128])
def test_any_head_width(k: int) -> None:
    operands = draw(17, 19, k=k)
    assert relative_l2(chunked(*operands), exact(*operands)) <= tolerances.ATTENTION_FLOAT32


def test_real_chunk_sizes_at_a_length_above_them() -> None:
    operands = draw(300, module._CHUNK_KEYS * 2 + 77, b=1, n=2)
    assert relative_l2(chunked(*operands), exact(*operands)) <= tolerances.ATTENTION_FLOAT32


def test_padding_of_keys_never_reaches_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero keys would win over real ones whose scores are far below zero."""
    small_chunks(monkeypatch, 2 * 3 * 8 * 5, 8)
    q, k, v = draw(11, 9)
    ones = jnp.ones_like(q)
    out = chunked(30.0 * ones, jnp.abs(k) * -30.0, v)
    assert (
        relative_l2(out, exact(30.0 * ones, jnp.abs(k) * -30.0, v)) <= tolerances.ATTENTION_FLOAT32
    )


def test_large_scores_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest score comes in the last chunk, so every earlier sum is faded to nothing."""
    small_chunks(monkeypatch, 10**4, 4)
    q, k, v = draw(3, 13)
    k = k.at[:, -1].set(1e4 * q[:, 0])
    out = chunked(q[:, :1], k, v)
    np.testing.assert_array_equal(out[:, 0], v[:, -1])


def test_memory_of_the_chunked_form_does_not_hold_all_scores() -> None:
    s, n = 8192, 2
    shape = jax.ShapeDtypeStruct((1, s, n, 16), jnp.bfloat16)
    compiled = jax.jit(attention).lower(shape, shape, shape).compile()
    scores = 4 * n * s * s
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= tolerances.ATTENTION_CHUNKED_SHARE * scores


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("cuts", [(0, 31), (0, 8, 16, 31), (0, 1, 30, 31)])
def test_merged_shares_of_the_keys_equal_the_whole(
    cuts: tuple[int, ...], dtype: jnp.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares of very different weight: one key is near the queries."""
    small_chunks(monkeypatch, 2 * 3 * 8 * 5, 8)
    q, k, v = draw(29, 31, dtype=dtype)
    k = k.at[:, 20].set(6 * q[:, 0])
    parts = [
        partial_attention(q, k[:, low:high], v[:, low:high])
        for low, high in itertools.pairwise(cuts)
    ]
    out, _ = functools.reduce(merge, parts)
    assert out.dtype == (dtype if len(parts) == 1 else jnp.float32)
    assert relative_l2(out, exact(q, k, v)) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 20, 24])
def test_keys_past_the_count_are_not_attended_to(
    count: int, dtype: jnp.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three shares of 8 keys, of which `count` are real: the last may have none, or the first."""
    small_chunks(monkeypatch, 2 * 3 * 8 * 5, 8)
    q, k, v = draw(29, 24, dtype=dtype)
    more, more_v = (jnp.full((2, 8, 3, 16), fill, dtype) for fill in (1.0, 2.0))

    @jax.jit
    def run(count: jax.Array) -> tuple[jax.Array, jax.Array]:
        shares = [(k[:, i : i + 8], v[:, i : i + 8], jnp.clip(count - i, 0, 8)) for i in (16, 8, 0)]
        parts = [partial_attention(q, *share, count=real) for *share, real in shares]
        whole, _ = functools.reduce(merge, [*parts, partial_attention(q, more, more_v)])
        return whole, parts[-1][1]

    out, weight = run(count)
    keys, values = (
        jnp.concatenate([k[:, :count], more], 1),
        jnp.concatenate([v[:, :count], more_v], 1),
    )
    assert relative_l2(out, exact(q, keys, values)) <= BOUNDS[dtype]
    assert weight.dtype == jnp.float32 and weight.shape == (2, 29, 3)


@pytest.mark.parametrize(
    ("kind", "length", "tiles"),
    [
        ("TPU v6 lite", 75600, (3024, 2048, 1024)),
        ("TPU v5", 75600, (3024, 2048, 1024)),
        ("TPU7x", 32760, (2048, 2048, 1024)),
        ("TPU v6 lite", 37800, (2224, 1024, 1024)),  # half of them, on a member of a ring
        ("TPU v5 lite", 75600, (1008, 1024, 1024)),
        ("TPU v6 lite", 257, (272, 384, 384)),
        ("cpu", 13, (16, 128, 128)),
    ],
)
def test_tiles_are_of_the_kind_of_device_and_pad_little(
    kind: str, length: int, tiles: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xla, "traced_for", lambda: xla.Traced("tpu", kind))
    assert module._tiles(length, length, jnp.bfloat16) == tiles
    assert max(module._tiles(length, length, jnp.float32)) <= 1024


@pytest.mark.parametrize("kind", ["TPU v6 lite", "TPU v5 lite"])
def test_tiles_of_any_length_are_ones_that_the_kernel_takes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xla, "traced_for", lambda: xla.Traced("tpu", kind))
    for length in (1, 17, 127, 128, 129, 1023, 1025, 1040, 2049, 3025, 9450, 18900, 75600):
        for dtype in (jnp.bfloat16, jnp.float32):
            found = module._tiles(length, length, dtype)
            assert found.queries % 16 == 0 and found.queries <= 3024
            assert found.at_once % 128 == 0 and found.keys % found.at_once == 0


def test_unknown_implementation_is_named() -> None:
    operands = draw(4, 4)
    with pytest.raises(ValueError, match="'flash3'.*cudnn.*splash.*chunked"):
        attention(*operands, implementation="flash3")


@pytest.mark.parametrize("dtype", BOUNDS)
def test_cudnn_on_the_cpu_raises(dtype: jnp.dtype) -> None:
    with pytest.raises(ValueError, match="'cudnn' needs an NVIDIA GPU, this is cpu"):
        attention(*draw(4, 4, dtype=dtype), implementation="cudnn")


def test_splash_on_the_cpu_raises() -> None:
    with pytest.raises(ValueError, match="CPU"):
        attention(*draw(4, 4, dtype=jnp.bfloat16), implementation="splash")


def test_splash_is_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image tower is float16: named it is refused, unnamed it runs in chunks on a TPU."""
    operands = draw(4, 4, dtype=jnp.float16)
    with pytest.raises(ValueError, match="'splash' is given float16"):
        attention(*operands, implementation="splash")
    expected = attention(*operands, implementation="chunked")
    monkeypatch.setattr(xla, "traced_for", lambda: xla.Traced("tpu", "TPU v6 lite"))
    np.testing.assert_array_equal(attention(*operands), expected)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 3, 16), (1, 4, 3, 16), (1, 4, 3, 16)),
        ((2, 4, 3, 16), (2, 4, 2, 16), (2, 4, 2, 16)),
        ((2, 4, 3, 16), (2, 4, 3, 8), (2, 4, 3, 8)),
        ((2, 4, 3, 16), (2, 5, 3, 16), (2, 4, 3, 16)),
        ((2, 4, 3, 16), (2, 0, 3, 16), (2, 0, 3, 16)),
    ],
    ids=["batch", "heads", "width", "keys and values", "no keys"],
)
def test_shapes_that_do_not_fit_are_named(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"do not fit; \[b, s, n, k\] is needed"):
        attention(*(jnp.zeros(shape) for shape in shapes))


def test_mixed_dtypes_are_named() -> None:
    q, k, v = draw(4, 4)
    with pytest.raises(ValueError, match="float32, bfloat16, float32; need one"):
        attention(q, k.astype(jnp.bfloat16), v)


@pytest.mark.parametrize("lengths", [(65, 65), (8, 65), (7, 4), (8, 6)])
def test_for_a_gradient_cudnn_is_given_even_lengths(
    lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX gives no gradient of its kernel for others: 257 image tokens could not be trained on."""
    real, given = jax.nn.dot_product_attention, []

    def without_a_gpu(q: jax.Array, k: jax.Array, v: jax.Array, **options: object) -> jax.Array:
        given.append((q.shape[1], k.shape[1], len(options) > 1))
        return real(q, k, v, **options | {"implementation": "xla"})

    monkeypatch.setattr(jax.nn, "dot_product_attention", without_a_gpu)
    operands = draw(*lengths)
    assert relative_l2(cudnn.attend(*operands), exact(*operands)) <= BOUNDS[jnp.float32]
    assert given.pop() == (*lengths, False)
    out, back = jax.vjp(jax.checkpoint(cudnn.attend, policy=module.is_attention), *operands)
    padded = [length + length % 2 for length in lengths]
    assert (*padded, padded != list(lengths)) in given
    assert relative_l2(out, exact(*operands)) <= BOUNDS[jnp.float32]
    _, wanted = jax.vjp(lambda *qkv: attention(*qkv, implementation="chunked"), *operands)
    for one, other in zip(back(out), wanted(out)):
        assert relative_l2(one, other) <= BOUNDS[jnp.float32]


# Rows to spare


def _on_a_card(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """As if for an H200, with the chunked form for cuDNN's kernel; the lengths that it is given."""
    given: list[tuple[int, int]] = []

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        given.append((q.shape[1], k.shape[1]))
        return module._chunked(q, k, v)

    monkeypatch.setattr(xla, "traced_for", lambda: xla.Traced("gpu", "NVIDIA H200"))
    monkeypatch.setattr(cudnn, "attend_with_weight", kernel)
    return given


@pytest.mark.parametrize("kind", ["any", "to the last key", "away from all", "to one key"])
@pytest.mark.parametrize(("real", "spare"), [(129, 1), (80, 48), (129, 127), (1023, 1)])
def test_rows_to_spare_are_not_attended_to(
    real: int, spare: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is rounded twice, which shows where there are many of them."""
    given = _on_a_card(monkeypatch)
    rows = real + spare
    q, k, v = draw(rows, rows)
    along = q[:, :1, :, :] / jnp.linalg.norm(q[:, :1], axis=-1, keepdims=True)
    if kind == "to the last key":  # its copies are nearly all of the softmax
        k = k.at[:, real - 1].set(20 * along[:, 0])
        q = q + 10 * along
    elif kind == "away from all":  # scores near -100: zeros in their place would be all there is
        k, q = k - 20 * along, q + 20 * along
    elif kind == "to one key":
        k = k.at[:, 5].set(40 * along[:, 0])
        q = q + 10 * along
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    wanted = exact(q, k[:, :real], v[:, :real])
    found = attention(q, k, v, count=real)
    assert found.dtype == jnp.bfloat16 and given == [(rows, rows)]
    plain = relative_l2(module._chunked(q, k[:, :real], v[:, :real])[0], wanted)
    error = relative_l2(found, wanted)
    assert error <= tolerances.ATTENTION_BFLOAT16 and error <= 1.5 * max(plain, 2.0**-9)
    if kind == "any" and spare < real / 1000:
        assert error <= 1.15 * plain
    for other in ("chunked", None):
        monkeypatch.undo()
        assert relative_l2(attention(q, k, v, count=real, implementation=other), wanted) <= (
            tolerances.ATTENTION_BFLOAT16
        )


def _gradient_kernels(
    monkeypatch: pytest.MonkeyPatch, dtype: jnp.dtype = jnp.float32
) -> list[tuple[int, int]]:
    """What cuDNN's two kernels compute; the backward one believes what it is given.

    dtype: what it rounds shares and slopes to before it multiplies them, and the results.
    """
    given: list[tuple[int, int]] = []

    def rounded(x: jax.Array) -> jax.Array:
        return x.astype(dtype).astype(jnp.float32)

    def backward(
        q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, weight: jax.Array, back: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        given.append((q.shape[1], k.shape[1]))
        like, scale = q.dtype, 1.0 / np.sqrt(q.shape[-1])
        q, k, v, out, back = (x.astype(jnp.float32) for x in (q, k, v, out, back))
        scores = jnp.einsum("bsnk,btnk->bnst", q, k) * scale
        shares = jnp.exp(scores - weight.swapaxes(1, 2)[..., None])
        along = jnp.sum(out * back, axis=-1).swapaxes(1, 2)[..., None]
        slopes = shares * (jnp.einsum("bsnk,btnk->bnst", back, v) - along) * scale
        slopes, shares = rounded(slopes), rounded(shares)
        dq, dk = (
            jnp.einsum("bnst,btnk->bsnk", slopes, k),
            jnp.einsum("bnst,bsnk->btnk", slopes, q),
        )
        dv = jnp.einsum("bnst,bsnk->btnk", shares, back)
        return dq.astype(like), dk.astype(like), dv.astype(like)

    monkeypatch.setattr(cudnn, "attend_with_weight", module._chunked)
    monkeypatch.setattr(cudnn, "_backward_kernel", backward)
    return given


@pytest.mark.parametrize(("rows", "real"), [(40, 33), (40, 39), (64, 40)])
@pytest.mark.parametrize("kind", ["any", "to the last key", "away from all"])
def test_rows_to_spare_have_no_part_in_a_gradient(
    rows: int, real: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = _gradient_kernels(monkeypatch)
    q, k, v = draw(rows, rows)
    if kind == "to the last key":  # so its copies are most of what the kernel attends to
        q = q + k[:, real - 1 : real]
    elif kind == "away from all":  # exp(-weight) is no float32; of the last head alone
        far = jnp.arange(q.shape[2])[:, None] == q.shape[2] - 1
        q, k = (jnp.where(far, 0.1 * x + sign, x) for x, sign in ((q, 5.0), (k, -5.0)))
    cotangent = jax.random.normal(jax.random.key(5), q.shape)

    def cut(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return module._chunked(q, k[:, :real], v[:, :real])[0]

    # Keys that have a large part in common are taken from each other.
    bound = (100 if kind == "away from all" else 10) * BOUNDS[jnp.float32]
    wanted_out, wanted = jax.vjp(cut, q, k, v)
    out, found = jax.vjp(lambda *qkv: cudnn.attend(*qkv, real), q, k, v)
    assert relative_l2(out, wanted_out) <= bound
    for one, other in zip(found(cotangent), wanted(cotangent)):
        assert relative_l2(one, other) <= bound
    assert given == [(rows, rows)]
    assert all(not np.any(gradient[:, real:]) for gradient in found(cotangent)[1:])


@pytest.mark.parametrize(("rows", "real"), [(256, 248), (256, 208)])
def test_a_gradient_in_16_bits_is_as_near_as_without_rows_to_spare(
    rows: int, real: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last key has most of the weight, and with it all its copies."""
    _gradient_kernels(monkeypatch, jnp.bfloat16)
    q, k, v = draw(rows, rows)
    q = (q + 1.2 * k[:, real - 1 : real]).astype(jnp.bfloat16)
    k, v = k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
    cotangent = jax.random.normal(jax.random.key(5), q.shape).astype(jnp.bfloat16)

    def cut(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return module._chunked(q, k[:, :real], v[:, :real])

    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    _, wanted = jax.vjp(lambda *qkv: cut(*qkv)[0], *wide)
    out, weight = cut(q, k, v)
    plain = cudnn._backward_kernel(q, k[:, :real], v[:, :real], out, weight, cotangent)
    _, found = jax.vjp(lambda *qkv: cudnn.attend(*qkv, real), q, k, v)
    truths = wanted(cotangent.astype(jnp.float32))
    for one, other, truth in zip(found(cotangent), plain, truths, strict=True):
        own, error = (relative_l2(x[:, :real], truth[:, :real]) for x in (other, one))
        assert error <= 1.5 * own and own <= 2 * tolerances.ATTENTION_BFLOAT16


def test_the_kernels_are_called_as_jax_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lowered for a GPU: the forward kernel that gives its weight, and the backward one."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(xla, "traced_for", lambda: xla.Traced("gpu", "NVIDIA H200"))
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91900)
    x = jax.ShapeDtypeStruct((2, 256, 3, 128), jnp.bfloat16)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, count=200).astype(jnp.float32).sum()

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, x)
    text = run.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__cudnn$fmhaSoftmax(") == 1
    assert text.count("custom_call @__cudnn$fmhaSoftmaxBackward(") == 1
    assert all(out.shape == x.shape and out.dtype == x.dtype for out in run.out_avals)


def test_odd_rows_to_spare_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    _on_a_card(monkeypatch)
    monkeypatch.setattr(cudnn, "_odd", lambda *qkv: module._chunked(*qkv)[0])
    q, k, v = draw(41, 41)
    out, back = jax.vjp(lambda *qkv: cudnn.attend(*qkv, 33), q, k, v)
    assert relative_l2(out, exact(q, k[:, :33], v[:, :33])) <= BOUNDS[jnp.float32]
    assert all(not np.any(gradient[:, 33:]) for gradient in back(out)[1:])


def test_rows_pay_for_videos_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.row_tile(32_760, jnp.bfloat16) == 1
    _on_a_card(monkeypatch)
    assert module.row_tile(32_760, jnp.bfloat16) == 128
    assert module.row_tile(32_760, jnp.float32) == module.row_tile(576, jnp.bfloat16) == 1
