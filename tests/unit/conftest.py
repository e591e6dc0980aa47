"""Fixtures shared by the unit tests: tiny checkpoints on disk, and one of them loaded."""

import dataclasses
from pathlib import Path

import pytest

import wan_jax
from wan_jax.config import CLIPConfig, Defaults, DiTConfig, UMT5Config, VAEConfig, WanConfig
from wan_jax.weights import miniature

# Every part of Wan2.1 at its smallest; strides, and so the multiples of sizes, are the real ones.
TINY = WanConfig(
    dit=DiTConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=2, text_dim=16, freq_dim=32),
    vae=VAEConfig(base_dim=4, dim_mult=(1, 2, 2, 2), num_res_blocks=1),
    umt5=UMT5Config(vocab_size=384, dim=16, num_heads=2, head_dim=8, ffn_dim=32, num_layers=2),
    defaults=Defaults(
        size=(32, 16),
        frames=5,
        steps=2,
        guidance=3.0,
        shift=4.0,
        solver="dpm++",
        negative_prompt="blurry",
        fps=8,
    ),
)
TINY_I2V = dataclasses.replace(
    TINY,
    dit=dataclasses.replace(TINY.dit, in_channels=36, image_dim=16),
    clip=CLIPConfig(image_size=28, dim=16, num_heads=2, num_layers=3, ffn_dim=32),
)
TINY_FLF2V = dataclasses.replace(
    TINY_I2V, dit=dataclasses.replace(TINY_I2V.dit, image_positions=2 * (1 + 2**2))
)


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random weights in the Diffusers layout; tests copy it before they change it."""
    path = tmp_path_factory.mktemp("source") / "tiny"
    miniature.write(path, config=TINY, seed=1)
    return path


@pytest.fixture(scope="session")
def tiny_i2v_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny_source, of a checkpoint that takes an image."""
    path = tmp_path_factory.mktemp("source") / "tiny-i2v"
    miniature.write(path, config=TINY_I2V, seed=2)
    return path


@pytest.fixture(scope="session")
def tiny_flf2v_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny_source, of a checkpoint that takes two images."""
    path = tmp_path_factory.mktemp("source") / "tiny-flf2v"
    miniature.write(path, config=TINY_FLF2V, seed=3)
    return path


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny_source is converted; other tests use caches of their own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def wan(tiny_source: Path, tiny_cache: Path) -> wan_jax.Wan:
    """tiny_source in float32, its networks on the device."""
    return wan_jax.load(tiny_source, dtype="float32", cache_dir=tiny_cache)


@pytest.fixture(scope="module")
def i2v(tiny_i2v_source: Path, tiny_cache: Path) -> wan_jax.Wan:
    return wan_jax.load(tiny_i2v_source, dtype="float32", cache_dir=tiny_cache)


@pytest.fixture(scope="module")
def flf2v(tiny_flf2v_source: Path, tiny_cache: Path) -> wan_jax.Wan:
    return wan_jax.load(tiny_flf2v_source, dtype="float32", cache_dir=tiny_cache)
