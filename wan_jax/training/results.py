"""What a training gives: a LoRA's file, or a checkpoint."""

import json
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


def check_free(path: Path, about: dict[str, Any]) -> None:
    """Raise ValueError if a checkpoint is there that does not come of a training like this.

    about: what write_checkpoint() is to be given, as far as it is known; of its "config" may differ
    what only says how often the training is looked at.
    """
    if not checkpoint.is_checkpoint(path):
        return
    before = checkpoint.read_manifest(path)["parts"].get("dit", {}).get("trained", {})
    facts = json.loads(json.dumps(about))  # as they were read
    config = facts.pop("config", {})
    own = {name: v for name, v in config.items() if name not in _SEEN}
    old = before.get("config", {})
    other = [name for name in own if name in old and own[name] != old[name]]
    other = [name for name in other if not name.startswith("sample_")]
    other += [name for name in facts if facts[name] != before.get(name)]
    if other or not old:
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
