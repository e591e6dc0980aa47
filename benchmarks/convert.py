"""Conversion of a full-size original checkpoint to Orbax: seconds, peak memory, and kills.

    python benchmarks/convert.py --src DIR --dst DIR [--scale full] [--kill 20]

Random weights in the original layout are written to --src if that folder is not there (T2V-1.3B:
18 GB, and 11 GB more meanwhile); then convert/to_orbax.py runs as a user would run it. With --kill
it is also started that many times and killed at random moments; after each there must be no
checkpoint, or a whole one, and a last run must succeed and clear what the killed ones left behind.
Prints one table and writes results/convert.json; --scale tiny tries it in a minute and writes
nothing. Needs Linux, and torch to make the .pth files.
"""

import argparse
import collections
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from children import child, end_with_signals
from measure import report
from random_checkpoint import drop_cached
from records import ROOT, Results, table, versions

from tests import manifests

PARTS = {"dit": "t2v_1_3b.wan", "vae": "vae.wan", "umt5": "umt5.wan"}  # the manifests
STORED = {"dit": "float32", "vae": "float32", "umt5": "bfloat16"}  # at tiny scale
PARTIAL = ".{name}.partial-*"  # folders beside --dst that are not whole
_CHUNK = 2**24  # numbers drawn at a time
_POLL = 0.02  # seconds between looks at the converter's memory


def tensors(scale: str) -> dict[str, manifests.Tensors]:
    """{part: {name: (shape, dtype)}} in the original naming, from the manifests at full scale."""
    if scale == "full":
        return {part: manifests.load(name) for part, name in PARTS.items()}
    import jax.numpy as jnp

    from wan_jax.config import NANO_T2V
    from wan_jax.weights import rules, trees
    from wan_jax.weights.sources import abstract_part, part_table

    found: dict[str, manifests.Tensors] = {}
    for part, dtype in STORED.items():
        config = getattr(NANO_T2V, part)
        leaves = trees.flatten(abstract_part(config, jnp.dtype("float32")))
        empty = {path: np.empty(leaf.shape, np.int8) for path, leaf in leaves.items()}
        names = rules.export(part_table(config), empty, naming="wan")
        found[part] = {name: (array.shape, dtype) for name, array in names}
    return found


def dit_config(scale: str) -> dict[str, Any]:
    """config.json of the original layout."""
    if scale == "full":
        return manifests.head(PARTS["dit"])["config"]
    from wan_jax.config import NANO_T2V

    dit = NANO_T2V.dit
    same = ("text_len", "dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "eps")
    values = {name: getattr(dit, name) for name in same}
    return {"model_type": "t2v", "in_dim": dit.in_channels, "out_dim": dit.out_channels, **values}


def normals(count: int, stream: np.random.Generator) -> Iterator[tuple[int, np.ndarray]]:
    """(start, float32 values) until count numbers are drawn, like trained weights in size.

    Constant or repeated values would be compressed and make the writing look fast.
    """
    for start in range(0, count, _CHUNK):
        values = stream.standard_normal(min(_CHUNK, count - start), np.float32)
        yield start, np.multiply(values, np.float32(0.02), out=values)


def write_safetensors(
    path: Path, wanted: manifests.Tensors, *, stream: np.random.Generator
) -> None:
    """One float32 file, written a chunk at a time."""
    header, end = {}, 0
    for name, (shape, dtype) in wanted.items():
        if dtype != "float32":
            raise ValueError(f"{name} is {dtype}; only float32 is written")
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape, _ in wanted.values():
            for _, values in normals(math.prod(shape), stream):
                file.write(values.data)


def write_pth(path: Path, wanted: manifests.Tensors, *, stream: np.random.Generator) -> None:
    """What torch.save makes of a state dict; its tensors are memory-mapped files meanwhile."""
    import torch

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    state: dict[str, Any] = collections.OrderedDict()
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        for name, (shape, dtype) in wanted.items():
            file, count = os.path.join(scratch, str(len(state))), math.prod(shape)
            flat = torch.from_file(file, shared=True, size=count, dtype=kinds[str(dtype)])
            for start, values in normals(count, stream):
                flat[start : start + len(values)] = torch.from_numpy(values)
            state[name] = flat.view(shape)
        torch.save(state, path)


def make_source(path: Path, scale: str) -> None:
    """A folder in the original layout; it appears under its name when whole."""
    from wan_jax.config import NANO_T2V, T2V_1_3B
    from wan_jax.tokenizer import write_byte_tokenizer
    from wan_jax.weights.folders import written_whole
    from wan_jax.weights.layouts import UMT5_PTH, VAE_PTH

    wanted, stream = tensors(scale), np.random.default_rng(0)
    config = T2V_1_3B if scale == "full" else NANO_T2V
    with written_whole(path, is_whole=Path.is_dir) as work:
        (work / "config.json").write_text(json.dumps(dit_config(scale), indent=2))
        weights = work / "diffusion_pytorch_model.safetensors"
        write_safetensors(weights, wanted["dit"], stream=stream)
        write_pth(work / VAE_PTH, wanted["vae"], stream=stream)
        write_pth(work / UMT5_PTH, wanted["umt5"], stream=stream)
        write_byte_tokenizer(work / "google" / "umt5-xxl", vocab_size=config.umt5.vocab_size)


def inspect(dst: Path) -> dict[str, Any]:
    """What wan_jax makes of dst: whether it is a checkpoint, and its parameters or the refusal."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    import wan_jax
    from wan_jax.weights.checkpoint import is_checkpoint

    found: dict[str, Any] = {"is_checkpoint": is_checkpoint(dst)}
    try:
        wan = wan_jax.load(dst, offload=True)
        count = 0
        for load in wan.loaders.values():  # one network in memory at a time
            count += sum(leaf.size for leaf in jax.tree.leaves(load()))
    except ValueError as error:
        return found | {"refused": str(error).replace(str(dst), "DST")}
    return found | {"parameters": count}


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file backs; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return 1024 * int(found[0]) if found else 0


def convert(src: Path, dst: Path, *, kill_after: float | None = None) -> dict[str, Any]:
    """Run the converter; seconds, exit status, and its peaks of memory.

    rss_gib counts pages of mapped files, which the kernel can drop; anon_gib does not, and is
    sampled. This process stays small: a child's peak is never below its parent's size.
    """
    drop_cached(src)
    script = str(ROOT / "convert" / "to_orbax.py")
    command = [sys.executable, script, "--src", str(src), "--dst", str(dst)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    anonymous = 0
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": path}
        )
        try:
            while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                anonymous = max(anonymous, anonymous_bytes(process.pid))
                if kill_after is not None and time.perf_counter() - start >= kill_after:
                    process.kill()
                time.sleep(_POLL)
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - start
        output.seek(0)
        lines = output.read().strip().splitlines()
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)  # wait4 took it from Popen
    row: dict[str, Any] = {
        "seconds": seconds,
        "status": process.returncode,
        "rss_gib": usage.ru_maxrss / 2**20,
        "anon_gib": anonymous / 2**30,
    }
    if process.returncode > 0:
        row["error"] = (lines or [""])[-1]
    return row


def judge(dst: Path, row: dict[str, Any], *, parameters: int) -> dict[str, Any]:
    """The row with what was left at and beside dst, and whether that is right.

    Right after an exit is a whole checkpoint with nothing beside it; right after a kill is no
    checkpoint and a refusal to load it, or, where the kill came just too late, a whole one.
    """
    seen = child(__file__, ["--child", "inspect", "--dst", str(dst)])
    whole = bool(seen.get("is_checkpoint")) and seen.get("parameters") == parameters
    partial = list(dst.parent.glob(PARTIAL.format(name=dst.name)))
    if row["status"] == 0:
        right = whole and not partial
    else:
        nothing = seen.get("is_checkpoint") is False and "refused" in seen
        right = row["status"] < 0 and (whole or nothing)
    left = sum(map(size_of, partial)) / 1e9
    return row | seen | {"partial": len(partial), "partial_gb": left, "right": right}


def kills(src: Path, dst: Path, count: int, *, seconds: float, parameters: int) -> Iterator[dict]:
    """Rows of conversions killed at moments spread over the time that a whole one takes.

    A conversion that ends before its moment comes, as when the machine was busier while it was
    measured, gives a row too, and is run again.
    """
    stream = random.Random(0)
    for i in range(count):
        moment, status = (i + stream.random()) / count, 0
        while status == 0:
            row = {"run": f"kill {i + 1}", **convert(src, dst, kill_after=moment * seconds)}
            status = row["status"]
            if status == 0:
                seconds = row["seconds"]
            yield judge(dst, row, parameters=parameters)
            shutil.rmtree(dst, ignore_errors=True)


def facts(src: Path, dst: Path) -> Mapping[str, Any]:
    """The machine, and the bytes read and written."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "device": f"{name}, {os.cpu_count()} cores, {memory / 2**30:.0f} GiB",
        "read_gb": size_of(src) / 1e9,
        "written_gb": size_of(dst) / 1e9,
    }


def run(src: Path, dst: Path, scale: str, *, count: int) -> tuple[list[dict], Mapping[str, Any]]:
    """Every row, printed as it comes, and the facts."""
    parameters = sum(math.prod(s) for part in tensors(scale).values() for s, _ in part.values())
    rows = [judge(dst, {"run": "convert", **convert(src, dst)}, parameters=parameters)]
    print(rows[0], flush=True)
    if not rows[0]["right"]:
        raise SystemExit("the conversion failed")
    known = facts(src, dst)
    if count:
        shutil.rmtree(dst)
        for row in kills(src, dst, count, seconds=rows[0]["seconds"], parameters=parameters):
            rows.append(row)
            print(row, flush=True)
        rows.append(judge(dst, {"run": "last", **convert(src, dst)}, parameters=parameters))
        print(rows[-1], flush=True)
    return rows, known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--src", type=Path, help="original layout; made if it is not there")
    parser.add_argument("--dst", type=Path, required=True, help="removed at the end")
    parser.add_argument("--scale", default="full", choices=("full", "tiny"))
    parser.add_argument("--kill", type=int, default=0, help="conversions to kill")
    parser.add_argument("--child", choices=("make", "inspect"))
    arguments = parser.parse_args()
    end_with_signals()
    dst = arguments.dst.absolute()
    if arguments.child == "inspect":
        report(inspect(dst))
        return
    if arguments.src is None:
        parser.error("--src is missing")
    src = arguments.src.absolute()
    if arguments.child == "make":
        make_source(src, arguments.scale)
        report({"bytes": size_of(src)})
        return
    if dst.exists():
        raise SystemExit(f"--dst: {dst} exists")
    if not src.is_dir():
        passed = ["--src", str(src), "--dst", str(dst), "--scale", arguments.scale]
        print(child(__file__, ["--child", "make", *passed]), flush=True)
    rows, known = run(src, dst, arguments.scale, count=arguments.kill)
    shutil.rmtree(dst, ignore_errors=True)
    print(f"{known}, {versions()}")
    if arguments.scale == "full":
        results = Results("convert", known, [{}])
        results.write(rows)
        print(f"written to {results.path}")
    columns = ("run", "seconds", "status", "rss_gib", "anon_gib", "is_checkpoint", "partial")
    print(table(rows, (*columns, "partial_gb", "right", "error")))
    if not all(row["right"] for row in rows):
        raise SystemExit("a run left what it should not")


if __name__ == "__main__":
    main()
