"""A limit of memory: in how many tiles the VAE keeps it, and how a user says it."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wan_jax
from tests import tolerances
from tests.random_weights import relative_l2
from tests.unit import test_cli
from tests.unit.test_cli import script
from tests.unit.test_estimate import LARGE, case_of
from wan_jax import streaming, tile_programs, vae
from wan_jax.config import I2V_14B, T2V_14B, VAEConfig
from wan_jax.planning import budget, targets, vae_memory
from wan_jax.planning.estimate import estimate
from wan_jax.planning.memory import Setup
from wan_jax.planning.needs import needs
from wan_jax.planning.vae_memory import Coding, Room, Tiling
from wan_jax.plans import Plan
from wan_jax.vae_stages import decoder_parts, features_shape
from wan_jax.weights.sources import abstract_part

GIB = 2**30
DECODING = Coding("decode", VAEConfig(), (21, 90, 160, 16))
ENCODING = DECODING._replace(kind="encode")


def _room(memory: str, **options: Any) -> Room:
    setup = Setup(T2V_14B, **{"offload": True, **options})
    return budget.room(setup, vae_memory.parse_memory(memory))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GB", 6 * 10**9),
        ("6GiB", 6 * GIB),
        ("6.5 GiB", 13 * GIB // 2),
        ("900MB", 9 * 10**8),
        (".5TiB", 2**39),
        (12345, 12345),
    ],
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert vae_memory.parse_memory(text) == size


@pytest.mark.parametrize("text", ["6", "6G", "six GB", "-6GB", "0GB", "6gb", "", "nanGB", 0, True])
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="a size such as 6GB, 6.5GiB or 900MB is needed"):
        vae_memory.parse_memory(text)


def test_without_a_limit_all_is_as_ever() -> None:
    assert Room().tiling("decode", VAEConfig(), (21, 90, 160, 16)) == Tiling(1, 2)
    assert Room().tiling("encode", VAEConfig(), (21, 90, 160, 16)) == Tiling(1, 1)
    assert Room().tiling("decode", VAEConfig(), (1, 90, 160, 16)).chunk == 1


@pytest.mark.parametrize("coding", [DECODING, ENCODING], ids=["decode", "encode"])
def test_the_first_tiling_that_fits_is_taken(coding: Coding) -> None:
    found = list(coding.tilings())
    assert found[0] == coding.usual
    assert [t.tiles for t in found] == sorted(t.tiles for t in found)
    needed = [coding.working_bytes(tiling) for tiling in found]
    for limit in (4, 8, 16, 32):
        room = Room(limit * GIB)
        chosen = found.index(room.best(coding))
        assert needed[chosen] < limit * GIB
        assert all(1.1 * size > limit * GIB for size in needed[:chosen])


def test_the_least_that_is_named_is_enough_and_less_is_not() -> None:
    with pytest.raises(
        ValueError, match="max_memory is 1GB; to decode 81 frames of 1280x720"
    ) as no:
        _room("1GB").tiling("decode", T2V_14B.vae, LARGE.latent_shape)
    least = str(no.value).split("at least ")[1].split(",")[0]
    assert _room(least).tiling("decode", T2V_14B.vae, LARGE.latent_shape).tiles > 10
    less = int(vae_memory.parse_memory(least) * 0.99)
    with pytest.raises(ValueError, match="takes at least"):
        _room(less).tiling("decode", T2V_14B.vae, LARGE.latent_shape)  # type: ignore[arg-type]


def test_bfloat16_and_networks_that_leave_take_less() -> None:
    shape = LARGE.latent_shape
    tiles = {
        d: _room("8GB", vae_dtype=d).tiling("decode", T2V_14B.vae, shape).tiles for d in DTYPES
    }
    assert tiles["bfloat16"] < tiles["float32"]
    kept, alone = _room("8GB", offload=False), _room("8GB")
    assert kept.weights - alone.weights > 35 * GIB
    without_text = _room("8GB", offload=False, text_on_cpu=True)
    assert kept.weights - without_text.weights > 10 * GIB
    split = _room("8GB", offload=False, plan=Plan(ulysses=4, dit_fsdp=True))
    assert kept.weights - split.weights > 19 * GIB and split.devices == 4


DTYPES = ("float32", "bfloat16")


def test_columns_on_several_devices_are_not_cut_into_tiles() -> None:
    coding = DECODING._replace(devices=4)
    assert {tiling.tiles for tiling in coding.tilings()} == {1}
    with pytest.raises(ValueError, match="takes at least"):
        Room(2 * GIB, devices=4).tiling("decode", VAEConfig(), (21, 90, 160, 16))


@pytest.mark.parametrize("tiling", [Tiling(4, 1), Tiling(4, 2), Tiling(8, 1)], ids=str)
def test_a_tile_takes_what_the_formula_gives(tiling: Tiling) -> None:
    """Of the released decoder as it compiles for the CPU."""
    config, shape = VAEConfig(), jax.ShapeDtypeStruct
    _, h, w, z = DECODING.latent_shape
    run = tile_programs.Run(DECODING.tiles(tiling), "bfloat16", None)
    network = abstract_part(config, jnp.dtype("bfloat16"))
    size = {"height": h, "tiles": run.tiles}
    fine = jax.eval_shape(functools.partial(tile_programs.decoder_fine, network, 1, **size))
    piece = (1, tiling.chunk, h, run.tiles.windows[0], z)
    window = shape(features_shape(config, piece, first=False), jnp.float32)
    offsets = tuple(shape((), jnp.int32) for _ in run.tiles.windows)
    program = tile_programs.decode_fine_program(False, "uint8", run).on(jax.devices()[0])
    lowered = program.lower(network, window, offsets, fine, shape((), jnp.float32))
    memory = lowered.compile().memory_analysis()
    # The network's arguments are those that a tile reads, and small.
    whole = jax.eval_shape(lambda: vae.decoder_state(config, 1, height=h, width=w))
    coarse = sum(leaf.size * 4 for leaf in jax.tree.leaves(decoder_parts(whole)[0]))
    made = 2 * window.size * 4 + memory.output_size_in_bytes - memory.alias_size_in_bytes
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + coarse + made
    assert used == pytest.approx(DECODING.working_bytes(tiling), rel=tolerances.VAE_MEMORY)


def test_what_is_whole_takes_what_the_formula_gives() -> None:
    """In as many tiles as leave it more than a tile takes."""
    config, shape, tiling = VAEConfig(), jax.ShapeDtypeStruct, Tiling(32, 1)
    _, h, w, z = DECODING.latent_shape
    run = tile_programs.Run(DECODING.tiles(tiling), "bfloat16", None)
    network = abstract_part(config, jnp.dtype("bfloat16"))
    whole = jax.eval_shape(lambda: vae.decoder_state(config, 1, height=h, width=w))
    coarse = decoder_parts(whole)[0]
    program = tile_programs.decode_coarse_program(False, run).on(jax.devices()[0])
    lowered = program.lower(network, shape((1, 1, h, w, z), jnp.float32), coarse)
    memory = lowered.compile().memory_analysis()
    windows = sum(leaf.size * 4 for leaf in lowered.out_info[0])
    kept = sum(leaf.size * 4 for leaf in jax.tree.leaves(coarse))
    used = kept + memory.temp_size_in_bytes + 2 * windows  # those of the chunk before are crossing
    assert used == pytest.approx(DECODING.working_bytes(tiling), rel=tolerances.VAE_MEMORY)


# The pipeline and the scripts


def test_a_limit_makes_tiles_and_the_frames_stay(
    tiny_source: Path, tiny_cache: Path, wan: wan_jax.Wan, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (320, 32)
    latents = np.asarray(wan.generate("A fox.", seed=1, size=size, output="latents"))
    expected = np.concatenate(list(wan.decode(latents, dtype="float32")), axis=1)
    coding = Coding("decode", wan.config.vae, latents.shape[1:])
    wanted = next(tiling for tiling in coding.tilings() if tiling.tiles > 2)
    weights = Setup(wan.config, dtype="float32").resident("vae")
    limit = weights + int(coding.working_bytes(wanted) * 1.06)
    tiled = wan_jax.load(tiny_source, dtype="float32", cache_dir=tiny_cache, max_memory=limit)
    seen = []
    whole = streaming.decode
    monkeypatch.setattr(
        streaming, "decode", lambda *a, **k: seen.append(k["tiles"]) or whole(*a, **k)
    )
    told: list[int] = []
    found = list(tiled.decode(latents, dtype="float32", callback=lambda p: told.append(p.done)))
    frames = np.concatenate(found, axis=1)
    assert len(seen) == 1 and seen[0] > 1 and all(chunk.shape[1] for chunk in found)
    assert len(told) > 2 * len(found)
    assert relative_l2(frames, expected) <= tolerances.VAE_TILES


def test_what_no_tiles_make_fit_is_refused_before_anything_runs(
    tiny_source: Path, tiny_cache: Path
) -> None:
    small = wan_jax.load(tiny_source, dtype="float32", cache_dir=tiny_cache, max_memory="0.2MB")
    with pytest.raises(ValueError, match="max_memory is 0.2MB; to encode a text takes at least"):
        small.generate("A fox.", callback=lambda progress: pytest.fail(progress.stage))


def test_the_vae_runs_in_bfloat16(tiny_source: Path, tiny_cache: Path, wan: wan_jax.Wan) -> None:
    options: dict[str, Any] = {"dtype": "float32", "cache_dir": tiny_cache}
    half = wan_jax.load(tiny_source, vae_dtype="bfloat16", **options)
    assert half.network("vae").dtype == jnp.bfloat16
    latents = np.random.RandomState(0).standard_normal((1, 1, 2, 4, 16)).astype(np.float32)
    frames = [np.concatenate(list(w.decode(latents, dtype="float32")), 1) for w in (half, wan)]
    assert 0 < relative_l2(*frames) <= tolerances.VAE_BFLOAT16_SMALL
    with pytest.raises(ValueError, match="vae_dtype is 'float16'"):
        wan_jax.load(tiny_source, vae_dtype="float16", **options)


def test_the_scripts_take_both_and_the_record_tells(tmp_path: Path, tiny_source: Path) -> None:
    given = ("--ckpt_dir", str(tiny_source), "--cache_dir", str(tmp_path / "cache"))
    more = ("--max_memory", "2GB", "--vae_dtype", "bfloat16")
    one = ("--frame_num", "1", "--save_file", "out.png")
    done = script(*given, *more, *one, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out.png.json").read_text())
    assert record["vae_dtype"] == "bfloat16" and record["max_memory"] == 2 * 10**9


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("6", "'6'; a size such as 6GB, 6.5GiB or 900MB is needed"),
        ("0.2MB", "--max_memory is 0.2MB; to encode a text takes at least"),
    ],
)
def test_a_wrong_limit_is_one_line(
    memory: str, message: str, tmp_path: Path, tiny_source: Path
) -> None:
    given = ("--ckpt_dir", str(tiny_source), "--cache_dir", str(tmp_path / "cache"))
    done = script(*given, "--max_memory", memory, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.splitlines()[-1]


def test_flags_without_a_value_are_no_limit_and_float32() -> None:
    values = test_cli.parse()
    assert values.max_memory is None and values.vae_dtype == "float32"


# --plan


def test_a_plan_keeps_the_limit_by_formula() -> None:
    target = targets.parse("h100:1")
    case = case_of(I2V_14B, LARGE, target, offload=True, max_memory=16 * 10**9)
    found = {row.stage: row for row in estimate(case).rows}
    assert found["decode"].peak <= 16 * 10**9 and found["image"].peak <= 16 * 10**9
    free = needs(case._replace(max_memory=None))
    assert found["decode"].need.flops.total > free["decode"].flops.total
    assert not case.is_usual("decode") and case.is_usual("denoise")
    half = needs(case._replace(max_memory=None, vae_dtype="bfloat16"))
    assert half["decode"].activations < 0.6 * free["decode"].activations
    assert half["decode"].weights < 0.6 * free["decode"].weights
