"""TensorBoard's events tell what the lines of metrics.jsonl do."""

import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboardX.proto import event_pb2

from wan_jax.training import metrics


def records(file: Path) -> Iterator[bytes]:
    """Of a TFRecord file: length, its checksum, the bytes, their checksum."""
    data = file.read_bytes()
    while data:
        (length,) = struct.unpack_from("<Q", data)
        yield data[12 : 12 + length]
        data = data[16 + length :]


def scalars(out: Path) -> dict[tuple[int, str], float]:
    """What TensorBoard shows: a later file's first step purges those from there on."""
    shown: list[tuple[tuple[int, str], float]] = []
    for file in sorted((out / "tensorboard").iterdir()):
        for event in map(event_pb2.Event.FromString, records(file)):
            if event.HasField("session_log") and event.session_log.status == 1:  # START
                shown = [(key, value) for key, value in shown if key[0] < event.step]
            shown += [((event.step, v.tag), v.simple_value) for v in event.summary.value]
    found = dict(shown)
    assert len(found) == len(shown), "a step is shown twice"
    return found


def write(out: Path, steps: range, *, done: int = 0) -> None:
    with metrics.Metrics(out, step=done, tensorboard=True) as both:
        for step in steps:
            both.write(step, {"loss": 1 / step, "grad_norm": float(step)})
        both.flush()


def told(out: Path) -> dict[tuple[int, str], float]:
    lines = metrics.read(out / metrics.FILE)
    return {(line["step"], tag): line[tag] for line in lines for tag in ("loss", "grad_norm")}


def test_events_are_the_lines(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6))
    assert len(told(tmp_path)) == 10
    assert scalars(tmp_path) == pytest.approx(told(tmp_path))


def test_steps_made_again_are_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, range(1, 6))
    # The second in which a file was begun is in its name, and orders them.
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 60)
    write(tmp_path, range(4, 5), done=3)
    assert scalars(tmp_path) == pytest.approx(told(tmp_path))
    assert max(step for step, _ in scalars(tmp_path)) == 4
