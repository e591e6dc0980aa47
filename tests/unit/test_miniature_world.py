"""The miniature world: its scenes, their pictures and captions, and the judge of both."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from wan_jax.training.miniature import captions, judge, world
from wan_jax.training.miniature.render import render
from wan_jax.training.miniature.world import Scene

SIZE = (128, 128)
_draw_clips = jax.jit(render, static_argnames=("size", "frames"))


def scenes(number: int, seed: int = 0, **how: object) -> list[Scene]:
    """Some scenes at random."""
    rng = np.random.default_rng(seed)
    return [world.draw(rng, **how) for _ in range(number)]  # type: ignore[arg-type]


def clips(drawn: Sequence[Scene]) -> np.ndarray:
    """Their clips [b, f, y, x, 3]."""
    size, frames = drawn[0].size, drawn[0].frames
    return np.asarray(_draw_clips(world.fields(drawn), size=size, frames=frames))


def held(scene: Scene) -> list[bool]:
    """Of each object whether its words are held out."""
    kind = scene.background.kind
    return [world.is_held_out(o.colour, o.shape, o.motion, kind) for o in scene.objects]


def test_draws_repeat() -> None:
    assert scenes(20, spoil=0.5) == scenes(20, spoil=0.5) != scenes(20, 1, spoil=0.5)


def test_a_tenth_of_all_combinations_is_held_out() -> None:
    combinations = itertools.product(world.COLOURS, world.SHAPES, world.MOTIONS, world.KINDS)
    assert 0.08 < np.mean([world.is_held_out(*words) for words in combinations]) < 0.12
    # The split must never change: what was trained on would be evaluated on.
    assert world.is_held_out("red", "circle", "right", "checkered")
    assert not world.is_held_out("red", "circle", "right", "plain")


def test_training_and_held_out_scenes_are_disjoint() -> None:
    assert not any(any(held(scene)) for scene in scenes(200))
    assert all(all(held(scene)) for scene in scenes(50, held_out=True))
    mixed = [any(held(scene)) for scene in scenes(200, held_out=None)]
    assert any(mixed) and not all(mixed)


def test_objects_stay_inside_and_apart() -> None:
    for scene in scenes(200):
        path, radius, _ = world.trajectories(scene.objects, scene.frames)
        extent = radius * np.array([[world.EXTENTS[o.shape]] for o in scene.objects])
        assert (path - extent[..., None] > 0).all()
        assert (path + extent[..., None] < scene.size).all()
        if len(scene.objects) == 2:
            one, other = scene.objects
            assert one.colour != other.colour and one.motion != other.motion
            distance = np.linalg.norm(path[0] - path[1], axis=-1)
            assert (distance - extent.sum(0) > 0.039 * min(scene.size)).all()


def test_draw_keeps_to_what_was_asked() -> None:
    for scene in scenes(20, count=2, size=(160, 96), frames=17, colour="lime", motion="orbit"):
        assert len(scene.objects) == 2 and scene.size == (160, 96) and scene.frames == 17
        assert (scene.objects[0].colour, scene.objects[0].motion) == ("lime", "orbit")
        assert scene.objects[1].colour in world.COLOURS
    assert not any("lime" in str(scene) for scene in scenes(200))
    assert all(scene.spoil in world.SPOILS for scene in scenes(20, spoil=1.0))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"count": 3}, "count is 3"),
        ({"frames": 32}, "frames is 32"),
        ({"size": (16, 16)}, "size is"),
        ({"colour": "beige"}, "beige"),
        ({"motion": "sideways"}, "sideways"),
    ],
)
def test_draw_refuses(wrong: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        scenes(1, **wrong)


def test_fields_refuse_a_mixture() -> None:
    with pytest.raises(ValueError, match="several sizes"):
        world.fields(scenes(1, size=(128, 128)) + scenes(1, size=(160, 96)))
    with pytest.raises(ValueError, match="empty"):
        world.fields([])


@pytest.mark.parametrize("size", world.FRAME_SIZES)
@pytest.mark.parametrize("frames", [1, 9])
def test_clips_have_shape_and_range(size: tuple[int, int], frames: int) -> None:
    made = clips(scenes(4, size=size, frames=frames, spoil=0.5))
    assert made.shape == (4, frames, size[1], size[0], 3) and made.dtype == np.float32
    assert made.min() >= -1 and made.max() <= 1 and np.isfinite(made).all()
    # Something coloured is seen in each.
    assert (np.ptp(made, axis=-1).max((1, 2, 3)) > 0.1).all()


def test_render_refuses_another_number_of_frames() -> None:
    with pytest.raises(ValueError, match="9 frames; 5"):
        render(world.fields(scenes(1, size=SIZE, frames=9)), size=SIZE, frames=5)


def test_every_shape_has_the_same_area() -> None:
    (scene,) = scenes(1, 3, count=1, size=SIZE, frames=1, motion="still")
    plain = dataclasses.replace(scene.background, kind="plain", span=0.0)
    thing = dataclasses.replace(scene.objects[0], colour="red", size="large", radius=24.0)
    each = [
        dataclasses.replace(
            scene, background=plain, objects=(dataclasses.replace(thing, shape=shape, x=64, y=64),)
        )
        for shape in world.SHAPES
    ]
    red = np.ptp(clips(each), axis=-1).sum((1, 2, 3)) / np.ptp(world.COLOURS["red"]) / 2
    np.testing.assert_allclose(red, world.AREA * 24**2, rtol=0.01)


def test_spoils_show() -> None:
    (scene,) = scenes(1, 5, count=1, size=SIZE, frames=5, motion="still")
    sharp, *spoiled = clips(
        [dataclasses.replace(scene, spoil=spoil) for spoil in (None, *world.SPOILS)]
    )
    blurry, faded, flickering = spoiled
    steepest = np.abs(np.diff(sharp, axis=2)).max()
    assert np.abs(np.diff(blurry, axis=2)).max() < 0.4 * steepest
    assert faded.std() < 0.4 * sharp.std()
    assert flickering.mean((1, 2, 3)).std() > 0.1 > 0.01 > sharp.mean((1, 2, 3)).std()


def test_captions_name_what_is_there() -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(100):
        said = captions.caption(scene, rng).lower()
        plain = captions.plain_caption(scene)
        assert plain == captions.plain_caption(scene) and plain[0].isupper() and plain[-1] == "."
        for words in (said, plain.lower()):
            for thing in scene.objects:
                assert thing.colour in words and thing.shape in words
            assert scene.background.tone in words.replace("gray", "grey")
            assert "{" not in words and "  " not in words and " ." not in words
            assert "a orange" not in words and "an red" not in words


def test_captions_differ_and_repeat() -> None:
    (scene,) = scenes(1, count=2)
    said = [captions.caption(scene, np.random.default_rng(seed)) for seed in range(60)]
    assert len(set(said)) > 40
    assert said[7] == captions.caption(scene, np.random.default_rng(7))
    assert any(s[0].islower() for s in said) and any(s[-1] != "." for s in said)


def test_each_motion_has_words_of_its_own() -> None:
    said = set()
    (scene,) = scenes(1, count=1)
    for motion in world.MOTIONS:
        thing = dataclasses.replace(scene.objects[0], motion=motion)
        said.add(captions.plain_caption(dataclasses.replace(scene, objects=(thing,))))
    assert len(said) == len(world.MOTIONS)


def test_a_spoiled_caption_says_only_what_is_wrong() -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(20, spoil=1.0):
        for said in (captions.caption(scene, rng), captions.plain_caption(scene)):
            parts = said.lower().removesuffix(".").split(", ")
            assert set(parts) <= set(captions.NEGATIVE_PROMPT.split(", "))


def test_the_corpus_has_every_word() -> None:
    said = list(captions.corpus(600, 0))
    assert len(said) == 600 and said[:5] == list(captions.corpus(5, 0))
    words = " ".join(said).lower()
    for word in (*world.PALETTE, *world.SHAPES, *captions.NEGATIVE_PROMPT.split(", ")):
        assert word in words


@pytest.mark.parametrize("size", world.FRAME_SIZES)
def test_the_judge_is_right(size: tuple[int, int]) -> None:
    drawn = scenes(8, 1, size=size, count=1) + scenes(5, 2, size=size, count=2)
    made = clips(drawn)
    for scene, clip in zip(drawn, made):
        found = judge.verdict(clip, scene)
        assert all(found.values()), (scene, found)
    as_bytes = np.uint8(np.round((made[0] + 1) * 127.5))
    assert all(judge.verdict(as_bytes, drawn[0]).values())


def test_the_judge_bears_noise() -> None:
    drawn = scenes(4, 4, size=SIZE)
    noise = np.random.default_rng(0).normal(0, 0.06, (33, 128, 128, 3)).astype(np.float32)
    for scene, clip in zip(drawn, clips(drawn)):
        assert all(judge.verdict(clip + noise, scene).values())


def _wrong(scene: Scene) -> dict[str, Scene]:
    """The scene with one claim of its first object, or of its background, made false."""
    thing, ground = scene.objects[0], scene.background
    others = {"colour": world.COLOURS, "shape": world.SHAPES, "motion": world.MOTIONS}
    others |= {"size": world.SIZES}
    found = {}
    taken = {thing.colour, *(o.colour for o in scene.objects)}
    for claim, names in others.items():
        other = next(n for n in names if n != getattr(thing, claim) and n not in taken)
        changed = dataclasses.replace(thing, **{claim: other})
        found[claim] = dataclasses.replace(scene, objects=(changed, *scene.objects[1:]))
    for part, names in (("kind", world.KINDS), ("tone", world.TONES)):
        other = next(n for n in names if n != getattr(ground, part))
        changed_ground = dataclasses.replace(ground, **{part: other})
        found["background " + part] = dataclasses.replace(scene, background=changed_ground)
    return found


@pytest.mark.parametrize("count", [1, 2])
def test_a_false_claim_is_found_false(count: int) -> None:
    drawn = scenes(6, 8, size=SIZE, count=count)
    for scene, clip in zip(drawn, clips(drawn)):
        seen = judge.measure(clip)
        for claim, false in _wrong(scene).items():
            found = judge.compare(seen, false)
            assert not found[claim.split()[0]], (claim, scene)
            if count == 1 and claim != "motion":
                assert sum(not agrees for agrees in found.values()) == 1, (claim, found)


def test_a_clip_played_backwards_moves_otherwise() -> None:
    for motion in set(world.MOTIONS) - {"still", "bounce"}:
        (scene,) = scenes(1, 9, size=SIZE, count=1, motion=motion, frames=17, held_out=None)
        found = judge.verdict(clips([scene])[0, ::-1], scene)
        assert not found["motion"] and found["shape"] and not found.get("direction", False)


def test_an_empty_clip_agrees_with_nothing_said_of_objects() -> None:
    (scene,) = scenes(1, count=1)
    found = judge.verdict(np.full((33, 128, 128, 3), 90, np.uint8), scene)
    assert not any(agrees for claim, agrees in found.items() if claim != "background")


def test_the_judge_refuses() -> None:
    with pytest.raises(ValueError, match="shape"):
        judge.measure(np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="dtype int64"):
        judge.measure(np.zeros((3, 8, 8, 3), np.int64))
    with pytest.raises(ValueError, match="beige"):
        judge.measure(np.zeros((3, 8, 8, 3), np.uint8), ("beige",))
