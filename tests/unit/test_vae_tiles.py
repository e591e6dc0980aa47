"""The VAE in tiles of its width, one after the other: the latents and the frames of one whole."""

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tolerances
from tests.random_weights import random_array, relative_l2
from wan_jax import streaming, tile_programs, vae, vae_tiles
from wan_jax.config import VAEConfig
from wan_jax.plans import Plan
from wan_jax.tiles import Tiles
from wan_jax.vae import VAE
from wan_jax.vae_blocks import How
from wan_jax.vae_stages import decoder_parts, decoder_reaches, encoder_parts, encoder_reaches
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


def blocks_of(
    monkeypatch: pytest.MonkeyPatch, *, chunks: int, windows: list[tuple] | None = None
) -> list[vae_tiles.Fine]:
    """Let a block have so many chunks; the states that go to the host from now on.

    windows: gets the windows of features that go there.
    """
    kept: list[vae_tiles.Fine] = []
    others = [] if windows is None else windows
    to_host = vae_tiles._to_host

    def noted(tree: vae_tiles.Fine | tuple) -> vae_tiles.Fine | tuple:
        found = to_host(tree)
        (kept if isinstance(found, vae_tiles.Fine) else others).append(found)
        return found

    def blocks(items: Iterable, size: Callable) -> Iterator[tuple[list, bool]]:
        return own(items, lambda item: size(item) and vae_tiles._BLOCK // chunks)

    own = vae_tiles._blocks
    monkeypatch.setattr(vae_tiles, "_to_host", noted)
    monkeypatch.setattr(vae_tiles, "_blocks", blocks)
    return kept


@pytest.mark.parametrize("pinned", [True, False])
def test_between_blocks_the_states_wait_on_the_host(
    pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not pinned:
        monkeypatch.setattr(vae_tiles, "_HOST", "none")
    windows: list[tuple] = []
    # Of 3 chunks to decode, 5 to encode.
    kept = blocks_of(monkeypatch, chunks=2, windows=windows)
    frames = decode(network(TINY), tiles=3, chunk=2)
    assert relative_l2(frames, whole(TINY)[1]) <= tolerances.VAE_TILES
    assert len(kept) == 3  # of one block; nobody needs those after the last
    found = encode(network(TINY), tiles=2)
    assert relative_l2(found, whole(TINY)[0]) <= tolerances.VAE_TILES
    assert len(kept) == 3 + 2 * 2
    assert [len(found) for found in windows] == [3] * 3
    for leaf in jax.tree.leaves((kept, windows)):
        assert isinstance(leaf, np.ndarray) or (pinned and is_pinned(leaf))


def is_pinned(leaf: jax.Array) -> bool:
    return leaf.sharding.memory_kind == "pinned_host"


def test_a_video_of_one_block_keeps_its_states_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = blocks_of(monkeypatch, chunks=5)
    decode(network(TINY), tiles=3, chunk=1)
    encode(network(TINY), tiles=3)
    assert not kept


def test_of_latents_on_the_host_a_chunk_is_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what the caller writes into them while frames come is not seen."""
    blocks_of(monkeypatch, chunks=1)
    given = np.asarray(latents(TINY)) + 0.0
    own = {"pixels": "float32", "dtype": "float32", "tiles": 2, "chunk": 1}
    found = []
    for frames, _ in streaming.decode(network(TINY), given, **own):
        assert not any(a.shape == given.shape for a in jax.live_arrays())
        given[:] = np.nan
        found.append(frames)
    assert relative_l2(np.concatenate(found, 1), whole(TINY)[1]) <= tolerances.VAE_TILES


def test_what_a_block_was_given_is_gone_when_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    windows: list[tuple] = []
    blocks_of(monkeypatch, chunks=1, windows=windows)
    alive = []

    def references() -> Iterator[jax.Array]:
        for reference in kept:
            array = reference()
            if array is not None:
                yield array

    kept: list[weakref.ref] = []
    made = vae_tiles._windows

    def noted(*arguments: object, **options: object) -> tuple:
        alive.append(len(list(references())))
        found, state = made(*arguments, **options)
        windows.clear()
        kept.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(found))
        return found, state

    monkeypatch.setattr(vae_tiles, "_windows", noted)
    decode(network(TINY), tiles=2, chunk=1)
    assert alive == [0] * LATENTS


@pytest.mark.parametrize("tiles", [1, 2])
def test_no_frame_is_refused(tiles: int) -> None:
    run = streaming.decode(
        network(TINY), latents(TINY)[:, :0], pixels="uint8", dtype="float32", tiles=tiles
    )
    with pytest.raises(ValueError, match="have no frame to decode"):
        list(run)


def test_a_block_is_as_long_as_the_host_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_tiles, "_BLOCK", 10)
    found = list(vae_tiles._blocks([4, 6, 1, 11, 3, 3], lambda size: size))
    assert found == [([4, 6], False), ([1], False), ([11], False), ([3, 3], True)]
    assert list(vae_tiles._blocks([], lambda size: size)) == []


def test_what_is_done_is_told_before_the_frames_come(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_of(monkeypatch, chunks=3)
    run = streaming.decode(
        network(TINY), latents(TINY), pixels="uint8", dtype="float32", tiles=2, chunk=1
    )
    told = [(frames.shape[1], done) for frames, done in run]
    assert told == [
        *((0, n) for n in (0, 1, 1, 2, 2, 3)),
        (1, 1), (2, 2), (2, 3),
        *((0, n) for n in (3, 4, 4, 5)),
        (2, 4), (2, 5),
    ]  # fmt: skip


def test_what_diverges_in_one_tile_is_known() -> None:
    broken = latents(TINY).at[:, 2, :, -1].set(jnp.nan)
    run = streaming.decode(network(TINY), broken, pixels="uint8", dtype="float32", tiles=3, chunk=1)
    with pytest.raises(streaming.DivergedError, match="by latent frame 3"):
        list(run)


# Where tiles are


@pytest.mark.parametrize("reaches", [(0,), (3,), (6, 3, 1), (5, 5, 4, 1)], ids=str)
@pytest.mark.parametrize("number", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("width", [1, 2, 5, 13, 30])
def test_tiles_make_every_column_and_see_what_it_needs(
    width: int, number: int, reaches: tuple[int, ...]
) -> None:
    tiles = Tiles(width, min(number, width), reaches)
    made: set[int] = set()
    places = tiles.places()
    assert len(places) <= number and max(tiles.windows) <= width
    for place in places:
        starts = np.cumsum([place.start, *place.offsets])
        assert starts[-1] == place.own and place.own + tiles.share <= width
        ends = starts + [*tiles.windows, tiles.share]
        assert (np.diff(starts) >= 0).all() and (np.diff(ends) <= 0).all()
        assert starts[0] >= 0 and ends[0] <= width
        for start, end, reach in zip(starts, ends, reaches, strict=False):
            assert start <= max(0, place.own - reach)
            assert end >= min(width, place.own + tiles.share + reach)
        made |= set(range(place.own, place.own + tiles.share))
    assert made == set(range(width))
    assert all(a.own < b.own for a, b in itertools.pairwise(places))


def test_columns_go_from_the_whole_to_windows_and_back() -> None:
    tiles = Tiles(13, 4, (3, 1))
    whole = np.arange(2 * 26, dtype=np.float32).reshape(1, 1, 1, 26, 2)  # two columns a latent one
    back = np.zeros_like(whole)
    for number, place in enumerate(tiles.places()):
        x = jnp.asarray(tiles.window(whole, number))
        for i in range(2):
            x = tiles.narrow(x, i, place.offsets)
        tiles.put(back, np.asarray(x), place)
    np.testing.assert_array_equal(back, whole)


Reaches = Callable[[VAEConfig], tuple[int, ...]]


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
@pytest.mark.parametrize(
    ("kind", "reaches"), [("encode", encoder_reaches), ("decode", decoder_reaches)]
)
def test_columns_reach_as_far_as_is_said(config: VAEConfig, kind: str, reaches: Reaches) -> None:
    seen = _seen(config, kind, WIDTH // 2)
    assert max(abs(column - WIDTH // 2) for column in seen) == reaches(config)[0]


def test_the_reaches_of_the_released_networks() -> None:
    assert encoder_reaches(VAEConfig()) == (5, 4, 3, 1)
    assert decoder_reaches(VAEConfig()) == (6, 3, 1)


@pytest.mark.parametrize("kind", ["encode", "decode"])
@pytest.mark.parametrize("i", [0, 1, 2])
def test_columns_that_were_seen_may_not_be_cut(
    kind: str, i: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing beside its own columns from there on, a tile gives others."""
    name = f"{kind}r_reaches"
    reaches = list(getattr(tile_programs, name)(RELEASED))
    expected = whole(RELEASED)[0 if kind == "encode" else 1]
    reaches[i:] = [0] * len(reaches[i:])
    monkeypatch.setattr(tile_programs, name, lambda config: tuple(reaches))
    run = {"encode": encode, "decode": functools.partial(decode, chunk=2)}[kind]
    assert relative_l2(run(network(RELEASED), tiles=3), expected) > 10 * tolerances.VAE_TILES
