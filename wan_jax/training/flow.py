"""Rectified flow: how clean latents are noised, and what the transformer learns of it.

x = (1 - sigma) clean + sigma noise; the network is given x and t = 1000 sigma and learns the
velocity, noise - clean (Wan technical report, section 4; Esser et al. 2024 for the sampling of t).
"""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from wan_jax.dit import DiT
from wan_jax.rope import MAX_TIMESTEP

Array = jax.Array
Sampling = Literal["logit_normal", "uniform"]
Remat = Literal["none", "products", "attention", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """How the transformer is trained.

    sampling: of sigma before the shift; shift: as at generation, s u / (1 + (s - 1) u).
    text_dropout, image_dropout: how often a clip is shown without its caption or its images. remat:
    what of each block is computed again on the way back: nothing, all but products and attention,
    all but the attention, or all.
    Raises ValueError naming a field outside its range.
    """

    sampling: Sampling = "logit_normal"
    shift: float = 3.0
    text_dropout: float = 0.1
    image_dropout: float = 0.1
    remat: Remat = "full"

    def __post_init__(self) -> None:
        for name, accepted in (("sampling", get_args(Sampling)), ("remat", get_args(Remat))):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted: {accepted}")
        if not (_is_number(self.shift) and self.shift > 0):
            raise ValueError(f"shift is {self.shift!r}; a positive number is needed")
        for name in ("text_dropout", "image_dropout"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value <= 1):
                raise ValueError(f"{name} is {value!r}; 0 to 1 is needed")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def draw_sigmas(key: Array, count: int, config: FlowConfig) -> Array:
    """Noise levels [count], float32 between 0 and 1."""
    if config.sampling == "uniform":
        u = jax.random.uniform(key, (count,), jnp.float32)
    else:
        u = jax.nn.sigmoid(jax.random.normal(key, (count,), jnp.float32))
    return config.shift * u / (1.0 + (config.shift - 1.0) * u)


def dropped(key: Array, rate: float, value: Array, instead: Array) -> Array:
    """`value` [b, ...] with about that share of its rows replaced by `instead`."""
    lost = jax.random.bernoulli(key, rate, (value.shape[0],) + (1,) * (value.ndim - 1))
    return jnp.where(lost, instead.astype(value.dtype), value)


def loss(
    network: DiT,
    clean_bthwc: Array,
    context_bsd: Array,
    key: Array,
    config: FlowConfig,
    *,
    known_bthwc: Array | None = None,
    tokens_bsd: Array | None = None,
    fold: bool = False,
) -> Array:
    """Mean squared error of the velocity, [b] float32, one for each clip.

    clean: normalised latents. context: text states, zero past each text. known, tokens: what images
    tell (mask and latents, CLIP's tokens), where the network takes them; an image is dropped here,
    a text by the caller, who knows its stand-in. fold: see DiT.prepare().
    """
    b = clean_bthwc.shape[0]
    level, noise_key, drop = jax.random.split(key, 3)
    sigma = draw_sigmas(level, b, config)
    noise = jax.random.normal(noise_key, clean_bthwc.shape, jnp.float32)
    clean = clean_bthwc.astype(jnp.float32)
    share = sigma[:, None, None, None, None]
    x = (1.0 - share) * clean + share * noise
    if (known_bthwc is None) != (tokens_bsd is None):
        raise ValueError("known and tokens tell of the same images; one of them is missing")
    if known_bthwc is not None and tokens_bsd is not None:
        nothing = jnp.zeros((), jnp.float32)
        # One key: a clip without its images has neither of their two forms.
        known = dropped(drop, config.image_dropout, known_bthwc.astype(jnp.float32), nothing)
        tokens_bsd = dropped(drop, config.image_dropout, tokens_bsd, nothing)
        x = jnp.concatenate([x, known], axis=-1)
    cond = network.prepare(context_bsd, tokens_bsd, fold=fold)
    velocity = network(x, MAX_TIMESTEP * sigma, cond, remat=config.remat)
    return jnp.mean(jnp.square(velocity - (noise - clean)), axis=(1, 2, 3, 4))
