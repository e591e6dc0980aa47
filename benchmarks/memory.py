"""Memory of the card in each stage of text to mp4, and in all of it.

    python benchmarks/memory.py --model 1.3B [--folder DIR] [--gib 24]

Each stage is a process of its own that loads its network from a converted checkpoint of random
numbers (see startup.py) and runs; "all" goes from the text to the mp4, each network leaving the
card when it is done. peak is the most that JAX's allocator had in use, tuning of programs included;
pool what it had taken from the card for that; card what NVML, the library of nvidia-smi, saw more
than before, which is right if nothing else runs. --gib or --fraction limit the allocator (by
XLA_PYTHON_CLIENT_MEM_FRACTION); what does not fit says so. Prints one table and writes
results/memory_MODEL.json. Needs a CUDA GPU for the real models.
"""

import argparse
import contextlib
import ctypes
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self

import numpy as np
from measure import OURS, Case, attempt, parser, run
from startup import MODELS, write, written

STAGES = ("text", "denoise", "decode", "all")
PROMPT = "Two cats box on a spotlit stage."


class _Memory(ctypes.Structure):
    """NVML's nvmlMemory_t, in bytes."""

    _fields_ = tuple((name, ctypes.c_ulonglong) for name in ("total", "free", "used"))


class Card:
    """What NVML, nvidia-smi's library, says of the first visible card's memory.

    As a context it samples what is in use while the block runs. Without the library nothing is
    known.
    """

    def __init__(self) -> None:
        self._done, self._values = threading.Event(), list[int]()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._handle = ctypes.c_void_p()
        self._library: Any = None
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
        with contextlib.suppress(OSError):
            library = ctypes.CDLL("libnvidia-ml.so.1")
            index, handle = int(first) if first.isdigit() else 0, ctypes.byref(self._handle)
            failed = library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(index, handle)
            self._library = None if failed else library

    def now(self) -> _Memory | None:
        found = _Memory()
        if self._library is None:
            return None
        failed = self._library.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(found))
        return None if failed else found

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            found = self.now()
            if found is not None:
                self._values.append(found.used)

    def __enter__(self) -> Self:
        before = self.now()
        if before is not None:
            self._values.append(before.used)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    @property
    def gib(self) -> float | None:
        """The most, less what was in use before."""
        return (max(self._values) - self._values[0]) / 2**30 if self._values else None


def run_stage(stage: str, folder: Path, *, steps: int, mp4: Path, tiny: bool) -> dict[str, Any]:
    """Seconds and memory of a stage, or of all of them."""
    with Card() as card:
        import jax

        import wan_jax
        from wan_jax.request import make_request

        before = time.perf_counter()
        wan = wan_jax.load(folder, offload=True)
        # Two prompts: guidance needs the negative one.
        sizes = {"size": (32, 16), "frames": 5} if tiny else {}
        settings: dict[str, Any] = {**sizes, "steps": steps, "seed": 0}
        request, stream = make_request(wan.config, PROMPT, **settings), np.random.default_rng(0)
        latents = stream.standard_normal(request.noise_shape, np.float32)
        if stage == "text":
            wan.encode_text([PROMPT, "blurry"])
        elif stage == "denoise":
            dit = wan.config.dit
            context = stream.standard_normal((2, dit.text_len, dit.text_dim), np.float32)
            start = jax.numpy.asarray(latents)
            jax.block_until_ready(wan.denoise(request, context.astype("bfloat16"), start))
        elif stage == "decode":
            for _ in wan.decode(latents):
                pass
        else:
            wan_jax.save_video(wan.generate(PROMPT, **settings, output="stream"), str(mp4))
        seconds = time.perf_counter() - before
        stats = jax.devices()[0].memory_stats() or {}
    gib = {
        "peak_gib": stats.get("peak_bytes_in_use"),
        "pool_gib": stats.get("peak_pool_bytes", stats.get("pool_bytes")),
        "limit_gib": stats.get("bytes_limit"),
    }
    known = {name: value / 2**30 for name, value in gib.items() if value is not None}
    return {"seconds": seconds, **known, **({} if card.gib is None else {"card_gib": card.gib})}


def limits(arguments: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """The limit in words, and the environment that sets it."""
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    fraction, words = arguments.fraction, "no limit"
    if arguments.gib is not None:
        card = Card().now()
        if card is None:
            raise SystemExit("--gib: NVML does not tell the card's memory; give --fraction")
        fraction, words = arguments.gib * 2**30 / card.total, f"{arguments.gib:g} GiB"
    elif fraction is not None:
        words = f"{fraction:g} of the card"
    if fraction is not None:
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{fraction:.6f}"
    return words, environment


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--model", default="1.3B", choices=MODELS)
    flags.add_argument("--folder", type=Path, help="of the checkpoint; default: removed at the end")
    flags.add_argument("--stages", default=",".join(STAGES))
    flags.add_argument("--steps", type=int, default=2)
    flags.add_argument("--gib", type=float, help="the allocator's limit")
    flags.add_argument("--fraction", type=float, help="the limit as a part of the card's memory")
    arguments = flags.parse_args()
    model = "tiny" if arguments.tiny else arguments.model
    scratch = Path(tempfile.mkdtemp())
    try:
        folder = (arguments.folder or scratch / "checkpoint").absolute()
        if arguments.child == "write":
            attempt({}, lambda: write(model, folder))
            return
        if arguments.child:
            own: dict[str, Any] = {"steps": arguments.steps, "tiny": arguments.tiny}
            own["mp4"] = scratch / "video.mp4"
            attempt({"system": OURS}, lambda: run_stage(arguments.case, folder, **own))
            return
        words, environment = limits(arguments)
        same = ["--child", OURS, "--model", model, "--folder", str(folder)]
        same += ["--steps", str(arguments.steps)]
        cases = written(model, folder)
        cases += [
            Case({"case": stage, "how": words}, [*same, "--case", stage], environment)
            for stage in arguments.stages.split(",")
        ]
        columns = ("case", "how", "seconds", "peak_gib", "pool_gib", "card_gib", "limit_gib")
        run(f"memory_{model}", __file__, cases, arguments=arguments, columns=columns)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
