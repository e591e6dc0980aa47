"""Several processes as one run: how they find each other, agree, and end together.

Every process runs the same program over its own devices. What only one may do, such as writing the
video, the first does; what must be the same everywhere, such as a seed that is drawn, the first
tells. A process that fails says so to all, which then end too, though they hang in a collective.
"""

import atexit
import contextlib
import glob
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

# Seconds. A process that is gone is noticed after the first; one that was told of a failure has the
# second to end by itself, and the one that failed waits so long for the others to have heard.
_HEARTBEAT, _GRACE, _HEARD = 30, 10.0, 5.0
_POLL_MS = 500
_FAILURE = "wan_jax/failure"


class _Member(NamedTuple):
    """A process among `total`. client: of the service by which they exchange texts."""

    number: int
    total: int
    client: Any


_me = _Member(0, 1, None)
_numbers = itertools.count()
_ended = threading.Event()


def index() -> int:
    """The number of this process; 0 is the first."""
    return _me.number


def count() -> int:
    """How many processes there are."""
    return _me.total


def is_first() -> bool:
    """Whether this process is the one that converts, writes and shows progress."""
    return _me.number == 0


def join(
    address: str | None = None, processes: int | None = None, number: int | None = None
) -> None:
    """Find the other processes, before JAX touches a device; without any, nothing happens.

    address: "host:port" of the first; processes: how many; number: of this one. None of them: those
    of a TPU pod, of Slurm's srun or of Open MPI's mpirun, as the environment tells. Raises
    ValueError for some of them without the others or out of range, RuntimeError naming the address
    if the others do not come.
    """
    if any(value is not None for value in (address, processes, number)):
        found: dict[str, Any] | None = _checked(address, processes, number)
    else:
        found = _launched()
    if found is None and not _on_tpu():
        return
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT, **(found or {}))
    except ValueError:
        if found is not None:
            raise
        return  # TPU chips that are in no pod
    except Exception as error:  # the service's own kinds
        where = f" at {address}" if address else ""
        raise RuntimeError(f"the other processes were not found{where}: {error}") from error
    _remember()


def _checked(address: str | None, processes: int | None, number: int | None) -> dict[str, Any]:
    flags = {"coordinator_address": address, "num_processes": processes, "process_id": number}
    missing = [f"--{name}" for name, value in flags.items() if value is None]
    if address is None or processes is None or number is None:
        raise ValueError(f"{' and '.join(missing)} must be given too, as all three or none are")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator_address is {address!r}; host:port is needed")
    if processes < 1:
        raise ValueError(f"--num_processes is {processes}; 1 or more is needed")
    if not 0 <= number < processes:
        raise ValueError(f"--process_id is {number}; 0 to {processes - 1} is needed")
    # Of its own devices it may use all.
    return {**flags, "local_device_ids": [], "cluster_detection_method": "deactivate"}


def _launched() -> dict[str, Any] | None:
    """What jax.distributed has to be told under a launcher of several processes; None without."""
    slurm = "SLURM_STEP_NODELIST" in os.environ and _number("SLURM_NTASKS") > 1
    nodes = max(_number("SLURM_STEP_NUM_NODES"), 1)
    on_this_host = -(-_number("SLURM_NTASKS") // nodes)
    if not slurm:
        if _number("OMPI_COMM_WORLD_SIZE") <= 1:
            return None
        on_this_host = _number("OMPI_COMM_WORLD_LOCAL_SIZE")
    # JAX gives each process the one GPU of its number on the host, also where a process is to have
    # all, or where the launcher already lets it see no more than its own.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    alone = on_this_host == 1 or (visible is not None and len(visible.split(",")) < on_this_host)
    return {"local_device_ids": []} if alone else {}


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else 0


def _on_tpu() -> bool:
    """Whether this host has TPU chips, which may be part of a pod."""
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and (os.environ.get("JAX_PLATFORMS") or "tpu").startswith("tpu")


def _remember() -> None:
    """Take note of who this is, and listen for failures."""
    global _me
    # There is no public way to the service that jax.distributed keeps.
    from jax._src.distributed import global_state

    _me = _Member(global_state.process_id, global_state.num_processes, global_state.client)
    if _me.total > 1:
        listener = threading.Thread(target=_listen, daemon=True)
        listener.start()
        atexit.register(_stop_listening, listener)  # before JAX leaves the service


def _stop_listening(listener: threading.Thread) -> None:
    _ended.set()
    listener.join()


# Agreement


def tell(text: str) -> str:
    """What the first process gives here, in every process. All call it in the same order."""
    return exchange(text)[0] if _me.total > 1 else text


def tell_bytes(data: bytes) -> bytes:
    """tell() for much more, through the devices, which must have been started."""
    if _me.total == 1:
        return data
    size = int(tell(str(len(data))))
    own = np.frombuffer(data, np.uint8) if is_first() else np.zeros(size, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(own)).tobytes())


def any_of(flag: bool) -> bool:
    """Whether it is so in some process. All call it in the same order."""
    return "1" in exchange("1" if flag else "0") if _me.total > 1 else flag


def exchange(text: str) -> list[str]:
    """What every process gives here, by their numbers. All call it in the same order."""
    if _me.total == 1:
        return [text]
    place = f"wan_jax/said/{next(_numbers)}"
    _me.client.key_value_set(f"{place}/{_me.number}", text)
    return [_wait_for(f"{place}/{i}") for i in range(_me.total)]


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """The first process goes through the block, then the others do: they find what it has made."""
    place = f"wan_jax/turn/{next(_numbers)}"
    if _me.total > 1 and not is_first():
        _wait_for(place)
    yield
    if _me.total > 1 and is_first():
        _me.client.key_value_set(place, "done")


def _wait_for(key: str) -> str:
    """The text of a key, however long it takes: a process that ends without it ends all."""
    while True:
        try:
            return str(_me.client.blocking_key_value_get(key, _POLL_MS))
        except Exception as error:
            if not _is_timeout(error):
                raise


def _is_timeout(error: Exception) -> bool:
    return "DEADLINE_EXCEEDED" in str(error)


# Ends


def explained(error: Exception) -> str:
    """The text of an error, which may come of another process that is gone."""
    lost = _me.total > 1 and isinstance(error, jax.errors.JaxRuntimeError)
    return str(error) + ("; another process may be gone" if lost else "")


def leave(message: str, status: int) -> NoReturn:
    """End this process, which failed, and with the message all others.

    It does not wait for them at the door, as JAX would: they may hang for want of this one.
    """
    with contextlib.suppress(Exception):
        _me.client.key_value_set(_FAILURE, f"process {_me.number}: {message}")
        if is_first():  # the service ends with it
            deadline = time.monotonic() + _HEARD
            for i in range(1, _me.total):
                left = max(deadline - time.monotonic(), 0.0)
                _me.client.blocking_key_value_get(f"{_FAILURE}/heard/{i}", int(left * 1000))
    _exit(status)


def _listen() -> None:
    """Wait for another process to fail; then end this one, at first as a signal would."""
    told = ""
    while not told:
        if _ended.is_set():
            return
        try:
            told = str(_me.client.blocking_key_value_get(_FAILURE, _POLL_MS))
        except Exception as error:
            if not _is_timeout(error):
                told = "another process is gone"
    if told.startswith(f"process {_me.number}:"):
        return
    with contextlib.suppress(Exception):
        _me.client.key_value_set(f"{_FAILURE}/heard/{_me.number}", "")
    print(f"\nerror: ended, as another process did: {told}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    _exit(1)


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
