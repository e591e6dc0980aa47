"""Says in words what a scene shows: in many ways to train on, in one to evaluate with."""

from collections.abc import Iterator
from typing import TypeVar

import numpy as np

from wan_jax.training.miniature import world
from wan_jax.training.miniature.world import Background, Object, Scene

T = TypeVar("T")


def _ways(verbs: str, *ends: str) -> tuple[tuple[str, str, str], ...]:
    """Every verb with every end: its two forms ("moves/moving"), and the end."""
    pairs = [verb.split("/") for verb in verbs.split()]
    return tuple((says, doing, end) for says, doing in pairs for end in ends)


_GOES = "moves/moving slides/sliding drifts/drifting glides/gliding"
# The first of each is the plain one.
_MOTIONS = {
    "right": _ways(_GOES, "to the right", "right", "rightwards", "from left to right"),
    "left": _ways(_GOES, "to the left", "left", "leftwards", "from right to left"),
    "up": _ways(_GOES, "up", "upwards", "straight up") + _ways("rises/rising", ""),
    "down": _ways(_GOES, "down", "downwards", "straight down") + _ways("sinks/sinking", ""),
    "up-right": _ways(_GOES, "up and to the right", "to the upper right", "diagonally up right"),
    "up-left": _ways(_GOES, "up and to the left", "to the upper left", "diagonally up left"),
    "down-right": _ways(
        _GOES, "down and to the right", "to the lower right", "diagonally down right"
    ),
    "down-left": _ways(_GOES, "down and to the left", "to the lower left", "diagonally down left"),
    "orbit": _ways("moves/moving", "in a circle", "clockwise in a circle")
    + _ways("circles/circling", "around", "clockwise")
    + _ways("orbits/orbiting", "clockwise"),
    "bounce": _ways("bounces/bouncing", "up and down", "") + _ways("hops/hopping", "up and down"),
    "grow": _ways("grows/growing", "", "larger", "bigger") + _ways("gets/getting", "bigger"),
    "shrink": _ways("shrinks/shrinking", "") + _ways("gets/getting", "smaller"),
    "still": _ways("stays/staying", "still", "in place")
    + _ways("rests/resting", "")
    + _ways("remains/remaining", "motionless"),
    "appear": _ways("appears/appearing", "", "after a while")
    + _ways("fades/fading", "in")
    + _ways("emerges/emerging", ""),
    "vanish": _ways("disappears/disappearing", "", "after a while")
    + _ways("vanishes/vanishing", "")
    + _ways("fades/fading", "out", "away"),
}
_SIZES = {
    "small": ("small", "small", "little"),
    "medium": ("", "", "medium", "medium-sized"),
    "large": ("large", "large", "big"),
}
_KINDS = {
    "plain": ("plain {tone} {ground}", "solid {tone} {ground}", "{tone} {ground}"),
    "gradient": (
        "{tone} gradient {ground}",
        "{tone} {ground} with a gradient",
        "smoothly shaded {tone} {ground}",
    ),
    "checkered": (
        "{tone} checkered {ground}",
        "{tone} checkerboard {ground}",
        "checkered {tone} {ground}",
        "{tone} {ground} with a checkerboard pattern",
    ),
}
_TONES = {
    "dark": ("dark", "dark", "dark grey", "dark gray"),
    "grey": ("grey", "grey", "gray", "medium grey"),
    "light": ("light", "light", "light grey", "light gray"),
}
_SPOILS = {
    "blurry": ("blurry", "out of focus"),
    "faded": ("faded", "washed out"),
    "flickering": ("flickering", "unsteady brightness"),
}
NEGATIVE_PROMPT = ", ".join(word for words in _SPOILS.values() for word in words)

# {a}: the object, {does}, {doing}: its motion, {on}: the background. The first is the plain one.
_ONE = (
    "{a} {does} {on}.",
    "{a} {doing} {on}.",
    "{a} {does} {on}.",
    "{On}, {a} {does}.",
    "{On}, there is {a} that {does}.",
    "there is {a} {on}. It {does}.",
    "{ground} with {a} {doing}.",
    "{ground}. {A} {does}.",
    "a video of {a} {doing} {on}.",
    "{a} that {does}, {on}.",
)
_TWO = (
    "{a} {does} and {b} {does_too} {on}.",
    "{a} {does} while {b} {does_too}, {on}.",
    "{On}, {a} {does} and {b} {does_too}.",
    "{On}, {a} {does} while {b} {does_too}.",
    "{a} {doing} and {b} {doing_too} {on}.",
    "{a} {does} {on}. {B} {does_too}.",
    "there are two objects {on}: {a} that {does} and {b} that {does_too}.",
    "{ground} with {a} {doing} and {b} {doing_too}.",
    "{ground}. {A} {does}, and {b} {does_too}.",
    "a video of {a} {doing} and {b} {doing_too} {on}.",
)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of many sentences for the scene; of a spoiled one only what is wrong with it."""
    if scene.spoil is not None:
        words = list(_SPOILS[scene.spoil])
        rng.shuffle(words)
        return _finish(", ".join(words[: rng.integers(1, 3)]) + ".", rng)
    forms = _TWO if len(scene.objects) == 2 else _ONE
    objects = list(scene.objects)
    rng.shuffle(objects)
    return _finish(_fill(_pick(forms, rng), objects, scene.background, rng), rng)


def plain_caption(scene: Scene) -> str:
    """The one sentence, always the same; of a spoiled scene what is wrong with it."""
    if scene.spoil is not None:
        return _capital(_SPOILS[scene.spoil][0]) + "."
    forms = _TWO if len(scene.objects) == 2 else _ONE
    return _capital(_fill(forms[0], list(scene.objects), scene.background, None))


def corpus(n: int, seed: int) -> Iterator[str]:
    """n captions to train a tokenizer on: of all words, those of spoils and extra colours too."""
    rng = np.random.default_rng(seed)
    extra = tuple(world.EXTRA_COLOURS)
    for _ in range(n):
        colour = extra[rng.integers(len(extra))] if rng.random() < 0.05 else None
        yield caption(world.draw(rng, spoil=0.05, colour=colour), rng)


def _pick(options: tuple[T, ...], rng: np.random.Generator | None) -> T:
    """One of the options; the first without rng."""
    return options[0] if rng is None else options[rng.integers(len(options))]


def _fill(
    form: str, objects: list[Object], background: Background, rng: np.random.Generator | None
) -> str:
    """The sentence with its names replaced."""
    ground = _pick(_KINDS[background.kind], rng).format(
        tone=_pick(_TONES[background.tone], rng), ground=_pick(("background", "backdrop"), rng)
    )
    ground = _article(ground)
    on = f"{_pick(('on', 'on', 'against'), rng)} {ground}"
    words = {"ground": ground, "on": on, "On": on}
    for thing, name, suffix in zip(objects, ("a", "b"), ("", "_too")):
        size = _pick(_SIZES[thing.size], rng)
        said = _article(" ".join(filter(None, (size, thing.colour, thing.shape))))
        says, doing, end = _pick(_MOTIONS[thing.motion], rng)
        words |= {name: said, name.upper(): _capital(said)}
        words |= {"does" + suffix: f"{says} {end}".strip()}
        words |= {"doing" + suffix: f"{doing} {end}".strip()}
    return form.format(**words)


def _article(words: str) -> str:
    """ "orange ring" -> "an orange ring"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def _capital(words: str) -> str:
    """The first letter as a capital."""
    return words[0].upper() + words[1:]


def _finish(sentence: str, rng: np.random.Generator) -> str:
    """Mostly in sentence case and with its full stop; people write prompts without them too."""
    sentence = _capital(sentence) if rng.random() < 0.8 else sentence.lower()
    return sentence if rng.random() < 0.85 else sentence.removesuffix(".")
