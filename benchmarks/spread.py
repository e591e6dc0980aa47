"""One video on several GPUs against one GPU of the same machine: guided steps, the VAE's decoder.

    python benchmarks/spread.py [--models 14B,1.3B] [--plans guidance2,ulysses2] [--vae 1280x720]

Random weights made on the cards, 81 frames, both branches of guidance, through the sampler as a run
goes through it. Cards of one machine differ by a few percent, and those that work together wait for
the slowest. So a plan of n is compared with the same n cards when each computes a step by itself,
all at the same time, "each n": `cards` are their seconds, and efficiency is t1 / (n tn) with their
mean as t1, `of_first` with the first card's. The VAE's t1, "1", is of the first card; its frames
come to the host as bytes, and the best of three counts. apart is the relative L2 of the latents
from those of one GPU, for the VAE the PSNR of float frames. Prints one table and writes
results/spread.json.
"""

import argparse
import concurrent.futures
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import attempt, peak_gib
from networks import LATENTS, random_dit
from random_checkpoint import config_of
from runs import Case, Rows, listed, parser, run

LABELS = {"dit": "{}, a guided step", "vae": "VAE, decode {}"}
ONE = "1"  # the plan of one device
EACH = "each "  # and so many, that have a video each
_PATIENCE = 300.0  # seconds that cards wait for each other


def plan_of(text: str) -> Any:
    """ "guidance2xulysses2" as a plan."""
    from wan_jax.plans import Plan

    found = re.findall(r"(guidance|ring|ulysses)(\d+)|(dit_fsdp)", text)
    sizes = {name: int(count) for name, count, _ in found if name}
    return Plan(**sizes, dit_fsdp=any(split for *_, split in found))


def cards_of(text: str) -> int:
    """Of "each 4" so many; else one."""
    return int(text.removeprefix(EACH)) if text.startswith(EACH) else 1


def plans_of(part: str, plans: Sequence[str]) -> list[str]:
    """What is measured: these plans and, before them, what they are compared with."""
    if part == "vae":
        return [ONE, *plans]
    return [*(f"{EACH}{n}" for n in sorted({plan_of(plan).devices for plan in plans})), *plans]


def run_steps(model: str, plan: Any, steps: int, out: Path, *, cards: int = 1) -> dict[str, Any]:
    """Seconds of a guided step, the first left out, and the latents in a file.

    cards: with the plan of one device, how many compute it each by itself at the same time.
    """
    import jax

    if plan.devices > 1:
        latents, times = take_steps(model, plan, steps)
        found = {"seconds": statistics.median(times[1:])}
    else:
        devices = jax.devices()[:cards]
        ready = threading.Barrier(len(devices), timeout=_PATIENCE)

        def alone(device: jax.Device) -> tuple[np.ndarray, list[float]]:
            with jax.default_device(device):
                return take_steps(model, plan, steps, ready.wait)

        with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
            each = list(pool.map(alone, devices))
        latents, times = each[0]
        medians = [statistics.median(own[1:]) for _, own in each]
        found = {"seconds": statistics.fmean(medians), "cards": medians}
    np.save(out, latents)
    return {**found, "first": times[0], "peak_gib": peak_gib()}


def take_steps(
    model: str, plan: Any, steps: int, compiled: Callable[[], Any] = lambda: None
) -> tuple[np.ndarray, list[float]]:
    """The latents after guided steps, on the default device or those of the plan, and seconds.

    compiled: called behind the first step, which is not timed with the others.
    """
    import jax
    import jax.numpy as jnp

    from wan_jax import sampler, schedulers, spread
    from wan_jax.dit import DiT
    from wan_jax.weights.sources import abstract_part

    config = config_of(model).dit
    layout = plan.layout().of_weights(split=plan.dit_fsdp) if plan.devices > 1 else None
    where = None
    if layout is not None:
        where = layout.weights(abstract_part(config, jnp.dtype(jnp.bfloat16)))
    network = random_dit(config, where)
    keys = jax.random.split(jax.random.key(1), 3)
    put = (lambda x: x) if layout is None else layout.whole
    noise = put(jax.random.normal(keys[0], (1, *LATENTS[model], 16)))
    prepare = spread.program(DiT.prepare, layout)
    shape = (1, config.text_len, config.text_dim)
    texts = [put(jax.random.normal(key, shape, jnp.bfloat16)) for key in keys[1:]]
    conds = [prepare(network, text) for text in texts]
    jax.block_until_ready((noise, conds))
    begun, times = [time.perf_counter()], []

    def on_step(carry: sampler.Carry, count: int) -> None:
        jax.block_until_ready(carry.state.x)
        times.append(time.perf_counter())
        if len(begun) == 1:
            compiled()
        begun.append(time.perf_counter())

    schedule = schedulers.make_schedule("unipc", steps=steps, shift=5.0)
    latents = sampler.sample(
        network, noise, schedule, conds, guidance=5.0, on_step=on_step, layout=layout
    )
    spent = [end - start for start, end in zip(begun, times, strict=False)]
    return np.asarray(latents, np.float32), spent


def run_vae(size: str, plan: Any, out: Path, *, tiny: bool) -> dict[str, Any]:
    """Seconds to decode 81 frames to bytes, compiled before; every eighth as floats in a file."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from wan_jax import streaming
    from wan_jax.vae import VAE

    width, height = (int(side) // 8 for side in size.split("x"))
    layout = plan.layout() if plan.devices > 1 else None
    config, count = (config_of("tiny").vae, 3) if tiny else (config_of("1.3B").vae, 21)
    network = jax.jit(lambda: VAE(config, rngs=nnx.Rngs(0), dtype=jnp.float32))()
    network = streaming.place(network, layout)
    latents = jax.random.normal(jax.random.key(1), (1, count, height, width, 16))

    def decode(pixels: str) -> list[np.ndarray]:
        chunks = streaming.decode(network, latents, pixels=pixels, dtype="bfloat16", layout=layout)
        return [chunk[:, -1:] for chunk, _ in chunks]

    times = []
    for _ in range(4):
        start = time.perf_counter()
        decode("uint8")
        times.append(time.perf_counter() - start)
    found = {"seconds": min(times[1:]), "first": times[0], "peak_gib": peak_gib()}
    np.save(out, np.concatenate(decode("float32"), 1)[:, ::2])
    return found


def apart(part: str, found: Path, truth: Path) -> dict[str, str]:
    """How far the results of a plan are from those of one device, if there are any."""
    if not truth.exists() or found == truth:
        return {}
    a, b = np.load(found).astype(np.float64), np.load(truth).astype(np.float64)
    if part == "vae":
        decibels = 10 * np.log10(4.0 / max(np.mean((a - b) ** 2), 1e-30))
        return {"apart": f"{decibels:.1f} dB"}
    return {"apart": f"{np.linalg.norm(a - b) / np.linalg.norm(b):.2e}"}


def run_plan(text: str, case: str, folder: Path, *, steps: int, tiny: bool) -> dict[str, Any]:
    """One plan of a case "dit 14B" or "vae 1280x720"."""
    part, what = case.split()
    plan, cards = plan_of(text), cards_of(text)
    truth = folder / f"{part}-{what}.npy"
    out = truth if plan.devices == 1 else folder / f"{part}-{what}-{text}.npy"
    if part == "dit":
        found = run_steps(what, plan, steps, out, cards=cards)
    else:
        found = run_vae(what, plan, out, tiny=tiny)
    return {**found, **apart(part, out, truth)}


def faster(rows: Rows) -> Rows:
    """The rows with how much faster than one device they are."""
    measured = [row for row in rows if "seconds" in row]
    alone = {
        (row["what"], row["plan"]): row.get("cards", [row["seconds"]])
        for row in measured
        if plan_of(row["plan"]).devices == 1
    }
    for row in measured:
        count = plan_of(row["plan"]).devices
        same, one = ((row["what"], plan) for plan in (f"{EACH}{count}", ONE))
        cards = alone.get(same, alone.get(one))
        if count > 1 and cards:
            row["speedup"] = statistics.fmean(cards) / row["seconds"]
            row["efficiency"] = row["speedup"] / count
            row["of_first"] = cards[0] / row["seconds"] / count
    return rows


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--models", default="14B,1.3B")
    flags.add_argument("--plans", default="guidance2,ulysses2,ring2")
    flags.add_argument("--vae", default="1280x720", help="sizes, or nothing")
    flags.add_argument("--steps", type=int, default=4)
    flags.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    tiny, steps = arguments.tiny, arguments.steps
    if arguments.child:
        own = arguments.child, arguments.case, arguments.out
        attempt({}, lambda: run_plan(*own, steps=steps, tiny=tiny))
        return
    models, sizes = listed(arguments.models), listed(arguments.vae)
    if tiny:
        models, sizes = ["tiny"], ["64x32"]
    whole = [f"dit {model}" for model in models] + [f"vae {size}" for size in sizes]
    columns = ("what", "plan", "seconds", "speedup", "efficiency", "of_first")
    columns += ("apart", "peak_gib", "first")
    with tempfile.TemporaryDirectory() as folder:
        cases = []
        for case in whole:
            part, what = case.split()
            for plan in plans_of(part, listed(arguments.plans)):
                own = ["--child", plan, "--case", case, "--out", folder, "--steps", str(steps)]
                cases.append(Case({"what": LABELS[part].format(what), "plan": plan}, own))
        options: dict[str, Any] = {"arguments": arguments, "columns": columns, "derive": faster}
        run("spread", __file__, cases, spread=True, **options)


if __name__ == "__main__":
    main()
