"""The text encoder: UMT5-XXL on one and on two prompts of 512 tokens, ours and transformers'.

    python benchmarks/umt5.py [--prompts 1,2]

bfloat16, random weights made on the card (11 GB), every token real. Transformers' encoder runs as
it is and compiled. share is of the product of 8192^3. peak_gib is of the program. Prints one table
and writes results/umt5.json. Needs a CUDA GPU, torch and transformers.
"""

import functools
from typing import Any

from measure import (
    attempt,
    in_torch,
    median_seconds,
    program_gib,
    torch_device,
    torch_seconds,
)
from random_checkpoint import network
from records import OURS, WIDE
from runs import Case, listed, parser, run


def sizes(*, tiny: bool) -> tuple[Any, int]:
    """The configuration and the tokens of a prompt."""
    from wan_jax.config import NANO_T2V, UMT5Config

    return (NANO_T2V.umt5, 32) if tiny else (UMT5Config(), 512)


def run_ours(prompts: int, *, tiny: bool) -> None:
    import jax
    import jax.numpy as jnp

    from wan_jax import umt5, xla

    config, tokens = sizes(tiny=tiny)
    own = network(config)
    ids = jax.random.randint(jax.random.key(1), (prompts, tokens), 3, config.vocab_size, jnp.int32)
    mask, program = jnp.ones_like(ids), xla.jit(umt5.encode)
    each = [(ids[i : i + 1], mask[i : i + 1]) for i in range(prompts)]

    def measure(texts: list[tuple[jax.Array, jax.Array]]) -> dict[str, Any]:
        def step() -> None:
            for text in texts:
                jax.block_until_ready(program(own, *text))

        given = own, *texts[0]
        compiled = program.on(jax.devices()[0]).lower(*given).compile()
        seconds = median_seconds(step, warmups=2, repeats=7)
        return {"seconds": seconds, "peak_gib": program_gib(compiled, given)}

    attempt({"how": "as a run"}, lambda: measure(each))
    if prompts > 1:
        attempt({"how": "one batch"}, lambda: measure([(ids, mask)]))


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
                "kind": WIDE,
            },
            ["--child", system, "--case", count],
        )
        for count in listed(arguments.prompts)
        for system in listed(arguments.systems)
    ]
    columns = ("case", "system", "how", "seconds", "ratio", "tflop_per_s", "share", "peak_gib")
    run("umt5", __file__, cases, arguments=arguments, columns=columns)


if __name__ == "__main__":
    main()
