"""Sums of the residual stream and the norms behind them: our kernel for Hopper, and XLA.

    python benchmarks/residual.py [--models 1.3B,14B]

The three of a block at the length of a video, in bfloat16: a sum and its norm, a norm that leaves
the sum to the next one, and that one. bytes are those that must be moved, so gb_per_s of XLA, which
may move more, is what it comes to; deviation is the relative L2 of the norm from float32. Prints
one table and writes results/residual.json. Needs a Hopper GPU, or the ways are one.
"""

from collections.abc import Callable
from typing import Any

from measure import BUSY, attempt, median_seconds
from networks import LATENTS
from random_checkpoint import config_of
from records import OURS
from runs import Case, listed, parser, run

# Parts that are added, whether the sum is left to the next norm; in the order of a block.
WHAT = {
    "a sum and its norm": (1, False),
    "a norm that leaves the sum": (1, True),
    "two sums and their norm": (2, False),
}
CALLS = 20  # one after the other, so that none waits for the host
TINY = "tiny"


def rows_of(model: str) -> int:
    """Tokens of a video, filled up as a run does on NVIDIA."""
    import jax.numpy as jnp

    from wan_jax.sequence import share_of

    t, h, w = LATENTS[model]
    return share_of(t * (h // 2) * (w // 2), jnp.dtype(jnp.bfloat16)).rows


def run_ours(model: str) -> None:
    import jax
    import jax.numpy as jnp

    from wan_jax.residual import Stream

    config = config_of(model).dit
    rows, d, eps = rows_of(model), config.dim, config.eps
    keys = iter(jax.random.split(jax.random.key(0), 9))
    h = 3.0 * jax.random.normal(next(keys), (1, rows, d))
    ys = [jax.random.normal(next(keys), h.shape, jnp.bfloat16) for _ in range(2)]
    scale, shift, gate = (jax.random.normal(next(keys), (1, 1, d)) for _ in range(3))

    def program(
        parts: int, *, leave: bool, fused: bool, dtype: Any = jnp.bfloat16
    ) -> Callable[..., Any]:
        @jax.jit
        def added(h: jax.Array, ys: list[jax.Array]) -> tuple[jax.Array, jax.Array | None]:
            stream = Stream.of(h, jnp.dtype(jnp.bfloat16 if fused else jnp.float32))
            for y in ys[:parts]:
                stream = stream.add(y, gate)
            x, stream = stream.norm(scale, shift, eps=eps, leave=leave)
            return x.astype(dtype), None if leave else stream.h_bld

        return added

    def measure(parts: int, *, leave: bool, fused: bool) -> dict[str, Any]:
        added = program(parts, leave=leave, fused=fused)

        def many() -> None:
            for _ in range(CALLS):
                found = added(h, ys)
            jax.block_until_ready(found)

        truth = program(parts, leave=leave, fused=False, dtype=jnp.float32)(h, ys)[0]
        apart = added(h, ys)[0].astype(jnp.float32) - truth
        seconds = median_seconds(many, repeats=7, busy=BUSY) / CALLS
        moved = h.size * (4 + 2 * parts + 2 + (0 if leave else 4))
        return {
            "seconds": seconds,
            "bytes": moved,
            "gb_per_s": moved / seconds / 1e9,
            "deviation": float(jnp.linalg.norm(apart) / jnp.linalg.norm(truth)),
        }

    for what, (parts, leave) in WHAT.items():
        for how, fused in (("XLA", False), ("hopper", True)):
            labels = {"case": f"{model} {what}", "how": how}
            attempt(labels, lambda p=parts, own={"leave": leave, "fused": fused}: measure(p, **own))


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--models", default="1.3B,14B")
    arguments = flags.parse_args()
    if arguments.child:
        run_ours(arguments.case)
        return
    models = [TINY] if arguments.tiny else listed(arguments.models)
    cases = [Case({"model": model}, ["--child", OURS, "--case", model]) for model in models]
    columns = ("case", "how", "seconds", "gb_per_s", "deviation")
    run("residual", __file__, cases, arguments=arguments, columns=columns)


if __name__ == "__main__":
    main()
