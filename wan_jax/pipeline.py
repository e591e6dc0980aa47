"""The face of the package: load a checkpoint, generate a video.

One pipeline serves every task. Each stage (text, denoise, decode) is its own program and its
weights can leave the device before the next begins.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax import clip, conditioning, sampler, spread, streaming, tokenizer, umt5
from wan_jax import noise as noise_module
from wan_jax.conditioning import Known
from wan_jax.config import WanConfig
from wan_jax.dit import Cond, DiT
from wan_jax.fitting import Fit
from wan_jax.planning.budget import Budget
from wan_jax.planning.memory import work_of
from wan_jax.planning.vae_memory import Room
from wan_jax.progress import Callback, Progress, tell
from wan_jax.request import Request, check_noise, latent_shape, make_request
from wan_jax.sharding import Layout
from wan_jax.weights.adapters import Adapter

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = jax.Array
OUTPUTS = ("frames", "latents", "stream")


@dataclasses.dataclass
class Wan:
    """A checkpoint ready to run.

    loaders: {"dit" | "vae" | "umt5" | "clip": function that puts the network on the device}.
    offload: each stage's weights leave the device when it is done and are read again when needed.
    digest: SHA-256 over those of the source files and of the LoRAs, or "" for networks from
    elsewhere. loras: what was added to the DiT. layout: of the devices that a video is spread over;
    None is the first device. split: the networks of which each of these holds a share only.
    budget: the limit of a device's memory, which the VAE keeps in tiles and, if need be, the others
    as they are streamed: streaming has the loaders of those that then put a network's stack into
    the host's memory, and streamed are those that do.
    """

    config: WanConfig
    tokenizer: "Tokenizer" = dataclasses.field(repr=False)
    loaders: dict[str, Callable[[], Any]] = dataclasses.field(repr=False)
    dtype: str = "bfloat16"
    offload: bool = False
    digest: str = ""
    loras: tuple[Adapter, ...] = ()
    layout: Layout | None = None
    split: tuple[str, ...] = ()
    budget: Budget | None = None
    streaming: dict[str, Callable[[], Any]] = dataclasses.field(default_factory=dict, repr=False)
    streamed: tuple[str, ...] = ()
    _resident: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def network(self, part: str, callback: Callback | None = None) -> Any:
        """The network of this name, on the device."""
        if part not in self._resident:
            tell(callback, "load", 0, 1)
            loaders = self.streaming if part in self.streamed else self.loaders
            self._resident[part] = loaders[part]()
            tell(callback, "load", 1, 1)
        return self._resident[part]

    @contextlib.contextmanager
    def _stage(self, part: str, callback: Callback | None) -> Iterator[Any]:
        """The network for the length of a block; with offloading it then leaves the device."""
        held = part in self._resident
        try:
            yield self.network(part, callback)
        finally:
            if self.offload and not held:
                self._resident.pop(part, None)

    @contextlib.contextmanager
    def hold(self, part: str, callback: Callback | None = None) -> Iterator[None]:
        """Keeps a network on the device while several calls in the block use it in turn."""
        with self._stage(part, callback) as network:
            del network
            yield

    def make_room(self, requests: Sequence[Request], *, at_once: int = 1) -> None:
        """Settle what is streamed so that all these videos keep the limit of memory.

        at_once: videos that are decoded together. A network that is on the device and is to be
        streamed leaves it, to be read again; one that is streamed stays so. Raises ValueError
        naming the least memory that would do.
        """
        if self.budget is None:
            return
        works = list(dict.fromkeys(work_of(request) for request in requests))
        already = [part for part in self.streamed if part in self._resident]
        wanted = self.budget.streamed(works, at_once=at_once, already=already)
        for part in set(wanted) - set(self.streamed):
            self._resident.pop(part, None)
        self.streamed = wanted

    @property
    def _room(self) -> Room:
        """What the VAE is given of a device."""
        return Room() if self.budget is None else self.budget.room(self.streamed)

    def generate(
        self,
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
        noise: Any = None,
        num_videos: int = 1,
        callback: Callback | None = None,
        output: str = "frames",
    ) -> Any:
        """Videos of the prompts; None takes the checkpoint's own default.

        image, last_image: the first and last frame, where the checkpoint takes them: what
        images.read_image() takes. fit: "keep", the default, takes the first one's aspect ratio and
        the area of `size`, as the reference; "crop" and "pad" make exactly `size` (fitting.fit).
        size: (width, height) in pixels, multiples of 16. frames: 4n + 1 pixel frames. steps: 1 to
        1000. guidance: 1 runs a single pass. timesteps: 0..1000, decreasing, in place of the
        solver's schedule. noise: float [b, t, h, w, c] in place of the seed's. Video k of a prompt
        draws from fold_in(seed, k), so a batch equals its members; a None seed is random.
        output: "frames" gives uint8 [b, f, y, x, 3], b = prompts * num_videos in prompt order;
        "latents" gives float32 [b, t, h, w, c]; "stream" an iterator over chunks of frames as they
        are decoded. Raises ValueError for what cannot be run, before anything is computed, and
        sampler.DivergedError naming the step at which latents became NaN or infinite.
        """
        request = make_request(
            self.config,
            prompt,
            image=image,
            last_image=last_image,
            fit=fit,
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
        self._check(request, output)
        start = self._noise(request, noise)
        context = self.encode_text(request.texts, callback)
        known = self.encode_images(request, callback)
        latents = self.denoise(request, context, start, callback, known=known)
        if output == "stream":
            return self.decode(latents, callback=callback)
        return np.array(latents) if output == "latents" else self._frames(latents, callback)

    def _check(self, request: Request, output: str) -> None:
        if output not in OUTPUTS:
            raise ValueError(f"output is {output!r}; one of {OUTPUTS} is needed")
        at_once = request.noise_shape[0] if output == "stream" else 1
        self.make_room([request], at_once=at_once)

    def encode_text(self, prompts: Sequence[str], callback: Callback | None = None) -> np.ndarray:
        """UMT5 states [b, s, d] of the cleaned prompts, zero past each text; on the host."""
        ids, mask = tokenizer.tokenize(self.tokenizer, prompts, length=self.config.dit.text_len)
        contexts = []
        with self._stage("umt5", callback) as network:
            tell(callback, "encode", 0, len(prompts))
            # None where the network is on the CPU.
            layout = self._layout("umt5") if spread.lies_on(network, self.layout) else None
            for i in range(len(prompts)):  # one by one: a text's states do not know its neighbours
                states = _program(umt5.encode, layout)(network, ids[i : i + 1], mask[i : i + 1])
                contexts.append(np.asarray(states)[0])
                tell(callback, "encode", i + 1, len(prompts))
            del network
        return np.stack(contexts)

    def encode_images(self, request: Request, callback: Callback | None = None) -> Known | None:
        """What the images of a request tell of its videos; None for text to video."""
        if not request.images:
            return None
        tokens = self.encode_views(np.stack([frame.view for frame in request.images]), callback)
        return Known(self.encode_known(request, callback), tokens)

    def encode_views(self, views: np.ndarray, callback: Callback | None = None) -> np.ndarray:
        """CLIP's tokens [1, s, d], float32, of what it sees of a request's images.

        views: [n, side, side, 3] float32 in -1..1, n = 1, or 2 with a last frame.
        """
        with self._stage("clip", callback) as tower:
            tell(callback, "clip", 0, 1)
            run = _program(see, self.layout)
            tokens = np.asarray(run(tower, self._put(views)), np.float32)
            tell(callback, "clip", 1, 1)
            del tower
        return tokens.reshape(1, -1, tokens.shape[-1])

    def encode_known(self, request: Request, callback: Callback | None = None) -> np.ndarray:
        """Known.channels of a request with images."""
        stride, frames = self.config.vae.temporal_stride, request.images
        _, height, width, _ = request.latent_shape
        last = frames[1].pixels if len(frames) > 1 else None
        chunks = conditioning.pixel_chunks(
            frames[0].pixels, frames=request.frames, last=last, stride=stride
        )
        latents = self._encode(chunks, request.latent_shape, "the image", callback)
        mask = conditioning.mask_bthwc(
            request.frames, height=height, width=width, last=last is not None, stride=stride
        )
        return np.concatenate([mask, latents], axis=-1)

    def encode_video(self, pixels: np.ndarray, callback: Callback | None = None) -> np.ndarray:
        """Latents [1, t, h, w, z], float32, of a video: what denoising it should end in.

        pixels: float32 [f, y, x, 3] in -1..1, f = 4n + 1, sides in multiples of 16. Raises
        ValueError for another shape, sampler.DivergedError for latents that are not finite.
        """
        chunks = conditioning.video_chunks(pixels, stride=self.config.vae.temporal_stride)
        shape = latent_shape(self.config, size=pixels.shape[2:0:-1], frames=len(pixels))
        return self._encode(chunks, shape, "the video", callback)

    def _encode(
        self, chunks: Iterator[np.ndarray], shape: tuple[int, ...], what: str, on: Callback | None
    ) -> np.ndarray:
        """Latents [1, *shape] of the chunks of `what`; shape: [t, h, w, z]. on: the callback."""
        latents: list[np.ndarray] = []
        tiles = self._room.tiling("encode", self.config.vae, shape).tiles
        run = functools.partial(streaming.encode, dtype=self.dtype, layout=self.layout, tiles=tiles)
        with self._stage("vae", on) as network:
            tell(on, "image", 0, shape[0])
            for latent in run(network, chunks, what=what):
                latents.append(latent)
                tell(on, "image", len(latents), shape[0])
            del network
        return np.concatenate(latents, axis=1)

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
        if not isinstance(latents, jax.Array):
            latents = np.asarray(latents)  # and there it stays where the VAE runs in tiles
        return self._stream(latents.astype(jnp.float32), dtype, callback)

    def _frames(self, latents: Array, callback: Callback | None) -> np.ndarray:
        """uint8 [b, f, y, x, 3], decoded one video at a time."""
        with self._stage("vae", callback) as network:
            videos = [
                np.concatenate(
                    list(self._decode(network, latents[k : k + 1], "uint8", callback)), 1
                )
                for k in range(latents.shape[0])
            ]
            del network
        return np.concatenate(videos)

    def _stream(
        self, latents: Array | np.ndarray, dtype: str, callback: Callback | None
    ) -> Iterator[np.ndarray]:
        with self._stage("vae", callback) as network:
            yield from self._decode(network, latents, dtype, callback)
            del network

    def _decode(
        self, network: Any, latents: Array | np.ndarray, dtype: str, callback: Callback | None
    ) -> Iterator[np.ndarray]:
        batch, count = latents.shape[:2]
        tiling = self._room.tiling("decode", self.config.vae, latents.shape[1:], batch)
        tell(callback, "decode", 0, count)
        for frames, done in streaming.decode(
            network,
            latents,
            pixels=dtype,
            dtype=self.dtype,
            layout=self.layout,
            tiles=tiling.tiles,
            chunk=tiling.chunk,
        ):
            if frames.shape[1]:  # tiles tell of what is done before there are any
                yield frames
            tell(callback, "decode", done, count)

    def denoise(
        self,
        request: Request,
        context: Any,
        start: Array | sampler.Carry,
        callback: Callback | None = None,
        *,
        known: Known | None = None,
    ) -> Array:
        """Latents [b, t, h, w, c] float32 of a request.

        context: states [n, s, d] of request.texts. start: noise [b, t, h, w, c], or the carry of
        an interrupted run of the same request. known: of encode_images(request). Raises
        sampler.DivergedError naming the step at which latents became NaN or infinite.
        """
        wanted = request.latent_shape[:3] if request.images else None
        given = None if known is None else known.channels.shape[1:4]
        if given != wanted:
            raise ValueError(
                f"known is of a video of shape {given}; [t, h, w] = {wanted} is needed"
            )
        done = 0
        if isinstance(start, sampler.Carry):
            done, start = start.done, start._replace(state=self._put(start.state))
        else:
            start = self._put(start)

        def on_step(carry: sampler.Carry, steps: int) -> None:
            assert callback is not None
            callback(Progress("denoise", carry.done, steps, carry.state.x, carry))

        with self._stage("dit", callback) as network:
            tell(callback, "denoise", done, len(request.schedule.table))
            tokens = None if known is None else known.tokens
            conds = self._conditions(network, context, request, tokens)
            return sampler.sample(
                network,
                start,
                request.schedule,
                conds,
                guidance=request.guidance,
                known=None if known is None else self._put(known.channels),
                on_step=None if callback is None else on_step,
                layout=self._layout("dit"),
            )

    def _conditions(
        self, network: DiT, context: Any, request: Request, tokens: np.ndarray | None
    ) -> tuple[Cond, ...]:
        """Conditions of the videos and, where the context has one row more, of the negative prompt.

        tokens: [1, s, d] of the images, for all of them.
        """
        prepare = _program(DiT.prepare, self._layout("dit"))
        n, b = len(request.prompts), len(request.prompts) * request.num_videos
        rows = [np.repeat(context[:n], request.num_videos, axis=0)]
        if context.shape[0] > n:
            rows.append(np.repeat(context[n:], b, axis=0))
        images = () if tokens is None else (self._put(np.repeat(tokens, b, axis=0)),)
        return tuple(prepare(network, self._put(row), *images) for row in rows)

    def _layout(self, part: str) -> Layout | None:
        """The layout with the network's own way of splitting weights."""
        return None if self.layout is None else self.layout.of_weights(split=part in self.split)

    def _put(self, arrays: Any) -> Any:
        """The arrays where the networks are."""
        return streaming.place(arrays, self.layout)

    def _noise(self, request: Request, noise: Any) -> Array:
        if noise is None:
            drawn = noise_module.initial_noise(
                request.seed, request.num_videos, shape=request.latent_shape
            )
            return jnp.tile(drawn, (len(request.prompts), 1, 1, 1, 1))
        return jnp.asarray(check_noise(noise, request.noise_shape))


def see(tower: clip.CLIP, views: Array, *, fetch: None = None) -> Array:
    """CLIP's tokens [n, s, d] of views [n, side, side, 3], float32 in -1..1."""
    del fetch  # the tower is whole on every device
    return clip.encode(tower, clip.normalise(views))


_program = functools.cache(spread.program)
