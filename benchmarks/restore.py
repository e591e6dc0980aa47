"""A converted DiT from disk to several devices, its weights whole or split among them.

    python benchmarks/restore.py --model 14B [--counts 1,2] [--folder DIR]

Writes a checkpoint's DiT of random bits into --folder (T2V-14B: 28 GB) if it is not there, in
bfloat16 as conversion stores it, and restores it as a run does. Each line is measured in a process
of its own: seconds, bytes that the process read from files, and of each device the bytes that lie
there and the most that ever did. The files are dropped from the page cache first, as far as the
system lets us. Prints one table and writes results/restore.json.
"""

import argparse
import os
import resource
import time
from pathlib import Path
from typing import Any

from measure import child, report, save, table, versions
from random_checkpoint import config_of, drop_cached, write


def measure(model: str, folder: Path, *, count: int, split: bool) -> dict[str, Any]:
    """Restore onto so many devices."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from wan_jax import sharding
    from wan_jax.weights import checkpoint

    devices = jax.devices()[:count]
    layout = sharding.make_layout(count, devices=devices).of_weights(split=split)
    drop_cached(folder / "dit")
    before, start = _bytes_read(), time.perf_counter()
    network = checkpoint.restore(
        folder, "dit", config_of(model), dtype="bfloat16", sharding=layout.weight
    )
    jax.block_until_ready(jax.tree.leaves(network))
    seconds, read = time.perf_counter() - start, _bytes_read() - before
    leaves = jax.tree.leaves(network)
    own = [
        sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards if s.device == device)
        for device in devices
    ]
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in devices]
    return {
        "seconds": seconds,
        "read_gb": read / 1e9,
        "weights_gb": sum(leaf.nbytes for leaf in leaves) / 1e9,
        "device_gb": max(own) / 1e9,
        "device_peak_gb": max(peaks) / 1e9,
        "host_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def _bytes_read() -> int:
    """What read calls of this process have given so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="14B", choices=("14B", "1.3B", "tiny"))
    parser.add_argument("--counts", default="1,2")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model, folder = arguments.model, arguments.folder
    if arguments.child:
        count, split = map(int, arguments.child)
        report(measure(model, folder, count=count, split=bool(split)))
        return
    if not (folder / "dit").exists():
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        write(model, folder)
        print(f"written in {time.perf_counter() - start:.0f} s", flush=True)
    rows = []
    for count in map(int, arguments.counts.split(",")):
        for split in (0, 1) if count > 1 else (0,):
            own = ["--model", model, "--folder", str(folder), "--child", str(count), str(split)]
            rows.append({"devices": count, "split": bool(split), **child(__file__, own)})
            print(rows[-1], flush=True)
    import jax

    device = jax.devices()[0].device_kind
    path = save("restore", rows, {"model": model, "device": device})
    print(f"{device}, {versions()}\nwritten to {path}")
    columns = ("devices", "split", "seconds", "read_gb", "weights_gb", "device_gb")
    print(table(rows, (*columns, "device_peak_gb", "host_peak_gb", "error")))


if __name__ == "__main__":
    main()
