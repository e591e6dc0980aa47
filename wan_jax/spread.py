"""Networks on many devices: branches, tokens, columns and weights spread over a mesh.

One shard_map holds a whole network, so that what devices tell each other is written here, in
sequence.py, in ulysses.py and in columns.py and nowhere else. Weights of which devices hold a share
each are gathered when they are needed: those of the stack layer by layer. Latents are whole on
every device; they are small.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from wan_jax import host_memory, xla
from wan_jax.dit import Cond, DiT
from wan_jax.sharding import BATCH, GUIDANCE, RING, ULYSSES, Layout

Array = jax.Array
Branches = Cond | tuple[Cond, ...]  # see place()
Fetch = Callable[[Any], Any]  # brings the weights of one layer of a stack, whole
WHOLE, _ROWS = PartitionSpec(), PartitionSpec(BATCH)


def program(
    function: Callable[..., Any],
    layout: Layout | None,
    *,
    given: Any = WHOLE,
    found: Any = WHOLE,
    **arguments: Any,
) -> xla.Program:
    """xla.jit(function, **arguments), with a layout computed by every device of it.

    function: of a network, whose weights lie as layout.weights() says, and of arrays. It lets its
    keyword `fetch`, where that is not None, bring every layer of the stack. given, found: how the
    arrays and the results lie on the devices, a PartitionSpec for all or a tuple of one for each.
    """
    if layout is None:

        @functools.wraps(function)
        def here(network: Any, *arrays: Any) -> Any:
            return function(network, *arrays, fetch=host_memory.fetch_of(network))

        return xla.jit(here, **arguments)

    @functools.wraps(function)
    def everywhere(network: Any, *arrays: Any) -> Any:
        weights = _Weights(network, layout)

        def run(leaves: Sequence[Array], arrays: Sequence[Any]) -> Any:
            whole, fetch = weights.gather(leaves)
            return function(whole, *arrays, fetch=fetch)

        return _map(run, layout, (weights.specs, given), found)(weights.leaves, arrays)

    return xla.jit(everywhere, **arguments)


def make(function: Callable[[], Any], layout: Layout, spec: PartitionSpec) -> xla.Program:
    """A program that gives arrays that lie so, each device making what function() says is its."""
    return xla.jit(_map(function, layout, (), spec))


def lies_on(network: Any, layout: Layout | None) -> bool:
    """Whether this is where the network's weights are."""
    leaf = jax.tree.leaves(network)[0]
    return layout is not None and leaf.sharding.device_set == set(layout.mesh.devices.flat)


def place(conds: Sequence[Cond], layout: Layout) -> Branches:
    """The conditions of the branches, positive first, for velocity().

    Where the mesh has devices for the guidance, each holds its branch only, of arrays [branches, i,
    b, s, n, k]; else all hold all, apart, so that none is copied to be read.
    """
    where = NamedSharding(layout.mesh, of_branches(len(conds), layout))
    if not are_apart(len(conds), layout):
        return tuple(jax.device_put(cond, where) for cond in conds)
    return jax.tree.map(lambda *leaves: jax.device_put(jnp.stack(leaves), where), *conds)


def velocity(
    dit: DiT,
    x: Array,
    t: Array | float,
    conds: Branches,
    guidance: Array,
    *,
    layout: Layout,
    known: Array | None = None,
    implementation: str | None = None,
) -> Array:
    """sampler.velocity() with weights that lie as layout.weights() says, and conds of place().

    The number of videos must be a multiple of the devices along "batch", that of heads one of those
    along "ulysses"; tokens need not divide.
    """
    weights = _Weights(dit, layout)
    branches = of_branches(2 if isinstance(conds, Cond) else len(conds), layout)
    given = [x] if known is None else [x, jnp.broadcast_to(known, (*x.shape[:-1], known.shape[-1]))]

    def run(leaves: Sequence[Array], t: Array, *arguments: Any) -> Array:
        network, fetch = weights.gather(leaves)
        share = network.share(x.shape, ring=layout.size(RING), ulysses=layout.size(ULYSSES))
        run = functools.partial(network, implementation=implementation, fetch=fetch, share=share)
        streams = host_memory.fetch_of(network) is not None
        return _velocity(run, t, *arguments, streams=streams)

    specs = (weights.specs, WHOLE, branches, WHOLE, [_ROWS] * len(given))
    mapped = _map(run, layout, specs, _ROWS)
    found = mapped(weights.leaves, jnp.asarray(t, jnp.float32), conds, guidance, given)
    # So that what a step gives lies as what it was given, or the next were another program; and so
    # that every host has all videos.
    return lax.with_sharding_constraint(found, NamedSharding(layout.mesh, WHOLE))


def _map(run: Callable[..., Any], layout: Layout, specs: Any, out: Any) -> Callable[..., Any]:
    # The check cannot see that what was gathered is the same everywhere.
    return jax.shard_map(run, mesh=layout.mesh, in_specs=specs, out_specs=out, check_vma=False)


def are_apart(count: int, layout: Layout) -> bool:
    """Whether so many branches of guidance are computed by devices of their own."""
    return count == 2 and layout.size(GUIDANCE) == 2


def of_branches(count: int, layout: Layout) -> PartitionSpec:
    """How the conditions of place() lie."""
    return PartitionSpec(*([GUIDANCE] if are_apart(count, layout) else []), None, BATCH)


def _velocity(
    run: Callable[..., Array],
    t: Array,
    conds: Branches,
    guidance: Array,
    given: Sequence[Array],
    *,
    streams: bool,
) -> Array:
    """What one device computes: its videos, its tokens, its branches."""
    x = jnp.concatenate(given, -1)
    t_b = jnp.full((x.shape[0],), t, jnp.float32)
    if isinstance(conds, Cond):  # its own branch
        own = run(x, t_b, jax.tree.map(lambda leaf: leaf[0], conds))
        positive, negative = lax.all_gather(own, GUIDANCE)
        return negative + guidance * (positive - negative)
    return in_turn(run, x, t_b, conds, guidance, streams=streams)


def in_turn(
    run: Callable[..., Array],
    x: Array,
    t_b: Array,
    conds: Sequence[Cond],
    guidance: Array,
    *,
    streams: bool,
) -> Array:
    """The velocity of one branch, or of two that run in turn: v_neg + guidance * (v_pos - v_neg).

    run: (x, t_b, cond) -> velocity. streams: whether it reads weights in the host's memory. Without
    those it is traced and lowered once for both branches; what a GPU's compiler makes of such
    weights as arguments of a function within the program has not been tried.
    """
    run = run if streams else jax.jit(run)
    positive = run(x, t_b, conds[0])
    if len(conds) == 1:
        return positive
    # The barrier keeps the second branch's activations from living beside the first's.
    x, positive = lax.optimization_barrier((x, positive))
    negative = run(x, t_b, conds[1])
    return negative + guidance * (positive - negative)


class _Weights:
    """The weights of a network as a list, with how each is split."""

    def __init__(self, network: Any, layout: Layout) -> None:
        found, self._tree = jax.tree.flatten_with_path(network)
        self.leaves = [leaf for _, leaf in found]
        self.specs = [layout.spec(leaf.shape) for leaf in self.leaves]
        self._in_stack = [getattr(keys[0], "name", None) == host_memory.STACK for keys, _ in found]

    def gather(self, leaves: Sequence[Array]) -> tuple[Any, Fetch | None]:
        """Inside shard_map: the network, whole but for its stack, and what fetches a layer."""
        items = list(zip(leaves, self.specs, self._in_stack, strict=True))
        network = jax.tree.unflatten(
            self._tree,
            [leaf if later else _whole(leaf, tuple(spec)) for leaf, spec, later in items],
        )
        bring = host_memory.fetch_of(network)
        # A layer's arrays have no axis of layers.
        of_layer = [tuple(spec)[1:] for _, spec, later in items if later]
        if not any(of_layer):
            return network, bring

        def fetch(layer: Any) -> Any:
            own, tree = jax.tree.flatten(layer if bring is None else bring(layer))
            return jax.tree.unflatten(
                tree, [_whole(*pair) for pair in zip(own, of_layer, strict=True)]
            )

        return network, fetch


def _whole(leaf: Array, spec: tuple[Any, ...]) -> Array:
    """A weight of which devices hold a share each, on all of them."""
    for axis, names in enumerate(spec):
        if names is not None:
            leaf = lax.all_gather(leaf, names, axis=axis, tiled=True)
    return leaf
