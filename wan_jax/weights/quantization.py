"""The DiT with weights of 8 bits, made of those that were read, LoRAs added, on the device.

Quantised are q, k, v and o of self-attention and both products of the feed-forward network: 1.1 of
the 1.4 billion weights of T2V-1.3B. The rest stays as it is: embeddings, modulation, head, norms,
cross-attention.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from wan_jax import host_memory
from wan_jax.dit import DiT
from wan_jax.host_memory import KIND
from wan_jax.layers import Linear, QuantizedLinear
from wan_jax.sharding import Where, by_shape

Array = jax.Array
# What can be asked for, and the lowest compute capability of an NVIDIA GPU that has it.
KINDS = {"fp8": 9.0, "fp8_linear": 8.9}
PRODUCTS = (*(f"self_attn.{name}" for name in "qkvo"), "ffn_in", "ffn_out")


def check_kind(kind: str | None, dtype: str) -> None:
    """Raise ValueError for another kind than of KINDS or None, and beside another dtype."""
    if kind is None:
        return
    if kind not in KINDS:
        raise ValueError(f"quantize is {kind!r}; one of {tuple(KINDS)} is needed")
    if dtype != "bfloat16":
        raise ValueError(f"quantize is {kind!r} and dtype {dtype!r}; 'bfloat16' is needed with it")


def check_device(kind: str | None, *, notify: Callable[[str], None] | None = None) -> None:
    """Raise ValueError if the first device has no products of 8 bits; notify: told of a CPU."""
    if kind is None:
        return
    device = jax.devices()[0]
    if device.platform == "cpu":
        if notify is not None:
            notify(f"quantize {kind} is emulated on a CPU, slower than without: for tests")
        return
    capability = str(getattr(device, "compute_capability", ""))
    needed = KINDS[kind]
    if not capability.replace(".", "", 1).isdigit() or float(capability) < needed:
        raise ValueError(
            f"quantize is {kind!r}, which {device.device_kind} has no products for; an NVIDIA GPU "
            f"of compute capability {needed} or above is needed, such as an H100"
        )


def quantized(
    dit: DiT, kind: str, *, where: Where | None = None, donate: bool = False, streamed: bool = False
) -> DiT:
    """The network with PRODUCTS of 8 bits, each with one scale a layer, and how attention goes.

    kind: of KINDS; "fp8" lets self-attention multiply 8 bits, too. where: in which way an array of
    a shape lies; None leaves that to JAX. donate: the given network's kernels are used up, each as
    soon as it is quantised. A stack that lies in the host's memory visits the device layer by layer
    and stays on it or, streamed, goes back. Arrays may be shapes under jax.eval_shape.
    """
    network = jax.tree.map(lambda leaf: leaf, dit)
    for path in PRODUCTS:
        *outer, name = path.split(".")
        place = functools.reduce(getattr, outer, network.layers)
        given = getattr(place, name)
        on_host = host_memory.lies_in(given)
        made = (_in_turn if on_host else _at_once)(given, where)
        if donate:
            given.kernel[...].delete()
        setattr(place, name, _back(made) if on_host and streamed else made)
    network.fp8_attention = kind == "fp8"
    if host_memory.lies_in(dit) and not streamed:
        lies = by_shape(where)
        network.layers = jax.tree.map(lambda x: jax.device_put(x, lies(x.shape)), network.layers)
    return network


def with_quantized(
    load: Callable[[], DiT], kind: str, where: Where | None = None, *, streamed: bool = False
) -> Callable[[], DiT]:
    """A function that loads the network and quantises it."""
    return lambda: quantized(load(), kind, where=where, donate=True, streamed=streamed)


def abstract(dit: DiT, kind: str | None) -> DiT:
    """The network, shapes in place of arrays, as quantized() would make it; itself for None."""
    return dit if kind is None else jax.eval_shape(lambda given: quantized(given, kind), dit)


def _back(given: QuantizedLinear) -> QuantizedLinear:
    """With its kernel in the host's memory, and no more on the device as the next is made."""
    kernel = given.kernel[...]
    on_host = jax.device_put(kernel, kernel.sharding.with_memory_kind(KIND))
    jax.block_until_ready(on_host)
    kernel.delete()
    given.kernel = nnx.Param(on_host)
    return given


def _at_once(given: Linear, where: Where | None) -> QuantizedLinear:
    """The products of a stack, [i, d_in, d_out], quantised."""
    return _each(given) if where is None else jax.jit(_each, out_shardings=_of(given, where))(given)


def _in_turn(given: Linear, where: Where | None) -> QuantizedLinear:
    """The same of a stack in the host's memory, of which one layer at a time is on the device.

    By a program of one layer: of a loop in one XLA brings all of the stack, to transpose it.
    """
    shardings = _of(given, where)
    made = jax.tree.map(
        lambda leaf, at: jnp.zeros(leaf.shape, leaf.dtype, device=at),
        jax.eval_shape(_each, given),
        shardings,
    )
    step = jax.jit(_layer, donate_argnums=1, out_shardings=shardings)
    for i in range(given.kernel[...].shape[0]):
        made = step(given, made, i)
    return made


def _layer(given: Linear, made: QuantizedLinear, i: Array) -> QuantizedLinear:
    """What is made, with layer i of what is given."""
    layer = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), given)
    one = QuantizedLinear.of(host_memory.to_device(layer))
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0), made, one)


def _of(given: Linear, where: Where | None) -> QuantizedLinear:
    """Where each array of the products of 8 bits lies."""
    lies = by_shape(where)
    return jax.tree.map(lambda leaf: lies(leaf.shape), jax.eval_shape(_each, given))


_each = jax.jit(jax.vmap(QuantizedLinear.of))
