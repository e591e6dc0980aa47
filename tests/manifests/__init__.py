"""What the released checkpoints hold: names, shapes and stored dtypes of every tensor.

One JSON file a network and naming, written by make_manifests.py from the original's and diffusers'
own modules, never from the tables of wan_jax. Repeated layers share a line where all of them
agree: `blocks.{0..29}.norm3.bias` stands for thirty names.
"""

import json
import re
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]
Tensors = dict[str, tuple[Shape, str | None]]

FOLDER = Path(__file__).parent
DITS = ("t2v_1_3b", "t2v_14b", "i2v_14b", "flf2v_14b")
# Of CLIP only the vision tower, of which the tables leave some out.
NAMES = tuple(
    f"{net}.{naming}" for net in (*DITS, "vae", "umt5", "clip") for naming in ("wan", "diffusers")
)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def head(name: str) -> dict[str, Any]:
    """The facts about a manifest: repositories, layout, counts, config, what made it."""
    values = _read(name)
    del values["entries"]
    return values


def load(name: str) -> Tensors:
    """{tensor name: (shape, stored dtype, None where it is not known)} of a name as above."""
    return {
        tensor: (tuple(shape), dtype)
        for entry, (dtype, shape) in _read(name)["entries"].items()
        for tensor in expand(entry)
    }


def expand(entry: str) -> list[str]:
    """The tensor names that one line of a manifest stands for."""
    found = _RANGE.search(entry)
    if found is None:
        return [entry]
    start, end = entry[: found.start()], entry[found.end() :]
    return [f"{start}{i}{end}" for i in range(int(found[1]), int(found[2]) + 1)]


def _read(name: str) -> dict[str, Any]:
    if name not in NAMES:
        raise ValueError(f"no manifest {name!r}; there are {NAMES}")
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
