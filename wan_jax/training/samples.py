"""Videos that a training makes on its way, to see what it has learned."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from wan_jax import media, noise
from wan_jax.config import WanConfig
from wan_jax.dit import DiT
from wan_jax.pipeline import Callback, Known, Wan
from wan_jax.request import Request, make_request
from wan_jax.sampler import DivergedError
from wan_jax.training.config import TrainConfig

FOLDER = "samples"
Notify = Callable[[str], None]


class _Sample(NamedTuple):
    """A request with what its texts and images tell, on the host."""

    request: Request
    context: np.ndarray
    known: Known | None


def requests(config: TrainConfig, wan: WanConfig) -> list[Request]:
    """What is to be made; ValueError naming a setting that cannot be, or an image.

    Of a checkpoint that takes images every prompt needs those.
    """
    found = []
    for k, prompt in enumerate(config.sample_prompts):
        sources = (config.sample_images, config.sample_last_images)
        first, last = (paths[k] if paths else None for paths in sources)
        try:
            request = make_request(
                wan,
                prompt,
                image=first,
                last_image=last,
                fit="crop",
                size=config.size,
                frames=config.frames,
                steps=config.sample_steps,
                guidance=config.sample_guidance,
                shift=config.sample_shift,
                solver=config.sample_solver,
                seed=config.sample_seed + k,
            )
        except ValueError as error:
            raise ValueError(f"sample {k} ({prompt!r}): sample_{error}") from error
        found.append(request)
    return found


class Samples:
    """Makes the samples; text and images are encoded when this is made, and only then.

    wan: with offloading, so that no network stays on the device. out, fps: of the training.
    """

    def __init__(
        self,
        wan: Wan,
        requests: list[Request],
        out: Path,
        *,
        fps: float | None = None,
        callback: Callback | None = None,
        notify: Notify | None = None,
    ) -> None:
        self._wan, self._folder = wan, out / FOLDER
        self._fps = fps or wan.config.defaults.fps
        self._say = notify or (lambda _: None)
        texts = list(dict.fromkeys(t for request in requests for t in request.texts))
        states = dict(zip(texts, wan.encode_text(texts, callback), strict=True)) if texts else {}
        self._samples = [
            _Sample(
                request,
                np.stack([states[text] for text in request.texts]),
                wan.encode_images(request, callback),
            )
            for request in requests
        ]

    def make(
        self, step: int, network: Callable[[], DiT], stop: Callable[[], bool] = lambda: False
    ) -> list[Path]:
        """Write step_000500_0.mp4 and so on (.png of one frame) into OUT/samples, if not there.

        What fails is told and does not keep the training from going on. network: makes what is
        sampled from. stop: asked before every sample whether to leave it and those after it.
        """
        paths: list[Path] = []
        made = functools.cache(network)
        for k, sample in enumerate(self._samples):
            if stop():
                break
            suffix = ".mp4" if sample.request.frames > 1 else ".png"
            path = self._folder / f"step_{step:06}_{k}{suffix}"
            if path.exists():
                continue
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._make(sample, path, made())
            except (DivergedError, OSError, ValueError, jax.errors.JaxRuntimeError) as error:
                self._say(f"sample {path.name} failed: {error}")  # no memory is the last
                continue
            paths.append(path)
        return paths

    def _make(self, sample: _Sample, path: Path, network: DiT) -> None:
        request, wan = sample.request, self._wan
        loaders = {**wan.loaders, "dit": lambda: network}
        trained = Wan(wan.config, wan.tokenizer, loaders, dtype=wan.dtype, offload=True)
        start = noise.initial_noise(request.seed, 1, shape=request.latent_shape)
        latents = trained.denoise(request, sample.context, start, known=sample.known)
        floats = "float32" if request.frames == 1 else "uint8"
        about = {"prompt": request.prompts[0], "seed": request.seed, "step": path.stem}
        media.save_video(
            trained.decode(latents, dtype=floats),
            path,
            fps=self._fps,
            metadata=lambda: about,
        )
