# SPDX-License-Identifier: Apache-2.0
"""A trace during which the wall clock is stepped."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import cwndtrace
from tests.harness import tcp
from tests.harness.command import LONG_S, running, send_after_idle

HOUR_NS = 3_600_000_000_000


def follow_steps(
    space: tcp.Space,
    connection: tcp.TcpConnection,
    path: Path,
    step: Callable[[int], None],
    python: tuple[str, ...] = ("-P", "-m", "cwndtrace"),
) -> None:
    """Trace while ``step`` sets the wall clock to so many nanoseconds off its original time.

    Asserts that records are in order, and that their UTC is right before and after each step.
    """
    right = time.time_ns() - time.monotonic_ns()
    known: list[float] = []
    with running("-n", space.name, "--no-block", "-o", path, python=python) as run:
        for ns in (0, 5 * HOUR_NS, -3 * HOUR_NS):
            before = len(cwndtrace.load(path).meta["clock"].get("segments") or ())
            step(ns)
            if ns:
                tcp.until(lambda n=before: len(cwndtrace.load(path).meta["clock"]["segments"]) > n, LONG_S, "a segment")  # type: ignore[misc]
            send_after_idle(connection)
            sent = [s.start_ns for s in connection.sends if s.reason == "idle"][len(known) :]
            known += [(right + at + ns) / 1e9 for at in sent]
            # A record that is read after the next step would have the UTC of that step.
            number = len(known)
            tcp.until(lambda n=number: len(cwndtrace.load(path).resets) == n, LONG_S, "the records")  # type: ignore[misc]
        code, _, stderr = run.end()
    assert code == 0, stderr
    trace = cwndtrace.load(path)
    assert list(trace.resets["ts_ns"]) == sorted(trace.resets["ts_ns"])
    recorded = [time.timestamp() for time in trace.resets["time"]]
    assert all(abs(a - b) < 5 for a, b in zip(recorded, known, strict=True)), (recorded, known)
    assert len(trace.meta["clock"]["segments"]) == 3
    assert "stepped by +18,000.000 s, -28,800.000 s" in repr(trace)
    assert 0 < float(trace.summary()["seen_s"].max()) < 5 * LONG_S
