"""A LoRA teaches the miniature a colour that it has never seen: what shows with it and without.

    python benchmarks/lora.py [--clips 20]

Draws 40 clips of the colour, trains the LoRA of configs/train_lora_mini.py on them, and lets the
judge see clips of captions of that colour, and of others, which it should leave alone. Prints one
table and writes results/lora.json, whose rows tell the share of clips that are right.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import report
from records import OURS, ROOT
from runs import Case, parser, run

_CONFIG = ROOT / "configs" / "train_lora_mini.py"
_SEED = 99  # another than that of the clips it is trained on
_TINY = {"steps": 2, "warmup_steps": 1, "sample_every": 0, "sample_prompts": []}


def train(folder: Path, *, tiny: bool) -> Path:
    """The LoRA's file; tiny: after two steps on two clips."""
    from wan_jax import tasks
    from wan_jax.training.miniature import examples

    own, data = _CONFIG, folder / examples.COLOUR
    if tiny:
        own = folder / "tiny.py"
        own.write_text(f"config = {tasks.read_literal(_CONFIG) | _TINY}\n")
        examples.write(data, count=2)
    else:
        _run("wan_jax.training.miniature", "--stages", "examples", "--out", str(folder))
    out = folder / "lora"
    _run("wan_jax.training", "--config", str(own), "--data", str(data), "--out", str(out))
    return out / "lora.safetensors"


def _run(module: str, *arguments: str) -> None:
    """A command of its own process: it needs the card for itself."""
    # What it says goes to stderr: this one's stdout is read for rows.
    subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, check=True, stdout=sys.stderr
    )


def rows_of(loras: list[str], clips: int, cache: str) -> Iterator[dict[str, Any]]:
    """What the judge finds right in clips of its colour, and of others."""
    import wan_jax
    from wan_jax.training.miniature import evaluate, examples

    wan = wan_jax.load("mini-t2v", lora=loras, cache_dir=cache)
    of_colour = examples.scenes(clips, colour=examples.COLOUR, seed=_SEED)
    size = of_colour[0].size
    others = [scene for scene in evaluate.held_out(4 * clips, 1) if scene.size == size][:clips]
    for name, scenes in ((examples.COLOUR, of_colour), ("other colours", others)):
        yield {"captions": name, "clips": clips, **evaluate.judged(wan, scenes)}


def measured(case: str, clips: int, *, tiny: bool) -> None:
    """Report the rows of "with" or "without"."""
    with tempfile.TemporaryDirectory() as folder:
        loras = [str(train(Path(folder), tiny=tiny))] if case == "with" else []
        for row in rows_of(loras, clips, folder):
            report(row)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--clips", type=int, default=20)
    arguments = flags.parse_args()
    clips = 1 if arguments.tiny else arguments.clips
    if clips < 1:
        flags.error(f"--clips is {clips}; 1 or more is needed")
    if arguments.child:
        measured(arguments.case, clips, tiny=arguments.tiny)
        return
    cases = [
        Case({"lora": case}, ["--child", OURS, "--case", case, "--clips", str(clips)])
        for case in ("without", "with")
    ]
    columns = ("lora", "captions", "clips", "count", "colour", "shape", "motion", "background")
    run("lora", __file__, cases, arguments=arguments, columns=columns)


if __name__ == "__main__":
    main()
