"""The processes of a benchmark: what they report, how long they may take, and that they end.

Each system and case is measured in a process of its own, so that neither holds the other's memory.
"""

import atexit
import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NoReturn

from records import shortened

# What a child is told unless the environment says otherwise. JAX would take three quarters of a
# card at once, and never more.
_DEFAULTS = {
    "JAX_TRACEBACK_FILTERING": "off",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93",
}
_FRACTIONS = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")  # JAX takes one of them
_PARENT = "WAN_JAX_BENCHMARK"  # the process that a child must not outlive
_RAISED = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")
_DIES = 1  # PR_SET_PDEATHSIG of Linux's prctl
_live: set[int] = set()  # leaders of the sessions that run


def environment_of(own: Mapping[str, str] | None = None) -> dict[str, str]:
    """A child's: the defaults, this process's and, above these, its own."""
    given = {**os.environ, **(own or {})}
    for name in _FRACTIONS:
        if name in (own or {}):
            given = {k: v for k, v in given.items() if k == name or k not in _FRACTIONS}
    defaults = dict(_DEFAULTS)
    if any(name in given for name in _FRACTIONS):
        del defaults[_FRACTIONS[0]]
    return {**defaults, **given, _PARENT: str(os.getpid())}


def follow_parent() -> None:
    """End this process when the one that started it for a benchmark is gone, however it ended."""
    if os.environ.get(_PARENT) == str(os.getppid()):
        with contextlib.suppress(OSError, AttributeError):  # not on Linux
            ctypes.CDLL(None).prctl(_DIES, signal.SIGTERM)


def end_with_signals() -> None:
    """SIGTERM and SIGHUP end this process and, before that, its children."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, _ended)


def _ended(number: int, _: Any) -> NoReturn:
    end_all()
    raise SystemExit(128 + number)


@atexit.register
def end_all() -> None:
    """End the children that still run, and what they have started."""
    for leader in tuple(_live):
        _kill(leader)


def _kill(leader: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(leader, signal.SIGKILL)


class _Tail(threading.Thread):
    """Shows what a child says on stderr, and keeps the last error, or the last line, of it."""

    def __init__(self, source: IO[str]) -> None:
        super().__init__(daemon=True)
        self._source, self._last, self._raised = source, "", ""
        self.start()

    def run(self) -> None:
        with self._source:
            for line in self._source:
                sys.stderr.write(line)
                self._last = line.strip() or self._last
                if _RAISED.match(line):
                    self._raised = line.strip()

    def last(self, status: int) -> str:
        """What explains an exit status; one that a signal ended had no error to raise."""
        self.join(1.0)
        return shortened(self._raised if self._raised and status > 0 else self._last)


def rows(
    script: str,
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Run `python script arguments`; every object that it reports, as it comes.

    One that fails, or is stopped after so many seconds, gives {"error": ...} last.
    """
    process = subprocess.Popen(
        [sys.executable, script, *arguments],
        env=environment_of(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # its own children are stopped with it
    )
    _live.add(process.pid)
    assert process.stdout is not None and process.stderr is not None
    late, said = threading.Event(), _Tail(process.stderr)

    def stop() -> None:
        late.set()
        _kill(process.pid)

    timer = threading.Timer(0.0 if seconds is None else max(seconds, 0.0), stop)
    timer.daemon = True
    if seconds is not None:
        timer.start()
    try:
        yield from _objects(process.stdout)
        process.wait()
    finally:
        timer.cancel()
        _kill(process.pid)
        process.wait()
        _live.discard(process.pid)
        process.stdout.close()
        said.join(1.0)
    if late.is_set():
        yield {"error": f"stopped after {seconds:.0f} s"}
    elif process.returncode:
        yield {"error": f"exit status {process.returncode}: {said.last(process.returncode)}"}


def _objects(lines: IO[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects among the lines."""
    for line in lines:
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


def child(script: str, arguments: Sequence[str], *, seconds: float | None = None) -> dict[str, Any]:
    """The last object that it reports, also if it fails after that; {"error": ...} without one."""
    found = list(rows(script, arguments, seconds=seconds))
    reported = [row for row in found if "error" not in row]
    return (reported or found or [{"error": "nothing was reported"}])[-1]
