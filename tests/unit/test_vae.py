import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tolerances
from tests.random_weights import random_array, relative_l2
from wan_jax import vae as vae_lib
from wan_jax.config import VAEConfig
from wan_jax.vae import VAE
from wan_jax.weights import rules, trees
from wan_jax.weights import vae as table_lib

SMALL = VAEConfig(
    base_dim=8, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True)
)
TINY = VAEConfig(base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,))
BATCH, HEIGHT, WIDTH = 2, 3, 5

decode = jax.jit(vae_lib.decode, static_argnames=("chunk", "precision"))
encode = jax.jit(vae_lib.encode, static_argnames=("chunk", "precision"))
decode_first = jax.jit(vae_lib.decode_first, donate_argnames="state")
decode_next = jax.jit(vae_lib.decode_next, donate_argnames="state")
encode_first = jax.jit(vae_lib.encode_first, donate_argnames="state")
encode_next = jax.jit(vae_lib.encode_next, donate_argnames="state")


def _abstract(config, dtype=jnp.float32):
    return trees.abstract(lambda: VAE(config, rngs=nnx.Rngs(0), dtype=dtype))


@functools.cache
def _vae(config, dtype=jnp.float32):
    module = _abstract(config, dtype)
    leaves = trees.flatten(module)
    return trees.fill(
        module, {k: jnp.asarray(random_array(k, v.shape), v.dtype) for k, v in leaves.items()}
    )


def _latents(count, *, seed=0):
    shape = (BATCH, count, HEIGHT, WIDTH, 16)
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def _frames(count, *, seed=0):
    shape = (BATCH, count, 4 * HEIGHT, 4 * WIDTH, 3)
    return np.random.RandomState(seed).uniform(-1, 1, shape).astype(np.float32)


def _decode_in(latents, chunks):
    module = _vae(SMALL)
    state = vae_lib.decoder_state(SMALL, BATCH, height=HEIGHT, width=WIDTH)
    frames, state = decode_first(module, latents[:, :1], state)
    parts, start = [frames], 1
    for size in chunks:
        frames, state = decode_next(module, latents[:, start : start + size], state)
        parts.append(frames)
        start += size
    return np.concatenate(parts, axis=1)


def _encode_in(frames, chunks):
    module = _vae(SMALL)
    state = vae_lib.encoder_state(SMALL, BATCH, height=HEIGHT, width=WIDTH)
    latents, state = encode_first(module, frames[:, :1], state)
    parts, start = [latents], 1
    for size in chunks:
        latents, state = encode_next(module, frames[:, start : start + 4 * size], state)
        parts.append(latents)
        start += 4 * size
    return np.concatenate(parts, axis=1)


CHUNKS = [(2, 2), (1, 2, 1)]


@functools.cache
def _decoded_one_by_one():
    return _decode_in(_latents(5), (1, 1, 1, 1))


@functools.cache
def _encoded_one_by_one():
    return _encode_in(_frames(17), (1, 1, 1, 1))


@pytest.mark.parametrize("chunks", CHUNKS)
def test_decoding_does_not_depend_on_chunks(chunks):
    frames = _decode_in(_latents(5), chunks)
    assert frames.shape == (BATCH, 17, 4 * HEIGHT, 4 * WIDTH, 3)
    assert relative_l2(frames, _decoded_one_by_one()) <= tolerances.VAE_STREAMING


@pytest.mark.parametrize("chunks", CHUNKS)
def test_encoding_does_not_depend_on_chunks(chunks):
    latents = _encode_in(_frames(17), chunks)
    assert latents.shape == (BATCH, 5, HEIGHT, WIDTH, 16)
    assert relative_l2(latents, _encoded_one_by_one()) <= tolerances.VAE_STREAMING


def test_whole_videos_equal_streams_and_leave_a_remainder():
    frames = decode(_vae(SMALL), _latents(5), chunk=3)
    latents = encode(_vae(SMALL), _frames(17), chunk=3)
    assert frames.dtype == latents.dtype == jnp.float32
    assert relative_l2(frames, _decoded_one_by_one()) <= tolerances.VAE_STREAMING
    assert relative_l2(latents, _encoded_one_by_one()) <= tolerances.VAE_STREAMING


def test_one_frame_of_one_member_is_one_latent():
    frames = decode(_vae(SMALL), _latents(5)[1:, :1])
    latents = encode(_vae(SMALL), _frames(17)[1:, :1])
    assert relative_l2(frames, _decoded_one_by_one()[1:, :1]) <= tolerances.VAE_STREAMING
    assert relative_l2(latents, _encoded_one_by_one()[1:, :1]) <= tolerances.VAE_STREAMING


def test_the_future_does_not_change_the_past():
    latents, frames = _latents(5), _frames(17)
    latents[:, 3:], frames[:, 9:] = _latents(2, seed=1), _frames(8, seed=1)
    decoded, encoded = _decode_in(latents, (1, 1, 1, 1)), _encode_in(frames, (1, 1, 1, 1))
    np.testing.assert_array_equal(decoded[:, :9], _decoded_one_by_one()[:, :9])
    np.testing.assert_array_equal(encoded[:, :3], _encoded_one_by_one()[:, :3])
    assert np.any(decoded[:, 9:] != _decoded_one_by_one()[:, 9:])
    assert np.any(encoded[:, 3:] != _encoded_one_by_one()[:, 3:])


def test_the_first_frame_is_not_remembered_by_doubling():
    state = vae_lib.decoder_state(SMALL, BATCH, height=HEIGHT, width=WIDTH)
    _, state = decode_first(_vae(SMALL), _latents(1), state)
    times = [stage.time for stage in state.stages if stage.time is not None]
    assert len(times) == 2 and not any(np.any(time) for time in times)
    assert np.any(state.conv_in)


def test_bfloat16_weights_run_and_stay_near_and_frames_are_clamped():
    half, full = _vae(TINY, jnp.bfloat16), _vae(TINY)
    latents, frames = 2 * _latents(3), _frames(5)
    decoded, encoded = decode(half, latents), encode(half, frames)
    assert decoded.dtype == encoded.dtype == jnp.float32
    assert np.max(np.abs(decoded)) == 1.0
    assert relative_l2(decoded, decode(full, latents)) <= tolerances.VAE_BFLOAT16
    assert relative_l2(encoded, encode(full, frames)) <= tolerances.VAE_BFLOAT16


def _gib(state):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / 2**30


@pytest.mark.parametrize(
    ("height", "width", "decoder", "encoder"),
    [(480, 832, 3.52, 2.09), (720, 1280, 8.12, 4.82), (1080, 1920, 18.3, 10.8)],
)
def test_state_is_as_large_as_the_reference_caches(height, width, decoder, encoder):
    size = {"height": height // 8, "width": width // 8}
    states = [
        jax.eval_shape(lambda make=make: make(VAEConfig(), 1, **size))
        for make in (vae_lib.decoder_state, vae_lib.encoder_state)
    ]
    assert f"{_gib(states[0]):.3g}" == str(decoder)
    assert f"{_gib(states[1]):.3g}" == str(encoder)


def test_parameter_count_is_the_released_one():
    leaves = trees.flatten(_abstract(VAEConfig()))
    assert sum(leaf.size for leaf in leaves.values()) == 126_892_531


VARIANT = VAEConfig(
    base_dim=8, dim_mult=(1, 3, 3), num_res_blocks=3, temporal_downsample=(True, False)
)


def _source_shapes(config, naming):
    targets = trees.flatten(_abstract(config))
    return {
        rule.source(naming): rule.layout.source_shape(targets[rule.target].shape)
        for rule in table_lib.table(config).rules
    }


@pytest.mark.parametrize("config", [VAEConfig(), VARIANT], ids=["released", "variant"])
@pytest.mark.parametrize("naming", rules.NAMINGS)
def test_table_is_total_and_gives_the_dimensions_back(config, naming):
    targets, table = trees.flatten(_abstract(config)), table_lib.table(config)
    shapes = _source_shapes(config, naming)
    plan = rules.resolve(table, targets, naming=naming, names=list(shapes))
    assert {item.target for item in plan} == set(targets)
    assert len(shapes) == len(plan) == len(table.rules)
    assert table_lib.config_from_shapes(shapes, naming) == config


def test_arrays_survive_both_namings():
    targets, table = trees.flatten(_vae(TINY)), table_lib.table(TINY)
    for naming in rules.NAMINGS:
        there = dict(rules.export(table, targets, naming=naming))
        for rule in table.rules:
            back = rule.layout.apply(there[rule.source(naming)])
            np.testing.assert_array_equal(back, targets[rule.target])


def test_names_of_the_released_files():
    shapes = _source_shapes(VAEConfig(), "wan")
    assert len(shapes) == 194
    assert shapes["encoder.downsamples.0.residual.0.gamma"] == (96, 1, 1, 1)
    assert shapes["encoder.downsamples.8.time_conv.weight"] == (384, 384, 3, 1, 1)
    assert shapes["encoder.middle.1.to_qkv.weight"] == (1152, 384, 1, 1)
    assert shapes["encoder.head.2.weight"] == (32, 384, 3, 3, 3)
    assert shapes["decoder.upsamples.4.shortcut.weight"] == (384, 192, 1, 1, 1)
    assert shapes["decoder.upsamples.11.resample.1.weight"] == (96, 192, 3, 3)
    assert shapes["conv1.weight"] == (32, 32, 1, 1, 1)
    shapes = _source_shapes(VAEConfig(), "diffusers")
    assert shapes["encoder.down_blocks.6.conv_shortcut.weight"] == (384, 192, 1, 1, 1)
    assert shapes["decoder.up_blocks.1.upsamplers.0.time_conv.weight"] == (768, 384, 3, 1, 1)
    assert shapes["decoder.mid_block.attentions.0.norm.gamma"] == (384, 1, 1)
    assert shapes["post_quant_conv.weight"] == (16, 16, 1, 1, 1)


def _bytes(function, config, shape):
    argument = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.jit(function).lower(_abstract(config), argument).compile().memory_analysis()


def test_memory_does_not_grow_with_length():
    def used(count):
        decoding = _bytes(vae_lib.decode, TINY, (BATCH, 1 + count, 8, 8, 16))
        encoding = _bytes(vae_lib.encode, TINY, (BATCH, 1 + 2 * count, 16, 16, 3))
        return decoding.temp_size_in_bytes, encoding.temp_size_in_bytes

    long, short = used(64), used(4)
    assert long[0] <= short[0] and long[1] <= short[1]


def test_wrong_inputs_are_named():
    module = _abstract(SMALL)

    def call(function, *shapes, **options):
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        jax.eval_shape(functools.partial(function, module, **options), *arguments)

    with pytest.raises(ValueError, match=r"12 frames; 1 \+ 4n are needed: 1, 5, 9"):
        call(vae_lib.encode, (1, 12, 16, 16, 3))
    with pytest.raises(ValueError, match=r"frames are 18x16 pixels; .* multiples of 4"):
        call(vae_lib.encode, (1, 5, 16, 18, 3))
    with pytest.raises(ValueError, match=r"\[b, t, y, x, 3\] is needed"):
        call(vae_lib.encode, (1, 5, 16, 16, 4))
    with pytest.raises(ValueError, match=r"\[b, t, y, x, 16\] is needed"):
        call(vae_lib.decode, (1, 5, 2, 2, 8))
    with pytest.raises(ValueError, match=r"\[b, t, y, x, 16\] is needed"):
        call(vae_lib.decode, (1, 0, 2, 2, 16))
    with pytest.raises(ValueError, match="chunk is 0"):
        call(vae_lib.decode, (1, 5, 2, 2, 16), chunk=0)
    with pytest.raises(ValueError, match="3 frames; the first chunk is one frame"):
        call(functools.partial(vae_lib.decode_first, state=None), (1, 3, 2, 2, 16))
    with pytest.raises(ValueError, match="chunk of 6 frames; a multiple of 4"):
        call(functools.partial(vae_lib.encode_next, state=None), (1, 6, 16, 16, 3))


DIFFUSERS = {
    "_class_name": "AutoencoderKLWan",
    "_diffusers_version": "0.35.0",
    "attn_scales": [],
    "base_dim": 8,
    "decoder_base_dim": None,
    "dim_mult": [1, 3, 3],
    "dropout": 0.1,
    "num_res_blocks": 3,
    "temperal_downsample": [True, False],
    "z_dim": 16,
    "scale_factor_spatial": 4,
    "a_later_switch": False,
}


def test_configuration_from_diffusers():
    assert table_lib.config_from_diffusers(DIFFUSERS) == VARIANT
    statistics = {"z_dim": 2, "latents_mean": [0.5, 1.0], "latents_std": [2.0, 3.0]}
    config = table_lib.config_from_diffusers(DIFFUSERS | statistics)
    assert (config.z_dim, config.latents_mean, config.latents_std) == (2, (0.5, 1.0), (2.0, 3.0))
    assert table_lib.config_from_diffusers(DIFFUSERS | {"decoder_base_dim": 8}) == VARIANT


@pytest.mark.parametrize(
    "bad",
    [
        {"attn_scales": [0.5]},
        {"is_residual": True},
        {"patch_size": 2},
        {"decoder_base_dim": 256},
        {"in_channels": 12},
        {"_class_name": "AutoencoderKL"},
        {"a_later_switch": True},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_other_vaes_are_refused(bad):
    (key, value), *_ = bad.items()
    with pytest.raises(ValueError, match=f"{key} = {value!r}".replace("[", r"\[")):
        table_lib.config_from_diffusers(DIFFUSERS | bad)


def test_shapes_of_no_vae_are_refused():
    shapes = _source_shapes(VARIANT, "wan")
    with pytest.raises(ValueError, match=r"no tensor encoder\.conv_in\.weight"):
        table_lib.config_from_shapes(shapes, "diffusers")
    with pytest.raises(ValueError, match="naming is 'torch'"):
        table_lib.config_from_shapes(shapes, "torch")
    with pytest.raises(ValueError, match=r"8 latent channels needs a config\.json"):
        table_lib.config_from_shapes(shapes | {"conv2.weight": (8, 8, 1, 1, 1)}, "wan")
    odd = {"encoder.downsamples.1.residual.2.weight": (9, 8, 3, 3, 3)}
    with pytest.raises(ValueError, match="encoder stages of widths"):
        table_lib.config_from_shapes(shapes | odd, "wan")
    with pytest.raises(ValueError, match="not multiples of the first"):
        table_lib.config_from_shapes(shapes | {"encoder.conv1.weight": (16, 3, 3, 3, 3)}, "wan")
