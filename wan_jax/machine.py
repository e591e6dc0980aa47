"""What made a video: versions, device and memory, for the record beside it."""

import os
import platform
import resource
import sys
from importlib import metadata
from typing import Any

import jax

import wan_jax

_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """{package: version} of what computes."""
    found = {name: metadata.version(name) for name in _PACKAGES}
    return {"wan_jax": wan_jax.__version__, "python": platform.python_version(), **found}


def device() -> dict[str, Any]:
    """The device that runs: platform, kind and how many there are."""
    first = jax.devices()[0]
    return {"platform": first.platform, "kind": first.device_kind, "count": jax.device_count()}


def peak_bytes() -> dict[str, int | None]:
    """Most memory in use so far, in bytes: of the device (None where it keeps no count), the host.

    The host's is the largest resident size of the process.
    """
    stats = jax.devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"device": stats.get("peak_bytes_in_use"), "host": host}


def xla_flags() -> str:
    """XLA_FLAGS as the user set them; they can change the last bits."""
    return os.environ.get("XLA_FLAGS", "")
