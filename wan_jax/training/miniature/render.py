"""Draws scenes on the device: from the numbers of world.fields to clips.

Shapes are cut out by their signed distance (pixels; negative inside), with an edge smooth enough
for a small VAE to encode. Clips are drawn a few at a time, so the memory needed is that of the
result and of the work on these.
"""

import math

import jax
import jax.numpy as jnp

from wan_jax.training.miniature import world

Fields = dict[str, jax.Array]
_TOGETHER = 8  # clips that are drawn at once
_EDGE = 1.5  # pixels over which a shape goes from full to nothing


def render(fields: Fields, *, size: tuple[int, int], frames: int) -> jax.Array:
    """Clips float32 [b, frames, y, x, 3] in -1..1.

    fields: of world.fields, for scenes of this many frames. size: width and height of the pictures;
    scenes of another size are seen as through a window at their upper left corner.
    Raises ValueError where the fields are of another number of frames.
    """
    if fields["position"].shape[2] != frames:
        raise ValueError(f"fields of {fields['position'].shape[2]} frames; {frames} were asked for")
    return jax.lax.map(lambda one: _clip(one, size), fields, batch_size=_TOGETHER)


def _clip(fields: Fields, size: tuple[int, int]) -> jax.Array:
    """One clip [f, y, x, 3] in -1..1; fields without their batch axis."""
    width, height = size
    # Pixels are sampled in their middle. [y, x, 2]
    middles = [jnp.arange(length, dtype=jnp.float32) + 0.5 for length in size]
    grid = jnp.stack(jnp.meshgrid(*middles), -1)
    ground = _ground(fields, grid, size)

    def frame(position: jax.Array, radius: jax.Array, opacity: jax.Array) -> jax.Array:
        """position [o, 2], radius, opacity [o] -> [y, x, 3]."""
        picture = jnp.repeat(ground[..., None], 3, -1)
        for o in range(fields["shape"].shape[0]):
            distance = _distance(fields["shape"][o], grid - position[o], radius[o])
            t = jnp.clip(0.5 - distance / _EDGE, 0.0, 1.0)
            alpha = (opacity[o] * t * t * (3.0 - 2.0 * t))[..., None]
            picture += alpha * (fields["rgb"][o] - picture)
        return picture

    moving = (fields["position"], fields["radius"], fields["opacity"])
    clip = jax.vmap(frame, in_axes=1)(*moving)
    clip = 0.5 + fields["contrast"] * (clip - 0.5)
    clip += fields["brightness"][:, None, None, None]
    exact = jax.lax.Precision.HIGHEST
    clip = jnp.einsum("yv,fvxc->fyxc", _blur(fields["blur"], height), clip, precision=exact)
    clip = jnp.einsum("xu,fyuc->fyxc", _blur(fields["blur"], width), clip, precision=exact)
    return jnp.clip(2.0 * clip - 1.0, -1.0, 1.0)


def _ground(fields: Fields, grid: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Brightness of the background [y, x] in 0..1."""
    along = grid / jnp.array(size, jnp.float32) - 0.5
    gradient = along @ fields["slope"]
    # Cells blend over one pixel at their borders: the product of two clipped waves.
    cell = fields["cell"]
    wave = jnp.clip(jnp.sin(jnp.pi / cell * grid) * (cell / jnp.pi), -0.5, 0.5)
    checkers = 2.0 * wave[..., 0] * wave[..., 1] * fields["parity"]
    patterns = jnp.stack([jnp.zeros_like(gradient), gradient, checkers])
    return fields["level"] + fields["span"] * patterns[fields["kind"]]


def _distance(shape: jax.Array, offset: jax.Array, radius: jax.Array) -> jax.Array:
    """Signed distance [y, x] to the shape of this index; offset [y, x, 2] from its middle."""
    makers = (_circle, _square, _triangle, _star, _ring, _cross)
    found = jnp.full(offset.shape[:-1], jnp.inf, jnp.float32)
    for index, (name, maker) in enumerate(zip(world.SHAPES, makers)):
        found = jnp.where(shape == index, maker(offset, world.SPANS[name] * radius), found)
    return found


def _circle(p: jax.Array, r: jax.Array) -> jax.Array:
    return jnp.hypot(p[..., 0], p[..., 1]) - r


def _ring(p: jax.Array, r: jax.Array) -> jax.Array:
    middle, half = (1 + world.HOLE) / 2, (1 - world.HOLE) / 2
    return jnp.abs(_circle(p, middle * r)) - half * r


def _box(p: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """A box of half edges x and y."""
    q = jnp.abs(p) - jnp.stack([x, y])
    outside = jnp.maximum(q, 0.0)
    return jnp.hypot(outside[..., 0], outside[..., 1]) + jnp.minimum(q.max(-1), 0.0)


def _square(p: jax.Array, r: jax.Array) -> jax.Array:
    return _box(p, r, r)


def _cross(p: jax.Array, r: jax.Array) -> jax.Array:
    return jnp.minimum(_box(p, r, world.ARM * r), _box(p, world.ARM * r, r))


def _triangle(p: jax.Array, r: jax.Array) -> jax.Array:
    """The farthest of its three edges' lines, which at its corners is near enough."""
    sides = [
        p[..., 0] * math.sin(angle) - p[..., 1] * math.cos(angle)
        for angle in (math.pi / 3, math.pi, 5 * math.pi / 3)
    ]
    return jnp.stack(sides).max(0) - r / 2


def _star(p: jax.Array, r: jax.Array) -> jax.Array:
    """Folded into half a point, where the outline is one straight line from tip to notch."""
    angle = jnp.arctan2(p[..., 0], -p[..., 1])
    fifth = 2 * math.pi / 5
    angle = jnp.abs(jnp.mod(angle + fifth / 2, fifth) - fifth / 2)
    length = jnp.hypot(p[..., 0], p[..., 1])
    along, across = length * jnp.cos(angle), length * jnp.sin(angle)
    # From the tip (1, 0) to the notch, in units of r.
    step_x = world.NOTCH * math.cos(fifth / 2) - 1
    step_y = world.NOTCH * math.sin(fifth / 2)
    return ((r - along) * -step_y - across * step_x) / math.hypot(step_x, step_y)


def _blur(sigma: jax.Array, length: int) -> jax.Array:
    """The matrix [length, length] of a Gaussian blur along a line; the identity for sigma 0."""
    steps = jnp.arange(length, dtype=jnp.float32)
    away = (steps[:, None] - steps) / jnp.maximum(sigma, 1e-3)
    weights = jnp.exp(-0.5 * away * away)
    return weights / weights.sum(-1, keepdims=True)
