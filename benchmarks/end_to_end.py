"""Text, or an image and a text, to mp4 at full size with random weights, beside diffusers.

    python benchmarks/end_to_end.py [--model 1.3B] [--steps 50] [--mp4 PATH]

Ours runs the product's own path: tokenizer, UMT5-XXL, for an image CLIP and the VAE's encoder, the
DiT with guidance, the VAE, the mp4. The peer runs what can be compared: as many steps of diffusers'
compiled transformer with guidance and UniPC. Both are warm: two steps (and for ours a whole decode)
are run first. Weights are made on the card. Without an ffmpeg the frames are brought to the host
and not written, which to_frames tells in place of to_mp4. Prints one table and writes
results/end_to_end_MODEL.json. Needs a CUDA GPU, torch and diffusers.
"""

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

from measure import attempt, peak_gib, torch_device, video_writer
from networks import LATENTS, diffusers_transformer, random_dit, whole_config
from records import OURS
from runs import Case, listed, parser, run

MODELS = ("1.3B", "14B", "i2v-14B", "flf2v-14B")
FRAMES = 81


def random_networks(config: Any) -> dict[str, Callable[[], Any]]:
    """Wan's loaders for networks of this configuration, made on the card."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from wan_jax.clip import CLIP
    from wan_jax.umt5 import UMT5
    from wan_jax.vae import VAE

    makers = {
        "vae": lambda: VAE(config.vae, rngs=nnx.Rngs(2)),
        "umt5": lambda: UMT5(config.umt5, rngs=nnx.Rngs(3), dtype=jnp.bfloat16),
        "clip": lambda: CLIP(config.clip, rngs=nnx.Rngs(4), dtype=jnp.float16),
    }
    made = {part: jax.jit(makers[part]) for part in config.dit.parts if part != "dit"}
    return {"dit": lambda: random_dit(config.dit), **made}


def picture(width: int, height: int) -> Any:
    """A bright disc before a gradient, uint8 [y, x, 3]."""
    import numpy as np

    y, x = np.mgrid[:height, :width].astype(np.float32)
    pixels = np.stack([255 * x / width, 255 * y / height, np.full_like(x, 96.0)], -1)
    disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (height / 4) ** 2
    pixels[disc] = (250, 220, 40)
    return pixels.astype(np.uint8)


def run_ours(model: str, steps: int, mp4: str) -> dict[str, Any]:
    import wan_jax
    from wan_jax import cli
    from wan_jax.tokenizer import load_tokenizer, write_byte_tokenizer

    config, (t, h, w) = whole_config(model), LATENTS[model]
    width, height, frames = 8 * w, 8 * h, 4 * t - 3
    made, save = video_writer(mp4)
    with tempfile.TemporaryDirectory() as folder:
        write_byte_tokenizer(folder)
        tokenizer = load_tokenizer(folder)
    wan = wan_jax.Wan(config, tokenizer, random_networks(config))
    image = picture(width, height)
    images = dict(zip(("image", "last_image"), [image, image[:, ::-1]][: config.images]))

    def run(steps: int) -> tuple[cli.Reporter, float]:
        reporter, start = cli.Reporter(), time.perf_counter()
        stream = wan.generate(
            "Two cats box on a spotlit stage.",
            **images,
            size=(width, height),
            frames=frames,
            steps=steps,
            seed=0,
            callback=reporter,
            output="stream",
        )
        save(stream)
        return reporter, time.perf_counter() - start

    cold, first = run(2)
    warm, total = run(steps)
    return {
        **{stage: seconds for stage, seconds in warm.seconds.items() if stage != "load"},
        f"to_{made}": total,
        "first_run": first,
        "first_load": cold.seconds["load"],
        "peak_gib": peak_gib(),
    }


def run_diffusers(model: str, steps: int, backend: str) -> dict[str, Any]:
    import torch
    from diffusers import UniPCMultistepScheduler

    whole, shape, device = whole_config(model), LATENTS[model], torch_device()
    config = whole.dit
    network = diffusers_transformer(config)
    network.set_attention_backend(backend)
    options = {"device": device, "dtype": torch.bfloat16}
    texts = [torch.randn(1, config.text_len, config.text_dim, **options) for _ in range(2)]
    known = torch.randn(1, config.in_channels - config.out_channels, *shape, **options)
    tokens = None
    if whole.clip is not None:
        tokens = torch.randn(1, whole.images * whole.clip.num_tokens, whole.clip.dim, **options)

    def run(steps: int) -> float:
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        )
        scheduler.set_timesteps(steps, device=device)
        latents = torch.randn(1, config.out_channels, *shape, device=device)
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            for now in scheduler.timesteps:
                given = {
                    "hidden_states": torch.cat([latents.to(torch.bfloat16), known], 1),
                    "timestep": now[None],
                    "encoder_hidden_states_image": tokens,
                    "return_dict": False,
                }
                positive, negative = (
                    network(encoder_hidden_states=text, **given)[0] for text in texts
                )
                guided = negative + 5.0 * (positive - negative)
                latents = scheduler.step(guided, now, latents, return_dict=False)[0]
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    run(2)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = run(steps)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    return {"denoise": seconds, "peak_gib": peak}


def main() -> None:
    flags = parser(__doc__, systems=(OURS, "diffusers"))
    flags.add_argument("--model", default="1.3B", choices=MODELS)
    flags.add_argument("--steps", type=int, default=50)
    flags.add_argument("--mp4", default=os.path.join(tempfile.gettempdir(), "end_to_end.mp4"))
    flags.add_argument("--backend", default="_native_cudnn", help="diffusers' attention")
    arguments = flags.parse_args()
    model = "tiny" if arguments.tiny else arguments.model
    backend, steps = "native" if arguments.tiny else arguments.backend, arguments.steps
    if arguments.child == OURS:
        attempt({}, lambda: run_ours(model, steps, os.path.abspath(arguments.mp4)))
        return
    if arguments.child:
        attempt({}, lambda: run_diffusers(model, steps, backend))
        return
    own = ["--model", arguments.model, "--steps", str(steps), "--mp4", arguments.mp4]
    cases = [
        Case({"system": system}, ["--child", system, *own, "--backend", arguments.backend])
        for system in listed(arguments.systems)
    ]
    facts = {"model": model, "steps": steps, "frames": FRAMES}
    columns = ("system", "denoise", "ratio", "encode", "clip", "image", "decode", "to_mp4")
    columns += ("to_frames", "first_run", "peak_gib")
    options: dict[str, Any] = {"arguments": arguments, "columns": columns, "number": "denoise"}
    run(f"end_to_end_{model}", __file__, cases, facts=facts, **options)


if __name__ == "__main__":
    main()
