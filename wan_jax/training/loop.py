"""The training loop: batches in, weights out, and it can be killed at any moment."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from wan_jax.sampler import DivergedError
from wan_jax.sharding import Layout
from wan_jax.training.metrics import Metrics
from wan_jax.training.optimizer import OptimizerConfig
from wan_jax.training.saving import Saver
from wan_jax.training.step import Loss, Params, State, make_state, make_step

# batch(step) is a pure function, so that a run that is taken up sees the very same batches.
Batches = Callable[[int], Any]
Place = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How a run is kept. Every so many steps: log_every hands metrics to the disk, checkpoint_every
    writes a checkpoint, of which the newest `keep` stay, sample_every makes samples; 0 is never.
    """

    seed: int = 0
    accumulate: int = 1
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2
    sample_every: int = 0

    def __post_init__(self) -> None:
        least = {"accumulate": 1, "log_every": 1, "keep": 1}
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), least.get(field.name, 0)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(
                    f"{field.name} is {value!r}; an integer of {low} or more is needed"
                )


class Report(NamedTuple):
    """What is told now and then: the step, of how many, its metrics, seconds a step."""

    step: int
    steps: int
    metrics: dict[str, float]
    seconds: float


def run(
    params: Params,
    loss: Loss,
    batches: Batches,
    out: Path,
    *,
    optimizer: OptimizerConfig,
    loop: LoopConfig,
    frozen: Any = None,
    facts: dict[str, Any] | None = None,
    place: Place = jax.device_put,
    layout: Layout | None = None,
    tensorboard: bool = False,
    on_report: Callable[[Report], None] | None = None,
    on_checkpoint: Callable[[State], None] = lambda _: None,
    on_sample: Callable[[State], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> State:
    """Train until optimizer.steps, from the newest checkpoint in `out` if there is one.

    params: {network: {path: array}} to start from, which are used up. frozen: what the loss reads
    beside them. facts: JSON that tells this training from others; a checkpoint of another one is
    refused. place: puts a batch on the devices. layout: where the state lies; None is the first
    device. on_report: told the metrics when they are written; on_checkpoint: given the state when a
    checkpoint of it is begun; on_sample: given it every sample_every steps and at the end. stop:
    asked after every step whether to leave now, with a checkpoint. Raises sampler.DivergedError,
    naming the step, when loss or gradient is no longer finite, and the checkpoints before it stay;
    what `batches` raises, after a checkpoint.
    """
    out.mkdir(parents=True, exist_ok=True)
    own = {"optimizer": dataclasses.asdict(optimizer), **(facts or {})}
    own |= {"seed": loop.seed, "accumulate": loop.accumulate}
    with Saver(out, keep=loop.keep, facts=own) as saver:
        state, shardings = _begin(saver, params, optimizer, loop.seed, layout)
        # Pinned, or XLA may choose to leave a part of the state elsewhere than it was.
        options = {} if shardings is None else {"out_shardings": (shardings, None)}
        step = make_step(loss, optimizer, accumulate=loop.accumulate, **options)
        done = int(state.step)
        with Metrics(out, step=done, tensorboard=tensorboard) as metrics:
            pending = _Pending(metrics, optimizer.steps, on_report)
            coming = _ahead(batches, place, done, optimizer.steps)
            for number in range(done, optimizer.steps):
                with _saved(pending, saver, state if number > done else None):
                    batch = next(coming)
                state, values = step(state, frozen, batch)
                pending.add(number + 1, values)
                stopped = stop()
                last = stopped or number + 1 == optimizer.steps
                if last or (number + 1) % loop.log_every == 0:
                    pending.write()
                if last or _due(number + 1, loop.checkpoint_every):
                    pending.write()
                    saver.save(state)
                    on_checkpoint(state)
                due = not stopped and (last or _due(number + 1, loop.sample_every))
                if on_sample is not None and due:
                    on_sample(state)
                    pending.rest()
                if stopped:
                    break
    return state


def _begin(
    saver: Saver, params: Params, optimizer: OptimizerConfig, seed: int, layout: Layout | None
) -> tuple[State, Any]:
    """The state to go on from and where its arrays lie."""

    def make(given: Params) -> State:
        return make_state(given, optimizer, seed=seed)

    like = jax.eval_shape(make, params)
    shardings = None if layout is None else layout.weights(like)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = saver.restore(
        jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            like,
            jax.tree.map(lambda _: device, like) if shardings is None else shardings,
        )
    )
    if found is None:
        # Donated, so that there is no moment with one copy more than the training needs.
        return jax.jit(make, donate_argnums=0, out_shardings=shardings)(params), shardings
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and not leaf.is_deleted():
            leaf.delete()
    return found, shardings


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _ahead(batches: Batches, place: Place, start: int, stop: int) -> Iterator[Any]:
    """Batches on the devices, the next one made while the device works on this one."""
    with ThreadPoolExecutor(1) as pool:

        def ask(number: int) -> Any:
            return pool.submit(lambda: place(batches(number))) if number < stop else None

        coming = ask(start)
        for number in range(start, stop):
            batch = coming.result()
            coming = ask(number + 1)
            yield batch


@contextlib.contextmanager
def _saved(pending: "_Pending", saver: Saver, state: State | None) -> Iterator[None]:
    """Keeps what was learned when something fails here, such as a disk after hours."""
    try:
        yield
    except Exception:
        pending.write()
        if state is not None:
            saver.save(state)
        raise


class _Pending:
    """Metrics of steps that may still be running: fetched together; at most one is not done."""

    def __init__(
        self, metrics: Metrics, steps: int, on_report: Callable[[Report], None] | None
    ) -> None:
        self._metrics, self._steps, self._on_report = metrics, steps, on_report
        self._values: list[tuple[int, dict[str, Any]]] = []
        self._since = time.monotonic()

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Add a step that was begun, once the one before it is done: a signal cannot wait long."""
        if self._values:
            jax.block_until_ready(self._values[-1][1])
        self._values.append((step, values))

    def rest(self) -> None:
        """Leave the time since the last writing out of the seconds a step."""
        self._since = time.monotonic()

    def write(self) -> None:
        """Write what there is; DivergedError at a loss that is not finite."""
        if not self._values:
            return
        count = len(self._values)
        for step, arrays in self._values:
            values = {name: float(np.asarray(value)) for name, value in arrays.items()}
            for name in ("loss", "grad_norm"):  # a gradient can be lost where the loss is not
                if not math.isfinite(values[name]):
                    what = name.replace("grad_norm", "gradient")
                    raise DivergedError(f"the {what} became {values[name]} at step {step}")
            self._metrics.write(step, values)
        self._values.clear()
        self._metrics.flush()
        now = time.monotonic()
        seconds, self._since = (now - self._since) / count, now
        if self._on_report is not None:
            self._on_report(Report(step, self._steps, values, seconds))
