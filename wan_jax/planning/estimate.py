"""Whether a video fits on devices, and how long it may take: nothing is read and nothing runs.

Memory is that of the programs as they compile for the devices, which need not be there; for GPUs
known by name it is by formula (needs.py).
"""

import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax

from wan_jax.planning import memory, programs
from wan_jax.planning.budget import PART_OF
from wan_jax.planning.needs import Case, Need, needs

# What libtpu says of a program that is too large: how much it needs, in GiB.
_TOO_LARGE = re.compile(r"\(([\d.]+)G\) exceeds|Used ([\d.]+)G of")
_GIB = 2**30


class Row(NamedTuple):
    """One stage of one video on one device: its bytes, and all else that it needs.

    weights: of all networks there. activations: all else. compiled: whether the memory is that of
    the compiled program; else it is by formula.
    """

    stage: str
    weights: int
    activations: int
    need: Need
    compiled: bool

    @property
    def peak(self) -> int:
        """Bytes at most."""
        return self.weights + self.activations


class Estimate(NamedTuple):
    """The stages of a video on a target, in the order in which they run."""

    case: Case
    rows: tuple[Row, ...]

    @property
    def fits(self) -> bool:
        """Whether every stage has the memory that it needs."""
        return self.worst.peak <= self.case.target.memory

    @property
    def worst(self) -> Row:
        """The stage that needs most."""
        return max(self.rows, key=lambda row: row.peak)


def estimate(
    case: Case,
    *,
    compiled: Collection[str] = programs.STAGES,
    callback: Callable[[str], None] | None = None,
) -> Estimate:
    """What a video needs. compiled: the stages whose programs are compiled, where they can be.

    What a limit of memory has changed, tiles or chunks of the VAE, is by formula.
    callback: told the name of a stage before it is compiled, which takes seconds, or ten minutes
    and more for the VAE on a TPU. Raises ValueError for a target that there is no compiler for.
    """
    base = needs(case)
    measured: dict[str, int] = {}
    if case.target.compiles:
        wanted = {n for n in compiled if n in base and case.is_usual(n)}
        measured = dict(_compiled(case, wanted, callback))
    return Estimate(
        case,
        tuple(
            Row(name, need.weights, measured.get(name, need.activations), need, name in measured)
            for name, need in base.items()
        ),
    )


def changed(found: Estimate, case: Case) -> Estimate:
    """The estimate of another case: what was compiled changes as the formula for it does."""
    before = {row.stage: row for row in found.rows}
    rows = (_scaled(before[name], need) for name, need in needs(case).items())
    return Estimate(case, tuple(rows))


def _scaled(row: Row, need: Need) -> Row:
    activations = need.activations
    if row.compiled:
        now, before = need.memory, row.need.memory
        ratio = now.working / max(1, before.working)
        activations = int(max(0, row.activations - before.fetched) * ratio) + now.fetched
    return Row(row.stage, need.weights, activations, need, row.compiled)


def _compiled(
    case: Case, wanted: Collection[str], callback: Callable[[str], None] | None
) -> Iterator[tuple[str, int]]:
    """(stage, bytes beside the weights) of each program."""
    devices, setup = case.target.devices(), case.setup
    found = programs.stages(
        case.config,
        case.work,
        plan=case.plan,
        devices=devices,
        dtype=case.dtype,
        vae_dtype=case.vae_dtype,
        quantize=case.quantize,
        streamed=setup.streamed,
    )
    for name, make in found.items():
        if name not in wanted or (case.text_on_cpu and PART_OF[name] == "umt5"):
            continue
        if callback is not None:
            callback(name)
        used = program_bytes(make(), devices[0])
        yield name, used + (memory.held(setup, case.work) if name == "denoise" else 0)


def program_bytes(stage: programs.Stage, device: jax.Device) -> int:
    """Bytes that a stage's program needs on a device beside the weights of its network."""
    try:
        program = stage.compile(device)
    except jax.errors.JaxRuntimeError as error:
        return _needed(stage, error)
    return used_bytes(stage, program)


def used_bytes(stage: programs.Stage, program: jax.stages.Compiled) -> int:
    """The same of a program that is compiled.

    The compiler counts arguments as they lie, with padding, and without those that the program
    never reads, which lie there too. Those in the host's memory it counts apart, if it knows one.
    """
    found: Any = program.memory_analysis()
    leaves, formats = jax.tree.leaves(stage.arguments), jax.tree.leaves(program.input_formats[0])
    unread = [leaf for leaf, lies in zip(leaves, formats, strict=True) if lies.layout is None]
    given = found.argument_size_in_bytes + found.host_argument_size_in_bytes
    beside = given + programs.own_bytes(unread) - programs.own_bytes(stage.arguments[0])
    made = found.output_size_in_bytes - found.alias_size_in_bytes
    temporary = found.temp_size_in_bytes + found.generated_code_size_in_bytes
    return int(beside + made + temporary)


def _needed(stage: programs.Stage, error: Exception) -> int:
    """What a program that is too large for its device would need; other errors are raised."""
    found = _TOO_LARGE.search(str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
        raise error
    whole = float(found[1] or found[2]) * _GIB
    return max(0, int(whole) - stage.weight_bytes)
