"""The devices of a run: JAX is started on them, and each is given its part of a video."""

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import flags

from wan_jax import hosts, loading, plans
from wan_jax.cli import say
from wan_jax.config import WanConfig
from wan_jax.outputs import Job
from wan_jax.weights import remote, sources


def join(values: flags.FlagValues) -> None:
    """Find the other processes of the run, if there are any; see hosts.join()."""
    hosts.join(values.coordinator_address, values.num_processes, values.process_id)


def start(values: flags.FlagValues) -> None:
    """Settle on devices; raises as check() does."""
    check()
    if jax.default_backend() != "cpu" and not _cache_chosen():
        # Programs are kept: the next run starts in seconds and, as what was tuned by timing is kept
        # with them, gives the same bits.
        jax.config.update("jax_compilation_cache_dir", _programs(values.cache_dir))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def check() -> None:
    """RuntimeError if JAX cannot start on the devices (without a plugin it only asserts)."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        named = os.environ.get("JAX_PLATFORMS", "")
        raise RuntimeError(
            f"JAX_PLATFORMS={named} has no device that starts here: {error}"
        ) from None


def _programs(cache_dir: str | None) -> str:
    """Where programs are kept: on this machine or, for several hosts, where all look."""
    if hosts.count() > 1 and cache_dir is not None and remote.is_bucket(cache_dir):
        return f"{cache_dir.rstrip('/')}/programs"
    return str(loading.local_cache(cache_dir) / "programs")


def _cache_chosen() -> bool:
    """Whether the user has said where JAX keeps compiled programs."""
    return bool(getattr(jax.config, "jax_compilation_cache_dir", None))


def plan(values: flags.FlagValues, config: WanConfig, jobs: Sequence[Job]) -> plans.Plan | None:
    """How the devices share each video, as the flags say or chosen, and told; None for one device.

    Raises ValueError naming a flag that cannot be met and the nearest that can.
    """
    count = jax.device_count()
    if count == 1 and values.ulysses_size == values.ring_size == 1:
        return None
    guided = any(job.request.guidance != 1.0 for job in jobs)
    chosen = choose(values, config, count=count, guided=guided, memory=memory())
    say(f"plan: {chosen}")
    return chosen


def choose(
    values: flags.FlagValues,
    config: WanConfig,
    *,
    count: int,
    guided: bool,
    memory: int | None,
) -> plans.Plan:
    """How so many devices, with so many bytes each if that is known, share each video.

    Raises ValueError as plan() does.
    """
    # Both are 1 where the reference's command line says nothing of them.
    said = values.ulysses_size > 1 or values.ring_size > 1
    try:
        return plans.choose(
            count,
            heads=config.dit.num_heads,
            branches=2 if guided else 1,
            ulysses=values.ulysses_size if said else None,
            ring=values.ring_size if said else None,
            dit_fsdp=values.dit_fsdp,
            t5_fsdp=values.t5_fsdp,
            weights=sources.sizes(config, jnp.dtype(values.dtype), kind=values.quantize),
            memory=memory,
        )
    except ValueError as error:
        raise ValueError(f"--{error}") from error


def memory() -> int | None:
    """Bytes that JAX may use of a device; None where it does not tell, as on the CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
