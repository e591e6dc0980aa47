"""Every test runs on the CPU with four fake devices and promotes no dtype by accident."""

import atexit
import os
import shutil
import tempfile

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


@pytest.fixture
def optimised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are compiled with all optimisation, for tests that run large ones for many steps."""
    own = xla._OPTIONS["cpu"] | {"xla_backend_optimization_level": "3"}
    monkeypatch.setitem(xla._OPTIONS, "cpu", own)
