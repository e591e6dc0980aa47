"""Attention alone at the lengths of videos, bfloat16: ours, and torch's SDPA.

    python benchmarks/attention.py [--cases "1.3B 832x480,14B 1280x720"]

Every implementation of attention() is tried, first what a run does, the one that it picks over rows
of a tile's multiple; of torch the cuDNN and the flash backend. What emulates 8 bits in float32 is
left out at the lengths of videos, where it takes minutes. deviation is the relative L2 from float32
on 64 queries of all heads, each system on random numbers of its own. share is that of the product
of 8192^3 that the card reaches, which the last case measures anew. Prints one table and writes
results/attention.json. Needs a CUDA GPU and torch.
"""

import functools
import math
from typing import Any

from measure import (
    BUSY,
    attempt,
    matmul_tflops,
    median_seconds,
    torch_device,
    torch_seconds,
)
from records import NARROW, OURS, WIDE
from runs import Case, listed, parser, run

HEAD = 128
LENGTHS = {"1.3B 832x480": (32_760, 12), "14B 1280x720": (75_600, 40)}  # tokens, heads
TINY = {"tiny": (300, 2)}
PRODUCT = "product 8192^3"
QUERIES = 64
EMULATED, MOST = "chunked_fp8", 10_000  # tokens


def run_ours(tokens: int, heads: int) -> None:
    import jax
    import jax.numpy as jnp

    from wan_jax import xla
    from wan_jax.attention import IMPLEMENTATIONS, attention, row_tile

    tile = row_tile(tokens, jnp.bfloat16)
    shape = (1, -(-tokens // tile) * tile, heads, HEAD)
    keys = jax.random.split(jax.random.key(0), 3)
    padded = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
    q, k, v = (x[:, :tokens] for x in padded)
    some = slice(None, tokens, max(1, tokens // QUERIES))

    @jax.jit
    def exact(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        scores = jnp.einsum("bsnk,btnk->bnst", q, k, precision="highest") / math.sqrt(HEAD)
        weights = jax.nn.softmax(scores, axis=-1)
        return jnp.einsum("bnst,btnk->bsnk", weights, v, precision="highest")

    truth = exact(q[:, some], k, v)
    static = ("count", "implementation")
    program = xla.jit(attention, attention=True, static_argnames=static)

    def measure(name: str | None) -> dict[str, Any]:
        given = padded if name in (None, "hopper") else (q, k, v)  # as a run does
        attend = functools.partial(program, *given, count=tokens, implementation=name)
        found = attend()[:, some].astype(jnp.float32)
        error = float(jnp.linalg.norm(found - truth) / jnp.linalg.norm(truth))
        seconds = median_seconds(lambda: jax.block_until_ready(attend()), repeats=7, busy=BUSY)
        return {"seconds": seconds, "deviation": error}

    # The TPU kernel last: what it does elsewhere shall lose nothing.
    for name in (None, *sorted(IMPLEMENTATIONS, key=lambda name: name == "splash")):
        if name == EMULATED and tokens > MOST:
            continue
        labels = {"how": name or "picked"}
        if name is not None and name.endswith("fp8"):
            labels["kind"] = NARROW
        attempt(labels, lambda name=name: measure(name))


def run_torch(tokens: int, heads: int) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    on_card = torch_device() == "cuda"
    backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    options = {"device": torch_device(), "dtype": torch.bfloat16}
    # [b, s, n, k] in memory, as a network has it.
    q, k, v = (torch.randn(1, tokens, heads, HEAD, **options).transpose(1, 2) for _ in range(3))
    some = slice(None, None, max(1, tokens // QUERIES))
    scores = q[:, :, some].float() @ k.float().transpose(2, 3) / math.sqrt(HEAD)
    truth = scores.softmax(-1) @ v.float()
    del scores

    def attend() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def measure(backend: Any) -> dict[str, Any]:
        with sdpa_kernel(backend):
            error = (attend()[:, :, some].float() - truth).norm() / truth.norm()
            return {
                "seconds": torch_seconds(attend, repeats=7, busy=BUSY)["seconds"],
                "deviation": float(error),
            }

    for name, backend in (backends if on_card else {"math": SDPBackend.MATH}).items():
        attempt({"how": name}, lambda backend=backend: measure(backend))


def run_product(system: str, size: int) -> None:
    """Seconds of a square bfloat16 product."""

    def ours() -> dict[str, Any]:
        return {"seconds": 2 * size**3 / 1e12 / matmul_tflops(size)}

    def peer() -> dict[str, Any]:
        import torch

        options = {"device": torch_device(), "dtype": torch.bfloat16}
        x, y = (torch.randn(size, size, **options) for _ in range(2))
        repeats = 20
        found = torch_seconds(lambda: [x @ y for _ in range(repeats)], repeats=7, busy=BUSY)
        return {"seconds": found["seconds"] / repeats}

    attempt({"how": "@"}, ours if system == OURS else peer)


def main() -> None:
    flags = parser(__doc__, systems=(OURS, "torch"))
    flags.add_argument("--cases", help=f"some of {', '.join((*LENGTHS, PRODUCT))}")
    arguments = flags.parse_args()
    lengths, size = (TINY, 64) if arguments.tiny else (LENGTHS, 8192)
    if arguments.child:
        if arguments.case == PRODUCT:
            run_product(arguments.child, size)
        else:
            measure = run_ours if arguments.child == OURS else run_torch
            measure(*lengths[arguments.case])
        return
    work = {name: 4 * n**2 * heads * HEAD / 1e12 for name, (n, heads) in lengths.items()}
    work[PRODUCT] = 2 * size**3 / 1e12
    names = listed(arguments.cases or "") if not arguments.tiny else []
    cases = [
        Case(
            {"case": name, "system": system, "tflop": work[name], "kind": WIDE},
            ["--child", system, "--case", name],
        )
        for name in names or work
        for system in listed(arguments.systems)
    ]
    columns = ("case", "system", "how", "seconds", "ratio", "to_bfloat16", "tflop_per_s", "share")
    columns += ("deviation",)
    run("attention", __file__, cases, arguments=arguments, columns=columns)


if __name__ == "__main__":
    main()
