"""The VAE in tiles of its width, one after the other: the latents and the frames of one whole."""

import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tolerances
from tests.random_weights import random_array, relative_l2
from wan_jax import streaming, vae, vae_tiles
from wan_jax.config import VAEConfig
from wan_jax.plans import Plan
from wan_jax.vae import VAE
from wan_jax.vae_blocks import How
from wan_jax.vae_stages import decoder_parts, decoder_reach, encoder_parts, encoder_reach
from wan_jax.vae_tiles import Tiles
from wan_jax.weights import trees

TINY = VAEConfig(base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,))
# The released scales of space and time.
RELEASED = VAEConfig(base_dim=4, num_res_blocks=1)
BATCH, LATENTS, HEIGHT, WIDTH = 2, 5, 2, 13


@pytest.fixture(autouse=True, scope="module")
def _quickly_compiled() -> Iterator[None]:
    """LLVM optimises little, which is most of the time; XLA's own passes are as ever."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@functools.cache
def network(config: VAEConfig, dtype: str = "float32") -> VAE:
    abstract = trees.abstract(lambda: VAE(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
    shapes = {name: leaf.shape for name, leaf in trees.flatten(abstract).items()}
    arrays = {name: random_array(name, shape) for name, shape in shapes.items()}
    # Smaller frames than these weights would give: what the clamp cuts cannot differ.
    arrays["decoder.conv_out.kernel"] *= 0.3
    return trees.fill(abstract, {name: jnp.asarray(a, dtype) for name, a in arrays.items()})


def chunks(config: VAEConfig) -> Iterator[np.ndarray]:
    side, step = config.spatial_stride, config.temporal_stride
    shape = (BATCH, 1 + step * (LATENTS - 1), HEIGHT * side, WIDTH * side, 3)
    video = np.random.RandomState(1).uniform(-1, 1, shape).astype(np.float32)
    yield video[:, :1]
    for start in range(1, shape[1], step):
        yield video[:, start : start + step]


def latents(config: VAEConfig) -> jax.Array:
    shape = (BATCH, LATENTS, HEIGHT, WIDTH, config.z_dim)
    return jnp.asarray(np.random.RandomState(2).standard_normal(shape).astype(np.float32))


def encode(module: VAE, **options: object) -> np.ndarray:
    given = {"dtype": "float32", "what": "it", **options}
    return np.concatenate(list(streaming.encode(module, chunks(module.config), **given)), 1)


def decode(module: VAE, **options: object) -> np.ndarray:
    given = {"dtype": "float32", "pixels": "float32", **options}
    run = streaming.decode(module, latents(module.config), **given)
    return np.concatenate([frames for frames, _ in run], axis=1)


@functools.cache
def whole(config: VAEConfig) -> tuple[np.ndarray, np.ndarray]:
    return encode(network(config)), decode(network(config))


@pytest.mark.parametrize(
    ("config", "tiles", "chunk"),
    [(TINY, 2, 2), (TINY, 3, 1), (TINY, 5, 4), (RELEASED, 5, 2)],
    ids=["two", "three", "five, of which the last repeats columns", "the released scales"],
)
def test_tiles_give_what_the_whole_gives(config: VAEConfig, tiles: int, chunk: int) -> None:
    own_latents, own_frames = whole(config)
    assert np.mean(np.abs(own_frames) == 1.0) < tolerances.VAE_CLAMPED_SHARE
    frames = decode(network(config), tiles=tiles, chunk=chunk)
    assert relative_l2(frames, own_frames) <= tolerances.VAE_TILES
    assert relative_l2(encode(network(config), tiles=tiles), own_latents) <= tolerances.VAE_TILES


def test_bytes_are_those_of_the_frames() -> None:
    levels = decode(network(TINY), tiles=3, pixels="uint8", chunk=1)
    assert levels.dtype == np.uint8
    off = (whole(TINY)[1] + 1.0) * 0.5 * 255.0 - levels
    assert off.min() >= -tolerances.PIPELINE_LEVEL and off.max() <= 1 + tolerances.PIPELINE_LEVEL


def test_a_layout_of_one_device_is_that_device() -> None:
    layout = Plan().layout()
    module = jax.device_put(network(TINY), layout.weights(network(TINY)))
    frames = decode(module, tiles=2, layout=layout)
    assert relative_l2(frames, whole(TINY)[1]) <= tolerances.VAE_TILES
    with pytest.raises(ValueError, match="tiles is 2; they are run on one device, and there are 4"):
        decode(module, tiles=2, layout=Plan(ring=4).layout())


def test_bfloat16_weights_run_in_tiles_and_whole() -> None:
    half = network(TINY, "bfloat16")
    for options in ({}, {"tiles": 2}):
        assert relative_l2(decode(half, **options), whole(TINY)[1]) <= tolerances.VAE_BFLOAT16
        assert relative_l2(encode(half, **options), whole(TINY)[0]) <= tolerances.VAE_BFLOAT16


def test_the_state_of_tiles_waits_on_the_host() -> None:
    run = vae_tiles.Run(vae_tiles.decoder_tiles(TINY, WIDTH, 3), "float32", None)
    first = streaming.place(latents(TINY)[:, :1], None)
    options = {"run": run, "first": True, "pixels": "uint8"}
    _, _, state = vae_tiles.decode(network(TINY), first, run.start(), 0.0, **options)
    assert len(state.fine) == 3
    for leaf in jax.tree.leaves(state.fine):
        assert isinstance(leaf, np.ndarray) or leaf.sharding.memory_kind == "pinned_host"
        assert leaf.shape[3] in (run.tiles.window * 2**up for up in range(3))
    following = streaming.place(latents(TINY)[:, 1:3], None)
    options["first"] = False
    _, _, after = vae_tiles.decode(network(TINY), following, state, 0.0, **options)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.fine))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_without_pinned_memory_the_state_is_numpy_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_tiles, "_HOST", "none")
    frames = decode(network(TINY), tiles=2, chunk=2)
    assert relative_l2(frames, whole(TINY)[1]) <= tolerances.VAE_TILES


def test_what_diverges_in_one_tile_is_known() -> None:
    broken = latents(TINY).at[:, 2, :, -1].set(jnp.nan)
    run = streaming.decode(network(TINY), broken, pixels="uint8", dtype="float32", tiles=3, chunk=1)
    with pytest.raises(streaming.DivergedError, match="by latent frame 3"):
        list(run)


# Where tiles are


@pytest.mark.parametrize("reach", [0, 1, 3, 6])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("width", [1, 2, 5, 13, 30])
def test_tiles_make_every_column_and_see_what_it_needs(width: int, number: int, reach: int) -> None:
    tiles = Tiles(width, min(number, width), reach)
    made: set[int] = set()
    places = tiles.places()
    assert len(places) <= number and tiles.window <= width
    for place in places:
        start, own = int(place.window), int(place.own)
        assert own - start == place.inside and own + tiles.share <= width
        assert start <= max(0, own - reach)
        assert start + tiles.window >= min(width, own + tiles.share + reach)
        assert start >= 0 and start + tiles.window <= width
        made |= set(range(own, own + tiles.share))
    assert made == set(range(width))
    assert all(a.own < b.own for a, b in itertools.pairwise(places))


Reach = Callable[[VAEConfig], int]


def _seen(config: VAEConfig, kind: str, column: int) -> set[int]:
    """The latent columns of what comes of an input that know one latent column of it."""
    module, size, how = network(config), {"height": 1, "width": WIDTH}, How(True, vae.HIGHEST)
    if kind == "encode":
        _, state = encoder_parts(vae.encoder_state(config, 1, **size))
        run, scale, channels = vae.encode_fine, config.spatial_stride, 3
    else:
        _, state = decoder_parts(vae.decoder_state(config, 1, **size))
        run, scale, channels = vae.decode_fine, 2, state.stages[0].blocks[0].conv1.shape[-1]
    program = jax.jit(functools.partial(run, how=how))
    x = np.random.RandomState(3).standard_normal((1, 1, scale, WIDTH * scale, channels))
    x = x.astype(np.float32)
    other = x.copy()
    other[..., column * scale : (column + 1) * scale, :] *= -1
    found, others = (np.asarray(program(module, given, state)[0]) for given in (x, other))
    changed = np.any(found != others, axis=(0, 1, 2, 4)).reshape(WIDTH, -1).any(-1)
    return set(np.flatnonzero(changed).tolist())


@pytest.mark.parametrize("config", [TINY, RELEASED], ids=["tiny", "released scales"])
@pytest.mark.parametrize(("kind", "reach"), [("encode", encoder_reach), ("decode", decoder_reach)])
def test_columns_reach_as_far_as_is_said(config: VAEConfig, kind: str, reach: Reach) -> None:
    seen = _seen(config, kind, WIDTH // 2)
    assert max(abs(column - WIDTH // 2) for column in seen) == reach(config)


def test_the_reach_of_the_released_networks() -> None:
    assert encoder_reach(VAEConfig()) == 5 and decoder_reach(VAEConfig()) == 6
