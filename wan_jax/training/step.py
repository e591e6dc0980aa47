"""One step of training as a pure function of the state, the batch and the seed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from wan_jax import xla
from wan_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer

Array = jax.Array
Params = dict[str, dict[str, Array]]  # {network: {dotted path: float32}}
# loss(params, frozen, batch, key) -> the scalar to make small, and other scalars to write down
Loss = Callable[[Params, Any, Any, Array], tuple[Array, dict[str, Array]]]


class State(NamedTuple):
    """Where training stands.

    step: int32, how many steps were made, so also which batch comes next. params: float32 masters.
    ema: their running average, or {} where none is kept. key: what every random draw comes from.
    """

    step: Array
    params: Params
    opt_state: Any
    ema: Params
    key: Array


def make_state(params: Params, config: OptimizerConfig, *, seed: int) -> State:
    """The state before the first step, in arrays of its own."""
    own = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    average = jax.tree.map(jnp.copy, own) if config.ema_decay else {}
    moments = make_optimizer(config).init(own)
    return State(jnp.zeros((), jnp.int32), own, moments, average, jax.random.PRNGKey(seed))


def make_step(
    loss: Loss, config: OptimizerConfig, *, accumulate: int = 1, **options: Any
) -> Callable[[State, Any, Any], tuple[State, dict[str, Array]]]:
    """The compiled step(state, frozen, batch) -> (state, metrics); the state's buffers are reused.

    frozen: what the loss reads and does not train. accumulate: the batch is worked on in so many
    pieces along its first axis, for the memory. options: further ones of jax.jit.
    """
    optimizer, rate = make_optimizer(config), learning_rate(config)
    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(state: State, frozen: Any, batch: Any) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        (value, found), grads = _accumulated(gradient, accumulate, state, frozen, batch, key)
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it
            updates, moments = optimizer.update(grads, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)
            now = jnp.asarray(rate(state.step), jnp.float32)
        metrics = {"loss": value, "grad_norm": _norm(grads), "learning_rate": now}
        ema = _averaged(state.ema, params, state.step, config.ema_decay) if state.ema else {}
        return State(state.step + 1, params, moments, ema, state.key), metrics | found

    return xla.jit(step, attention=True, donate_argnums=0, **options)


def _accumulated(
    gradient: Callable[..., Any], pieces: int, state: State, frozen: Any, batch: Any, key: Array
) -> Any:
    """((loss, metrics), gradient) of the batch, as means over its pieces."""
    if pieces == 1:
        return gradient(state.params, frozen, batch, key)

    def cut(x: Array) -> Array:
        # Every piece takes from all over the batch, so rows stay on the device that they are on.
        return x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1)

    split = jax.tree.map(cut, batch)

    def one(total: Any, item: tuple[Any, Array]) -> tuple[Any, None]:
        found = gradient(state.params, frozen, *item)
        return jax.tree.map(lambda t, f: t + f / pieces, total, found), None

    keys = jax.random.split(key, pieces)
    first = jax.tree.map(lambda x: x[0], (split, keys))
    shapes = jax.eval_shape(lambda item: gradient(state.params, frozen, *item), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return lax.scan(one, zeros, (split, keys))[0]


def _norm(tree: Any) -> Array:
    """The Euclidean norm of all leaves together."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def _averaged(ema: Params, params: Params, step: Array, decay: float) -> Params:
    """The running average, which early on forgets its beginning faster."""
    count = step.astype(jnp.float32)
    keep = jnp.minimum(decay, (1.0 + count) / (10.0 + count))
    return jax.tree.map(lambda old, new: old + (1.0 - keep) * (new - old), ema, params)
