"""--plan: what the videos of a command line need of the devices, as tables, and whether they fit.

No weight is read, nothing is downloaded or written and no program runs; they are compiled.
"""

import functools
import signal
from collections import Counter
from pathlib import Path
from typing import NoReturn

import jax
from absl import flags

from wan_jax import devices, hosts, jobs
from wan_jax.cli import handled, heard, say
from wan_jax.planning import changes, targets
from wan_jax.planning.estimate import Estimate, Row, estimate
from wan_jax.planning.memory import Work, work_of
from wan_jax.planning.needs import Case
from wan_jax.planning.targets import Target

_GIB = 2**30
_HEADER = (
    "on each device",
    "weights GiB",
    "activations GiB",
    "peak GiB",
    "of memory",
    "TFLOP",
    "sent GB",
    "seconds",
)


def asked(values: flags.FlagValues) -> bool:
    """Whether the flags are for a plan; ValueError for a target without one."""
    if values.plan_target is not None and not values.plan:
        raise ValueError(f"--plan_target {values.plan_target} is given without --plan; add --plan")
    return bool(values.plan)


def show(values: flags.FlagValues, configs: Path) -> NoReturn:
    """Print a table for each kind of video that the flags ask for, and leave.

    configs: the folder of the tasks' settings. The status is 1 if one of them does not fit, else 0.
    Raises ValueError naming the flag that is wrong.
    """
    target = _target(values)
    config, wanted = jobs.planned(values, configs)
    guided = any(job.request.guidance != 1.0 for job in wanted)
    # For the devices at hand what the run itself would go by.
    memory = devices.memory() if target.at_hand else target.memory
    plan = devices.choose(values, config, count=target.number, guided=guided, memory=memory)
    works = Counter(work_of(job.request) for job in wanted)
    fits = True
    for work, count in works.items():
        case = Case(
            config,
            work,
            plan,
            target,
            dtype=values.dtype,
            offload=values.offload_model,
            text_on_cpu=values.t5_cpu,
            vae_dtype=values.vae_dtype,
            max_memory=values.max_memory,
            quantize=values.quantize,
        )
        try:
            _ = case.setup
        except ValueError as error:
            raise ValueError(f"--{error}") from error
        # At once: Python's handlers would wait for the compiler.
        with handled(heard(), signal.SIG_DFL):
            found = estimate(case, callback=functools.partial(_compiling, target))
        fits = fits and found.fits
        if hosts.is_first():
            print(f"{title(work, count, case)}\n{table(found)}\n{verdict(found)}\n", flush=True)
    raise SystemExit(0 if fits else 1)


def _compiling(target: Target, stage: str) -> None:
    slow = target.topology is not None and stage in ("image", "decode")
    say(f"compiling {stage}" + ", which takes ten minutes and more" * slow)


def _target(values: flags.FlagValues) -> Target:
    """What the plan is for; its devices are there to compile for, if any are needed."""
    if values.plan_target is None:
        devices.join(values)
        devices.check()
        return targets.at_hand()
    try:
        target = targets.parse(values.plan_target)
        # Nothing here needs an accelerator of this machine, which others may be using.
        jax.config.update("jax_platforms", "cpu")
        if target.compiles:
            target.devices()
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    return target


def title(work: Work, count: int, case: Case) -> str:
    """What is made, and of what."""
    t, h, w, _ = work.latent_shape
    vae = case.config.vae
    frames = 1 + (t - 1) * vae.temporal_stride
    size = f"{w * vae.spatial_stride}x{h * vae.spatial_stride}"
    what = f"{frames} frames of {size}" if frames > 1 else f"an image of {size}"
    times = f"{count} times " if count > 1 else ""
    kinds = case.dtype if case.quantize is None else f"{case.dtype} and {case.quantize}"
    return f"{times}{what} in {work.steps} steps, {kinds}\n{case.target.name}: {case.plan}"


def table(found: Estimate) -> str:
    """A line a stage, their sums, and how all that was reckoned."""
    memory = found.case.target.memory
    lines = [_HEADER, *(_cells(row, memory) for row in found.rows), _sums(found)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([*text, *_notes(found)])


def _cells(row: Row, memory: int) -> tuple[str, ...]:
    sizes = (_gib(n) for n in (row.weights, row.activations, row.peak))
    flops, sent, seconds = row.need.flops.total, row.need.sent, row.need.seconds
    return (row.stage, *sizes, f"{row.peak / memory:.1%}", *_spent(flops, sent, seconds))


def _sums(found: Estimate) -> tuple[str, ...]:
    """The last line: the most memory of any stage, and all that is computed and sent."""
    needs, peak = [row.need for row in found.rows], found.worst.peak
    known = [need.seconds for need in needs if need.seconds is not None]
    flops, sent = sum(need.flops.total for need in needs), sum(need.sent for need in needs)
    share = f"{peak / found.case.target.memory:.1%}"
    spent = _spent(flops, sent, sum(known) if known else None)
    return ("whole video", "", "", _gib(peak), share, *spent)


def _spent(flops: float, sent: int, seconds: float | None) -> tuple[str, str, str]:
    time = "-" if seconds is None else _number(seconds)
    return _number(flops / 1e12), _number(sent / 1e9), time


def _notes(found: Estimate) -> list[str]:
    """How memory, operations and seconds were reckoned."""
    chip = found.case.target.chip
    formula = [row.stage for row in found.rows if not row.compiled]
    notes = ["activations as the compiled programs need them"]
    if formula:
        all_of_them = len(formula) == len(found.rows)
        own = "activations" if all_of_them else f"{notes[0]}, of {', '.join(formula)}"
        notes = [f"{own} by formula"]
    notes[0] += "; TFLOP and GB sent by formula"
    notes += _streamed(found)
    if chip is None:
        return [*notes, "seconds are not known of these devices"]
    origin = "estimated" if chip.platform == "tpu" else "measured on an H200"
    denoise = next(row.need.seconds for row in found.rows if row.stage == "denoise")
    assert denoise is not None
    if chip.platform == "gpu":
        notes.append("memory: what JAX takes of a card, see XLA_PYTHON_CLIENT_MEM_FRACTION")
    if found.case.quantize is not None:
        notes.append("seconds are those without --quantize, which takes fewer")
    return [
        *notes,
        f"seconds: the longer of products at {chip.attention:.0%} (attention), {chip.linear:.0%} "
        f"(matrices) and {chip.conv:.0%} (VAE) of {chip.flops / 1e12:.0f} TFLOP/s, shares that are "
        f"{origin}, and memory at {chip.bandwidth / 1e12:.2f} TB/s; then what is sent at "
        f"{chip.link / 1e9:.0f} GB/s, none of it hidden",
        f"a step takes about {_number(denoise / found.case.work.steps)} s",
    ]


def _streamed(found: Estimate) -> list[str]:
    """What of the networks lies in the host's memory, and what that sends to a device."""
    setup, chip = found.case.setup, found.case.target.chip
    if not setup.streamed:
        return []
    sizes = (f"{part} {_gib(setup.brought(part))} GiB" for part in setup.streamed)
    brought = sum(row.need.brought for row in found.rows)
    rate = "" if chip is None else f" at {chip.host / 1e9:.0f} GB/s, under all that is computed"
    return [
        f"in the host's memory: {', '.join(sizes)}, of which two layers are on a device at a time; "
        f"{_number(brought / 1e9)} GB come from there{rate}"
    ]


def verdict(found: Estimate) -> str:
    """Whether it fits and, if not, the smallest change by which it would."""
    worst = found.worst
    needed = f"{_gib(worst.peak)} of {_gib(found.case.target.memory)} GiB"
    if found.fits:
        return f"it fits: {needed}"
    change = changes.smallest(found)
    remedy = f"it would with {change}" if change else "no change that is known helps"
    return f"it does not fit: {worst.stage} needs {needed}; {remedy}"


def _gib(size: float) -> str:
    return _number(size / _GIB)


def _number(value: float) -> str:
    """Two decimals, or two digits of what is less."""
    return f"{value:,.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"
