"""The shipped miniatures before the judge: what share of held-out captions their clips show.

    python benchmarks/miniature.py [--kinds t2v,i2v,flf2v] [--clips 200] [--pairs 100]

Clips of one object, or of images, and for text to video of two objects, all at the default
settings; the VAE's PSNR on held-out clips. Minutes on a GPU, an hour or two on two cores. Writes
results/miniature.json, whose rows are those of evaluate.scores().
"""

import json
import os
import tempfile
from typing import Any

from records import Results, versions
from runs import listed, parser


def vae_row(wan: Any, count: int) -> dict[str, Any]:
    """PSNR of reconstructed clips, `count` of every size."""
    import numpy as np

    from wan_jax.training.miniature import autoencoder
    from wan_jax.weights import trees

    arrays = {path: np.asarray(leaf) for path, leaf in trees.flatten(wan.network("vae")).items()}
    decibels = autoencoder.reconstruction(arrays, wan.config.vae, count=count)
    mean = sum(decibels) / len(decibels)
    return {"kind": "vae", "clips": len(decibels), "mean dB": mean, "least dB": min(decibels)}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--kinds", default="t2v,i2v,flf2v")
    flags.add_argument("--clips", type=int, default=200)
    flags.add_argument("--pairs", type=int, default=100)
    flags.add_argument("--vae_clips", type=int, default=16, help="of every size")
    arguments = flags.parse_args()
    if arguments.tiny:
        arguments.clips = arguments.pairs = arguments.vae_clips = 1
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    import jax

    import wan_jax
    from wan_jax.training.miniature import evaluate

    rows: list[dict[str, Any]] = []
    kinds, facts = listed(arguments.kinds), {"device": jax.devices()[0].device_kind}
    labels = [{"kind": kind} for kind in (*kinds, *(["vae"] if "t2v" in kinds else []))]
    results = Results(arguments.name or "miniature", facts, labels, tiny=arguments.tiny)
    for kind in kinds:
        with tempfile.TemporaryDirectory() as cache:
            wan = wan_jax.load(f"mini-{kind}", cache_dir=cache)
            counts = {"clips": arguments.clips, "pairs": arguments.pairs}
            if kind == "t2v" and arguments.vae_clips:
                rows.append(vae_row(wan, arguments.vae_clips))
            rows.append(evaluate.scores(wan, **counts, notify=lambda text: print(text, flush=True)))
        results.write(rows)
    print(
        f"{facts['device']}, {versions()}\nwritten to {results.path}\n{json.dumps(rows, indent=2)}"
    )


if __name__ == "__main__":
    main()
