"""The VAE: 81 frames decoded and encoded, ours and diffusers' AutoencoderKLWan.

    python benchmarks/vae.py [--sizes 832x480,1280x720] [--dtypes float32,bfloat16]

float32 is with TF32 convolutions in both. Ours in float32 is what a run does: chunk by chunk, the
bytes of the frames brought to the host or the frames brought from it. In bfloat16, which no run
uses, it is one program for the whole video. Diffusers' frames stay on the card; it runs as it is
and compiled, then with cuDNN's search. share is of the convolutions' best rates. peak_gib is of the
program where it is one, else the most that JAX had in use, tuning included. Prints one table and
writes results/vae.json. Needs a CUDA GPU, torch and diffusers.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from measure import (
    attempt,
    in_torch,
    median_seconds,
    peak_gib,
    program_gib,
    torch_device,
    torch_seconds,
)
from random_checkpoint import config_of, network
from records import OURS
from runs import Case, listed, parser, run

DIRECTIONS = ("decode", "encode")
LATENT_FRAMES = 21


def vae_of(*, tiny: bool) -> Any:
    return config_of("tiny" if tiny else "1.3B").vae


def latent_shape(size: str, *, tiny: bool) -> tuple[int, int, int, int]:
    """[t, h, w, c] of a size such as 832x480."""
    width, height = map(int, size.split("x"))
    return (3 if tiny else LATENT_FRAMES, height // 8, width // 8, 16)


Way = tuple[Callable[[], Any], Callable[[], float]]


def streamed(vae: Any, direction: str, shape: tuple[int, ...]) -> Way:
    """A run's way through the VAE, to be called again and again, and what tells its memory."""
    import jax

    from wan_jax import conditioning, streaming

    vae = streaming.place(vae, None)
    if direction == "decode":
        latents = jax.random.normal(jax.random.key(1), (1, *shape))
        own = {"pixels": "uint8", "dtype": "bfloat16"}
        return lambda: list(streaming.decode(vae, latents, **own)), peak_gib
    frames = 1 + 4 * (shape[0] - 1)
    size = (frames, 8 * shape[1], 8 * shape[2], 3)
    pixels = np.random.default_rng(0).uniform(-1, 1, size).astype(np.float32)

    def encode() -> Any:
        chunks = conditioning.video_chunks(pixels, stride=4)
        return list(streaming.encode(vae, chunks, dtype="bfloat16", what="the video"))

    return encode, peak_gib


def whole(vae: Any, direction: str, shape: tuple[int, ...]) -> Way:
    """One program for the whole video, and what tells its memory."""
    import jax
    from jax import lax

    from wan_jax import streaming, xla
    from wan_jax import vae as module

    function, key = getattr(module, direction), jax.random.key(1)
    chunk = streaming.decode_chunk(shape[0]) if direction == "decode" else 1
    own = functools.partial(function, chunk=chunk, precision=lax.Precision.DEFAULT)
    size = shape if direction == "decode" else (4 * shape[0] - 3, 8 * shape[1], 8 * shape[2], 3)
    given = jax.jit(lambda: jax.random.uniform(key, (1, *size), minval=-1.0))()
    program = xla.jit(own).on(jax.devices()[0]).lower(vae, given).compile()
    taken = functools.partial(program_gib, program, vae, given)
    return lambda: jax.block_until_ready(program(vae, given)), taken


def run_ours(direction: str, size: str, dtype: str, *, tiny: bool) -> None:
    import jax

    shape = latent_shape(size, tiny=tiny)
    vae = jax.tree.map(lambda leaf: leaf.astype(dtype), network(vae_of(tiny=tiny)))
    how, way = ("as a run", streamed) if dtype == "float32" else ("whole", whole)

    def measure() -> dict[str, Any]:
        step, taken = way(vae, direction, shape)
        return {"seconds": median_seconds(step, repeats=3), "peak_gib": taken()}

    attempt({"how": how}, measure)


def run_diffusers(direction: str, size: str, dtype: str, *, tiny: bool, ways: str) -> None:
    import torch
    from diffusers import AutoencoderKLWan

    config, (t, h, w, z) = vae_of(tiny=tiny), latent_shape(size, tiny=tiny)
    torch.set_float32_matmul_precision("high")  # TF32, as ours
    kind = getattr(torch, dtype)
    same = ("base_dim", "dim_mult", "num_res_blocks")
    settings = {name: getattr(config, name) for name in same}
    settings["dim_mult"] = list(settings["dim_mult"])
    peer = in_torch(lambda: AutoencoderKLWan(**settings), kind)
    shape = (1, z, t, h, w) if direction == "decode" else (1, 3, 4 * t - 3, 8 * h, 8 * w)
    given = torch.rand(shape, device=torch_device(), dtype=kind) * 2 - 1

    def step() -> Any:
        if direction == "decode":
            return peer.decode(given, return_dict=False)[0]
        return peer.encode(given, return_dict=False)[0].mode()

    if "eager" in ways:
        attempt({"how": "eager"}, lambda: torch_seconds(step, warmups=0))
    if "compiled" not in ways or tiny:  # the compiler takes a minute
        return
    torch.backends.cudnn.benchmark = True
    name = f"{direction}r"
    setattr(peer, name, torch.compile(getattr(peer, name), dynamic=False))
    attempt({"how": "compiled"}, lambda: torch_seconds(step))


def main() -> None:
    flags = parser(__doc__, systems=(OURS, "diffusers"))
    flags.add_argument("--sizes", default="832x480,1280x720")
    flags.add_argument("--dtypes", default="float32,bfloat16")
    flags.add_argument("--directions", default=",".join(DIRECTIONS))
    flags.add_argument("--ways", default="eager,compiled", help="how diffusers runs")
    arguments = flags.parse_args()
    tiny = arguments.tiny
    if arguments.child:
        if arguments.child == OURS:
            run_ours(*arguments.case.split(), tiny=tiny)
        else:
            run_diffusers(*arguments.case.split(), tiny=tiny, ways=arguments.ways)
        return
    from wan_jax.planning import vae_costs

    cases, own = [], ["--ways", arguments.ways]
    for size in ["64x32"] if tiny else listed(arguments.sizes):
        shape = latent_shape(size, tiny=tiny)
        for direction in listed(arguments.directions):
            cost = getattr(vae_costs, direction)(vae_of(tiny=tiny), shape)
            for dtype in listed(arguments.dtypes):
                name = f"{direction} {size} {dtype}"
                work = {"tflop": cost.flops.total / 1e12, "kind": f"conv {dtype}"}
                for system in listed(arguments.systems):
                    labels = {"case": name, "system": system, **work}
                    cases.append(Case(labels, [*own, "--child", system, "--case", name]))
    columns = ("case", "system", "how", "seconds", "ratio", "tflop_per_s", "share", "peak_gib")
    run("vae", __file__, cases, arguments=arguments, columns=columns)


if __name__ == "__main__":
    main()
