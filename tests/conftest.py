"""Every test runs on the CPU with four fake devices and promotes no dtype by accident."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Most of the time is compiling, and many tests, workers and scripts compile the same programs.
    programs = tempfile.mkdtemp(prefix="wan_jax-programs-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
# Compiled without optimisation: most programs are small, and run a few times.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    )
)

import jax
import pytest

from wan_jax import xla

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")


# How many mappings of memory Linux lets a process have. A compiler that gets no more ends it.
_MAPPINGS = Path("/proc/sys/vm/max_map_count")


@pytest.fixture(autouse=True, scope="module")
def _few_programs() -> Iterator[None]:
    """Compiled programs, each of which has several mappings, are dropped before they are too many.

    After three thousand tests they were. The rest of the limit is for the module that comes next.
    """
    yield
    if _MAPPINGS.exists():
        count = len(Path("/proc/self/maps").read_bytes().splitlines())
        if count > int(_MAPPINGS.read_text()) / 4:
            jax.clear_caches()


@pytest.fixture
def optimised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are compiled with all optimisation, for tests that run large ones for many steps."""
    own = xla._OPTIONS["cpu"] | {"xla_backend_optimization_level": "3"}
    monkeypatch.setitem(xla._OPTIONS, "cpu", own)
