"""LoRA in training: thin factors beside the kernels of a DiT that itself stays as it is.

Where they are made and put on, how they become a file's. The path of a product is as in
weights.lora, such as "layers.self_attn.q"; its factors are named <path>.down and <path>.up.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.config import DiTConfig
from wan_jax.dit import DiT
from wan_jax.layers import Linear, LowRank
from wan_jax.weights import trees
from wan_jax.weights.lora import Lora, layers_of
from wan_jax.weights.sources import abstract_part

Array = jax.Array
Factors = dict[str, Array]

TARGETS = (  # the default: the large products of every block
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    *("ffn_in", "ffn_out"),
)


def products(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """{path: shape of the kernel, with layers first in the stack} of all that may be a target."""
    leaves = trees.flatten(abstract_part(config, jnp.dtype(jnp.float32)))
    ends = ((name.removesuffix(".kernel"), name, leaf.shape) for name, leaf in leaves.items())
    return {path: shape for path, name, shape in ends if path != name}


def paths(config: DiTConfig, targets: Sequence[str]) -> list[str]:
    """The paths of targets, which may leave out "layers."; ValueError naming one that is none."""
    known = products(config)
    found = []
    for target in targets:
        path = next((p for p in (f"layers.{target}", target) if p in known), None)
        if path is None:
            names = ", ".join(name.removeprefix("layers.") for name in known)
            raise ValueError(f"lora_targets has {target!r}; this network has {names}")
        found.append(path)
    return list(dict.fromkeys(found))


def fresh(config: DiTConfig, rank: int, targets: Sequence[str], key: Array) -> Factors:
    """Factors, float32, that change nothing yet: down Gaussian of variance 1 / d_in, up zero."""
    known = products(config)
    factors: Factors = {}
    for path in paths(config, targets):
        layers = layers_of(path, known[path])
        *d_in, d_out = known[path][len(layers) :]
        key, own = jax.random.split(key)
        down = jax.random.normal(own, (*layers, *d_in, rank), jnp.float32)
        factors[f"{path}.down"] = down / math.sqrt(math.prod(d_in))
        factors[f"{path}.up"] = jnp.zeros((*layers, rank, d_out), jnp.float32)
    return factors


def attach(dit: DiT, factors: Mapping[str, Array], *, scale: float) -> DiT:
    """The network with scale * down @ up beside its kernels, which are the given one's own."""
    network = jax.tree.map(lambda leaf: leaf, dit)
    for path in _products_of(factors):
        place = network
        for name in path.split("."):
            place = getattr(place, name)
        assert isinstance(place, Linear)
        place.lora = LowRank(factors[f"{path}.down"], scale * factors[f"{path}.up"])
    return network


def to_lora(factors: Mapping[str, Array], *, alpha: float) -> Lora:
    """The factors on the host, as weights.lora merges and writes them."""
    halves = {
        path: (np.asarray(factors[f"{path}.down"]), np.asarray(factors[f"{path}.up"]))
        for path in _products_of(factors)
    }
    return Lora.of(halves, alpha=alpha)


def _products_of(factors: Mapping[str, Array]) -> list[str]:
    return [name.removesuffix(".down") for name in factors if name.endswith(".down")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What is trained beside the kernels.

    lora_rank: 0 trains all weights themselves. lora_alpha: the difference counts alpha / rank
    times; None is the rank. lora_targets: products, as paths() takes them.
    """

    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if not isinstance(self.lora_rank, int) or isinstance(self.lora_rank, bool):
            raise ValueError(f"lora_rank is {self.lora_rank!r}; an integer is needed")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank is {self.lora_rank}; 0 (none) or more is needed")
        alpha = self.lora_alpha
        if alpha is not None and not (isinstance(alpha, int | float) and 0 < alpha < math.inf):
            raise ValueError(f"lora_alpha is {alpha!r}; a number above 0 is needed")
        targets = self.lora_targets
        if not isinstance(targets, tuple) or not targets:
            raise ValueError(f"lora_targets is {targets!r}; names such as {TARGETS} are needed")

    @property
    def alpha(self) -> float:
        """lora_alpha, or what it is by default."""
        return float(self.lora_rank if self.lora_alpha is None else self.lora_alpha)

    @property
    def scale(self) -> float:
        """How many times down @ up counts."""
        return self.alpha / max(self.lora_rank, 1)
