"""The training loop: batches in, weights out, and it can be killed at any moment."""

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
    writes a checkpoint, of which the newest `keep` stay, sample_every calls on_sample; 0 is never.
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
    """What on_report is told now and then: the step, of how many, its metrics, seconds a step."""

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
    place_state: Place = jax.device_put,
    tensorboard: bool = False,
    on_report: Callable[[Report], None] | None = None,
    on_sample: Callable[[State], None] | None = None,
) -> State:
    """Train until optimizer.steps, from the newest checkpoint in `out` if there is one.

    params: {network: {path: array}} to start from. frozen: what the loss reads beside them. facts:
    JSON that tells this training from others; a checkpoint of another one is refused. place,
    place_state: put a batch, the state on the devices. Raises sampler.DivergedError, naming the
    step, when the loss is no longer finite; the checkpoints before it stay.
    """
    out.mkdir(parents=True, exist_ok=True)
    step = make_step(loss, optimizer, accumulate=loop.accumulate)
    state = place_state(make_state(params, optimizer, seed=loop.seed))
    own = {"optimizer": dataclasses.asdict(optimizer), "seed": loop.seed} | (facts or {})
    own["accumulate"] = loop.accumulate
    with Saver(out, keep=loop.keep, facts=own) as saver:
        found = saver.restore(state)
        state = state if found is None else found
        done = int(state.step)
        with Metrics(out, step=done, tensorboard=tensorboard) as metrics:
            pending = _Pending(metrics, optimizer.steps, on_report)
            for number, batch in _ahead(batches, place, done, optimizer.steps):
                state, values = step(state, frozen, batch)
                pending.add(number + 1, values)
                last = number + 1 == optimizer.steps
                if last or (number + 1) % loop.log_every == 0:
                    pending.write()
                if last or _due(number + 1, loop.checkpoint_every):
                    pending.write()
                    saver.save(state)
                if on_sample is not None and (last or _due(number + 1, loop.sample_every)):
                    on_sample(state)
    return state


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _ahead(batches: Batches, place: Place, start: int, stop: int) -> Iterator[tuple[int, Any]]:
    """(step, batch on the devices), the next one made while the device works on this one."""
    with ThreadPoolExecutor(1) as pool:

        def ask(number: int) -> Any:
            return pool.submit(lambda: place(batches(number))) if number < stop else None

        coming = ask(start)
        for number in range(start, stop):
            batch = coming.result()
            coming = ask(number + 1)
            yield number, batch


class _Pending:
    """Metrics of steps that may still be running: fetched together, so that none is waited for."""

    def __init__(
        self, metrics: Metrics, steps: int, on_report: Callable[[Report], None] | None
    ) -> None:
        self._metrics, self._steps, self._on_report = metrics, steps, on_report
        self._values: list[tuple[int, dict[str, Any]]] = []
        self._since = time.monotonic()

    def add(self, step: int, values: dict[str, Any]) -> None:
        self._values.append((step, values))

    def write(self) -> None:
        """Write what there is; DivergedError at a loss that is not finite."""
        if not self._values:
            return
        count = len(self._values)
        for step, arrays in self._values:
            values = {name: float(np.asarray(value)) for name, value in arrays.items()}
            if not math.isfinite(values["loss"]):
                raise DivergedError(f"the loss became {values['loss']} at step {step}")
            self._metrics.write(step, values)
        self._values.clear()
        self._metrics.flush()
        now = time.monotonic()
        seconds, self._since = (now - self._since) / count, now
        if self._on_report is not None:
            self._on_report(Report(step, self._steps, values, seconds))
