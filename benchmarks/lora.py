"""A LoRA teaches the miniature a colour that it has never seen: what shows with it and without.

    python benchmarks/lora.py [--clips 20]

Draws 40 clips of the colour, trains the LoRA of configs/train_lora_mini.py on them, and lets the
judge see clips of captions of that colour, and of others, which it should leave alone. Minutes on
a GPU, an hour on two cores. Writes results/lora.json, whose rows tell the share of clips that are
right.
"""

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from records import ROOT, Results, versions
from runs import device, parser

_CONFIG = ROOT / "configs" / "train_lora_mini.py"
_SEED = 99  # another than that of the clips it is trained on


def train(folder: Path, *, tiny: bool) -> Path:
    """The LoRA's file; tiny: after two steps."""
    from wan_jax.training.miniature import examples

    own = _CONFIG
    if tiny:
        own = folder / "tiny.py"
        given = ast.literal_eval(_CONFIG.read_text().partition("config = ")[2])
        less = {"steps": 2, "warmup_steps": 1, "sample_every": 0, "sample_prompts": []}
        own.write_text(f"config = {given | less}\n")
    stages = ["-m", "wan_jax.training.miniature", "--stages", "examples", "--out", str(folder)]
    data, out = folder / examples.COLOUR, folder / "lora"
    training = ["-m", "wan_jax.training", "--config", str(own), "--data", str(data)]
    for arguments in (stages, [*training, "--out", str(out)]):
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)
    return out / "lora.safetensors"


def rows_of(loras: Sequence[str], clips: int) -> list[dict[str, Any]]:
    """What the judge finds right in clips of its colour, and of others."""
    import wan_jax
    from wan_jax.training.miniature import evaluate, examples

    wan = wan_jax.load("mini-t2v", lora=loras)
    of_colour = examples.scenes(clips, colour=examples.COLOUR, seed=_SEED)
    size = of_colour[0].size
    others = [scene for scene in evaluate.held_out(4 * clips, 1) if scene.size == size][:clips]
    return [
        {"lora": bool(loras), "captions": name, "clips": clips, **evaluate.shares(wan, scenes)}
        for name, scenes in ((examples.COLOUR, of_colour), ("other colours", others))
    ]


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--clips", type=int, default=20)
    arguments = flags.parse_args()
    clips = 1 if arguments.tiny else arguments.clips
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    facts = {"device": device()[0]}  # asked elsewhere: the training needs the card for itself
    labels = [{"lora": lora} for lora in (False, True)]
    results = Results(arguments.name or "lora", facts, labels, tiny=arguments.tiny)
    with tempfile.TemporaryDirectory() as folder:
        file = train(Path(folder), tiny=arguments.tiny)
        rows = [row for loras in ([], [str(file)]) for row in rows_of(loras, clips)]
    results.write(rows)
    print(
        f"{facts['device']}, {versions()}\nwritten to {results.path}\n{json.dumps(rows, indent=2)}"
    )


if __name__ == "__main__":
    main()
