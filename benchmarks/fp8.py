"""Whether 8 bits are multiplied as they should be on this card, and how fast.

    python benchmarks/fp8.py [--cases "kernel,program 14B"]

kernel: the relative L2 from float32 of cuDNN's attention of 8 bits, of the same in plain XLA, which
the tests hold to the formula, and of bfloat16; the first two should be alike. product: linear() at
the shapes of 81 frames, in bfloat16, in 8 bits, and in 8 bits with sums of full precision
("highest"); deviation is that from a float32 product of the same rounded operands, and should be
about 0.002 of 8 bits. program: how many products and attentions of 8 bits the compiled network has,
6 and 1 of "fp8", 6 and 0 of "fp8_linear". Prints one table and writes results/fp8.json. Needs a
Hopper GPU.
"""

import functools
import re
import time
from collections import Counter
from typing import Any

from measure import BUSY, attempt, median_seconds
from records import NARROW, OURS, WIDE
from runs import Case, listed, parser, run

LENGTHS = {"kernel": (1000, 2046, 8192)}  # the second and third with padding or none to 512
# Rows, in, out; of the tokens of 81 frames a run makes as many rows (attention.row_tile).
PRODUCTS = {
    "product 1.3B ffn_in": (32_768, 1536, 8960),
    "product 1.3B ffn_out": (32_768, 8960, 1536),
    "product 14B q": (75_648, 5120, 5120),
    "product 14B ffn_in": (75_648, 5120, 13824),
    "product 14B ffn_out": (75_648, 13824, 5120),
}
LATENTS = {"program 1.3B": (21, 60, 104), "program 14B": (21, 90, 160)}
TINY = {"kernel": (60,), "product": (40, 32, 48), "program": (2, 4, 4)}
CALLS = ("__cublas$lt$matmul$f8", "__cudnn$fmhaSoftmaxF8")


def run_kernel(lengths: tuple[int, ...]) -> None:
    import jax
    import jax.numpy as jnp

    from wan_jax import xla
    from wan_jax.attention import attention

    program = xla.jit(attention, attention=True, static_argnames="implementation")

    def far(x: jax.Array, y: jax.Array) -> float:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))

    def measure(tokens: int, name: str) -> dict[str, Any]:
        keys = jax.random.split(jax.random.key(0), 6)
        shape = (1, tokens, 4, 128)
        # As in a network: with means, and a few large numbers in every head.
        large = jnp.where(jnp.arange(128) % 29 == 3, 4.0, 1.0)
        q, k, v = (
            jax.random.normal(keys[i], shape) * scale
            + jax.random.normal(keys[i + 3], (128,)) * mean
            for i, (scale, mean) in enumerate(((large, 0.0), (large, 3.0), (1.0, 1.0)))
        )
        truth = program(q, k, v, implementation="chunked")
        q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
        return {"deviation": far(program(q, k, v, implementation=name), truth)}

    for tokens in lengths:
        for name in ("cudnn_fp8", "chunked_fp8", "chunked"):
            own = functools.partial(measure, tokens, name)
            attempt({"how": f"{tokens} tokens, {name}"}, own)


def run_product(rows: int, d_in: int, d_out: int, *, tiny: bool = False) -> None:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from wan_jax import fp8, xla
    from wan_jax.layers import Linear, QuantizedLinear, linear

    x = jax.random.normal(jax.random.key(0), (1, rows, d_in), jnp.bfloat16)
    wide = Linear(d_in, d_out, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    narrow = jax.jit(QuantizedLinear.of)(wide)
    some = slice(None, None, max(1, rows // 64))
    operands = fp8.quantize(x[:, some]), fp8.Scaled(narrow.kernel[...], narrow.scale[...])
    same = jnp.einsum(
        "bld,ed->ble", *(a.widened(jnp.float32) for a in operands), precision="highest"
    )

    def measure(p: Any, precision: str | None) -> dict[str, Any]:
        with jax.default_matmul_precision(precision):
            program = xla.jit(linear)
            found = program(p, x)[:, some].astype(jnp.float32)
            step = functools.partial(program, p, x)
            seconds = median_seconds(
                lambda: jax.block_until_ready(step()), repeats=9, busy=0.0 if tiny else BUSY
            )
        deviation = float(jnp.linalg.norm(found - same) / jnp.linalg.norm(same))
        return {"seconds": seconds, "deviation": deviation}

    work = 2 * rows * d_in * d_out / 1e12
    for how, kind, p, precision in (
        ("bfloat16", WIDE, wide, None),
        ("8 bits", NARROW, narrow, None),
        ("8 bits, highest", NARROW, narrow, "highest"),
    ):
        labels = {"how": how, "kind": kind, "tflop": work}
        attempt(labels, lambda p=p, precision=precision: measure(p, precision))


def run_program(case: str, latents: tuple[int, ...], *, tiny: bool) -> None:
    import jax
    import jax.numpy as jnp

    from wan_jax import xla
    from wan_jax.config import NANO_T2V, RELEASED
    from wan_jax.dit import DiT
    from wan_jax.weights.quantization import KINDS
    from wan_jax.weights.sources import abstract_part

    config = NANO_T2V.dit if tiny else RELEASED[f"t2v-{case.split()[1]}"].dit

    def measure(kind: str) -> dict[str, Any]:
        shape = jax.ShapeDtypeStruct
        network = abstract_part(config, jnp.dtype(jnp.bfloat16), kind=kind)
        context = shape((1, config.text_len, config.text_dim), jnp.bfloat16)
        given = shape((1, *latents, 16), jnp.float32), shape((1,), jnp.float32)
        cond = jax.eval_shape(DiT.prepare, network, context)
        program = xla.jit(DiT.__call__, attention=True).on(jax.devices()[0])
        begun = time.perf_counter()
        compiled = program.lower(network, *given, cond).compile()
        calls = Counter(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text()))
        return {
            "products": calls[CALLS[0]],
            "attentions": calls[CALLS[1]],
            "temp_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
            "compile": time.perf_counter() - begun,
        }

    for kind in KINDS:
        attempt({"how": kind}, lambda kind=kind: measure(kind))


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--cases", help=f"some of {', '.join((*LENGTHS, *PRODUCTS, *LATENTS))}")
    arguments = flags.parse_args()
    whole: dict[str, Any] = TINY if arguments.tiny else {**LENGTHS, **PRODUCTS, **LATENTS}
    if arguments.child:
        case = arguments.case
        if case.startswith("kernel"):
            run_kernel(whole[case])
        elif case.startswith("product"):
            run_product(*whole[case], tiny=arguments.tiny)
        else:
            run_program(case, whole[case], tiny=arguments.tiny)
        return
    names = listed(arguments.cases or "") if not arguments.tiny else []
    cases = [Case({"case": name}, ["--child", OURS, "--case", name]) for name in names or whole]
    columns = ("case", "how", "seconds", "tflop_per_s", "share", "deviation", "products")
    columns += ("attentions", "temp_gib")
    run("fp8", __file__, cases, arguments=arguments, columns=columns)


if __name__ == "__main__":
    main()
