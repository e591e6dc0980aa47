"""The trainer: what a LoRA and a whole DiT learn from a cache, on one device and on several."""

import dataclasses
import itertools
import json
import re
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flax import nnx

import wan_jax
from tests import tolerances
from tests.random_weights import relative_l2
from tests.unit.conftest import TINY
from tests.unit.test_cli import ROOT
from tests.unit.test_lora import KINDS, factors, network
from tests.unit.test_media import pattern
from wan_jax import layers, sharding, xla
from wan_jax.dit import REMAT, DiT
from wan_jax.layers import _contract, _product
from wan_jax.training import (
    cache,
    command,
    config,
    finetune,
    flow,
    lora,
    metrics,
    results,
    samples,
    saving,
)
from wan_jax.training.batches import Batches
from wan_jax.training.dataset import Example
from wan_jax.training.entries import Cache
from wan_jax.training.finetune import Beside, Frozen, Full
from wan_jax.training.loop import LoopConfig, run
from wan_jax.training.lora import LoraConfig
from wan_jax.training.optimizer import OptimizerConfig
from wan_jax.training.step import State, make_state
from wan_jax.weights import lora as lora_weights
from wan_jax.weights import miniature, trees
from wan_jax.weights.lora import Lora

Wan = wan_jax.Wan
SIZE, FRAMES = (32, 16), 5
FLOW = flow.FlowConfig(text_dropout=0.1, image_dropout=0.1)
RANK = LoraConfig(lora_rank=4, lora_alpha=8.0)
F32 = jnp.dtype(jnp.float32)
KEY = jax.random.PRNGKey(3)


@pytest.fixture(scope="module", autouse=True)
def hasty() -> Iterator[None]:
    """Programs are compiled without optimisation: each is small and runs a few times."""
    with pytest.MonkeyPatch.context() as patch:
        hasty = xla.compiler_options("cpu") | {"xla_backend_optimization_level": "0"}
        patch.setitem(xla._OPTIONS, "cpu", hasty)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips and their listing."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for k, text in enumerate(("A red cat.", "Two dogs run.")):
        frames = pattern(4 * k + FRAMES, *SIZE)[4 * k :]
        wan_jax.save_video(frames, folder / f"{k}.mp4", fps=16)
        lines.append(json.dumps({"file_name": f"{k}.mp4", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def sources(tiny_source: Path, tiny_i2v_source: Path, tiny_flf2v_source: Path) -> dict[str, Path]:
    return {"t2v": tiny_source, "i2v": tiny_i2v_source, "flf2v": tiny_flf2v_source}


@pytest.fixture(scope="module")
def learner(
    sources: dict[str, Path], tiny_cache: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Wan, Cache]]:
    """kind -> the tiny checkpoint and the clips as it encodes them."""
    made: dict[str, tuple[Wan, Cache]] = {}

    def make(kind: str) -> tuple[Wan, Cache]:
        if kind not in made:
            wan = wan_jax.load(sources[kind], dtype="float32", cache_dir=tiny_cache)
            examples = [
                Example(data / f"{k}.mp4", (text,), f"{k}.mp4")
                for k, text in enumerate(("A red cat.", "Two dogs run."))
            ]
            folder = tmp_path_factory.mktemp(f"encoded-{kind}")
            made[kind] = wan, cache.build(wan, examples, folder=folder, size=SIZE, frames=FRAMES)
        return made[kind]

    return make


def train(
    wan: Wan,
    found: Cache,
    out: Path,
    *,
    full: bool,
    steps: int,
    batch_size: int = 2,
    accumulate: int = 1,
    layout: sharding.Layout | None = None,
) -> tuple[State, list[float], Any]:
    """The state after some steps, the losses, and what the network is made with."""
    place = layout or sharding.make_layout(devices=jax.devices()[:1])
    dit = wan.network("dit")
    optimizer = OptimizerConfig(steps=60, learning_rate=4e-3, warmup_steps=5, weight_decay=0.0)
    made = itertools.count(1)  # steps; fewer are the same program, which is compiled once
    trained: finetune.Trained
    if full:
        trained = Full(wan.config.dit, F32)
        params = {"dit": jax.tree.map(jnp.copy, trees.flatten(dit))}
        dit = None
    else:
        trained = Beside(RANK.scale)
        key = jax.random.PRNGKey(1)
        params = {"lora": lora.fresh(wan.config.dit, 4, RANK.lora_targets, key)}
        leaves = trees.flatten(dit)
        dit = trees.fill(dit, jax.device_put(leaves, place.weights(leaves)))
    params = jax.device_put(params, place.weights(params))
    with Batches(found, batch_size=batch_size, seed=0) as batches:
        state = run(
            params,
            finetune.make_loss(trained, FLOW),
            batches.batch,
            out,
            optimizer=optimizer,
            loop=LoopConfig(accumulate=accumulate, checkpoint_every=0),
            frozen=Frozen(place.whole(batches.null), dit),
            place=place.rows,
            layout=place,
            stop=lambda: next(made) == steps,
        )
    assert int(state.step) == steps
    losses = [line["loss"] for line in metrics.read(out / metrics.FILE)]
    return state, losses, (trained, dit)


def velocity(net: DiT, wan: Wan, found: Cache) -> np.ndarray:
    """The network's answer to the first batch."""
    with Batches(found, batch_size=2, seed=0) as batches:
        batch = batches.batch(0)
    x = jnp.asarray(batch.latents)
    if batch.known is not None:
        x = jnp.concatenate([x, jnp.asarray(batch.known)], axis=-1)
    tokens = None if batch.tokens is None else jnp.asarray(batch.tokens)
    answer = jax.jit(
        lambda net, x: net(x, jnp.full((2,), 500.0), net.prepare(batch.context, tokens))
    )
    return np.asarray(answer(net, x))


# Factors beside a kernel


@pytest.mark.parametrize("kind", KINDS)
def test_folded_padding_is_the_same_loss_and_gradient(kind: str) -> None:
    net = network(KINDS[kind])
    rows = net.config.image_positions or 5
    keys = jax.random.split(jax.random.key(0), 5)
    clean = jax.random.normal(keys[0], (2, 2, 4, 4, 16))
    context = jax.random.normal(keys[1], (2, 7, net.config.text_dim)).at[1, 3:].set(0.0)
    images = {}
    if kind != "t2v":
        images = {
            "known_bthwc": jax.random.normal(keys[2], (2, 2, 4, 4, 20)),
            "tokens_bsd": jax.random.normal(keys[3], (2, rows, net.config.image_dim)),
        }

    @jax.jit
    def both(weights: Any, context: jax.Array) -> Any:
        def value(weights: Any, context: jax.Array, fold: bool) -> jax.Array:
            net_ = trees.fill(net, weights)
            return flow.loss(net_, clean, context, keys[4], FLOW, fold=fold, **images).sum()

        return [jax.value_and_grad(value, (0, 1))(weights, context, x) for x in (False, True)]

    plain, folded = (jax.tree.leaves(x) for x in both(trees.flatten(net), context))
    moved = [(p, f) for p, f in zip(plain, folded, strict=True) if np.abs(p).max() > 0]
    assert len(moved) > 40
    assert max(relative_l2(f, p) for p, f in moved) < tolerances.TRAINING_FOLDED


def test_what_is_computed_again_changes_no_gradient() -> None:
    net = network(KINDS["t2v"])
    clean = jax.random.normal(jax.random.key(0), (2, 2, 4, 4, 16))
    context = jax.random.normal(jax.random.key(1), (2, 7, net.config.text_dim))

    def gradient(weights: Any, remat: str) -> Any:
        def value(weights: Any) -> jax.Array:
            chosen = dataclasses.replace(FLOW, remat=remat)
            return flow.loss(trees.fill(net, weights), clean, context, KEY, chosen).sum()

        return jax.grad(value)(weights)

    weights = trees.flatten(net)
    found = {r: jax.jit(gradient, static_argnums=1)(weights, r) for r in REMAT}
    for remat in REMAT[1:]:
        for path, leaf in found[remat].items():
            assert relative_l2(leaf, found["none"][path]) < tolerances.TRAINING_REMAT, (remat, path)
    # Products of the whole gradient: the attention's own are not kept on the CPU.
    counts = {
        r: str(jax.make_jaxpr(gradient, static_argnums=1)(weights, r)).count("dot_general")
        for r in REMAT
    }
    assert counts["none"] <= counts["products"] < counts["attention"] == counts["full"], counts


@pytest.mark.parametrize("kind", KINDS)
def test_attached_factors_are_as_if_merged(kind: str) -> None:
    net, made = network(KINDS[kind]), factors(KINDS[kind])
    flat = {f"{path}.{half}": jnp.asarray(a) for path, pair in made.items()
            for half, a in zip(("down", "up"), pair)}  # fmt: skip
    attached = lora.attach(net, flat, scale=0.5)
    merged = lora_weights.merge(net, [(Lora.of(made, alpha=1.5), 1.0)])
    assert lora.to_lora(flat, alpha=1.5).pairs.keys() == made.keys()
    x = jax.random.normal(jax.random.key(0), (2, 1, 4, 4, KINDS[kind].in_channels))
    context = jax.random.normal(jax.random.key(1), (2, 7, KINDS[kind].text_dim))
    tokens = None
    if kind != "t2v":
        rows = KINDS[kind].image_positions or 5
        tokens = jax.random.normal(jax.random.key(2), (2, rows, 16))
    t = jnp.array([3.0, 700.0])
    answer = jax.jit(lambda net: net(x, t, net.prepare(context, tokens)))
    plain, one, two = (np.asarray(answer(n)) for n in (net, attached, merged))
    assert relative_l2(one, two) < tolerances.TRAINING_ATTACHED
    assert relative_l2(one, plain) > tolerances.LORA_MATTERS


def test_a_network_without_factors_is_the_tree_that_it_was() -> None:
    net = network()
    names = set(trees.flatten(net))
    fresh = lora.fresh(KINDS["t2v"], 2, ("self_attn.q",), jax.random.key(0))
    attached = lora.attach(net, fresh, scale=1.0)
    assert set(trees.flatten(net)) == names
    extra = {f"layers.self_attn.q.lora.{half}" for half in ("down", "up")}
    assert set(trees.flatten(attached)) == names | extra
    kernel = trees.flatten(attached)["layers.ffn_in.kernel"]
    assert kernel is trees.flatten(net)["layers.ffn_in.kernel"]


def test_fresh_factors_change_nothing() -> None:
    made = lora.fresh(KINDS["t2v"], 4, lora.TARGETS, jax.random.key(0))
    assert len(made) == 20
    assert not any(np.any(a) for name, a in made.items() if name.endswith(".up"))
    spread = float(jnp.std(made["layers.ffn_out.down"]))
    assert spread == pytest.approx(64**-0.5, rel=0.1)
    assert made["layers.ffn_out.down"].shape == (2, 64, 4)
    with pytest.raises(ValueError, match="'self_attn.x'; this network has head_proj"):
        lora.fresh(KINDS["t2v"], 4, ("self_attn.x",), jax.random.key(0))


@pytest.mark.parametrize("axes", [(6,), (2, 3)])
def test_narrow_products_have_the_gradient_of_wide_ones(axes: tuple[int, ...]) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 5, *axes), jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (*axes, 4), jnp.bfloat16)
    weight = jax.random.normal(keys[2], (2, 5, 4), jnp.bfloat16).astype(jnp.float32)

    def gradient(product: Callable[..., Any]) -> Any:
        return jax.grad(lambda x, k: jnp.sum(product(x, k, jnp.float32) * weight), argnums=(0, 1))(
            x, kernel
        )

    for one, two in zip(gradient(_product), gradient(_contract), strict=True):
        assert one.dtype == two.dtype == jnp.bfloat16
        assert relative_l2(np.asarray(one, np.float32), np.asarray(two, np.float32)) < (
            tolerances.TRAINING_GRADIENT
        )


def test_no_product_backward_is_wider_than_its_kernel() -> None:
    p = layers.Linear(8, 4, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)

    def loss(p: layers.Linear, x: jax.Array) -> jax.Array:
        return jnp.sum(layers.linear(p, x).astype(jnp.float32))

    x = jnp.ones((3, 8), jnp.bfloat16)
    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(p, x).as_text()
    products = re.findall(r"dot_general .*: \((.*)\) -> (.*)", program)
    assert len(products) >= 2
    for operands, result in products:
        assert "f32" not in operands and "f32" in result


# Learning


@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_clips_are_learned(learner: Any, tmp_path: Path, kind: str, full: bool) -> None:
    wan, found = learner(kind)
    before = jax.tree.map(np.asarray, trees.flatten(wan.network("dit")))
    state, losses, (trained, dit) = train(wan, found, tmp_path, full=full, steps=60)
    share = np.mean(losses[-15:]) / np.mean(losses[:15])
    bound = tolerances.TRAINING_OVERFIT if full else tolerances.TRAINING_OVERFIT_LORA
    assert share < bound, losses
    after = trees.flatten(wan.network("dit"))
    assert all(np.array_equal(before[name], after[name]) for name in before)
    if full or kind != "t2v":
        return
    made = results.network(trained, state, dit)
    answer = velocity(made, wan, found)
    assert relative_l2(answer, velocity(wan.network("dit"), wan, found)) > tolerances.LORA_MATTERS


@pytest.mark.parametrize("kind", ["t2v", "flf2v"])
def test_a_trained_lora_is_loaded_from_its_file(
    learner: Any, sources: dict[str, Path], tiny_cache: Path, tmp_path: Path, kind: str
) -> None:
    wan, found = learner(kind)
    state, _, (trained, dit) = train(wan, found, tmp_path, full=False, steps=12)
    here = velocity(results.network(trained, state, dit), wan, found)
    for naming in ("diffusers", "comfyui"):
        file = tmp_path / f"{naming}.safetensors"
        results.write_lora(file, state, RANK, naming=naming)
        other = wan_jax.load(sources[kind], lora=file, dtype="float32", cache_dir=tiny_cache)
        there = velocity(other.network("dit"), wan, found)
        assert relative_l2(here, there) < tolerances.TRAINING_ATTACHED
    assert relative_l2(here, velocity(wan.network("dit"), wan, found)) > 0


def test_kernels_have_no_gradient_beside_factors(learner: Any) -> None:
    wan, found = learner("t2v")
    dit = wan.network("dit")
    params = {"lora": lora.fresh(wan.config.dit, 4, lora.TARGETS, jax.random.key(0))}
    with Batches(found, batch_size=2, seed=0) as batches:
        batch = jax.tree.map(jnp.asarray, batches.batch(0))
        loss = finetune.make_loss(Beside(1.0), FLOW)
        frozen = Frozen(jnp.asarray(batches.null), dit)
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    text = gradient.lower(params, frozen, batch, jax.random.key(0)).compile().as_text()
    gradients = ("f32[32,64]{1,0} dot(", "f32[64,32]{1,0} dot(")
    assert "f32[32,4]{1,0} dot(" in text or "f32[4,32]{1,0} dot(" in text
    assert not any(shape in text for shape in gradients)


def test_a_checkpoint_comes_of_it(
    learner: Any, sources: dict[str, Path], tiny_cache: Path, tmp_path: Path
) -> None:
    wan, found = learner("t2v")
    state, _, (trained, _) = train(wan, found, tmp_path, full=True, steps=2)
    source = wan_jax.loading.prepare(sources["t2v"], dtype="float32", cache_dir=tiny_cache)
    path = tmp_path / "checkpoint"
    for _ in range(2):  # the second time it is there
        results.write_checkpoint(path, source, trained, state, about={"why": "a test"})
    other = wan_jax.load(path, dtype="float32")
    learned = results.learned(state)["dit"]
    for name, leaf in trees.flatten(other.network("dit")).items():
        np.testing.assert_array_equal(leaf, learned[name])
    assert other.digest not in ("", wan.digest)
    vae = next(p for p in (path / "vae").rglob("*") if p.is_file())
    assert vae.stat().st_nlink > 1
    entry = json.loads((path / "manifest.json").read_text())["parts"]["dit"]
    assert entry["trained"] == {"why": "a test", "step": 2}
    assert not [p for p in tmp_path.iterdir() if ".partial-" in p.name]
    from wan_jax.weights import export

    export.write(path, tmp_path / "back", layout="diffusers")
    again = wan_jax.load(tmp_path / "back", dtype="float32", cache_dir=tmp_path / "cache")
    assert (
        relative_l2(
            velocity(again.network("dit"), wan, found), velocity(other.network("dit"), wan, found)
        )
        == 0
    )


# Several devices


@pytest.mark.parametrize(("full", "shares"), [(True, 4), (False, 2)], ids=["full-4", "lora-2"])
def test_devices_do_not_change_the_losses(
    learner: Any, tmp_path: Path, full: bool, shares: int
) -> None:
    wan, found = learner("t2v")
    pieces = 2 if shares == 2 else 1
    own = {"full": full, "steps": 3, "batch_size": 8, "accumulate": pieces}
    _, alone, _ = train(wan, found, tmp_path / "one", **own)
    layout = sharding.make_layout(shares, devices=jax.devices()[:4], small=64)
    state, several, (_, dit) = train(wan, found, tmp_path / "four", layout=layout, **own)
    np.testing.assert_allclose(several, alone, rtol=tolerances.TRAINING_SHARDED)
    large = [leaf for leaf in jax.tree.leaves((state, dit)) if leaf.size >= 64]
    assert len(large) > 20
    for leaf in large:
        assert len(leaf.sharding.device_set) == 4
        held = max(shard.data.size for shard in leaf.addressable_shards)
        assert held == leaf.size // shares


def test_where_weights_lie() -> None:
    def spec(shape: tuple[int, ...], count: int) -> jax.sharding.PartitionSpec:
        return sharding.weight_spec(shape, ("ring", "ulysses"), count)

    over = ("ring", "ulysses")
    assert spec((30, 1536, 8960), 4) == jax.sharding.PartitionSpec(None, None, over)
    assert spec((30, 8960, 1536), 4) == jax.sharding.PartitionSpec(None, over)
    assert spec((30, 1537, 8961), 4) == jax.sharding.PartitionSpec()
    assert spec((24, 4096, 4096), 3) == jax.sharding.PartitionSpec()  # layers stay together
    assert spec((1536,), 4) == jax.sharding.PartitionSpec()
    assert spec((30, 1536, 8960), 1) == jax.sharding.PartitionSpec()
    with pytest.raises(ValueError, match="fsdp is 3; a divisor of the"):
        sharding.make_layout(3)


# Settings and flags

GOOD = {"steps": 4, "learning_rate": 1e-3}


def configured(path: Path, **settings: Any) -> Path:
    path.write_text(f'"""Settings."""\n\nconfig = {GOOD | settings!r}\n')
    return path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stepz": 3}, r"unknown settings \['stepz'\]; known: .*'steps'"),
        ({"steps": 0}, "steps is 0"),
        ({"remat": "some"}, "remat is 'some'"),
        ({"keep": 0}, "keep is 0"),
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"lora_alpha": 0.0}, "lora_alpha is 0.0"),
        ({"lora_targets": "q"}, "lora_targets is 'q'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 3, "accumulate": 2}, "accumulate is 2; a divisor of batch_size 3"),
        ({"fsdp": 0}, "fsdp is 0"),
        ({"fps": -1}, "fps is -1"),
        ({"sample_every": 5}, "sample_every is 5; sample_prompts are needed"),
        ({"sample_prompts": "one"}, "sample_prompts is 'one'; a list of texts"),
        ({"sample_prompts": ["x"], "sample_images": ["a", "b"]}, "sample_images has 2 entries"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"--config .*config.py.* {message}"):
        config.read(configured(tmp_path / "config.py", **settings))


def test_a_file_that_is_no_configuration(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text("config = {'steps': print(1)}")
    with pytest.raises(ValueError, match="is not a file with one `config"):
        config.read(file)
    file.write_text("config = {'steps': 3}")
    with pytest.raises(ValueError, match="lacks learning_rate, which has no default"):
        config.read(file)


@pytest.mark.parametrize("name", ["t2v_1_3b", "lora_t2v_1_3b", "lora_i2v_14b"])
def test_the_configurations_that_come_with_it(name: str) -> None:
    found = config.read(ROOT / "configs" / f"train_{name}.py")
    assert found.part(OptimizerConfig).steps == found.steps
    assert bool(found.lora_rank) == ("lora" in name)
    assert dataclasses.asdict(found.part(LoraConfig))["lora_targets"] == lora.TARGETS


def plan(*arguments: str) -> command.Plan:
    values = flags.FlagValues()
    command.define_flags(values)
    values(["train", *arguments])
    return command.make_plan(values)


def test_a_plan_says_what_would_be_done(tiny_source: Path, data: Path, tmp_path: Path) -> None:
    file = configured(
        tmp_path / "c.py", lora_rank=2, sample_prompts=["A cat."], size=(32, 16), sample_every=2
    )
    made = plan(*_given(file, data, tmp_path), "--ckpt_dir", str(tiny_source), "--dry_run")
    text = command.describe(made)
    assert (
        "LoRA of rank 2" in text and "2 examples, not opened yet, at (32, 16), 5 frames, 8" in text
    )
    assert "lora.safetensors" in text and "1 samples every 2" in text
    assert not (tmp_path / "out").exists()
    elsewhere = plan(*_given(file, data, tmp_path), "--ckpt_dir", "Wan-AI/none", "--dry_run")
    assert "not on this machine" in command.describe(elsewhere)
    with pytest.raises(ValueError, match="/no/such does not exist"):
        plan(*_given(file, data, tmp_path), "--ckpt_dir", "/no/such", "--dry_run")


def _given(file: Path, data: Path, tmp_path: Path) -> list[str]:
    return ["--config", str(file), "--data", str(data), "--out", str(tmp_path / "out")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": (30, 16)}, r"size is \(30, 16\)"),
        ({"frames": 6}, "frames is 6"),
        ({"lora_rank": 2, "lora_targets": ["nothing"]}, "lora_targets has 'nothing'"),
        ({"sample_prompts": ["x"], "sample_steps": 0}, r"sample 0 \('x'\): sample_steps=0"),
        ({"sample_prompts": ["x"], "sample_images": ["a.png"]}, "sample_image is given"),
    ],
)
def test_what_does_not_fit_the_checkpoint(
    tiny_source: Path, data: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    file = configured(tmp_path / "c.py", **settings)
    with pytest.raises(ValueError, match=f"--config .*c.py: .*{message}"):
        plan(*_given(file, data, tmp_path), "--ckpt_dir", str(tiny_source))


def test_a_result_of_another_training_is_not_taken_for_this_one(
    learner: Any, sources: dict[str, Path], tiny_cache: Path, data: Path, tmp_path: Path
) -> None:
    wan, found = learner("t2v")
    state, _, (trained, _) = train(wan, found, tmp_path, full=True, steps=2)
    source = wan_jax.loading.prepare(sources["t2v"], dtype="float32", cache_dir=tiny_cache)
    file = configured(tmp_path / "c.py")
    given = (*_given(file, data, tmp_path), "--ckpt_dir", str(sources["t2v"]))
    own = {"config": command._json(plan(*given).config), "dtype": "bfloat16"}
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / results.CHECKPOINT
    results.write_checkpoint(path, source, trained, state, about=own)
    configured(file, checkpoint_every=7)  # changes no weight
    plan(*given)
    configured(file, batch_size=2)
    with pytest.raises(ValueError, match="checkpoint comes of another training: batch_size differ"):
        plan(*given)
    configured(file)
    with pytest.raises(ValueError, match="training: dtype differ; choose another --out, or delete"):
        plan(*given, "--dtype", "float32")


def executed(*arguments: str) -> None:
    values = flags.FlagValues()
    command.define_flags(values)
    values(["train", *arguments])
    command.execute(values, command.make_plan(values))


def test_a_finished_result_is_kept_only_of_the_same_data_and_checkpoint(
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, clips = tmp_path / "source", tmp_path / "data"
    miniature.write(source, config=TINY, seed=1)
    shutil.copytree(data, clips)
    file = configured(tmp_path / "c.py", steps=1, batch_size=8, warmup_steps=0, fps=16)
    given = [*_given(file, clips, tmp_path), "--ckpt_dir", str(source)]
    given += ["--cache_dir", str(tmp_path / "cache")]
    executed(*given)
    manifest = tmp_path / "out" / results.CHECKPOINT / "manifest.json"
    about = json.loads(manifest.read_text())["parts"]["dit"]["trained"]
    assert about["dtype"] == "bfloat16" and about["data"]["examples"] == 2

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(command.checkpoint, "restore", never)  # the source's weights
        assert "were made before" not in capsys.readouterr().err
        executed(*given)
        assert "1 of 1 steps were made before; the rest follows" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    monkeypatch.setattr(command, "_train", never)
    listing = clips / "metadata.jsonl"
    text = listing.read_text()
    listing.write_text(text.replace("red", "blue"))
    with pytest.raises(ValueError, match=f"{manifest.parent} comes of another .*: data differ; ch"):
        executed(*given)
    listing.write_text(text)
    shutil.rmtree(source)
    miniature.write(source, config=TINY, seed=2)
    monkeypatch.setattr(cache, "build", never)
    with pytest.raises(ValueError, match="training: checkpoint differ; choose another --out"):
        executed(*given)


@pytest.mark.parametrize("kind", ["i2v", "flf2v"])
def test_single_frames_are_no_data_for_a_checkpoint_that_takes_images(
    sources: dict[str, Path], data: Path, tmp_path: Path, kind: str
) -> None:
    file = configured(tmp_path / "c.py", frames=1)
    with pytest.raises(ValueError, match=r"c\.py: frames is 1, only the image .* needs 5 or more"):
        plan(*_given(file, data, tmp_path), "--ckpt_dir", str(sources[kind]))
    plan(*_given(file, data, tmp_path), "--ckpt_dir", str(sources["t2v"]))


class _Video:
    """What samples.Samples asks of a pipeline, without one."""

    config = types.SimpleNamespace(defaults=types.SimpleNamespace(fps=8))


def test_samples_that_cannot_be_made_are_told_and_a_signal_ends_them(tmp_path: Path) -> None:
    told: list[str] = []
    maker = samples.Samples(_Video(), [], tmp_path, notify=told.append)  # type: ignore[arg-type]
    one = types.SimpleNamespace(request=types.SimpleNamespace(frames=5))
    maker._samples = [one, one, one]  # type: ignore[list-item]

    def no_memory() -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    assert maker.make(4, no_memory, stop=lambda: len(told) == 2) == []
    assert told == [f"sample step_000004_{k}.mp4 failed: RESOURCE_EXHAUSTED" for k in (0, 1)]


def test_flags_that_are_missing(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--config is missing"):
        plan()
    file = configured(tmp_path / "c.py")
    with pytest.raises(ValueError, match="--data is missing"):
        plan("--config", str(file))
    with pytest.raises(ValueError, match="--out is missing"):
        plan("--config", str(file), "--data", str(data))


def test_as_many_devices_are_used_as_share_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    own = config.TrainConfig(**GOOD, batch_size=6)  # type: ignore[arg-type]
    assert command._layout(own).mesh.size == 6
    assert "6 of 8 devices are used: batch_size is 6, in 1 pieces" in capsys.readouterr().err
    assert command._layout(dataclasses.replace(own, batch_size=16)).mesh.size == 8
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="fsdp is 4, batch_size 6 in 1 pieces; of the 8 devices"):
        command._layout(dataclasses.replace(own, fsdp=4))


def test_another_training_in_the_folder_is_named_before_anything_runs(
    tiny_source: Path, data: Path, tmp_path: Path
) -> None:
    own: Any = {"seed": 1, "optimizer": {"steps": 7}}
    state = make_state(
        {"net": {"a.bias": np.ones(1)}}, OptimizerConfig(steps=7, learning_rate=1.0), seed=0
    )
    with saving.Saver(tmp_path / "out", keep=1, facts=own) as saver:
        saver.save(state)
    given = [*_given(configured(tmp_path / "c.py"), data, tmp_path), "--ckpt_dir"]
    with pytest.raises(ValueError, match=r"out/checkpoints is of a training with "):
        plan(*given, str(tiny_source), "--dry_run")
