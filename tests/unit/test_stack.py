"""The scan over layers that kernels cut out of a stack."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wan_jax.stack import scan_by_kernels


def test_gives_what_a_scan_gives() -> None:
    stream = np.random.RandomState(0)
    items = (
        {"kernel": jnp.asarray(stream.standard_normal((5, 4, 4)), jnp.float32)},
        jnp.arange(5.0),
        None,
    )

    def body(carry: jax.Array, item: tuple[dict[str, jax.Array], jax.Array, None]) -> tuple:
        weights, number, nothing = item
        assert nothing is None
        return jnp.tanh(carry @ weights["kernel"]) + number, None

    x = jnp.asarray(stream.standard_normal((3, 4)), jnp.float32)
    found, rest = jax.jit(lambda x: scan_by_kernels(body, x, items))(x)
    wanted, _ = jax.jit(lambda x: lax.scan(body, x, items))(x)
    assert rest is None
    np.testing.assert_array_equal(found, wanted)


def test_xla_does_not_know_the_place() -> None:
    """Which is what would make copies of the cuts; the numbers stay behind a barrier."""
    items = jnp.ones((5, 4))
    program = jax.make_jaxpr(
        lambda x: scan_by_kernels(lambda carry, item: (carry + item, None), x, items)
    )(jnp.zeros(4))
    equations = {equation.primitive.name: equation for equation in program.jaxpr.eqns}
    (hidden,) = equations["optimization_barrier"].outvars
    assert equations["scan"].invars.count(hidden) == 1
