"""generate() of images on tiny checkpoints, and the sampler's known channels."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial
from PIL import Image

import wan_jax
from tests import tolerances
from tests.random_weights import random_array, relative_l2
from tests.unit import test_sampler
from tests.unit.conftest import TINY, TINY_FLF2V, TINY_I2V
from tests.unit.test_sampler import SHAPE, STEPS, prepare, scan
from wan_jax import fitting, images, sampler
from wan_jax.dit import Cond, DiT
from wan_jax.noise import initial_noise
from wan_jax.pipeline import Progress
from wan_jax.request import Request, make_request
from wan_jax.sampler import Carry, DivergedError, State, sample
from wan_jax.schedulers import make_schedule
from wan_jax.weights import trees

Wan = wan_jax.Wan
PROMPT = "A red fox."
FIRST, OTHER, LAST = (
    np.random.RandomState(seed).randint(0, 256, (20, 40, 3)).astype(np.uint8) for seed in range(3)
)
LATENTS = (2, 2, 4, 16)  # t, h, w, c of FIRST at the default size and number of frames
NAMES = ("image", "last_image")


def _latents(wan: Wan, prompt: Any = PROMPT, **arguments: Any) -> np.ndarray:
    defaults = {"seed": 7, "output": "latents", **dict(zip(NAMES, (FIRST, LAST)))}
    if wan.config.images == 1:
        del defaults["last_image"]
    return wan.generate(prompt, **(defaults | arguments))


# What comes out.


def test_frames_are_of_the_size_that_fit_says(i2v: Wan) -> None:
    frames = i2v.generate(PROMPT, image=FIRST, size=(48, 32), seed=7)
    assert frames.shape == (1, 5, 16, 48, 3)  # FIRST is twice as wide as high
    assert frames.dtype == np.uint8
    assert frames.std() > 1
    cropped, padded = (_latents(i2v, size=(48, 32), fit=fit) for fit in ("crop", "pad"))
    assert cropped.shape == padded.shape == (1, 2, 4, 6, 16)
    assert relative_l2(cropped, padded) > tolerances.PIPELINE_MATTERS


def test_a_stream_is_the_frames(i2v: Wan) -> None:
    frames = i2v.generate(PROMPT, image=FIRST, seed=7)
    chunks = list(i2v.generate(PROMPT, image=FIRST, seed=7, output="stream"))
    assert [chunk.shape for chunk in chunks] == [(1, 1, 16, 32, 3), (1, 4, 16, 32, 3)]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), frames)


def test_one_frame_of_an_image(i2v: Wan) -> None:
    assert i2v.generate(PROMPT, image=FIRST, frames=1, seed=7).shape == (1, 1, 16, 32, 3)


def test_every_kind_of_image_gives_the_same_latents(i2v: Wan, tmp_path: Path) -> None:
    path = tmp_path / "first.png"
    Image.fromarray(FIRST).save(path)
    unit = FIRST.astype(np.float32) / np.float32(255)
    floats = (unit - np.float32(0.5)) / np.float32(0.5)
    latents = _latents(i2v)
    for image in (path, str(path), Image.fromarray(FIRST), floats):
        np.testing.assert_array_equal(_latents(i2v, image=image), latents)


def test_a_batch_equals_its_members(flf2v: Wan) -> None:
    noise = initial_noise(7, 2, shape=LATENTS)
    prompts = [PROMPT, "Two cats, and a much longer sentence about what they do."]
    batch = _latents(flf2v, prompts, num_videos=2)
    assert batch.shape == (4, *LATENTS)
    for i, prompt in enumerate(prompts):
        for k in range(2):
            alone = _latents(flf2v, prompt, noise=noise[k : k + 1])
            assert relative_l2(batch[2 * i + k], alone[0]) <= tolerances.PIPELINE_MEMBER
    np.testing.assert_array_equal(_latents(flf2v), _latents(flf2v, noise=noise[:1]))


# What the images tell.


def _request(wan: Wan, *sources: Any, **arguments: Any) -> Request:
    given = dict(zip(NAMES, sources))
    return make_request(wan.config, PROMPT, **(given | {"seed": 7} | arguments))


def _denoise(wan: Wan, request: Request, **arguments: Any) -> np.ndarray:
    context = wan.encode_text(request.texts)
    start = initial_noise(request.seed, 1, shape=request.latent_shape)
    known = wan.encode_images(request)
    return np.asarray(wan.denoise(request, context, start, known=known, **arguments))


def test_what_is_known_has_its_shapes(i2v: Wan, flf2v: Wan) -> None:
    for wan, sources in ((i2v, (FIRST,)), (flf2v, (FIRST, LAST))):
        known = wan.encode_images(_request(wan, *sources))
        assert known is not None and wan.config.clip is not None
        assert known.channels.shape == (1, *LATENTS[:3], 4 + LATENTS[3])
        rows = len(sources) * wan.config.clip.num_tokens
        assert known.tokens.shape == (1, rows, wan.config.clip.dim)
        assert known.channels.dtype == known.tokens.dtype == np.float32


def test_text_to_video_knows_no_frames(wan: Wan) -> None:
    assert wan.encode_images(make_request(TINY, PROMPT)) is None


@pytest.mark.parametrize("field", fitting.Frame._fields)
@pytest.mark.parametrize("place", [0, 1])
def test_clip_and_vae_each_see_each_image(flf2v: Wan, place: int, field: str) -> None:
    request = _request(flf2v, FIRST, LAST)
    other = _request(flf2v, OTHER, OTHER).images[place]
    frames = list(request.images)
    frames[place] = frames[place]._replace(**{field: getattr(other, field)})
    moved = relative_l2(
        _denoise(flf2v, request._replace(images=tuple(frames))), _denoise(flf2v, request)
    )
    assert moved > tolerances.PIPELINE_MATTERS


def test_a_last_image_of_another_size_covers_the_first(flf2v: Wan) -> None:
    wide = np.random.RandomState(5).randint(0, 256, (30, 90, 3)).astype(np.uint8)
    request = _request(flf2v, FIRST, wide)
    assert request.latent_shape == LATENTS
    covered = fitting.cover(images.read_image(wide), height=16, width=32)
    np.testing.assert_array_equal(request.images[1].pixels, covered)
    latents = _latents(flf2v, last_image=wide)
    assert latents.shape == (1, *LATENTS)
    assert relative_l2(latents, _latents(flf2v)) > tolerances.PIPELINE_MATTERS


def test_guidance_of_one_runs_the_prompt_alone(i2v: Wan, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    run = sampler.sample

    def watch(dit: Any, start: Any, schedule: Any, conds: Any, **arguments: Any) -> Any:
        passes.append(len(conds))
        return run(dit, start, schedule, conds, **arguments)

    monkeypatch.setattr(sampler, "sample", watch)
    single = _latents(i2v, guidance=1, negative_prompt="never read")
    # The negative prompt's branch has the image as well, so of two alike none is the stronger.
    double = _latents(i2v, guidance=6.0, negative_prompt=PROMPT)
    assert passes == [1, 2]
    assert relative_l2(double, single) <= tolerances.PIPELINE_MEMBER
    assert relative_l2(_latents(i2v, guidance=1, image=OTHER), single) > tolerances.PIPELINE_MATTERS


# Progress, and weights that leave.

RUN = {"encode": 2, "clip": 1, "image": 2, "denoise": 2, "decode": 2}


def _told(*stages: str) -> list[tuple[str, int, int]]:
    return [(stage, i, RUN[stage]) for stage in stages for i in range(RUN[stage] + 1)]


def test_stages_are_told_in_order(i2v: Wan) -> None:
    told: list[Progress] = []
    i2v.generate(PROMPT, image=FIRST, seed=7, callback=told.append)
    assert [progress[:3] for progress in told] == _told(*RUN)


def test_offload_gives_the_same_video_and_drops_the_weights(
    i2v: Wan, tiny_i2v_source: Path, tiny_cache: Path
) -> None:
    lean = wan_jax.load(tiny_i2v_source, dtype="float32", cache_dir=tiny_cache, offload=True)
    told, resident = [], []

    def callback(progress: Progress) -> None:
        told.append(progress[:3])
        resident.append(len(lean._resident))

    frames = lean.generate(PROMPT, image=FIRST, seed=7, callback=callback)
    np.testing.assert_array_equal(frames, i2v.generate(PROMPT, image=FIRST, seed=7))
    load = [("load", 0, 1), ("load", 1, 1)]
    assert told == [report for stage in RUN for report in (*load, *_told(stage))]
    assert max(resident) == 1
    assert lean._resident == {}


@pytest.mark.parametrize("done", [0, 1, 3])
def test_an_interrupted_run_goes_on_with_the_same_bits(flf2v: Wan, done: int) -> None:
    request = _request(flf2v, FIRST, LAST, steps=4, solver="unipc")
    zeros = jnp.zeros((1, *LATENTS))
    kept = [Carry(0, State(initial_noise(7, 1, shape=LATENTS), zeros, zeros, zeros))]

    def callback(progress: Progress) -> None:
        if progress.carry is not None:
            kept.append(Carry(progress.done, State(*map(np.array, progress.carry.state))))

    whole = _denoise(flf2v, request, callback=callback)
    context = flf2v.encode_text(request.texts)
    known = flf2v.encode_images(request)
    resumed = flf2v.denoise(request, context, kept[done], known=known)
    np.testing.assert_array_equal(resumed, whole)


def test_images_that_the_vae_makes_infinite_are_refused(i2v: Wan) -> None:
    vae = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), i2v.network("vae"))
    broken = dataclasses.replace(i2v, _resident={**i2v._resident, "vae": vae})
    message = "the image's latents became NaN or infinite at latent frame 0"
    with pytest.raises(DivergedError, match=message):
        broken.generate(PROMPT, image=FIRST, seed=7)


# What cannot be run.

T2V_MAKES = "this checkpoint makes a video of a text"
I2V_MAKES = f"{T2V_MAKES} and an image"
FLF2V_MAKES = "this checkpoint makes a video between two images"
LOUD = np.full((2, 2, 3), 1.5, np.float32)
IS_LOUD = (
    "is an array of shape (2, 2, 3) and dtype float32 with values outside [-1, 1] or NaN; "
    "accepted: uint8 [y, x], [y, x, 3] or [y, x, 4], or float32 [y, x, 3] in [-1, 1]"
)
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (TINY, {"image": FIRST}, f"image is given; {T2V_MAKES}"),
    (TINY, {"last_image": LAST}, f"last_image is given; {T2V_MAKES}"),
    (TINY_I2V, {}, f"image is missing; {I2V_MAKES}"),
    (TINY_I2V, {"image": FIRST, "last_image": LAST}, f"last_image is given; {I2V_MAKES}"),
    (TINY_FLF2V, {}, f"image is missing; {FLF2V_MAKES}"),
    (TINY_FLF2V, {"image": FIRST}, f"last_image is missing; {FLF2V_MAKES}"),
    (TINY_FLF2V, {"last_image": LAST}, f"image is missing; {FLF2V_MAKES}"),
    (
        TINY_FLF2V,
        {"image": FIRST, "last_image": LAST, "frames": 1},
        "frames is 1; a first and a last frame need 5 or more",
    ),
    (
        TINY_I2V,
        {"image": FIRST, "fit": "stretch"},
        "fit is 'stretch'; accepted: keep, crop, pad",
    ),
    (TINY_I2V, {"image": LOUD}, f"image {IS_LOUD}"),
    (TINY_FLF2V, {"image": FIRST, "last_image": LOUD}, f"last_image {IS_LOUD}"),
    (
        TINY_I2V,
        {"image": "/nowhere/none.png"},
        "image '/nowhere/none.png' does not exist; accepted: a whole .png, .jpg, .webp, .bmp, .gif "
        "or .tiff file",
    ),
    (
        TINY_I2V,
        {"image": FIRST[:4]},
        "image is of 40x4 pixels, for a video of 64x0; accepted at an area of 512 pixels: a side "
        "at most 2 times the other; to crop or pad takes any",
    ),
    (
        TINY_I2V,
        {"image": FIRST, "size": (48, 32), "noise": np.zeros((1, 2, 4, 6, 16))},
        "noise has shape (1, 2, 4, 6, 16); [b, t, h, w, c] = (1, 2, 2, 6, 16) is needed",
    ),
]


@pytest.mark.parametrize(("config", "arguments", "message"), REFUSED)
def test_nothing_is_computed_for_what_cannot_be_run(
    config: Any, arguments: dict[str, Any], message: str
) -> None:
    unable = Wan(config, None, {})  # type: ignore[arg-type]
    told: list[Progress] = []
    with pytest.raises(ValueError) as caught:
        unable.generate(PROMPT, callback=told.append, **arguments)
    assert str(caught.value) == message
    assert not told


def test_sizes_go_up_to_the_limit() -> None:
    longest = make_request(TINY_I2V, PROMPT, image=FIRST, size=(16384, 16), fit="crop")
    assert longest.latent_shape == (2, 2, 2048, 16)
    assert longest.images[0].pixels.shape == (16, 16384, 3)
    with pytest.raises(ValueError, match="sides up to 16384 are possible"):
        make_request(TINY_I2V, PROMPT, image=FIRST, size=(16400, 16), fit="crop")


def test_the_side_of_an_image_that_keeps_its_shape_has_a_limit() -> None:
    strip = np.zeros((5, 2000, 3), np.uint8)
    with pytest.raises(ValueError) as caught:
        make_request(TINY_I2V, PROMPT, image=strip, size=(1280, 720))
    message = "image makes a video of size (19200, 48); sides up to 16384 are possible"
    assert str(caught.value) == message


def test_fit_is_checked_where_there_is_no_image_too() -> None:
    with pytest.raises(ValueError, match="fit is 'stretch'; accepted: keep, crop, pad"):
        make_request(TINY, PROMPT, fit="stretch")  # type: ignore[arg-type]
    kept = make_request(TINY_I2V, PROMPT, image=FIRST, fit=None)
    named = make_request(TINY_I2V, PROMPT, image=FIRST, fit="keep")
    np.testing.assert_array_equal(kept.images[0].pixels, named.images[0].pixels)


def test_what_is_known_of_another_video_is_refused(i2v: Wan) -> None:
    request = _request(i2v, FIRST)
    context = i2v.encode_text(request.texts)
    other = i2v.encode_images(make_request(i2v.config, PROMPT, image=FIRST, frames=9))
    start = initial_noise(0, 1, shape=request.latent_shape)
    for known, found in ((other, r"\(3, "), (None, "None")):
        with pytest.raises(ValueError, match=f"known is of a video of shape {found}"):
            i2v.denoise(request, context, start, known=known)


# The sampler's known channels.

CONFIG = dataclasses.replace(test_sampler.CONFIG, in_channels=9, image_dim=24)


def _normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape), jnp.float32)


def _known(rows: int) -> jax.Array:
    return _normal(rows, *SHAPE[1:4], 5, seed=3)


@pytest.fixture(scope="module")
def dit() -> DiT:
    module = trees.abstract(lambda: DiT(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32))
    leaves = trees.flatten(module)
    arrays = {name: jnp.asarray(random_array(name, leaf.shape)) for name, leaf in leaves.items()}
    return trees.fill(module, arrays)


@pytest.fixture(scope="module")
def conds(dit: DiT) -> tuple[Cond, ...]:
    tokens = _normal(2, 5, 24, seed=4)
    return tuple(prepare(dit, _normal(2, 7, 16, seed=seed), tokens) for seed in (1, 2))


@pytest.mark.parametrize(("rows", "guidance"), [(1, 5.0), (2, 5.0), (1, 1.0)])
def test_loop_and_scan_give_the_same_bits(
    dit: DiT, conds: tuple[Cond, ...], rows: int, guidance: float
) -> None:
    given = conds[: 1 if guidance == 1.0 else 2]
    schedule, known = make_schedule("unipc", STEPS, shift=5.0), _known(rows)
    looped = sample(dit, _normal(*SHAPE), schedule, given, guidance=guidance, known=known)
    table = jnp.asarray(schedule.table, jnp.float32)
    scanned = scan(dit, _normal(*SHAPE), table, given, jnp.float32(guidance), known=known)
    assert looped.shape == SHAPE
    np.testing.assert_array_equal(scanned, looped)


def test_one_known_is_every_members(dit: DiT, conds: tuple[Cond, ...]) -> None:
    schedule, known = make_schedule("dpm++", STEPS, shift=5.0), _known(1)

    def run(known: jax.Array) -> np.ndarray:
        start = _normal(*SHAPE)
        return np.asarray(sample(dit, start, schedule, conds, guidance=5.0, known=known))

    shared = run(known)
    np.testing.assert_array_equal(run(jnp.repeat(known, 2, axis=0)), shared)
    other = run(jnp.concatenate([known, 2 * known]))
    np.testing.assert_array_equal(other[0], shared[0])
    assert relative_l2(other[1], shared[1]) > tolerances.SAMPLER_MATTERS


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("done", [1, 3, STEPS])
def test_a_run_that_is_taken_up_again_gives_the_same_bits(
    dit: DiT, conds: tuple[Cond, ...], solver: str, done: int
) -> None:
    schedule, known = make_schedule(solver, STEPS, shift=5.0), _known(1)
    kept: list[Carry] = []

    def run(start: Any, on_step: Callable[[Carry, int], None] | None = None) -> np.ndarray:
        result = sample(dit, start, schedule, conds, guidance=5.0, known=known, on_step=on_step)
        return np.asarray(result)

    def keep(carry: Carry, steps: int) -> None:
        kept.append(Carry(carry.done, State(*map(np.array, carry.state))))

    whole = run(_normal(*SHAPE), keep)
    np.testing.assert_array_equal(run(kept[done - 1]), whole)


@pytest.mark.parametrize("passes", [1, 2])
def test_the_network_reads_the_sample_and_behind_it_what_is_known(passes: int) -> None:
    known = _known(1)

    def network(
        x: Any, t_b: Any, cond: Any, *, implementation: str | None = None, fetch: None = None
    ) -> Any:
        assert x.shape == (*SHAPE[:4], 9)
        return cond * x[..., :4] + x[..., 4:5] - 2 * x[..., 8:]

    v = sampler.velocity(
        Partial(network),
        _normal(*SHAPE),
        500.0,
        (jnp.float32(0.5), jnp.float32(-1.0))[:passes],
        jnp.float32(3.0),
        known=known,
    )
    slope = 0.5 if passes == 1 else -1.0 + 3.0 * 1.5
    wanted = slope * np.asarray(_normal(*SHAPE)) + np.asarray(known[..., :1] - 2 * known[..., 4:])
    assert relative_l2(v, wanted) <= tolerances.SAMPLER_STEP
