"""What a user asks of a checkpoint, checked and with every default filled in."""

import functools
import numbers
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from wan_jax import noise
from wan_jax.config import WanConfig
from wan_jax.fitting import Fit, Frame, check_fit, known_frames
from wan_jax.images import Picture, read_image
from wan_jax.schedulers import Schedule, make_schedule

_KINDS = ("a video of a text", "a video of a text and an image", "a video between two images")
# In patches: the longest that the reference's tables of positions are.
_MAX_SIDE = 1024


class Request(NamedTuple):
    """A checked set of arguments of generate(), with every default filled in.

    size: (width, height) as asked for. images: the frames that are known, at the size of the video,
    which need not be the one asked for.
    """

    prompts: tuple[str, ...]
    negative: str
    size: tuple[int, int]
    frames: int
    images: tuple[Frame, ...]
    latent_shape: tuple[int, int, int, int]
    schedule: Schedule
    guidance: float
    seed: int
    num_videos: int

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts to encode: the prompts and, where guidance needs it, the negative one last."""
        return (*self.prompts, *((self.negative,) if self.guidance != 1.0 else ()))

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """[b, t, h, w, c] of all videos together."""
        return (len(self.prompts) * self.num_videos, *self.latent_shape)


def make_request(
    config: WanConfig,
    prompt: str | Sequence[str],
    *,
    image: Any = None,
    last_image: Any = None,
    fit: Fit | None = None,
    negative_prompt: str | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    shift: float | None = None,
    solver: str | None = None,
    timesteps: Sequence[float] | None = None,
    seed: int | None = None,
    num_videos: int = 1,
) -> Request:
    """The arguments of Wan.generate() with defaults filled in; images are read and fitted.

    Raises ValueError "<argument> is <value>; <what is accepted>" for one that cannot be run.
    """
    defaults = config.defaults
    prompts, negative = _texts(prompt, _chosen(negative_prompt, defaults.negative_prompt))
    if timesteps is not None and not isinstance(timesteps, Iterable):
        raise ValueError(f"timesteps is {timesteps!r}; a list of numbers from 1000 to 0 is needed")
    given = None if timesteps is None else tuple(timesteps)
    if steps is None:
        steps = defaults.steps if given is None else len(given)
    size, frames = _chosen(size, defaults.size), _chosen(frames, defaults.frames)
    shape = latent_shape(config, size=size, frames=frames)
    width, height = (int(side) for side in size)
    request = Request(
        prompts=prompts,
        negative=negative,
        size=(width, height),
        frames=int(frames),
        images=(),
        latent_shape=shape,
        schedule=make_schedule(
            _chosen(solver, defaults.solver),
            steps,
            shift=_chosen(shift, defaults.shift_at(width, height)),
            timesteps=given,
        ),
        guidance=_finite("guidance", _chosen(guidance, defaults.guidance)),
        seed=_integer("seed", _chosen(seed, secrets.randbits(63)), low=0, high=noise.MAX_SEED),
        num_videos=_integer("num_videos", num_videos, low=1),
    )
    sources = {"image": image, "last_image": last_image}
    how = check_fit(_chosen(fit, "keep"))
    return _with_images(request, config, sources, how)  # last, for reading takes longest


def _chosen(given: Any, default: Any) -> Any:
    return default if given is None else given


def _texts(prompt: Any, negative: Any) -> tuple[tuple[str, ...], str]:
    """The prompts and the negative prompt; ValueError if they are none."""
    texts = (prompt,) if isinstance(prompt, str) or not isinstance(prompt, Iterable) else prompt
    prompts = tuple(texts)
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ValueError(f"prompt is {prompt!r}; one text or a list of texts is needed")
    if not isinstance(negative, str):
        raise ValueError(f"negative_prompt is {negative!r}; one text is needed")
    return prompts, negative


def _with_images(
    request: Request, config: WanConfig, sources: Mapping[str, Any], fit: Fit
) -> Request:
    """The request with its known frames; ValueError unless the images are those that it needs."""
    needed = list(sources)[: config.images]
    for name, source in sources.items():
        if (source is not None) != (name in needed):
            state = "missing" if source is None else "given"
            raise ValueError(f"{name} is {state}; this checkpoint makes {_KINDS[config.images]}")
    if config.clip is None:
        return request
    if len(needed) == 2 and request.frames == 1:
        stride = config.vae.temporal_stride
        raise ValueError(f"frames is 1; a first and a last frame need {1 + stride} or more")
    given = [sources[name] for name in needed]
    settings = request.size, fit, config.clip.image_size, config.size_multiple
    if all(isinstance(source, Picture) for source in given):
        frames = _fitted_pictures(tuple(given), *settings)
    else:
        whole = [read_image(source, name=name) for source, name in zip(given, needed, strict=True)]
        frames = known_frames(whole, *settings)
    height, width = frames[0].pixels.shape[:2]
    _check_sides(config, (width, height), "image makes a video of size")
    stride = config.vae.spatial_stride
    t, _, _, channels = request.latent_shape
    shape = t, height // stride, width // stride, channels
    return request._replace(images=frames, latent_shape=shape)


def latent_shape(config: WanConfig, *, size: Any, frames: Any) -> tuple[int, int, int, int]:
    """(t, h, w, c) of the latents of a video of `size` (width, height) and `frames` frames.

    Raises ValueError for a size not in multiples of 16 or a frame count not 4n + 1.
    """
    multiple, stride = config.size_multiple, config.vae.temporal_stride
    sides = tuple(size) if isinstance(size, Iterable) else ()
    if len(sides) != 2 or not all(_is_integer(n) and n > 0 and n % multiple == 0 for n in sides):
        raise ValueError(f"size is {size}; width and height in multiples of {multiple} are needed")
    if not _is_integer(frames) or frames < 1 or (frames - 1) % stride:
        raise ValueError(f"frames is {frames}; {stride}n + 1 is needed: 1, {stride + 1}, ...")
    _check_sides(config, sides, "size is")
    width, height = (int(n) // config.vae.spatial_stride for n in sides)
    return 1 + (int(frames) - 1) // stride, height, width, config.vae.z_dim


# Many prompts may have one image.
@functools.lru_cache(maxsize=8)
def _fitted_pictures(
    pictures: tuple[Picture, ...], size: tuple[int, int], fit: Fit, side: int, multiple: int
) -> tuple[Frame, ...]:
    return known_frames([read_image(p) for p in pictures], size, fit, side, multiple)


def _check_sides(config: WanConfig, size: tuple[int, ...], what: str) -> None:
    longest = _MAX_SIDE * config.size_multiple
    if max(size) > longest:
        raise ValueError(f"{what} {size}; sides up to {longest} are possible")


def check_noise(noise_bthwc: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Given noise as float32 [b, t, h, w, c]; ValueError for another shape or what is no number."""
    given = np.asarray(noise_bthwc)
    if given.shape != shape:
        raise ValueError(f"noise has shape {given.shape}; [b, t, h, w, c] = {shape} is needed")
    if given.dtype.kind not in "fV":  # V: bfloat16 and its like
        raise ValueError(f"noise has dtype {given.dtype}; floating point is needed")
    noise_f32 = given.astype(np.float32)
    if not np.isfinite(noise_f32).all():
        raise ValueError("noise holds NaN or infinite values; finite ones are needed")
    return noise_f32


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _integer(name: str, value: Any, *, low: int, high: int | None = None) -> int:
    if not _is_integer(value) or value < low or (high is not None and value > high):
        upper = "up" if high is None else f"to {high}"
        raise ValueError(f"{name} is {value!r}; an integer from {low} {upper} is needed")
    return int(value)


def _finite(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real) or not np.isfinite(float(value)):
        raise ValueError(f"{name} is {value!r}; a finite number is needed")
    return float(value)
