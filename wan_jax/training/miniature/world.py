"""A small world to make captioned clips of: coloured shapes that move on grey backgrounds.

NumPy only. `draw` chooses a scene, `fields` turns scenes into the numbers that render.render
takes, and `captions` says in words what a scene shows. Only objects are coloured, so whatever in a
frame is saturated is an object. Lengths are in pixels, x to the right and y down, from the frame's
upper left corner; the "side" is the smaller of width and height, and the time of a clip runs from 0
to 1.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
# Hues in degrees: 0, 29, 56, 125, 184, 231, 275, 323.
COLOURS = {
    "red": (0.92, 0.06, 0.06),
    "orange": (1.00, 0.50, 0.04),
    "yellow": (0.98, 0.92, 0.06),
    "green": (0.08, 0.68, 0.13),
    "cyan": (0.05, 0.85, 0.90),
    "blue": (0.10, 0.22, 0.95),
    "purple": (0.50, 0.08, 0.80),
    "pink": (1.00, 0.38, 0.76),
}
# Hue 88, in the middle of the widest gap between two of COLOURS (yellow and green), so that it can
# be told from all of them by hue. Brown, maroon or navy have the hue of a colour above, and black
# and white have none, which would make them background.
EXTRA_COLOURS = {"lime": (0.55, 1.00, 0.05)}
PALETTE = COLOURS | EXTRA_COLOURS
# radius / side; as large as leaves two of them room, as a transformer sees by 16 pixels.
SIZES = {"small": 0.12, "medium": 0.155, "large": 0.2}
KINDS = ("plain", "gradient", "checkered")
TONES = {"dark": 0.15, "grey": 0.45, "light": 0.78}  # mean brightness
# Steps on the screen, x to the right and y down.
DIRECTIONS = {
    "right": (1, 0),
    "left": (-1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up-right": (1, -1),
    "up-left": (-1, -1),
    "down-right": (1, 1),
    "down-left": (-1, 1),
}
MOTIONS = (*DIRECTIONS, "orbit", "bounce", "grow", "shrink", "still", "appear", "vanish")
SPOILS = ("blurry", "faded", "flickering")
FRAME_SIZES = ((128, 128), (160, 96), (96, 160))  # width, height
FRAMES = 33
CELLS = 8  # cells of a checkered background along the side

AREA = 2.6  # of every shape, in squares of its radius
HOLE = 0.52  # inner radius of a ring / its outer radius
NOTCH = 0.45  # inner radius of a star / its outer radius
ARM = 1 / 3  # width of a cross's arm / its length
# What each shape is drawn with, in radii, such that all have AREA: radius of a circle, half the
# edge of a square, circumradius of a triangle and of a star, outer radius of a ring, half the span
# of a cross.
SPANS = {
    "circle": math.sqrt(AREA / math.pi),
    "square": math.sqrt(AREA / 4),
    "triangle": math.sqrt(AREA / (0.75 * math.sqrt(3))),
    "star": math.sqrt(AREA / (5 * NOTCH * math.sin(math.pi / 5))),
    "ring": math.sqrt(AREA / (math.pi * (1 - HOLE**2))),
    "cross": math.sqrt(AREA / (8 * ARM - 4 * ARM**2)),
}
# Radius of the circle around each shape, in radii.
EXTENTS = SPANS | {
    "square": SPANS["square"] * math.sqrt(2),
    "cross": SPANS["cross"] * math.hypot(1, ARM),
}

_SMALLEST, _LARGEST = 0.55, 1.45  # of an object that grows or shrinks, in radii
_FADE = 0.08  # how long an object takes to appear
_MARGIN = 2.0  # pixels between an object and the frame's edge
_GAP = 0.04  # least distance of two objects / side
_CANDIDATES = 32


@dataclass(frozen=True, slots=True)
class Object:
    """One shape and its path.

    x, y: middle of its path. radius: see AREA. reach: how far it travels, the radius of its orbit
    or the height of its bounce; 0 for others. phase: where an orbit begins, in radians clockwise
    from the right, or when an object begins to appear (seen backwards: to vanish), in 0..1.
    """

    shape: str
    colour: str
    size: str
    motion: str
    x: float
    y: float
    radius: float
    reach: float
    phase: float


@dataclass(frozen=True, slots=True)
class Background:
    """Greys. level: mean brightness, 0..1. span: how much brighter the bright end or cells are.

    turn: where a gradient is brightest, 0 right, 1 bottom, 2 left, 3 top; odd for a checkered
    background whose upper left cell is dark.
    """

    kind: str
    tone: str
    level: float
    span: float
    turn: int


@dataclass(frozen=True, slots=True)
class Scene:
    """One clip. size: width and height. spoil: None or one of SPOILS; beat: phase of a flicker."""

    objects: tuple[Object, ...]
    background: Background
    size: tuple[int, int]
    frames: int
    spoil: str | None = None
    beat: float = 0.0


def is_held_out(colour: str, shape: str, motion: str, kind: str) -> bool:
    """Whether this combination, about one in ten, is kept from training; always the same ones."""
    return zlib.crc32(f"{colour} {shape} {motion} {kind}".encode()) % 10 == 0


def draw(
    rng: np.random.Generator,
    *,
    count: int | None = None,
    size: tuple[int, int] | None = None,
    frames: int = FRAMES,
    held_out: bool | None = False,
    spoil: float = 0.0,
    colour: str | None = None,
    motion: str | None = None,
) -> Scene:
    """One scene at random.

    count: of objects, 1 or 2; None is either. size: width and height; None is one of FRAME_SIZES.
    held_out: False draws no object that is_held_out, True only such ones, None any. spoil: chance
    that the clip is spoiled. colour, motion: of the first object; a colour of EXTRA_COLOURS is
    drawn only when named here.
    Two objects differ in colour and motion and are apart in every frame.
    Raises ValueError for another count, a number of frames that is not 4n + 1, a size below 32, a
    colour or a motion that is none, and a scene that cannot be drawn.
    """
    _check(count, size, frames, colour, motion)
    for _ in range(1000):
        background = _background(rng)
        shot = size or FRAME_SIZES[rng.integers(len(FRAME_SIZES))]
        number = count or 1 + int(rng.random() < 0.4)
        words = [_words(rng, background.kind, held_out, colour, motion)]
        if number == 2:
            words.append(_words(rng, background.kind, held_out, None, None))
            (one, _, moves), (other, _, moves_too) = words
            if one == other or moves == moves_too:
                continue
        objects = _place(rng, words, shot, frames)
        if objects is not None:
            spoiled = SPOILS[rng.integers(len(SPOILS))] if rng.random() < spoil else None
            return Scene(objects, background, shot, frames, spoiled, float(rng.random()))
    raise ValueError(f"no scene of count {count}, size {size}, colour {colour}, motion {motion}")


def fields(scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """What render.render takes, of scenes of one size and number of frames.

    float32 but for shape and kind (int32, into SHAPES and KINDS; -1 for no object). b: scenes, o: 2
    objects, f: frames. position [b, o, f, 2] (x, y), radius, opacity [b, o, f], shape [b, o], rgb
    [b, o, 3] in 0..1; kind, level, span [b], slope [b, 2] (unit step to a gradient's bright end),
    parity [b] (1, or -1 where the upper left cell is dark); blur [b] (sigma, pixels; 0 is none),
    cell [b] (side of a checker, pixels); contrast [b] (1 is unchanged), brightness [b, f] (added).
    Raises ValueError for no scenes, and for scenes of several sizes or numbers of frames.
    """
    if len({(scene.size, scene.frames) for scene in scenes}) != 1:
        raise ValueError("scenes is empty or of several sizes or numbers of frames; one is needed")
    size, frames = scenes[0].size, scenes[0].frames
    batch = len(scenes)
    rows = [(b, o) for b, scene in enumerate(scenes) for o in range(len(scene.objects))]
    things = [thing for scene in scenes for thing in scene.objects]
    at = tuple(np.array(rows).T)
    made = {
        "position": np.zeros((batch, 2, frames, 2), np.float32),
        "radius": np.ones((batch, 2, frames), np.float32),
        "opacity": np.zeros((batch, 2, frames), np.float32),
        "shape": np.full((batch, 2), -1, np.int32),
        "rgb": np.zeros((batch, 2, 3), np.float32),
    }
    path, radius, opacity = trajectories(things, frames)
    made["position"][at], made["radius"][at], made["opacity"][at] = path, radius, opacity
    made["shape"][at] = [SHAPES.index(thing.shape) for thing in things]
    made["rgb"][at] = [PALETTE[thing.colour] for thing in things]
    grounds = [scene.background for scene in scenes]
    turn = np.array([ground.turn for ground in grounds])
    spoil = np.array([scene.spoil or "" for scene in scenes])
    beat = np.array([scene.beat for scene in scenes], np.float32)
    # Steps of the golden ratio look irregular, and no two frames in a row are alike.
    wave = np.sin(2 * np.pi * (beat[:, None] + 0.381966 * np.arange(frames)))
    steps = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)], np.float32)
    return made | {
        "kind": np.array([KINDS.index(ground.kind) for ground in grounds], np.int32),
        "level": np.array([ground.level for ground in grounds], np.float32),
        "span": np.array([ground.span for ground in grounds], np.float32),
        "slope": steps[turn % 4],
        "parity": np.where(turn % 2, -1, 1).astype(np.float32),
        "cell": np.full(batch, min(size) / CELLS, np.float32),
        "blur": np.where(spoil == "blurry", 0.035 * min(size), 0).astype(np.float32),
        "contrast": np.where(spoil == "faded", 0.3, 1).astype(np.float32),
        "brightness": (wave * 0.25 * (spoil == "flickering")[:, None]).astype(np.float32),
    }


def trajectories(
    objects: Sequence[Object], frames: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions (x, y) [n, frames, 2], radii [n, frames] and opacities [n, frames] of n objects."""
    numbers = np.array([(o.x, o.y, o.radius, o.reach, o.phase) for o in objects], np.float32)
    return _paths([o.motion for o in objects], numbers, frames)


def _paths(
    motions: Sequence[str], numbers: np.ndarray, frames: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As trajectories. numbers: float32 [n, 5]: x, y, radius, reach, phase."""
    table = _TABLE[[_ROW[motion] for motion in motions]]
    middle, (radius, reach, phase) = numbers[:, None, :2], numbers[:, 2:].T[:, :, None]
    # A single frame shows the middle of the clip, where nothing is absent.
    time = np.linspace(0, 1, frames, dtype=np.float32) if frames > 1 else np.full(1, 0.5, "f4")
    angle = 2 * np.pi * time + phase
    circle = np.stack([np.cos(angle), np.sin(angle)], -1) * table[:, 2, None, None]
    line = table[:, None, :2] * (time - 0.5)[:, None]
    path = line + circle
    path[..., 1] += table[:, 3, None] * (0.5 - np.abs(np.sin(2 * np.pi * time)))
    scale = 1 + table[:, 4, None] * (time - 0.5)
    way = table[:, 5, None]
    shown = np.clip((0.5 + way * (time - 0.5) - phase) / _FADE, 0, 1)
    return middle + reach[..., None] * path, radius * scale, np.where(way == 0, 1, shown)


def _table() -> np.ndarray:
    """A row for each of MOTIONS: step (x, y), circles, bounces, growth, way of time of a fade."""
    rows = np.zeros((len(MOTIONS), 6), np.float32)
    for row, motion in zip(rows, MOTIONS):
        if motion in DIRECTIONS:
            row[:2] = np.array(DIRECTIONS[motion]) / math.hypot(*DIRECTIONS[motion])
        growth = {"grow": _LARGEST - _SMALLEST, "shrink": _SMALLEST - _LARGEST}
        way = {"appear": 1, "vanish": -1}
        row[2:] = motion == "orbit", motion == "bounce", growth.get(motion, 0), way.get(motion, 0)
    return rows


_TABLE = _table()
_ROW = {motion: row for row, motion in enumerate(MOTIONS)}


def _words(
    rng: np.random.Generator,
    kind: str,
    held_out: bool | None,
    colour: str | None,
    motion: str | None,
) -> tuple[str, str, str]:
    """Colour, shape and motion of an object on a background of this kind."""
    colours = (colour,) if colour else tuple(COLOURS)
    motions = (motion,) if motion else MOTIONS
    for _ in range(1000):
        c, s, m = rng.integers((len(colours), len(SHAPES), len(motions)))
        words = colours[c], SHAPES[s], motions[m]
        if held_out is None or is_held_out(*words, kind) == held_out:
            return words
    raise ValueError(f"no object with colour {colour}, motion {motion}, held_out {held_out}")


def _background(rng: np.random.Generator) -> Background:
    """A background at random."""
    k, t, turn = rng.integers((len(KINDS), len(TONES), 4))
    tone = tuple(TONES)[t]
    shift, stretch = rng.uniform(-1, 1, 2)
    span = {"plain": 0.0, "gradient": 0.29 + 0.02 * stretch, "checkered": 0.14 + 0.02 * stretch}
    kind = KINDS[k]
    # A gradient's ends stay within 0..1.
    level = TONES[tone] + (0.005 if kind == "gradient" else 0.03) * shift
    return Background(kind, tone, float(level), float(span[kind]), int(turn))


def _place(
    rng: np.random.Generator,
    words: Sequence[tuple[str, str, str]],
    size: tuple[int, int],
    frames: int,
) -> tuple[Object, ...] | None:
    """The objects, whole inside the frame and apart, or None where that was not found."""
    side, two = min(size), len(words) == 2
    names = [tuple(SIZES)[rng.integers(2 if two else 3)] for _ in words]
    motions = [motion for _, _, motion in words]
    numbers = np.zeros((len(words), 5), np.float32)
    for row, name, motion in zip(numbers, names, motions):
        u, v, w = rng.random(3)
        row[2] = side * SIZES[name] * (0.97 + 0.06 * u)
        row[3] = side * _reach(motion, two, v)
        row[4] = 2 * np.pi * w if motion == "orbit" else 0.3 + 0.12 * w
    path, radius, _ = _paths(motions, numbers, frames)
    extent = radius * np.array([[EXTENTS[shape]] for _, shape, _ in words], np.float32)
    # Where the middle of each path may lie.
    low = (extent[..., None] - path).max(1) + _MARGIN
    high = (np.array(size, np.float32) - extent[..., None] - path).min(1) - _MARGIN
    if (low > high).any():
        return None
    if two:
        middles = low + (high - low) * rng.random((_CANDIDATES, 2, 2), np.float32)
        apart = (middles[:, 0] - middles[:, 1])[:, None] + (path[0] - path[1])
        clear = (np.hypot(apart[..., 0], apart[..., 1]) - extent.sum(0)).min(1)
        best = int(clear.argmax())
        if clear[best] < _GAP * side:
            return None
        middle = middles[best]
    else:
        centre = np.array(size) / 2
        jitter = 0.2 * np.array(size) * rng.uniform(-1, 1, 2)
        middle = np.clip(centre + jitter, low, high)
    numbers[:, :2] = middle
    return tuple(
        Object(shape, colour, name, motion, *row)
        for (colour, shape, motion), name, row in zip(words, names, numbers.tolist())
    )


def _reach(motion: str, two: bool, chance: float) -> float:
    """How far an object moves, in sides: less where another moves too."""
    if motion in DIRECTIONS:
        return (0.26 if two else 0.31) + 0.06 * chance
    if motion == "orbit":
        return (0.13 if two else 0.17) + 0.02 * chance
    return 0.28 + 0.06 * chance if motion == "bounce" else 0.0


def _check(
    count: int | None,
    size: tuple[int, int] | None,
    frames: int,
    colour: str | None,
    motion: str | None,
) -> None:
    """ValueError for what draw does not take."""
    if count not in (None, 1, 2):
        raise ValueError(f"count is {count}; 1, 2 or None is needed")
    if size is not None and min(size) < 32:
        raise ValueError(f"size is {size}; 32 or more is needed either way")
    if frames < 1 or frames % 4 != 1:
        raise ValueError(f"frames is {frames}; 4n + 1 is needed: 1, 5, ...")
    if colour is not None and colour not in PALETTE:
        raise ValueError(f"colour is {colour!r}; one of {', '.join(PALETTE)} is needed")
    if motion is not None and motion not in MOTIONS:
        raise ValueError(f"motion is {motion!r}; one of {', '.join(MOTIONS)} is needed")
