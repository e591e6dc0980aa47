"""--quantize: what of a network has 8 bits, where it can run, and what a run tells of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wan_jax
from tests import tolerances
from tests.random_weights import random_array, relative_l2
from tests.unit.conftest import TINY
from tests.unit.test_cli import ROOT, parse
from wan_jax import jobs, runner, sampler, schedulers, xla
from wan_jax.dit import DiT
from wan_jax.layers import QuantizedLinear
from wan_jax.planning import targets
from wan_jax.planning.needs import Case, needs
from wan_jax.planning.programs import Work
from wan_jax.plans import Plan
from wan_jax.weights import lora, quantization, sources, trees
from wan_jax.weights.quantization import PRODUCTS, quantized

Planned = Callable[..., tuple[Any, jobs.Plan]]
_prepare = xla.jit(DiT.prepare)
LATENTS = (1, 2, 4, 4, 16)


def network(config: Any = TINY.dit) -> DiT:
    abstract = trees.abstract(lambda: DiT(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    arrays = {k: random_array(k, v.shape) for k, v in trees.flatten(abstract).items()}
    return trees.fill_as(abstract, arrays)


@pytest.fixture(scope="module")
def dit() -> DiT:
    return network()


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape), jnp.float32)


def latents(dit: DiT, plan: Plan | None = None) -> jax.Array:
    """Two guided steps."""
    context = normal(1, 8, TINY.dit.text_dim, seed=1).astype(jnp.bfloat16)
    conds = [_prepare(dit, context), _prepare(dit, context[:, :2])]
    start, layout = normal(*LATENTS), None
    if plan is not None:
        layout = plan.layout()._replace(small=64).of_weights(split=plan.dit_fsdp)
        dit, start = jax.device_put(dit, layout.weights(dit)), layout.whole(start)
    schedule = schedulers.make_schedule("unipc", 2, shift=5.0)
    return sampler.sample(dit, start, schedule, conds, guidance=3.0, layout=layout)


# Networks


def test_the_large_products_have_8_bits_and_nothing_else_changes(dit: DiT) -> None:
    whole, narrow = trees.flatten(dit), trees.flatten(quantized(dit, "fp8"))
    kernels = {f"layers.{path}.kernel" for path in PRODUCTS}
    assert {k for k, v in narrow.items() if v.dtype == jnp.float8_e4m3fn} == kernels
    assert narrow.keys() - whole.keys() == {f"layers.{path}.scale" for path in PRODUCTS}
    assert not whole.keys() - narrow.keys()
    for name in whole.keys() - kernels:
        np.testing.assert_array_equal(narrow[name], whole[name])
    for path in PRODUCTS:
        kernel, scale = narrow[f"layers.{path}.kernel"], narrow[f"layers.{path}.scale"]
        assert scale.shape == (TINY.dit.num_layers,) and scale.dtype == jnp.float32
        wide = kernel.astype(jnp.float32) * scale[:, None, None]
        given = whole[f"layers.{path}.kernel"].swapaxes(1, 2)
        assert relative_l2(wide, given) <= tolerances.FP8_WEIGHTS


@pytest.mark.parametrize("kind", quantization.KINDS)
def test_shapes_are_those_of_the_real_one(dit: DiT, kind: str) -> None:
    real = quantized(dit, kind)
    shapes = sources.abstract_part(TINY.dit, jnp.dtype(jnp.bfloat16), kind=kind)
    assert jax.tree.structure(real) == jax.tree.structure(shapes)
    for leaf, shape in zip(jax.tree.leaves(real), jax.tree.leaves(shapes), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)


def test_attention_goes_with_the_kind(dit: DiT) -> None:
    def text(network: DiT) -> str:
        cond = _prepare(network, normal(1, 8, TINY.dit.text_dim).astype(jnp.bfloat16))
        return str(jax.make_jaxpr(DiT.__call__)(network, normal(*LATENTS), jnp.ones((1,)), cond))

    plain, linear, both = (
        text(n) for n in (dit, quantized(dit, "fp8_linear"), quantized(dit, "fp8"))
    )
    assert "f8_e4m3" not in plain
    assert 0 < linear.count("f8_e4m3fn") < both.count("f8_e4m3fn")


def test_a_given_network_may_be_used_up() -> None:
    given = network()
    narrow = quantized(given, "fp8", donate=True)
    assert given.layers.ffn_in.kernel[...].is_deleted()
    assert not given.layers.cross_attn.q.kernel[...].is_deleted()
    assert np.isfinite(np.asarray(latents(narrow))).all()


@pytest.mark.parametrize(
    "plan",
    [Plan(guidance=2, ulysses=2, dit_fsdp=True), Plan(ring=2), Plan(ulysses=2)],
    ids=str,
)
def test_several_devices_give_nearly_the_same(dit: DiT, plan: Plan) -> None:
    """A sum in another order may round to the next number of 8 bits; attention of a ring has 16."""
    found = latents(quantized(dit, "fp8"), plan)
    alone = latents(quantized(dit, "fp8_linear" if plan.ring > 1 else "fp8"))
    assert relative_l2(found, alone) <= tolerances.FP8_SPREAD


def test_weights_lie_where_they_are_told(dit: DiT) -> None:
    layout = Plan(ulysses=2).layout()._replace(small=64).of_weights(split=True)
    placed = jax.device_put(dit, layout.weights(dit))
    narrow = quantized(placed, "fp8", where=layout.weight)
    for leaf, like in zip(jax.tree.leaves(narrow), jax.tree.leaves(layout.weights(narrow))):
        assert leaf.sharding.is_equivalent_to(like, leaf.ndim)
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(quantized(dit, "fp8")), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_lora_is_added_before(dit: DiT) -> None:
    factors = {"layers.self_attn.q": (normal(2, 32, 1), normal(2, 1, 32))}
    added = lora.Lora.of(factors, alpha=1.0)
    with pytest.raises(ValueError, match="before these are quantised"):
        lora.merge(quantized(dit, "fp8"), [(added, 1.0)])


# load()


@pytest.fixture(scope="module")
def load(tiny_source: Path, tiny_cache: Path) -> Callable[..., wan_jax.Wan]:
    def run(quantize: str | None, **more: Any) -> wan_jax.Wan:
        return wan_jax.load(tiny_source, cache_dir=tiny_cache, quantize=quantize, **more)

    return run


def test_a_quantised_checkpoint_makes_videos(load: Callable[..., wan_jax.Wan]) -> None:
    said: list[str] = []
    video = {"size": (32, 16), "frames": 5, "steps": 2, "seed": 3, "output": "latents"}
    plain = load(None).generate("a fox", **video)
    narrow = load("fp8", notify=said.append)
    assert isinstance(narrow.network("dit").layers.ffn_in, QuantizedLinear)
    found = narrow.generate("a fox", **video)
    assert any("emulated on a CPU" in text for text in said)
    assert tolerances.FP8_MATTERS <= relative_l2(found, plain) <= tolerances.FP8_VIDEO
    again = load("fp8", offload=True)
    for _ in range(2):  # read and quantised anew
        np.testing.assert_array_equal(again.generate("a fox", **video), found)


@pytest.mark.parametrize(
    ("quantize", "dtype", "words"),
    [
        ("int8", "bfloat16", r"quantize is 'int8'; one of \('fp8', 'fp8_linear'\) is needed"),
        ("fp8", "float32", "quantize is 'fp8' and dtype 'float32'; 'bfloat16' is needed with it"),
    ],
)
def test_what_cannot_be_is_named(quantize: str, dtype: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wan_jax.load("nowhere", quantize=quantize, dtype=dtype)


class _Device:
    def __init__(self, platform: str, kind: str, capability: Any = None) -> None:
        self.platform, self.device_kind = platform, kind
        if capability is not None:
            self.compute_capability = capability


@pytest.mark.parametrize(
    ("device", "can"),
    [
        (_Device("gpu", "NVIDIA H100", "9.0"), ("fp8", "fp8_linear")),
        (_Device("gpu", "NVIDIA B200", "10.0"), ("fp8", "fp8_linear")),
        (_Device("gpu", "NVIDIA L40S", "8.9"), ("fp8_linear",)),
        (_Device("gpu", "NVIDIA A100", "8.0"), ()),
        (_Device("gpu", "AMD Instinct MI300X", "gfx942"), ()),
        (_Device("tpu", "TPU v6e"), ()),
    ],
    ids=lambda value: getattr(value, "device_kind", None),
)
def test_devices_without_such_products_are_refused(
    device: _Device, can: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [device])
    said: list[str] = []
    for kind in quantization.KINDS:
        if kind in can:
            quantization.check_device(kind, notify=said.append)
            continue
        with pytest.raises(ValueError, match=f"{kind!r}, which {device.device_kind} has no"):
            quantization.check_device(kind)
    quantization.check_device(None)
    assert not said


# The scripts


@pytest.fixture
def planned(
    tiny_source: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Planned:
    """The flags and the plan of a command line for an image of the tiny checkpoint."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[Any, jobs.Plan]:
        given = ["--ckpt_dir", str(tiny_source), "--cache_dir", str(tiny_cache), *arguments]
        values = parse(*given, "--base_seed", "1", "--frame_num", "1", "--save_file", "a.png")
        return values, jobs.plan(values, ROOT / "configs")

    return run


def test_the_record_tells_it_and_other_runs_know_it(
    planned: Planned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.execute(*planned("--quantize", "fp8"))
    assert "quantize fp8 is emulated on a CPU" in capsys.readouterr().err
    record = tmp_path / "a.png.json"
    facts = json.loads(record.read_text())
    assert facts["quantize"] == "fp8"

    def skips(*arguments: str) -> bool:
        return bool(planned("--skip_existing", *arguments)[1].skipped)

    assert skips("--quantize", "fp8")
    assert not skips() and not skips("--quantize", "fp8_linear")
    del facts["quantize"]
    record.write_text(json.dumps(facts))  # as earlier releases wrote it
    assert skips() and not skips("--quantize", "fp8")
    # By this a state is known, too.
    (wide,), (narrow,) = (planned(*a)[1].jobs for a in ((), ("--quantize", "fp8")))
    assert wide.wanted != narrow.wanted


def test_flags_that_cannot_be_are_named(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--quantize is 'fp8' and dtype 'float32'"):
        planned("--quantize", "fp8", "--dtype", "float32")

    def refuse(kind: str | None, **_: Any) -> None:
        raise ValueError(f"quantize is {kind!r}, which this has no products for")

    monkeypatch.setattr(quantization, "check_device", refuse)
    with pytest.raises(ValueError, match="--quantize is 'fp8', which this has no products for"):
        runner.execute(*planned("--quantize", "fp8"))


# --plan


def test_a_plan_counts_a_byte_for_a_weight() -> None:
    config = wan_jax.config.RELEASED["t2v-14B"]
    target = targets.parse("h100:1")
    case = Case(config, Work((21, 90, 160, 16), 50), Plan(), target, offload=True)
    wide, narrow = (needs(c)["denoise"].weights for c in (case, case._replace(quantize="fp8")))
    d, f = config.dit.dim, config.dit.ffn_dim
    scales = 4 * len(PRODUCTS) * config.dit.num_layers
    assert wide - narrow == config.dit.num_layers * (4 * d * d + 2 * d * f) - scales
