"""The text encoder: UMT5-XXL on one and on two prompts of 512 tokens, ours and transformers'.

    python benchmarks/umt5.py [--prompts 1,2]

bfloat16, random weights made on the card (11 GB), every token real. Transformers' encoder runs as
it is and compiled. share is of the product of 8192^3. Prints one table and writes
results/umt5.json. Needs a CUDA GPU, torch and transformers.
"""

import functools
import os
from typing import Any

from measure import (
    OURS,
    Case,
    attempt,
    in_torch,
    median_seconds,
    parser,
    peak_gib,
    run,
    torch_device,
    torch_seconds,
)
from random_checkpoint import network


def sizes(*, tiny: bool) -> tuple[Any, int]:
    """The configuration and the tokens of a prompt."""
    from wan_jax.config import NANO_T2V, UMT5Config

    return (NANO_T2V.umt5, 32) if tiny else (UMT5Config(), 512)


def run_ours(prompts: int, *, tiny: bool) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp

    from wan_jax import umt5, xla

    config, tokens = sizes(tiny=tiny)
    own = network(config)
    ids = jax.random.randint(jax.random.key(1), (prompts, tokens), 3, config.vocab_size, jnp.int32)
    mask, program = jnp.ones_like(ids), xla.jit(umt5.encode)

    def one_by_one() -> None:
        for i in range(prompts):
            jax.block_until_ready(program(own, ids[i : i + 1], mask[i : i + 1]))

    def measure(step: Any) -> dict[str, Any]:
        return {"seconds": median_seconds(step, warmups=2, repeats=7), "peak_gib": peak_gib()}

    attempt({"how": "as a run"}, lambda: measure(one_by_one))
    if prompts > 1:
        run_all = functools.partial(program, own, ids, mask)
        attempt({"how": "one batch"}, lambda: measure(lambda: jax.block_until_ready(run_all())))


def run_transformers(prompts: int, *, tiny: bool) -> None:
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    own, tokens = sizes(tiny=tiny)
    config = UMT5Config(
        vocab_size=own.vocab_size,
        d_model=own.dim,
        d_kv=own.head_dim,
        d_ff=own.ffn_dim,
        num_layers=own.num_layers,
        num_heads=own.num_heads,
        feed_forward_proj="gated-gelu",
    )
    peer = in_torch(lambda: UMT5EncoderModel(config), torch.bfloat16)
    ids = torch.randint(3, own.vocab_size, (prompts, tokens), device=torch_device())
    mask = torch.ones_like(ids)

    def measure(model: Any) -> dict[str, float]:
        step = functools.partial(model, input_ids=ids, attention_mask=mask)
        return torch_seconds(step, warmups=2, repeats=7)

    attempt({"how": "eager"}, lambda: measure(peer))
    if not tiny:  # the compiler takes a minute
        attempt({"how": "compiled"}, lambda: measure(torch.compile(peer, dynamic=False)))


def main() -> None:
    flags = parser(__doc__, systems=(OURS, "transformers"))
    flags.add_argument("--prompts", default="1,2")
    arguments = flags.parse_args()
    if arguments.child:
        measure = run_ours if arguments.child == OURS else run_transformers
        measure(int(arguments.case), tiny=arguments.tiny)
        return
    from wan_jax.planning import costs

    work = costs.text(*sizes(tiny=arguments.tiny)).total / 1e12
    cases = [
        Case(
            {
                "case": f"prompts: {count}",
                "system": system,
                "tflop": int(count) * work,
                "kind": "product bfloat16",
            },
            ["--child", system, "--case", count],
        )
        for count in arguments.prompts.split(",")
        for system in arguments.systems.split(",")
    ]
    columns = ("case", "system", "how", "seconds", "ratio", "tflop_per_s", "share", "peak_gib")
    run("umt5", __file__, cases, arguments=arguments, columns=columns)


if __name__ == "__main__":
    main()
