"""What each stage of a video needs of a device, by formula: memory, products, exchange, time.

Where programs are compiled, their memory takes the place of what is working memory here; and the
formulas then tell how it changes with another plan or a smaller video.
"""

import statistics
from typing import NamedTuple

from wan_jax.config import WanConfig
from wan_jax.planning import budget, costs, memory, vae_costs
from wan_jax.planning.budget import PART_OF, Budget
from wan_jax.planning.costs import Flops
from wan_jax.planning.memory import Memory, Setup, Work
from wan_jax.planning.targets import Target
from wan_jax.planning.vae_memory import Coding, Kind, Room
from wan_jax.plans import Plan


class Case(NamedTuple):
    """A video on devices. offload and all below it: as loading.load() has them."""

    config: WanConfig
    work: Work
    plan: Plan
    target: Target
    dtype: str = "bfloat16"
    offload: bool = False
    text_on_cpu: bool = False
    vae_dtype: str = "float32"
    max_memory: int | None = None
    quantize: str | None = None

    @property
    def setup(self) -> Setup:
        """How the devices hold the checkpoint; with a limit of memory what of it is streamed.

        Raises ValueError for a limit that the video cannot keep.
        """
        setup = Setup(
            self.config,
            self.plan,
            dtype=self.dtype,
            vae_dtype=self.vae_dtype,
            offload=self.offload,
            text_on_cpu=self.text_on_cpu,
            quantize=self.quantize,
            nvidia=self.target.is_nvidia,
        )
        if self.max_memory is None:
            return setup
        streamed = Budget(self.max_memory, setup).streamed([self.work])
        return setup._replace(streamed=streamed)

    @property
    def room(self) -> Room:
        """What the VAE is given of the devices."""
        return budget.room(self.setup, self.max_memory)

    def coding(self, stage: str) -> Coding:
        """What the VAE does in the stage "image" or "decode"."""
        kind: Kind = "encode" if stage == "image" else "decode"
        return self.room.coding(kind, self.config.vae, self.work.latent_shape)

    def is_usual(self, stage: str) -> bool:
        """Whether it is run whole, and in chunks as long as they are where there is no limit."""
        if PART_OF[stage] != "vae":
            return True
        coding = self.coding(stage)
        return self.room.best(coding) == coding.usual


class Need(NamedTuple):
    """Of one stage and one device. memory: its bytes. flops, sent: of the whole stage.

    brought: bytes of streamed weights that come from the host's memory in it. seconds: None if
    nothing is known of the device.
    """

    memory: Memory
    flops: Flops
    sent: int
    seconds: float | None
    brought: int = 0

    @property
    def weights(self) -> int:
        """Bytes of all networks that are there meanwhile."""
        return self.memory.weights

    @property
    def activations(self) -> int:
        """Bytes beside the weights."""
        return self.memory.activations


def needs(case: Case) -> dict[str, Need]:
    """{stage: what it needs}, in the order in which they run."""
    setup = case.setup
    found = {"text": _text(case, setup)}
    if case.quantize is not None:
        limit = case.max_memory
        making = memory.load(setup)
        if limit is not None:
            making = Budget(limit, setup).making(setup.streamed)
        found["load"] = Need(making, Flops(), 0, None)
    if case.config.clip is not None:
        found |= {"views": _views(case, setup), "image": _image(case, setup)}
    return found | {
        "conditions": _conditions(case, setup),
        "denoise": _denoise(case, setup),
        "decode": _decode(case, setup),
    }


def _text(case: Case, setup: Setup) -> Need:
    found, network = memory.text(setup), setup.network("umt5")
    if case.text_on_cpu:
        return Need(found, Flops(), 0, None)
    shares, texts = setup.shares("umt5"), case.work.texts
    flops = costs.text(case.config.umt5, case.config.dit.text_len).times(texts)
    sent = texts * costs.sent_weights(network, shares, lambda _: True)
    brought = texts * setup.brought("umt5")
    traffic = texts * costs.weight_bytes(network)
    return Need(found, flops, sent, _seconds(case, flops, traffic, sent, brought), brought)


def _views(case: Case, setup: Setup) -> Need:
    config = case.config.clip
    assert config is not None
    flops = costs.views(config).times(case.config.images)
    seconds = _seconds(case, flops, costs.weight_bytes(setup.network("clip")), 0)
    return Need(memory.views(setup), flops, 0, seconds)


def _image(case: Case, setup: Setup) -> Need:
    coding = case.coding("image")
    cost = vae_costs.encode(coding.config, coding.latent_shape, devices=coding.devices)
    return _of_vae(case, setup, cost, coding, videos=1)


def _decode(case: Case, setup: Setup) -> Need:
    coding = case.coding("decode")
    cost = vae_costs.decode(coding.config, coding.latent_shape, devices=coding.devices)
    return _of_vae(case, setup, cost, coding, videos=case.work.batch)


def _of_vae(case: Case, setup: Setup, cost: vae_costs.Cost, coding: Coding, *, videos: int) -> Need:
    """videos: so many, one after the other."""
    tiling = case.room.best(coding)
    tiles = coding.tiles(tiling)
    # Every finer stage costs about as much, and what is coarse, which tiles leave alone, little.
    again = tiles.total * statistics.mean(tiles.windows) / tiles.width
    flops, sent = cost.flops.times(videos * again), cost.sent * videos
    found = Memory(setup.resident("vae"), coding.working_bytes(tiling))
    return Need(found, flops, sent, _seconds(case, flops, 0, sent))


def _conditions(case: Case, setup: Setup) -> Need:
    config, work, network = case.config.dit, case.work, setup.network("dit")
    images = costs.image_tokens(config, case.config.clip)
    flops = costs.conditions(config, images=images).times(work.branches * work.batch)
    sent = costs.conditions_sent(network, setup.shares("dit")) * work.branches
    brought = work.branches * setup.brought("dit", costs.once)
    traffic = costs.weight_bytes(network) // 4  # of a block the keys and values only
    seconds = _seconds(case, flops, traffic, sent, brought)
    return Need(memory.conditions(setup, work), flops, sent, seconds, brought)


def _denoise(case: Case, setup: Setup) -> Need:
    config, work, plan = case.config.dit, case.work, case.plan
    network = setup.network("dit")
    images = costs.image_tokens(config, case.config.clip)
    tokens = costs.tokens_of(config, work.latent_shape)
    videos = -(-work.batch // plan.batch)
    branches = costs.own_branches(plan, work.branches)
    forwards = work.steps * branches * videos
    flops = costs.dit(config, tokens, images=images, plan=plan).times(forwards)
    sent = (
        work.steps
        * videos
        * costs.step_sent(
            config,
            work.latent_shape,
            plan=plan,
            branches=work.branches,
            network=network,
            itemsize=setup.itemsize,
        )
    )
    traffic = forwards * costs.dit_traffic(
        config, tokens, weights=costs.weight_bytes(network), plan=plan
    )
    # All videos of a batch are one forward.
    brought = work.steps * branches * setup.brought("dit", lambda names: not costs.once(names))
    seconds = _seconds(case, flops, traffic, sent, brought)
    return Need(memory.denoise(setup, work), flops, sent, seconds, brought)


def _seconds(case: Case, flops: Flops, traffic: float, sent: int, brought: int = 0) -> float | None:
    """The roofline: what takes longest of products at the shares that they reach, memory and what
    comes from the host, under which all else is computed; and then what devices tell each other, as
    if nothing of it were hidden.
    """
    chip = case.target.chip
    if chip is None:
        return None
    shares = chip.attention, chip.linear, chip.conv
    computed = sum(n / (chip.flops * share) for n, share in zip(flops, shares, strict=True))
    slowest = max(computed, traffic / chip.bandwidth, brought / chip.host)
    return slowest + sent / chip.link
