"""The training loop: batches in, weights out, and it can be killed at any moment."""

import contextlib
import dataclasses
import fcntl
import functools
import math
import os
import time
from collections.abc import Callable, Generator, Iterator
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

    @property
    def facts(self) -> dict[str, Any]:
        """What must be the same when a run goes on."""
        return {"seed": self.seed, "accumulate": self.accumulate}


class Report(NamedTuple):
    """What is told now and then: the step, of how many, its metrics, seconds a step."""

    step: int
    steps: int
    metrics: dict[str, float]
    seconds: float


class Unread(NamedTuple):
    """Weights that are read only if there is no checkpoint. shapes: of what read() gives."""

    shapes: Params
    read: Callable[[], Params]


def run(
    params: Params | Unread,
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
    on_sample: Callable[[State], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> State:
    """Train until optimizer.steps, from the newest checkpoint in `out` if there is one.

    params: {network: {path: array}} to start from, which are used up. frozen: what the loss reads
    beside them. facts: JSON that tells this training from others; a checkpoint of another one is
    refused. place: puts a batch on the devices. layout: where the state lies; None is the first
    device. on_report: told the metrics when they are written; on_checkpoint: given the state when a
    checkpoint of it is begun; on_sample: every sample_every steps, at the end, and when the run
    goes on from there. stop: asked after every step whether to leave now, with a checkpoint.
    Raises ValueError if another process trains into `out`; DivergedError naming the step whose loss
    or gradient is not finite; what `batches`, disk or callbacks raise, after a checkpoint.
    """
    own = loop.facts | {"optimizer": dataclasses.asdict(optimizer)} | (facts or {})
    with _alone(out), Saver(out, keep=loop.keep, facts=own) as saver:
        state, options = _begin(saver, params, optimizer, loop.seed, layout)
        step = make_step(loss, optimizer, accumulate=loop.accumulate, **options)
        done = int(state.step)
        ahead = contextlib.closing(_ahead(batches, place, done, optimizer.steps))
        with Metrics(out, step=done, tensorboard=tensorboard) as metrics, ahead as coming:
            pending = _Pending(metrics, optimizer.steps, on_report)
            saved = functools.partial(_saved, pending, saver, on_checkpoint)
            if done == optimizer.steps or (done and _due(done, loop.sample_every)):
                on_sample(state)  # a kill behind the checkpoint
            for number in range(done, optimizer.steps):
                with saved(state if number > done else None):
                    batch = next(coming)
                state, values = step(state, frozen, batch)
                with saved(state):
                    pending.add(number + 1, values)
                    stopped = stop()
                    last = stopped or number + 1 == optimizer.steps
                    kept = last or _due(number + 1, loop.checkpoint_every)
                    if kept or _due(number + 1, loop.log_every):
                        pending.write()  # first, or a kill between the two would lose lines
                    saver.check()
                    if kept:
                        saver.save(state)
                        on_checkpoint(state)
                    if not stopped and (last or _due(number + 1, loop.sample_every)):
                        on_sample(state)
                        pending.rest()
                if stopped:
                    break
    return state


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """The folder, which is made; ValueError if another process trains into it."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / ".training.lock"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another training writes into {out}; give another --out") from None
        except OSError:
            pass  # a disk that knows no locks
        yield
        file.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _begin(
    saver: Saver,
    params: Params | Unread,
    optimizer: OptimizerConfig,
    seed: int,
    layout: Layout | None,
) -> tuple[State, dict[str, Any]]:
    """The state to go on from, and options of the step that leave its arrays where they lie."""

    def make(given: Params) -> State:
        return make_state(given, optimizer, seed=seed)

    like = jax.eval_shape(make, params.shapes if isinstance(params, Unread) else params)
    shardings = None if layout is None else layout.weights(like)
    # Pinned, or XLA may choose to leave a part of the state elsewhere than it was.
    options = {} if shardings is None else {"out_shardings": (shardings, None)}
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
        fresh = jax.jit(make, donate_argnums=0, out_shardings=shardings)
        return fresh(params.read() if isinstance(params, Unread) else params), options
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and not leaf.is_deleted():
            leaf.delete()
    return found, options


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _ahead(batches: Batches, place: Place, start: int, stop: int) -> Generator[Any, None, None]:
    """Batches on the devices, the next one made while the device works on this one."""
    pool = ThreadPoolExecutor(1)

    def ask(number: int) -> Any:
        return pool.submit(lambda: place(batches(number))) if number < stop else None

    try:
        coming = ask(start)
        for number in range(start, stop):
            batch = coming.result()
            coming = ask(number + 1)
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # nobody needs the batch that is being made


@contextlib.contextmanager
def _saved(
    pending: "_Pending",
    saver: Saver,
    on_checkpoint: Callable[[State], None],
    state: State | None,
) -> Iterator[None]:
    """Keeps what was learned when something fails here, such as a disk after hours."""
    try:
        yield
    except Exception:
        pending.check()
        # The checkpoint first; where the disk fails after it, the error from above is told.
        if state is not None and saver.save(state):
            with contextlib.suppress(OSError):
                on_checkpoint(state)
        with contextlib.suppress(OSError):
            pending.write()
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

    def check(self) -> None:
        """DivergedError at a loss that is not finite."""
        for step, arrays in self._values:
            _finite(step, arrays)

    def write(self) -> None:
        """Write what there is; DivergedError as check()."""
        if not self._values:
            return
        count = len(self._values)
        while self._values:
            step, values = self._values[0][0], _finite(*self._values[0])
            del self._values[0]  # before it fails, or a second try would write lines twice
            self._metrics.write(step, values)
        self._metrics.flush()
        now = time.monotonic()
        seconds, self._since = (now - self._since) / count, now
        if self._on_report is not None:
            self._on_report(Report(step, self._steps, values, seconds))


def _finite(step: int, arrays: dict[str, Any]) -> dict[str, float]:
    """The metrics of a step on the host; DivergedError where loss or gradient is lost."""
    values = {name: float(np.asarray(value)) for name, value in arrays.items()}
    for name in ("loss", "grad_norm"):  # a gradient can be lost where the loss is not
        if not math.isfinite(values[name]):
            what = name.replace("grad_norm", "gradient")
            raise DivergedError(f"the {what} became {values[name]} at step {step}")
    return values
