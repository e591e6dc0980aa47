"""What a run's shortcuts cost: a guided forward in bfloat16, its distance from float32.

    python benchmarks/precision.py [--models 1.3B,14B] [--layers 4]

Networks of so many layers of random bfloat16 weights, 21 frames of 832x480 (6 in latents), two
branches. "plain" rounds as the mathematics is written: every product and bias summed in float32,
then rounded, and attention over the true number of tokens. "as a run" leaves these to cuBLASLt and
adds rows to spare. The truth is the same weights in float32 throughout. Prints one table and writes
results/precision.json. Needs a CUDA GPU.
"""

import argparse
import dataclasses
from typing import Any
from unittest import mock

from measure import save, table, versions

SHAPE = (1, 6, 60, 104, 16)


def errors(model: str, layers: int) -> dict[str, Any]:
    """Relative L2 of both ways from float32."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from wan_jax import sampler, xla
    from wan_jax.config import RELEASED
    from wan_jax.dit import DiT

    config = dataclasses.replace(RELEASED[f"t2v-{model}"].dit, num_layers=layers)

    def make() -> DiT:
        network = DiT(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        head = jax.random.normal(jax.random.key(2), network.head_proj.kernel.shape) * 0.02
        network.head_proj.kernel[...] = head
        return network

    narrow = jax.jit(make)()
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], SHAPE)
    texts = [jax.random.normal(key, (1, 512, config.text_dim), jnp.bfloat16) for key in keys[1:]]

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
    with mock.patch.object(xla, "on_nvidia", return_value=False):
        found["plain"] = run(narrow, jax.jit, "cudnn")
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    truth = run(wide, jax.jit, "chunked")
    size = jnp.linalg.norm(truth)
    row = {name: float(jnp.linalg.norm(v - truth) / size) for name, v in found.items()}
    return {"model": model, "layers": layers, **row, "ratio": row["as a run"] / row["plain"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="1.3B,14B")
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    import jax

    rows = [errors(model, arguments.layers) for model in arguments.models.split(",")]
    device = jax.devices()[0].device_kind
    path = save("precision", rows, {"device": device})
    print(f"{device}, {versions()}\nwritten to {path}")
    print(table(rows, ("model", "layers", "plain", "as a run", "ratio")))


if __name__ == "__main__":
    main()
