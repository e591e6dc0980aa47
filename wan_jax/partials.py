"""Results of attention over some of the keys, and how those over others join them."""

import jax
import jax.numpy as jnp

Array = jax.Array
# A result [b, s, n, k], and its weight: float32 [b, s, n], the logarithm of the sum of the
# exponentials of its keys' scores.
Partial = tuple[Array, Array]
# Below every score, and finite: of -inf alone a softmax makes NaN. A power of two, so that scaling
# does not round it: a GPU may take the largest scaled score, rounded, from one that is not, and of
# these alone that has to be 0.
LOWEST = -(2.0**100)


def merge(one: Partial, other: Partial) -> Partial:
    """partial_attention() over the keys of both, which are disjoint; the result is float32."""
    (total, best), (out, weight) = one, other
    both = jnp.logaddexp(best, weight)
    fade, share = (jnp.exp(x - both)[..., None] for x in (best, weight))
    return total.astype(jnp.float32) * fade + out.astype(jnp.float32) * share, both
