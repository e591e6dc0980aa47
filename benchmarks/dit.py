"""One forward of the DiT, one guidance branch, ours beside diffusers' compiled transformer.

    python benchmarks/dit.py [--models 1.3B,14B] [--quantize fp8_linear,fp8]

Random weights made on the card, bfloat16 as each system runs it, 81 frames; with --quantize ours in
8 bits as well, which multiplies another kind of number than the peer. peak_gib is of the measured
program, allocator_gib the most that JAX had in use, the making of the weights and tuning included.
Prints one table and writes results/dit.json. Needs a CUDA GPU, torch and diffusers.
"""

from measure import attempt, median_seconds, peak_gib, program_gib, torch_device, torch_seconds
from networks import LATENTS, diffusers_transformer, random_dit, whole_config
from records import NARROW, OURS, WIDE
from runs import Case, listed, parser, run

BFLOAT16 = "@"  # the way that is not named


def forward_tflop(model: str) -> float:
    """Floating-point operations of one forward in 1e12, products and attention only."""
    config, (t, h, w) = whole_config(model).dit, LATENTS[model]
    d, tokens, text = config.dim, t * h * w // 4, config.text_len
    products = 2 * tokens * (6 * d * d + 2 * d * config.ffn_dim) + 2 * text * 2 * d * d
    attention = 4 * tokens * (tokens + text) * d
    return config.num_layers * (products + attention) / 1e12


def repeats_of(model: str) -> int:
    """A forward of the 14B takes ten seconds."""
    return 3 if model == "14B" else 5


def run_ours(model: str, kind: str) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from wan_jax import sampler, xla
    from wan_jax.dit import DiT
    from wan_jax.weights.quantization import quantized

    config = whole_config(model).dit
    network = random_dit(config)
    if kind != BFLOAT16:
        network = quantized(network, kind, donate=True)
    keys = jax.random.split(jax.random.key(1), 2)
    latents = jax.random.normal(keys[0], (1, *LATENTS[model], config.in_channels))
    context = jax.random.normal(keys[1], (1, config.text_len, config.text_dim), jnp.bfloat16)
    cond = jax.jit(DiT.prepare)(network, context)
    own = (network, latents, jnp.float32(500.0), (cond,), jnp.float32(1.0))
    program = xla.jit(sampler.velocity, attention=True).on(jax.devices()[0])
    compiled = program.lower(*own).compile()
    seconds = median_seconds(
        lambda: jax.block_until_ready(compiled(*own)), repeats=repeats_of(model)
    )
    return {
        "seconds": seconds,
        "peak_gib": program_gib(compiled, own),
        "temp_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
        "allocator_gib": peak_gib(),
    }


def run_diffusers(model: str, backends: list[str]) -> None:
    import torch

    config = whole_config(model).dit
    network = diffusers_transformer(config)
    options = {"device": torch_device(), "dtype": torch.bfloat16}
    inputs = {
        "hidden_states": torch.randn(1, config.in_channels, *LATENTS[model], **options),
        "encoder_hidden_states": torch.randn(1, config.text_len, config.text_dim, **options),
        "timestep": torch.tensor([500], device=torch_device()),
        "return_dict": False,
    }

    def measure(backend: str) -> dict[str, float]:
        network.set_attention_backend(backend)
        return torch_seconds(lambda: network(**inputs), warmups=1, repeats=repeats_of(model))

    for backend in backends:
        attempt({"backend": backend}, lambda backend=backend: measure(backend))


def cases_of(model: str, systems: list[str], same: list[str], kinds: list[str]) -> list[Case]:
    """The peer first, then ours in bfloat16 and in 8 bits."""
    work = {"model": model, "tflop": forward_tflop(model)}
    found = []
    for system in sorted(systems, key=lambda name: name == OURS):
        own = ["--child", system, "--models", model, *same]
        for kind in (BFLOAT16, *kinds) if system == OURS else ("",):
            labels = {**work, "system": system, "kind": WIDE if kind in ("", BFLOAT16) else NARROW}
            labels |= {"how": kind} if kind else {}
            found.append(Case(labels, [*own, "--case", kind]))
    return found


def main() -> None:
    flags = parser(__doc__, systems=(OURS, "diffusers"))
    flags.add_argument("--models", default="1.3B,14B")
    flags.add_argument("--backends", default="native,_native_cudnn", help="diffusers' attention")
    flags.add_argument("--quantize", default="", help="kinds of ours in 8 bits, by commas")
    arguments = flags.parse_args()
    models = ["tiny"] if arguments.tiny else listed(arguments.models)
    backends = "native" if arguments.tiny else arguments.backends
    if arguments.child == OURS:
        attempt({}, lambda: run_ours(models[0], arguments.case))
        return
    if arguments.child:
        run_diffusers(models[0], listed(backends))
        return
    same, kinds = ["--backends", backends], listed(arguments.quantize)
    cases = [
        case for model in models for case in cases_of(model, listed(arguments.systems), same, kinds)
    ]
    columns = ("model", "system", "how", "backend", "seconds", "ratio", "to_bfloat16")
    columns += ("tflop_per_s", "share", "peak_gib", "allocator_gib")
    run("dit", __file__, cases, arguments=arguments, columns=columns)


if __name__ == "__main__":
    main()
