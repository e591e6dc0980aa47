"""Where training stands, on disk: Orbax checkpoints that appear whole, and what they belong to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from wan_jax.training.step import State

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
        """Begin to write the state under its step, unless that is there; whether it was not."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return False
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()), facts=ocp.args.JsonSave(self._facts)
        )
        return bool(self._manager.save(step, args=arguments, force=True))

    def restore(self, like: State) -> State | None:
        """The newest state, placed as `like`, which may be shapes with shardings, is; or None.

        Raises ValueError, naming what differs, if it belongs to another training.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        self._check(
            self._manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))[
                "facts"
            ]
        )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return State(**self._manager.restore(step, args=arguments)["state"])

    def _check(self, found: Mapping[str, Any]) -> None:
        names = sorted(set(found) | set(self._facts))
        for name in names:
            old, new = found.get(name), self._facts.get(name)
            if old != new:
                raise ValueError(
                    f"{self._manager.directory} is of a training with {name} = {old!r}, this one "
                    f"has {new!r}; give another --out, or the old value to go on"
                )
