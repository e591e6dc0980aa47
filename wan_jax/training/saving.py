"""Where training stands, on disk: Orbax checkpoints that appear whole, and what they belong to."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from wan_jax.training.step import State
from wan_jax.weights import folders

FOLDER = "checkpoints"


class Saver:
    """Checkpoints of one training, in OUT/checkpoints/<step>; the newest `keep` stay.

    facts: what must be the same when training goes on, as JSON. Use as a context manager: leaving
    it waits for what is still being written.
    """

    def __init__(self, out: Path, *, keep: int, facts: Mapping[str, Any]) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, cleanup_tmp_directories=True
        )
        self._facts = json.loads(json.dumps(facts))  # as they will be read
        self._manager = ocp.CheckpointManager((out / FOLDER).absolute(), options=options)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, state: State) -> bool:
        """Begin to write the state under its step, unless that is there; whether it was not.

        Raises OSError if it, or the one before it, cannot be written.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return False
        self.check()
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()), facts=ocp.args.JsonSave(self._facts)
        )
        with _disk_errors(self._manager.directory):
            return bool(self._manager.save(step, args=arguments, force=True))

    def check(self) -> None:
        """Raise OSError if a state that is being written cannot be."""
        with _disk_errors(self._manager.directory):
            self._manager.check_for_errors()

    def restore(self, like: State) -> State | None:
        """The newest state, placed as `like`, which may be shapes with shardings, is; or None.

        Raises ValueError, naming what differs, if it belongs to another training.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        _compare(self._manager.directory, _facts(self._manager, step), self._facts)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return State(**self._manager.restore(step, args=arguments)["state"])


def check(out: Path, known: Mapping[str, Any]) -> list[int]:
    """Of what steps there are checkpoints in OUT; ValueError if the newest is of another training.

    known: of the facts those that are known so far.
    """
    folder = (out / FOLDER).absolute()
    if not folder.is_dir():
        return []
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(folder, options=options) as manager:
        steps = sorted(manager.all_steps())
        if steps:
            found, wanted = _facts(manager, steps[-1]), json.loads(json.dumps(known))
            _compare(folder, _part(found, wanted), wanted)
    return steps


def check_space(out: Path, needed: int) -> None:
    """ValueError if the disk of OUT has not `needed` bytes for checkpoints."""
    try:
        folders.check_space(out, needed, remedy="with a lower 'keep' fewer of them stay")
    except ValueError as error:
        raise ValueError(f"{out / FOLDER} {error}") from error


def _part(found: Any, like: Any) -> Any:
    """Of nested values those that are in `like`, too."""
    if not (isinstance(found, Mapping) and isinstance(like, Mapping)):
        return found
    return {name: _part(found.get(name), value) for name, value in like.items()}


def _facts(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    found: dict[str, Any] = manager.restore(
        step, args=ocp.args.Composite(facts=ocp.args.JsonRestore())
    )["facts"]
    return found


def _compare(folder: Any, found: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """ValueError naming the first that differs, and by its value alone."""
    for name, old, new in _differences("", found, own):
        raise ValueError(
            f"{folder} is of a training with {name} = {old!r}, this one has {new!r}; give another "
            "--out, or the old value to go on"
        )


def _differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(set(old) | set(new)):
            own = f"{name}.{key}" if name else key
            yield from _differences(own, old.get(key), new.get(key))
    elif old != new:
        yield name, old, new


@contextlib.contextmanager
def _disk_errors(folder: Any) -> Iterator[None]:
    """What TensorStore says of a disk, as a ValueError, as what it is."""
    try:
        yield
    except ValueError as error:
        raise OSError(f"{folder} cannot be written: {str(error).splitlines()[0]}") from error
