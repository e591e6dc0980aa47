"""The memory of a card as NVML, nvidia-smi's library, sees it, and limits of JAX's allocator."""

import contextlib
import ctypes
import os
import threading
from typing import Any, Self


class _Memory(ctypes.Structure):
    """NVML's nvmlMemory_t, in bytes."""

    _fields_ = tuple((name, ctypes.c_ulonglong) for name in ("total", "free", "used"))


class Card:
    """What NVML, nvidia-smi's library, says of the first visible card's memory.

    As a context it samples what is in use while the block runs. Without the library nothing is
    known.
    """

    def __init__(self) -> None:
        self._done, self._values = threading.Event(), list[int]()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._handle = ctypes.c_void_p()
        self._library: Any = None
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
        with contextlib.suppress(OSError):
            library = ctypes.CDLL("libnvidia-ml.so.1")
            index, handle = int(first) if first.isdigit() else 0, ctypes.byref(self._handle)
            failed = library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(index, handle)
            self._library = None if failed else library

    def now(self) -> _Memory | None:
        found = _Memory()
        if self._library is None:
            return None
        failed = self._library.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(found))
        return None if failed else found

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            found = self.now()
            if found is not None:
                self._values.append(found.used)

    def __enter__(self) -> Self:
        before = self.now()
        if before is not None:
            self._values.append(before.used)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    @property
    def gib(self) -> float | None:
        """The most, less what was in use before."""
        return (max(self._values) - self._values[0]) / 2**30 if self._values else None


def limited(size: int) -> dict[str, str]:
    """The environment of a child whose allocator has so many bytes of the first visible card.

    They are taken in one piece, for a pool that grows cannot join its regions. Without NVML, as on
    a CPU, there is no limit.
    """
    found = Card().now()
    if found is None:
        return {}
    return fraction(size / found.total)


def fraction(part: float) -> dict[str, str]:
    """The same of a part of the card's memory."""
    own = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{part:.6f}"}
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", **own}
