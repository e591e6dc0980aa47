"""Measures from a clip's pixels alone what it shows, to compare with what a caption asks for.

NumPy only. Knows what the words of `world` mean, and nothing of how or by what a clip was made. A
pixel is an object's by its saturation, and one object's by its hue; shape, size, motion and the
background follow from there. A colour is one object: two of a colour count as one, whose shape and
motion then fit nothing.
"""

import functools
import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from wan_jax.training.miniature import world
from wan_jax.training.miniature.world import Scene

_SATURATED = 0.2  # largest less smallest of r, g, b, from which a pixel may be an object's
_CANVAS = 48  # pixels either way that shapes are compared in
_REACH = 1.0  # half the canvas, in roots of a shape's area
_BLURS = (0.03, 0.1, 0.2, 0.3)  # of objects that shapes are compared with, sigma in radii
_FADED = 0.3  # of the usual opacity, below which an object is absent


@dataclass(frozen=True)
class Track:
    """One object through the clip.

    centre: [f, 2] (x, y) in pixels, NaN where absent. area: [f] in pixels, as if opaque. present:
    [f]. shape, size, motion: the names that fit best, motion "other" where none does; heading: net
    displacement (x, y) in sides.
    """

    colour: str
    shape: str
    size: str
    motion: str
    heading: tuple[float, float]
    centre: np.ndarray
    area: np.ndarray
    present: np.ndarray


@dataclass(frozen=True)
class Measurement:
    """tracks: by area, the largest first. kind, tone: of the background."""

    tracks: tuple[Track, ...]
    kind: str
    tone: str


def measure(frames: np.ndarray, colours: Collection[str] = tuple(world.PALETTE)) -> Measurement:
    """What a clip [f, y, x, 3] shows: uint8, or floats in -1..1 (what lies beyond is clipped).

    colours: those an object may have; each pixel is given to the nearest of them by hue.
    Raises ValueError for another shape or dtype and for colours that are none or unknown.
    """
    rgb = _unit(frames)
    unknown = set(colours) - set(world.PALETTE)
    if unknown or not colours:
        raise ValueError(f"colours are {sorted(colours)}; some of {list(world.PALETTE)} are needed")
    names = tuple(colours)
    values = np.array([world.PALETTE[name] for name in names], np.float32)
    hue, chroma = _hue(rgb)
    own, full = _hue(values)
    away = np.abs((hue[..., None] - own + 180) % 360 - 180)
    nearest = np.where(chroma > _SATURATED, away.argmin(-1), -1)
    side = min(rgb.shape[1:3])
    # Half of what the smallest object covers, present in a fifth of the frames.
    least = 0.5 * world.AREA * (world.SIZES["small"] * side) ** 2 * 0.2 * len(rgb)
    totals = {c: float((nearest == c).sum()) for c in range(len(names))}
    found = sorted((c for c in totals if totals[c] > least), key=lambda c: -totals[c])
    # Fringes of an object may be taken for a neighbouring hue; an object is more than that.
    found = [c for c in found if totals[c] > 0.08 * totals[found[0]]][:4]
    tracks = tuple(
        _track(names[c], np.where(nearest == c, np.minimum(chroma / full[c], 1), 0), side)
        for c in found
    )
    return Measurement(tracks, *_background(rgb, chroma))


def verdict(frames: np.ndarray, scene: Scene) -> dict[str, bool]:
    """For each claim of the scene whether the clip (see measure) agrees; see compare."""
    return compare(measure(frames), scene)


def compare(seen: Measurement, scene: Scene) -> dict[str, bool]:
    """For each claim of the scene whether what was measured agrees.

    count (of objects), colour, shape, size, motion (of all objects), background (kind and tone),
    and, where an object moves straight, direction: that it ends within 45 degrees of that from
    where it began. An object is found by its colour; where a single one has another colour, only
    the colour is wrong.
    """
    pairs = []
    for thing in scene.objects:
        named = [track for track in seen.tracks if track.colour == thing.colour]
        if not named and len(scene.objects) == 1:
            named = list(seen.tracks[:1])
        pairs.append((thing, named[0] if named else None))
    found = {
        "count": len(seen.tracks) == len(scene.objects),
        "background": (seen.kind, seen.tone) == (scene.background.kind, scene.background.tone),
    }
    for claim in ("colour", "shape", "size", "motion"):
        found[claim] = all(
            track is not None and getattr(track, claim) == getattr(thing, claim)
            for thing, track in pairs
        )
    straight = [(thing, track) for thing, track in pairs if thing.motion in world.DIRECTIONS]
    if straight:
        found["direction"] = all(
            track is not None and _along(track.heading, thing.motion) for thing, track in straight
        )
    return found


def _unit(frames: np.ndarray) -> np.ndarray:
    """The clip as float32 in 0..1."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"frames have shape {frames.shape}; [f, y, x, 3] is needed")
    if frames.dtype == np.uint8:
        return frames.astype(np.float32) / 255
    if not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"frames have dtype {frames.dtype}; uint8 or floats are needed")
    return np.clip(frames.astype(np.float32) / 2 + 0.5, 0, 1)


def _hue(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hue in degrees and chroma (largest less smallest) of [..., 3]; both [...]."""
    r, g, b = np.moveaxis(rgb, -1, 0)
    top = np.maximum(np.maximum(r, g), b)
    chroma = top - np.minimum(np.minimum(r, g), b)
    scale = np.maximum(chroma, 1e-6)
    hue = np.where(top == g, 2 + (b - r) / scale, 4 + (r - g) / scale)
    hue = np.where(top == r, (g - b) / scale, hue)
    return 60 * hue % 360, chroma


def _track(colour: str, opacity: np.ndarray, side: int) -> Track:
    """The object of this opacity [f, y, x]; side: of the frame, in pixels."""
    mass = opacity.sum((1, 2))
    # An object's own opacity, apart from its edges, is what its most opaque pixels show.
    flat = np.sort(opacity.reshape(len(opacity), -1), -1)
    count = np.maximum((opacity > 0).sum((1, 2)), 1)
    top = flat[np.arange(len(flat)), -np.maximum(count // 4, 1)]
    present = (top > _FADED) & (mass > max(10.0, 0.03 * mass.max()))
    ys, xs = np.mgrid[: opacity.shape[1], : opacity.shape[2]] + 0.5
    safe = np.maximum(mass, 1e-6)
    centre = np.stack([(opacity * xs).sum((1, 2)), (opacity * ys).sum((1, 2))], -1) / safe[:, None]
    centre[~present] = np.nan
    area = mass / np.maximum(top, 1e-6)
    motion, heading = _motion(centre / side, np.where(present, area, 0), present)
    chosen = _best_frames(mass, present)
    shape = _shape(opacity[chosen], centre[chosen]) if len(chosen) else "none"
    return Track(
        colour, shape, _size(area, present, motion, side), motion, heading, centre, area, present
    )


def _motion(
    centre: np.ndarray, area: np.ndarray, present: np.ndarray
) -> tuple[str, tuple[float, float]]:
    """The motion that fits and the net displacement; centre in sides, see Track."""
    ends = max(1, len(present) // 8)
    seen = np.flatnonzero(present)
    if not len(seen):
        return "other", (0.0, 0.0)
    path, areas = centre[seen], area[seen]
    edge = min(max(1, len(seen) // 12), len(seen))
    net = path[-edge:].mean(0) - path[:edge].mean(0)
    heading = (float(net[0]), float(net[1]))
    first, last = present[:ends].mean() > 0.5, present[-ends:].mean() > 0.5
    extent = path.max(0) - path.min(0)
    if first != last:
        return ("appear" if last else "vanish") if extent.max() < 0.15 else "other", heading
    if len(seen) < 0.8 * len(present):
        return "other", heading
    growth = math.sqrt(areas[-edge:].mean() / areas[:edge].mean())
    if not 1 / 1.5 < growth < 1.5:
        return ("grow" if growth > 1 else "shrink") if extent.max() < 0.15 else "other", heading
    return _moving(path, net, extent), heading


def _moving(path: np.ndarray, net: np.ndarray, extent: np.ndarray) -> str:
    """The motion of an object that is there and of one size: path [n, 2] in sides."""
    distance = math.hypot(*net)
    if extent.max() < 0.08:
        return "still"
    if distance > 0.15:
        # Straight: no point is far from the line from beginning to end.
        off = (path - path[0]) @ np.array([-net[1], net[0]]) / distance
        if np.abs(off).max() > 0.35 * distance or math.hypot(*extent) > 1.4 * distance:
            return "other"
        return max(world.DIRECTIONS, key=lambda name: _cosine(net, name))
    spokes = path - (path.max(0) + path.min(0)) / 2
    length = np.hypot(*spokes.T)
    turns = np.unwrap(np.arctan2(spokes[:, 1], spokes[:, 0]))
    turned = (turns[-1] - turns[0]) / (2 * math.pi)
    if extent.min() > 0.5 * extent.max() and length.min() > 0.4 * length.max():
        # Angles grow clockwise, as y points down.
        return "orbit" if 0.7 < turned < 1.4 else "other"
    wave = -np.abs(np.sin(2 * np.pi * np.linspace(0, 1, len(path))))
    y = path[:, 1] - path[:, 1].mean()
    wave -= wave.mean()
    alike = y @ wave / max(float(np.linalg.norm(y) * np.linalg.norm(wave)), 1e-9)
    return "bounce" if extent[0] < 0.4 * extent[1] and alike > 0.7 else "other"


def _cosine(heading: np.ndarray | tuple[float, float], motion: str) -> float:
    """Of the angle between the heading and that of the motion, one of world.DIRECTIONS."""
    step = world.DIRECTIONS[motion]
    return float(np.dot(heading, step)) / max(math.hypot(*heading) * math.hypot(*step), 1e-9)


def _along(heading: tuple[float, float], motion: str) -> bool:
    """Whether the object went farther than it would by chance, and within 45 degrees."""
    return math.hypot(*heading) > 0.1 and _cosine(heading, motion) > math.cos(math.pi / 4)


def _size(area: np.ndarray, present: np.ndarray, motion: str, side: int) -> str:
    """The nearest size; of an object that grows or shrinks, by the middle of the clip."""
    seen = area[present]
    if not len(seen):
        return "none"
    if motion in ("grow", "shrink"):
        seen = seen[len(seen) // 3 : -(len(seen) // 3) or None]
    radius = math.sqrt(float(np.median(seen)) / world.AREA) / side
    return min(world.SIZES, key=lambda name: abs(math.log(radius / world.SIZES[name])))


def _best_frames(mass: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Up to seven frames, spread over the clip, in which the object is large and opaque."""
    good = np.flatnonzero(present & (mass > 0.8 * mass.max()))
    return good[np.linspace(0, len(good) - 1, min(7, len(good))).round().astype(int)]


def _shape(opacity: np.ndarray, centre: np.ndarray) -> str:
    """The shape whose picture covers the object's best: [n, y, x], [n, 2]."""
    mean = np.mean([_picture(*pair) for pair in zip(opacity, centre)], 0)
    overlap = {
        (name, blur): np.minimum(mean, ideal).sum() / np.maximum(mean, ideal).sum()
        for (name, blur), ideal in _templates().items()
    }
    return max(overlap, key=lambda key: overlap[key])[0]


def _picture(opacity: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """An object of opacity [y, x] on the canvas: made opaque, in the middle, of area 1."""
    solid = np.minimum(opacity / max(float(np.quantile(opacity[opacity > 0], 0.75)), 1e-6), 1)
    return _sample(solid, _canvas() * math.sqrt(solid.sum()) + centre - 0.5)


def _canvas() -> np.ndarray:
    """Points (x, y) of the canvas, in roots of a shape's area: [_CANVAS, _CANVAS, 2]."""
    line = ((np.arange(_CANVAS) + 0.5) / _CANVAS * 2 - 1) * _REACH
    return np.stack(np.meshgrid(line, line), -1)


def _sample(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The image [y, x] at points [..., 2] (x, y), between pixels bilinearly; 0 outside."""
    padded = np.pad(image, 1)
    limit = np.array(image.shape[::-1])
    points = np.clip(points + 1, 0, limit + 0.999)
    low = points.astype(int)
    u, v = np.moveaxis(points - low, -1, 0)
    x, y = np.moveaxis(low, -1, 0)
    upper = padded[y, x] * (1 - u) + padded[y, x + 1] * u
    lower = padded[y + 1, x] * (1 - u) + padded[y + 1, x + 1] * u
    return upper * (1 - v) + lower * v


@functools.cache
def _templates() -> dict[tuple[str, float], np.ndarray]:
    """Every shape on the canvas, sharp and blurred: by name and sigma in radii."""
    length, radius, found = 128, 28, {}
    line = (np.arange(length) + 0.5 - length / 2) / radius
    x, y = np.meshgrid(line, line)
    for name in world.SHAPES:
        for sigma in _BLURS:
            blur = np.exp(-0.5 * ((line[:, None] - line) / sigma) ** 2)
            blur /= blur.sum(-1, keepdims=True)
            image = blur @ _inside(name, x, y) @ blur.T
            image[image < _SATURATED / 0.8] = 0
            centre = np.array([(image * x).sum(), (image * y).sum()]) / image.sum()
            found[name, sigma] = _picture(image, centre * radius + length / 2)
    return found


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where points, in the shape's radii from its middle, are inside it."""
    span = world.SPANS[shape]
    x, y = x / span, y / span
    far = np.hypot(x, y)
    if shape == "circle":
        return far < 1
    if shape == "ring":
        return (far < 1) & (far > world.HOLE)
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) < 1
    if shape == "cross":
        wide, narrow = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return (wide < 1) & (narrow < world.ARM)
    tips, notch = (3, 0.5) if shape == "triangle" else (5, world.NOTCH)
    # Straight lines from each tip to the notches beside it.
    turn = np.abs((np.arctan2(x, -y) + math.pi / tips) % (2 * math.pi / tips) - math.pi / tips)
    low = math.pi / tips
    return far * (np.sin(turn) + notch * np.sin(low - turn)) < notch * math.sin(low)


def _background(rgb: np.ndarray, chroma: np.ndarray) -> tuple[str, str]:
    """Kind and tone of what is not coloured, from its mean over time."""
    free = chroma < 0.15
    for axis in (1, 2):
        # Not the edges of objects either.
        free = free & np.roll(free, 3, axis) & np.roll(free, -3, axis)
    weight = free.sum(0)
    valid = weight > 0.2 * len(rgb)
    if valid.mean() < 0.2:
        return "none", "none"
    mean = (rgb.mean(-1) * free).sum(0)[valid] / weight[valid]
    height, width = valid.shape
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    design = np.stack([np.ones(mean.shape), x[valid] / width - 0.5, y[valid] / height - 0.5], -1)
    plane = np.linalg.lstsq(design, mean.astype(float), rcond=None)[0]
    cell = min(width, height) / world.CELLS
    checkers = np.where((x // cell + y // cell) % 2, -1.0, 1.0)[valid]
    contrast = abs(2 * float((mean - design @ plane) @ checkers) / len(mean))
    tilt = float(np.abs(plane[1:]).max())
    kind = "checkered" if contrast > 0.05 else "gradient" if tilt > 0.15 else "plain"
    return kind, min(world.TONES, key=lambda name: abs(world.TONES[name] - plane[0]))
