"""One video on several GPUs against one GPU of the same machine: guided steps, the VAE's decoder.

    python benchmarks/spread.py [--models 14B,1.3B] [--plans guidance2,ulysses2] [--vae 1280x720]

Random weights made on the cards, 81 frames, both branches of guidance, through the sampler as a run
goes through it. efficiency is t1 / (n tn); apart is the relative L2 of the latents from those of
one GPU, for the VAE the PSNR of the frames. Prints one table and writes results/spread.json.
"""

import argparse
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import child, peak_gib, report, save, table, versions
from random_checkpoint import config_of

# name: latent frames, height, width
SHAPES = {"1.3B": (21, 60, 104), "14B": (21, 90, 160), "tiny": (3, 8, 12)}
LABELS = {"--models": "{}, a guided step", "--vae": "VAE, decode {}"}


def plan_of(text: str) -> Any:
    """ "guidance2xulysses2" as a plan; "1" is one device."""
    from wan_jax.plans import Plan

    found = re.findall(r"(guidance|ring|ulysses)(\d+)|(dit_fsdp)", text)
    sizes = {name: int(count) for name, count, _ in found if name}
    return Plan(**sizes, dit_fsdp=any(split for *_, split in found))


def run_steps(model: str, plan: Any, steps: int, out: Path) -> dict[str, Any]:
    """Seconds of a guided step, the first left out, and the latents in a file."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from wan_jax import sampler, schedulers, spread
    from wan_jax.dit import DiT
    from wan_jax.weights.sources import abstract_part

    config = config_of(model).dit
    layout = plan.layout().of_weights(split=plan.dit_fsdp) if plan.devices > 1 else None
    where = None
    if layout is not None:
        where = layout.weights(abstract_part(config, jnp.dtype(jnp.bfloat16)))

    def make() -> DiT:
        network = DiT(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        table = jax.random.normal(jax.random.key(2), network.head_proj.kernel.shape) * 0.02
        network.head_proj.kernel[...] = table.astype(network.head_proj.kernel.dtype)
        return network

    network = jax.jit(make, out_shardings=where)()
    keys = jax.random.split(jax.random.key(1), 3)
    put = (lambda x: x) if layout is None else layout.whole
    noise = put(jax.random.normal(keys[0], (1, *SHAPES[model], 16)))
    prepare = spread.program(DiT.prepare, layout)
    shape = (1, config.text_len, config.text_dim)
    texts = [put(jax.random.normal(key, shape, jnp.bfloat16)) for key in keys[1:]]
    conds = [prepare(network, text) for text in texts]
    times = [time.perf_counter()]

    def on_step(carry: sampler.Carry, count: int) -> None:
        jax.block_until_ready(carry.state.x)
        times.append(time.perf_counter())

    schedule = schedulers.make_schedule("unipc", steps=steps, shift=5.0)
    latents = sampler.sample(
        network, noise, schedule, conds, guidance=5.0, on_step=on_step, layout=layout
    )
    np.save(out, np.asarray(latents, np.float32))
    spent = np.diff(times)
    return {
        "seconds": float(np.median(spent[1:])),
        "first": float(spent[0]),
        "peak_gib": peak_gib(),
    }


def run_vae(size: str, plan: Any, out: Path) -> dict[str, Any]:
    """Seconds to decode 81 frames, compiled before, and every eighth frame in a file."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from wan_jax import streaming
    from wan_jax.vae import VAE

    width, height = (int(side) // 8 for side in size.split("x"))
    layout = plan.layout() if plan.devices > 1 else None
    network = jax.jit(lambda: VAE(config_of("1.3B").vae, rngs=nnx.Rngs(0), dtype=jnp.float32))()
    network = streaming.place(network, layout)
    latents = jax.random.normal(jax.random.key(1), (1, 21, height, width, 16))
    times, frames = [], []
    for _ in range(3):
        start, frames = time.perf_counter(), []
        for chunk, _ in streaming.decode(
            network, latents, pixels="float32", dtype="bfloat16", layout=layout
        ):
            frames.append(chunk[:, -1:])
        times.append(time.perf_counter() - start)
    np.save(out, np.concatenate(frames, 1)[:, ::2])
    return {"seconds": min(times[1:]), "first": times[0], "peak_gib": peak_gib()}


def apart(kind: str, found: Path, truth: Path) -> str:
    """How far the results of a plan are from those of one device."""
    a, b = np.load(found).astype(np.float64), np.load(truth).astype(np.float64)
    if kind == "vae":
        return f"{10 * np.log10(4.0 / max(np.mean((a - b) ** 2), 1e-30)):.1f} dB"
    return f"{np.linalg.norm(a - b) / np.linalg.norm(b):.2e}"


def measure(what: list[str], plans: list[str], steps: int) -> list[dict[str, Any]]:
    """The rows of one model or size: one device, then every plan."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for text in ("1", *plans):
            out = Path(folder) / f"{text}.npy"
            own = ["--child", text, "--out", str(out), "--steps", str(steps), *what]
            row = {"what": LABELS[what[-2]].format(what[-1]), "plan": text, **child(__file__, own)}
            if rows and "seconds" in row and "seconds" in rows[0]:
                count = plan_of(text).devices
                row["speedup"] = rows[0]["seconds"] / row["seconds"]
                row["efficiency"] = row["speedup"] / count
                kind = "vae" if "--vae" in what else "dit"
                row["apart"] = apart(kind, out, Path(folder) / "1.npy")
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="14B,1.3B")
    parser.add_argument("--plans", default="guidance2,ulysses2,ring2")
    parser.add_argument("--vae", default="1280x720", help="sizes, or nothing")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--child")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    models, sizes = (
        [x for x in text.split(",") if x] for text in (arguments.models, arguments.vae)
    )
    if arguments.child:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        plan = plan_of(arguments.child)
        if models:
            report(run_steps(models[0], plan, arguments.steps, arguments.out))
        else:
            report(run_vae(sizes[0], plan, arguments.out))
        return
    plans, rows = arguments.plans.split(","), []
    for model in models:
        rows += measure(["--vae=", "--models", model], plans, arguments.steps)
    for size in sizes:
        rows += measure(["--models=", "--vae", size], plans, arguments.steps)
    import jax

    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    path = save("spread", rows, {"device": device})
    columns = ("what", "plan", "seconds", "speedup", "efficiency", "apart", "peak_gib", "first")
    print(f"{device}, {versions()}\nwritten to {path}")
    print(table(rows, (*columns, "error")))


if __name__ == "__main__":
    main()
