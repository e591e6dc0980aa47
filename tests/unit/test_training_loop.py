"""The training loop on a problem small enough to know the answer of."""

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from wan_jax.sampler import DivergedError
from wan_jax.training import flow, metrics, saving
from wan_jax.training.loop import LoopConfig, Unread, run
from wan_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from wan_jax.training.step import Params, State, make_state, make_step

OPTIMIZER = OptimizerConfig(steps=12, learning_rate=0.05, warmup_steps=2, ema_decay=0.9)
LOOP = LoopConfig(seed=3, log_every=2, checkpoint_every=4)


def params() -> Params:
    return {"net": {"layer.kernel": jnp.ones((3, 2)), "layer.bias": jnp.zeros((2,))}}


def loss(params: Params, frozen: Any, batch: Any, key: jax.Array) -> Any:
    noise = 0.01 * jax.random.normal(key, batch["y"].shape)
    net = params["net"]
    error = batch["x"] @ net["layer.kernel"] + net["layer.bias"] + noise - batch["y"]
    return jnp.mean(jnp.square(error)), {"largest": jnp.max(jnp.abs(error))}


def batches(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    x = rng.standard_normal((8, 3)).astype(np.float32)
    return {"x": x, "y": x @ np.array([[1, -1], [2, 0], [0, 3]], np.float32)}


def same(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def lines(out: Path) -> list[dict[str, Any]]:
    return metrics.read(out / metrics.FILE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    out = tmp_path_factory.mktemp("whole")
    return out, run(params(), loss, batches, out, optimizer=OPTIMIZER, loop=LOOP)


def test_it_learns_and_writes_down_every_step(whole: tuple[Path, State]) -> None:
    found = lines(whole[0])
    assert [line["step"] for line in found] == list(range(1, 13))
    assert found[-1]["loss"] < 0.9 * found[0]["loss"]
    assert set(found[0]) == {"step", "loss", "grad_norm", "learning_rate", "largest"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 4, 5, 7, 11])
def test_a_run_that_is_cut_short_goes_on_to_the_same_bits(
    whole: tuple[Path, State], tmp_path: Path, at: int
) -> None:
    def dying(step: int) -> Any:
        if step == at:
            raise Killed
        return batches(step)

    with pytest.raises(Killed):
        run(params(), loss, dying, tmp_path, optimizer=OPTIMIZER, loop=LOOP)
    state = run(params(), loss, batches, tmp_path, optimizer=OPTIMIZER, loop=LOOP)
    assert same(state, whole[1])
    assert lines(tmp_path) == lines(whole[0])


def test_a_line_cut_off_by_a_kill_is_dropped(whole: tuple[Path, State], tmp_path: Path) -> None:
    file = tmp_path / metrics.FILE
    text = (whole[0] / metrics.FILE).read_text()
    file.write_text(text[: len(text) // 2])
    kept = metrics.read(file)
    assert 0 < len(kept) < 12
    with metrics.Metrics(tmp_path, step=3):
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_finished_run_is_left_as_it_is(whole: tuple[Path, State]) -> None:
    def none(step: int) -> Any:
        raise AssertionError(step)

    assert same(run(params(), loss, none, whole[0], optimizer=OPTIMIZER, loop=LOOP), whole[1])


@pytest.mark.parametrize(
    ("changed", "name"),
    [({"optimizer": dataclasses.replace(OPTIMIZER, eps=0.1)}, "optimizer.eps"),
     ({"loop": LoopConfig(seed=4)}, "seed"), ({"facts": {"data": "other"}}, "data")],
)  # fmt: skip
def test_a_checkpoint_of_another_training_is_refused(
    whole: tuple[Path, State], changed: dict[str, Any], name: str
) -> None:
    arguments = {"optimizer": OPTIMIZER, "loop": LOOP} | changed
    with pytest.raises(ValueError, match=f"training with {name} = .*another --out"):
        run(params(), loss, batches, whole[0], **arguments)


def test_a_batch_that_cannot_be_made_loses_nothing(
    whole: tuple[Path, State], tmp_path: Path
) -> None:
    def failing(step: int) -> Any:
        if step == 7:
            raise OSError("the disk is gone")
        return batches(step)

    for _ in range(2):  # the second time before any step
        with pytest.raises(OSError, match="the disk is gone"):
            run(params(), loss, failing, tmp_path, optimizer=OPTIMIZER, loop=LOOP)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 8))
    first: list[int] = []

    def watched(step: int) -> Any:
        first.append(step)
        return batches(step)

    state = run(params(), loss, watched, tmp_path, optimizer=OPTIMIZER, loop=LOOP)
    assert first[0] == 7 and same(state, whole[1])


def steps(out: Path) -> list[int]:
    """Of the checkpoints."""
    return sorted(int(p.name) for p in (out / "checkpoints").iterdir())


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes no metrics."""
    begin = metrics.Metrics.__init__

    def full(self: metrics.Metrics, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        self._file.close()
        self._file = open("/dev/full", "w")  # noqa: SIM115

    monkeypatch.setattr(metrics.Metrics, "__init__", full)


@pytest.mark.usefixtures("full_disk")
def test_a_disk_without_room_for_metrics_keeps_the_checkpoint(tmp_path: Path) -> None:
    def failing(step: int) -> Any:
        if step == 3:
            raise ValueError("no such clip")
        return batches(step)

    told: list[int] = []

    def on_checkpoint(state: State) -> None:
        told.append(int(state.step))
        raise OSError("no room for this one either")

    rare = LoopConfig(seed=3, log_every=100, checkpoint_every=0)
    options: dict[str, Any] = {"optimizer": OPTIMIZER, "on_checkpoint": on_checkpoint}
    with pytest.raises(ValueError, match="no such clip"):
        run(params(), loss, failing, tmp_path / "a", loop=rare, **options)
    assert steps(tmp_path / "a") == told == [3]
    with pytest.raises(OSError, match="No space left"):
        run(params(), loss, batches, tmp_path / "b", loop=LOOP, **options)
    assert steps(tmp_path / "b") == [2] and told == [3, 2]


@pytest.mark.parametrize(
    ("name", "wanted"), [("on_report", 2), ("on_checkpoint", 4), ("on_sample", 3)]
)
def test_a_callback_that_fails_keeps_the_checkpoint(
    whole: tuple[Path, State], tmp_path: Path, name: str, wanted: int
) -> None:
    told: list[Any] = []

    def fail(given: Any) -> None:
        told.append(given)
        raise RuntimeError("not now")

    loop = LoopConfig(seed=3, log_every=2, checkpoint_every=4, sample_every=3)
    options: dict[str, Any] = {"optimizer": OPTIMIZER, "loop": loop}
    with pytest.raises(RuntimeError, match="not now"):
        run(params(), loss, batches, tmp_path, **options, **{name: fail})
    assert steps(tmp_path) == [wanted] and len(told) == 1
    state = run(params(), loss, batches, tmp_path, **options)
    assert same(state, whole[1]) and lines(tmp_path) == lines(whole[0])


def test_samples_that_a_kill_kept_from_being_made_are_made(tmp_path: Path) -> None:
    """It came behind the checkpoint of the same step."""
    loop = LoopConfig(seed=3, checkpoint_every=4, sample_every=4)
    kills, made = {4, 12}, []

    def sample(state: State) -> None:
        step = int(state.step)
        if step in kills:
            kills.remove(step)
            raise Killed
        made.append(step)

    options: dict[str, Any] = {"optimizer": OPTIMIZER, "loop": loop, "on_sample": sample}
    for _ in range(2):
        with pytest.raises(Killed):
            run(params(), loss, batches, tmp_path, **options)
    run(params(), loss, batches, tmp_path, **options)
    assert made == [4, 8, 12]


def test_two_trainings_do_not_write_into_one_folder(tmp_path: Path) -> None:
    def other(step: int) -> Any:
        with pytest.raises(ValueError, match="another training writes into .*; give another --out"):
            run(params(), loss, batches, tmp_path, optimizer=OPTIMIZER, loop=LOOP)
        return batches(step)

    one = dataclasses.replace(OPTIMIZER, steps=1)
    run(params(), loss, other, tmp_path, optimizer=one, loop=LOOP)


def test_a_state_that_cannot_be_written_is_told_at_the_next_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written in the background; TensorStore's words for a full disk are a ValueError."""

    def fail(self: Any) -> None:
        if self.all_steps():
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nmore")

    monkeypatch.setattr(ocp.CheckpointManager, "check_for_errors", fail)
    loop = LoopConfig(seed=3, log_every=1, checkpoint_every=4)
    with pytest.raises(
        OSError, match="checkpoints cannot be written: RESOURCE_EXHAUSTED: .*device$"
    ):
        run(params(), loss, batches, tmp_path, optimizer=OPTIMIZER, loop=loop)
    assert len(lines(tmp_path)) in (4, 5)


def test_another_training_is_known_beforehand(whole: tuple[Path, State], tmp_path: Path) -> None:
    own = {"seed": 3, "optimizer": {"steps": 12}}
    assert saving.check(tmp_path, own) == [] and len(saving.check(whole[0], own)) == 2
    with pytest.raises(ValueError, match=r"training with optimizer\.steps = 12, this one has 9;"):
        saving.check(whole[0], {"optimizer": {"steps": 9}})


def test_a_disk_too_small_for_checkpoints_is_named(tmp_path: Path) -> None:
    saving.check_space(tmp_path, 10)
    with pytest.raises(ValueError, match="checkpoints needs 1000000000.0 GB, .* a lower 'keep'"):
        saving.check_space(tmp_path, 10**18)


def test_a_stop_does_not_wait_for_a_batch_that_is_being_made(tmp_path: Path) -> None:
    needed, made = threading.Event(), threading.Event()

    def slow(step: int) -> Any:
        if step == 1:
            needed.wait(20)
            made.set()
        return batches(step)

    try:
        state = run(
            params(), loss, slow, tmp_path, optimizer=OPTIMIZER, loop=LOOP, stop=lambda: True
        )
        assert int(state.step) == 1 and not made.is_set()
    finally:
        needed.set()


def test_weights_are_read_only_where_there_is_no_checkpoint(
    whole: tuple[Path, State], tmp_path: Path
) -> None:
    reads: list[int] = []

    def read() -> Params:
        reads.append(1)
        return params()

    unread = Unread(jax.eval_shape(params), read)
    ends = iter((False, False, True))
    options: dict[str, Any] = {"optimizer": OPTIMIZER, "loop": LOOP}
    run(unread, loss, batches, tmp_path, stop=lambda: next(ends), **options)
    assert reads == [1]
    state = run(unread, loss, batches, tmp_path, **options)
    assert reads == [1] and same(state, whole[1])


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_saved(tmp_path: Path) -> None:
    def bad(step: int) -> Any:
        batch = batches(step)
        return batch | {"y": batch["y"] * (np.inf if step == 6 else 1)}

    with pytest.raises(DivergedError, match="at step 7"):
        run(params(), loss, bad, tmp_path, optimizer=OPTIMIZER, loop=LOOP)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4"]
    assert [line["step"] for line in lines(tmp_path)][:6] == [1, 2, 3, 4, 5, 6]


def test_a_lost_gradient_under_a_finite_loss_is_not_saved(tmp_path: Path) -> None:
    def lost(params: Params, frozen: Any, batch: Any, key: jax.Array) -> Any:
        value, found = loss(params, frozen, batch, key)
        zero = 0.0 * params["net"]["layer.bias"][0]
        return value + 0.0 * jnp.sqrt(zero * batch["bad"]), found

    def some(step: int) -> Any:
        return batches(step) | {"bad": np.float32(1.0)}

    every = LoopConfig(checkpoint_every=1, log_every=4)
    with pytest.raises(DivergedError, match="the gradient became nan at step 1"):
        run(params(), lost, some, tmp_path, optimizer=OPTIMIZER, loop=every)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_pieces_of_a_batch_give_the_gradient_of_the_whole() -> None:
    def quiet(params: Params, frozen: Any, batch: Any, key: jax.Array) -> Any:
        net = params["net"]
        error = batch["x"] @ net["layer.kernel"] + net["layer.bias"] - batch["y"]
        return jnp.mean(jnp.square(error)), {}

    after = []
    for pieces in (1, 4):
        state = make_state(params(), OPTIMIZER, seed=0)
        step = make_step(quiet, OPTIMIZER, accumulate=pieces)
        for number in range(3):
            state, _ = step(state, None, batches(number))
        after.append(state)
    for one, other in zip(jax.tree.leaves(after[0]), jax.tree.leaves(after[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_the_average_follows_and_can_be_left_out(whole: tuple[Path, State]) -> None:
    state = whole[1]
    assert not same(state.ema, state.params)
    none = OptimizerConfig(steps=1, learning_rate=0.1, warmup_steps=0, ema_decay=0.0)
    assert make_state(params(), none, seed=0).ema == {}


def test_the_rate_warms_up_and_falls_along_a_cosine() -> None:
    config = OptimizerConfig(steps=110, learning_rate=1.0, warmup_steps=10, final_ratio=0.2)
    rate = learning_rate(config)
    with jax.numpy_dtype_promotion("standard"):
        values = [float(rate(step)) for step in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(values, [0.0, 0.5, 1.0, 0.6, 0.2], atol=1e-6)


def test_norms_and_biases_are_not_decayed() -> None:
    config = OptimizerConfig(steps=2, learning_rate=1.0, warmup_steps=0, weight_decay=0.5)
    weights = {"net": {"a.kernel": jnp.ones((2, 2)), "a.scale": jnp.ones((2,))}}
    optimizer = make_optimizer(config)
    zeros = jax.tree.map(jnp.zeros_like, weights)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(zeros, optimizer.init(weights), weights)
    assert float(updates["net"]["a.kernel"][0, 0]) == pytest.approx(-0.5)
    assert float(updates["net"]["a.scale"][0]) == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(steps=0, learning_rate=1.0), "steps is 0"),
        (lambda: OptimizerConfig(steps=10, learning_rate=1.0, warmup_steps=-1), "warmup_steps"),
        (lambda: OptimizerConfig(steps=10, learning_rate=-1.0), "learning_rate is -1"),
        (lambda: OptimizerConfig(steps=10, learning_rate=float("inf")), "learning_rate is inf"),
        (lambda: OptimizerConfig(steps=10, learning_rate=1.0, clip_norm=0), "clip_norm is 0"),
        (lambda: OptimizerConfig(steps=10, learning_rate=1.0, beta2=1.0), "beta2 is 1.0"),
        (lambda: LoopConfig(keep=0), "keep is 0"),
        (lambda: LoopConfig(log_every=True), "log_every is True"),
        (lambda: flow.FlowConfig(shift=0.0), "shift is 0"),
        (lambda: flow.FlowConfig(text_dropout=1.5), "text_dropout is 1.5"),
        (lambda: flow.FlowConfig(sampling="other"), "sampling is 'other'"),  # type: ignore[arg-type]
    ],
)
def test_settings_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_metrics_are_json(whole: tuple[Path, State]) -> None:
    text = (whole[0] / metrics.FILE).read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in text)


def test_sigmas_are_shifted() -> None:
    key = jax.random.PRNGKey(0)
    plain = flow.draw_sigmas(key, 4000, flow.FlowConfig(shift=1.0, sampling="uniform"))
    shifted = flow.draw_sigmas(key, 4000, flow.FlowConfig(shift=3.0, sampling="uniform"))
    np.testing.assert_allclose(shifted, 3 * plain / (1 + 2 * plain), rtol=1e-6)
    normal = flow.draw_sigmas(key, 4000, flow.FlowConfig(shift=1.0))
    assert abs(float(jnp.mean(normal)) - 0.5) < 0.02
    assert float(jnp.std(normal)) < float(jnp.std(plain))
