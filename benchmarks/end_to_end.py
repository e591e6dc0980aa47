"""Text to mp4 at full size with random weights, beside diffusers' compiled transformer.

    python benchmarks/end_to_end.py [--model 1.3B] [--steps 50] [--mp4 PATH]

Ours runs the product's own path: tokenizer, UMT5-XXL, the DiT with guidance, the VAE, the mp4.
The peer runs what can be compared: as many steps of diffusers' compiled transformer with
guidance and UniPC. Both are warm: two steps (and for ours a whole decode) are run first. Weights
are made on the card. Prints one table and writes results/end_to_end_MODEL.json. Needs a CUDA GPU,
torch and diffusers.
"""

import argparse
import os
import tempfile
import time
from typing import Any

from dit import MODELS
from measure import child, report, save, table, versions


def run_ours(model: str, steps: int, mp4: str) -> dict[str, Any]:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import wan_jax
    from wan_jax import cli
    from wan_jax.config import RELEASED
    from wan_jax.dit import DiT
    from wan_jax.tokenizer import load_tokenizer, write_byte_tokenizer
    from wan_jax.umt5 import UMT5
    from wan_jax.vae import VAE

    config = RELEASED[f"t2v-{model}"]

    def dit() -> DiT:
        network = jax.jit(lambda: DiT(config.dit, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))()
        head = network.head_proj.kernel
        head[...] = 0.02 * jax.random.normal(jax.random.key(1), head.shape)
        return network

    with tempfile.TemporaryDirectory() as folder:
        write_byte_tokenizer(folder)
        tokenizer = load_tokenizer(folder)
    loaders = {
        "dit": dit,
        "vae": jax.jit(lambda: VAE(config.vae, rngs=nnx.Rngs(2))),
        "umt5": jax.jit(lambda: UMT5(config.umt5, rngs=nnx.Rngs(3), dtype=jnp.bfloat16)),
    }
    wan = wan_jax.Wan(config, tokenizer, loaders)
    _, _, _, _, h, w = MODELS[model]

    def run(steps: int) -> cli.Reporter:
        reporter = cli.Reporter()
        stream = wan.generate(
            "Two cats box on a spotlit stage.",
            size=(8 * w, 8 * h),
            steps=steps,
            seed=0,
            callback=reporter,
            output="stream",
        )
        wan_jax.save_video(stream, mp4)
        return reporter

    start = time.perf_counter()
    cold = run(2)
    first = time.perf_counter() - start
    start = time.perf_counter()
    warm = run(steps)
    total = time.perf_counter() - start
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "denoise": warm.seconds["denoise"],
        "encode": warm.seconds["encode"],
        "decode": warm.seconds["decode"],
        "text_to_mp4": total,
        "first_run": first,
        "first_load": cold.seconds["load"],
        "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
    }


def run_diffusers(model: str, steps: int, backend: str) -> dict[str, Any]:
    import torch
    from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

    heads, layers, ffn, t, h, w = MODELS[model]
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        network = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=128,
            num_layers=layers,
            ffn_dim=ffn,
            cross_attn_norm=True,
            rope_max_seq_len=1024,
        )
    torch.set_default_dtype(torch.float32)
    network.eval().requires_grad_(False)
    network.set_attention_backend(backend)
    network.compile_repeated_blocks(fullgraph=False)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    texts = [torch.randn(1, 512, 4096, **options) for _ in range(2)]

    def run(steps: int) -> float:
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        )
        scheduler.set_timesteps(steps, device="cuda")
        latents = torch.randn(1, 16, t, h, w, device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            for now in scheduler.timesteps:
                x, step = latents.to(torch.bfloat16), now[None]
                positive, negative = (
                    network(
                        hidden_states=x,
                        timestep=step,
                        encoder_hidden_states=text,
                        return_dict=False,
                    )[0]
                    for text in texts
                )
                guided = negative + 5.0 * (positive - negative)
                latents = scheduler.step(guided, now, latents, return_dict=False)[0]
        torch.cuda.synchronize()
        return time.perf_counter() - start

    run(2)
    return {"denoise": run(steps), "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="1.3B", choices=tuple(MODELS))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--mp4", default=os.path.join(tempfile.gettempdir(), "end_to_end.mp4"))
    parser.add_argument("--backend", default="_native_cudnn", help="diffusers' attention")
    parser.add_argument("--child", choices=("wan_jax", "diffusers"))
    arguments = parser.parse_args()
    if arguments.child == "wan_jax":
        report(run_ours(arguments.model, arguments.steps, arguments.mp4))
        return
    if arguments.child == "diffusers":
        report(run_diffusers(arguments.model, arguments.steps, arguments.backend))
        return
    passed = ["--model", arguments.model, "--steps", str(arguments.steps)]
    passed += ["--mp4", arguments.mp4, "--backend", arguments.backend]
    rows = []
    for system in ("diffusers", "wan_jax"):
        rows.append({"system": system, **child(__file__, ["--child", system, *passed])})
        print(rows[-1], flush=True)
    for row in rows:
        if "denoise" in row and "denoise" in rows[0]:
            row["ratio"] = row["denoise"] / rows[0]["denoise"]
    import jax

    device = jax.devices()[0].device_kind
    facts = {"device": device, "model": arguments.model, "steps": arguments.steps, "frames": 81}
    path = save(f"end_to_end_{arguments.model}", rows, facts)
    print(f"{device}, {versions()}\nwritten to {path}")
    columns = ("system", "denoise", "ratio", "encode", "decode", "text_to_mp4", "first_run")
    print(table(rows, (*columns, "peak_gib", "error")))


if __name__ == "__main__":
    main()
