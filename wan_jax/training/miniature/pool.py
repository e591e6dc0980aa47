"""Clips of the world as latents, made once on the device and drawn from ever again.

What costs time is the VAE, so a transformer sees every clip many times, each time with other noise
and, mostly, another caption. First frames are encoded as stills are, and cost a ninth: they can be
drawn alone. All clips lie on every device, so that no step waits for its own from the host.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax import conditioning, fitting, tokenizer, vae, xla
from wan_jax.config import VAEConfig
from wan_jax.sharding import Layout
from wan_jax.training.miniature import captions, networks, world
from wan_jax.training.miniature.render import render
from wan_jax.training.miniature.whole import moments
from wan_jax.training.miniature.world import Scene

Array = jax.Array
_CHUNK = 32  # clips that are encoded together
_CAPTIONS = 4  # of every clip
_STILLS = 4  # stills in a batch for every clip that there would be
_SHARES = {world.FRAME_SIZES[0]: 0.5, world.FRAME_SIZES[1]: 0.25, world.FRAME_SIZES[2]: 0.25}


class Batch(NamedTuple):
    """Clips of one size.

    latents: [b, t, h, w, 16]. ids, mask: int32 [b, s], of the captions. known: [b, t, h, w, 20] and
    views: [b, images, y, x, 3], what CLIP sees, where there are images.
    """

    latents: Any
    ids: Any
    mask: Any
    known: Any = None
    views: Any = None


@dataclasses.dataclass(frozen=True)
class Group:
    """The clips of one size; arrays as in Batch, known without the mask."""

    scenes: list[Scene]
    latents: np.ndarray
    known: np.ndarray | None
    views: np.ndarray | None


class Pool:
    """Clips to train a transformer on that takes so many images.

    stills: how many steps see first frames only, of transformers that take no images. layout: whose
    devices share the rows of a batch; None is the first device.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        text: Any,
        *,
        images: int,
        batch_size: int,
        seed: int,
        stills: int = 0,
        layout: Layout | None = None,
    ) -> None:
        self._images, self._stills = images, stills
        self._batch_size, self._seed = batch_size, seed
        shares = np.array([_SHARES[group.scenes[0].size] for group in groups])
        self._chances = shares / sum(shares)
        self._place: Callable[[Any], Any] = jax.device_put if layout is None else layout.rows
        whole: Callable[[Any], Any] = jax.device_put if layout is None else layout.whole
        self._clips = [whole((group.latents, group.known, group.views)) for group in groups]
        rng = np.random.default_rng(seed)
        self._captions = [_captions(group.scenes, text, rng) for group in groups]
        # What generation is guided away from is shown with clips of all kinds, too: with spoiled
        # ones alone it would push colours and brightness out of range.
        instead = ["", captions.NEGATIVE_PROMPT]
        self._nothing = tokenizer.tokenize(text, instead, length=networks.TEXT_TOKENS)

    def batch(self, step: int) -> Batch:
        """The batch of a step, a function of seed and step, on the devices."""
        rng = np.random.default_rng((self._seed, step))
        chosen = rng.choice(len(self._chances), p=self._chances)
        told, clips = self._captions[chosen], self._clips[chosen]
        still = step < self._stills
        count = self._batch_size * (_STILLS if still else 1)
        rows = rng.integers(len(told[0]), size=count)
        ids, mask = self._texts(told, rows, rng)
        which, ids, mask = self._place((rows.astype(np.int32), ids, mask))
        latents, known, views = _taken(clips, which, still=still, images=self._images)
        return Batch(latents, ids, mask, known, views)

    def _texts(
        self, told: tuple[np.ndarray, np.ndarray], rows: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, ...]:
        """Ids and mask of a caption for each row, or of what generation is guided away from."""
        which, other = rng.integers(_CAPTIONS, size=len(rows)), rng.integers(2, size=len(rows))
        lost = rng.random((len(rows), 1)) < networks.TEXT_DROPOUT
        pairs = zip(self._nothing, told, strict=True)
        return tuple(np.where(lost, none[other], found[rows, which]) for none, found in pairs)


@functools.partial(xla.jit, static_argnames=("still", "images"))
def _taken(clips: Any, rows: Array, *, still: bool, images: int) -> tuple[Array | None, ...]:
    """Latents, known and views of a Batch, each row where its number lies."""
    latents, known, views = clips
    if still:
        return latents[rows, :1], None, None
    latents = latents[rows]
    if known is None:
        return latents, None, None
    _, frames, height, width, _ = latents.shape
    last = images == 2
    mask = conditioning.mask_bthwc(1 + 4 * (frames - 1), height=height, width=width, last=last)
    masks = jnp.broadcast_to(mask.astype(latents.dtype), (len(rows), *mask.shape[1:]))
    return latents, jnp.concatenate([masks, known[rows]], axis=-1), views[rows]


def _captions(
    scenes: Sequence[Scene], text: Any, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask [scenes, _CAPTIONS, s] of captions of every scene."""
    texts = [captions.caption(scene, rng) for scene in scenes for _ in range(_CAPTIONS)]
    found = tokenizer.tokenize(text, texts, length=networks.TEXT_TOKENS)
    ids, mask = (x.reshape(len(scenes), _CAPTIONS, -1) for x in found)
    return ids, mask


def make_groups(
    network: vae.VAE,
    *,
    images: int,
    clips: int,
    pairs: float,
    seed: int,
    tell: Callable[[int, int], None] | None = None,
) -> list[Group]:
    """Draw and encode `clips` clips, none of them held out.

    pairs: share of those with two objects. tell: (done, of how many).
    """
    groups, done = [], 0
    for size, share in _SHARES.items():
        rng = np.random.default_rng((seed, *size))
        scenes, found = [], []
        for _ in range(max(1, round(clips * share / _CHUNK))):
            some = [
                world.draw(
                    rng,
                    count=1 + int(rng.random() < pairs),
                    size=size,
                    frames=world.FRAMES,
                    spoil=networks.SPOILED,
                )
                for _ in range(_CHUNK)
            ]
            raw = _encode(network, world.fields(some), size=size, images=images)
            found.append(_host(raw, network.config))
            scenes += some
            done += _CHUNK
            if tell is not None:
                tell(done, clips)
        groups.append(Group(scenes, *(_joined([f[i] for f in found]) for i in range(3))))  # type: ignore[arg-type]
    return groups


def _host(found: tuple[Array | None, ...], config: VAEConfig) -> tuple[np.ndarray | None, ...]:
    """Normalised latents, those of the images and CLIP's views on the host, small."""
    latents, known, frames = (None if x is None else np.asarray(x) for x in found)
    assert latents is not None
    latents = _normalised(latents, config)
    if known is None or frames is None:
        return latents, None, None
    side = networks.CLIP.image_size
    b, images = frames.shape[:2]
    flat = frames.reshape(b * images, *frames.shape[2:])
    views = np.stack([fitting.clip_view(image, side) for image in flat])
    views = views.reshape(b, images, side, side, 3).astype(np.float16)
    return latents, _normalised(known, config), views


def _normalised(raw: np.ndarray, config: VAEConfig) -> np.ndarray:
    shift, scale = (np.asarray(x, np.float32) for x in (config.latents_mean, config.latents_std))
    return ((raw - shift) / scale).astype(jnp.bfloat16)


def _joined(parts: list[np.ndarray | None]) -> np.ndarray | None:
    some = [part for part in parts if part is not None]
    return np.concatenate(some) if some else None


@functools.partial(xla.jit, static_argnames=("size", "images"))
def _encode(
    network: vae.VAE, fields: Any, *, size: tuple[int, int], images: int
) -> tuple[Array, Array | None, Array | None]:
    """Raw latents of clips and, for images, of clips grey but for them, and these frames."""
    frames = render(fields, size=size, frames=world.FRAMES)
    if not images:
        return _raw(network, frames), None, None
    given = frames[:, :: world.FRAMES - 1][:, :images]
    grey = jnp.zeros_like(frames).at[:, 0].set(given[:, 0])
    if images == 2:
        grey = grey.at[:, -1].set(given[:, 1])
    return _raw(network, frames), _raw(network, grey), given


def _raw(network: vae.VAE, frames: Array) -> Array:
    """Latents as they leave the encoder, float32."""
    return moments(network, frames.astype(jnp.bfloat16))[0]
