"""The VAE at any size and length, whole or in tiles of its width: seconds, memory, distance.

    python benchmarks/tiles.py [--cases "decode 1280x720 81 6GB,encode 1920x1080 81 12GB"] [--exact]

A case is a direction, a size, the frames, and the memory that a run is given or "whole"; the tiles
are those that a run takes then. With a memory, that is all that JAX may take of the card. Seconds
are of the whole video, in bytes or from floats of the host as in a run, after a short one that
compiles; peak_gib is the most that JAX had in use, and limit_gib what it may. apart is the relative
L2 of the frames, or latents, from those of the whole, over the first --compare frames, in a process
without a limit that makes both side by side: as a run multiplies or, with --exact, in float32
throughout, where tiles should give the whole's numbers. Weights are random, but norms scale by 1.
Prints one table and writes results/tiles.json. Needs a CUDA GPU.
"""

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Self

import numpy as np
from card import limited
from measure import attempt, peak_gib
from random_checkpoint import arrays, config_of
from records import OURS
from runs import Case, Rows, listed, parser, run

CASES = (
    "decode 1280x720 81 whole",
    "decode 1280x720 81 6GB",
    "decode 1920x1080 81 12GB",
    "decode 1920x1080 801 12GB",
    "encode 1920x1080 81 12GB",
    "encode 1920x1080 801 12GB",
)
TINY = ("decode 64x16 17 whole", "decode 64x16 17 1.0MB", "encode 64x16 17 0.95MB")
WHOLE, AGAINST = "whole", "against"
LONG = 200  # frames; what has more is run once


class Video(NamedTuple):
    """One case."""

    kind: str
    width: int
    height: int
    frames: int
    memory: str

    @classmethod
    def of(cls, text: str) -> Self:
        kind, size, frames, memory = text.split()
        width, height = map(int, size.split("x"))
        return cls(kind, width, height, int(frames), memory)

    @property
    def name(self) -> str:
        return f"{self.kind} {self.width}x{self.height} {self.frames}"

    def shape(self, config: Any) -> tuple[int, int, int, int]:
        """[t, h, w, c] of its latents."""
        side, count = config.spatial_stride, 1 + (self.frames - 1) // config.temporal_stride
        return count, self.height // side, self.width // side, config.z_dim


class Coder:
    """The VAE, and what it is given of one case. tiny: a small one."""

    def __init__(self, video: Video, *, tiny: bool) -> None:
        import jax
        import jax.numpy as jnp

        from wan_jax import streaming
        from wan_jax.weights import trees
        from wan_jax.weights.sources import abstract_part

        self.video, self.config = video, config_of("tiny" if tiny else "1.3B").vae
        self.shape = video.shape(self.config)
        # Or there would be next to nothing in the frames.
        drawn = {n: np.ones_like(a) if n.endswith("scale") else a for n, a in arrays(self.config)}
        module = abstract_part(self.config, jnp.dtype(jnp.bfloat16))
        self._network = streaming.place(trees.fill(module, drawn), None)
        self._weights = sum(leaf.nbytes for leaf in jax.tree.leaves(self._network))
        self._draw = np.random.default_rng(0)
        self._given: Any = None

    def tiling(self, memory: str) -> Any:
        """How a run with so much memory does it."""
        from wan_jax.planning.vae_memory import Room, parse_memory

        limit = None if memory == WHOLE else parse_memory(memory)
        return Room(limit, self._weights).tiling(self.video.kind, self.config, self.shape)

    def run(self, tiling: Any, count: int, *, pixels: str, dtype: str) -> Iterator[np.ndarray]:
        """Frames, or latents, of the first `count` latent frames."""
        from wan_jax import streaming

        if self.video.kind == "decode":
            own = {"tiles": tiling.tiles, "chunk": tiling.chunk, "pixels": pixels, "dtype": dtype}
            given = self._latents()[:, :count]
            return (frames for frames, _ in streaming.decode(self._network, given, **own))
        own = {"tiles": tiling.tiles, "dtype": dtype, "what": "the video"}
        return streaming.encode(self._network, self._pixels(count), **own)

    def _latents(self) -> np.ndarray:
        if self._given is None:
            self._given = self._draw.standard_normal((1, *self.shape), np.float32)
        return self._given

    def _pixels(self, count: int) -> Iterator[np.ndarray]:
        """Chunks of noise, two by turns: a long video of floats would fill the host."""
        if self._given is None:
            size = self.video.height, self.video.width, 3
            stride = self.config.temporal_stride
            self._given = [
                self._draw.uniform(-1, 1, (1, n, *size)).astype(np.float32)
                for n in (1, stride, stride)
            ]
        one, *others = self._given
        return itertools.chain([one], itertools.islice(itertools.cycle(others), count - 1))


def timed(video: Video, *, tiny: bool) -> dict[str, Any]:
    """Seconds and memory as a run has them."""
    import jax

    coder = Coder(video, tiny=tiny)
    tiling, count = coder.tiling(video.memory), coder.shape[0]

    def seconds(count: int) -> float:
        start = time.perf_counter()
        for _ in coder.run(tiling, count, pixels="uint8", dtype="bfloat16"):
            pass
        return time.perf_counter() - start

    first = seconds(min(count, 1 + 2 * tiling.chunk))
    spent = [seconds(count) for _ in range(1 if video.frames > LONG else 3)]
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "seconds": sorted(spent)[len(spent) // 2],
        "first": first,
        "tiles": tiling.tiles,
        "chunk": tiling.chunk,
        "peak_gib": peak_gib(),
        "limit_gib": stats.get("bytes_limit", 0) / 2**30,
    }


def against(video: Video, *, frames: int, exact: bool, tiny: bool) -> dict[str, Any]:
    """How far tiles are from the whole, frame by frame, as no video fits the host twice."""
    coder = Coder(video, tiny=tiny)
    stride = coder.config.temporal_stride
    count = min(coder.shape[0], 1 + (frames - 1) // stride)
    own, dtype = coder.tiling(video.memory), "float32" if exact else "bfloat16"
    count -= (count - 1) % math.lcm(own.chunk, coder.tiling(WHOLE).chunk)
    apart = whole = most = 0.0
    both = (
        each_frame(coder.run(tiling, count, pixels="float32", dtype=dtype))
        for tiling in (own, coder.tiling(WHOLE))
    )
    for found, truth in zip(*both, strict=True):
        difference = found.astype(np.float64) - truth
        apart += float(np.sum(np.square(difference)))
        whole += float(np.sum(np.square(truth, dtype=np.float64)))
        most = max(most, float(np.max(np.abs(difference))))
    compared = 1 + (count - 1) * stride
    found = {"apart": math.sqrt(apart / whole), "most": most, "compared": compared}
    return {**found, "tiles": own.tiles, "chunk": own.chunk}


def each_frame(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames of [1, f, y, x, c] one by one."""
    for chunk in chunks:
        yield from chunk[0]


def slower(rows: Rows) -> Rows:
    """The rows with how much longer they take than the whole."""
    whole = {r["case"]: r["seconds"] for r in rows if r.get("how") == WHOLE and "seconds" in r}
    for row in rows:
        if "seconds" in row and row["how"] != WHOLE and row["case"] in whole:
            row["to_whole"] = row["seconds"] / whole[row["case"]]
    return rows


def cases_of(text: str, what: list[str], *, frames: int, exact: bool) -> Iterator[Case]:
    """The timing of a video, and the comparison where there is one, if these are asked for."""
    from wan_jax.planning.vae_memory import parse_memory

    video = Video.of(text)
    environment = {} if video.memory == WHOLE else limited(parse_memory(video.memory))
    if "time" in what:
        labels = {"case": video.name, "how": video.memory}
        yield Case(labels, ["--child", OURS, "--case", text], environment)
    if video.memory == WHOLE or "apart" not in what:
        return
    labels = {"case": video.name, "how": f"{video.memory}, {'exact' if exact else 'as a run'}"}
    more = ["--compare", str(frames), *(["--exact"] if exact else [])]
    yield Case(labels, ["--child", AGAINST, "--case", text, *more])


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--cases", default=",".join(CASES))
    flags.add_argument("--measure", default="time,apart", help="one of these, or both")
    flags.add_argument("--compare", type=int, default=81, help="so many frames")
    flags.add_argument("--exact", action="store_true", help="compare in float32 without TF32")
    arguments = flags.parse_args()
    own: dict[str, Any] = {"frames": arguments.compare, "exact": arguments.exact}
    if arguments.child:
        video, tiny = Video.of(arguments.case), arguments.tiny
        measure = timed if arguments.child == OURS else against
        given = {} if arguments.child == OURS else own
        attempt({}, lambda: measure(video, tiny=tiny, **given))
        return
    wanted = TINY if arguments.tiny else listed(arguments.cases)
    what = listed(arguments.measure)
    cases = [case for text in wanted for case in cases_of(text, what, **own)]
    columns = ("case", "how", "tiles", "chunk", "seconds", "to_whole", "first", "apart", "most")
    columns += ("compared", "peak_gib", "limit_gib")
    run("tiles", __file__, cases, arguments=arguments, columns=columns, derive=slower)


if __name__ == "__main__":
    main()
