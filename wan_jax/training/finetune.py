"""What is learned from a batch of a cache: the loss of a DiT, whole or of a LoRA beside it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from wan_jax.config import DiTConfig
from wan_jax.dit import DiT
from wan_jax.training import flow, lora
from wan_jax.training.batches import Batch
from wan_jax.training.flow import FlowConfig
from wan_jax.training.step import Loss, Params
from wan_jax.weights import trees
from wan_jax.weights.sources import abstract_part

Array = jax.Array
FULL, LORA = "dit", "lora"  # the names in Params


class Frozen(NamedTuple):
    """What the loss reads and does not train.

    null: states [s, d] of the empty text. dit: the network beside whose kernels a LoRA is trained,
    None where it is trained itself.
    """

    null: Array
    dit: DiT | None = None


class Full(NamedTuple):
    """All weights of a network are trained, {"dit": {path: float32}}.

    dtype: of the kernels in products; the float32 islands stay float32.
    """

    config: DiTConfig
    dtype: jnp.dtype

    def network(self, params: Params, dit: DiT | None = None) -> DiT:
        """The network as inference stores it."""
        like = abstract_part(self.config, self.dtype)
        assert isinstance(like, DiT)
        return trees.fill_as(like, params[FULL])


class Beside(NamedTuple):
    """A LoRA is trained beside the kernels of a network, {"lora": {path and half: float32}}."""

    scale: float

    def network(self, params: Params, dit: DiT | None = None) -> DiT:
        """The given network with the LoRA on it."""
        assert dit is not None
        return lora.attach(dit, params[LORA], scale=self.scale)


Trained = Full | Beside


def masters(dit: DiT) -> dict[str, Array]:
    """{path: float32} of a network."""
    return {name: leaf.astype(jnp.float32) for name, leaf in trees.flatten(dit).items()}


def make_loss(trained: Trained, config: FlowConfig) -> Loss:
    """loss(params, Frozen, Batch on the devices, key) for training.step: the mean over clips."""

    def loss(
        params: Params, frozen: Frozen, batch: Batch, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        text, rest = jax.random.split(key)
        context = jnp.asarray(batch.context)
        context = flow.dropped(text, config.text_dropout, context, frozen.null)
        losses = flow.loss(
            trained.network(params, frozen.dit),
            jnp.asarray(batch.latents),
            context,
            rest,
            config,
            known_bthwc=None if batch.known is None else jnp.asarray(batch.known),
            tokens_bsd=None if batch.tokens is None else jnp.asarray(batch.tokens),
        )
        return jnp.mean(losses), {}

    return loss
