"""Memory of the card in each stage of text to mp4, and in all of it.

    python benchmarks/memory.py --model 1.3B [--folder DIR] [--max_memory 6GB,none]

Each stage is a process of its own that loads its network from a converted checkpoint of random
numbers (see startup.py) and runs; "all" goes from the text to the mp4, each network leaving the
card when it is done; without an ffmpeg the frames are brought to the host and not written, which
"made" tells. step_seconds is the median of the denoising steps behind the first, and step_ratio
that by the same of no limit; streamed names the networks whose layers lie in the host's memory.
peak is the most that JAX's allocator had in use, tuning of programs included; pool what it had
taken from the card for that; card what NVML, the library of nvidia-smi, saw more than before, which
is right if nothing else runs. --max_memory is run_t2v.py's, and so much is all that JAX may take of
the card, unless --gib or --fraction say what; what does not fit says so. Prints one table and
writes results/memory_MODEL.json. Needs a CUDA GPU for the real models.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from card import Card, fraction, limited
from measure import attempt, video_writer
from records import OURS
from runs import Case, Rows, listed, parser, run
from startup import MODELS, write, written

STAGES = ("text", "denoise", "decode", "all")
PROMPT = "Two cats box on a spotlit stage."
NONE = "no limit"


class Steps:
    """A callback that keeps when steps of denoising were done."""

    def __init__(self) -> None:
        self._moments: list[float] = []

    def __call__(self, progress: Any) -> None:
        if progress.stage == "denoise":
            self._moments.append(time.perf_counter())

    def seconds(self) -> dict[str, float]:
        """The median of a step; the first one compiles."""
        spent = np.diff(self._moments)[1:]
        return {"step_seconds": float(np.median(spent))} if len(spent) else {}


def run_stage(
    stage: str, folder: Path, *, steps: int, mp4: Path, tiny: bool, limit: str | None = None
) -> dict[str, Any]:
    """Seconds and memory of a stage, or of all of them; limit: load()'s max_memory."""
    with Card() as card:
        import jax

        import wan_jax
        from wan_jax.request import make_request

        made, save = video_writer(str(mp4)) if stage == "all" else ("", list)
        before, told = time.perf_counter(), Steps()
        wan = wan_jax.load(folder, offload=True, max_memory=limit)
        # Two prompts: guidance needs the negative one.
        sizes = {"size": (32, 16), "frames": 5} if tiny else {}
        settings: dict[str, Any] = {**sizes, "steps": steps, "seed": 0}
        request, draw = make_request(wan.config, PROMPT, **settings), np.random.default_rng(0)
        latents = draw.standard_normal(request.noise_shape, np.float32)
        wan.make_room([request])
        if stage == "text":
            wan.encode_text([PROMPT, "blurry"])
        elif stage == "denoise":
            dit = wan.config.dit
            context = draw.standard_normal((2, dit.text_len, dit.text_dim), np.float32)
            start = jax.numpy.asarray(latents)
            jax.block_until_ready(wan.denoise(request, context.astype("bfloat16"), start, told))
        elif stage == "decode":
            for _ in wan.decode(latents):
                pass
        else:
            stream = wan.generate(PROMPT, **settings, callback=told, output="stream")
            save(stream)
        seconds = time.perf_counter() - before
        stats = jax.devices()[0].memory_stats() or {}
    found = {"seconds": seconds, **told.seconds(), "streamed": " and ".join(wan.streamed) or "-"}
    found |= {"made": made} if made else {}
    return {**found, **sizes_of(stats), **({} if card.gib is None else {"card_gib": card.gib})}


def sizes_of(stats: dict[str, int]) -> dict[str, float]:
    """What the allocator tells, in GiB."""
    told = {
        "peak_gib": stats.get("peak_bytes_in_use"),
        "pool_gib": stats.get("peak_pool_bytes", stats.get("pool_bytes")),
        "limit_gib": stats.get("bytes_limit"),
    }
    return {name: value / 2**30 for name, value in told.items() if value is not None}


def limits(arguments: argparse.Namespace) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Each limit in words, the child's flags of it, and the environment that sets it."""
    from wan_jax.planning.vae_memory import parse_memory

    for text in listed(arguments.max_memory):
        words, flags = ([NONE], []) if text == "none" else ([text], ["--max_memory", text])
        environment = {} if text == "none" else limited(parse_memory(text))
        if arguments.gib is not None:
            environment = limited(int(arguments.gib * 2**30))
            words.append(f"{arguments.gib:g} GiB of the card")
            if not environment:
                raise SystemExit("--gib: NVML does not tell the card's memory; give --fraction")
        elif arguments.fraction is not None:
            environment = fraction(arguments.fraction)
            words.append(f"{arguments.fraction:g} of the card")
        yield ", ".join(words), flags, environment


def slower(rows: Rows) -> Rows:
    """The rows with how much longer a step takes than without a limit."""
    free = {row["case"]: row for row in rows if row.get("how") == NONE and "step_seconds" in row}
    for row in rows:
        if "step_seconds" in row and row["how"] != NONE and row["case"] in free:
            row["step_ratio"] = row["step_seconds"] / free[row["case"]]["step_seconds"]
    return rows


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--model", default="1.3B", choices=MODELS)
    flags.add_argument("--folder", type=Path, help="of the checkpoint; default: removed at the end")
    flags.add_argument("--stages", default=",".join(STAGES))
    flags.add_argument("--steps", type=int, default=4)
    flags.add_argument("--max_memory", default="none", help="sizes such as 6GB, or none, by commas")
    flags.add_argument("--gib", type=float, help="the allocator's limit")
    flags.add_argument("--fraction", type=float, help="the limit as a part of the card's memory")
    arguments = flags.parse_args()
    model = "tiny" if arguments.tiny else arguments.model
    if arguments.child == "write":
        attempt({}, lambda: write(model, arguments.folder))
        return
    scratch = Path(tempfile.mkdtemp())
    try:
        folder = (arguments.folder or scratch / "checkpoint").absolute()
        if arguments.child:
            own: dict[str, Any] = {"steps": arguments.steps, "tiny": arguments.tiny}
            limit = None if arguments.max_memory == "none" else arguments.max_memory
            own |= {"mp4": scratch / "video.mp4", "limit": limit}
            attempt({"system": OURS}, lambda: run_stage(arguments.case, folder, **own))
            return
        same = ["--child", OURS, "--model", model, "--folder", str(folder)]
        same += ["--steps", str(arguments.steps)]
        cases = written(model, folder)
        for words, own_flags, environment in limits(arguments):
            for stage in listed(arguments.stages):
                child = [*same, *own_flags, "--case", stage]
                cases.append(Case({"case": stage, "how": words}, child, environment))
        columns = ("case", "how", "seconds", "step_seconds", "step_ratio", "streamed", "made")
        columns += ("peak_gib", "pool_gib", "card_gib", "limit_gib")
        options: dict[str, Any] = {"arguments": arguments, "columns": columns, "derive": slower}
        run(f"memory_{model}", __file__, cases, **options)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
