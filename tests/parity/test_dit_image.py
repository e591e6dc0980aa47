"""The DiT's image branch against diffusers' WanTransformer3DModel, float32, batch 2."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from flax import nnx

from tests import tolerances
from tests.parity.convert import load_torch
from tests.parity.test_dit import torch_model
from tests.random_weights import relative_l2
from wan_jax import rope
from wan_jax.config import DiTConfig
from wan_jax.dit import DiT
from wan_jax.weights import dit as dit_weights
from wan_jax.weights import rules, trees

I2V = DiTConfig(
    dim=96,
    ffn_dim=160,
    num_heads=3,
    num_layers=3,
    in_channels=36,
    text_dim=48,
    text_len=512,  # diffusers parts text from image at this number
    freq_dim=64,
    image_dim=40,
)
FLF2V = dataclasses.replace(I2V, image_positions=18)
TOKENS = 9  # of one image
TIMESTEPS = np.array([999, 92])


def _ours(model: WanTransformer3DModel, config: DiTConfig) -> DiT:
    abstract = trees.abstract(lambda: DiT(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    return load_torch(dit_weights.table(config), abstract, state)


def _inputs(config: DiTConfig) -> dict[str, np.ndarray]:
    stream = np.random.RandomState(7)
    images = 1 if config.image_positions is None else 2
    shapes = {
        "latents": (2, 3, 6, 10, config.in_channels),
        "context": (2, config.text_len, config.text_dim),
        "image": (2, images * TOKENS, config.image_dim),
    }
    return {k: stream.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def _theirs(model: Any, config: DiTConfig, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    taps: dict[str, np.ndarray] = {}
    hook = model.condition_embedder.timesteps_proj.register_forward_hook(
        lambda _module, _args, out: taps.__setitem__("sinusoid", out.numpy().copy())
    )
    image = torch.from_numpy(given["image"])
    if config.image_positions is not None:  # a pair of images is two rows of the batch there
        image = image.reshape(-1, TOKENS, image.shape[-1])
    out = model(
        hidden_states=torch.from_numpy(given["latents"].transpose(0, 4, 1, 2, 3).copy()),
        timestep=torch.from_numpy(TIMESTEPS),
        encoder_hidden_states=torch.from_numpy(given["context"]),
        encoder_hidden_states_image=image,
        return_dict=False,
    )[0]
    hook.remove()
    return taps | {"velocity": out.numpy().transpose(0, 2, 3, 4, 1)}


def _velocity(model: DiT, given: dict[str, np.ndarray]) -> np.ndarray:
    # Fresh functions: jit would remember a sinusoid that an earlier test put in place.
    cond = jax.jit(lambda model, *args: model.prepare(*args))(
        model, given["context"], given["image"]
    )
    run = jax.jit(lambda model, *args: model(*args))
    return np.asarray(run(model, given["latents"], jnp.asarray(TIMESTEPS, jnp.float32), cond))


@pytest.mark.parametrize("config", [I2V, FLF2V], ids=["i2v", "flf2v"])
def test_velocity_equals_diffusers(config: DiTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = torch_model(config)
    given = _inputs(config)
    theirs = _theirs(reference, config, given)
    monkeypatch.setattr(rope, "sinusoid", lambda t, width: jnp.asarray(theirs["sinusoid"]))
    ours = _ours(reference, config)
    error = relative_l2(_velocity(ours, given), theirs["velocity"])
    assert error <= tolerances.DIT_TAP
    for change in ("image", "context"):  # what is left out would not be missed otherwise
        other = given | {change: given[change][::-1].copy()}
        assert relative_l2(_velocity(ours, other), theirs["velocity"]) > 100 * tolerances.DIT_TAP


@pytest.mark.parametrize("config", [I2V, FLF2V], ids=["i2v", "flf2v"])
def test_both_namings_fill_the_same_network(config: DiTConfig) -> None:
    ours = _ours(torch_model(config), config)
    leaves = trees.flatten(ours)
    arrays = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    table = dit_weights.table(config)
    wan = dict(rules.export(table, arrays, naming="wan"))
    again = load_torch(table, trees.abstract(lambda: ours), wan, naming="wan")
    for name, leaf in trees.flatten(again).items():
        np.testing.assert_array_equal(leaf, leaves[name], err_msg=name)
