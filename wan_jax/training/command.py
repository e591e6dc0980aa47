"""Training from the command line.

    python -m wan_jax.training --config configs/train_lora_t2v_1_3b.py --data DIR --out DIR

Every setting is in the configuration; flags say where things are. The same command goes on from
the newest checkpoint in --out, whatever stopped it.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from wan_jax import devices, loading, runner, sharding, shipped
from wan_jax.cli import Reporter, Stopped, say
from wan_jax.config import WanConfig
from wan_jax.pipeline import Wan
from wan_jax.request import Request
from wan_jax.sharding import Layout
from wan_jax.training import cache, config, finetune, lora, results, samples, saving
from wan_jax.training.batches import Batches
from wan_jax.training.config import TrainConfig
from wan_jax.training.dataset import Example, read_listing
from wan_jax.training.entries import Cache
from wan_jax.training.finetune import Beside, Frozen, Full, Trained
from wan_jax.training.flow import FlowConfig
from wan_jax.training.loop import LoopConfig, Report, Unread, run
from wan_jax.training.lora import LoraConfig
from wan_jax.training.optimizer import OptimizerConfig
from wan_jax.training.step import Params, State, make_state
from wan_jax.weights import checkpoint, derived, folders, lora_names, remote, trees
from wan_jax.weights.sources import abstract_part

NAME = "wan_jax.training"
ADVICE = "the same command goes on from there"
_KEPT = ("checkpoint", "dtype", "data")  # facts that the result tells beside the configuration
_FRESH = np.uint32(2**32 - 1)  # what the first factors are drawn with; no step has this number


class Plan(NamedTuple):
    """A training, checked as far as can be without a device.

    config: with size, frames and fps filled in. network: None for a checkpoint that is not here.
    source: what loading.prepare() takes. requests: the samples. encoded: where latents are kept.
    done: the steps that a checkpoint in `out` has behind it.
    """

    config: TrainConfig
    network: WanConfig | None
    source: Any
    examples: list[Example]
    requests: list[Request]
    out: Path
    encoded: Path
    done: int = 0


class _Model(NamedTuple):
    """What is trained, from what, and what the loss reads beside it."""

    trained: Trained
    params: Params | Unread
    frozen: Frozen


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the trainer's flags on `values`."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    switch = functools.partial(flags.DEFINE_bool, flag_values=values)
    choice = functools.partial(flags.DEFINE_enum, flag_values=values)
    string("config", None, "A file like configs/train_*.py.")
    string("data", None, "A folder of videos and images, with captions in metadata.jsonl.")
    string("out", None, "Where checkpoints, metrics, samples and the result go.")
    string("ckpt_dir", None, "Checkpoint to start from, in place of the configuration's.")
    string("cache_dir", None, "Where converted checkpoints are kept; default ~/.cache/wan_jax.")
    string("encoded_dir", None, "Where encoded examples are kept; default OUT/encoded.")
    choice("dtype", "bfloat16", loading.DTYPES, "float32 is for comparing numbers.")
    choice("lora_naming", "diffusers", lora_names.NAMES, "Names in the LoRA's file.")
    switch("t5_cpu", False, "Run the text encoder on the CPU.")
    switch("tensorboard", False, "Also write TensorBoard's events, into OUT/tensorboard.")
    switch("dry_run", False, "Check configuration and data, say what would be done, and leave.")
    for flag in values.flags_by_module_dict()[__name__]:  # so that --help lists them
        values.register_key_flag_for_module(sys.argv[0], flag)


def main(values: flags.FlagValues) -> None:
    """Check everything, then train."""
    plan = make_plan(values)
    if values.dry_run:
        say(describe(plan))
        return
    execute(values, plan)


# Beforehand


def make_plan(values: flags.FlagValues) -> Plan:
    """Check flags, configuration, listing and images before anything slow starts.

    Raises ValueError naming the flag or setting, its value and what would be accepted.
    """
    for name, what in (
        ("config", "a file like configs/train_lora_t2v_1_3b.py"),
        ("data", "a folder of videos and images with captions"),
        ("out", "a folder for what comes of it"),
    ):
        if values[name].value is None:
            raise ValueError(f"--{name} is missing; {what} is needed")
    if values.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ValueError("--tensorboard needs the package tensorboardX: pip install '.[train]'")
    settings = config.read(Path(values.config), ckpt_dir=values.ckpt_dir)
    out = Path(values.out).absolute()
    encoded = Path(values.encoded_dir).absolute() if values.encoded_dir else out / "encoded"
    for folder in (out, encoded):
        folders.check_writable(folder)
    examples = read_listing(values.data, notify=say)
    source = settings.ckpt_dir or shipped.default()
    if loading.built_in(source) is None and not Path(source).exists():
        if values.dry_run and (remote.is_bucket(source) or remote.is_hub_id(source)):
            say(f"{source} is not on this machine: what depends on it is not checked")
            return Plan(settings, None, source, examples, [], out, encoded)
        source = loading.fetch(source, cache_dir=values.cache_dir, callback=Reporter(), notify=say)
    network = loading.read_config(loading.fetch(source))
    try:
        settings, requests = _checked(settings, network)
    except ValueError as error:
        raise ValueError(f"--config {values.config}: {error}") from error
    there = saving.check(out, _settled(settings, values.dtype))
    plan = Plan(settings, network, source, examples, requests, out, encoded, max(there, default=0))
    saving.check_space(out, (settings.keep + 1 - len(there)) * _state_bytes(settings, network))
    if not settings.lora_rank:
        known = {"config": _json(settings), "dtype": values.dtype}
        results.check_free(_result(plan), known)
    return plan


def _checked(settings: TrainConfig, network: WanConfig) -> tuple[TrainConfig, list[Request]]:
    """The settings with the checkpoint's defaults, and the samples; ValueError if they clash."""
    own = network.defaults
    settings = dataclasses.replace(
        settings,
        size=settings.size or (own.size[0], own.size[1]),
        frames=settings.frames or own.frames,
        fps=settings.fps or own.fps,
    )
    cache.latent_shape(network, size=settings.size, frames=settings.frames)
    if settings.lora_rank:
        lora.paths(network.dit, settings.lora_targets)
    return settings, samples.requests(settings, network)


def describe(plan: Plan) -> str:
    """A plan in a few lines."""
    own = plan.config
    count = f"LoRA of rank {own.lora_rank}" if own.lora_rank else "all weights"
    epochs = own.steps * own.batch_size / len(plan.examples)
    kind = "not on this machine" if plan.network is None else _numbers(plan)
    sizes = f"{own.size}, {own.frames} frames, {own.fps} fps"
    if plan.network is None:
        sizes = "the configuration's size, frames and fps, or else the checkpoint's"
    more = f", {len(plan.requests)} samples every {own.sample_every}" if plan.requests else ""
    clips = "1 clip" if own.batch_size == 1 else f"{own.batch_size} clips"
    return (
        f"train {count} of {own.ckpt_dir or shipped.default()} ({kind})\n"
        f"data: {len(plan.examples)} examples, not opened yet, at {sizes}, "
        f"encoded into {plan.encoded}\n"
        f"{own.steps} steps of {clips}, about {epochs:.1f} epochs; a checkpoint every "
        f"{own.checkpoint_every} steps{more}\n"
        f"result: {_result(plan)}"
    )


def _numbers(plan: Plan) -> str:
    assert plan.network is not None
    leaves = trees.flatten(abstract_part(plan.network.dit, jnp.dtype(jnp.float32)))
    total = sum(leaf.size for leaf in leaves.values())
    if not plan.config.lora_rank:
        return f"{total / 1e9:.3g} billion weights"
    made = functools.partial(_fresh, plan.config, plan.network)
    own = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(made)))
    return f"{own / 1e6:.3g} million weights beside {total / 1e9:.3g} billion"


def _state_bytes(own: TrainConfig, network: WanConfig) -> int:
    """Of a checkpoint of the training."""
    if own.lora_rank:
        params: Any = {finetune.LORA: jax.eval_shape(functools.partial(_fresh, own, network))}
    else:
        whole = abstract_part(network.dit, jnp.dtype(jnp.float32))
        params = {finetune.FULL: trees.flatten(whole)}
    make = functools.partial(make_state, config=own.part(OptimizerConfig), seed=0)
    leaves = jax.tree.leaves(jax.eval_shape(make, params))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _result(plan: Plan) -> Path:
    return plan.out / (results.LORA_FILE if plan.config.lora_rank else results.CHECKPOINT)


# Training


def execute(values: flags.FlagValues, plan: Plan) -> None:
    """Encode the data, train, write the result; Stopped after a signal and a checkpoint."""
    devices.start(values)
    if plan.done:
        say(f"{plan.done} of {plan.config.steps} steps were made before; the rest follows")
    layout = _layout(plan.config)
    report = Reporter()
    source = loading.prepare(
        plan.source, dtype=values.dtype, cache_dir=values.cache_dir, callback=report, notify=say
    )
    wan = loading.load(source, dtype=values.dtype, offload=True, text_on_cpu=values.t5_cpu)
    own = plan.config
    if not own.lora_rank:
        results.check_free(_result(plan), {"checkpoint": wan.digest})
        leaves = trees.flatten(abstract_part(wan.config.dit, jnp.dtype(values.dtype))).values()
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        derived.check(source, plan.out / results.CHECKPOINT, size)
    assert own.size is not None and own.frames is not None and own.fps is not None
    found = cache.build(
        wan,
        plan.examples,
        folder=plan.encoded,
        size=own.size,
        frames=own.frames,
        fps=own.fps,
        callback=report,
        notify=say,
    )
    facts = _facts(plan, wan, found)
    about = {"config": _json(own), **{name: facts[name] for name in _KEPT}}
    if not own.lora_rank:
        results.check_free(_result(plan), about)
    maker = samples.Samples(wan, plan.requests, plan.out, fps=own.fps, callback=report, notify=say)
    with Batches(found, batch_size=own.batch_size, seed=own.seed) as batches:
        model = _model(plan, source, wan, values.dtype, layout, batches.null)

        def write(state: State) -> None:
            if own.lora_rank:
                part = own.part(LoraConfig)
                results.write_lora(_result(plan), state, part, naming=values.lora_naming)
            elif int(state.step) == own.steps:
                assert isinstance(model.trained, Full)
                results.write_checkpoint(_result(plan), source, model.trained, state, about=about)

        write(_train(values, plan, model, batches, maker, layout, facts, write))
    say(f"saved {_result(plan)}")


def _layout(own: TrainConfig) -> Layout:
    """Of as many devices as the rows that are worked on at once can be split over."""
    devices, rows = jax.devices(), own.batch_size // own.accumulate
    share = own.fsdp or 1
    fits = [n for n in range(1, len(devices) + 1) if rows % n == 0 and n % share == 0]
    if not fits:
        raise ValueError(
            f"fsdp is {own.fsdp}, batch_size {own.batch_size} in {own.accumulate} pieces; of the "
            f"{len(devices)} devices a number is needed that fsdp divides, and that divides a piece"
        )
    if max(fits) < len(devices):
        say(
            f"{max(fits)} of {len(devices)} devices are used: batch_size is {own.batch_size}, in "
            f"{own.accumulate} pieces, whose rows are split over them"
        )
    return sharding.make_layout(own.fsdp, devices=devices[: max(fits)])


def _fresh(own: TrainConfig, network: WanConfig) -> dict[str, jax.Array]:
    key = jax.random.fold_in(jax.random.PRNGKey(own.seed), _FRESH)
    return lora.fresh(network.dit, own.lora_rank, own.lora_targets, key)


def _model(
    plan: Plan, source: Any, wan: Wan, dtype: str, layout: Layout, null: np.ndarray
) -> _Model:
    """What is trained; all weights are read only if there is no checkpoint that holds them."""
    own, empty = plan.config, layout.whole(null)

    def dit(kind: str) -> Any:
        return checkpoint.restore(source, "dit", wan.config, dtype=kind, sharding=layout.weight)

    if not own.lora_rank:
        shapes = trees.flatten(abstract_part(wan.config.dit, jnp.dtype(jnp.float32)))
        trained = Full(wan.config.dit, jnp.dtype(dtype))
        params = Unread(
            {finetune.FULL: shapes}, lambda: {finetune.FULL: trees.flatten(dit("float32"))}
        )
        return _Model(trained, params, Frozen(empty))
    factors = _fresh(own, wan.config)
    placed = {finetune.LORA: jax.device_put(factors, layout.weights(factors))}
    return _Model(Beside(own.part(LoraConfig).scale), placed, Frozen(empty, dit(dtype)))


def _train(
    values: flags.FlagValues,
    plan: Plan,
    model: _Model,
    batches: Batches,
    maker: samples.Samples,
    layout: Layout,
    facts: dict[str, Any],
    write: Callable[[State], None],
) -> State:
    """The state after the last step; Stopped if a signal came before.

    write: writes the result so far; at the end it is called before the last samples are made.
    """
    own = plan.config

    def on_sample(state: State) -> None:
        if plan.requests:
            network = functools.partial(results.network, model.trained, state, model.frozen.dit)
            for path in maker.make(int(state.step), network, lambda: bool(signals)):
                say(f"saved {path}")

    bar = _Bar(plan.done, own.steps)
    with runner.held_back(active=True) as signals:
        state = run(
            model.params,
            finetune.make_loss(model.trained, own.part(FlowConfig)),
            batches.batch,
            plan.out,
            optimizer=own.part(OptimizerConfig),
            loop=own.part(LoopConfig),
            frozen=model.frozen,
            facts=facts,
            place=layout.rows,
            layout=layout,
            tensorboard=values.tensorboard,
            on_report=bar,
            on_checkpoint=write,
            on_sample=on_sample,
            stop=lambda: bool(signals),
        )
        bar.close()
    done = int(state.step)
    if signals and done < own.steps:
        kept = f"with a checkpoint in {plan.out}"
        raise Stopped(f"stopped after step {done} of {own.steps}, {kept}", signals[0])
    return state


def _facts(plan: Plan, wan: Wan, found: Cache) -> dict[str, Any]:
    """What must be the same when this training goes on, beside what the loop knows."""
    keys = sorted(entry.path.name for entry in found.entries)  # one that is twice counts twice
    settled = _settled(plan.config, wan.dtype)
    settled["data"] |= {
        "examples": len(keys),
        "digest": hashlib.sha256(json.dumps(keys).encode()).hexdigest(),
    }
    return settled | {"checkpoint": wan.digest}


def _settled(own: TrainConfig, dtype: str) -> dict[str, Any]:
    """What of it is known before anything is read; the devices and remat may change."""
    flow = dataclasses.asdict(own.part(FlowConfig))
    del flow["remat"]
    return {
        "dtype": dtype,
        "batch_size": own.batch_size,
        "flow": flow,
        "lora": dataclasses.asdict(own.part(LoraConfig)),
        "data": {name: getattr(own, name) for name in ("size", "frames", "fps")},
        "optimizer": dataclasses.asdict(own.part(OptimizerConfig)),
        **own.part(LoopConfig).facts,
    }


def _json(own: TrainConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(own)))
    return found


class _Bar:
    """The training's progress on the terminal."""

    def __init__(self, done: int, steps: int) -> None:
        self._bar = tqdm(total=steps, initial=done, desc="train", unit="step")

    def __call__(self, report: Report) -> None:
        self._bar.update(report.step - self._bar.n)
        loss, pace = report.metrics["loss"], report.seconds
        self._bar.set_postfix_str(f"loss {loss:.4f}, {pace:.2f} s/step")

    def close(self) -> None:
        """End the bar's line."""
        self._bar.close()
