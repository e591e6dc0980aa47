"""Batches of a cache, each a pure function of the seed and its number.

Examples are in buckets, one for each shape of latents, and a batch comes from one bucket. A bucket
is gone through in epochs, each a permutation of its examples, one behind the other: a batch takes
the next rows of that sequence, so the last of an epoch goes on into the next one, and a bucket
smaller than a batch comes more than once in it. Buckets take turns in proportion to how many
examples they have, as evenly as whole batches can.
"""

import concurrent.futures
import functools
import math
from typing import NamedTuple, Self

import numpy as np

from wan_jax.training import entries
from wan_jax.training.entries import CONTEXT, KNOWN, LATENTS, TOKENS, Cache, Entry

# What random numbers are for; other uses of the seed do not come near them.
_ORDER, _TURNS = 1, 2


class Batch(NamedTuple):
    """Examples of one shape, on the host.

    latents: float32 [b, t, h, w, z]. context: [b, s, d], zero past each text; s is the same for all
    batches. known: float32 [b, t, h, w, 4 + z], and tokens: float32 [b, s, d], of a checkpoint that
    takes images, else None.
    """

    latents: np.ndarray
    context: np.ndarray
    known: np.ndarray | None
    tokens: np.ndarray | None


class _Row(NamedTuple):
    entry: Entry
    caption: int


class Batches:
    """Batches of a cache; a thread reads ahead.

    batch_size: rows of all processes together. seed: 0 or more; with the number of a batch it
    decides its rows, so a run that is taken up sees what it would have seen. prefetch: batches that
    are read ahead, which changes nothing else; 0 starts no thread. In a `with` block, or closed by
    close(). Raises ValueError for arguments that cannot be.
    """

    def __init__(self, cache: Cache, *, batch_size: int, seed: int, prefetch: int = 2) -> None:
        for name, value, low in (("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < low:
                raise ValueError(f"{name} is {value}; an integer from {low} up is needed")
        if prefetch < 0:
            raise ValueError(f"prefetch is {prefetch}; a number of batches from 0 up is needed")
        if not cache.entries:
            raise ValueError(f"{cache.folder} has no examples; one or more are needed")
        self.batch_size = batch_size
        self.seed = seed
        self._buckets: dict[tuple[int, ...], list[Entry]] = {}
        # In an order that is the examples' own, so that of a listing's lines does not matter.
        for entry in sorted(cache.entries, key=lambda entry: (entry.path.name, entry.name)):
            self._buckets.setdefault(entry.shape, []).append(entry)
        self.shapes = tuple(sorted(self._buckets))
        self.examples = len(cache.entries)
        self._rows = max(len(cache.null), *(entry.rows for entry in cache.entries))
        self.null = _padded(cache.null, self._rows)
        stored = entries.names(cache.entries[0].path)
        self._names = tuple(n for n in (LATENTS, CONTEXT, KNOWN, TOKENS) if n in stored)
        self._prefetch = prefetch
        self._waiting: dict[tuple[int, int, int], concurrent.futures.Future[Batch]] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "batches") if prefetch else None

    @property
    def steps_per_epoch(self) -> int:
        """Batches after which every example has come about once."""
        return math.ceil(self.examples / self.batch_size)

    def batch(self, step: int, *, shard: tuple[int, int] = (0, 1)) -> Batch:
        """Batch number `step`, from 0.

        shard: (i, n) for the rows of process i of n, batch_size / n of them. Raises ValueError for
        numbers that cannot be, and naming a file that cannot be read.
        """
        i, n = shard
        if not 0 <= i < n or self.batch_size % n:
            raise ValueError(
                f"shard is {shard} of a batch of {self.batch_size}; (i, n) with 0 <= i < n is "
                "needed, and a batch_size in multiples of n"
            )
        if step < 0:
            raise ValueError(f"step is {step}; a number from 0 up is needed")
        if self._thread is None:
            return self._read(step, i, n)
        wanted = {(k, i, n) for k in range(step, step + 1 + self._prefetch)}
        for key in set(self._waiting) - wanted:
            self._waiting.pop(key).cancel()
        for key in sorted(wanted - set(self._waiting)):
            self._waiting[key] = self._thread.submit(self._read, *key)
        return self._waiting.pop((step, i, n)).result()

    def close(self) -> None:
        """Ends the thread; batch() must not be called after it."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, step: int, i: int, n: int) -> Batch:
        count = self.batch_size // n
        found: dict[str, list[np.ndarray]] = {name: [] for name in self._names}
        for row in self._plan(step)[i * count : (i + 1) * count]:
            tensors = entries.read(row.entry.path, self._names, row=row.caption)
            tensors[CONTEXT] = _padded(tensors[CONTEXT], self._rows)
            for name, tensor in tensors.items():
                found[name].append(tensor)
        arrays = {name: np.stack(tensors) for name, tensors in found.items()}
        return Batch(arrays[LATENTS], arrays[CONTEXT], arrays.get(KNOWN), arrays.get(TOKENS))

    def _plan(self, step: int) -> list[_Row]:
        """What the rows of a batch are."""
        counts = tuple(len(self._buckets[shape]) for shape in self.shapes)
        bucket, turn = _turn(self.seed, counts, step)
        shape = self.shapes[bucket]
        held = self._buckets[shape]
        rows = []
        for place in range(turn * self.batch_size, (turn + 1) * self.batch_size):
            epoch, k = divmod(place, len(held))
            order, draws = _epoch(self.seed, shape, len(held), epoch)
            entry = held[order[k]]
            rows.append(_Row(entry, int(draws[k] % np.uint64(entry.captions))))
        return rows


def _turn(seed: int, counts: tuple[int, ...], step: int) -> tuple[int, int]:
    """Which bucket batch `step` comes from, and how many batches it gave before."""
    smallest = math.gcd(*counts)
    shares = tuple(count // smallest for count in counts)
    rounds, k = divmod(step, sum(shares))
    turns = _round(seed, shares, rounds)
    bucket = int(turns[k])
    return bucket, rounds * shares[bucket] + int(np.count_nonzero(turns[:k] == bucket))


@functools.lru_cache(maxsize=8)
def _round(seed: int, shares: tuple[int, ...], number: int) -> np.ndarray:
    """Buckets in the order in which they give a batch; each comes `share` times, evenly spread."""
    starts = _random(seed, _TURNS, number, count=len(shares)) / 2.0**64
    times = [(np.arange(share) + start) / share for share, start in zip(shares, starts)]
    buckets = np.repeat(np.arange(len(shares)), shares)
    return buckets[np.argsort(np.concatenate(times), kind="stable")]


@functools.lru_cache(maxsize=64)
def _epoch(
    seed: int, shape: tuple[int, ...], count: int, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """The order of a bucket's examples in an epoch, and a random number for each place in it."""
    draws = _random(seed, _ORDER, number, *shape, count=2 * count)
    return np.argsort(draws[:count], kind="stable"), draws[count:]


def _random(*key: int, count: int) -> np.ndarray:
    """uint64 [count] of a key; the bare generator, whose numbers no release of NumPy changes."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def _padded(context: np.ndarray, rows: int) -> np.ndarray:
    """States [s, d] with zero rows up to `rows`."""
    return np.pad(context, ((0, rows - len(context)), (0, 0)))
