"""AdamW with warm-up, cosine decay and clipping, from optax, and what it counts as a weight."""

import dataclasses
import math
from typing import Any

import jax
import optax

_DECAYED = ("kernel", "embedding", "down", "up")  # products, convolutions and token embeddings


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights move.

    steps: of the whole training, which the cosine ends at. final_ratio: the learning rate there, as
    a share of the highest. clip_norm: of the gradient of all weights together. ema_decay: 0 keeps
    no average. Raises ValueError naming a field outside its range.
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 100
    final_ratio: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        shares = ("final_ratio", "beta1", "beta2", "eps", "ema_decay")
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            whole = name in ("steps", "warmup_steps")
            number = isinstance(value, int if whole else int | float)
            fits = number and not isinstance(value, bool) and math.isfinite(value) and value >= 0
            if name in ("steps", "clip_norm"):
                fits, span = fits and value > 0, "a number above 0"
            elif name in shares:
                top = name == "final_ratio"
                fits = fits and (value <= 1 if top else value < 1)
                span = "0 to 1" if top else "0 or more and less than 1"
            else:
                span = "0 or more"
            if not fits:
                raise ValueError(f"{name} is {value!r}; {span} is needed")


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """From 0 up to the highest rate over warmup_steps, then down along a cosine."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_ratio,
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW behind clipping; norms, biases and tables are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_is_decayed,
        ),
    )


def _is_decayed(params: Any) -> Any:
    """A tree of booleans: which of the weights {..: {dotted path: array}} are decayed."""

    def decayed(keys: tuple[Any, ...], _: Any) -> bool:
        return str(keys[-1].key).rsplit(".", 1)[-1] in _DECAYED

    return jax.tree_util.tree_map_with_path(decayed, params)
