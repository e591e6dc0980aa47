"""The DiT against diffusers' WanTransformer3DModel on the CPU, float32, tap by tap."""

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
from tests.random_weights import random_state_dict, relative_l2
from wan_jax import rope
from wan_jax.config import DiTConfig
from wan_jax.dit import DiT
from wan_jax.weights import dit as dit_weights
from wan_jax.weights import trees

CONFIG = DiTConfig(
    dim=96, ffn_dim=160, num_heads=3, num_layers=4, text_dim=48, text_len=20, freq_dim=64
)
TIMESTEPS = np.array([999, 92])


def torch_model(config: DiTConfig) -> WanTransformer3DModel:
    """Diffusers' network of these dimensions with random weights."""
    model = WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        eps=config.eps,
        rope_max_seq_len=64,
        image_dim=config.image_dim,
        added_kv_proj_dim=None if config.image_dim is None else config.dim,
        pos_embed_seq_len=config.image_positions,
    )
    weights = random_state_dict({k: tuple(v.shape) for k, v in model.state_dict().items()})
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    return model.eval().requires_grad_(False)


def _ours(model: WanTransformer3DModel) -> DiT:
    abstract = trees.abstract(lambda: DiT(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32))
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    return load_torch(dit_weights.TABLE, abstract, state)


def _inputs(grid: tuple[int, int, int], text: int) -> tuple[np.ndarray, np.ndarray]:
    stream = np.random.RandomState(7)
    latents = stream.standard_normal((2, *grid, CONFIG.in_channels)).astype(np.float32)
    context = stream.standard_normal((2, text, CONFIG.text_dim)).astype(np.float32)
    return latents, context


def _torch_taps(model: Any, latents: np.ndarray, context: np.ndarray) -> dict[str, np.ndarray]:
    taps: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        return lambda _module, _args, out: taps.__setitem__(name, out.detach().numpy().copy())

    hooks = [block.register_forward_hook(keep(f"block{i}")) for i, block in enumerate(model.blocks)]
    hooks += [
        model.patch_embedding.register_forward_hook(keep("patch")),
        model.condition_embedder.time_embedder.register_forward_hook(keep("time")),
        model.condition_embedder.time_proj.register_forward_hook(keep("steps")),
        model.condition_embedder.timesteps_proj.register_forward_hook(keep("sinusoid")),
    ]
    padded = np.zeros((2, CONFIG.text_len, CONFIG.text_dim), np.float32)
    padded[:, : context.shape[1]] = context
    out = model(
        hidden_states=torch.from_numpy(latents.transpose(0, 4, 1, 2, 3).copy()),
        timestep=torch.from_numpy(TIMESTEPS),
        encoder_hidden_states=torch.from_numpy(padded),
        return_dict=False,
    )[0]
    for hook in hooks:
        hook.remove()
    taps["velocity"] = out.numpy().transpose(0, 2, 3, 4, 1)
    return taps


def _our_taps(model: DiT, latents: np.ndarray, context: np.ndarray) -> dict[str, np.ndarray]:
    cond = jax.jit(DiT.prepare)(model, context)
    # A fresh function: jit would remember a sinusoid that an earlier test put in place.
    embed = jax.jit(lambda model, latents, t: model.embed(latents, t))
    h, mod = embed(model, latents, jnp.asarray(TIMESTEPS, jnp.float32))
    taps = {"patch": h, "time": mod.time_bd, "steps": mod.blocks_b6d}
    for i in range(CONFIG.num_layers):
        h = model.blocks(h, mod, cond, layers=slice(i, i + 1))
        taps[f"block{i}"] = h
    taps["velocity"] = model.head(h, mod)
    return {name: np.asarray(value) for name, value in taps.items()}


@pytest.mark.parametrize("grid", [(3, 6, 10), (1, 2, 14), (5, 10, 4)])
@pytest.mark.parametrize("text", [20, 7])
def test_every_tap_equals_diffusers(
    grid: tuple[int, int, int], text: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = torch_model(CONFIG)
    latents, context = _inputs(grid, text)
    theirs = _torch_taps(reference, latents, context)
    # Diffusers computes the sinusoid in float32; given the same one, everything after must agree.
    monkeypatch.setattr(rope, "sinusoid", lambda t, width: jnp.asarray(theirs["sinusoid"]))
    ours = _our_taps(_ours(reference), latents, context)
    theirs["patch"] = theirs["patch"].reshape(2, CONFIG.dim, -1).transpose(0, 2, 1)
    theirs["steps"] = theirs["steps"].reshape(2, 6, CONFIG.dim)
    del theirs["sinusoid"]
    assert set(ours) == set(theirs)
    errors = {name: relative_l2(ours[name], theirs[name]) for name in ours}
    assert max(errors.values()) <= tolerances.DIT_TAP, errors


def test_whole_forward_equals_its_taps() -> None:
    latents, context = _inputs((3, 6, 10), 20)
    model = _ours(torch_model(CONFIG))
    cond = model.prepare(jnp.asarray(context))
    whole = jax.jit(DiT.__call__)(model, latents, jnp.asarray(TIMESTEPS, jnp.float32), cond)
    taps = _our_taps(model, latents, context)
    assert relative_l2(np.asarray(whole), taps["velocity"]) <= tolerances.DIT_TAP


def test_time_path_equals_float64() -> None:
    reference = torch_model(CONFIG)
    model = _ours(reference)
    weights = {k: v.double().numpy() for k, v in reference.state_dict().items()}
    times = np.array([0.0, 1.0, 91.0, 500.0, 999.0, 1000.0, 333.25])
    j = np.arange(CONFIG.freq_dim // 2)
    angles = times[:, None] * 10000.0 ** (-j / (CONFIG.freq_dim // 2))
    wave = np.concatenate([np.cos(angles), np.sin(angles)], -1)

    def product(name: str, x: np.ndarray) -> np.ndarray:
        prefix = f"condition_embedder.{name}"
        return x @ weights[f"{prefix}.weight"].T + weights[f"{prefix}.bias"]

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1.0 + np.exp(-x))

    time = product("time_embedder.linear_2", silu(product("time_embedder.linear_1", wave)))
    steps = product("time_proj", silu(time)).reshape(-1, 6, CONFIG.dim)
    latents = jnp.zeros((len(times), 1, 2, 2, CONFIG.in_channels))
    _, mod = jax.jit(DiT.embed)(model, latents, jnp.asarray(times, jnp.float32))
    assert relative_l2(np.asarray(mod.time_bd), time) <= tolerances.DIT_TIME
    assert relative_l2(np.asarray(mod.blocks_b6d), steps) <= tolerances.DIT_TIME
    ours = rope.sinusoid(jnp.asarray(times, jnp.float32), CONFIG.freq_dim)
    assert np.abs(np.asarray(ours) - wave).max() <= tolerances.DIT_SINUSOID
