import functools

import jax
import numpy as np
import pytest
from flax import nnx

from tests import tolerances
from tests.parity.convert import load_torch
from tests.random_weights import random_state_dict, relative_l2
from wan_jax import vae as vae_lib
from wan_jax.config import VAEConfig
from wan_jax.weights import rules, trees
from wan_jax.weights import vae as table_lib

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

BATCH, HEIGHT, WIDTH = 2, 3, 5
RELEASED_SHAPE = {"base_dim": 16}
VARIANT = {
    "base_dim": 12,
    "z_dim": 8,
    "dim_mult": [1, 3, 3],
    "num_res_blocks": 1,
    "temperal_downsample": [True, False],
    "latents_mean": [0.1 * i for i in range(8)],
    "latents_std": [0.5 + 0.2 * i for i in range(8)],
}


def _shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _build(options):
    """The torch model and ours with the same random weights."""
    model = diffusers.AutoencoderKLWan(**options).eval()
    arrays = random_state_dict(_shapes(model))
    # Smaller frames than these weights would give: what the clamp cuts cannot differ.
    arrays["decoder.conv_out.weight"] *= 0.3
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    config = table_lib.config_from_diffusers(dict(model.config))
    abstract = trees.abstract(lambda: vae_lib.VAE(config, rngs=nnx.Rngs(0)))
    return model, load_torch(table_lib.table(config), abstract, arrays)


@functools.cache
def _released():
    return _build(RELEASED_SHAPE)


def _channels_last(tensor):
    return tensor.permute(0, 2, 3, 4, 1).numpy()


def _torch(array):
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 4, 1, 2, 3)))


def _decode_torch(model, latents):
    mean, std = (np.array(model.config[key], np.float32) for key in ("latents_mean", "latents_std"))
    with torch.no_grad():
        return _channels_last(model.decode(_torch(latents * std + mean)).sample)


def _encode_torch(model, frames):
    mean, std = (np.array(model.config[key], np.float32) for key in ("latents_mean", "latents_std"))
    with torch.no_grad():
        return (_channels_last(model.encode(_torch(frames)).latent_dist.mode()) - mean) / std


def _latents(count, channels=16):
    shape = (BATCH, count, HEIGHT, WIDTH, channels)
    return np.random.RandomState(0).standard_normal(shape).astype(np.float32)


def _frames(count, stride=8):
    shape = (BATCH, count, stride * HEIGHT, stride * WIDTH, 3)
    return np.random.RandomState(1).uniform(-1, 1, shape).astype(np.float32)


@functools.cache
def _decoded():
    return np.asarray(jax.jit(vae_lib.decode)(_released()[1], _latents(5)))


@functools.cache
def _encoded():
    return np.asarray(jax.jit(vae_lib.encode)(_released()[1], _frames(17)))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_decode(count):
    """Ours of 1 + n frames are the first ones of a longer video (tests/unit/test_vae.py)."""
    truth = _decode_torch(_released()[0], _latents(5)[:, :count])
    assert np.mean(np.abs(truth) == 1.0) < tolerances.VAE_CLAMPED_SHARE
    assert relative_l2(_decoded()[:, : truth.shape[1]], truth) <= tolerances.VAE_PARITY


@pytest.mark.parametrize("count", [1, 5, 9, 13, 17])
def test_encode(count):
    truth = _encode_torch(_released()[0], _frames(17)[:, :count])
    assert relative_l2(_encoded()[:, : truth.shape[1]], truth) <= tolerances.VAE_PARITY


def test_other_dimensions():
    model, module = _build(VARIANT)
    assert module.config.temporal_stride == 2 and module.config.spatial_stride == 4
    frames = jax.jit(vae_lib.decode, static_argnames="chunk")(module, _latents(4, 8), chunk=2)
    assert relative_l2(frames, _decode_torch(model, _latents(4, 8))) <= tolerances.VAE_PARITY
    latents = jax.jit(vae_lib.encode, static_argnames="chunk")(module, _frames(9, 4), chunk=3)
    assert relative_l2(latents, _encode_torch(model, _frames(9, 4))) <= tolerances.VAE_PARITY


@pytest.mark.parametrize("options", [{}, VARIANT | {"z_dim": 16}], ids=["released", "variant"])
def test_names_and_shapes_of_the_torch_model(options):
    options = {k: v for k, v in options.items() if not k.startswith("latents")}
    with torch.device("meta"):
        model = diffusers.AutoencoderKLWan(**options)
    config = table_lib.config_from_shapes(_shapes(model), "diffusers")
    assert config == table_lib.config_from_diffusers(dict(model.config))
    assert options or config == VAEConfig()
    targets = trees.flatten(trees.abstract(lambda: vae_lib.VAE(config, rngs=nnx.Rngs(0))))
    names = list(_shapes(model))
    plan = rules.resolve(table_lib.table(config), targets, naming="diffusers", names=names)
    assert {item.sources[0]: item.source_shape for item in plan} == _shapes(model)
