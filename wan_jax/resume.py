"""Where an interrupted run stood, on disk: the solver's state, to be taken up bit for bit."""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wan_jax import files, hosts
from wan_jax.sampler import Carry, State

FORMAT = 2


class Saved(NamedTuple):
    """A state that was read back.

    carry: where the solver stood. seconds: spent so far, by stage. made_by: versions and device.
    """

    carry: Carry
    seed: int
    seconds: dict[str, float]
    made_by: dict[str, Any]


class Store:
    """The state of one video in a folder; there is none until save() is called.

    Of several processes the first reads and writes it; all call its methods alike.
    settings: what tells this video from others, as JSON; another setting is another state.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        text = json.dumps({"format": FORMAT, **settings}, sort_keys=True, ensure_ascii=False)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.file = folder / f"state-{name}.npz"
        self._settings = text

    def load(self) -> Saved | None:
        """The state, or None; ValueError naming the file if it is damaged."""
        if not hosts.any_of(hosts.is_first() and self.file.exists()):
            return None
        content = hosts.tell_bytes(self.file.read_bytes() if hosts.is_first() else b"")
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                facts = json.loads(str(arrays["facts"]))
                state = State(*(arrays[name] for name in State._fields))
            carry = Carry(int(facts["done"]), state)
            if facts["settings"] != self._settings or any(
                a.dtype != np.float32 or a.shape != state.x.shape for a in state
            ):
                raise ValueError("its arrays or settings do not fit")
            return Saved(carry, int(facts["seed"]), dict(facts["seconds"]), dict(facts["made_by"]))
        except Exception as error:  # NumPy's and zip's parsers fail in a dozen ways
            raise ValueError(
                f"--resume_dir: {self.file} cannot be read ({error}); remove it to start anew"
            ) from error

    def save(
        self,
        carry: Carry,
        *,
        seed: int,
        seconds: Mapping[str, float],
        made_by: Mapping[str, Any],
    ) -> None:
        """Write the state, whole or not at all; see Saved. OSError if it cannot be written."""
        if not hosts.is_first():
            return
        facts = {
            "done": carry.done,
            "seed": seed,
            "seconds": dict(seconds),
            "made_by": dict(made_by),
            "settings": self._settings,
        }
        arrays: Any = {name: np.asarray(getattr(carry.state, name)) for name in State._fields}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with files.whole_or_nothing(self.file) as work:
            np.savez(work, facts=np.array(json.dumps(facts)), **arrays)

    def remove(self) -> None:
        """Forget the state: the video is finished."""
        if hosts.is_first():
            self.file.unlink(missing_ok=True)
