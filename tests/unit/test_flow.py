"""What the transformer is trained to do, against formulas written out here."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests import tolerances
from wan_jax.training import finetune, flow
from wan_jax.training.batches import Batch
from wan_jax.training.flow import FlowConfig
from wan_jax.training.optimizer import OptimizerConfig, make_optimizer
from wan_jax.training.step import make_state, make_step

SHAPE = (6, 2, 3, 4, 5)


class Network:
    """It notes what it is given, and answers with a velocity of its own."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def prepare(self, context: jax.Array, image: jax.Array | None, *, fold: bool) -> str:
        self.given |= {"context": context, "image": image, "fold": fold}
        return "conditions"

    def __call__(self, x: jax.Array, t: jax.Array, cond: str, *, remat: str) -> jax.Array:
        self.given |= {"x": x, "t": t, "cond": cond, "remat": remat}
        return jnp.sin(x[..., : SHAPE[-1]])


def arrays(*shapes: tuple[int, ...]) -> list[jax.Array]:
    stream = np.random.RandomState(1)
    return [jnp.asarray(stream.standard_normal(s), jnp.float32) for s in shapes]


def run(network: Any, config: FlowConfig, **images: jax.Array) -> tuple[np.ndarray, jax.Array]:
    """The losses, and the clean latents."""
    clean, context = arrays(SHAPE, (6, 7, 8))
    key = jax.random.PRNGKey(5)
    return np.asarray(flow.loss(network, clean, context, key, config, **images)), clean


def test_the_network_is_shown_a_mixture_and_learns_the_velocity() -> None:
    """x = (1 - s) clean + s noise, t = 1000 s, and what is learned is noise - clean."""
    network = Network()
    losses, clean = run(network, FlowConfig(remat="attention"))
    x, t = np.asarray(network.given["x"]), np.asarray(network.given["t"])
    share = (t / 1000.0)[:, None, None, None, None]
    assert np.all((share > 0) & (share < 1)) and len(set(t.tolist())) == 6
    noise = (x - (1 - share) * clean) / share
    assert abs(noise.mean()) < 0.3 and abs(noise.std() - 1.0) < 0.2
    velocity = np.sin(x)
    expected = np.mean((velocity - (noise - clean)) ** 2, axis=(1, 2, 3, 4))
    np.testing.assert_allclose(losses, expected, rtol=tolerances.TRAINING_FORMULA)
    assert network.given["cond"] == "conditions" and network.given["remat"] == "attention"


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_images_are_dropped_in_both_forms(rate: float) -> None:
    network = Network()
    known, tokens = arrays((*SHAPE[:4], 3), (6, 9, 4))
    run(network, FlowConfig(image_dropout=rate), known_bthwc=known, tokens_bsd=tokens)
    wanted = 0.0 if rate else 1.0
    np.testing.assert_array_equal(network.given["x"][..., SHAPE[-1] :], wanted * known)
    np.testing.assert_array_equal(network.given["image"], wanted * tokens)


def test_the_same_clips_lose_both_forms_of_their_images() -> None:
    network = Network()
    known, tokens = jnp.ones((*SHAPE[:4], 3)), jnp.ones((6, 9, 4))
    run(network, FlowConfig(image_dropout=0.5), known_bthwc=known, tokens_bsd=tokens)
    kept = np.asarray(network.given["x"][..., SHAPE[-1] :]).max((1, 2, 3, 4))
    np.testing.assert_array_equal(kept, np.asarray(network.given["image"]).max((1, 2)))
    assert 0 < kept.sum() < 6
    with pytest.raises(ValueError, match="one of them is missing"):
        run(network, FlowConfig(), known_bthwc=known)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_caption_is_dropped_for_the_empty_one(rate: float) -> None:
    network = Network()

    class Trained:
        def network(self, params: Any, dit: Any) -> Network:
            return network

    latents, context, null = arrays(SHAPE, (6, 7, 8), (7, 8))
    loss = finetune.make_loss(Trained(), FlowConfig(text_dropout=rate))  # type: ignore[arg-type]
    loss({}, finetune.Frozen(null), Batch(latents, context, None, None), jax.random.PRNGKey(0))
    wanted = jnp.broadcast_to(null, context.shape) if rate else context
    np.testing.assert_array_equal(network.given["context"], wanted)


def test_rows_are_dropped_as_often_as_is_said() -> None:
    value, instead = jnp.ones((4000, 2)), jnp.zeros((2,))
    found = np.asarray(flow.dropped(jax.random.PRNGKey(0), 0.1, value, instead))
    assert set(found.sum(-1).tolist()) == {0.0, 2.0}
    assert 0.08 < 1.0 - found.mean() < 0.12


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampling", ["logit_normal", "uniform"])
def test_noise_levels_are_drawn_from_what_is_said(sampling: Any, shift: float) -> None:
    config = FlowConfig(sampling=sampling, shift=shift)
    sigma = np.asarray(flow.draw_sigmas(jax.random.PRNGKey(2), 4000, config), np.float64)
    u = sigma / (shift - (shift - 1.0) * sigma)  # the shift undone
    law = stats.uniform.cdf if sampling == "uniform" else stats.norm.cdf
    drawn = u if sampling == "uniform" else np.log(u / (1.0 - u))
    assert stats.kstest(drawn, law).pvalue > 0.01


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shift", "3"),
        ("shift", float("inf")),
        ("shift", 0),
        ("text_dropout", "0.1"),
        ("text_dropout", None),
        ("image_dropout", 1.5),
        ("image_dropout", True),
    ],
)
def test_settings_that_cannot_be_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is "):
        FlowConfig(**{name: value})


# What the optimizer does with the gradient


def test_a_large_gradient_is_clipped() -> None:
    """Adam forgets the size of a first gradient, but its moments tell it."""
    config = OptimizerConfig(steps=10, learning_rate=0.1, warmup_steps=0, clip_norm=2.0)
    params = {"net": {"a.kernel": jnp.zeros((2,)), "a.bias": jnp.zeros((1,))}}
    grads = {"net": {"a.kernel": jnp.array([30.0, 0.0]), "a.bias": jnp.array([40.0])}}
    optimizer = make_optimizer(config)
    with jax.numpy_dtype_promotion("standard"):
        _, state = optimizer.update(grads, optimizer.init(params), params)
    (moments,) = [leaf for leaf in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(leaf)]
    first = moments.mu["net"]
    np.testing.assert_allclose(
        first["a.kernel"], [0.1 * 2 * 0.6, 0.0], rtol=tolerances.TRAINING_FORMULA
    )
    np.testing.assert_allclose(first["a.bias"], [0.1 * 2 * 0.8], rtol=tolerances.TRAINING_FORMULA)


def _is_adam(leaf: Any) -> bool:
    return hasattr(leaf, "mu")


def test_the_average_follows_the_weights() -> None:
    """Early it keeps (1 + n) / (10 + n) of itself, later its decay."""
    config = OptimizerConfig(
        steps=30, learning_rate=0.1, warmup_steps=0, ema_decay=0.5, weight_decay=0.0
    )
    step = make_step(lambda p, f, b, k: (jnp.sum(p["net"]["a.bias"] * b), {}), config)
    state = make_state({"net": {"a.bias": jnp.ones((1,))}}, config, seed=0)
    expected = 1.0
    for n in range(20):
        state, _ = step(state, None, jnp.ones((1,)))
        keep = min(0.5, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * float(state.params["net"]["a.bias"][0])
        found = float(state.ema["net"]["a.bias"][0])
        assert found == pytest.approx(expected, rel=tolerances.TRAINING_FORMULA)
