"""Whether the miniature shows what it is told: clips of captions it never saw, before the judge."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wan_jax import xla
from wan_jax.config import KINDS, WanConfig
from wan_jax.pipeline import Wan
from wan_jax.tokenizer import load_tokenizer
from wan_jax.training.miniature import captions, files, judge, networks, transformer, world
from wan_jax.training.miniature.render import render
from wan_jax.training.miniature.world import Scene

_SEED = 2_000_000
_TOGETHER = 20  # clips that are made at once
_SIZES = (*world.FRAME_SIZES[:1] * 2, *world.FRAME_SIZES[1:])
Notify = Callable[[str], None]


def from_stages(out: Path, kind: str, *, dtype: str = "bfloat16") -> Wan:
    """The pipeline of what the stages have written so far. kind: of networks.DITS."""
    found = {part: files.network(out, name) for part, name in files.parts(kind).items()}
    config = WanConfig(**{part: c for part, (_, c) in found.items()}, defaults=networks.DEFAULTS)
    loaders: dict[str, Callable[[], Any]] = {
        part: functools.partial(transformer.network, c, arrays, dtype)
        for part, (arrays, c) in found.items()
    }
    return Wan(config, load_tokenizer(files.tokenizer(out)), loaders, dtype=dtype)


def scores(wan: Wan, *, clips: int, pairs: int, notify: Notify = lambda _: None) -> dict[str, Any]:
    """Shares of clips that are right, by attribute, and PSNRs in dB.

    clips: captions of one object, or of images; pairs: captions of two, for text to video.
    """
    kind = KINDS[wan.config.images]
    if wan.config.images:
        return _of_images(wan, held_out(clips, 1), notify)
    found = {"clips": clips, **judged(wan, held_out(clips, 1), notify)}
    if pairs:
        two = judged(wan, held_out(pairs, 2), notify)
        found |= {"pairs": pairs, **{f"pairs {name}": share for name, share in two.items()}}
    return {"kind": kind} | found


def held_out(count: int, objects: int) -> list[Scene]:
    """Scenes of combinations that are never trained on, of all sizes."""
    rng = np.random.default_rng((_SEED, objects))
    return [
        world.draw(
            rng,
            count=objects,
            size=_SIZES[i % len(_SIZES)],
            frames=world.FRAMES,
            held_out=True,
        )
        for i in range(count)
    ]


def judged(wan: Wan, scenes: Sequence[Scene], notify: Notify = lambda _: None) -> dict[str, float]:
    """Shares of what the judge finds right in clips of the scenes' captions."""
    rng = np.random.default_rng(_SEED)
    verdicts: list[dict[str, bool]] = []
    for size, group in _by_size(scenes):
        texts = [captions.caption(scene, rng) for scene in group]
        video = wan.generate(texts, size=size, seed=len(verdicts))
        verdicts += [judge.verdict(clip, s) for clip, s in zip(video, group, strict=True)]
        notify(f"{len(verdicts)} of {len(scenes)} clips: {_shares(verdicts)}")
    found = _shares(verdicts)
    found["colour and motion"] = _share([v["colour"] and v["motion"] for v in verdicts])
    return found


def _of_images(wan: Wan, scenes: Sequence[Scene], notify: Notify) -> dict[str, Any]:
    """The same for clips of first, or first and last, frames, and how near these come."""
    rng = np.random.default_rng(_SEED)
    verdicts: list[dict[str, bool]] = []
    nearness: dict[str, list[float]] = {"first frame": [], "last frame": []}
    for scene in scenes:
        drawn = truth(scene)
        given = {"image": drawn[0]}
        if wan.config.images == 2:
            given["last_image"] = drawn[-1]
        text = captions.caption(scene, rng)
        clip = wan.generate(text, size=scene.size, seed=len(verdicts), **given)[0]
        verdicts.append(judge.verdict(clip, scene))
        nearness["first frame"].append(psnr(clip[0], drawn[0]))
        nearness["last frame"].append(psnr(clip[-1], drawn[-1]))
        if len(verdicts) % _TOGETHER == 0:
            notify(f"{len(verdicts)} of {len(scenes)} clips: {_shares(verdicts)}")
    if wan.config.images == 1:
        del nearness["last frame"]
    means = {f"{name}, mean dB": float(np.mean(found)) for name, found in nearness.items()}
    worst = {f"{name}, least dB": float(np.min(found)) for name, found in nearness.items()}
    return (
        {"kind": KINDS[wan.config.images], "clips": len(scenes)} | _shares(verdicts) | means | worst
    )


def _by_size(scenes: Sequence[Scene]) -> Iterator[tuple[tuple[int, int], list[Scene]]]:
    """The scenes in groups of one size that are made at once."""
    for size in dict.fromkeys(scene.size for scene in scenes):
        some = [scene for scene in scenes if scene.size == size]
        for start in range(0, len(some), _TOGETHER):
            yield size, some[start : start + _TOGETHER]


def _shares(verdicts: Sequence[dict[str, bool]]) -> dict[str, float]:
    """{attribute: share of the verdicts that have it and are right}."""
    names = dict.fromkeys(name for verdict in verdicts for name in verdict)
    return {name: _share([v[name] for v in verdicts if name in v]) for name in names}


def _share(right: Sequence[bool]) -> float:
    return round(float(np.mean(right)), 4)


def truth(scene: Scene) -> np.ndarray:
    """The scene's own frames, uint8 [f, y, x, 3]."""
    frames = _render(world.fields([scene]), size=scene.size, frames=scene.frames)
    return np.round((np.asarray(frames[0]) + 1) * 127.5).astype(np.uint8)


_render = xla.jit(render, static_argnames=("size", "frames"))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Decibels between uint8 pictures."""
    error = np.mean(np.square(one.astype(np.float64) - other)) / 255**2
    return float(-10 * np.log10(max(error, 1e-10)))
