"""Writes dit.npz: velocities of the original Wan2.1 DiT in float32 and under bfloat16 autocast.

    python -m tests.golden.make_dit --wan_repo /path/to/Wan2.1

Needs torch and diffusers; the test that reads the file needs neither. The model file is imported
without its package, which wants CUDA. Two things of it act on CUDA only and get a stand-in: flash
attention becomes torch's own, with the same casts, and the float32 islands (amp.autocast blocks)
switch off the autocast of the CPU.
"""

import argparse
import contextlib
import functools
import importlib
import json
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.random_weights import random_state_dict, relative_l2

SEEDS = (0, 1, 2)
TIMESTEPS = (999, 92)
LATENTS = (16, 3, 6, 10)
TEXT_LENGTHS = (20, 7)
CONFIG = {
    "dim": 256,
    "ffn_dim": 512,
    "num_heads": 2,
    "num_layers": 5,
    "in_dim": 16,
    "out_dim": 16,
    "text_dim": 64,
    "text_len": 32,
    "freq_dim": 64,
    "patch_size": [1, 2, 2],
    "eps": 1e-6,
}
WEIGHTS = "tests.random_weights.random_state_dict(shapes by Wan2.1 name, seed=seed)"
INPUTS = (
    "RandomState(20250301): standard_normal latents [2, c, t, h, w], then the first text, the "
    "second, rows of text_dim; float32"
)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    k_lens: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    half: bool,
) -> torch.Tensor:
    """[b, s, n, k] each: what flash_attention does, on the CPU; half: its casts to bfloat16."""
    if window_size != (-1, -1):
        raise ValueError(f"window_size is {window_size}; only global attention is expected")
    given = q.dtype
    if half:
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    lengths = [k.shape[1]] * k.shape[0] if k_lens is None else k_lens.tolist()
    out = []
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if half else SDPBackend.MATH):
        for i, length in enumerate(lengths):
            parts = (x.transpose(0, 1)[None] for x in (q[i], k[i, :length], v[i, :length]))
            out.append(torch.nn.functional.scaled_dot_product_attention(*parts)[0].transpose(0, 1))
    return torch.stack(out).to(given)


def load_original(repo: Path) -> ModuleType:
    """wan/modules/model.py, with the islands acting on the CPU."""
    folder = repo / "wan" / "modules"
    if not (folder / "model.py").is_file():
        raise SystemExit(f"--wan_repo: {folder / 'model.py'} is not there")
    package = ModuleType("wan_original")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    with warnings.catch_warnings():  # two decorators name CUDA's autocast
        warnings.simplefilter("ignore")
        model = importlib.import_module(f"{package.__name__}.model")
    model.amp = SimpleNamespace(autocast=island)
    return model


def island(*, dtype: torch.dtype) -> torch.amp.autocast:
    """A stretch that runs in the dtype of its inputs, which are float32."""
    if dtype != torch.float32:
        raise ValueError(f"an island of {dtype} was not expected")
    return torch.amp.autocast("cpu", enabled=False)


@contextlib.contextmanager
def doubled(module: ModuleType) -> Iterator[None]:
    """Within, whatever the module calls float32 is float64."""

    class Torch:
        float32 = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    single = torch.Tensor.float
    module.torch, torch.Tensor.float = Torch(), torch.Tensor.double
    # The island checks for float32, and there is no autocast to switch off.
    module.amp = SimpleNamespace(autocast=lambda *, dtype: contextlib.nullcontext())
    try:
        yield
    finally:
        module.torch, torch.Tensor.float = torch, single
        module.amp = SimpleNamespace(autocast=island)


def inputs() -> dict[str, np.ndarray]:
    """latents [2, c, t, h, w] and two texts [s, text_dim], float32."""
    stream = np.random.RandomState(20250301)
    drawn = {"latents": stream.standard_normal((len(TEXT_LENGTHS), *LATENTS))}
    for i, length in enumerate(TEXT_LENGTHS):
        drawn[f"text{i}"] = stream.standard_normal((length, CONFIG["text_dim"]))
    return {name: values.astype(np.float32) for name, values in drawn.items()}


def build(module: ModuleType, seed: int) -> torch.nn.Module:
    """The original's model with random weights, float32."""
    config = {name: tuple(v) if isinstance(v, list) else v for name, v in CONFIG.items()}
    model = module.WanModel(model_type="t2v", **config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    weights = random_state_dict(shapes, seed=seed)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return model.eval().requires_grad_(False)


def forward(
    module: ModuleType, model: torch.nn.Module, given: dict[str, np.ndarray], *, half: bool
) -> np.ndarray:
    """Velocity [2, c, t, h, w] in the dtype of the run."""
    module.flash_attention = functools.partial(attention, half=half)
    dtype = model.patch_embedding.weight.dtype
    tensors = {name: torch.from_numpy(value).to(dtype) for name, value in given.items()}
    _, frames, height, width = LATENTS
    with torch.amp.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        out = model(
            list(tensors["latents"]),
            t=torch.tensor(TIMESTEPS),
            context=[tensors[f"text{i}"] for i in range(len(TEXT_LENGTHS))],
            seq_len=frames * height * width // 4,
        )
    return torch.stack(out).numpy()


def watch(model: torch.nn.Module) -> dict[str, str]:
    """A dict that each forward fills with {submodule: dtypes of its input and output}."""
    seen: dict[str, str] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, args: tuple, out: torch.Tensor) -> None:
            source = str(args[0].dtype) if args else "keywords"
            seen[name] = f"{source} -> {out.dtype}".replace("torch.", "")

        return hook

    for name, module in model.named_modules():
        if name and not name.startswith(tuple(f"blocks.{i}" for i in range(2, 99))):
            module.register_forward_hook(keep(name))
    return seen


def check_islands(seen: dict[str, str]) -> None:
    """Fail unless the autocast run kept to the precision map of Wan2.1 on a GPU."""
    needed = {
        "patch_embedding": "bfloat16",
        "text_embedding.2": "bfloat16",
        "time_embedding.2": "float32",
        "time_projection.1": "float32",
        "head.norm": "float32",
        "head.head": "float32",
    }
    for i in range(2):
        block = f"blocks.{i}"
        needed[block] = "float32"
        needed |= {
            f"{block}.{name}": "float32" for name in ("self_attn.norm_q", "cross_attn.norm_k")
        }
        for name in ("self_attn.q", "self_attn.v", "self_attn.o", "cross_attn.k", "cross_attn.o"):
            needed[f"{block}.{name}"] = "bfloat16"
        needed |= {f"{block}.ffn.{layer}": "bfloat16" for layer in range(3)}
    for name, dtype in needed.items():
        if seen[name].split(" -> ")[1] != dtype:
            raise SystemExit(f"{name} is {seen[name]}; {dtype} was expected")


def run_seed(
    module: ModuleType, given: dict[str, np.ndarray], seed: int
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Velocities in float32 and under autocast, and what is known of them."""
    model = build(module, seed)
    single = forward(module, model, given, half=False)
    seen = watch(model)
    half = forward(module, model, given, half=True)
    check_islands(seen)
    with doubled(module):
        truth = forward(module, build(module, seed).double(), given, half=False)
    if truth.dtype != np.float64 or single.dtype != np.float32 or half.dtype != np.float32:
        raise SystemExit(f"dtypes {truth.dtype}, {single.dtype}, {half.dtype} were not expected")
    facts = {
        "seed": seed,
        "float32_from_float64": relative_l2(single, truth),
        "bfloat16_from_float64": relative_l2(half, truth),
        "bfloat16_from_float32": relative_l2(half, single),
    }
    return single, half, facts | {"dtypes": seen} if seed == SEEDS[0] else facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wan_repo", type=Path, required=True, help="checkout of Wan2.1")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("dit.npz"))
    options = parser.parse_args()
    module = load_original(options.wan_repo)
    given = inputs()
    singles, halves, runs = zip(*(run_seed(module, given, seed) for seed in SEEDS), strict=True)
    commit = subprocess.run(
        ["git", "-C", str(options.wan_repo), "rev-parse", "HEAD"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    facts = {
        "made_by": "tests/golden/make_dit.py",
        "wan_commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "diffusers": diffusers.__version__,
        "numpy": np.__version__,
        "config": CONFIG,
        "timesteps": TIMESTEPS,
        "weights": WEIGHTS,
        "inputs": INPUTS,
        "runs": runs,
    }
    np.savez_compressed(
        options.out,
        facts=np.array(json.dumps(facts)),
        float32=np.stack(singles),
        bfloat16=np.stack(halves),
        **given,
    )
    sys.stdout.write(f"{options.out}: {options.out.stat().st_size} bytes\n")
    for run in runs:
        sys.stdout.write(f"{run}\n")


if __name__ == "__main__":
    main()
