"""What a training gives: a LoRA's file, or a checkpoint."""

from pathlib import Path
from typing import Any

import jax

from wan_jax.dit import DiT
from wan_jax.training import finetune, lora
from wan_jax.training.finetune import Trained
from wan_jax.training.lora import LoraConfig
from wan_jax.training.step import Params, State
from wan_jax.weights import checkpoint, derived, trees
from wan_jax.weights import lora as lora_weights

LORA_FILE, CHECKPOINT = "lora.safetensors", "checkpoint"
# Settings that change no weight.
_SEEN = ("log_every", "checkpoint_every", "keep", "remat", "fsdp")


def learned(state: State) -> Params:
    """The weights that count: their average, or where none is kept they themselves."""
    return state.ema or state.params


def network(trained: Trained, state: State, dit: DiT | None) -> DiT:
    """The network with them, on the first device, as generate() runs it."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    # Not in jit, which would copy the kernels that the LoRA is beside.
    return jax.device_put(trained.network(learned(state), dit), place)


def write_lora(path: Path, state: State, config: LoraConfig, *, naming: str) -> None:
    """Write the LoRA's file, in place of an earlier one; see weights.lora.write()."""
    factors = learned(state)[finetune.LORA]
    lora_weights.write(path, lora.to_lora(factors, alpha=config.alpha), naming=naming)


def check_free(path: Path, config: dict[str, Any]) -> None:
    """Raise ValueError if a checkpoint is there that does not come of a training like this.

    config: the training's, as JSON; what only says how often it is looked at may differ.
    """
    if not checkpoint.is_checkpoint(path):
        return
    trained = checkpoint.read_manifest(path)["parts"]["dit"].get("trained", {})
    before = trained.get("config", {})
    shared = [name for name in config if name in before and name not in _SEEN]
    other = [name for name in shared if config[name] != before[name]]
    other = [name for name in other if not name.startswith("sample_")]
    if other or not before:
        raise ValueError(
            f"{path} comes of another training: {', '.join(other) or 'all'} differ; "
            "choose another --out, or delete it"
        )


def write_checkpoint(
    path: Path, source: Path, trained: finetune.Full, state: State, *, about: dict[str, Any]
) -> None:
    """Write the checkpoint, unless it is there, with what is not trained from `source`."""
    if checkpoint.is_checkpoint(path):
        return
    arrays = trees.flatten(trained.network(learned(state)))
    derived.write(source, path, arrays, trained=about | {"step": int(state.step)})
