"""PyTorch files of Wan2.1, in whatever layout, to one checkpoint of wan_jax (Orbax).

    python convert/to_orbax.py --src Wan2.1-T2V-1.3B --dst checkpoints/t2v-1.3b

--src is a folder (original, Diffusers or ComfyUI's layout), a repacked .safetensors file, a hub id
or a gs:// folder; --dst a folder or a gs:// path that does not exist yet, or a local checkpoint
that lacks the --parts. Names, shapes and dtypes are checked before the first tensor is read;
--dry_run ends there. --dst appears when it is whole.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout's own wan_jax, as for run_*.py

from wan_jax import cli, loading
from wan_jax.config import PARTS
from wan_jax.weights import checkpoint, folders, remote
from wan_jax.weights.sources import Folder, open_folder

flags.DEFINE_string("src", None, "Folder, .safetensors file, hub id or gs:// path to read.")
flags.DEFINE_string("dst", None, "Folder or gs:// path to write; needed without --dry_run.")
flags.DEFINE_list(
    "parts",
    None,
    "Networks to convert, some of dit,vae,umt5,clip; default: the DiT and all that it needs, so "
    "clip where it takes an image.",
)
flags.DEFINE_enum(
    "dtype",
    None,
    loading.DTYPES,
    "bfloat16 (the default; what must be float32 stays so) or float32. Parts that are added to a "
    "checkpoint take its dtype.",
)
flags.DEFINE_bool(
    "dry_run", False, "Check everything and say what would be converted; only downloads are kept."
)
flags.DEFINE_string("cache_dir", None, "For what comes from or goes to gs://.")


def main(values: flags.FlagValues) -> None:
    """Check, report, convert."""
    for name in ("src",) if values.dry_run else ("src", "dst"):
        if not values[name].value:
            raise ValueError(f"--{name} is missing; a path is needed")
    given = values.parts
    wrong = sorted(set(given or ()) - set(PARTS))
    if wrong or given == []:
        raise ValueError(f"--parts has {wrong}; some of {', '.join(PARTS)} are needed")
    # What is only read and written must not take a GPU or TPU.
    jax.config.update("jax_platforms", "cpu")
    parts = None if given is None else [part for part in PARTS if part in given]
    if values.dry_run or remote.is_bucket(values.dst):
        target = None if values.dry_run else remote.bucket_path(values.dst)
        _convert(values, target, parts)
        return
    target = Path(values.dst).absolute()
    try:
        folders.check_writable(target.parent)
    except ValueError as error:
        raise ValueError(f"--dst {target}: {error}") from error
    message = f"waiting for another process that writes {target}"
    with folders.alone(target, on_wait=lambda: cli.say(message)):
        _convert(values, target, parts)


def _convert(values: flags.FlagValues, target: Any, parts: list[str] | None) -> None:
    """Check the source and write it to target; None only checks."""
    before = _existing(target, parts, values.dtype)
    dtype = before or values.dtype or "bfloat16"
    report = cli.Reporter()
    try:
        source = loading.fetch(
            values.src, parts=parts, cache_dir=values.cache_dir, callback=report, notify=cli.say
        )
        if loading.built_in(values.src) is not None:
            raise ValueError("it is made of random numbers when it is loaded, and has no files")
        if loading.is_checkpoint(source):
            raise ValueError("it is converted already")
        folder = open_folder(source, parts)
        _describe(folder, dtype)
    except ValueError as error:
        raise ValueError(f"--src {values.src}: {error}") from error
    if target is None:
        return
    remedy = "choose another --dst"
    if before is not None:
        checkpoint.add(folder, target, on_bytes=loading.in_bytes("convert", report), remedy=remedy)
    else:
        scratch = loading.local_cache(values.cache_dir)
        loading.convert(
            folder, target, dtype=dtype, callback=report, scratch=scratch, remedy=remedy
        )
    cli.say(report.line())
    cli.say(f"wrote {target}")


def _existing(target: Any, parts: list[str] | None, dtype: str | None) -> str | None:
    """The dtype of the checkpoint that the parts are to be added to, if there is one."""
    if target is None or not loading.is_checkpoint(target):
        if isinstance(target, Path):
            try:
                checkpoint.check_free(target)
            except ValueError as error:
                raise ValueError(f"--dst {error}") from error
        return None
    if not isinstance(target, Path):
        raise ValueError(f"--dst {target} is there already; parts are added to local folders only")
    manifest = checkpoint.read_manifest(target)
    both = [part for part in manifest["parts"] if parts is None or part in parts]
    if both:
        raise ValueError(f"--dst {target} has {', '.join(both)} already; give another name")
    if dtype not in (None, manifest["dtype"]):
        raise ValueError(f"--dtype is {dtype}; --dst {target} is of {manifest['dtype']}")
    return str(manifest["dtype"])


def _describe(folder: Folder, dtype: str) -> None:
    """Check every name, shape and stored dtype, and say what there is."""
    plans = checkpoint.plan(folder, dtype)
    for part, items in plans.items():
        source = folder.sources[part]
        tensors = sum(len(item.sources) for item in items)
        kinds = sorted({kind for _, kind in source.reader.shapes().values()})
        written = sorted({str(np.dtype(item.abstract.dtype)) for item in items})
        cli.say(
            f"{part}: {tensors} tensors ({source.naming} names, {', '.join(kinds)}) -> "
            f"{len(items)} arrays ({', '.join(written)}), "
            f"{checkpoint.nbytes({part: items}) / 1e9:.2f} GB"
        )


if __name__ == "__main__":
    cli.run(main, advice="nothing new is at --dst; the same command starts anew")
