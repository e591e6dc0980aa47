"""The face of the package: load a checkpoint, generate a video.

One pipeline serves every task. Each stage (text, denoise, decode) is its own program and its
weights can leave the device before the next begins.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wan_jax import noise as noise_module
from wan_jax import sampler, tokenizer, umt5, vae, xla
from wan_jax.config import WanConfig
from wan_jax.dit import Cond, DiT
from wan_jax.request import Request, check_noise, make_request

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = jax.Array
OUTPUTS = ("frames", "latents", "stream")

# At most so many latent frames are decoded at a time, and a number that divides, so that one
# program serves all chunks. On an H200 at 480P: 1 takes 1.23 s for 81 frames, 2 1.18 s, 5 1.15 s.
DECODE_CHUNK = 2


class Progress(NamedTuple):
    """What a callback is told: `done` of `total` parts of a stage are finished.

    stage: "load", "encode", "denoise", "decode" or, in bytes, "download", "convert", "upload",
    "export"; the first report of each has done = 0 or, where a run is taken up, the steps before.
    latents: float32 [b, t, h, w, c] after a denoising step, else None. carry: then also where the
    solver stands, in buffers that the next step reuses: copy what is kept.
    """

    stage: str
    done: int
    total: int
    latents: Array | None = None
    carry: sampler.Carry | None = None


Callback = Callable[[Progress], None]


@dataclasses.dataclass
class Wan:
    """A checkpoint ready to run.

    loaders: {"dit" | "vae" | "umt5": function that puts the network on the device}.
    offload: each stage's weights leave the device when it is done and are read again when needed.
    digest: SHA-256 over those of the source files, or "" for networks from elsewhere.
    """

    config: WanConfig
    tokenizer: "Tokenizer"
    loaders: dict[str, Callable[[], Any]]
    dtype: str = "bfloat16"
    offload: bool = False
    digest: str = ""
    _resident: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def network(self, part: str, callback: Callback | None = None) -> Any:
        """The network of this name, on the device."""
        if part not in self._resident:
            _tell(callback, "load", 0, 1)
            self._resident[part] = self.loaders[part]()
            _tell(callback, "load", 1, 1)
        return self._resident[part]

    @contextlib.contextmanager
    def _stage(self, part: str, callback: Callback | None) -> Iterator[Any]:
        """The network for the length of a block; with offloading it then leaves the device."""
        try:
            yield self.network(part, callback)
        finally:
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
        latents = self.denoise(request, self.encode_text(texts(request), callback), start, callback)
        if output == "latents":
            return np.array(latents)
        if output == "stream":
            return self.decode(latents, callback=callback)
        with self._stage("vae", callback):
            videos = [
                np.concatenate(list(self._decode(latents[k : k + 1], "uint8", callback)), 1)
                for k in range(latents.shape[0])
            ]
        return np.concatenate(videos)

    def encode_text(self, prompts: Sequence[str], callback: Callback | None = None) -> np.ndarray:
        """UMT5 states [b, s, d] of the cleaned prompts, zero past each text; on the host."""
        ids, mask = tokenizer.tokenize(self.tokenizer, prompts, length=self.config.dit.text_len)
        contexts = []
        with self._stage("umt5", callback) as network:
            _tell(callback, "encode", 0, len(prompts))
            for i in range(len(prompts)):  # one by one: a text's states do not know its neighbours
                states = _encode_text(network, ids[i : i + 1], mask[i : i + 1])
                contexts.append(np.asarray(states)[0])
                _tell(callback, "encode", i + 1, len(prompts))
            del network
        return np.stack(contexts)

    def decode(
        self, latents: Any, *, dtype: str = "uint8", callback: Callback | None = None
    ) -> Iterator[np.ndarray]:
        """Frames of latents [b, t, h, w, c] in chunks [b, f, y, x, 3], while later ones compute.

        dtype: "uint8", truncated to 0..255 as the reference does or, for one image, rounded; or
        "float32" in -1..1. Raises sampler.DivergedError for frames that are not finite.
        """
        if dtype not in ("uint8", "float32"):
            raise ValueError(f"dtype is {dtype!r}; 'uint8' or 'float32' is needed")
        z = self.config.vae.z_dim
        if np.ndim(latents) != 5 or np.shape(latents)[-1] != z:
            raise ValueError(f"latents have shape {np.shape(latents)}; [b, t, h, w, {z}] is needed")
        return self._stream(jnp.asarray(latents, jnp.float32), dtype, callback)

    def _stream(
        self, latents: Array, dtype: str, callback: Callback | None
    ) -> Iterator[np.ndarray]:
        with self._stage("vae", callback):
            yield from self._decode(latents, dtype, callback)

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
        # One image is rounded, as the reference saves it; a video is truncated, as it writes those.
        rounding = 0.5 if count == 1 else 0.0
        waiting: tuple[Array, Array, int] | None = None
        for start in starts:
            stop = 1 if start == 0 else start + chunk
            run = _decode_program(start == 0, dtype, self.dtype)
            # A dynamic slice: a static one would be a program of its own for every chunk.
            piece = lax.dynamic_slice_in_dim(latents, start, stop - start, axis=1)
            pixels, finite, state = run(network, piece, state, rounding)
            # The next chunk is computing on the device while the last one crosses to the host.
            if waiting is not None:
                yield _fetch(*waiting)
                _tell(callback, "decode", waiting[2], count)
            waiting = pixels, finite, stop
        assert waiting is not None
        yield _fetch(*waiting)
        _tell(callback, "decode", count, count)

    def denoise(
        self,
        request: Request,
        context: Any,
        start: Array | sampler.Carry,
        callback: Callback | None = None,
    ) -> Array:
        """Latents [b, t, h, w, c] float32 of a request.

        context: states [n, s, d] of texts(request). start: noise [b, t, h, w, c], or the carry of
        an interrupted run of the same request. Raises sampler.DivergedError naming the step at
        which latents became NaN or infinite.
        """
        done = start.done if isinstance(start, sampler.Carry) else 0
        if isinstance(start, sampler.Carry):
            start = start._replace(state=jax.tree.map(_commit, start.state))

        def on_step(carry: sampler.Carry, steps: int) -> None:
            if callback is not None:
                # A copy: the step's own buffer is the next step's, and a callback may keep it.
                latents = jnp.copy(carry.state.x)
                callback(Progress("denoise", carry.done, steps, latents, carry))

        with self._stage("dit", callback) as network:
            _tell(callback, "denoise", done, len(request.schedule.table))
            conds = _conditions(network, context, request)
            return sampler.sample(
                network, start, request.schedule, conds, guidance=request.guidance, on_step=on_step
            )

    def _noise(self, request: Request, noise: Any) -> Array:
        if noise is None:
            drawn = noise_module.initial_noise(
                request.seed, request.num_videos, shape=request.latent_shape
            )
            return _commit(jnp.tile(drawn, (len(request.prompts), 1, 1, 1, 1)))
        return _commit(jnp.asarray(check_noise(noise, request.noise_shape)))


def texts(request: Request) -> tuple[str, ...]:
    """The texts to encode: the prompts and, where guidance needs it, the negative prompt last."""
    return (*request.prompts, *((request.negative,) if request.guidance != 1.0 else ()))


def _fetch(pixels: Array, finite: Array, stop: int) -> np.ndarray:
    """Frames on the host; DivergedError if they hold NaN, which bytes would show as black."""
    if not bool(finite):
        raise sampler.DivergedError(f"frames became NaN or infinite by latent frame {stop}")
    return np.asarray(pixels)


def _tell(callback: Callback | None, stage: str, done: int, total: int) -> None:
    if callback is not None:
        callback(Progress(stage, done, total))


def _commit(array: Array) -> Array:
    """The array on the device where the weights are, whence jit makes one program and not two."""
    return jax.device_put(array, jax.devices()[0])


_encode_text = xla.jit(umt5.encode)
_prepare = xla.jit(DiT.prepare)


def _conditions(network: DiT, context: Array, request: Request) -> tuple[Cond, ...]:
    """Conditions of the videos and, where the context has one row more, of the negative prompt."""
    context = _commit(jnp.asarray(context))
    n, b = len(request.prompts), len(request.prompts) * request.num_videos
    rows = [jnp.repeat(context[:n], request.num_videos, axis=0)]
    if context.shape[0] > n:
        rows.append(jnp.repeat(context[n:], b, axis=0))
    return tuple(_prepare(network, row) for row in rows)


def _vae_precision(dtype: str) -> lax.Precision:
    """The reference's: TF32 convolutions on NVIDIA; three bfloat16 passes are TPU's nearest."""
    if dtype == "float32":
        return lax.Precision.HIGHEST
    return lax.Precision.HIGH if jax.default_backend() == "tpu" else lax.Precision.DEFAULT


@functools.cache
def _decode_program(first: bool, pixels: str, dtype: str) -> Callable[..., Any]:
    """The compiled decoder of a first or a following chunk; the state's buffers are reused."""
    decode = vae.decode_first if first else vae.decode_next

    def run(
        network: vae.VAE, latents: Array, state: vae.State, rounding: Array
    ) -> tuple[Array, Array, vae.State]:
        frames, state = decode(network, latents, state, precision=_vae_precision(dtype))
        finite = jnp.all(jnp.isfinite(frames))
        if pixels == "uint8":
            levels = (frames + 1.0) * 0.5 * 255.0 + rounding
            frames = jnp.minimum(levels, 255.0).astype(jnp.uint8)
        return frames, finite, state

    return xla.jit(run, donate_argnums=2)
