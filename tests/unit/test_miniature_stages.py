"""Every stage of the miniature's training, with networks and clips that are much smaller."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.unit.test_cli import environment
from wan_jax import sharding
from wan_jax.config import CLIPConfig, DiTConfig, UMT5Config, VAEConfig
from wan_jax.tokenizer import load_tokenizer, write_byte_tokenizer
from wan_jax.training import loop, metrics
from wan_jax.training.miniature import (
    autoencoder,
    captions,
    evaluate,
    files,
    networks,
    pool,
    reader,
    running,
    transformer,
    world,
)
from wan_jax.training.miniature.render import render
from wan_jax.training.miniature.whole import moments
from wan_jax.training.step import State
from wan_jax.weights import folders

SIZES = ((48, 32),)
PHASES = (
    autoencoder.Phase("draw", 3, 2, 1e-3, 1e-5),
    autoencoder.Phase("settle", 0, 1, 5e-4, 1e-5, small_weight=0.5),
)
READER = reader.RECIPE._replace(steps=2, batch_size=2, scenes=4, captions=2)
_DIT = DiTConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=2, text_dim=32, text_len=80)
_IMAGE = {"in_channels": 36, "image_dim": 32}


@pytest.fixture(scope="module")
def small() -> pytest.MonkeyPatch:
    """The same world in a few pixels and frames."""
    patch = pytest.MonkeyPatch()
    vae = VAEConfig(
        base_dim=4,
        dim_mult=(1, 1, 1),
        temporal_downsample=(True, True),
        num_res_blocks=1,
        latents_mean=(0.0,) * 16,
        latents_std=(1.0,) * 16,
    )
    dits = {
        "t2v": _DIT,
        "i2v": dataclasses.replace(_DIT, **_IMAGE),
        "flf2v": dataclasses.replace(_DIT, **_IMAGE, image_positions=34),
    }
    text = UMT5Config(vocab_size=384, dim=32, num_heads=2, head_dim=16, ffn_dim=64, num_layers=2)
    tower = CLIPConfig(image_size=32, patch_size=8, dim=32, num_heads=2, num_layers=2, ffn_dim=64)
    for name, value in {"VAE": vae, "DITS": dits, "UMT5": text, "CLIP": tower}.items():
        patch.setattr(networks, name, value)
    defaults = dataclasses.replace(networks.DEFAULTS, size=SIZES[0], frames=9, steps=2)
    patch.setattr(networks, "DEFAULTS", defaults)
    patch.setattr(evaluate, "_SIZES", SIZES)
    patch.setattr(world, "FRAME_SIZES", SIZES)
    patch.setattr(world, "FRAMES", 9)
    patch.setattr(autoencoder, "_FRAMES", 5)
    patch.setattr(autoencoder, "_STILLS", 4)
    patch.setattr(autoencoder, "_CLIPS", 2)
    patch.setattr(autoencoder, "_MEASURED", 64)
    patch.setattr(pool, "_SHARES", dict.fromkeys(SIZES, 1.0))
    patch.setattr(pool, "_CHUNK", 4)
    yield patch
    patch.undo()


@pytest.fixture(scope="module")
def out(small: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages, a few steps each, in one worker; others wait for it."""
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "stages"
    with folders.alone(out):
        if not (out / "whole").exists():
            shutil.rmtree(out, ignore_errors=True)
            write_byte_tokenizer(out / "tokenizer", vocab_size=384)
            autoencoder.train(out, seed=0, phases=PHASES)
            reader.train(out, seed=0, recipe=READER)
            for stage in transformer.RECIPES:
                transformer.train(stage, out, seed=0, recipe=small_recipe(stage))
            (out / "whole").touch()
    return out


def small_recipe(stage: str) -> transformer.Recipe:
    recipe = transformer.RECIPES[stage]
    some = {"moving": 2, "learning_rate": 1e-3}  # the same programs, compiled once
    phases = tuple(p._replace(stills=min(p.stills, 1), **some) for p in recipe.phases)
    return recipe._replace(phases=phases, clips=16, batch_size=2)


def test_every_stage_writes_what_learned(out: Path) -> None:
    names = {path.stem for path in out.glob("*.safetensors")}
    assert names == {"vae", "reader", "umt5", "clip", "t2v", "i2v", "flf2v"}
    runs = {"vae/draw": 5, "vae/settle": 1, "reader": 2, "t2v/texts": 3}
    runs |= {"i2v/images": 2, "flf2v/images": 2}
    for stage, steps in runs.items():
        lines = metrics.read(out / stage / metrics.FILE)
        assert [line["step"] for line in lines] == list(range(1, steps + 1))


def test_latents_are_also_drawn_at_half_the_size(out: Path) -> None:
    (draw, *_), (settle,) = (
        metrics.read(out / "vae" / n / metrics.FILE) for n in ("draw", "settle")
    )
    assert settle["psnr_small"] > 0 and "psnr_small" not in draw
    numbers = np.arange(2 * 3 * 4 * 6 * 2, dtype=np.float32).reshape(2, 3, 4, 6, 2)
    found = np.asarray(autoencoder._halved(numbers))
    assert found.shape == (2, 3, 2, 3, 2)
    np.testing.assert_array_equal(found[1, 2, 1, 2], numbers[1, 2, 2:, 4:].mean((0, 1)))


def test_a_stage_that_left_goes_on_to_the_same_weights(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(running.Paused, match="reader has made 1 of 2 steps"):
        reader.train(tmp_path, seed=0, recipe=READER, stop=lambda: True)
    assert not (tmp_path / "reader.safetensors").exists()
    reader.train(tmp_path, seed=0, recipe=READER)
    left, whole = (files.network(folder, "reader")[0] for folder in (tmp_path, out))
    for name, array in whole.items():
        np.testing.assert_array_equal(left[name], array)


def test_stages_leave_after_a_signal_or_their_minutes() -> None:
    now = time.monotonic()
    cases = (([], None, False), ([], now + 60, False), ([], now - 1, True), ([15], None, True))
    for signals, end, wanted in cases:
        assert running.until(signals, end)() is wanted


def test_a_phase_goes_on_only_from_the_weights_it_began_with(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(out / "vae", tmp_path / "vae")
    monkeypatch.setattr(autoencoder, "finish", lambda *_: None)
    autoencoder.train(tmp_path, seed=0, phases=PHASES)  # all is there
    run = loop.run

    def other(*arguments: Any, **options: Any) -> State:
        state = run(*arguments, **options)
        return state._replace(ema={"vae": {k: v + 1 for k, v in state.ema["vae"].items()}})

    monkeypatch.setattr(loop, "run", other)
    wrong = r"settle/checkpoints is of a training with inputs\.draw = "
    with pytest.raises(ValueError, match=wrong):
        autoencoder.train(tmp_path, seed=0, phases=PHASES)


def test_a_stage_goes_on_only_with_the_tokenizer_it_began_with(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ValueError, match=r"t2v/texts/checkpoints is of .* inputs\.token"):
        transformer.train("t2v", tmp_path, seed=0, recipe=small_recipe("t2v"))


def test_latents_are_normalised_by_what_was_measured(out: Path) -> None:
    arrays, config = files.network(out, "vae")
    assert config.latents_mean != networks.VAE.latents_mean
    assert autoencoder.measured(arrays) == config
    network = autoencoder.build(config, arrays, "bfloat16")
    groups = pool.make_groups(network, images=0, clips=128, pairs=0.5, seed=1)
    every = np.concatenate([g.latents.astype(np.float32).reshape(-1, 16) for g in groups])
    np.testing.assert_allclose(every.mean(0), 0.0, atol=0.25)
    # Deviations are those of samples: means vary less, by what is noise.
    fields = autoencoder.windows(np.random.default_rng(2), 64)
    network = autoencoder.build(config, arrays, "float32")
    _, logvar = moments(network, render(fields, size=SIZES[0], frames=world.FRAMES))
    noise = np.exp(logvar).mean((0, 1, 2, 3)) / np.square(config.latents_std)
    np.testing.assert_allclose(np.sqrt(every.var(0) + noise), 1.0, atol=0.25)


def test_batches_are_a_function_of_the_step(out: Path, small: pytest.MonkeyPatch) -> None:
    arrays, config = files.network(out, "vae")
    network = autoencoder.build(config, arrays, "bfloat16")
    groups = pool.make_groups(network, images=2, clips=16, pairs=0.5, seed=1)
    made = pool.Pool(groups, load_tokenizer(out / "tokenizer"), images=2, batch_size=3, seed=5)
    one, again, other = made.batch(7), made.batch(7), made.batch(8)
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one.ids, other.ids)
    assert one.known.shape == (*one.latents.shape[:4], 20)
    assert one.views.shape == (3, 2, 32, 32, 3)
    known = np.asarray(one.known[..., :4], np.float32)  # the mask
    assert known[:, 0].all() and known[:, -1, ..., -1].all() and known[:, 1:-1].sum() == 0
    (group,) = groups
    where = {row.tobytes(): i for i, row in enumerate(group.latents)}
    rows = [where[row.tobytes()] for row in np.asarray(one.latents)]
    np.testing.assert_array_equal(one.known[..., 4:], group.known[rows])
    np.testing.assert_array_equal(one.views, group.views[rows])


def test_devices_share_the_rows_of_a_batch(out: Path, small: pytest.MonkeyPatch) -> None:
    arrays, config = files.network(out, "vae")
    network = autoencoder.build(config, arrays, "bfloat16")
    groups = pool.make_groups(network, images=1, clips=16, pairs=0.5, seed=1)
    text = load_tokenizer(out / "tokenizer")
    layout = sharding.make_layout(1, devices=jax.devices()[:4])
    options = {"images": 1, "batch_size": 8, "seed": 5}
    alone = pool.Pool(groups, text, **options)
    shared = pool.Pool(groups, text, **options, layout=layout)
    for one, other in zip(alone.batch(3), shared.batch(3), strict=True):
        np.testing.assert_array_equal(one, other)
        assert {shard.data.shape[0] for shard in other.addressable_shards} == {2}


@pytest.mark.parametrize("pairs", [0.0, 1.0])
def test_so_many_clips_show_two_objects(out: Path, pairs: float) -> None:
    arrays, config = files.network(out, "vae")
    network = autoencoder.build(config, arrays, "bfloat16")
    groups = pool.make_groups(network, images=0, clips=32, pairs=pairs, seed=1)
    assert {len(scene.objects) for group in groups for scene in group.scenes} == {1 + int(pairs)}


def test_stills_are_first_frames_with_their_captions(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "TEXT_TOKENS", 256)  # bytes, not words
    arrays, config = files.network(out, "vae")
    network = autoencoder.build(config, arrays, "bfloat16")
    text = load_tokenizer(out / "tokenizer")
    groups = pool.make_groups(network, images=0, clips=16, pairs=0.5, seed=1)
    made = pool.Pool(groups, text, images=0, batch_size=3, seed=5, stills=20)
    still, clip = made.batch(19), made.batch(20)
    assert clip.latents.shape == (3, 3, *still.latents.shape[2:])
    assert still.latents.shape[:2] == (12, 1) and still.ids.shape == (12, clip.ids.shape[1])
    scenes = {latents[:1].tobytes(): s for g in groups for latents, s in zip(g.latents, g.scenes)}
    shown = []
    for step in range(20):
        batch = made.batch(step)
        for latents, ids, mask in zip(*map(np.asarray, batch[:3]), strict=True):
            scene, length = scenes[latents.tobytes()], int(mask.sum())
            told = bytes((ids[: length - 1] - 3).tolist()).decode()  # tokens of bytes begin at 3
            shown.append(told)
            if told not in ("", captions.NEGATIVE_PROMPT) and scene.spoil is None:
                assert all(thing.colour in told for thing in scene.objects), told
    for nothing in ("", captions.NEGATIVE_PROMPT):
        assert 0.01 < np.mean([told == nothing for told in shown]) < 0.12


def test_a_stage_says_which_comes_before(small: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer does not exist; run the stage 'tokenizer'"):
        transformer.train("t2v", tmp_path, seed=0)
    write_byte_tokenizer(tmp_path / "tokenizer", vocab_size=384)
    with pytest.raises(ValueError, match="vae.safetensors does not exist; run the stage 'vae'"):
        transformer.train("t2v", tmp_path, seed=0)
    (tmp_path / "vae.safetensors").touch()
    with pytest.raises(ValueError, match="reader.safetensors does not exist; run .* 'reader'"):
        transformer.train("t2v", tmp_path, seed=0)
    with pytest.raises(ValueError, match="tokenizer does not exist; run the stage 'tokenizer'"):
        reader.train(tmp_path / "none", seed=0)


def test_every_file_has_the_stage_that_makes_it(tmp_path: Path) -> None:
    made = {name: name for name in ("vae", "reader", *transformer.RECIPES)}
    for stage, recipe in transformer.RECIPES.items():
        made |= dict.fromkeys(recipe.trained, stage)
    assert {file for kind in networks.DITS for file in files.parts(kind).values()} == (
        made.keys() - {"reader"}
    )
    for file, stage in made.items():
        words = f"{file}.safetensors does not exist; run the stage '{stage}' before"
        with pytest.raises(ValueError, match=words):
            files.network(tmp_path, file)
    with pytest.raises(ValueError, match="tokenizer does not exist; run the stage 'tokenizer'"):
        files.tokenizer(tmp_path)


def test_a_larger_network_begins_as_the_smaller_one(out: Path) -> None:
    """With no image channels and no image values, image to video is text to video."""
    recipe = transformer.RECIPES["i2v"]
    found = transformer.begin("i2v", out, recipe, 0)["dit"]
    before, _ = files.network(out, "t2v")
    np.testing.assert_array_equal(found["patch.kernel"][..., :16, :], before["patch.kernel"])
    assert not found["patch.kernel"][..., 16:, :].any()
    assert not found["layers.cross_attn.v_img.kernel"].any()
    for name, array in before.items():
        if name != "patch.kernel":
            np.testing.assert_array_equal(found[name], array)


def test_what_is_told_stands_at_the_colours(
    small: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(networks, "TEXT_TOKENS", 256)  # bytes, not words
    write_byte_tokenizer(tmp_path / "tokenizer", vocab_size=384)
    book = reader._book(tmp_path, READER._replace(scenes=20), 3)
    assert book.ids.shape == (40, 256)
    pairs = 0
    for ids, place, told in zip(book.ids, book.place, book.told, strict=True):
        said = bytes((ids[ids > 2] - 3).tolist()).decode().lower()
        colours = []
        for at, (shape, size, motion) in zip(place, told, strict=True):
            if shape == -1:
                assert size == motion == -1
                continue
            name = world.SHAPES[shape]
            (colour,) = (c for c in world.COLOURS if said[at:].lstrip().startswith(f"{c} {name}"))
            colours.append(colour)
        assert set(colours) == world.COLOURS.keys() & set(re.findall(r"\w+", said))
        pairs += len(colours) == 2
    assert pairs > 15
    text = load_tokenizer(tmp_path / "tokenizer")
    told = ["On a checkered ground a red star.", "Red rings"]
    at = reader.places(text, told, ["red", "red"], length=64)
    assert at.tolist() == [told[0].index(" red"), 0]
    assert reader.places(text, told, ["red", "red"], length=20).tolist() == [-1, 0]
    with pytest.raises(ValueError, match="does not say 'blue'"):
        reader.places(text, ["a red star"], ["blue"], length=64)


def test_reading_learns_from_the_words_around(small: pytest.MonkeyPatch) -> None:
    """What is told is right or wrong only where there is an object."""
    params = reader._begin(0)
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    place = np.array([[1, 3], [2, 0]], np.int32)
    told = np.array([[[1, 2, 3], [0, 1, 2]], [[5, 0, 14], [-1, -1, -1]]], np.int32)
    batch = reader.Batch(ids, np.ones_like(ids), place, told)
    cost, right = reader.loss(params, None, batch, None)
    choices = [len(values) for values in reader.TOLD.values()]
    assert cost == pytest.approx(sum(np.log(choices)), rel=1e-6)  # heads begin at 0
    # So the first choice is made: right for the shape of one of three, and the size of another.
    found = {name: round(3 * float(share)) for name, share in right.items()}
    assert found == {"shape": 1, "size": 1, "motion": 0}


def test_crowds_show_more_and_cuts_less(small: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    fields = autoencoder.crowds(rng, 12)
    assert fields["shape"].shape == (12, 8)
    shown = (fields["opacity"].max(-1) > 0).sum(1)
    assert shown.max() > 2 and shown.min() <= 2
    known = np.array(list(world.COLOURS.values()), np.float32)
    things = fields["rgb"][:, :2][fields["opacity"][:, :2].max(-1) > 0]
    strange = np.abs(things[:, None] - known).max(-1).min(1) > 1e-6
    assert 0 < strange.mean() < 0.7
    part = autoencoder.cut(fields, 2, 5)
    np.testing.assert_array_equal(part["position"], fields["position"][:, :, 2:7])
    assert part["brightness"].shape == (12, 5)


@pytest.mark.parametrize(
    ("kind", "near"),
    [("t2v", ()), ("i2v", ("first frame",)), ("flf2v", ("first frame", "last frame"))],
)
def test_what_learned_is_scored(out: Path, kind: str, near: tuple[str, ...]) -> None:
    found = evaluate.scores(evaluate.from_stages(out, kind), clips=2, pairs=0)
    assert {"kind": kind, "clips": 2}.items() <= found.items()
    assert {"colour", "shape", "motion", "background"} <= set(found)
    measured = {name.split(",")[0] for name in found if name.endswith("dB")}
    assert measured == set(near)
    assert all(
        0 <= v <= 1 for k, v in found.items() if k not in ("kind", "clips") and "dB" not in k
    )


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (
            ("--stages", "examples", "--minutes", "0"),
            75,
            "stopped before stage examples; the",
        ),
        (("--stages", "reader"), 2, "error: "),
    ],
)
def test_the_command_leaves_with_a_status_and_a_line(
    flags: tuple[str, ...], status: int, said: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "wan_jax.training.miniature", *flags, "--out", "out"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    assert said in (done.stdout + done.stderr).splitlines()[-1]
    assert "Traceback" not in done.stderr
