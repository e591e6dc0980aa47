"""What the stages before and after the VAE's need of a device's memory, by formula.

A run with a limit of memory and --plan go by the same numbers. Axes: l tokens of a video, s of
text, d width.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from wan_jax.config import WanConfig
from wan_jax.planning import costs
from wan_jax.plans import Plan
from wan_jax.request import Request
from wan_jax.weights.sources import abstract_part

# The networks with a stack that can lie in the host's memory.
STREAMABLE = ("umt5", "dit")
# So many layers of a streamed stack are on the device: one computes while the next arrives.
_LAYERS = 2


class Work(NamedTuple):
    """What is asked for, as far as programs know it.

    latent_shape: [t, h, w, c]. branches: 2 with guidance, else 1. batch: videos at once. texts: to
    encode.
    """

    latent_shape: tuple[int, int, int, int]
    steps: int
    branches: int = 2
    batch: int = 1
    texts: int = 2


def work_of(request: Request) -> Work:
    """The work of a request."""
    batch, *_ = request.noise_shape
    branches = 1 if request.guidance == 1.0 else 2
    steps = len(request.schedule.table)
    return Work(request.latent_shape, steps, branches, batch, len(request.texts))


class Setup(NamedTuple):
    """How a checkpoint is held by devices, as loading.load() has it.

    streamed: the networks whose stacks lie in the host's memory. nvidia: whether the devices are
    NVIDIA's GPUs.
    """

    config: WanConfig
    plan: Plan = Plan()
    dtype: str = "bfloat16"
    vae_dtype: str = "float32"
    offload: bool = False
    text_on_cpu: bool = False
    quantize: str | None = None
    streamed: tuple[str, ...] = ()
    nvidia: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of a number that products take."""
        return int(jnp.dtype(self.dtype).itemsize)

    def network(self, part: str) -> Any:
        """The network with shapes in place of arrays."""
        config = getattr(self.config, part)
        dtypes = jnp.dtype(self.dtype), jnp.dtype(self.vae_dtype)
        return abstract_part(config, *dtypes, self.quantize)

    def shares(self, part: str) -> int:
        """Among how many devices its weights are split."""
        return self.plan.devices if part in self.plan.split else 1

    def resident(self, part: str) -> int:
        """Bytes of all weights that lie on a device during a stage of this network."""
        there = [part] if self.offload else self.config.dit.parts
        return sum(
            costs.weight_bytes(
                self.network(name), self.shares(name), streamed=name in self.streamed
            )
            for name in there
            if not (name == "umt5" and self.text_on_cpu)
        )

    def brought(self, part: str, wanted: Callable[[list[str]], bool] = lambda _: True) -> int:
        """Bytes that come from the host's memory to a device as its stack is run through once."""
        if part not in self.streamed:
            return 0
        return costs.streamed_bytes(self.network(part), self.shares(part), wanted)

    def fetched(self, part: str, wanted: Callable[[list[str]], bool] = lambda _: True) -> int:
        """Bytes of a network's weights that are whole on a device for a while.

        Of split ones those that are gathered, of a streamed stack the layers that are brought.
        wanted: of a weight's names, from the outside in, whether it is read.
        """
        network, shares = self.network(part), self.shares(part)
        found = costs.gathered_bytes(network, shares, wanted) if shares > 1 else 0
        layers = getattr(self.config, part).num_layers
        return found + _LAYERS * self.brought(part, wanted) // layers


class Memory(NamedTuple):
    """Bytes on a device in one stage. weights: of all networks that are there meanwhile.

    working: activations. fetched: weights that are there for a while, see Setup.fetched().
    """

    weights: int
    working: int
    fetched: int = 0

    @property
    def activations(self) -> int:
        """Bytes beside the weights."""
        return self.working + self.fetched


def load(setup: Setup) -> Memory:
    """The DiT while it is made to have 8 bits: as it was read, with the first stack that has."""
    first, shares = setup.network("dit").layers.self_attn.q.kernel, setup.shares("dit")
    whole = setup._replace(quantize=None)
    return Memory(whole.resident("dit"), 0, costs.own_bytes(first, shares))


def load_by_layers(setup: Setup) -> Memory:
    """The same where its layers come from the host's memory, one after the other.

    Of a layer there are what arrives, in 16 bits, and what is rounded, at most in 32; of two, as
    one may arrive under the other. Of a streamed network the largest stack is there before it goes.
    """
    layers, shares = setup.network("dit").layers, setup.shares("dit")
    largest = max(costs.own_bytes(p.kernel, shares) for p in (layers.ffn_in, layers.ffn_out))
    working = _LAYERS * (2 + 4) * largest // setup.config.dit.num_layers
    leaving = largest if "dit" in setup.streamed else 0
    return Memory(setup.resident("dit"), working, leaving)


def text(setup: Setup) -> Memory:
    """UMT5's states of one text."""
    weights = setup.resident("umt5")
    if setup.text_on_cpu:
        return Memory(weights, 0)
    config, s, size = setup.config.umt5, setup.config.dit.text_len, setup.itemsize
    scores = config.num_heads * s * s * (4 + 4 + size)
    working = scores + s * (4 * config.dim + 3 * config.ffn_dim) * size
    return Memory(weights, working, setup.fetched("umt5"))


def views(setup: Setup) -> Memory:
    """CLIP's tokens of the images."""
    config = setup.config.clip
    assert config is not None
    rows = setup.config.images * config.num_tokens
    return Memory(setup.resident("clip"), rows * (8 * config.dim + config.ffn_dim) * 4)


def conditions(setup: Setup, work: Work) -> Memory:
    """DiT.prepare() of one branch."""
    config = setup.config.dit
    rows = config.text_len + costs.image_tokens(config, setup.config.clip)
    working = held(setup, work) + work.batch * rows * config.dim * 16
    return Memory(setup.resident("dit"), working, setup.fetched("dit", costs.once))


def denoise(setup: Setup, work: Work) -> Memory:
    """One guided step."""
    config, plan = setup.config.dit, setup.plan
    images = costs.image_tokens(config, setup.config.clip)
    tokens = costs.tokens_of(config, work.latent_shape)
    videos = -(-work.batch // plan.batch)
    latents = work.batch * math.prod(work.latent_shape) * 4
    size = setup.itemsize
    # The solver's state and, of a step that is told of, a copy of the latents, or while the next
    # one is at work of the state.
    given = 8 * latents + videos * costs.condition_bytes(
        config, images=images, plan=plan, branches=work.branches, itemsize=size
    )
    kind = {"nvidia": setup.nvidia, "quantized": setup.quantize is not None}
    block = costs.dit_working_bytes(config, tokens, plan, itemsize=size, **kind)
    # The velocities of both branches and what they are joined into.
    working = given + 3 * latents + videos * block
    read = setup.fetched("dit", lambda names: not costs.once(names))
    return Memory(setup.resident("dit"), working + held(setup, work), read)


def held(setup: Setup, work: Work) -> int:
    """Bytes that lie on a device beside the denoising program: the conditions as they were made.

    They are whole on each device until the last step. Where devices have branches of guidance or
    videos of their own, the program is given a copy of those.
    """
    if setup.plan.guidance == 1 and setup.plan.batch == 1:
        return 0
    config = setup.config.dit
    images = costs.image_tokens(config, setup.config.clip)
    return work.batch * costs.condition_bytes(
        config, images=images, plan=Plan(), branches=work.branches, itemsize=setup.itemsize
    )
