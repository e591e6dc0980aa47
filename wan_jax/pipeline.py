"""The face of the package: load a checkpoint, generate a video.

One pipeline serves every task. Each stage (text, denoise, decode) is its own program and its
weights can leave the device before the next begins.
"""

import dataclasses
import functools
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wan_jax import noise as noise_module
from wan_jax import sampler, tokenizer, umt5, vae, xla
from wan_jax.config import WanConfig
from wan_jax.dit import Cond, DiT
from wan_jax.schedulers import Schedule, make_schedule

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = jax.Array
OUTPUTS = ("frames", "latents", "stream")

# At most so many latent frames are decoded at a time, and a number that divides, so that one
# program serves all chunks. On an H200 at 480P: 1 takes 1.23 s for 81 frames, 2 1.18 s, 5 1.15 s.
DECODE_CHUNK = 2


class Progress(NamedTuple):
    """What a callback is told: `done` of `total` parts of a stage are finished.

    stage: "load", "encode", "denoise" or "decode"; the first report of each has done = 0.
    latents: float32 [b, t, h, w, c] after a denoising step, else None; copy what is to be kept.
    """

    stage: str
    done: int
    total: int
    latents: Array | None = None


Callback = Callable[[Progress], None]


class Request(NamedTuple):
    """A checked set of arguments of generate(), with every default filled in."""

    prompts: tuple[str, ...]
    negative: str
    latent_shape: tuple[int, int, int, int]
    schedule: Schedule
    guidance: float
    seed: int
    num_videos: int

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """[b, t, h, w, c] of all videos together."""
        return (len(self.prompts) * self.num_videos, *self.latent_shape)


@dataclasses.dataclass
class Wan:
    """A checkpoint ready to run.

    loaders: {"dit" | "vae" | "umt5": function that puts the network on the device}.
    offload: each stage's weights leave the device when it is done and are read again when needed.
    """

    config: WanConfig
    tokenizer: "Tokenizer"
    loaders: dict[str, Callable[[], Any]]
    dtype: str = "bfloat16"
    offload: bool = False
    _resident: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def network(self, part: str, callback: Callback | None = None) -> Any:
        """The network of this name, on the device."""
        if part not in self._resident:
            _tell(callback, "load", 0, 1)
            self._resident[part] = self.loaders[part]()
            _tell(callback, "load", 1, 1)
        return self._resident[part]

    def release(self, part: str) -> None:
        """Let the network leave the device, if offloading is on."""
        if self.offload:
            self._resident.pop(part, None)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        shift: float | None = None,
        solver: str | None = None,
        timesteps: Sequence[float] | None = None,
        seed: int | None = None,
        noise: Any = None,
        num_videos: int = 1,
        callback: Callback | None = None,
        output: str = "frames",
    ) -> Any:
        """Videos of the prompts; None takes the checkpoint's own default.

        size: (width, height) in pixels, multiples of 16. frames: 4n + 1 pixel frames. steps: 1 to
        1000. guidance: 1 runs a single pass. timesteps: 0..1000, decreasing, in place of the
        solver's schedule. noise: float [b, t, h, w, c] in place of the seed's. Video k of a prompt
        draws from fold_in(seed, k), so a batch equals its members; a None seed is random.
        output: "frames" gives uint8 [b, f, y, x, 3], b = prompts * num_videos in prompt order;
        "latents" gives float32 [b, t, h, w, c]; "stream" an iterator over chunks of frames as they
        are decoded. Raises ValueError for what cannot be run, before anything is computed, and
        sampler.DivergedError naming the step at which latents became NaN or infinite.
        """
        if output not in OUTPUTS:
            raise ValueError(f"output is {output!r}; one of {OUTPUTS} is needed")
        request = make_request(
            self.config,
            prompt,
            negative_prompt=negative_prompt,
            size=size,
            frames=frames,
            steps=steps,
            guidance=guidance,
            shift=shift,
            solver=solver,
            timesteps=timesteps,
            seed=seed,
            num_videos=num_videos,
        )
        start = self._noise(request, noise)
        latents = self._denoise(request, start, callback)
        if output == "latents":
            return np.asarray(latents)
        if output == "stream":
            return self.decode(latents, callback=callback)
        videos = [
            np.concatenate(list(self.decode(latents[k : k + 1], callback=callback)), 1)
            for k in range(latents.shape[0])
        ]
        return np.concatenate(videos)

    def encode_text(self, prompts: Sequence[str], callback: Callback | None = None) -> Array:
        """UMT5 states [b, s, d] of the cleaned prompts, zero past each text."""
        ids, mask = tokenizer.tokenize(self.tokenizer, prompts, length=self.config.dit.text_len)
        network = self.network("umt5", callback)
        _tell(callback, "encode", 0, 1)
        context = jax.block_until_ready(_commit(_encode_text(network, ids, mask)))
        del network
        self.release("umt5")
        _tell(callback, "encode", 1, 1)
        return context

    def decode(
        self, latents: Any, *, dtype: str = "uint8", callback: Callback | None = None
    ) -> Iterator[np.ndarray]:
        """Frames of latents [b, t, h, w, c] in chunks [b, f, y, x, 3], while later ones compute.

        dtype: "uint8" truncated to 0..255 as the reference does, or "float32" in -1..1.
        """
        if dtype not in ("uint8", "float32"):
            raise ValueError(f"dtype is {dtype!r}; 'uint8' or 'float32' is needed")
        return self._decode(jnp.asarray(latents, jnp.float32), dtype, callback)

    def _decode(
        self, latents: Array, dtype: str, callback: Callback | None
    ) -> Iterator[np.ndarray]:
        network = self.network("vae", callback)
        count = latents.shape[1]
        chunk = max(k for k in range(1, DECODE_CHUNK + 1) if (count - 1) % k == 0)
        _tell(callback, "decode", 0, count)
        b, _, height, width, _ = latents.shape
        state = vae.decoder_state(self.config.vae, b, height=height, width=width)
        starts = [0, *range(1, count, chunk)]
        waiting: tuple[Array, int] | None = None
        for start in starts:
            stop = 1 if start == 0 else start + chunk
            run = _decode_program(start == 0, dtype, self.dtype)
            pixels, state = run(network, latents[:, start:stop], state)
            # The next chunk is computing on the device while the last one crosses to the host.
            if waiting is not None:
                yield np.asarray(waiting[0])
                _tell(callback, "decode", waiting[1], count)
            waiting = pixels, stop
        del network, state
        self.release("vae")
        assert waiting is not None
        yield np.asarray(waiting[0])
        _tell(callback, "decode", count, count)

    def _denoise(self, request: Request, start: Array, callback: Callback | None) -> Array:
        conds = self._conditions(request, callback)
        network = self.network("dit", callback)
        _tell(callback, "denoise", 0, len(request.schedule.table))

        def on_step(i: int, steps: int, latents: Array) -> None:
            if callback is not None:
                callback(Progress("denoise", i, steps, latents))

        latents = sampler.sample(
            network, start, request.schedule, conds, guidance=request.guidance, on_step=on_step
        )
        del network
        self.release("dit")
        return latents

    def _conditions(self, request: Request, callback: Callback | None) -> tuple[Cond, ...]:
        """Cross-attention conditions of the videos and, unless guidance is 1, of the negative."""
        guided = request.guidance != 1.0
        texts = (*request.prompts, *((request.negative,) if guided else ()))
        context = self.encode_text(texts, callback)
        n, b = len(request.prompts), len(request.prompts) * request.num_videos
        each = jnp.repeat(context[:n], request.num_videos, axis=0)
        network = self.network("dit", callback)
        conds = [_prepare(network, each)]
        if guided:
            conds.append(_prepare(network, jnp.repeat(context[n:], b, axis=0)))
        return tuple(conds)

    def _noise(self, request: Request, noise: Any) -> Array:
        if noise is None:
            drawn = noise_module.initial_noise(
                request.seed, request.num_videos, shape=request.latent_shape
            )
            return _commit(jnp.tile(drawn, (len(request.prompts), 1, 1, 1, 1)))
        given = np.asarray(noise)
        needed = request.noise_shape
        if given.shape != needed:
            raise ValueError(f"noise has shape {given.shape}; [b, t, h, w, c] = {needed} is needed")
        if not np.isfinite(given).all():
            raise ValueError("noise holds NaN or infinite values; finite ones are needed")
        return _commit(jnp.asarray(given, jnp.float32))


def make_request(
    config: WanConfig,
    prompt: str | Sequence[str],
    *,
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
    """The arguments of Wan.generate() with defaults filled in.

    Raises ValueError "<argument> is <value>; <what is accepted>" for one that cannot be run.
    """
    defaults = config.defaults
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ValueError(f"prompt is {prompt!r}; one text or a list of texts is needed")
    if num_videos < 1:
        raise ValueError(f"num_videos is {num_videos}; at least 1 is needed")
    if timesteps is not None and steps is None:
        steps = len(timesteps)
    guidance = defaults.guidance if guidance is None else float(guidance)
    if not np.isfinite(guidance):
        raise ValueError(f"guidance is {guidance}; a finite number is needed")
    seed = secrets.randbits(63) if seed is None else seed
    if not 0 <= seed <= noise_module.MAX_SEED:
        raise ValueError(f"seed is {seed}; an integer from 0 to {noise_module.MAX_SEED} is needed")
    schedule = make_schedule(
        defaults.solver if solver is None else solver,
        defaults.steps if steps is None else steps,
        shift=defaults.shift if shift is None else shift,
        timesteps=timesteps,
    )
    return Request(
        prompts=prompts,
        negative=defaults.negative_prompt if negative_prompt is None else negative_prompt,
        latent_shape=latent_shape(
            config,
            size=cast(tuple[int, int], defaults.size) if size is None else size,
            frames=defaults.frames if frames is None else frames,
        ),
        schedule=schedule,
        guidance=guidance,
        seed=seed,
        num_videos=num_videos,
    )


def latent_shape(
    config: WanConfig, *, size: tuple[int, int], frames: int
) -> tuple[int, int, int, int]:
    """(t, h, w, c) of the latents of a video of `size` (width, height) and `frames` frames.

    Raises ValueError for a size not in multiples of 16 or a frame count not 4n + 1.
    """
    multiple, stride = config.size_multiple, config.vae.temporal_stride
    if len(size) != 2 or any(not isinstance(n, int) or n < 1 or n % multiple for n in size):
        raise ValueError(f"size is {size}; width and height in multiples of {multiple} are needed")
    if not isinstance(frames, int) or frames < 1 or (frames - 1) % stride:
        raise ValueError(f"frames is {frames}; {stride}n + 1 is needed: 1, {stride + 1}, ...")
    width, height = (n // config.vae.spatial_stride for n in size)
    return 1 + (frames - 1) // stride, height, width, config.vae.z_dim


def _tell(callback: Callback | None, stage: str, done: int, total: int) -> None:
    if callback is not None:
        callback(Progress(stage, done, total))


def _commit(array: Array) -> Array:
    """The array on the device where the weights are, whence jit makes one program and not two."""
    return jax.device_put(array, jax.devices()[0])


_encode_text = xla.jit(umt5.encode)
_prepare = xla.jit(DiT.prepare)


def _vae_precision(dtype: str) -> lax.Precision:
    """The reference's: TF32 convolutions on NVIDIA; three bfloat16 passes are TPU's nearest."""
    if dtype == "float32":
        return lax.Precision.HIGHEST
    return lax.Precision.HIGH if jax.default_backend() == "tpu" else lax.Precision.DEFAULT


@functools.cache
def _decode_program(first: bool, pixels: str, dtype: str) -> Callable[..., Any]:
    """The compiled decoder of a first or a following chunk; the state's buffers are reused."""
    decode = vae.decode_first if first else vae.decode_next

    def run(network: vae.VAE, latents: Array, state: vae.State) -> tuple[Array, vae.State]:
        frames, state = decode(network, latents, state, precision=_vae_precision(dtype))
        if pixels == "uint8":
            frames = ((frames + 1.0) * 0.5 * 255.0).astype(jnp.uint8)
        return frames, state

    return xla.jit(run, donate_argnums=2)
