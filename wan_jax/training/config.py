"""The settings of a training, as a file like those in configs/ has them."""

import dataclasses
import math
from pathlib import Path
from typing import Any, TypeVar

from wan_jax import tasks
from wan_jax.training.flow import FlowConfig
from wan_jax.training.loop import LoopConfig
from wan_jax.training.lora import LoraConfig
from wan_jax.training.optimizer import OptimizerConfig

Part = TypeVar("Part")
_PARTS = (OptimizerConfig, FlowConfig, LoopConfig, LoraConfig)
_SEQUENCES = ("lora_targets", "sample_prompts", "sample_images", "sample_last_images")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(OptimizerConfig, FlowConfig, LoopConfig, LoraConfig):
    """All settings of a training, flat; those of its parts are described there.

    ckpt_dir: the checkpoint to start from, as load() takes it. size: (width, height) in pixels;
    frames: 4n + 1 of a video; fps: frames a second at which videos are read. None of these three
    is the checkpoint's own default. batch_size: clips a step, of all devices together. fsdp: how
    many devices share one copy of the weights; None is all.
    sample_prompts: what is made every sample_every steps, and at the end, at size and frames;
    sample_images, sample_last_images: one for each prompt, where the checkpoint takes them. Its
    steps, guidance, shift and solver are as generate() takes them; sample k has sample_seed + k.
    Raises ValueError naming a field outside its range.
    """

    ckpt_dir: str | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    fps: float | None = None
    batch_size: int = 1
    fsdp: int | None = None
    sample_prompts: tuple[str, ...] = ()
    sample_images: tuple[str, ...] = ()
    sample_last_images: tuple[str, ...] = ()
    sample_steps: int | None = None
    sample_guidance: float | None = None
    sample_shift: float | None = None
    sample_solver: str | None = None
    sample_seed: int = 0

    def __post_init__(self) -> None:
        for kind in _PARTS:
            self.part(kind)
        for name, low in (("batch_size", 1), ("fsdp", 1), ("sample_seed", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole and value >= low) and not (name == "fsdp" and value is None):
                raise ValueError(f"{name} is {value!r}; an integer of {low} or more is needed")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate is {self.accumulate}; a divisor of batch_size {self.batch_size} is "
                "needed"
            )
        fps = self.fps
        if fps is not None and not (isinstance(fps, int | float) and 0 < fps < math.inf):
            raise ValueError(f"fps is {fps!r}; a number of frames a second above 0 is needed")
        for name in _SEQUENCES:
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(v, str) for v in value):
                raise ValueError(f"{name} is {value!r}; a list of texts is needed")
        if self.sample_every and not self.sample_prompts:
            raise ValueError(f"sample_every is {self.sample_every}; sample_prompts are needed")
        for name in ("sample_images", "sample_last_images"):
            count = len(getattr(self, name))
            if count not in (0, len(self.sample_prompts)):
                raise ValueError(
                    f"{name} has {count} entries; one for each of the "
                    f"{len(self.sample_prompts)} sample_prompts is needed"
                )

    def part(self, kind: type[Part]) -> Part:
        """The settings that one of OptimizerConfig, FlowConfig, LoopConfig and LoraConfig has."""
        names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        return kind(**{name: getattr(self, name) for name in names})


def read(path: Path, **given: Any) -> TrainConfig:
    """The settings of a file with one literal `config = {...}`; nothing in it is executed.

    given: settings that come before those of the file, unless they are None. Raises ValueError
    naming the file and what is wrong: an unknown or missing setting, or one out of range.
    """
    values = tasks.read_literal(path) | {k: v for k, v in given.items() if v is not None}
    fields = dataclasses.fields(TrainConfig)
    known = [field.name for field in fields]
    unknown = sorted(str(name) for name in set(values) - set(known))
    if unknown:
        raise ValueError(f"--config {path} has unknown settings {unknown}; known: {known}")
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    missing = [name for name in needed if name not in values]
    if missing:
        raise ValueError(f"--config {path} lacks {', '.join(missing)}, which has no default")
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return TrainConfig(**plain)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--config {path}: {error}") from error
