"""The residual stream of a transformer: what is added to it, and the norms of it in between.

    stream = Stream.of(h, dtype)
    for block in blocks:
        x, stream = stream.norm(scale, shift, eps=eps)      layer_norm(h) * scale + shift
        stream = stream.add(product(x), gate)               h + gate * product(x)
    h = stream.whole()

That is all there is to it, but on Hopper, with products in 16 bits and no gradient. There what is
added waits for the next norm, which one kernel (hopper_norm.py) does with the sum in one pass.
Bytes moved for each number, of a norm behind one sum: 4 + 2 to read h and y, 4 + 2 to write the sum
and x. A norm that leaves the sum to the next one saves 4 and costs the next one 2; two in a row
that do would save nothing more. A block has three, 34 bytes with one that leaves it, 36 with none.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax

from wan_jax import xla
from wan_jax.layers import layer_norm

Array = jax.Array
Term = tuple[Array | None, Array]  # gate, float32 [b, 1, d], None is 1; y [b, l, d]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["h_bld", "terms"], meta_fields=["fused"]
)
@dataclasses.dataclass(frozen=True)
class Stream:
    """Tokens [b, l, d] float32, h_bld and terms that wait to be added, in this order.

    fused: whether they wait; else there are none.
    """

    h_bld: Array
    terms: tuple[Term, ...]
    fused: bool

    @classmethod
    def of(cls, h_bld: Array, dtype: jnp.dtype, *, waiting: bool = False) -> Self:
        """Of tokens to which products in dtype are added.

        waiting: it is the carry of a scan, whose body ends with a sum that waits for the next turn:
        where sums do, there is one from the start, of zeros.
        """
        fused = _fits(h_bld, dtype)
        stream = cls(h_bld, (), fused)
        if not (fused and waiting):
            return stream
        none = jnp.zeros((*h_bld.shape[:1], 1, *h_bld.shape[2:]), jnp.float32)
        return stream.add(jnp.zeros(h_bld.shape, dtype), none)

    def add(self, y_bld: Array, gate_b1d: Array | None = None) -> Self:
        """With gate * y; None is a gate of ones."""
        if not self.fused:
            return dataclasses.replace(self, h_bld=_sum(self.h_bld, ((gate_b1d, y_bld),)))
        if gate_b1d is not None:  # of one shape, whatever batch the modulation has
            gate_b1d = jnp.broadcast_to(gate_b1d, (y_bld.shape[0], *gate_b1d.shape[1:]))
        return dataclasses.replace(self, terms=(*self.terms, (gate_b1d, y_bld)))

    def norm(
        self, scale: Array, shift: Array, *, eps: float, leave: bool = False
    ) -> tuple[Array, Self]:
        """(layer_norm(h) * scale + shift, float32, and the stream as it is then).

        scale, shift: [b, 1, d] or [d]. leave: terms that wait go on waiting, now as numbers only:
        their gradients come by way of h.
        """
        if not self.fused:
            return _norm(self.h_bld, scale, shift, eps), self
        scale, shift = (x.reshape(-1, 1, x.shape[-1]) for x in (scale, shift))
        keep = bool(self.terms) and not leave
        x, h = _fused(self.h_bld, self.terms, scale, shift, eps, keep)
        terms = lax.stop_gradient(self.terms) if leave else ()
        return x, dataclasses.replace(self, h_bld=h, terms=terms)

    def settled(self) -> Self:
        """With nothing that waits."""
        return dataclasses.replace(self, h_bld=self.whole(), terms=())

    def whole(self) -> Array:
        """The tokens [b, l, d], float32."""
        return _sum(self.h_bld, self.terms)


def _fits(h: Array, dtype: jnp.dtype) -> bool:
    if not xla.on_hopper():
        return False
    from wan_jax import hopper_norm

    return hopper_norm.fits(h, dtype)


def _sum(h: Array, terms: tuple[Term, ...]) -> Array:
    for gate, y in terms:
        wide = y.astype(h.dtype)
        h = h + (wide if gate is None else gate * wide)
    return h


def _norm(h: Array, scale: Array, shift: Array, eps: float) -> Array:
    return layer_norm(h, eps=eps) * scale + shift


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _fused(
    h: Array, terms: tuple[Term, ...], scale: Array, shift: Array, eps: float, keep: bool
) -> tuple[Array, Array]:
    """(norm of the sum, the sum), by the kernel; without `keep` h, as something to differentiate.

    The norm is in the products' 16 bits, which they round it to anyway, but its type is float32, so
    that the gradients of all that read it are summed in float32. As to gradients, what is given
    back beside it is the sum, kept or not. Where there is one, the forward pass is XLA's, too: it
    is done again beside the gradient, and XLA knows how to split it among devices.
    """
    from wan_jax import hopper_norm

    x, total = hopper_norm.add_and_norm(h, terms, scale, shift, eps=eps, keep=keep)
    return x.astype(jnp.float32), h if total is None else total


_Back = Callable[[tuple[Array, Array]], tuple[Array, tuple[Term, ...], Array, Array]]


def _forward(
    h: Array, terms: tuple[Term, ...], scale: Array, shift: Array, eps: float, keep: bool
) -> tuple[tuple[Array, Array], _Back]:
    def plain(h: Array, terms: tuple[Term, ...], scale: Array, shift: Array) -> tuple[Array, Array]:
        total = _sum(h, terms)
        return _norm(total, scale, shift, eps), total

    (x, total), back = jax.vjp(plain, h, terms, scale, shift)
    return (x, total if keep else h), back


_fused.defvjp(_forward, lambda eps, keep, back, gradients: back(gradients))
