"""The VAE with its columns spread over many devices: the latents and the frames of one device."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from tests import tolerances
from tests.random_weights import random_array, relative_l2
from wan_jax import streaming, vae
from wan_jax.columns import SPLIT, Columns, columns_on
from wan_jax.config import VAEConfig
from wan_jax.plans import Plan
from wan_jax.sharding import Layout
from wan_jax.vae import VAE
from wan_jax.weights import trees

# With channels on either side of those that are convolved frame by frame.
TINY = VAEConfig(base_dim=36, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,))
RELEASED = VAEConfig(base_dim=4, num_res_blocks=1)  # its scales of space and time
BATCH, LATENTS, HEIGHT = 2, 5, 2


class Case(NamedTuple):
    """Latents so wide on the devices of a plan."""

    plan: Plan
    width: int = 5
    config: VAEConfig = TINY


CASES = {
    "all full": Case(Plan(ulysses=2), 4, RELEASED),
    "the last holds less": Case(Plan(ring=3)),
    "the last holds nothing": Case(Plan(batch=2, guidance=2, ring=2)),
    "fewer columns than devices": Case(Plan(guidance=2, ring=2, ulysses=2)),
}
PADDED = CASES["the last holds nothing"]


@pytest.fixture(autouse=True, scope="module")
def _quickly_compiled() -> Iterator[None]:
    """LLVM optimises little, which is most of the time; XLA's own passes are as ever."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@functools.cache
def network(config: VAEConfig) -> VAE:
    abstract = trees.abstract(lambda: VAE(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    shapes = {name: leaf.shape for name, leaf in trees.flatten(abstract).items()}
    arrays = {name: random_array(name, shape) for name, shape in shapes.items()}
    # Smaller frames than these weights would give: what the clamp cuts cannot differ.
    arrays["decoder.conv_out.kernel"] *= 0.3
    return trees.fill(abstract, {name: jnp.asarray(value) for name, value in arrays.items()})


def on_the_devices(config: VAEConfig, layout: Layout | None) -> VAE:
    module = network(config)
    return module if layout is None else jax.device_put(module, layout.weights(module))


def chunks(config: VAEConfig, width: int) -> Iterator[np.ndarray]:
    side, step = config.spatial_stride, config.temporal_stride
    shape = (BATCH, 1 + step * (LATENTS - 1), HEIGHT * side, width * side, 3)
    video = np.random.RandomState(1).uniform(-1, 1, shape).astype(np.float32)
    yield video[:, :1]
    for start in range(1, shape[1], step):
        yield video[:, start : start + step]


def latents(config: VAEConfig, width: int) -> np.ndarray:
    shape = (BATCH, LATENTS, HEIGHT, width, config.z_dim)
    return np.random.RandomState(2).standard_normal(shape).astype(np.float32)


def encode(config: VAEConfig, layout: Layout | None, *, width: int) -> np.ndarray:
    module = on_the_devices(config, layout)
    run = streaming.encode(module, chunks(config, width), dtype="float32", what="it", layout=layout)
    return np.concatenate(list(run), axis=1)


def decode(
    config: VAEConfig, layout: Layout | None, *, source: np.ndarray, pixels: str = "float32"
) -> np.ndarray:
    module = on_the_devices(config, layout)
    given = jnp.asarray(source)
    run = streaming.decode(module, given, pixels=pixels, dtype="float32", layout=layout)
    return np.concatenate([frames for frames, _ in run], axis=1)


@functools.cache
def alone(config: VAEConfig, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents and frames of one device."""
    return encode(config, None, width=width), decode(config, None, source=latents(config, width))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_columns_on_many_devices_give_what_one_gives(case: Case) -> None:
    layout = case.plan.layout()
    own_latents, own_frames = alone(case.config, case.width)
    assert np.mean(np.abs(own_frames) == 1.0) < tolerances.VAE_CLAMPED_SHARE
    found = encode(case.config, layout, width=case.width)
    assert relative_l2(found, own_latents) <= tolerances.VAE_COLUMNS
    frames = decode(case.config, layout, source=latents(case.config, case.width))
    assert relative_l2(frames, own_frames) <= tolerances.VAE_COLUMNS


def test_bytes_are_the_frames_rounded() -> None:
    """As those of one image are."""
    layout, source = PADDED.plan.layout(), latents(TINY, PADDED.width)[:, :1]
    frames = decode(TINY, layout, source=source, pixels="uint8")
    assert frames.dtype == np.uint8
    off = (alone(TINY, PADDED.width)[1][:, :1] + 1.0) * 0.5 * 255.0 - frames
    assert np.abs(off).max() <= 0.5 + tolerances.PIPELINE_LEVEL


def test_what_diverges_on_one_device_is_known_on_all() -> None:
    """Behind attention, which would tell all of it."""
    layout = PADDED.plan.layout()
    state = streaming.zeros(vae.decoder_state, TINY, (BATCH, HEIGHT, PADDED.width), layout)
    past = np.zeros(state.conv_out.shape, np.float32)
    past[..., 2 * past.shape[3] // 4 + 1, :] = np.nan  # the first of the third device's own
    state = state._replace(conv_out=jax.device_put(past, state.conv_out.sharding))
    run = streaming.decode_program(False, "float32", "float32", layout)
    chunk = streaming.place(jnp.asarray(latents(TINY, PADDED.width)[:, 1:3]), layout)
    frames, finite, _ = run(on_the_devices(TINY, layout), chunk, state, 0.0)
    found = {bool(np.isfinite(frames[..., i, :]).all()) for i in range(frames.shape[3])}
    assert found == {True, False}
    assert not any(shard.data for shard in finite.addressable_shards)


# What lies where, and what is told


@pytest.mark.parametrize("make", [vae.encoder_state, vae.decoder_state])
@pytest.mark.parametrize("width", [6, 5, 1])
def test_no_device_holds_the_whole_state(make: Callable[..., vae.State], width: int) -> None:
    layout, shape = Plan(guidance=2, ulysses=2).layout(), (1, HEIGHT, width)
    state = streaming.zeros(make, VAEConfig(), shape, layout)
    size = {"height": HEIGHT, "width": -(-width // 4)}
    own = jax.eval_shape(lambda: make(VAEConfig(), 1, **size))
    for leaf, alike in zip(jax.tree.leaves(state), jax.tree.leaves(own), strict=True):
        held = {shard.data.shape for shard in leaf.addressable_shards}
        beside = 0 if leaf.shape[3] == 4 * alike.shape[3] else 2
        assert held == {(*alike.shape[:3], alike.shape[3] + beside, alike.shape[4])}
        assert len({str(shard.index) for shard in leaf.addressable_shards}) == 4
        assert not np.any(leaf)


@functools.cache
def _compiled(kind: str) -> Any:
    """The program of a following chunk on four devices, compiled, and a state."""
    layout = Plan(ring=2, ulysses=2).layout()
    if kind == "encode":
        make, shape = vae.encoder_state, (1, 2, 2 * HEIGHT, 2 * PADDED.width, 3)
        program, more = streaming.encode_program(False, "float32", layout), ()
    else:
        make, shape = vae.decoder_state, (1, 1, HEIGHT, PADDED.width, 16)
        program, more = streaming.decode_program(False, "uint8", "float32", layout), (0.0,)
    state = streaming.zeros(make, TINY, (1, HEIGHT, PADDED.width), layout)
    source = streaming.place(jnp.zeros(shape), layout)
    plain = jax.jit(program.__wrapped__, donate_argnums=2)  # type: ignore[attr-defined]
    return plain.lower(on_the_devices(TINY, layout), source, state, *more).compile(), state


@pytest.mark.parametrize("kind", ["encode", "decode"])
def test_devices_tell_each_other_single_columns_and_what_attention_needs(kind: str) -> None:
    program, _ = _compiled(kind)
    told: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for dtype, sizes, name in re.findall(r"= (\w+)\[([\d,]*)\]\S* ([a-z-]+)\(", program.as_text()):
        shape = tuple(int(size) for size in sizes.split(",") if size)
        told.setdefault(name, []).append((dtype, shape))
    keys_and_values, latent = ("f32", (1, 1, 2, 8, 144)), ("f32", (1, 1, 2, 8, 16))
    frames = ("u8", (1, 2, 4, 16, 3))
    assert told["all-gather"] == [keys_and_values, latent if kind == "encode" else frames]
    # Of new frames only, of which there are two at the most: a past has its neighbours' columns.
    assert all(t <= 2 and x == 1 for _, (_, t, _, x, _) in told["collective-permute"])
    assert told.get("all-reduce", []) == ([("s32", ())] if kind == "decode" else [])
    assert "all-to-all" not in told


def test_the_state_stays_split_and_its_buffers_are_used_again() -> None:
    program, state = _compiled("decode")
    before, after = jax.tree.leaves(state), jax.tree.leaves(program.output_shardings[2])
    own = sum(leaf.addressable_shards[0].data.nbytes for leaf in before)
    assert program.memory_analysis().alias_size_in_bytes >= own
    pairs = zip(before, after, strict=True)
    assert all(leaf.sharding.is_equivalent_to(other, leaf.ndim) for leaf, other in pairs)


# A share


def _mapped(function: Callable[..., Any], devices: int, out: Any) -> Callable[..., Any]:
    mesh = Plan(ulysses=devices).layout().mesh
    specs = PartitionSpec()
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    )


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [1, 3, 4, 8, 9])
def test_a_share_is_taken_widened_and_joined(devices: int, width: int) -> None:
    columns, scale = Columns(width, devices), 2
    x = np.arange(1, 1 + 2 * scale * width, dtype=np.float32).reshape(1, 1, 2, scale * width, 1)

    def run(x: jax.Array) -> tuple[jax.Array, ...]:
        own = columns.take(x)
        assert own.shape[3] == scale * columns.share
        # What stands in padding must not be seen by a neighbour.
        soiled = jnp.where(own == 0, jnp.nan, own)
        views = [columns.widen(soiled, padding) for padding in ((1, 1), (0, 1))]
        return columns.join(soiled), own, *views

    joined, own, both, right = _mapped(run, devices, (PartitionSpec(), *(SPLIT,) * 3))(x)
    np.testing.assert_array_equal(joined, x)
    whole = np.zeros((1, 1, 2, scale * columns.share * devices + 2, 1), np.float32)
    whole[..., 1 : 1 + scale * width, :] = x
    np.testing.assert_array_equal(own, whole[..., 1:-1, :])
    starts, n = range(0, whole.shape[3] - 2, scale * columns.share), scale * columns.share
    for view, first, last in ((both, 0, n + 2), (right, 1, n + 2)):
        expected = np.concatenate([whole[..., i + first : i + last, :] for i in starts], axis=3)
        np.testing.assert_array_equal(view, expected)


def test_one_device_has_no_share() -> None:
    assert columns_on(None, 5) is None
    assert columns_on(Plan(batch=2).layout(), 5) is None
    assert columns_on(Plan(batch=2, guidance=2, ring=2).layout(), 5) == Columns(5, 4)
