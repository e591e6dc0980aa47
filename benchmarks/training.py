"""A step of training of the 1.3B's DiT: all weights, and a LoRA beside them.

    python benchmarks/training.py [--remats products,attention,full] [--kinds full,lora]

Random weights made on the card, one clip of 832x480 and 81 frames as latents. Each line is measured
in a process of its own; what does not fit says so. peak_gib is of the step's program, allocator_gib
the most that JAX had in use, tuning included. Prints one table and writes results/training.json.
Needs a CUDA GPU.

TFLOP of a step are what the mathematics needs, without what is computed again. Products and
attention of one forward are P + A. All weights: 3 (P + A), one for the forward, one each for the
gradients of inputs and weights. A LoRA of rank r beside the kernels: 2 P + 3 A + 3 L, as kernels
have no gradient (attention's backward is counted twice its forward), L being 2 n r (d_in + d_out)
for every product with factors.
"""

import time
from typing import Any

from measure import attempt, matmul_tflops, peak_gib, program_gib
from runs import Case, Rows, listed, parser, run

KINDS = ("full", "lora")
REMATS = ("none", "products", "attention", "full")
PEAK = 989.0  # TFLOP/s of bfloat16 without sparsity, from NVIDIA's data sheet of the H200
WARMUPS, STEPS = 2, 7


def sizes(*, tiny: bool) -> tuple[Any, tuple[int, int, int]]:
    """The network and the latent grid [t, h, w]."""
    from wan_jax.config import NANO_T2V, RELEASED

    if tiny:
        return NANO_T2V.dit, (2, 8, 8)
    return RELEASED["t2v-1.3B"].dit, (21, 60, 104)


def step_tflop(config: Any, grid: tuple[int, int, int], *, rank: int) -> float:
    """Floating-point operations of a step in 1e12; rank 0: all weights are trained."""
    t, h, w = grid
    d, ffn, text = config.dim, config.ffn_dim, config.text_len
    tokens = t * h * w // 4
    products = 2 * tokens * (6 * d * d + 2 * d * ffn) + 2 * text * 2 * d * d
    attention = 4 * tokens * (tokens + text) * d
    if rank == 0:
        return 3 * config.num_layers * (products + attention) / 1e12
    factors = 2 * rank * (tokens * (6 * 2 * d + 2 * (d + ffn)) + text * 2 * 2 * d)
    return config.num_layers * (2 * products + 3 * attention + 3 * factors) / 1e12


def measure(kind: str, remat: str, *, rank: int, tiny: bool) -> dict[str, Any]:
    """Median seconds of a step, its memory, and the rate of a product in the same process."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from wan_jax.dit import DiT
    from wan_jax.training import finetune, flow, lora
    from wan_jax.training.batches import Batch
    from wan_jax.training.optimizer import OptimizerConfig
    from wan_jax.training.step import make_state, make_step

    config, grid = sizes(tiny=tiny)
    rate = matmul_tflops(256 if tiny else 8192)
    network = jax.jit(lambda: DiT(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))()
    optimizer = OptimizerConfig(steps=100, learning_rate=1e-5, warmup_steps=1)
    trained: finetune.Trained
    if kind == "full":
        trained, frozen = finetune.Full(config, jnp.dtype(jnp.bfloat16)), None
        params = {finetune.FULL: finetune.masters(network)}
        del network
    else:
        trained, frozen = finetune.Beside(1.0), network
        factors = lora.fresh(config, rank, lora.TARGETS, jax.random.key(1))
        params = {finetune.LORA: factors}
    make = jax.jit(lambda p: make_state(p, optimizer, seed=0), donate_argnums=0)
    state = make(params)
    keys = jax.random.split(jax.random.key(2), 2)
    context = jax.random.normal(keys[1], (1, config.text_len, config.text_dim), jnp.bfloat16)
    batch = Batch(jax.random.normal(keys[0], (1, *grid, 16)), context, None, None)
    inputs = finetune.Frozen(context[0], frozen)
    program = make_step(finetune.make_loss(trained, flow.FlowConfig(remat=remat)), optimizer)
    begun = time.perf_counter()
    step = program.on(jax.devices()[0]).lower(state, inputs, batch).compile()
    compiled, taken = time.perf_counter() - begun, program_gib(step, state, inputs, batch)
    times = []
    for _ in range(WARMUPS + STEPS):
        start = time.perf_counter()
        state, metrics = step(state, inputs, batch)
        loss = float(metrics["loss"])
        times.append(time.perf_counter() - start)
    weights = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return {
        "seconds": sorted(times[WARMUPS:])[STEPS // 2],
        "first_seconds": compiled + times[0],
        "peak_gib": taken,
        "allocator_gib": peak_gib(),
        "trained_millions": weights / 1e6,
        "loss": loss,
        "matmul_tflop_per_s": rate,
    }


def rated(rows: Rows) -> Rows:
    """The rows with shares of the card's peak and of the product in the same process."""
    for row in rows:
        if "seconds" in row:
            row["mfu_peak"] = row["tflop_per_s"] / PEAK
            row["mfu_matmul"] = row["tflop_per_s"] / row["matmul_tflop_per_s"]
    return rows


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--kinds", default=",".join(KINDS))
    flags.add_argument("--remats", default=",".join(REMATS))
    flags.add_argument("--rank", type=int, default=32)
    arguments = flags.parse_args()
    tiny = arguments.tiny
    if arguments.child:
        rank = arguments.rank
        attempt({}, lambda: measure(arguments.child, arguments.case, rank=rank, tiny=tiny))
        return
    cases, (config, grid) = [], sizes(tiny=tiny)
    for kind in listed(arguments.kinds):
        rank = arguments.rank if kind == "lora" else 0
        labels = {"train": kind, "rank": rank, "tflop": step_tflop(config, grid, rank=rank)}
        for remat in listed(arguments.remats):
            own = ["--child", kind, "--case", remat, "--rank", str(arguments.rank)]
            cases.append(Case({**labels, "remat": remat}, own))
    columns = ("train", "remat", "seconds", "tflop", "tflop_per_s", "mfu_peak", "mfu_matmul")
    columns += ("peak_gib", "allocator_gib")
    facts = {"peak_tflop_per_s": PEAK}
    options: dict[str, Any] = {"arguments": arguments, "columns": columns, "derive": rated}
    run("training", __file__, cases, facts=facts, **options)


if __name__ == "__main__":
    main()
