"""The networks of the miniature as its training leaves them, with random weights in their place."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from wan_jax.training.miniature import captions, files, networks, text
from wan_jax.weights import miniature

PARTS: dict[str, Any] = {"vae": networks.VAE, "umt5": networks.UMT5, "clip": networks.CLIP}


def write_networks(path: Path, kinds: Collection[str] = tuple(networks.DITS)) -> None:
    """Write what pack() takes for the checkpoints of these kinds."""
    for name, config in (PARTS | networks.DITS).items():
        if name in PARTS or name in kinds:
            stream = np.random.RandomState(len(name))
            arrays = miniature.random_arrays(config, stream)
            files.write(path / f"{name}.safetensors", arrays, config.to_dict())
    text.train_tokenizer(captions.corpus(500, 0), path / "tokenizer")
