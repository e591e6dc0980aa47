"""The table of docs/speed.md, from all of benchmarks/results.

    python benchmarks/table.py [--check]

Writes what stands between the two marker lines; --check only tells, by the exit status, whether it
is up to date. A line is one of our rows beside the best peer of its case, or a peer alone.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from records import CEILINGS, NARROW, OURS, RESULTS, WIDE, lacks_memory

DOCUMENT = Path(__file__).parents[1] / "docs" / "speed.md"
BEGIN = "<!-- from here on by benchmarks/table.py -->"
END = "<!-- up to here -->"
HEAD = ("benchmark", "case", "wan_jax", "peer", "ratio", "of the ceiling", "peak", "run")
# What a row's case is called, by the benchmark; and which number is compared.
CASES = {
    "convert": "T2V-1.3B to Orbax, {run}",
    "dit": "{model}, one forward",
    "end_to_end": "denoising, {model}, {steps} steps",
    "memory": "{model}, {case}, {how}",
    "restore": "{model}, devices: {devices}, split: {split}",
    "spread": "{what}, plan {plan}",
    "startup": "{case}, {how}",
    "training": "{train}, kept: {remat}",
}
COMPARED = {"end_to_end": "denoise"}
NAMES = (*CASES, "attention", "fp8", "lora", "miniature", "precision", "residual")
NAMES += ("tiles", "umt5", "vae")


def benchmark_of(name: str) -> str:
    """ "end_to_end" of "end_to_end_1.3B", "vae" of "vae_encode"."""
    return next((known for known in NAMES if name.startswith(known)), name)


def lines_of(name: str, found: dict[str, Any], run: int) -> Iterator[tuple[str, ...]]:
    """The lines of a file of results; run: the number of the file."""
    benchmark = benchmark_of(name)
    found = {"model": name.removeprefix(f"{benchmark}_"), **found}
    pattern, number = CASES.get(benchmark, "{case}"), COMPARED.get(benchmark, "seconds")
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        # A converter that was killed has a status; the last one cleared up after those.
        if row.get("status") or row.get("run") == "last":
            continue
        if row.get(number) is not None or lacks_memory(row):
            case = pattern.format_map({**found, **row})
            cases.setdefault(case, []).append(row)
    for case, rows in cases.items():
        peers = [row for row in rows if row.get("system", OURS) != OURS]
        best = min(
            (row for row in peers if row.get(number)), key=lambda row: row[number], default=None
        )
        for own in [row for row in rows if row not in peers] or [None]:
            way = own.get("how") if own is not None and "{how}" not in pattern else None
            text = case if way in (None, "@") else f"{case}, {way}"
            text += ", no file" if own is not None and own.get("made") == "frames" else ""
            part = None if own is None else share_of(benchmark, own, found)
            share = "-" if part is None else f"{100 * part:.0f} %"
            yield (benchmark, text, *_numbers(own, best, number), share, _peak(own), f"[{run}]")
            if own is not None and "step_seconds" in own:
                yield (benchmark, f"{text}: a step", *_step(own), "-", "-", f"[{run}]")
            if own is not None and "to_mp4" in own:
                spent = _seconds(own, "to_mp4"), "-", "-"
                yield (benchmark, f"{text}: all, to the mp4", *spent, "-", "-", f"[{run}]")


def _step(row: dict[str, Any]) -> tuple[str, str, str]:
    """A step of denoising with a limit of memory, by the same without one."""
    ratio = f"{row['step_ratio']:.2f} to no limit" if "step_ratio" in row else "-"
    return _seconds(row, "step_seconds"), "-", ratio


def share_of(benchmark: str, row: dict[str, Any], found: dict[str, Any]) -> float | None:
    """The part of the ceiling that a row reaches; of an old one of dit.py the product's."""
    if benchmark == "dit" and "tflop_per_s" in row and "kind" not in row:
        ceiling = CEILINGS.get(found.get("device", ""))
        return None if ceiling is None else row["tflop_per_s"] / ceiling[WIDE]
    return row.get("share", row.get("mfu_matmul"))


def _numbers(
    own: dict[str, Any] | None, peer: dict[str, Any] | None, number: str
) -> tuple[str, ...]:
    """Ours, the peer's, the ratio."""
    ratio, name = "-", ""
    if own is not None and peer is not None and own.get(number) is not None:
        ratio = f"{own[number] / peer[number]:.2f}"
        ratio += " to bfloat16" if own.get("kind") == NARROW else ""
    elif own is not None and "to_whole" in own:
        ratio = f"{own['to_whole']:.2f} to the whole"
    elif own is not None and "efficiency" in own:
        ratio = f"{own['efficiency']:.3f} efficient"
    if peer is not None:
        way = next((peer[key] for key in ("how", "backend") if key in peer), "@")
        name = f" ({peer['system']}{'' if way == '@' else ', ' + way})"
    return _seconds(own, number), _seconds(peer, number) + name, ratio


def _peak(row: dict[str, Any] | None) -> str:
    most = None if row is None else row.get("card_gib", row.get("peak_gib"))
    return f"{most:.1f} GiB" if most else "-"


def _seconds(row: dict[str, Any] | None, number: str) -> str:
    if row is None:
        return "-"
    if row.get(number) is None:
        return "no memory"
    value = row[number]
    return f"{value:.4g} s" if value >= 0.1 else f"{1e3 * value:.3g} ms"


def made_with(found: dict[str, Any], run: int) -> str:
    """The device, the commit, the versions and the command of a file."""
    device = found.get("device", "unknown")
    commit = f", commit {found['commit']}" if "commit" in found else ""
    names = " ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"- [{run}] {device}{commit}: {names}; `{found['command'].strip()}`"


def render(folder: Path) -> str:
    """The table and what its lines were made with, as Markdown."""
    lines: list[Sequence[str]] = []
    notes = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        own = list(lines_of(path.stem, found, len(notes) + 1))
        if own:
            lines += own
            notes.append(made_with(found, len(notes) + 1))
    rule = ["---"] * len(HEAD)
    rows = "\n".join(f"| {' | '.join(line)} |" for line in (HEAD, rule, *lines))
    return f"{rows}\n\n" + "\n".join(notes)


def filled(text: str, made: str) -> str:
    """The document with this between its markers; ValueError if it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    arguments = parser.parse_args()
    text = arguments.document.read_text()
    new = filled(text, render(arguments.results))
    if not arguments.check:
        arguments.document.write_text(new)
    elif new != text:
        raise SystemExit(f"{arguments.document} is not of the results; run benchmarks/table.py")


if __name__ == "__main__":
    main()
