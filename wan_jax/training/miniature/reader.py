"""The stage "reader": the text encoder learns which words tell of which object.

Through the loss of a transformer it hardly would: two objects that have swapped their shapes or
motions cost little beside all that has to be drawn. So it first learns to tell, at the word of a
colour, what else is said of the object of that colour. What it tells this with is thrown away.
"""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from wan_jax import umt5
from wan_jax.tokenizer import load_tokenizer, tokenize
from wan_jax.training import loop
from wan_jax.training.miniature import captions, files, networks, running, world
from wan_jax.training.miniature.world import Scene
from wan_jax.training.optimizer import OptimizerConfig
from wan_jax.training.step import Params
from wan_jax.weights import trees

Array = jax.Array
TOLD = {"shape": tuple(world.SHAPES), "size": tuple(world.SIZES), "motion": tuple(world.MOTIONS)}
_NONE = -1
_ABLE = 40.0  # how much larger the tables of positions begin: words look at their neighbours
_PAIRS = 0.75  # share of scenes with two objects


class Recipe(NamedTuple):
    """How the stage is run: `captions` of every one of so many scenes are drawn once."""

    steps: int
    batch_size: int
    learning_rate: float
    scenes: int
    captions: int


RECIPE = Recipe(steps=3000, batch_size=256, learning_rate=2e-3, scenes=16_384, captions=8)


class Batch(NamedTuple):
    """Captions; int32.

    ids, mask: [b, s]. place: [b, 2], the token of each object's colour. told: [b, 2, 3], what is
    said of it, as indices into the values of TOLD; -1 where there is no such object or word.
    """

    ids: Any
    mask: Any
    place: Any
    told: Any


def train(
    out: Path,
    *,
    seed: int,
    recipe: Recipe = RECIPE,
    tell: Callable[[loop.Report], None] | None = None,
    stop: running.Stop = running.never,
) -> None:
    """Train and write OUT/reader.safetensors. Needs OUT/tokenizer; ValueError says so.

    stop: see running.run().
    """
    inputs = files.digests(out, ["tokenizer"])
    book = functools.cache(functools.partial(_book, out, recipe, seed))

    def batch(step: int) -> Batch:
        every = book()
        rows = np.random.default_rng((seed, step)).integers(len(every.ids), size=recipe.batch_size)
        return Batch(*(x[rows] for x in every))

    state = running.run(
        _begin(seed),
        loss,
        batch,
        out / "reader",
        optimizer=OptimizerConfig(
            steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            warmup_steps=min(200, recipe.steps // 10),
            final_ratio=0.02,
            beta2=0.98,
            ema_decay=0.99,
        ),
        loop=loop.LoopConfig(seed=seed, log_every=50, checkpoint_every=1000),
        facts={"recipe": list(recipe), "network": networks.UMT5.to_dict(), "inputs": inputs},
        on_report=tell,
        stop=stop,
    )
    files.write(out / "reader.safetensors", state.ema["umt5"], networks.UMT5.to_dict())


def loss(params: Params, _: Any, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of what is told of the objects, summed over TOLD; and how much is right."""
    del key
    text = trees.fill_as(trees.abstract(_network), params["umt5"])
    states = umt5.encode(text, batch.ids, batch.mask)
    states = jnp.take_along_axis(states, batch.place[..., None], axis=1).astype(jnp.float32)
    total, right = jnp.zeros(()), {}
    for i, name in enumerate(TOLD):
        told = batch.told[..., i]
        known = (told != _NONE).astype(jnp.float32)
        count = jnp.maximum(jnp.sum(known), 1.0)
        logits = states @ params["heads"][f"{name}.kernel"]
        with jax.numpy_dtype_promotion("standard"):
            costs = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(told, 0))
        hits = (jnp.argmax(logits, -1) == told).astype(jnp.float32)
        total += jnp.sum(known * costs) / count
        right[name] = jnp.sum(known * hits) / count
    return total, right


def places(text: Any, told: Sequence[str], colours: Sequence[str], *, length: int) -> np.ndarray:
    """The token of each text with which its colour, or the space before, begins, int32.

    -1 where it is cut off. text: the tokenizer; length: that tokenize() cuts to. Raises ValueError
    for a text without it.
    """
    found = np.full(len(told), _NONE, np.int32)
    for row, (sentence, colour) in enumerate(zip(told, colours, strict=True)):
        word = re.search(rf"\b{colour}\b", sentence.lower())
        if word is None:
            raise ValueError(f"{sentence!r} does not say {colour!r}")
        token = len(text.encode(sentence[: word.start()].rstrip()).ids) - 1  # its end mark
        if token < length - 1:
            found[row] = token
    return found


def _network() -> umt5.UMT5:
    return umt5.UMT5(networks.UMT5, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)


def _begin(seed: int) -> Params:
    text = trees.flatten(umt5.UMT5(networks.UMT5, rngs=nnx.Rngs(seed), dtype=jnp.float32))
    text["layers.position"] = _ABLE * text["layers.position"]
    width = networks.UMT5.dim
    heads = {f"{name}.kernel": jnp.zeros((width, len(values))) for name, values in TOLD.items()}
    return {"umt5": text, "heads": heads}


def _book(out: Path, recipe: Recipe, seed: int) -> Batch:
    """All captions that are ever read."""
    text, rng = load_tokenizer(files.tokenizer(out)), np.random.default_rng((seed, 1))
    scenes: list[Scene] = []
    for _ in range(recipe.scenes):
        count = 1 + int(rng.random() < _PAIRS)
        scenes.append(world.draw(rng, count=count, size=world.FRAME_SIZES[0], frames=5))
    scenes = [scene for scene in scenes for _ in range(recipe.captions)]
    sentences = [captions.caption(scene, rng) for scene in scenes]
    length = networks.TEXT_TOKENS
    ids, mask = tokenize(text, sentences, length=length)
    place = np.full((len(scenes), 2), _NONE, np.int32)
    told = np.full((len(scenes), 2, len(TOLD)), _NONE, np.int32)
    for i in range(2):
        rows = [row for row, scene in enumerate(scenes) if len(scene.objects) > i]
        things = [scenes[row].objects[i] for row in rows]
        colours = [thing.colour for thing in things]
        place[rows, i] = places(text, [sentences[row] for row in rows], colours, length=length)
        told[rows, i] = [
            [values.index(getattr(thing, name)) for name, values in TOLD.items()]
            for thing in things
        ]
    told[place == _NONE] = _NONE
    return Batch(ids, mask, np.maximum(place, 0), told)
