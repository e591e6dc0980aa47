"""One forward of the DiT, one guidance branch, ours beside diffusers' compiled transformer.

    python benchmarks/dit.py [--models 1.3B,14B] [--quantize fp8_linear,fp8]

Random weights made on the card, bfloat16 as each system runs it, 81 frames; with --quantize ours in
8 bits as well. Prints one table and writes results/dit.json. Needs a CUDA GPU, torch and diffusers.
"""

import argparse
import os

from measure import (
    child,
    in_torch,
    median_seconds,
    peak_gib,
    report,
    save,
    table,
    versions,
)

# name: (heads, layers, ffn, latent frames, latent height, latent width)
MODELS = {
    "1.3B": (12, 30, 8960, 21, 60, 104),
    "14B": (40, 40, 13824, 21, 90, 160),
}


def forward_tflop(model: str) -> float:
    """Floating-point operations of one forward in 1e12, products and attention only."""
    heads, layers, ffn, t, h, w = MODELS[model]
    d, tokens, text = 128 * heads, t * h * w // 4, 512
    products = 2 * tokens * (4 * d * d + 2 * d * d + 2 * d * ffn) + 2 * text * 2 * d * d
    attention = 4 * tokens * (tokens + text) * d
    return layers * (products + attention) / 1e12


def run_ours(model: str, kind: str | None = None) -> dict[str, float]:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from wan_jax import sampler, xla
    from wan_jax.config import RELEASED
    from wan_jax.dit import DiT
    from wan_jax.weights.quantization import quantized

    config = RELEASED[f"t2v-{model}"].dit
    _, _, _, t, h, w = MODELS[model]
    network = jax.jit(lambda: DiT(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))()
    keys = jax.random.split(jax.random.key(1), 3)
    table = jax.random.normal(keys[2], network.head_proj.kernel.shape) * 0.02
    network.head_proj.kernel[...] = table
    if kind is not None:
        network = quantized(network, kind, donate=True)
    latents = jax.random.normal(keys[0], (1, t, h, w, 16))
    context = jax.random.normal(keys[1], (1, 512, 4096), jnp.bfloat16)
    cond = jax.jit(DiT.prepare)(network, context)
    own = (network, latents, jnp.float32(500.0), (cond,), jnp.float32(1.0))
    program = xla.jit(sampler.velocity, attention=True).on(jax.devices()[0])
    compiled = program.lower(*own).compile()
    memory = compiled.memory_analysis()
    seconds = median_seconds(lambda: jax.block_until_ready(compiled(*own)), repeats=5)
    return {
        "seconds": seconds,
        "peak_gib": peak_gib(),
        "temp_gib": memory.temp_size_in_bytes / 2**30,
    }


def run_diffusers(model: str, backends: list[str]) -> dict[str, float | str]:
    import torch
    from diffusers import WanTransformer3DModel

    heads, layers, ffn, t, h, w = MODELS[model]
    settings = {
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "num_layers": layers,
        "ffn_dim": ffn,
        "cross_attn_norm": True,
        "rope_max_seq_len": 1024,
    }
    network = in_torch(lambda: WanTransformer3DModel(**settings), torch.bfloat16)
    network.compile_repeated_blocks(fullgraph=False)
    inputs = {
        "hidden_states": torch.randn(1, 16, t, h, w, device="cuda", dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16),
        "timestep": torch.tensor([500], device="cuda"),
        "return_dict": False,
    }

    def forward() -> None:
        with torch.no_grad():
            network(**inputs)
        torch.cuda.synchronize()

    best = {}
    for backend in backends:
        network.set_attention_backend(backend)
        torch.cuda.reset_peak_memory_stats()
        seconds = median_seconds(forward, warmups=2, repeats=3 if model == "14B" else 5)
        peak = torch.cuda.max_memory_allocated() / 2**30
        if not best or seconds < best["seconds"]:
            best = {"seconds": seconds, "peak_gib": peak, "backend": backend}
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--backends", default="native,_native_cudnn", help="diffusers' attention")
    parser.add_argument("--quantize", default="", help="kinds of ours in 8 bits, by commas")
    parser.add_argument("--child", choices=("wan_jax", "diffusers"))
    arguments = parser.parse_args()
    names = arguments.models.split(",")
    if arguments.child:
        if arguments.child == "wan_jax":
            report(run_ours(names[0], arguments.quantize or None))
        else:
            report(run_diffusers(names[0], arguments.backends.split(",")))
        return
    rows = []
    kinds = [kind for kind in arguments.quantize.split(",") if kind]
    for model in names:
        peer = float("nan")
        for system, kind in (
            ("diffusers", None),
            ("wan_jax", None),
            *(("wan_jax", k) for k in kinds),
        ):
            own = ["--child", system, "--models", model, "--backends", arguments.backends]
            result = child(__file__, [*own, "--quantize", kind or ""])
            row = {"model": model, "system": system, **({"how": kind} if kind else {}), **result}
            if system == "diffusers":
                peer = result.get("seconds", peer)
            if "seconds" in result:
                row["tflop_per_s"] = forward_tflop(model) / result["seconds"]
                row["ratio"] = result["seconds"] / peer
            rows.append(row)
            print(row, flush=True)
    import jax

    device = jax.devices()[0].device_kind
    path = save("dit", rows, {"device": device})
    print(f"{device}, {versions()}\nwritten to {path}")
    columns = ("model", "system", "how", "seconds", "ratio", "tflop_per_s", "peak_gib", "error")
    print(table(rows, columns))


if __name__ == "__main__":
    main()
