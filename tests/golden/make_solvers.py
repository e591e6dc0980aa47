"""Writes solvers.npz: what the solvers of the original Wan2.1 and of Diffusers make of a toy flow.

    python tests/golden/make_solvers.py --wan_repo /path/to/Wan2.1

Needs torch and diffusers; the tests that read the file need neither. The two solver files of the
original are loaded by path, since its package imports CUDA-only modules.
"""

import argparse
import hashlib
import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import diffusers
import numpy as np
import torch

SHIFTS = (1, 3, 5, 8, 12, 16)
# The last one: the first two timesteps of UniPC are equal, where the originals fail.
CASES = [(steps, shift) for steps in (1, 2, 3, 5, 20, 50) for shift in SHIFTS] + [(100, 16)]
SOLVERS = ("unipc", "dpm++", "unipc_diffusers")
ELEMENTS = 64
MAX_STEPS = 1000
FORMULA = "v = a * tanh(b * x + c * tau) + d * x, tau = float32(t) * float32(0.001), all float32"


def load_by_path(path: Path) -> ModuleType:
    """The module in one file, imported without its package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"--wan_repo: {path} is not there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_solver(name: str, modules: dict[str, ModuleType], *, steps: int, shift: float) -> object:
    """The original's scheduler object, set up as its text-to-video pipeline does."""
    if name == "unipc":
        solver = modules["unipc"].FlowUniPCMultistepScheduler(
            num_train_timesteps=1000, shift=1, use_dynamic_shifting=False
        )
        solver.set_timesteps(steps, device="cpu", shift=shift)
    elif name == "dpm++":
        solver = modules["dpm++"].FlowDPMSolverMultistepScheduler(
            num_train_timesteps=1000, shift=1, use_dynamic_shifting=False
        )
        sigmas = modules["dpm++"].get_sampling_sigmas(steps, shift)
        modules["dpm++"].retrieve_timesteps(solver, device="cpu", sigmas=sigmas)
    else:
        solver = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
        solver.set_timesteps(steps, device="cpu")
    return solver


def toy_inputs() -> dict[str, np.ndarray]:
    """Start and velocity parameters, [64] float32 each."""
    stream = np.random.RandomState(20250225)
    drawn = {
        "x": stream.standard_normal(ELEMENTS),
        "a": stream.uniform(-1.5, 1.5, ELEMENTS),
        "b": stream.uniform(0.5, 2.5, ELEMENTS),
        "c": stream.uniform(-3.0, 3.0, ELEMENTS),
        "d": stream.uniform(-0.5, 1.0, ELEMENTS),
    }
    return {name: values.astype(np.float32) for name, values in drawn.items()}


def run(solver: object, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """([64] float32 final sample, '') or (NaNs, why the original failed)."""
    a, b, c, d = (torch.from_numpy(inputs[name])[None] for name in "abcd")
    x = torch.from_numpy(inputs["x"])[None]
    failed = np.full(ELEMENTS, np.nan, np.float32)
    for t in solver.timesteps:
        tau = t.to(torch.float32) * 0.001
        velocity = a * torch.tanh(b * x + c * tau) + d * x
        try:
            x = solver.step(velocity, t, x, return_dict=False)[0]
        except (IndexError, AssertionError) as error:
            # Started at the second of two equal timesteps, it runs past the end of its schedule.
            return failed, f"{type(error).__name__} {error}".strip()
    if not torch.isfinite(x).all():
        return failed, "final sample is not finite"
    return x[0].numpy(), ""


def schedule_digests(modules: dict[str, ModuleType]) -> dict[str, str]:
    """{'solver/shift': SHA-256 over every N of 1..1000: int64 timesteps, then float32 sigmas}."""
    digests = {}
    for name in SOLVERS:
        for shift in SHIFTS:
            digest = hashlib.sha256()
            for steps in range(1, MAX_STEPS + 1):
                solver = make_solver(name, modules, steps=steps, shift=float(shift))
                digest.update(solver.timesteps.numpy().astype("<i8").tobytes())
                digest.update(solver.sigmas.numpy().astype("<f4").tobytes())
            digests[f"{name}/{shift}"] = digest.hexdigest()
    return digests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wan_repo", type=Path, required=True, help="checkout of Wan2.1")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("solvers.npz"))
    options = parser.parse_args()
    folder = options.wan_repo / "wan" / "utils"
    modules = {
        "unipc": load_by_path(folder / "fm_solvers_unipc.py"),
        "dpm++": load_by_path(folder / "fm_solvers.py"),
    }
    inputs = toy_inputs()
    cases, finals = [], []
    longest = max(steps for steps, _ in CASES)
    timesteps = np.full((len(SOLVERS) * len(CASES), longest), -1, np.int16)
    sigmas = np.full((len(SOLVERS) * len(CASES), longest + 1), np.nan, np.float32)
    for name in SOLVERS:
        for steps, shift in CASES:
            solver = make_solver(name, modules, steps=steps, shift=float(shift))
            row = len(cases)
            timesteps[row, :steps] = solver.timesteps.numpy()
            sigmas[row, : steps + 1] = solver.sigmas.numpy()
            final, failure = run(solver, inputs)
            finals.append(final)
            cases.append({"solver": name, "steps": steps, "shift": shift, "failure": failure})
    commit = subprocess.run(
        ["git", "-C", str(options.wan_repo), "rev-parse", "HEAD"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    facts = {
        "made_by": "tests/golden/make_solvers.py",
        "wan_commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "numpy": np.__version__,
        "velocity": FORMULA,
        "cases": cases,
        "schedules_1_to_1000": schedule_digests(modules),
    }
    np.savez_compressed(
        options.out,
        facts=np.array(json.dumps(facts)),
        finals=np.stack(finals),
        timesteps=timesteps,
        sigmas=sigmas,
        **inputs,
    )
    failures = [case for case in cases if case["failure"]]
    sys.stdout.write(f"{options.out}: {options.out.stat().st_size} bytes, failures: {failures}\n")


if __name__ == "__main__":
    main()
