"""load() and generate() on a tiny checkpoint of random weights."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wan_jax
from tests import tolerances
from tests.random_weights import relative_l2
from tests.unit.conftest import TINY
from wan_jax import loading, sampler
from wan_jax.config import NANO_T2V
from wan_jax.noise import MAX_SEED, initial_noise
from wan_jax.pipeline import Progress
from wan_jax.plans import Plan
from wan_jax.request import make_request
from wan_jax.sampler import DivergedError
from wan_jax.schedulers import make_schedule
from wan_jax.weights import miniature, trees

Wan = wan_jax.Wan
PROMPT = "A red fox."
PROMPTS = [PROMPT, "Two cats, and a much longer sentence about what they do."]
LATENTS = (2, 2, 4, 16)  # t, h, w, c of the default size and frames
FRAMES = (5, 16, 32, 3)


def _latents(wan: Wan, prompt: Any = PROMPT, **arguments: Any) -> np.ndarray:
    return wan.generate(prompt, **({"seed": 7, "output": "latents"} | arguments))


def _start(wan: Wan, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> np.ndarray:
    """The noise that generate() starts from."""
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "sample", lambda dit, noise, *args, **kwargs: noise)
        return _latents(wan, **arguments)


# What comes out.


def test_frames_latents_and_stream(wan: Wan) -> None:
    latents = _latents(wan)
    assert isinstance(latents, np.ndarray)
    assert latents.shape == (1, *LATENTS)
    assert latents.dtype == np.float32
    assert np.isfinite(latents).all()
    frames = wan.generate(PROMPT, seed=7)
    assert isinstance(frames, np.ndarray)
    assert frames.shape == (1, *FRAMES)
    assert frames.dtype == np.uint8
    assert frames.std() > 1
    chunks = list(wan.generate(PROMPT, seed=7, output="stream"))
    assert [chunk.shape for chunk in chunks] == [(1, 1, *FRAMES[1:]), (1, 4, *FRAMES[1:])]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), frames)
    np.testing.assert_array_equal(np.concatenate(list(wan.decode(latents)), axis=1), frames)


@pytest.mark.parametrize(("count", "rounding"), [(2, 0.0), (1, 0.5)])
def test_bytes_are_truncated_for_videos_and_rounded_for_images(
    count: int, rounding: float, wan: Wan
) -> None:
    latents = 3 * _latents(wan)[:, :count]  # some reach the clamp
    levels = np.concatenate(list(wan.decode(latents)), axis=1).astype(np.float64)
    floats = np.concatenate(list(wan.decode(latents, dtype="float32")), axis=1)
    assert floats.dtype == np.float32
    assert np.abs(floats).max() == 1.0
    cut = (floats.astype(np.float64) + 1.0) * 127.5 + rounding - levels
    assert cut.min() >= -tolerances.PIPELINE_LEVEL
    assert cut[floats < 1.0].max() < 1.0 + tolerances.PIPELINE_LEVEL
    assert set(np.unique(levels[np.abs(floats) == 1.0])) <= {0.0, 255.0}


def test_frames_that_are_not_finite_are_refused(wan: Wan) -> None:
    latents = _latents(wan)
    latents[0, 1, 0, 0, 0] = np.nan
    with pytest.raises(DivergedError, match="frames became NaN or infinite by latent frame"):
        list(wan.decode(latents))


def test_one_frame(wan: Wan) -> None:
    frames = wan.generate(PROMPT, frames=1, seed=7)
    assert frames.shape == (1, 1, *FRAMES[1:])
    (chunk,) = wan.generate(PROMPT, frames=1, seed=7, output="stream")
    np.testing.assert_array_equal(chunk, frames)


# Seeds, noise and batches.


def test_a_seed_gives_the_same_video_and_another_another(wan: Wan) -> None:
    first = _latents(wan)
    np.testing.assert_array_equal(_latents(wan), first)
    assert relative_l2(_latents(wan, seed=8), first) > tolerances.PIPELINE_MATTERS
    assert relative_l2(_latents(wan, PROMPTS[1]), first) > tolerances.PIPELINE_MATTERS
    random = [_latents(wan, seed=None) for _ in range(2)]
    assert relative_l2(*random) > tolerances.PIPELINE_MATTERS


@pytest.mark.parametrize(
    "plan", [Plan(guidance=2), Plan(ring=2, ulysses=2), Plan(batch=2)], ids=str
)
def test_noise_is_the_same_whatever_the_devices(
    plan: Plan, tiny_source: Path, tiny_cache: Path, wan: Wan, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread = wan_jax.load(tiny_source, dtype="float32", cache_dir=tiny_cache, plan=plan)
    found, wanted = (_start(own, monkeypatch, num_videos=2) for own in (spread, wan))
    np.testing.assert_array_equal(found, wanted)


def test_noise_takes_the_place_of_the_seed(wan: Wan) -> None:
    noise = initial_noise(7, 1, shape=LATENTS)
    for given in (noise, np.asarray(noise, np.float64)):
        np.testing.assert_array_equal(_latents(wan, seed=1, noise=given), _latents(wan))
    assert not noise.is_deleted()


def test_a_batch_equals_its_members(wan: Wan, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = initial_noise(7, 2, shape=LATENTS)
    start = _start(wan, monkeypatch, prompt=PROMPTS, num_videos=2)
    np.testing.assert_array_equal(start, np.concatenate([noise, noise]))
    batch = _latents(wan, PROMPTS, num_videos=2)
    assert batch.shape == (4, *LATENTS)
    for i, prompt in enumerate(PROMPTS):
        for k in range(2):
            alone = _latents(wan, prompt, noise=noise[k : k + 1])
            assert relative_l2(batch[2 * i + k], alone[0]) <= tolerances.PIPELINE_MEMBER
    np.testing.assert_array_equal(_latents(wan, noise=noise[:1]), _latents(wan))


def test_frames_of_a_batch_are_in_prompt_order(wan: Wan) -> None:
    latents = _latents(wan, PROMPTS, num_videos=2)
    frames = wan.generate(PROMPTS, num_videos=2, seed=7)
    assert frames.shape == (4, *FRAMES)
    for video, of in zip(frames, latents, strict=True):
        alone = np.concatenate(list(wan.decode(of[None])), axis=1)
        np.testing.assert_array_equal(video, alone[0])


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt is ''; one text or a list of texts is needed"),
        ({"prompt": " \n"}, "prompt is"),
        ({"prompt": []}, "prompt is []"),
        ({"prompt": [PROMPT, ""]}, "prompt is ['A red fox.', '']"),
        ({"size": (40, 16)}, "size is (40, 16); width and height in multiples of 16 are needed"),
        ({"size": (32, 24)}, "size is (32, 24)"),
        ({"size": (0, 16)}, "size is (0, 16)"),
        ({"size": (-16, 16)}, "size is (-16, 16)"),
        ({"size": (32.0, 16)}, "size is (32.0, 16)"),
        ({"size": (32, 16, 16)}, "size is (32, 16, 16)"),
        ({"frames": 4}, "frames is 4; 4n + 1 is needed: 1, 5, ..."),
        ({"frames": 0}, "frames is 0"),
        ({"frames": -3}, "frames is -3"),
        ({"frames": 5.0}, "frames is 5.0"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 1001}, "steps=1001"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"shift": 0}, "shift=0"),
        ({"shift": -1.0}, "shift=-1.0"),
        ({"shift": math.nan}, "shift=nan"),
        ({"shift": math.inf}, "shift=inf"),
        ({"guidance": math.nan}, "guidance is nan; a finite number is needed"),
        ({"guidance": -math.inf}, "guidance is -inf"),
        ({"solver": "heun"}, "solver='heun' is unknown"),
        ({"num_videos": 0}, "num_videos is 0; an integer from 1 up"),
        ({"num_videos": -1}, "num_videos is -1"),
        ({"seed": -1}, "seed is -1; an integer from 0 to"),
        ({"seed": MAX_SEED + 1}, f"seed is {MAX_SEED + 1}"),
        ({"timesteps": []}, "steps=0"),
        ({"timesteps": [500, 500]}, "timesteps="),
        ({"timesteps": [500, 900]}, "timesteps="),
        ({"timesteps": [900, 500], "steps": 3}, "timesteps="),
    ],
)
def test_what_cannot_be_run_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_request(TINY, **({"prompt": PROMPT} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "gif"}, "output is 'gif'; one of ('frames', 'latents', 'stream') is needed"),
        ({"frames": 4}, "frames is 4"),
        ({"noise": np.zeros(LATENTS)}, f"noise has shape {LATENTS}; [b, t, h, w, c] = (1, 2, 2,"),
        ({"noise": np.zeros((2, *LATENTS))}, "noise has shape (2, 2,"),
        ({"noise": np.zeros((1, *LATENTS)), "num_videos": 2}, "= (2, 2, 2, 4, 16) is needed"),
        ({"noise": np.full((1, *LATENTS), np.nan)}, "noise holds NaN or infinite values"),
        ({"noise": np.full((1, *LATENTS), -np.inf)}, "noise holds NaN or infinite values"),
    ],
)
def test_nothing_is_computed_for_what_cannot_be_run(
    wan: Wan, arguments: dict[str, Any], message: str
) -> None:
    unable = dataclasses.replace(wan, loaders={}, _resident={})
    told: list[Progress] = []
    with pytest.raises(ValueError, match=re.escape(message)):
        unable.generate(PROMPT, callback=told.append, **arguments)
    assert not told


def test_decode_refuses_other_dtypes_at_once(wan: Wan) -> None:
    with pytest.raises(ValueError, match="dtype is 'int8'; 'uint8' or 'float32' is needed"):
        wan.decode(np.zeros((1, *LATENTS)), dtype="int8")


def test_defaults_are_the_checkpoints(wan: Wan) -> None:
    assert wan.config == TINY
    request = make_request(TINY, PROMPT)
    defaults = TINY.defaults
    assert request.prompts == (PROMPT,)
    assert request.negative == defaults.negative_prompt
    assert request.noise_shape == (1, *LATENTS)
    assert request.guidance == defaults.guidance
    assert request.num_videos == 1
    assert 0 <= request.seed < 2**63
    wanted = make_schedule("dpm++", defaults.steps, shift=defaults.shift)
    np.testing.assert_array_equal(request.schedule.table, wanted.table)


def test_arguments_take_the_place_of_defaults() -> None:
    request = make_request(
        TINY,
        PROMPTS,
        negative_prompt="",
        size=(48, 80),
        frames=9,
        steps=3,
        guidance=1,
        shift=2,
        solver="euler",
        seed=0,
        num_videos=3,
    )
    assert request.prompts == tuple(PROMPTS)
    assert request.negative == ""
    assert request.noise_shape == (6, 3, 10, 6, 16)
    assert (request.guidance, request.seed, request.num_videos) == (1.0, 0, 3)
    wanted = make_schedule("euler", 3, shift=2.0)
    np.testing.assert_array_equal(request.schedule.table, wanted.table)


def test_every_argument_reaches_the_latents(wan: Wan) -> None:
    latents = _latents(wan)
    changes: tuple[dict[str, Any], ...] = (
        {"negative_prompt": "grey"},
        {"guidance": 4.0},
        {"shift": 2.0},
        {"steps": 3},
        {"timesteps": [900, 500]},
    )
    for change in changes:
        moved = relative_l2(_latents(wan, **change), latents)
        assert moved > tolerances.PIPELINE_MATTERS, change
    # DPM++ is Euler up to three steps: its first two and its last are of first order.
    solvers = [_latents(wan, steps=5, solver=solver) for solver in ("dpm++", "euler")]
    assert relative_l2(*solvers) > tolerances.PIPELINE_MATTERS


def test_timesteps_are_the_schedule(wan: Wan) -> None:
    request = make_request(TINY, PROMPT, timesteps=[900, 500.5, 100])
    assert request.schedule.table[:, 0].tolist() == [900, 500.5, 100]
    assert request.schedule.sigmas.tolist() == pytest.approx([0.9, 0.5005, 0.1, 0])
    # At shift 1 two steps of Euler are at 1000 and 500.
    own = _latents(wan, solver="euler", shift=1.0, steps=2)
    given = _latents(wan, solver="euler", timesteps=np.array([1000.0, 500.0]))
    np.testing.assert_array_equal(given, own)


def test_guidance_of_one_encodes_and_runs_the_prompt_alone(
    wan: Wan, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, conditions = [], []
    encode, sample = wan.encode_text, sampler.sample

    def watch_encode(prompts: Any, callback: Any = None) -> Any:
        texts.append(tuple(prompts))
        return encode(prompts, callback)

    def watch_sample(dit: Any, noise: Any, schedule: Any, conds: Any, **arguments: Any) -> Any:
        conditions.append(len(conds))
        return sample(dit, noise, schedule, conds, **arguments)

    monkeypatch.setattr(wan, "encode_text", watch_encode)
    monkeypatch.setattr(sampler, "sample", watch_sample)
    single = _latents(wan, guidance=1, negative_prompt="never read")
    double = _latents(wan, guidance=1.0001)
    assert texts == [(PROMPT,), (PROMPT, TINY.defaults.negative_prompt)]
    assert conditions == [1, 2]
    assert relative_l2(single, double) < tolerances.PIPELINE_MATTERS


# Progress, stopping, and weights that leave.

RUN = [("encode", i, 2) for i in range(3)]
RUN += [("denoise", i, 2) for i in range(3)]
RUN += [("decode", i, 2) for i in range(3)]


def test_progress(wan: Wan) -> None:
    told: list[Progress] = []
    latents = []

    def callback(progress: Progress) -> None:
        told.append(progress)
        if progress.latents is not None:
            assert progress.stage == "denoise"
            latents.append(np.array(progress.latents))

    frames = wan.generate(PROMPT, seed=7, callback=callback)
    assert [(p.stage, p.done, p.total) for p in told] == RUN
    assert [p.latents is not None for p in told if p.stage == "denoise"] == [False, True, True]
    np.testing.assert_array_equal(np.concatenate(list(wan.decode(latents[-1])), axis=1), frames)


def test_what_the_callback_raises_stops_the_run(wan: Wan) -> None:
    class StopError(Exception):
        pass

    told = []

    def callback(progress: Progress) -> None:
        told.append(progress[:3])
        if progress.latents is not None:
            raise StopError

    with pytest.raises(StopError):
        wan.generate(PROMPT, seed=7, callback=callback)
    assert told[-1] == ("denoise", 1, 2)
    np.testing.assert_array_equal(_latents(wan), _latents(wan))  # and the next one runs


def test_offload_gives_the_same_video_and_drops_the_weights(
    wan: Wan, tiny_source: Path, tiny_cache: Path
) -> None:
    lean = wan_jax.load(tiny_source, dtype="float32", cache_dir=tiny_cache, offload=True)
    assert lean._resident == {}
    told, resident = [], []

    def callback(progress: Progress) -> None:
        told.append(progress[:3])
        resident.append(sorted(lean._resident))

    frames = lean.generate(PROMPT, seed=7, callback=callback)
    np.testing.assert_array_equal(frames, wan.generate(PROMPT, seed=7))
    load = [("load", 0, 1), ("load", 1, 1)]
    assert told == [*load, *RUN[:3], *load, *RUN[3:6], *load, *RUN[6:]]
    assert max(map(len, resident)) == 1
    assert lean._resident == {}
    chunks = list(lean.generate(PROMPT, seed=7, output="stream"))
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), frames)
    assert lean._resident == {}
    assert sorted(wan._resident) == sorted(NANO_T2V.dit.parts)


def test_offload_drops_the_decoder_of_a_stream_that_is_left(
    wan: Wan, tiny_source: Path, tiny_cache: Path
) -> None:
    lean = wan_jax.load(tiny_source, dtype="float32", cache_dir=tiny_cache, offload=True)
    stream = lean.decode(np.zeros((1, *LATENTS)))
    next(stream)
    stream.close()
    assert lean._resident == {}


def test_offload_reads_each_network_once_a_call(
    wan: Wan, tiny_source: Path, tiny_cache: Path
) -> None:
    lean = wan_jax.load(tiny_source, dtype="float32", cache_dir=tiny_cache, offload=True)
    told: list[Progress] = []
    lean.generate(PROMPTS, num_videos=2, seed=7, callback=told.append)
    assert sum(p[:2] == ("load", 0) for p in told) == len(NANO_T2V.dit.parts)


# Loading.


def test_float32_means_float32_everywhere(wan: Wan) -> None:
    assert wan.dtype == "float32"
    for part in NANO_T2V.dit.parts:
        dtypes = {leaf.dtype for leaf in trees.flatten(wan.network(part)).values()}
        assert dtypes == {jnp.dtype("float32")}, part


def test_bfloat16_is_the_default_and_stays_near(
    wan: Wan, tiny_source: Path, tmp_path: Path
) -> None:
    half = wan_jax.load(tiny_source, cache_dir=tmp_path)
    assert half.dtype == "bfloat16"
    moved = relative_l2(_latents(half), _latents(wan))
    assert 0 < moved <= tolerances.PIPELINE_BFLOAT16


def test_text_on_the_host_gives_the_same_latents(
    wan: Wan, tiny_source: Path, tiny_cache: Path
) -> None:
    host = wan_jax.load(
        tiny_source, dtype="float32", cache_dir=tiny_cache, text_on_cpu=True, offload=True
    )
    np.testing.assert_array_equal(_latents(host), _latents(wan))


def test_the_random_networks_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said: list[str] = []
    wan = wan_jax.load("nano-t2v", offload=True, notify=said.append)
    assert wan.config == NANO_T2V == loading.read_config("nano-t2v")
    assert loading.default_cache_dir() == tmp_path / "wan_jax"
    assert (tmp_path / "wan_jax" / miniature.name(NANO_T2V)).is_dir()
    assert "random weights" in said[0]
    again: list[str] = []
    wan_jax.load("nano-t2v", offload=True, notify=again.append)
    assert len(said) == 2
    assert again == said[:1]  # neither written nor converted a second time


@pytest.mark.parametrize("dtype", ["float16", "", None])
def test_load_refuses_other_dtypes(dtype: Any) -> None:
    with pytest.raises(ValueError, match="dtype is .*; one of .*bfloat16.*float32.* is needed"):
        wan_jax.load(dtype=dtype)


def test_latents_are_where_the_weights_are(wan: Wan) -> None:
    """Arrays committed elsewhere would compile a second program, or fail."""
    elsewhere = jax.device_put(initial_noise(7, 1, shape=LATENTS), jax.devices()[1])
    np.testing.assert_array_equal(_latents(wan, noise=elsewhere), _latents(wan))
    assert wan._put(elsewhere).devices() == {jax.devices()[0]}
