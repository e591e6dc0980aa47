"""What DiT, UMT5 and CLIP cost by formula: products, weights, bytes that devices tell each other.

Formulas, because a compiler's count leaves out what a kernel of its own computes. A product of
[m, k] and [k, n] is 2 m k n. Axes: l tokens of a video, s of text, d width, n devices.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from wan_jax import host_memory
from wan_jax.config import CLIPConfig, DiTConfig, UMT5Config
from wan_jax.plans import Plan
from wan_jax.sequence import Share
from wan_jax.sharding import AXES, weight_spec
from wan_jax.weights import trees

# The weights of a block that its keys and values of the text are made by, once a prompt.
_ONCE = ("k", "v", "norm_k", "k_img", "v_img", "norm_k_img")
# So many times the residual stream is read or written in a block, at 3 bytes on average of its
# float32 and of bfloat16 around it.
_PASSES = 22
_PASS_BYTES = 3


class Flops(NamedTuple):
    """Multiplications and additions: of attention (both its products), of matrices, of the VAE."""

    attention: float = 0.0
    linear: float = 0.0
    conv: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)

    def times(self, factor: float) -> "Flops":
        """Of so many of these."""
        return Flops(*(value * factor for value in self))


def tokens_of(config: DiTConfig, latent_shape: tuple[int, ...]) -> int:
    """Tokens of a video whose latents are [t, h, w, c]."""
    return math.prod(latent_shape[:3]) // math.prod(config.patch_size)


def image_tokens(config: DiTConfig, clip: CLIPConfig | None) -> int:
    """Tokens of the images that each token of a video attends to."""
    return 0 if clip is None else config.images * clip.num_tokens


# Products


def dit(config: DiTConfig, tokens: int, *, images: int = 0, plan: Plan | None = None) -> Flops:
    """One forward of one video, or what one device of a plan has of it, padding included.

    images: as image_tokens() gives it.
    """
    plan = plan or Plan()
    share = Share(tokens, plan.ring, plan.ulysses)
    rows, d = share.rows, config.dim
    # With a ring the padded keys are computed (by most kernels), and not counted in.
    keys = rows * plan.ring * plan.ulysses if plan.ring > 1 else tokens
    text = config.text_len + images
    attention = 4 * rows * d * (keys + text)
    linear = 12 * rows * d * d + 4 * rows * d * config.ffn_dim
    patch = math.prod(config.patch_size)
    ends = 2 * rows * d * patch * (config.in_channels + config.out_channels)
    time = 2 * d * (config.freq_dim + 7 * d)
    layers = config.num_layers
    return Flops(layers * attention, layers * linear + ends + time)


def conditions(config: DiTConfig, *, images: int = 0) -> Flops:
    """DiT.prepare() of one text and its images."""
    s, d = config.text_len, config.dim
    text = 2 * s * d * (config.text_dim + d)
    width = config.image_dim or 0
    image = 2 * images * width * (width + d)
    return Flops(linear=text + image + config.num_layers * 4 * (s + images) * d * d)


def text(config: UMT5Config, length: int) -> Flops:
    """UMT5's states of one text, padded to so many tokens."""
    d, width = config.dim, config.num_heads * config.head_dim
    linear = 2 * length * d * (4 * width + 3 * config.ffn_dim)
    layers = config.num_layers
    return Flops(layers * 4 * length**2 * width, layers * linear)


def views(config: CLIPConfig) -> Flops:
    """CLIP's tokens of one image; the last block is left out."""
    s, d = config.num_tokens, config.dim
    embed = 2 * config.grid**2 * config.patch_size**2 * 3 * d
    linear = 2 * s * d * (4 * d + 2 * config.ffn_dim)
    layers = config.num_layers - 1
    return Flops(layers * 4 * s * s * d, embed + layers * linear)


# Memory


def weight_bytes(network: Any, devices: int = 1, *, streamed: bool = False) -> int:
    """Bytes of a network's weights on a device, whole or split over so many.

    network: a module with shapes for arrays. Small arrays and those that do not divide are whole.
    streamed: without those that then lie in the host's memory.
    """
    return sum(
        own_bytes(leaf, devices)
        for names, leaf in _leaves(network)
        if not (streamed and _is_streamed(names))
    )


def streamed_bytes(
    network: Any, devices: int, wanted: Callable[[list[str]], bool] = lambda _: True
) -> int:
    """Bytes of weights in the host's memory of a streamed network, those of one device of so many.

    wanted: of a weight's names, from the outside in, whether it is read.
    """
    return sum(
        own_bytes(leaf, devices)
        for names, leaf in _leaves(network)
        if _is_streamed(names) and wanted(names)
    )


def gathered_bytes(network: Any, devices: int, wanted: Callable[[list[str]], bool]) -> int:
    """Bytes of split weights that are whole on a device at once: two layers, and all but layers.

    wanted: of a weight's names, from the outside in, whether it is read.
    """
    total = 0
    for names, leaf in _split_leaves(network, devices):
        if not wanted(names):
            continue
        total += 2 * _bytes(leaf) // leaf.shape[0] if names[0] == "layers" else _bytes(leaf)
    return total


def dit_working_bytes(
    config: DiTConfig,
    tokens: int,
    plan: Plan,
    *,
    itemsize: int = 2,
    nvidia: bool = False,
    quantized: bool = False,
) -> int:
    """Bytes of activations that a block needs at once on a device.

    l (12 d + 6 f) for l tokens of width d and hidden width f: the residual stream in float32 before
    and after (8 d), the hidden values in float32 and as the next product takes them (6 f), and what
    goes into the hidden layer and comes out. itemsize: of what products take, 2 here. A program of
    14B at 75,600 tokens needs 8.2 GiB on a TPU v6e, by this 10.2. nvidia: see _on_nvidia().
    """
    d, f = config.dim, config.ffn_dim
    rows = Share(tokens, plan.ring, plan.ulysses).rows
    if nvidia and itemsize < 4:
        return _on_nvidia(config, rows, plan, itemsize=itemsize, quantized=quantized)
    return rows * (8 * d + itemsize * (2 * d + f) + 4 * f)


def _on_nvidia(config: DiTConfig, rows: int, plan: Plan, *, itemsize: int, quantized: bool) -> int:
    """The same on an NVIDIA GPU, where products round as they end (layers.linear).

    So the hidden values are not there in float32, but, quantized, in 8 bits. Devices that share
    tokens copy a layer's matrices. For keys and values under way and for sums a ring has what
    programs for H200s were found to need more, of two, four and eight. Those of 14B at 75,600
    tokens need 5.90 GiB, by this 6.27, of two devices with Ulysses 3.50 (3.51), of four 1.91
    (1.93), in a ring of two 3.67 (3.86), of four 2.52 (2.56); of 1.3B at 32,760 tokens 1.12 (1.11),
    in 8 bits 1.23 (1.25).
    """
    d, f = config.dim, config.ffn_dim
    each = 8 * d + itemsize * (2 * d + f)
    each += f // 2 if quantized else 0
    each += {1: 0, 2: 2}.get(plan.ring, 7) * d
    shared = plan.ring * plan.ulysses > 1
    return rows * each + (itemsize * (2 * d * d + 2 * d * f) if shared else 0)


def own_branches(plan: Plan, branches: int) -> int:
    """How many of the branches of guidance a device computes."""
    return 1 if plan.guidance > 1 else branches


def condition_bytes(
    config: DiTConfig, *, images: int, plan: Plan, branches: int, itemsize: int = 2
) -> int:
    """Bytes of the text's and the images' keys and values on a device."""
    own = own_branches(plan, branches)
    rows = config.text_len + images
    return own * config.num_layers * rows * config.dim * 2 * itemsize


def dit_traffic(config: DiTConfig, tokens: int, *, weights: int, plan: Plan) -> float:
    """Bytes that one forward reads and writes in the memory of a device."""
    rows = Share(tokens, plan.ring, plan.ulysses).rows
    return weights + config.num_layers * _PASSES * _PASS_BYTES * rows * config.dim


# What devices tell each other


def step_sent(
    config: DiTConfig,
    latent_shape: tuple[int, ...],
    *,
    plan: Plan,
    branches: int,
    network: Any,
    itemsize: int = 2,
) -> int:
    """Bytes that a device sends in one guided step of one video.

    itemsize: of attention's operands. Ulysses sends all but its own part of q, k, v and the result;
    a ring every key and value to all members but one; the end of a branch is told to all, and where
    branches are apart the velocity to the other. Split weights are sent as they are gathered.
    """
    share = Share(tokens_of(config, latent_shape), plan.ring, plan.ulysses)
    block = share.rows * config.dim * itemsize
    exchanged = 4 * block * (plan.ulysses - 1) // plan.ulysses
    passed = 2 * block * (plan.ring - 1)
    patch = math.prod(config.patch_size) * config.out_channels * 4
    joined = share.rows * patch * (plan.ring * plan.ulysses - 1)
    own, apart = own_branches(plan, branches), plan.guidance > 1 and branches > 1
    velocity = math.prod(latent_shape[:3]) * config.out_channels * 4 if apart else 0
    total = own * (config.num_layers * (exchanged + passed) + joined) + velocity
    if plan.dit_fsdp:
        total += own * sent_weights(network, plan.devices, lambda n: _in_step(n, layer=True))
        total += sent_weights(network, plan.devices, lambda n: _in_step(n, layer=False))
    return total


def conditions_sent(network: Any, devices: int) -> int:
    """Bytes that a device sends as DiT.prepare() gathers split weights of n devices."""
    return sent_weights(network, devices, once)


def sent_weights(network: Any, devices: int, wanted: Callable[[list[str]], bool]) -> int:
    """Bytes that a device sends as split weights are gathered once; wanted as above."""
    return sum(
        _bytes(leaf) * (devices - 1) // devices
        for names, leaf in _split_leaves(network, devices)
        if wanted(names)
    )


def once(names: list[str]) -> bool:
    """Whether a weight of the DiT is for the conditions of a prompt, and no step reads it."""
    if names[0] == "layers":
        return names[1] == "cross_attn" and names[2] in _ONCE
    return names[0] in ("text_in", "text_out", "image")


def _in_step(names: list[str], *, layer: bool) -> bool:
    return not once(names) and (names[0] == "layers") == layer


def _split_leaves(network: Any, devices: int) -> list[tuple[list[str], Any]]:
    """The weights that are split, with their names from the outside in."""
    return [(names, leaf) for names, leaf in _leaves(network) if _is_split(leaf, devices)]


def _leaves(network: Any) -> list[tuple[list[str], Any]]:
    """The weights with their names."""
    return [(path.split("."), leaf) for path, leaf in trees.flatten(network).items()]


def _is_streamed(names: list[str]) -> bool:
    return host_memory.is_streamed(".".join(names))


def own_bytes(leaf: Any, devices: int) -> int:
    """Bytes of a weight on each of so many devices, split among them if it divides."""
    return _bytes(leaf) // (devices if _is_split(leaf, devices) else 1)


def _is_split(leaf: Any, devices: int) -> bool:
    return bool(tuple(weight_spec(leaf.shape, AXES, devices)))


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
