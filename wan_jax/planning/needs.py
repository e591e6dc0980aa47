"""What each stage of a video needs of a device, by formula: memory, products, exchange, time.

Where programs are compiled, their memory takes the place of what is working memory here; and the
formulas then tell how it changes with another plan or a smaller video.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from wan_jax.config import WanConfig
from wan_jax.planning import costs, vae_costs, vae_memory
from wan_jax.planning.costs import Flops
from wan_jax.planning.programs import Work
from wan_jax.planning.targets import Chip, Target
from wan_jax.planning.vae_memory import Coding, Kind, Room
from wan_jax.plans import Plan
from wan_jax.weights.sources import abstract_part

PART_OF = {
    "text": "umt5",
    "views": "clip",
    "image": "vae",
    "conditions": "dit",
    "denoise": "dit",
    "decode": "vae",
}


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
    def room(self) -> Room:
        """What the VAE is given of the devices."""
        return vae_memory.room(
            self.max_memory,
            self.config,
            dtype=self.dtype,
            vae_dtype=self.vae_dtype,
            offload=self.offload,
            text_on_cpu=self.text_on_cpu,
            plan=self.plan,
            quantize=self.quantize,
        )

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
    """Of one stage and one device. weights: bytes of all networks that are there meanwhile.

    working: bytes of activations. gathered: of split weights that are whole for a while. flops,
    sent: of the whole stage. seconds: None if nothing is known of the device.
    """

    weights: int
    working: int
    gathered: int
    flops: Flops
    sent: int
    seconds: float | None

    @property
    def activations(self) -> int:
        """Bytes beside the weights."""
        return self.working + self.gathered


def needs(case: Case) -> dict[str, Need]:
    """{stage: what it needs}, in the order in which they run."""
    config = case.config
    kinds = case.dtype, case.vae_dtype, case.quantize
    parts = {part: _network(config, part, *kinds) for part in config.dit.parts}
    found = {"text": _text(case, parts)}
    if config.clip is not None:
        found |= {"views": _views(case, parts), "image": _image(case, parts)}
    return found | {
        "conditions": _conditions(case, parts),
        "denoise": _denoise(case, parts),
        "decode": _decode(case, parts),
    }


def held_bytes(case: Case) -> int:
    """Bytes that lie on a device beside the denoising program: the conditions as they were made.

    Of several devices they are whole on each until the last step, and the program is given a copy
    of its own branches.
    """
    if case.plan.devices == 1:
        return 0
    images = costs.image_tokens(case.config.dit, case.config.clip)
    whole = Plan()
    return case.work.batch * costs.condition_bytes(
        case.config.dit, images=images, plan=whole, branches=case.work.branches
    )


@functools.cache
def _network(config: WanConfig, part: str, dtype: str, vae_dtype: str, quantize: str | None) -> Any:
    return abstract_part(getattr(config, part), jnp.dtype(dtype), jnp.dtype(vae_dtype), quantize)


def _resident(case: Case, parts: Mapping[str, Any], part: str) -> int:
    """Bytes of weights on a device during a stage of this network."""
    there = [part] if case.offload else list(parts)
    return sum(
        costs.weight_bytes(parts[name], _shares(case, name))
        for name in there
        if not (name == "umt5" and case.text_on_cpu)
    )


def _shares(case: Case, part: str) -> int:
    """Among how many devices a network's weights are split."""
    return case.plan.devices if part in case.plan.split else 1


def _gathered(
    case: Case,
    parts: Mapping[str, Any],
    part: str,
    wanted: Callable[[list[str]], bool] = lambda _: True,
) -> int:
    shares = _shares(case, part)
    return costs.gathered_bytes(parts[part], shares, wanted) if shares > 1 else 0


def _text(case: Case, parts: Mapping[str, Any]) -> Need:
    config, s = case.config.umt5, case.config.dit.text_len
    weights = _resident(case, parts, "umt5")
    if case.text_on_cpu:
        return Need(weights, 0, 0, Flops(), 0, None)
    size = _itemsize(case)
    scores = config.num_heads * s * s * (4 + 4 + size)
    working = scores + s * (4 * config.dim + 3 * config.ffn_dim) * size
    flops, shares = costs.text(config, s).times(case.work.texts), _shares(case, "umt5")
    sent = case.work.texts * costs.sent_weights(parts["umt5"], shares, lambda _: True)
    traffic = case.work.texts * costs.weight_bytes(parts["umt5"])
    gathered = _gathered(case, parts, "umt5")
    return Need(weights, working, gathered, flops, sent, _seconds(case, flops, traffic, sent))


def _views(case: Case, parts: Mapping[str, Any]) -> Need:
    config = case.config.clip
    assert config is not None
    count = case.config.images
    flops = costs.views(config).times(count)
    rows = count * config.num_tokens
    working = rows * (8 * config.dim + config.ffn_dim) * 4
    seconds = _seconds(case, flops, costs.weight_bytes(parts["clip"]), 0)
    return Need(_resident(case, parts, "clip"), working, 0, flops, 0, seconds)


def _image(case: Case, parts: Mapping[str, Any]) -> Need:
    coding = case.coding("image")
    cost = vae_costs.encode(coding.config, coding.latent_shape, devices=coding.devices)
    return _of_vae(case, parts, cost, coding, videos=1)


def _decode(case: Case, parts: Mapping[str, Any]) -> Need:
    coding = case.coding("decode")
    cost = vae_costs.decode(coding.config, coding.latent_shape, devices=coding.devices)
    return _of_vae(case, parts, cost, coding, videos=case.work.batch)


def _of_vae(
    case: Case, parts: Mapping[str, Any], cost: vae_costs.Cost, coding: Coding, *, videos: int
) -> Need:
    """videos: so many, one after the other."""
    tiling = case.room.best(coding)
    tiles = coding.tiles(tiling)
    # As if all of a tile were computed anew beside its own columns: what is coarse is not, and
    # is little.
    again = len(tiles.places()) * tiles.window / tiles.width
    flops, sent = cost.flops.times(videos * again), cost.sent * videos
    return Need(
        _resident(case, parts, "vae"),
        coding.working_bytes(tiling),
        0,
        flops,
        sent,
        _seconds(case, flops, 0, sent),
    )


def _conditions(case: Case, parts: Mapping[str, Any]) -> Need:
    config, work = case.config.dit, case.work
    images = costs.image_tokens(config, case.config.clip)
    flops = costs.conditions(config, images=images).times(work.branches * work.batch)
    shares = _shares(case, "dit")
    sent = costs.conditions_sent(parts["dit"], shares) * work.branches
    rows = config.text_len + images
    working = held_bytes(case) + work.batch * rows * config.dim * 16
    traffic = costs.weight_bytes(parts["dit"]) // 4  # of a block the keys and values only
    return Need(
        _resident(case, parts, "dit"),
        working,
        _gathered(case, parts, "dit", costs.once),
        flops,
        sent,
        _seconds(case, flops, traffic, sent),
    )


def _denoise(case: Case, parts: Mapping[str, Any]) -> Need:
    config, work, plan = case.config.dit, case.work, case.plan
    images = costs.image_tokens(config, case.config.clip)
    tokens = costs.tokens_of(config, work.latent_shape)
    videos = -(-work.batch // plan.batch)
    forwards = work.steps * costs.own_branches(plan, work.branches) * videos
    flops = costs.dit(config, tokens, images=images, plan=plan).times(forwards)
    latents = work.batch * math.prod(work.latent_shape) * 4
    given = 4 * latents + videos * costs.condition_bytes(
        config, images=images, plan=plan, branches=work.branches
    )
    # The velocities of both branches and what they are joined into.
    working = given + 3 * latents + videos * costs.dit_working_bytes(config, tokens, plan)
    sent = (
        work.steps
        * videos
        * costs.step_sent(
            config,
            work.latent_shape,
            plan=plan,
            branches=work.branches,
            network=parts["dit"],
            itemsize=_itemsize(case),
        )
    )
    traffic = forwards * costs.dit_traffic(
        config, tokens, weights=costs.weight_bytes(parts["dit"]), plan=plan
    )
    return Need(
        _resident(case, parts, "dit"),
        working + held_bytes(case),
        _gathered(case, parts, "dit", lambda names: not costs.once(names)),
        flops,
        sent,
        _seconds(case, flops, traffic, sent),
    )


def _itemsize(case: Case) -> int:
    return int(jnp.dtype(case.dtype).itemsize)


def _seconds(case: Case, flops: Flops, traffic: float, sent: int) -> float | None:
    """The roofline: products at the shares that they reach or memory, whichever takes longer, and
    then what devices tell each other, as if nothing of it were hidden.
    """
    chip: Chip | None = case.target.chip
    if chip is None:
        return None
    shares = chip.attention, chip.linear, chip.conv
    computed = sum(n / (chip.flops * share) for n, share in zip(flops, shares, strict=True))
    return max(computed, traffic / chip.bandwidth) + sent / chip.link
