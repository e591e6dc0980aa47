"""A converted DiT from disk to several devices, its weights whole or split among them.

    python benchmarks/restore.py --model 14B [--counts 1,2] [--folder DIR]

Writes a checkpoint's DiT of random bits into --folder (T2V-14B: 28 GB) if it is not there, in
bfloat16 as conversion stores it, and restores it as a run does. Each line is measured in a process
of its own: seconds, bytes that the process read from files, and of each device the bytes that lie
there and the most that ever did. The files are dropped from the page cache first, as far as the
system lets us. Prints one table and writes results/restore.json.
"""

import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import attempt
from random_checkpoint import config_of, drop_cached, write
from runs import Case, listed, parser, run

MODELS = ("14B", "1.3B", "tiny")


def measure(model: str, folder: Path, *, count: int, split: bool) -> dict[str, Any]:
    """Restore onto so many devices."""
    import jax

    from wan_jax import sharding
    from wan_jax.weights import checkpoint

    devices = jax.devices()[:count]
    if len(devices) < count:
        raise ValueError(f"{count} devices are asked for, and there are {len(devices)}")
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


def written(model: str, folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    write(model, folder)
    return {"write_seconds": time.perf_counter() - start}


def cases_of(model: str, folder: Path, counts: str) -> list[Case]:
    """Writing, on the host alone, if there is nothing to restore; each number of devices."""
    same, cases = ["--model", model, "--folder", str(folder)], []
    if not (folder / "dit").exists():
        labels = {"model": model, "how": "write"}
        cases.append(Case(labels, [*same, "--child", "write"], {"JAX_PLATFORMS": "cpu"}))
    for count in map(int, listed(counts)):
        for split in (False, True) if count > 1 else (False,):
            labels = {"model": model, "devices": count, "split": split}
            cases.append(Case(labels, [*same, "--child", str(count), "--case", str(int(split))]))
    return cases


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--model", default="14B", choices=MODELS)
    flags.add_argument("--counts", default="1,2")
    flags.add_argument("--folder", type=Path, help="of the checkpoint; default: removed at the end")
    arguments = flags.parse_args()
    model = "tiny" if arguments.tiny else arguments.model
    if arguments.child == "write":
        attempt({}, lambda: written(model, arguments.folder))
        return
    if arguments.child:
        count, split = int(arguments.child), bool(int(arguments.case))
        attempt({}, lambda: measure(model, arguments.folder, count=count, split=split))
        return
    scratch = Path(tempfile.mkdtemp())
    columns = ("devices", "split", "seconds", "read_gb", "weights_gb", "device_gb")
    columns += ("device_peak_gb", "host_peak_gb")
    try:
        folder = (arguments.folder or scratch / "checkpoint").absolute()
        cases = cases_of(model, folder, arguments.counts)
        options: dict[str, Any] = {"arguments": arguments, "columns": columns, "spread": True}
        run("restore", __file__, cases, facts={"model": model}, **options)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
