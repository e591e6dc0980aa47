"""What the child of a benchmark uses: timing, memory, and rows that it reports as they come.

Run as a script this file tells the device.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from records import shortened

BUSY = 1.0  # seconds that a card works before its clocks are those of a long run


def median_seconds(
    run: Callable[[], Any], *, warmups: int = 1, repeats: int = 3, busy: float = 0.0
) -> float:
    """Median wall time of run(), which must block until its work is done.

    busy: it is run for at least so many seconds before.
    """
    begun = time.perf_counter()
    for _ in range(warmups):
        run()
    while time.perf_counter() - begun < busy:
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def report(value: dict[str, Any]) -> None:
    """Print a child's result as a line of its own."""
    print(json.dumps(value), flush=True)


def attempt(labels: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    """Report the labels with what measure() gives or, if it fails, with its error."""
    try:
        found = measure()
    except Exception as error:  # one case must not lose the others
        found = {"error": shortened(f"{type(error).__name__}: {error}")}
    report({**labels, **found})


def matmul_tflops(size: int) -> float:
    """Measured TFLOP/s of a square bfloat16 product: what a step could at best come to."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 2)
    x, y = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    y = y * jnp.bfloat16(1.0 / math.sqrt(size))  # the numbers keep their size
    repeats = 20

    @jax.jit
    def many(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, repeats, lambda _, z: z @ y, x)

    seconds = median_seconds(lambda: jax.block_until_ready(many(x, y)), repeats=7, busy=BUSY)
    return repeats * 2 * size**3 / seconds / 1e12


def peak_gib() -> float:
    """Most memory of the device that JAX's allocator had in use so far; 0 where it keeps no count.

    It counts what making the weights and tuning a program needed too.
    """
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30


def program_gib(compiled: Any, *given: Any) -> float:
    """What a call of a compiled program takes of the device: arguments, results, what is between.

    given: its arguments, which count whole, for a network's weights lie there read or not.
    """
    import jax

    found = compiled.memory_analysis()
    arguments = sum(leaf.nbytes for leaf in jax.tree.leaves(given))
    own = found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
    return (arguments + own) / 2**30


def torch_device() -> str:
    """Where torch computes."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def in_torch(make: Callable[[], Any], dtype: Any) -> Any:
    """The module that make() gives, its random weights made on the card in this dtype."""
    import torch

    torch.set_default_dtype(dtype)
    try:
        with torch.device(torch_device()):
            network = make()
    finally:
        torch.set_default_dtype(torch.float32)
    return network.eval().requires_grad_(False)


def torch_seconds(
    run: Callable[[], Any], *, warmups: int = 1, repeats: int = 3, busy: float = 0.0
) -> dict[str, float]:
    """Median seconds of run(), without gradients, and the most memory that it had allocated."""
    import torch

    on_card = torch.cuda.is_available()

    def whole() -> None:
        with torch.no_grad():
            run()
        if on_card:
            torch.cuda.synchronize()

    whole()
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(whole, warmups=warmups, repeats=repeats, busy=busy)
    peak = torch.cuda.max_memory_allocated() if on_card else 0
    return {"seconds": seconds, "peak_gib": peak / 2**30}


def video_writer(path: str) -> tuple[str, Callable[[Iterable[Any]], None]]:
    """("mp4", what writes chunks of frames there); without ffmpeg ("frames", what only takes them).

    Asked before anything slow; an mp4 that cannot be written must not lose the rest of a run.
    """
    from wan_jax import media

    def take(chunks: Iterable[Any]) -> None:
        for _ in chunks:
            pass

    try:
        media.check_output(path, 81)
    except ValueError as error:
        print(f"no video is written: {error}", file=sys.stderr)
        return "frames", take
    return "mp4", lambda chunks: media.save_video(chunks, path)


if __name__ == "__main__":
    import jax

    report({"device": jax.devices()[0].device_kind, "devices": jax.device_count()})
