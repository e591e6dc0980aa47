"""The shipped miniatures before the judge: what share of held-out captions their clips show.

    python benchmarks/miniature.py [--kinds t2v,i2v,flf2v,vae] [--clips 200] [--pairs 100]

Clips of one object, or of images, and for text to video of two objects, all at the default
settings; the VAE's PSNR on held-out clips, --vae_clips of every size. Minutes on a GPU, hours on
two cores. Prints one table and writes results/miniature.json, whose rows are those of
evaluate.scores().
"""

import sys
import tempfile
from typing import Any

from measure import attempt
from records import OURS
from runs import Case, listed, parser, run

_VAE = "vae"


def scores(kind: str, *, clips: int, pairs: int, vae_clips: int) -> dict[str, Any]:
    """The row of one of the miniatures, or of "vae", the VAE that they share."""
    import wan_jax
    from wan_jax.training.miniature import evaluate

    def notify(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as cache:
        if kind == _VAE:
            return vae_scores(wan_jax.load("mini-t2v", cache_dir=cache), vae_clips)
        wan = wan_jax.load(f"mini-{kind}", cache_dir=cache)
        return evaluate.scores(wan, clips=clips, pairs=pairs, notify=notify)


def vae_scores(wan: Any, count: int) -> dict[str, Any]:
    """PSNR of reconstructed clips, `count` of every size."""
    import numpy as np

    from wan_jax.training.miniature import autoencoder
    from wan_jax.weights import trees

    arrays = {path: np.asarray(leaf) for path, leaf in trees.flatten(wan.network("vae")).items()}
    decibels = autoencoder.reconstruction(arrays, wan.config.vae, count=count)
    mean = sum(decibels) / len(decibels)
    return {"kind": _VAE, "clips": len(decibels), "mean dB": mean, "least dB": min(decibels)}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--kinds", default="t2v,i2v,flf2v,vae")
    numbers = {"clips": 200, "pairs": 100, "vae_clips": 16}
    for name, default in numbers.items():
        flags.add_argument(f"--{name}", type=int, default=default)
    arguments = flags.parse_args()
    given = {name: 1 if arguments.tiny else getattr(arguments, name) for name in numbers}
    if arguments.child:
        attempt({}, lambda: scores(arguments.case, **given))
        return
    passed = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    cases = [
        Case({"kind": kind}, ["--child", OURS, "--case", kind, *passed])
        for kind in listed(arguments.kinds)
    ]
    columns = ("kind", "clips", "colour", "shape", "motion", "direction", "background", "mean dB")
    run("miniature", __file__, cases, arguments=arguments, columns=columns)


if __name__ == "__main__":
    main()
