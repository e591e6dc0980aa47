"""What a run's shortcuts cost: a guided forward in bfloat16, its distance from float32.

    python benchmarks/precision.py [--models 1.3B,14B] [--layers 4]

Networks of so many layers of random bfloat16 weights, 21 frames of 832x480 (6 in latents), two
branches. "plain" rounds as the mathematics is written: every product and bias summed in float32,
then rounded, and attention over the true number of tokens. "as a run" leaves these to cuBLASLt and
adds rows to spare. The truth is the same weights in float32 throughout. Prints one table and writes
results/precision.json. Needs a CUDA GPU.
"""

import dataclasses
from typing import Any
from unittest import mock

from measure import attempt
from networks import random_dit, whole_config
from records import OURS
from runs import Case, listed, parser, run

GRID, TINY = (6, 60, 104), (2, 8, 8)


def errors(model: str, layers: int) -> dict[str, Any]:
    """Relative L2 of both ways from float32."""
    import jax
    import jax.numpy as jnp

    from wan_jax import sampler, xla
    from wan_jax.dit import DiT

    config = dataclasses.replace(whole_config(model).dit, num_layers=layers)
    narrow = random_dit(config)
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (1, *(TINY if model == "tiny" else GRID), config.in_channels))
    shape = (1, config.text_len, config.text_dim)
    texts = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:]]

    def run(network: DiT, jit: Any, implementation: str | None) -> jax.Array:
        @jit
        def forward(network: DiT, x: jax.Array, texts: list[jax.Array]) -> jax.Array:
            conds = [network.prepare(text) for text in texts]
            time, guidance = jnp.float32(500.0), jnp.float32(5.0)
            return sampler.velocity(
                network, x, time, conds, guidance, implementation=implementation
            )

        return forward(network, x, texts)

    found = {"as a run": run(narrow, xla.jit, None)}
    kernel = "cudnn" if jax.default_backend() == "gpu" else "chunked"
    with mock.patch.object(xla, "on_nvidia", return_value=False):
        found["plain"] = run(narrow, jax.jit, kernel)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    truth = run(wide, jax.jit, "chunked")
    size = jnp.linalg.norm(truth)
    row = {name: float(jnp.linalg.norm(v - truth) / size) for name, v in found.items()}
    return {**row, "ratio": row["as a run"] / row["plain"]}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--models", default="1.3B,14B")
    flags.add_argument("--layers", type=int, default=4)
    arguments = flags.parse_args()
    layers = arguments.layers
    if arguments.child:
        attempt({}, lambda: errors(arguments.case, layers))
        return
    cases = [
        Case(
            {"model": model, "layers": layers},
            ["--child", OURS, "--case", model, "--layers", str(layers)],
        )
        for model in (["tiny"] if arguments.tiny else listed(arguments.models))
    ]
    columns = ("model", "layers", "plain", "as a run", "ratio")
    run("precision", __file__, cases, arguments=arguments, columns=columns)


if __name__ == "__main__":
    main()
