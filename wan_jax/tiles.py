"""Where the tiles of a video's width lie.

A tile makes columns of its own out of a window of columns, which is wide enough that those in its
middle see all that they see in the whole; the others are computed and cut off, as soon as nothing
that is still to be done sees them. A window ends where the video ends, and not sooner, so what a
convolution pads with is right where it is kept, and networks know nothing of tiles.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

Array = jax.Array
AXIS = 3  # of [b, t, y, x, c]


class Place(NamedTuple):
    """Where a tile is, in latent columns.

    start, own: of its first window and of its own columns in the whole. offsets: of every window
    in the one before it, and of its own columns in the last.
    """

    start: int
    own: int
    offsets: tuple[np.int32, ...]


class Tiles(NamedTuple):
    """The columns of a video whose latents are `width` wide in `number` tiles, or fewer.

    reaches: so many latent columns to either side of its own a tile still sees, ever fewer. All
    tiles are equally wide, so that one program serves them: where the width does not divide the
    last repeats some of the columns before it.
    """

    width: int
    number: int
    reaches: tuple[int, ...]

    @property
    def share(self) -> int:
        """Latent columns that each tile makes."""
        return -(-self.width // self.number)

    @property
    def windows(self) -> tuple[int, ...]:
        """Latent columns that it computes for that, one number for each of `reaches`."""
        sides = min(2, self.number - 1)
        return tuple(min(self.width, self.share + sides * reach) for reach in self.reaches)

    @property
    def total(self) -> int:
        """How many there are: fewer than `number` where these make columns enough."""
        return -(-self.width // self.share)

    def places(self) -> list[Place]:
        """Where the tiles are, from the left."""
        return [self.place(number) for number in range(self.total)]

    def place(self, number: int) -> Place:
        """Where a tile is, counted from the left from 0; ValueError if there are not so many."""
        if not 0 <= number < self.total:
            raise ValueError(f"tile {number} is asked for; there are 0 to {self.total - 1}")
        own = min(number * self.share, self.width - self.share)
        starts = [
            min(max(0, own - reach), self.width - window)
            for reach, window in zip(self.reaches, self.windows, strict=True)
        ]
        offsets = np.diff([*starts, own]).astype(np.int32)
        return Place(starts[0], own, tuple(offsets))

    def window(self, whole: Any, number: int) -> Any:
        """The first window of a tile, of an array of any resolution on the device or the host."""
        scale = whole.shape[AXIS] // self.width
        start = self.place(number).start * scale
        return whole[:, :, :, start : start + self.windows[0] * scale]

    def narrow(self, x: Array, i: int, offsets: tuple[Array, ...]) -> Array:
        """Of a tile's window i the next one or, of the last, its own columns."""
        scale = x.shape[AXIS] // self.windows[i]
        kept = (*self.windows[1:], self.share)[i]
        return lax.dynamic_slice_in_dim(x, offsets[i] * scale, kept * scale, AXIS)

    def put(self, whole: np.ndarray, own: np.ndarray, place: Place) -> None:
        """Write a tile's own columns into the whole."""
        scale = whole.shape[AXIS] // self.width
        start = place.own * scale
        whole[:, :, :, start : start + self.share * scale] = own
