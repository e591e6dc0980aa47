"""The attention kernel for Hopper: its algorithm in threads, its program, and when it is taken."""

import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tolerances
from tests.random_weights import relative_l2
from tests.unit.fake_mosaic import Mosaic, in_place_of_mosaic
from wan_jax import attention as module
from wan_jax import cudnn, hopper, hopper_parts, xla
from wan_jax.attention import attention, attention_in_parts, partial_attention, row_tile
from wan_jax.partials import LOWEST, merge
from wan_jax.parts import Parts
from wan_jax.plans import Plan

H200 = xla.Traced("gpu", "NVIDIA H200")


def draw(
    rows: int, keys: int | None = None, *, b: int = 1, n: int = 1, dtype: jnp.dtype = jnp.bfloat16
) -> tuple[jax.Array, jax.Array, jax.Array]:
    stream = np.random.RandomState(rows)
    return tuple(
        jnp.asarray(stream.standard_normal((b, length, n, hopper.HEAD)), dtype)
        for length in (rows, keys or rows, keys or rows)
    )


@pytest.fixture
def mosaic(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mosaic]:
    with jax.disable_jit():  # its threads see values
        fake = in_place_of_mosaic(hopper, monkeypatch)
        monkeypatch.setattr(hopper_parts, "lax", fake.lax)
        yield fake


def exact(q: jax.Array, k: jax.Array, v: jax.Array, count: int) -> np.ndarray:
    wide = (x.astype(jnp.float32) for x in (q, k[:, :count], v[:, :count]))
    return np.asarray(attention(*wide, implementation="chunked"))


@pytest.mark.parametrize(
    ("rows", "keys", "count"),
    [(128, 128, 128), (128, 128, 1), (128, 128, 127), (256, 256, 129), (128, 384, 384)]
    + [(128, 384, 300), (128, 640, 513), (128, 768, 768)],
)
def test_equals_attention_over_the_real_keys(
    rows: int, keys: int, count: int, mosaic: Mosaic
) -> None:
    """The rows behind them hold numbers that would be seen: large keys, large values."""
    q, k, v = draw(rows, keys, b=2, n=2)
    k, v = k.at[:, count:].set(30.0), v.at[:, count:].set(1e4)
    found = hopper.attend(q, k, v, count)
    assert found.shape == q.shape and found.dtype == q.dtype
    assert relative_l2(found, exact(q, k, v, count)) <= tolerances.ATTENTION_BFLOAT16
    assert mosaic.started == 2 * 2 * rows // hopper.ROWS


@pytest.mark.parametrize("keys", [128, 512])
def test_one_warpgroup_begins_before_the_other(keys: int, mosaic: Mosaic) -> None:
    q, k, v = draw(512, keys, n=4)
    hopper.attend(q, k, v, keys)
    for block in range(mosaic.started):
        groups = [group for number, group in mosaic.products if number == block]
        assert groups[0] == 0 and groups.count(0) == groups.count(1) == 2 * keys // 128
    assert mosaic.started == 16


@pytest.mark.usefixtures("mosaic")
@pytest.mark.parametrize("shift", [-40.0, 40.0])
def test_scores_far_from_zero(shift: float) -> None:
    """Every score is hundreds below zero, or above; the largest are in the last block."""
    q, k, v = draw(128, 384)
    q, k = jnp.abs(q), jnp.abs(k) + shift
    k = k.at[:, 290:].multiply(0.9 if shift < 0 else 1.1)
    found = hopper.attend(q, k, v, 300)
    assert relative_l2(found, exact(q, k, v, 300)) <= tolerances.ATTENTION_BFLOAT16


@pytest.mark.parametrize(
    ("keys", "count"),
    [(384, count) for count in (None, 0, 1, 127, 128, 129, 256, 300, 384)]
    + [(128, count) for count in (None, 0, 100, 128)],
)
def test_shares_of_the_keys_join_to_the_whole(
    keys: int, count: int | None, mosaic: Mosaic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many of the second share are real only the kernel is told."""
    monkeypatch.setattr(xla, "traced_for", lambda: H200)
    part = functools.partial(partial_attention, implementation="hopper")
    q, k, v = draw(256, 256 + keys, b=2, n=2)
    real = keys if count is None else count
    k = k.at[:, 20].set(2 * q[:, 0]).at[:, 256 + real :].set(30.0)
    v = v.at[:, 256 + real :].set(1e4)
    told = None if count is None else jnp.asarray(count)
    shares = [part(q, k[:, :256], v[:, :256]), part(q, k[:, 256:], v[:, 256:], count=told)]
    for out, weight in shares:
        assert out.dtype == q.dtype and weight.dtype == jnp.float32 and weight.shape == (2, 256, 2)
    out, weight = merge(*shares)
    assert relative_l2(out, exact(q, k, v, 256 + real)) <= tolerances.ATTENTION_BFLOAT16
    wide = (x.astype(jnp.float32) for x in (q, k[:, : 256 + real], v[:, : 256 + real]))
    _, wanted = partial_attention(*wide, implementation="chunked")
    np.testing.assert_allclose(weight, wanted, atol=1e-3)
    assert mosaic.started == 2 * 2 * 2 * 2


def test_the_least_score_is_not_rounded_as_it_is_scaled() -> None:
    """Where all are the least, what is left of one is then 0, whether or not a GPU rounds twice."""
    scale = np.float32(np.log2(np.e) / np.sqrt(hopper.HEAD))
    exact = np.float64(np.float32(LOWEST)) * np.float64(scale)
    assert exact == np.float32(exact) < -1e28


@pytest.mark.parametrize("known", [True, False])
def test_mosaic_takes_one_program_of_all_shares(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is told how many keys are real, also where that is known."""
    monkeypatch.setattr(xla, "traced_for", lambda: H200)
    x = jax.ShapeDtypeStruct((1, 16384, 12, 128), jnp.bfloat16)
    count = () if known else (jax.ShapeDtypeStruct((), jnp.int32),)

    def shares(q: jax.Array, k: jax.Array, v: jax.Array, *count: jax.Array) -> Any:
        return [partial_attention(q, k + i, v, count=count[0] if count else None) for i in range(3)]

    text = jax.jit(shares).trace(x, x, x, *count).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = re.findall(r"custom_call @mosaic_gpu.*", text)
    assert ", tensor<1xi32>) -> (" in call and "fmhaSoftmax" not in text


def in_parts(
    x: jax.Array, members: int, member: int, heads: slice, *, among_all: bool = True
) -> Parts:
    """What a member has of [b, s, all heads, k] when the others have sent theirs of its heads."""
    b, _, n, k = x.shape
    of_each = x.reshape(b, members, -1, n, k)
    others = (of_each[:, (member - i) % members, :, heads] for i in range(1, members))
    place = jnp.asarray([member, heads.start], jnp.int32)
    own = of_each[:, member]
    return Parts(own if among_all else own[:, :, heads], tuple(others), place)


@pytest.mark.parametrize("name", ["hopper", "chunked"])
@pytest.mark.parametrize("at_once", [132, 4], ids=["queries joined", "a kernel for each part"])
@pytest.mark.parametrize(
    ("members", "rows", "count"),
    [(2, 128, 250), (2, 256, 512), (2, 384, 700), (3, 128, 300), (3, 384, 1152)],
    ids=str,
)
def test_parts_as_they_lie_give_what_they_give_together(
    members: int,
    rows: int,
    count: int,
    at_once: int,
    name: str,
    mosaic: Mosaic,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit, on every member; the heads that are meant are the third and fourth of all."""
    monkeypatch.setattr(xla, "traced_for", lambda: H200)
    # Of four at once a part's tiles, of 4 blocks, leave none idle; of 132 they leave nearly all. Of
    # the own tiles, two or three, one is at first then.
    monkeypatch.setattr(hopper_parts, "_AT_ONCE", at_once)
    q, k, v = draw(members * rows, b=2, n=2 * members)
    k, v = k.at[:, count:].set(30.0), v.at[:, count:].set(1e4)
    heads = slice(2, 4)
    options = {"count": count, "implementation": name}
    together = attention(*(x[:, :, heads] for x in (q, k, v)), **options)
    started = mosaic.started
    for member in range(members):
        of = functools.partial(in_parts, members=members, member=member, heads=heads)
        parts = [of(q, among_all=member > 0), of(k, among_all=member % 2 == 0), of(v)]
        np.testing.assert_array_equal(parts[0].joined(), q[:, :, heads])
        found = attention_in_parts(*parts, **options)
        assert found.own.shape == (2, rows, 2 * members, hopper.HEAD)
        wanted = parts[0].apart(together)
        np.testing.assert_array_equal(found.mine, wanted.mine)
        assert len(found.others) == members - 1
        for one, other in zip(found.others, wanted.others, strict=True):
            np.testing.assert_array_equal(one, other)
    assert mosaic.started == started * (1 + members) and (started > 0) == (name == "hopper")


@pytest.mark.parametrize(
    ("members", "heads", "kernels", "programs"),
    [(2, 6, 3, 2), (4, 10, 5, 3), (4, 3, 1, 1)],
    ids=["1.3B on two", "14B on four", "1.3B on four"],
)
def test_mosaic_takes_the_program_of_parts(
    members: int, heads: int, kernels: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else passes over them, but where parts of their own would leave much idle.

    This device's are in halves, which are one program where they have as many tiles.
    """
    monkeypatch.setattr(xla, "traced_for", lambda: H200)
    rows = 32768 // members
    own, other, all_heads = (
        jax.ShapeDtypeStruct((1, rows, n, 128), jnp.bfloat16)
        for n in (heads, heads, heads * members)
    )
    place = jax.ShapeDtypeStruct((2,), jnp.int32)
    q, v = (Parts(x, (other,) * (members - 1), place) for x in (own, all_heads))
    run = functools.partial(attention_in_parts, count=32760)
    traced = jax.jit(run).trace(q, q, v)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == programs
    assert text.count("call @kernel") == kernels
    passes = {"concatenate", "slice", "dynamic_update_slice"}
    assert bool(passes & set(re.findall(r"stablehlo\.(\w+)", text))) == (kernels == 1)
    (whole,) = traced.jaxpr.eqns
    assert needs_of_kernels(whole.params["call_jaxpr"]) == [set(range(i)) for i in range(kernels)]


def needs_of_kernels(jaxpr: Any) -> list[set[int]]:
    """Of each kernel those of the kernels before it that have to be over when it begins."""
    needs: list[set[int]] = []
    behind: dict[Any, set[int]] = {}
    for equation in jaxpr.eqns:
        given = [x for x in equation.invars if not isinstance(x, jax.extend.core.Literal)]
        known = set().union(*(behind.get(x, set()) for x in given))
        if equation.params.get("name") == "kernel":
            needs.append(known)
            known = known | {len(needs) - 1}
        behind.update(dict.fromkeys(equation.outvars, known))
    return needs


@pytest.mark.parametrize(
    ("tiles", "blocks", "wanted"),
    [(128, 6, 64), (128, 20, 64), (64, 10, 26), (296, 20, 145), (10, 6, 10), (1, 200, 1)],
    ids=str,
)
def test_halves_take_no_more_rounds_than_all(tiles: int, blocks: int, wanted: int) -> None:
    """Of 132 thread blocks: halves where they do, else so many rounds of both, else one kernel."""
    half = hopper_parts._half(tiles, blocks)
    rounds = [-(-n * blocks // 132) for n in (half, tiles - half, tiles)]
    assert half == wanted and rounds[0] + rounds[1] == rounds[2]


def test_half_precision(mosaic: Mosaic) -> None:
    q, k, v = draw(128, 256, dtype=jnp.float16)
    found = hopper.attend(q, k, v, 200)
    assert found.dtype == jnp.float16
    assert relative_l2(found, exact(q, k, v, 200)) <= tolerances.ATTENTION_BFLOAT16


@pytest.mark.parametrize(
    ("shape", "count"),
    [((1, 32768, 12, 128), 32760), ((2, 256, 3, 128), 256), ((1, 128, 1, 128), 5)],
)
def test_mosaic_takes_the_program(
    shape: tuple[int, ...], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as a machine without a GPU can tell: it is lowered for one."""
    monkeypatch.setattr(xla, "traced_for", lambda: H200)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    run = functools.partial(attention, count=count, implementation="hopper")
    text = jax.jit(run).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "fmhaSoftmax" not in text


def test_its_axes_are_no_axes_of_the_mesh() -> None:
    """Or a program's index along "batch" would be a device's."""
    mesh = Plan().layout().mesh
    assert not set(mesh.axis_names) & {*hopper._GRID, hopper._GROUP}


def picked(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    *,
    weighed: bool = False,
) -> str:
    monkeypatch.setattr(xla, "traced_for", lambda: xla.Traced("gpu", kind))
    x = jax.ShapeDtypeStruct(shape, dtype)
    return module._pick(x, x, weighed=weighed, in_fp8=False)


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "wanted"),
    [
        ("NVIDIA H200", (1, 32768, 12, 128), jnp.bfloat16, "hopper"),
        ("NVIDIA H100 80GB HBM3", (1, 75648, 40, 128), jnp.bfloat16, "hopper"),
        ("NVIDIA H200", (1, 32768, 12, 128), jnp.float16, "hopper"),
        ("NVIDIA H200", (1, 32768, 12, 128), jnp.float32, "chunked"),
        ("NVIDIA H200", (1, 32760, 12, 128), jnp.bfloat16, "cudnn"),
        ("NVIDIA H200", (1, 4096, 12, 128), jnp.bfloat16, "cudnn"),
        ("NVIDIA H200", (1, 32768, 12, 64), jnp.bfloat16, "cudnn"),
        ("NVIDIA A100-SXM4-80GB", (1, 32768, 12, 128), jnp.bfloat16, "cudnn"),
        ("NVIDIA B200", (1, 32768, 12, 128), jnp.bfloat16, "cudnn"),
    ],
)
def test_when_it_is_taken(
    kind: str,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert picked(monkeypatch, kind, shape, dtype) == wanted


@pytest.mark.parametrize(
    ("kind", "rows", "wanted"),
    [("NVIDIA H200", 4096, "hopper"), ("NVIDIA H200", 128, "hopper")]
    + [("NVIDIA H200", 4095, "cudnn"), ("NVIDIA A100-SXM4-80GB", 4096, "cudnn")],
)
def test_with_a_weight_it_is_taken_at_any_length(
    kind: str, rows: int, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (1, rows, 12, 128)
    assert picked(monkeypatch, kind, shape, jnp.bfloat16, weighed=True) == wanted


@pytest.mark.parametrize("tokens", [32_760, 75_600])
def test_videos_get_rows_that_fit_it(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "traced_for", lambda: H200)
    assert row_tile(tokens, jnp.bfloat16) % hopper.ROWS == 0


def test_what_it_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(128)
    with pytest.raises(ValueError, match="'hopper' has bfloat16 of .* on cpu; 16 bits, multiples"):
        attention(q, k, v, implementation="hopper")
    monkeypatch.setattr(xla, "traced_for", lambda: H200)
    for operands in (draw(130), [x.astype(jnp.float32) for x in (q, k, v)]):
        with pytest.raises(ValueError, match="multiples of 128 rows and heads of 128 on an H100"):
            attention(*operands, implementation="hopper")
    with pytest.raises(ValueError, match="'cudnn_fp8'; one of"):
        partial_attention(q, k, v, implementation="cudnn_fp8")


@pytest.mark.parametrize("count", [128, 100])
def test_its_gradient_is_cudnns(
    count: int, mosaic: Mosaic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward pass too, for the gradient needs its weights."""
    q, k, v = draw(128)
    taken = []

    def stand_in(name: str) -> None:
        def run(q: jax.Array, k: jax.Array, v: jax.Array, *rest: int) -> jax.Array:
            taken.append(name)
            real = rest[0] if rest else k.shape[1]
            return attention(q, k[:, :real], v[:, :real], implementation="chunked")

        monkeypatch.setattr(cudnn, name, run)

    stand_in("_kernel")
    stand_in("_rows")
    wanted, back = jax.vjp(
        lambda *x: attention(x[0], x[1][:, :count], x[2][:, :count], implementation="chunked"),
        q, k, v,
    )  # fmt: skip
    found, own = jax.vjp(lambda *x: hopper.attend(*x, count), q, k, v)
    assert taken == ["_kernel" if count == 128 else "_rows"] and mosaic.started == 0
    np.testing.assert_array_equal(found, wanted)
    for one, other in zip(own(wanted), back(wanted), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("member", [0, 1])
def test_the_gradient_of_parts_is_that_of_what_is_joined(
    member: int, mosaic: Mosaic, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = functools.partial(attention, implementation="chunked")
    monkeypatch.setattr(cudnn, "attend", lambda q, k, v, n: plain(q, k[:, :n], v[:, :n]))
    parts = [in_parts(x, 2, member, slice(1, 2)) for x in draw(256, n=2)]

    def joined(q: Parts, k: Parts, v: Parts) -> Parts:
        out = plain(q.joined(), k.joined()[:, :250], v.joined()[:, :250])
        return q.apart(out)

    wanted, back = jax.vjp(joined, *parts)
    found, own = jax.vjp(lambda *x: hopper_parts.attend(*x, 250), *parts)
    assert mosaic.started == 0
    # Among all heads only those that are meant have a value.
    np.testing.assert_array_equal(found.mine, wanted.mine)
    np.testing.assert_array_equal(found.others[0], wanted.others[0])
    for one, other in zip(own(wanted), back(wanted), strict=True):
        assert np.any(one.own) and np.any(one.others[0])
        jax.tree.map(np.testing.assert_array_equal, one[:2], other[:2])
