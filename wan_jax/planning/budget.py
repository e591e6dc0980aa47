"""What of a checkpoint is streamed so that its videos keep a limit of a device's memory.

The stack of UMT5 or of the DiT lies in the host's memory only if it must, UMT5's first: it is read
once a text, the DiT's with every forward. A DiT of 8 bits is made out of it only if it must.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from wan_jax import xla
from wan_jax.config import WanConfig
from wan_jax.planning import memory
from wan_jax.planning.memory import STREAMABLE, Memory, Setup, Work
from wan_jax.planning.vae_memory import Kind, Room, parse_memory, size_text
from wan_jax.plans import Plan
from wan_jax.request import latent_shape

# What compilers need is up to 1% more than the formulas, and caches of kernels come on top.
_MARGIN = 1.05
_CHOICES = ((), ("umt5",), ("dit",), STREAMABLE)  # those first that take the least time
PART_OF = {
    "load": "dit",
    "text": "umt5",
    "views": "clip",
    "image": "vae",
    "conditions": "dit",
    "denoise": "dit",
    "decode": "vae",
}
_DOING = {
    "load": "make the DiT of 8 bits",
    "text": "encode a text",
    "views": "see an image",
    "image": "encode {}",
    "conditions": "prepare {}",
    "denoise": "denoise {}",
    "decode": "decode {}",
}


class Budget(NamedTuple):
    """A limit of memory. limit: bytes of each device that may be used; setup: what is there."""

    limit: int
    setup: Setup

    def streamed(
        self, works: Sequence[Work], *, at_once: int = 1, already: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """The networks that are streamed, the fewest with which all works keep the limit.

        at_once: videos that are decoded together. already: networks that are. Raises ValueError
        naming the least memory that would do, if these cannot be made within the limit.
        """
        for choice in _CHOICES:
            if not set(already) <= set(choice):
                continue
            if all(max(_sizes(self, w, at_once, choice).values()) <= self.limit for w in works):
                return choice
        raise ValueError(self._refusal(works, at_once))

    def streamed_by_default(self) -> tuple[str, ...]:
        """The same for one video as the checkpoint makes it by default; all if none would do."""
        defaults = self.setup.config.defaults
        shape = latent_shape(self.setup.config, size=defaults.size, frames=defaults.frames)
        branches = 1 if defaults.guidance == 1.0 else 2
        try:
            return self.streamed([Work(shape, defaults.steps, branches)])
        except ValueError:
            return _CHOICES[-1]

    @property
    def by_layers(self) -> bool:
        """Whether a DiT is quantised as it leaves the host's memory, as at once it has no room."""
        whole = self.setup._replace(streamed=())
        return whole.quantize is not None and _needed(memory.load(whole)) > self.limit

    def making(self, streamed: tuple[str, ...]) -> Memory:
        """What making a DiT of 8 bits takes while these networks are streamed."""
        by_layers = self.by_layers or "dit" in streamed
        needed = memory.load_by_layers if by_layers else memory.load
        return needed(self.setup._replace(streamed=streamed))

    def room(self, streamed: tuple[str, ...]) -> Room:
        """What the VAE is given while these networks are streamed."""
        return room(self.setup._replace(streamed=streamed), self.limit)

    def _refusal(self, works: Sequence[Work], at_once: int) -> str:
        """Of the stage that needs most, of all works, with what is streamed that helps most."""
        found = []
        for choice in _CHOICES:
            sizes = [(_sizes(self, w, at_once, choice), w, choice) for w in works]
            found.append(max(sizes, key=lambda item: max(item[0].values())))
        least, work, choice = min(found, key=lambda item: max(item[0].values()))
        stage, needed = max(least.items(), key=lambda item: item[1])
        setup = self.setup._replace(streamed=choice)
        weights = setup.resident(PART_OF[stage])
        if stage == "load":
            weights, _, leaving = self.making(choice)
            weights += leaving
        return (
            f"max_memory is {size_text(self.limit)}; to {_doing(stage, setup, work)} takes at "
            f"least {size_text(needed)}, {size_text(weights)} of it weights"
        )


def start(max_memory: int | str | None) -> int | None:
    """The limit in bytes of a device; to be called before JAX starts.

    What does not fit may then take all of the host's memory. Raises ValueError for what is no size.
    """
    if max_memory is None:
        return None
    xla.pin_host_memory()
    return parse_memory(max_memory)


def budget(
    limit: int | None,
    config: WanConfig,
    plan: Plan | None,
    *,
    dtype: str,
    vae_dtype: str,
    offload: bool,
    text_on_cpu: bool,
    quantize: str | None = None,
) -> Budget | None:
    """What load(max_memory=limit) and its other arguments mean, on the devices at hand."""
    if limit is None:
        return None
    held = Setup(config, plan or Plan(), dtype, vae_dtype, offload, text_on_cpu, quantize)
    return Budget(limit, held._replace(nvidia=xla.on_nvidia()))


def room(setup: Setup, limit: int | None) -> Room:
    """What the VAE is given of a device. limit: bytes of it that may be used; None is all."""
    share = setup.plan.devices // setup.plan.batch
    return Room(limit, setup.resident("vae"), setup.vae_dtype, share)


@functools.lru_cache(maxsize=64)
def _sizes(budget: Budget, work: Work, at_once: int, streamed: tuple[str, ...]) -> dict[str, int]:
    """{stage: bytes of a device}, of the VAE in as many tiles as fit or, if none do, as help."""
    setup = budget.setup._replace(streamed=streamed)
    config, space = setup.config, room(setup, budget.limit)

    def of_vae(kind: Kind, batch: int) -> int:
        return space.needed(space.coding(kind, config.vae, work.latent_shape, batch))

    found = {"text": _needed(memory.text(setup))}
    if setup.quantize is not None:
        found["load"] = _needed(budget.making(streamed))
    if config.clip is not None:
        found |= {"views": _needed(memory.views(setup)), "image": of_vae("encode", 1)}
    return found | {
        "conditions": _needed(memory.conditions(setup, work)),
        "denoise": _needed(memory.denoise(setup, work)),
        "decode": of_vae("decode", at_once),
    }


def _needed(found: Memory) -> int:
    return found.weights + found.fetched + int(found.working * _MARGIN)


def _doing(stage: str, setup: Setup, work: Work) -> str:
    t, h, w, _ = work.latent_shape
    vae = setup.config.vae
    size = f"{w * vae.spatial_stride}x{h * vae.spatial_stride}"
    return _DOING[stage].format(f"{1 + (t - 1) * vae.temporal_stride} frames of {size}")
