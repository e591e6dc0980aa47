"""What would make a video fit that does not: the smallest change of the command line, by formula.

Flags that cost only time come first, one and then several; then more devices; then a smaller video.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from wan_jax import plans
from wan_jax.planning import targets
from wan_jax.planning.estimate import Estimate, changed
from wan_jax.planning.needs import Case

_SIZES = ((1280, 720), (720, 1280), (832, 480), (480, 832))  # of the released models
_SWITCHES = {
    "t5_fsdp": "--t5_fsdp",
    "dit_fsdp": "--dit_fsdp",
    "offload": "--offload_model True",
    "text_on_cpu": "--t5_cpu",
}


class _Change(NamedTuple):
    """Another case, and what of the command line makes it so."""

    text: str
    case: Case


def smallest(found: Estimate) -> str | None:
    """The first change by which a video fits; None if none of those that are known does."""
    tried = (change for change in _all(found.case) if _fits(found, change.case))
    return next((change.text for change in tried), None)


def _fits(found: Estimate, case: Case) -> bool:
    try:
        return changed(found, case).fits
    except ValueError:  # a limit of memory that it cannot keep
        return False


def _all(case: Case) -> Iterator[_Change]:
    names = _unset(case)
    for chosen in _choices(names):
        yield _with(case, chosen)
    yield from _more_devices(case)
    for smaller in (*_fewer_frames(case), *_smaller_sizes(case)):
        yield smaller
        if names:
            both = _with(smaller.case, names)
            yield _Change(f"{both.text} {smaller.text}", both.case)


def _choices(names: Sequence[str]) -> Iterator[Sequence[str]]:
    """One of the names, then several."""
    for count in range(1, len(names) + 1):
        yield from itertools.combinations(names, count)


def _unset(case: Case) -> list[str]:
    """The switches that could be set and are not, those that cost least first."""
    apart = case.plan.devices > 1
    return [
        name
        for name in _SWITCHES
        if not getattr(case.plan if name.endswith("_fsdp") else case, name)
        and (apart or not name.endswith("_fsdp"))
        and not (name == "t5_fsdp" and case.text_on_cpu)
    ]


def _with(case: Case, names: Sequence[str]) -> _Change:
    """The case with switches set."""
    split = {name: True for name in names if name.endswith("_fsdp")}
    changed = case._replace(
        plan=case.plan._replace(**split),
        offload=case.offload or "offload" in names,
        text_on_cpu=case.text_on_cpu or "text_on_cpu" in names,
    )
    return _Change(" ".join(_SWITCHES[name] for name in names), changed)


def _more_devices(case: Case) -> Iterator[_Change]:
    """Up to four steps of larger targets, with the flags as they are or with split weights.

    How the devices share the video is chosen anew.
    """
    target = targets.larger(case.target)
    for _ in range(4):
        if target is None:
            return
        plan = plans.choose(
            target.number,
            heads=case.config.dit.num_heads,
            branches=case.work.branches,
            dit_fsdp=case.plan.dit_fsdp,
            t5_fsdp=case.plan.t5_fsdp,
        )
        more = case._replace(target=target, plan=plan)
        text = f"{target.number} devices ({target.name})"
        yield _Change(text, more)
        for chosen in _choices([name for name in _unset(more) if name.endswith("_fsdp")]):
            split = _with(more, chosen)
            yield _Change(f"{text} {split.text}", split.case)
        target = targets.larger(target)


def _fewer_frames(case: Case) -> Iterator[_Change]:
    """A half, a quarter, ... of the latent frames, as long as it is a video."""
    stride, (count, h, w, c) = case.config.vae.temporal_stride, case.work.latent_shape
    while count > 2:
        count = (count + 1) // 2
        work = case.work._replace(latent_shape=(count, h, w, c))
        yield _Change(f"--frame_num {1 + (count - 1) * stride}", case._replace(work=work))


def _smaller_sizes(case: Case) -> Iterator[_Change]:
    """The released models' own sizes of the same shape, and then a half and a quarter."""
    stride, multiple = case.config.vae.spatial_stride, case.config.size_multiple
    count, h, w, c = case.work.latent_shape
    width, height = w * stride, h * stride
    own = [s for s in _SIZES if (s[0] > s[1]) == (width > height) and math.prod(s) < width * height]
    parts = [
        tuple(max(multiple, side // part // multiple * multiple) for side in (width, height))
        for part in (2, 4)
    ]
    for x, y in (*own, *parts):
        work = case.work._replace(latent_shape=(count, y // stride, x // stride, c))
        yield _Change(f"--size {x}*{y}", case._replace(work=work))
