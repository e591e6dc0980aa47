"""The stage "vae": the autoencoder learns to draw the world again from few numbers.

It first learns to draw, from single frames, which are many for the work they make, then from clips.
Then its latents become ones that a transformer learns easily. Afterwards their mean and deviation
are measured, with which they are normalised from then on.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from wan_jax import vae, xla
from wan_jax.config import VAEConfig
from wan_jax.training import loop
from wan_jax.training.miniature import files, networks, running, world
from wan_jax.training.miniature.render import render
from wan_jax.training.miniature.whole import moments, reconstruct
from wan_jax.training.optimizer import OptimizerConfig
from wan_jax.training.step import Params, State
from wan_jax.weights import trees

Array = jax.Array


class Phase(NamedTuple):
    """A training of its own: steps on single frames, then on clips.

    kl_weight: what a nat for each latent number costs, in squared pixel values. small_weight: what
    it costs that latents of half the size are not drawn as clips of half the size.
    """

    name: str
    stills: int
    moving: int
    learning_rate: float
    kl_weight: float
    small_weight: float = 0.0


PHASES = (
    Phase("draw", 2500, 5000, 1e-3, 1e-5),
    Phase("settle", 0, 2500, 5e-4, 3e-5, small_weight=0.5),
)
L1_WEIGHT = 0.05
_STILLS, _CLIPS = 64, 8  # a step
_FRAMES = 17  # of a clip, from anywhere in it
_CROWD = 4  # scenes whose objects are shown in one: shapes are what is hard to draw
_ALONE = 0.25  # share of clips as they are
_OTHER = 0.25  # share of objects of any colour
_MEASURED = 256  # clips that the latents are measured on
_LOGVAR = (-20.0, 10.0)
_TEST_SEED = 1_000_000
Tell = Callable[[loop.Report], None]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["fields"], meta_fields=["size", "frames"]
)
@dataclasses.dataclass(frozen=True)
class Clips:
    """Scenes to draw, of one size (width, height) and number of frames."""

    fields: dict[str, Any]
    size: tuple[int, int]
    frames: int


def batch(step: int, *, seed: int, stills: int) -> Clips:
    """The clips of a step, a function of step and seed. stills: how many steps see single frames.

    Scenes of all sizes are seen through a window of one, so that one program serves them.
    """
    rng = np.random.default_rng((seed, step))
    count, frames = (_STILLS, 1) if step < stills else (_CLIPS, _FRAMES)
    start = int(rng.integers(0, world.FRAMES - frames + 1))
    return Clips(cut(crowds(rng, count), start, frames), world.FRAME_SIZES[0], frames)


def crowds(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """Fields of clips most of which show the objects of a few others, too.

    Some objects are of any colour: what is trained later may bring new ones.
    """
    fields = windows(rng, count, spoil=networks.SPOILED)
    other = rng.random(fields["shape"].shape) < _OTHER
    fields["rgb"][other] = rng.random((int(other.sum()), 3))
    own = ("position", "radius", "opacity", "shape", "rgb")
    parts = [{k: np.roll(fields[k], i, axis=0) for k in own} for i in range(_CROWD)]
    alone = rng.random(count) < _ALONE
    for part in parts[1:]:
        part["opacity"][alone] = 0.0
    return fields | {k: np.concatenate([part[k] for part in parts], axis=1) for k in own}


def windows(rng: np.random.Generator, count: int, **choices: Any) -> dict[str, np.ndarray]:
    """Fields of clips of all sizes, each moved to where the window opens on it."""
    found, sizes = [], world.FRAME_SIZES
    for size, some in zip(sizes, rng.multinomial(count, [1 / len(sizes)] * len(sizes))):
        if some:
            fields = world.fields([_draw(rng, size, **choices) for _ in range(some)])
            spare = np.array(size) - sizes[0]
            opening = np.round(rng.random((some, 1, 1, 2)) * spare)
            fields["position"] -= opening.astype(np.float32)
            found.append(fields)
    return {k: np.concatenate([fields[k] for fields in found]) for k in found[0]}


def _draw(rng: np.random.Generator, size: tuple[int, int], **choices: Any) -> world.Scene:
    return world.draw(rng, size=size, frames=world.FRAMES, **choices)


def cut(fields: dict[str, np.ndarray], start: int, frames: int) -> dict[str, np.ndarray]:
    """So many frames of the fields, from this one on."""
    span = slice(start, start + frames)
    found = fields | {k: fields[k][:, :, span] for k in ("position", "radius", "opacity")}
    return found | {"brightness": fields["brightness"][:, span]}


def loss(
    params: Params,
    _: Any,
    clips: Clips,
    key: Array,
    *,
    kl_weight: float,
    small_weight: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """What is wrong with the pixels, a little of KL to a Gaussian, and the same at half the size.

    The last (scale equivariance, Skorokhodov et al. 2025) keeps latents from being a code that
    changes altogether when an object moves by a few pixels, which a transformer hardly learns.
    """
    network = build(networks.VAE, params["vae"], jnp.bfloat16)
    frames = render(clips.fields, size=clips.size, frames=clips.frames)
    mean, logvar = moments(network, frames.astype(jnp.bfloat16))
    logvar = jnp.clip(logvar, *_LOGVAR)
    raw = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, jnp.float32)
    cost, squares = _wrong(network, raw, frames)
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
    total, told = cost + kl_weight * kl, {"psnr": psnr(squares), "kl": kl}
    if small_weight:
        cost, squares = _wrong(network, _halved(raw), _halved(frames))
        total, told = total + small_weight * cost, told | {"psnr_small": psnr(squares)}
    return total, told


def _wrong(network: vae.VAE, raw: Array, frames: Array) -> tuple[Array, Array]:
    """What decoded latents cost, and their squared error alone."""
    error = reconstruct(network, raw.astype(jnp.bfloat16)) - frames
    squares = jnp.mean(jnp.square(error))
    return squares + L1_WEIGHT * jnp.mean(jnp.abs(error)), squares


def _halved(x: Array) -> Array:
    """[b, t, y, x, c] at half the height and width, as means."""
    b, t, height, width, c = x.shape
    return x.reshape(b, t, height // 2, 2, width // 2, 2, c).mean((3, 5))


def start(seed: int) -> dict[str, Array]:
    """Weights to start from, which learn faster than purely random ones.

    Residual blocks begin near the identity, and so does time: what halves it takes the mean, what
    doubles it repeats.
    """
    arrays = trees.flatten(vae.VAE(networks.VAE, rngs=nnx.Rngs(seed)))
    for name, kernel in arrays.items():
        if name.endswith("conv2.kernel"):
            arrays[name] = 0.1 * kernel
        elif name.endswith("time.kernel"):
            arrays[name] = 0.1 * kernel + _identity_in_time(kernel.shape)
    return arrays


def _identity_in_time(shape: tuple[int, ...]) -> np.ndarray:
    """A kernel [r c, 3, 1, 1, c]: the mean of the frames if r is 1, else the last one, r times."""
    d_out, window, _, _, c = shape
    kernel = np.zeros(shape, np.float32)
    for i in range(d_out):
        if d_out == c:
            kernel[i, :, 0, 0, i] = 1 / window
        else:
            kernel[i, -1, 0, 0, i % c] = 1.0
    return kernel


def psnr(squares: Array) -> Array:
    """Decibels of a mean squared error of values in -1..1."""
    return -10.0 * jnp.log10(jnp.maximum(squares, 1e-10) / 4.0)


def build(config: VAEConfig, arrays: Any, dtype: Any) -> vae.VAE:
    """The network of {dotted path: array}, in this dtype."""
    abstract = trees.abstract(lambda: vae.VAE(config, rngs=nnx.Rngs(0), dtype=dtype))
    return trees.fill_as(abstract, arrays)


def train(
    out: Path,
    *,
    seed: int,
    phases: tuple[Phase, ...] = PHASES,
    tell: Tell | None = None,
    stop: running.Stop = running.never,
) -> None:
    """Train, measure the latents, and write OUT/vae.safetensors. stop: see running.run()."""
    arrays, inputs = start(seed), None
    for phase in phases:
        state = _run(arrays, phase, out / "vae" / phase.name, seed, tell, stop, inputs)
        arrays = state.ema["vae"]
        inputs = {phase.name: files.digest(arrays)}
    finish(out, arrays)


def _run(
    arrays: Any,
    phase: Phase,
    out: Path,
    seed: int,
    tell: Tell | None,
    stop: running.Stop,
    inputs: dict[str, str] | None,
) -> State:
    """One phase, from these weights or from its newest checkpoint.

    inputs: the phase that the weights come of, and their digest; None for those of the seed, whose
    last bits the device decides.
    """
    steps = phase.stills + phase.moving
    return running.run(
        {"vae": arrays},
        functools.partial(loss, kl_weight=phase.kl_weight, small_weight=phase.small_weight),
        functools.partial(batch, seed=seed, stills=phase.stills),
        out,
        optimizer=OptimizerConfig(
            steps=steps,
            learning_rate=phase.learning_rate,
            warmup_steps=min(200, steps // 10),
            final_ratio=0.01,
            beta2=0.99,
            weight_decay=0.0,
            ema_decay=0.998,
        ),
        loop=loop.LoopConfig(seed=seed, log_every=50, checkpoint_every=1000),
        facts={"phase": list(phase), "network": networks.VAE.to_dict(), "inputs": inputs},
        on_report=tell,
        stop=stop,
    )


def finish(out: Path, trained: Any) -> None:
    """Write weights, rounded as they are shipped, with what is measured of them."""
    arrays = files.rounded(trained)
    files.write(out / "vae.safetensors", arrays, measured(arrays).to_dict())


def held_out_scenes(count: int, size: tuple[int, int]) -> list[world.Scene]:
    """Scenes whose objects are never trained on."""
    rng = np.random.default_rng((_TEST_SEED, *size))
    return [_draw(rng, size, held_out=True) for _ in range(count)]


def measured(arrays: dict[str, np.ndarray]) -> VAEConfig:
    """The configuration with mean and deviation of every latent channel.

    The deviation is that of sampled latents, though means are what is encoded: a channel that tells
    nothing has a small mean and much noise, and is not to be blown up.
    """
    network = build(networks.VAE, arrays, jnp.float32)
    rng = np.random.default_rng(_TEST_SEED)
    found = []
    for _ in range(_MEASURED // 4):
        encoded = _encode(network, windows(rng, 4), size=world.FRAME_SIZES[0])
        mean, logvar = (np.asarray(x, np.float64) for x in encoded)
        numbers = [mean, np.square(mean) + np.exp(np.clip(logvar, *_LOGVAR))]
        found.append([x.mean((0, 1, 2, 3)) for x in numbers])
    mean, squares = np.mean(found, axis=0)
    std = np.sqrt(squares - mean**2)
    return dataclasses.replace(
        networks.VAE,
        latents_mean=tuple(round(float(x), 4) for x in mean),
        latents_std=tuple(round(float(x), 4) for x in std),
    )


@functools.partial(xla.jit, static_argnames=("size",))
def _encode(network: vae.VAE, fields: Any, *, size: tuple[int, int]) -> tuple[Array, Array]:
    frames = render(fields, size=size, frames=world.FRAMES)
    return moments(network, frames, precision=lax.Precision.DEFAULT)


def reconstruction(arrays: dict[str, np.ndarray], config: VAEConfig, *, count: int) -> list[float]:
    """PSNR in dB of `count` held-out clips of every size, through the latents and back."""
    network = build(config, arrays, jnp.float32)

    @functools.partial(xla.jit, static_argnames=("size",))
    def error(network: vae.VAE, fields: Any, *, size: tuple[int, int]) -> Array:
        frames = render(fields, size=size, frames=world.FRAMES)
        default = lax.Precision.DEFAULT
        latents = vae.encode(network, frames, chunk=8, precision=default)
        again = vae.decode(network, latents, chunk=8, precision=default)
        return jax.vmap(psnr)(jnp.mean(jnp.square(again - frames), axis=(1, 2, 3, 4)))

    found: list[float] = []
    for size in world.FRAME_SIZES:
        scenes = held_out_scenes(count, size)
        for start in range(0, count, 8):
            part = world.fields(scenes[start : start + 8])
            found += np.asarray(error(network, part, size=size)).tolist()
    return found
