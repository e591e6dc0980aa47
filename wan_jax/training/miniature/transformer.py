"""The stages "t2v", "i2v" and "flf2v": the transformers, and with them what reads their prompts.

The text encoder, which can read by then (reader.py), learns with the first, through its loss, and
the CLIP tower with the second; the others find them as they are. Each transformer begins from the
weights of the one before it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax import clip, sharding, umt5
from wan_jax.dit import DiT
from wan_jax.tokenizer import load_tokenizer
from wan_jax.training import flow, loop
from wan_jax.training.miniature import autoencoder, files, networks, running
from wan_jax.training.miniature.pool import Batch, Pool, make_groups
from wan_jax.training.optimizer import OptimizerConfig
from wan_jax.training.step import Params, State
from wan_jax.weights import trees
from wan_jax.weights.sources import abstract_part

Array = jax.Array
Arrays = dict[str, Any]


class Phase(NamedTuple):
    """A training of its own: steps on first frames alone, then on clips.

    pairs: share of the clips that show two objects.
    """

    name: str
    stills: int
    moving: int
    learning_rate: float
    pairs: float


class Recipe(NamedTuple):
    """How a stage is run.

    clips: that are drawn for each phase. trained: besides the transformer; frozen: read from
    earlier stages.
    """

    phases: tuple[Phase, ...]
    clips: int
    batch_size: int
    trained: tuple[str, ...]
    frozen: tuple[str, ...]


RECIPES = {
    "t2v": Recipe((Phase("texts", 3000, 20_000, 3e-3, 0.6),), 32_768, 256, ("umt5",), ()),
    "i2v": Recipe((Phase("images", 0, 6000, 1e-3, 0.4),), 16_384, 256, ("clip",), ("umt5",)),
    "flf2v": Recipe((Phase("images", 0, 4000, 1e-3, 0.4),), 16_384, 256, (), ("umt5", "clip")),
}
# Whose weights a stage begins from.
_BEFORE = {"t2v": ("reader",), "i2v": ("t2v",), "flf2v": ("i2v",)}
# What a caption says of an object shows in some thousand latent numbers that move together, so it
# can be read off a clip unless nearly all of it is noise; only there is the caption needed.
FLOW = flow.FlowConfig(sampling="uniform", shift=12.0, image_dropout=0.05, remat="products")


def train(
    stage: str,
    out: Path,
    *,
    seed: int,
    recipe: Recipe | None = None,
    tell: Callable[[loop.Report], None] | None = None,
    notify: Callable[[str], None] = lambda _: None,
    stop: running.Stop = running.never,
) -> None:
    """Train a transformer and write OUT/<network>.safetensors of all that learned.

    stage: of networks.DITS. Needs OUT/tokenizer and the files of the stages before; ValueError
    naming what is missing. Several devices share each batch. stop: see running.run().
    """
    recipe = recipe or RECIPES[stage]
    names = ("tokenizer", "vae", *recipe.frozen, *_BEFORE[stage])
    training = _Training(stage, out, recipe, files.digests(out, names), tell, notify, stop)
    params = begin(stage, out, recipe, seed)
    for number, phase in enumerate(recipe.phases):
        state = training.run(phase, params, seed + number, begun=number > 0)
        params = jax.tree.map(np.asarray, state.ema)
    finish(stage, out, params)


@dataclasses.dataclass(frozen=True)
class _Training:
    """What the phases of a stage share; inputs: digests of the files that it reads."""

    stage: str
    out: Path
    recipe: Recipe
    inputs: dict[str, str]
    tell: Callable[[loop.Report], None] | None
    notify: Callable[[str], None]
    stop: running.Stop

    def run(self, phase: Phase, params: Params, seed: int, *, begun: bool) -> State:
        """One phase, from these weights or from its newest checkpoint.

        seed: of its own, as each draws other clips. begun: whether another phase made the weights.
        """
        devices, rows = jax.devices(), self.recipe.batch_size
        layout = sharding.make_layout(1, devices=devices[: math.gcd(len(devices), rows)])
        # Drawn only if there are steps to do.
        pool = functools.cache(functools.partial(self._pool, phase, seed, layout))
        frozen = {name: files.network(self.out, name)[0] for name in self.recipe.frozen}
        steps = phase.stills + phase.moving
        return running.run(
            params,
            functools.partial(loss, self.stage),
            lambda step: pool().batch(step),
            self.out / self.stage / phase.name,
            optimizer=OptimizerConfig(
                steps=steps,
                learning_rate=phase.learning_rate,
                warmup_steps=min(300, steps // 10),
                final_ratio=0.02,
                beta2=0.98,
                ema_decay=0.998,
            ),
            loop=loop.LoopConfig(seed=seed, log_every=50, checkpoint_every=1000),
            facts={
                "phase": list(phase),
                "clips": self.recipe.clips,
                "batch_size": rows,
                "network": networks.DITS[self.stage].to_dict(),
                "inputs": self.inputs,
                "before": {k: files.digest(v) for k, v in params.items()} if begun else {},
            },
            frozen=layout.whole(frozen) if frozen else None,
            layout=layout,
            on_report=self.tell,
            stop=self.stop,
        )

    def _pool(self, phase: Phase, seed: int, layout: sharding.Layout) -> Pool:
        """The clips of a phase, drawn and encoded."""
        text = load_tokenizer(files.tokenizer(self.out))
        images, clips = networks.DITS[self.stage].images, self.recipe.clips
        self.notify(f"encoding {clips} clips")
        arrays, vae_config = files.network(self.out, "vae")

        def tell(done: int, total: int) -> None:
            if done % 4096 == 0:
                self.notify(f"{done} of {total} clips")

        groups = make_groups(
            autoencoder.build(vae_config, arrays, jnp.bfloat16),
            images=images,
            clips=clips,
            pairs=phase.pairs,
            seed=seed,
            tell=tell,
        )
        return Pool(
            groups,
            text,
            images=images,
            batch_size=self.recipe.batch_size,
            seed=seed,
            stills=phase.stills,
            layout=layout,
        )


def finish(stage: str, out: Path, params: Params) -> None:
    """Write the weights of all that learned, rounded as they are shipped."""
    for name, arrays in params.items():
        configs = {"dit": networks.DITS[stage], "umt5": networks.UMT5, "clip": networks.CLIP}
        file = out / f"{files.parts(stage)[name]}.safetensors"
        files.write(file, files.rounded(arrays), configs[name].to_dict())


def begin(stage: str, out: Path, recipe: Recipe, seed: int) -> Params:
    """The weights that a stage starts from."""
    config, keys = networks.DITS[stage], nnx.Rngs(seed)
    params = {"dit": trees.flatten(DiT(config, rngs=keys, dtype=jnp.float32))}
    if "umt5" in recipe.trained:
        read, _ = files.network(out, "reader")
        params["umt5"] = jax.tree.map(jnp.asarray, read)
    if "clip" in recipe.trained:
        params["clip"] = trees.flatten(clip.CLIP(networks.CLIP, rngs=keys, dtype=jnp.float32))
    if stage != "t2v":
        before, _ = files.network(out, _BEFORE[stage][0])
        params["dit"] = grown(params["dit"], before)
    return params


def grown(new: Arrays, old: Arrays) -> Arrays:
    """The arrays of `new` with those of a transformer that takes less; what it lacks begins at 0.

    Input channels that are added count for nothing at first, nor do the image tokens.
    """
    found = dict(new)
    for name, array in old.items():
        if array.shape == new[name].shape:
            found[name] = array
        else:  # the patch embedding: channels are its last axis but one
            added = new[name].shape[-2] - array.shape[-2]
            found[name] = np.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, added), (0, 0)])
    for name in set(new) - set(old):
        if "v_img" in name:
            found[name] = np.zeros(new[name].shape, np.float32)
    return found


def network(config: Any, arrays: Arrays, dtype: Any) -> Any:
    """The module of {dotted path: array} in the dtypes of a run."""
    return trees.fill_as(abstract_part(config, jnp.dtype(dtype)), arrays)


def loss(
    stage: str, params: Params, frozen: Any, batch: Batch, key: Array
) -> tuple[Array, dict[str, Array]]:
    """The flow's loss of a batch, through all networks that read the captions and the images."""
    every = (frozen or {}) | params
    dtype = jnp.bfloat16
    text = network(networks.UMT5, every["umt5"], dtype)
    context = umt5.encode(text, batch.ids, batch.mask)
    tokens = None
    if batch.views is not None:
        b, images = batch.views.shape[:2]
        # bfloat16 here: gradients leave the range of float16.
        tower = _clip(every["clip"], dtype)
        views = batch.views.reshape(b * images, *batch.views.shape[2:])
        found = clip.encode(tower, clip.normalise(views))
        tokens = found.reshape(b, -1, found.shape[-1])
    dit = network(networks.DITS[stage], every["dit"], dtype)
    images = {"known_bthwc": batch.known, "tokens_bsd": tokens}
    found = flow.loss(dit, batch.latents, context, key, FLOW, fold=True, **images)
    return jnp.mean(found), {}


def _clip(arrays: Arrays, dtype: Any) -> clip.CLIP:
    module = trees.abstract(lambda: clip.CLIP(networks.CLIP, rngs=nnx.Rngs(0), dtype=dtype))
    return trees.fill_as(module, arrays)
