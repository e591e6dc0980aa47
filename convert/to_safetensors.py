"""Write a converted checkpoint back in the files and names of the original or of Diffusers.

    python convert/to_safetensors.py --src CHECKPOINT --dst DIR --layout diffusers

With --layout diffusers, WanPipeline.from_pretrained(DIR) loads it, or WanImageToVideoPipeline what
takes an image; with --layout original it lies as in Wan2.1's own repositories, in safetensors
throughout, and CLIP is left out by --parts dit,vae,umt5. Every tensor gets the dtype that it had
before it was converted, or the one that --dtype says. Weights stay on the host.
"""

import sys
from pathlib import Path

import jax
from absl import flags

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout's own wan_jax, as for run_*.py

from wan_jax import cli, loading
from wan_jax.weights import export


def define_flags() -> None:
    """Define the flags of this script."""
    flags.DEFINE_string("src", None, "A checkpoint that to_orbax.py wrote.", required=True)
    flags.DEFINE_string("dst", None, "The folder to write; it must not exist.", required=True)
    flags.DEFINE_enum("layout", None, export.LAYOUTS, "Whose files and names.", required=True)
    flags.DEFINE_list("parts", None, "Some of dit,vae,umt5,clip; default: all in --src.")
    flags.DEFINE_enum("dtype", "source", export.DTYPES, "source: each tensor's own, if it fits.")
    flags.DEFINE_float(
        "max_shard_size",
        export.MAX_SHARD / 1e9,
        "GB of a file at most. The original layout's VAE and text encoder are one file each.",
    )


def main(values: flags.FlagValues) -> None:
    """Write the folder, with a progress bar."""
    size = values.max_shard_size
    if not 0 < size < float("inf"):
        raise ValueError(f"--max_shard_size is {size}; a positive number of GB is needed")
    # What is only read and written must not take a GPU or TPU.
    jax.config.update("jax_platforms", "cpu")
    report = cli.Reporter()
    dst = Path(values.dst).absolute()
    export.write(
        Path(values.src).absolute(),
        dst,
        layout=values.layout,
        parts=values.parts,
        dtype=values.dtype,
        max_shard=max(1, round(size * 1e9)),
        on_bytes=loading.in_bytes("export", report),
    )
    cli.say(report.line())
    cli.say(f"wrote {dst}")


if __name__ == "__main__":
    define_flags()
    cli.run(main, advice="nothing was left at --dst")
