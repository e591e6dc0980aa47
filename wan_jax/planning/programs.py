"""The programs of a video, with shapes in place of arrays: to be compiled before there are any.

These are the functions that the pipeline runs, given what they will be given, on devices that need
not be there. No weight is read.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from wan_jax import host_memory, pipeline, sampler, spread, streaming, umt5, vae, xla
from wan_jax.columns import SPLIT
from wan_jax.config import WanConfig
from wan_jax.dit import DiT
from wan_jax.planning.costs import image_tokens
from wan_jax.planning.memory import Work
from wan_jax.plans import Plan
from wan_jax.schedulers import COLUMNS
from wan_jax.sharding import Layout
from wan_jax.weights import trees
from wan_jax.weights.sources import abstract_part

Shape = jax.ShapeDtypeStruct
STAGES = ("text", "views", "image", "conditions", "denoise", "decode")


class Stage(NamedTuple):
    """A program, the network whose weights it is given first, and all that it is given."""

    name: str
    part: str
    program: xla.Program
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def compile(self, device: jax.Device) -> jax.stages.Compiled:
        """The program compiled for devices of this kind; RuntimeError if they lack the memory."""
        streams = host_memory.lies_in(self.arguments)
        traced = self.program.on(device, streams=streams).trace(*self.arguments, **self.options)
        # A TPU that is not there is not what jax would lower for.
        platforms = ("tpu",) if device.platform == "tpu" else None
        return traced.lower(lowering_platforms=platforms).compile()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the network's weights on a device, in its own memory."""
        leaves = jax.tree.leaves(self.arguments[0])
        return own_bytes([leaf for leaf in leaves if not host_memory.lies_in(leaf)])


def stages(
    config: WanConfig,
    work: Work,
    *,
    plan: Plan,
    devices: Sequence[jax.Device],
    dtype: str,
    vae_dtype: str = "float32",
    streamed: Collection[str] = (),
    quantize: str | None = None,
) -> dict[str, Callable[[], Stage]]:
    """{name: function that gives the stage} of STAGES, as many as this checkpoint has.

    devices: to compile for. streamed: the networks whose stacks lie in the host's memory.
    """
    layout = plan.layout(devices)
    own = _Builder(
        config, work, plan, layout, dtype, jnp.dtype(vae_dtype), tuple(streamed), quantize
    )
    found: dict[str, Callable[[], Stage]] = {"text": own.text}
    if config.clip is not None:
        found |= {"views": own.views, "image": own.image}
    return found | {"conditions": own.conditions, "denoise": own.denoise, "decode": own.decode}


class _Builder(NamedTuple):
    config: WanConfig
    work: Work
    plan: Plan
    layout: Layout
    dtype: str
    vae_dtype: jnp.dtype
    streamed: tuple[str, ...]
    quantize: str | None

    def text(self) -> Stage:
        network, layout = self._network("umt5")
        ids = self._whole((1, self.config.dit.text_len), jnp.int32)
        return Stage("text", "umt5", spread.program(umt5.encode, layout), (network, ids, ids), {})

    def views(self) -> Stage:
        network, layout = self._network("clip")
        assert self.config.clip is not None
        side = self.config.clip.image_size
        pixels = self._whole((self.config.images, side, side, 3), jnp.float32)
        program = spread.program(pipeline.see, layout)
        return Stage("views", "clip", program, (network, pixels), {})

    def image(self) -> Stage:
        network, layout = self._network("vae")
        config, (count, h, w, _) = self.config.vae, self.work.latent_shape
        first, stride = count == 1, config.spatial_stride
        frames = 1 if first else config.temporal_stride
        pixels = self._whole((1, frames, h * stride, w * stride, 3), jnp.float32)
        state = self._state(vae.encoder_state)
        program = streaming.encode_program(first, self.dtype, layout)
        return Stage("image", "vae", program, (network, pixels, state), {})

    def conditions(self) -> Stage:
        network, layout = self._network("dit")
        program = spread.program(DiT.prepare, layout)
        return Stage("conditions", "dit", program, (network, *self._prepared()), {})

    def denoise(self) -> Stage:
        network, layout = self._network("dit")
        own, batch, count = self.work, self.work.batch, self.work.branches
        where = NamedSharding(layout.mesh, spread.of_branches(count, layout))
        whole = abstract_part(self.config.dit, jnp.dtype(self.dtype))
        one = jax.eval_shape(DiT.prepare, whole, *self._prepared())
        if spread.are_apart(count, layout):
            one = jax.tree.map(lambda leaf: Shape((count, *leaf.shape), leaf.dtype), one)
        lying = jax.tree.map(lambda leaf: _lying(leaf, where), one)
        conds = lying if spread.are_apart(count, layout) else (lying,) * count
        x: Any = self._whole((batch, *own.latent_shape), jnp.float32)
        known = None
        if self.config.images:
            channels = self.config.dit.in_channels - own.latent_shape[-1]
            known = self._whole((1, *own.latent_shape[:3], channels), jnp.float32)
        row, scale = Shape((len(COLUMNS),), jnp.float32), self._whole((), jnp.float32)
        arguments = network, sampler.State(x, x, x, x), row, conds, scale, known
        return Stage("denoise", "dit", sampler.checked_step, arguments, {"layout": layout})

    def decode(self) -> Stage:
        network, layout = self._network("vae")
        count, h, w, z = self.work.latent_shape
        first = count == 1
        chunk = 1 if first else streaming.decode_chunk(count)
        latents = self._whole((1, chunk, h, w, z), jnp.float32)
        state = self._state(vae.decoder_state)
        program = streaming.decode_program(first, "uint8", self.dtype, layout)
        arguments = network, latents, state, Shape((), jnp.float32)
        return Stage("decode", "vae", program, arguments, {})

    def _network(self, part: str) -> tuple[Any, Layout]:
        layout = self.layout.of_weights(split=part in self.plan.split)
        own = getattr(self.config, part)
        network = abstract_part(own, jnp.dtype(self.dtype), self.vae_dtype, self.quantize)
        lying = jax.tree.map(_lying, network, layout.weights(network))
        return (_streamed(lying) if part in self.streamed else lying), layout

    def _prepared(self) -> tuple[Shape, ...]:
        """What DiT.prepare() is given beside the network, for all videos."""
        dit, batch = self.config.dit, self.work.batch
        context = self._whole((batch, dit.text_len, dit.text_dim), jnp.dtype(self.dtype))
        images = image_tokens(dit, self.config.clip)
        if not images:
            return (context,)
        return context, self._whole((batch, images, dit.image_dim), jnp.float32)

    def _state(self, make: Callable[..., vae.State]) -> Any:
        """The VAE's state, of which each device holds its columns."""
        _, height, width, _ = self.work.latent_shape
        shape, dtype = (1, height, width), self.vae_dtype
        program = streaming.zeros_program(make, self.config.vae, shape, self.layout, dtype)
        made = program.on(self.layout.mesh.devices.flat[0]).eval_shape()
        where = NamedSharding(self.layout.mesh, SPLIT)
        return jax.tree.map(lambda leaf: _lying(leaf, where), made)

    def _whole(self, shape: tuple[Any, ...], dtype: Any) -> Shape:
        return Shape(shape, dtype, sharding=NamedSharding(self.layout.mesh, PartitionSpec()))


def _lying(leaf: Any, where: jax.sharding.Sharding) -> Shape:
    return Shape(leaf.shape, leaf.dtype, sharding=where)


def _streamed(network: Any) -> Any:
    """The shapes of a network with those of its stack in the host's memory."""
    leaves: dict[str, Any] = trees.flatten(network)
    for name, leaf in leaves.items():
        leaves[name] = _lying(leaf, host_memory.where(name, leaf.sharding))
    return trees.fill(network, leaves)


def own_bytes(tree: Any) -> int:
    """Bytes of shapes on each of the devices that they lie on, in whichever memory."""
    return sum(
        math.prod(leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape))
        * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
