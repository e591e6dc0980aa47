"""Text, or an image and a text, to mp4 at full size with random weights, beside diffusers.

    python benchmarks/end_to_end.py [--model 1.3B] [--steps 50] [--mp4 PATH]

Ours runs the product's own path: tokenizer, UMT5-XXL, for an image CLIP and the VAE's encoder, the
DiT with guidance, the VAE, the mp4. The peer runs what can be compared: as many steps of diffusers'
compiled transformer with guidance and UniPC. Both are warm: two steps (and for ours a whole decode)
are run first. Weights are made on the card. Prints one table and writes
results/end_to_end_MODEL.json. Needs a CUDA GPU, torch and diffusers.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

from dit import MODELS as T2V_MODELS
from measure import child, in_torch, peak_gib, report, save, table, versions

# name: heads, layers, ffn, latent frames, latent height, latent width
MODELS = {**T2V_MODELS, "i2v-14B": T2V_MODELS["14B"], "flf2v-14B": T2V_MODELS["14B"]}
IMAGE_TOKENS = {"i2v-14B": 257, "flf2v-14B": 514}


def random_networks(config: Any) -> dict[str, Callable[[], Any]]:
    """Wan's loaders for networks of this configuration, made on the card."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from wan_jax.clip import CLIP
    from wan_jax.dit import DiT
    from wan_jax.umt5 import UMT5
    from wan_jax.vae import VAE

    def dit() -> DiT:
        network = jax.jit(lambda: DiT(config.dit, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))()
        head = network.head_proj.kernel
        head[...] = 0.02 * jax.random.normal(jax.random.key(1), head.shape)
        return network

    makers = {
        "vae": lambda: VAE(config.vae, rngs=nnx.Rngs(2)),
        "umt5": lambda: UMT5(config.umt5, rngs=nnx.Rngs(3), dtype=jnp.bfloat16),
        "clip": lambda: CLIP(config.clip, rngs=nnx.Rngs(4), dtype=jnp.float16),
    }
    made = {part: jax.jit(makers[part]) for part in config.dit.parts if part != "dit"}
    return {"dit": dit, **made}


def picture(width: int, height: int) -> Any:
    """A bright disc before a gradient, uint8 [y, x, 3]."""
    import numpy as np

    y, x = np.mgrid[:height, :width].astype(np.float32)
    pixels = np.stack([255 * x / width, 255 * y / height, np.full_like(x, 96.0)], -1)
    disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (height / 4) ** 2
    pixels[disc] = (250, 220, 40)
    return pixels.astype(np.uint8)


def run_ours(model: str, steps: int, mp4: str) -> dict[str, Any]:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    import wan_jax
    from wan_jax import cli
    from wan_jax.config import RELEASED
    from wan_jax.tokenizer import load_tokenizer, write_byte_tokenizer

    config = RELEASED[model if model in RELEASED else f"t2v-{model}"]
    with tempfile.TemporaryDirectory() as folder:
        write_byte_tokenizer(folder)
        tokenizer = load_tokenizer(folder)
    wan = wan_jax.Wan(config, tokenizer, random_networks(config))
    *_, h, w = MODELS[model]
    width, height = 8 * w, 8 * h
    image = picture(width, height)
    images = dict(zip(("image", "last_image"), [image, image[:, ::-1]][: config.images]))

    def run(steps: int) -> tuple[cli.Reporter, float]:
        reporter, start = cli.Reporter(), time.perf_counter()
        stream = wan.generate(
            "Two cats box on a spotlit stage.",
            **images,
            size=(width, height),
            steps=steps,
            seed=0,
            callback=reporter,
            output="stream",
        )
        wan_jax.save_video(stream, mp4)
        return reporter, time.perf_counter() - start

    cold, first = run(2)
    warm, total = run(steps)
    return {
        **{stage: seconds for stage, seconds in warm.seconds.items() if stage != "load"},
        "to_mp4": total,
        "first_run": first,
        "first_load": cold.seconds["load"],
        "peak_gib": peak_gib(),
    }


def diffusers_transformer(model: str, backend: str) -> Any:
    """The compiled transformer in bfloat16, made on the card."""
    import torch
    from diffusers import WanTransformer3DModel

    heads, layers, ffn, *_ = MODELS[model]
    image = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 128 * heads}
    if model.startswith("flf2v"):
        image["pos_embed_seq_len"] = IMAGE_TOKENS[model]
    settings = {
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "num_layers": layers,
        "ffn_dim": ffn,
        "cross_attn_norm": True,
        "rope_max_seq_len": 1024,
        **(image if model in IMAGE_TOKENS else {}),
    }
    network = in_torch(lambda: WanTransformer3DModel(**settings), torch.bfloat16)
    network.set_attention_backend(backend)
    network.compile_repeated_blocks(fullgraph=False)
    return network


def run_diffusers(model: str, steps: int, backend: str) -> dict[str, Any]:
    import torch
    from diffusers import UniPCMultistepScheduler

    network = diffusers_transformer(model, backend)
    t, h, w = MODELS[model][3:]
    options = {"device": "cuda", "dtype": torch.bfloat16}
    texts = [torch.randn(1, 512, 4096, **options) for _ in range(2)]
    known = torch.randn(1, 20 if model in IMAGE_TOKENS else 0, t, h, w, **options)
    tokens = None
    if model in IMAGE_TOKENS:
        tokens = torch.randn(1, IMAGE_TOKENS[model], 1280, **options)

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
                x = torch.cat([latents.to(torch.bfloat16), known], 1)
                step = now[None]
                positive, negative = (
                    network(
                        hidden_states=x,
                        timestep=step,
                        encoder_hidden_states=text,
                        encoder_hidden_states_image=tokens,
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
    for system in ("wan_jax", "diffusers"):
        rows.append({"system": system, **child(__file__, ["--child", system, *passed])})
        print(rows[-1], flush=True)
    for row in rows:
        if "denoise" in row and "denoise" in rows[-1]:
            row["ratio"] = row["denoise"] / rows[-1]["denoise"]
    import jax

    device = jax.devices()[0].device_kind
    facts = {"device": device, "model": arguments.model, "steps": arguments.steps, "frames": 81}
    path = save(f"end_to_end_{arguments.model}", rows, facts)
    print(f"{device}, {versions()}\nwritten to {path}")
    columns = ("system", "denoise", "ratio", "encode", "clip", "image", "decode", "to_mp4")
    print(table(rows, (*columns, "first_run", "peak_gib", "error")))


if __name__ == "__main__":
    main()
