"""Runs one training of a stage, which may be asked to leave before its end."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wan_jax.training import loop
from wan_jax.training.optimizer import OptimizerConfig
from wan_jax.training.step import Loss, Params, State

Stop = Callable[[], bool]


class Paused(Exception):
    """A training left before its end, with a checkpoint; the same command goes on from there."""


def never() -> bool:
    """What asks no training to leave."""
    return False


def until(signals: Sequence[int], end: float | None) -> Stop:
    """Leave when there is a signal, or time.monotonic() is past `end`."""
    return lambda: bool(signals) or (end is not None and time.monotonic() > end)


def run(
    params: Params,
    loss: Loss,
    batches: loop.Batches,
    out: Path,
    *,
    optimizer: OptimizerConfig,
    stop: Stop,
    **options: Any,
) -> State:
    """loop.run() to the last step; Paused, saying where it stands, if `stop` came before."""
    state = loop.run(params, loss, batches, out, optimizer=optimizer, stop=stop, **options)
    done = int(state.step)
    if done < optimizer.steps:
        raise Paused(f"{out} has made {done} of {optimizer.steps} steps")
    return state
