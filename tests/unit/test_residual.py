"""The residual stream: the kernel for Hopper, its gradient, and the network it is a part of."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from tests import tolerances
from tests.random_weights import relative_l2
from tests.unit.fake_mosaic import Mosaic, in_place_of_mosaic
from wan_jax import hopper_norm, residual, xla
from wan_jax.config import DiTConfig
from wan_jax.dit import REMAT, Cond, DiT, Modulation
from wan_jax.layers import Linear, LowRank
from wan_jax.plans import Plan
from wan_jax.residual import Stream
from wan_jax.sequence import Share
from wan_jax.weights.quantization import quantized

H200 = xla.Traced("gpu", "NVIDIA H200")
EPS = 1e-6


def draw(*shapes: tuple[int, ...], seed: int = 0, dtype: jnp.dtype = jnp.float32) -> list[Any]:
    stream = np.random.RandomState(seed)
    return [jnp.asarray(stream.standard_normal(shape), dtype) for shape in shapes]


def operands(
    gated: tuple[bool, ...], *, length: int = 16, d: int = 1536
) -> tuple[jax.Array, list[Any], jax.Array, jax.Array]:
    """h, parts, scale and shift, of two; the rows of h have a mean that is far from zero."""
    h, scale, shift = draw((2, length, d), (2, 1, d), (2, 1, d))
    ys = draw(*([h.shape] * len(gated)), seed=1, dtype=jnp.bfloat16)
    gates = draw(*([scale.shape] * len(gated)), seed=2)
    parts = [(gate if has else None, y) for has, gate, y in zip(gated, gates, ys, strict=True)]
    return 3.0 * h + 10.0, parts, scale, shift


def exact(
    h: jax.Array, parts: list[Any], scale: jax.Array, shift: jax.Array
) -> tuple[np.ndarray, np.ndarray]:
    """(the norm, the sum) in float64."""
    total = np.asarray(h, np.float64)
    for gate, y in parts:
        wide = np.asarray(y, np.float64)
        total = total + (wide if gate is None else wide * np.asarray(gate, np.float64))
    centred = total - total.mean(-1, keepdims=True)
    root = np.sqrt(np.square(centred).mean(-1, keepdims=True) + EPS)
    return centred / root * np.asarray(scale, np.float64) + np.asarray(shift, np.float64), total


@pytest.fixture
def mosaic(monkeypatch: pytest.MonkeyPatch) -> Mosaic:
    return in_place_of_mosaic(hopper_norm, monkeypatch)


GATED = [g for count in range(4) for g in itertools.product((True, False), repeat=count)]


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("keep", [True, False])
def test_sum_and_norm(gated: tuple[bool, ...], keep: bool, mosaic: Mosaic) -> None:
    given = operands(gated)
    x, total = hopper_norm.add_and_norm(*given, eps=EPS, keep=keep)
    wanted_x, wanted = exact(*given)
    assert x.dtype == jnp.bfloat16 and relative_l2(x, wanted_x) <= tolerances.RESIDUAL_NORM
    assert mosaic.started == 2 * 16 // hopper_norm.ROWS
    if keep:
        assert total is not None and total.dtype == jnp.float32
        assert relative_l2(total, wanted) <= tolerances.RESIDUAL_SUM
    else:
        assert total is None


@pytest.mark.usefixtures("mosaic")
def test_affine_parameters_are_everybodys() -> None:
    """Of norm3, [d], and of a modulation with a batch of one."""
    h, parts, scale, shift = operands((True,))
    wanted, _ = exact(h, parts, scale[:1], shift[:1])
    stream = Stream(h, tuple(parts), fused=True)
    for given in ((scale[:1], shift[:1]), (scale[0, 0], shift[0, 0])):
        x, after = stream.norm(*given, eps=EPS)
        assert x.dtype == jnp.float32 and relative_l2(x, wanted) <= tolerances.RESIDUAL_NORM
        assert after.terms == ()


@pytest.mark.usefixtures("mosaic")
def test_one_gate_is_that_of_every_video() -> None:
    """Of two, where the modulation has a batch of one; a scan's carry keeps its shape."""
    h, ((gate, y),), scale, shift = operands((True,))
    stream = Stream(h, (), fused=True).add(y, gate[:1])
    assert stream.terms[0][0] is not None and stream.terms[0][0].shape == gate.shape
    x, after = stream.norm(scale, shift, eps=EPS)
    wanted, total = exact(h, [(gate[:1], y)], scale, shift)
    assert relative_l2(x, wanted) <= tolerances.RESIDUAL_NORM
    assert relative_l2(after.h_bld, total) <= tolerances.RESIDUAL_SUM


@pytest.mark.usefixtures("mosaic")
def test_the_stream_is_the_same_fused() -> None:
    """Terms that wait are added once, whichever norms they wait for."""
    h, parts, scale, shift = operands((True, True, False), length=8, d=512)
    found = []
    for fused in (False, True):
        stream, xs = Stream(h, (), fused), []
        for number, (gate, y) in enumerate(parts):
            stream = stream.add(y, gate)
            x, stream = stream.norm(scale, shift, eps=EPS, leave=number == 1)
            xs.append(x)
            assert len(stream.terms) == (fused and number == 1)
        found.append((*xs, stream.whole()))
    for plain, own in zip(*found, strict=True):
        assert relative_l2(own, plain) <= tolerances.RESIDUAL_NORM
    assert relative_l2(found[1][-1], found[0][-1]) <= tolerances.RESIDUAL_SUM


def stand_in(
    h: jax.Array, parts: Any, scale: jax.Array, shift: jax.Array, *, eps: float, keep: bool
) -> tuple[jax.Array, jax.Array | None]:
    """The kernel in plain arithmetic, which may be traced."""
    total = residual._sum(h, tuple(parts))
    x = residual._norm(total, scale, shift, eps).astype(jnp.bfloat16)
    return x, total if keep else None


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Streams with products in bfloat16 wait for their norms, as on Hopper."""
    monkeypatch.setattr(residual, "_fits", lambda h, dtype: dtype == jnp.bfloat16)
    monkeypatch.setattr(hopper_norm, "add_and_norm", stand_in)
    return monkeypatch


@pytest.mark.usefixtures("fused")
def test_gradients_are_the_plain_ones() -> None:
    """To float32 roundings: where three read a norm in bfloat16, no sum is in bfloat16."""
    h, parts, scale, shift = operands((True, False, True), length=8, d=512)
    (gate1, y1), (_, y2), (gate3, y3) = parts
    readers = draw(*[h.shape] * 9, seed=3)

    def run(own: bool, h: Any, gate1: Any, y1: Any, y2: Any, gate3: Any, y3: Any, s: Any) -> Any:
        stream, found, reader = Stream(h, (), own).add(y1, gate1), 0.0, iter(readers)
        for y, gate, leave in ((y2, None, False), (y3, gate3, True), (y2, None, False)):
            x, stream = stream.norm(s, shift, eps=EPS, leave=leave)
            for _ in range(3):  # as q, k and v do
                found += jnp.sum(x.astype(jnp.bfloat16).astype(jnp.float32) * next(reader))
            stream = stream.add(y, gate)
        return found + jnp.sum(jnp.sin(stream.whole()))

    given = h, gate1, y1, y2, gate3, y3, scale
    numbers = tuple(range(7))
    wanted, own = (
        jax.grad(functools.partial(run, on), argnums=numbers)(*given) for on in (False, True)
    )
    for one, other in zip(own, wanted, strict=True):
        assert one.dtype == other.dtype
        assert relative_l2(one, other) <= tolerances.RESIDUAL_SAME


CONFIG = DiTConfig(
    dim=512, ffn_dim=256, num_heads=4, num_layers=3, in_channels=16, out_channels=16,
    text_dim=32, text_len=8, freq_dim=32,
)  # fmt: skip
GRID = (1, 2, 8, 16, 16)  # 64 tokens


def network(dtype: jnp.dtype = jnp.bfloat16) -> DiT:
    return DiT(CONFIG, rngs=nnx.Rngs(0), dtype=dtype)


def prepared(dit: DiT) -> tuple[jax.Array, Modulation, Cond]:
    latents, context = draw(GRID, (1, 5, CONFIG.text_dim))
    h, mod = dit.embed(latents, jnp.array([500.0]))
    return h, mod, dit.prepare(context)


def blocks(dit: DiT, h: jax.Array, mod: Modulation, cond: Cond, **how: Any) -> jax.Array:
    return dit.blocks(h, mod, cond, implementation="chunked", **how)


def low_rank(dit: DiT) -> DiT:
    down, up = draw((3, 512, 4), (3, 4, 512))
    product = dit.layers.self_attn.q
    assert isinstance(product, Linear)
    product.lora = LowRank(0.02 * down, up)
    return dit


@pytest.mark.parametrize("name", ["whole", "layers", "residuals", "fetch", "lora", "fp8"])
def test_blocks_are_the_same_fused(name: str, fused: pytest.MonkeyPatch) -> None:
    dit = network()
    h, mod, cond = prepared(dit)
    (added,) = draw((3, *h.shape), seed=4)
    how: dict[str, Any] = {
        "layers": {"layers": slice(1, 3)},
        "residuals": {"residuals": added},
        "fetch": {"fetch": lambda layer: layer},
    }.get(name, {})
    make: dict[str, Callable[[DiT], DiT]] = {
        "lora": low_rank,
        "fp8": lambda dit: quantized(dit, "fp8_linear"),
    }
    dit = make.get(name, lambda dit: dit)(dit)
    run = jax.jit(lambda dit, *rest: blocks(dit, *rest, **how))
    calls = []
    fused.setattr(hopper_norm, "add_and_norm", lambda *x, **o: calls.append(x) or stand_in(*x, **o))
    own = run(dit, h, mod, cond)
    assert len(calls) == 3
    fused.undo()
    plain = jax.jit(lambda dit, *rest: blocks(dit, *rest, **how))(dit, h, mod, cond)
    assert own.dtype == jnp.float32 and own.shape == h.shape
    assert relative_l2(own, plain) <= tolerances.RESIDUAL_BLOCKS


@pytest.mark.parametrize("remat", REMAT)
def test_gradients_of_blocks(remat: str, fused: pytest.MonkeyPatch) -> None:
    dit = network()
    given = prepared(dit)

    def loss(dit: DiT, h: jax.Array, mod: Modulation, cond: Cond) -> jax.Array:
        return jnp.sum(jnp.sin(blocks(dit, h, mod, cond, remat=remat)))

    def gradients() -> Any:
        return jax.jit(jax.grad(lambda *x: loss(*x), argnums=(0, 1), allow_int=True))(dit, *given)

    own = gradients()
    fused.undo()
    plain = gradients()
    for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(plain), strict=True):
        assert one.dtype == other.dtype
        if np.any(np.asarray(other, np.float32)):
            assert relative_l2(one, other) <= tolerances.RESIDUAL_BLOCKS_GRADIENT


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("remat", REMAT[1:])
def test_the_way_back_keeps_one_array_of_a_block(remat: str) -> None:
    """No sum waits for the next one: it would be kept beside the stream."""
    dit = jax.eval_shape(network)
    h, mod, cond = jax.eval_shape(prepared, dit)
    grad = jax.grad(lambda h, *x: jnp.sum(blocks(x[0], h, *x[1:], remat=remat)))
    kept = "tensor<" + "x".join(map(str, (CONFIG.num_layers, *h.shape)))
    text = jax.jit(grad).lower(h, dit, mod, cond).as_text()
    assert f"{kept}xf32>" in text
    assert (f"{kept}xbf16>" in text) == (remat == "products")  # those of linear(), as ever


def kernels_in(run: Callable[..., Any], *given: Any) -> int:
    """How often the program, lowered for a GPU, calls one of Mosaic's."""
    traced = jax.jit(lambda *x: run(*x)).trace(*given)  # a function that was not traced before
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return text.count("custom_call @mosaic_gpu")


@pytest.mark.parametrize("shape", [(1, 32768, 1536), (1, 75648, 5120), (2, 8, 512)])
@pytest.mark.parametrize("count", range(4))
def test_mosaic_takes_the_program(shape: tuple[int, int, int], count: int) -> None:
    """As far as a machine without a GPU can tell: it is lowered for one."""
    h, y = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    vector = jax.ShapeDtypeStruct((shape[0], 1, shape[2]), jnp.float32)
    parts = [(gate, y) for gate in (vector, None, vector)[:count]]
    run = functools.partial(hopper_norm.add_and_norm, eps=EPS, keep=count != 2)
    assert kernels_in(run, h, parts, vector, vector) == 1


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize(("kind", "calls"), [("NVIDIA H200", 3), ("NVIDIA A100-SXM4-80GB", 0)])
def test_a_block_has_three_of_them(
    spread: bool, kind: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the scan, so three in all; inside shard_map, too."""
    monkeypatch.setattr(xla, "traced_for", lambda: xla.Traced("gpu", kind))
    dit = jax.eval_shape(network)
    given = jax.eval_shape(prepared, dit)
    run: Callable[..., Any] = blocks
    if spread:
        run = jax.shard_map(
            functools.partial(blocks, share=Share(64, tile=8)),
            mesh=Plan().layout().mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    assert kernels_in(run, dit, *given) == calls


@pytest.mark.parametrize("remat", REMAT)
def test_a_gradient_has_none_of_them(remat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training's arrays lie on several devices, and XLA could not split what it does not know."""
    monkeypatch.setattr(xla, "traced_for", lambda: H200)
    dit = jax.eval_shape(network)
    h, mod, cond = jax.eval_shape(prepared, dit)

    def loss(h: jax.Array, dit: DiT, *rest: Any) -> jax.Array:
        return jnp.sum(blocks(dit, h, *rest, remat=remat))

    given = h, dit, mod, cond
    assert kernels_in(loss, *given) == 3
    assert kernels_in(jax.grad(loss), *given) == 0


def test_its_axes_are_no_axes_of_the_mesh() -> None:
    """Or a program's index along "batch" would be a device's."""
    assert not set(Plan().layout().mesh.axis_names) & set(hopper_norm._GRID)


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "wanted"),
    [
        ("NVIDIA H200", (1, 32768, 1536), jnp.bfloat16, True),
        ("NVIDIA H100 80GB HBM3", (2, 75648, 5120), jnp.bfloat16, True),
        ("NVIDIA GH200 480GB", (1, 8, 512), jnp.bfloat16, True),
        ("NVIDIA H200", (1, 32768, 1536), jnp.float32, False),
        ("NVIDIA H200", (1, 32760, 1536), jnp.bfloat16, True),
        ("NVIDIA H200", (1, 32765, 1536), jnp.bfloat16, False),
        ("NVIDIA H200", (1, 0, 1536), jnp.bfloat16, False),
        ("NVIDIA H200", (1, 4096, 384), jnp.bfloat16, False),
        ("NVIDIA H200", (1, 4096, 8192), jnp.bfloat16, False),
        ("NVIDIA A100-SXM4-80GB", (1, 32768, 1536), jnp.bfloat16, False),
        ("NVIDIA B200", (1, 32768, 1536), jnp.bfloat16, False),
        ("cpu", (1, 32768, 1536), jnp.bfloat16, False),
    ],
)
def test_when_it_is_taken(
    kind: str,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    wanted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(xla, "traced_for", lambda: xla.Traced("gpu", kind))
    h = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert residual._fits(h, dtype) == wanted
    stream = jax.eval_shape(lambda h: Stream.of(h, dtype, waiting=True), h)
    assert stream.fused == wanted and len(stream.terms) == wanted
    assert jax.eval_shape(lambda h: Stream.of(h, dtype), h).terms == ()
