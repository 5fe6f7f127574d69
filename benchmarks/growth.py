# SPDX-License-Identifier: Apache-2.0
"""Measure how a trace's CPU, memory and disk grow with requests, connections, resets and time (as root).

    sudo .venv/bin/python -m benchmarks.growth

Requests come from the generator of benchmarks.flood, by BPF and the ring buffer. Connections are real ones over
loopback, which are idle. Resets are made here and take the way of records from a ring buffer on, since no machine has
100,000 windows to reset a second. A day is computed from what was measured, and marked as estimated.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from benchmarks import flood, reading
from benchmarks.common import COMMAND, BenchmarkResults, TracerProcess, folder, options, size, status
from benchmarks.starting import family, pss, used
from benchmarks.tcp import connected
from cwndtrace.capture.session import Session, describe, ending
from cwndtrace.capture.source import Filters, RawRecords
from cwndtrace.records import layout
from cwndtrace.store import CaptureWriter, ThreadedWriter, open_capture
from tests.harness.tcp import until
from tests.unit.fake_source import FakeSource

_DAY_S: Final = 86_400
_SETTLE_S: Final = 5.0


class MadeResets(FakeSource):
    """A source that yields ``rate`` resets a second without an end, of two hundred connections, one at a time."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self._rate, self._made = rate, 0
        self._records = [record.tobytes() for record in reading.resets(100_000, np.random.default_rng(1))]
        self._time_at = layout.event("cwnd_reset").fields[0].offset

    def poll(self, timeout_s: float) -> list[RawRecords]:
        """Return what is due after the timeout."""
        time.sleep(timeout_s)
        now = time.monotonic_ns()
        due = int((now - self.begun_ns) / 1e9 * self._rate) - self._made
        at, made, kept = self._time_at, self._made, self._records
        self._made += due
        rows = (kept[(made + i) % len(kept)] for i in range(due))
        stamp = now.to_bytes(8, sys.byteorder)
        return [("cwnd_reset", row[:at] + stamp + row[at + 8 :]) for row in rows]

    def exhausted(self) -> bool:
        """Return False."""
        return False


@dataclass
class Cost:
    """What a trace took: CPU in per cent of one, memory in MB, and bytes a second on disk."""

    cpu: float
    memory: float
    disk: float


def requests(rate: float, seconds: float) -> tuple[Cost, float]:
    """Return the cost of block requests at a rate, and the rate that the generator reached."""
    with folder() as place:
        got = flood.run(rate, seconds, place / "a.cwnd")
        bytes_a_second = size(place / "a.cwnd") / seconds
    if got["lost"]:
        print(f"{got['lost']:,.0f} of {got['kept'] + got['lost']:,.0f} requests were lost")
    return Cost((got["user"] + got["system"]) * got["offered"] / 1e4, got["memory"], bytes_a_second), got["offered"]


def idle_connections(number: int, seconds: float) -> tuple[Cost, float]:
    """Return the cost of a trace beside so many connections, each with both of its ends here, and their number."""
    with connected(number) as senders, folder() as place:
        output = place / "a.cwnd"
        with TracerProcess([*COMMAND, "run", "--no-block", "-q", "-o", str(output)], "", stdout=-3) as tracer:
            until((output / "connections").exists, 60, "the first snapshot")
            time.sleep(_SETTLE_S)  # leave out the imports
            cpu, disk = used(tracer), size(output)
            time.sleep(seconds)
            cpu, disk = used(tracer) - cpu, size(output) - disk
            memory = sum(map(pss, family(tracer))) / 1e6
        return Cost(100 * cpu / seconds, memory, disk / seconds), len(senders)


def made_resets(rate: float, seconds: float, look: Callable[[float], object] = lambda _: None) -> Cost:
    """Return the cost of resets at a rate, without the kernel's side; ``look`` is told the seconds so far."""
    with folder() as place, Session(MadeResets(rate)) as session:
        output = place / "a.cwnd"
        writer = ThreadedWriter(CaptureWriter.create(output, describe(session, Filters(), "0")))
        before, begin, memory = _cpu_s(), time.monotonic(), 0
        for batches in session.turns(lambda: False, seconds):
            for batch in batches:
                writer.add(batch.event, batch.rows)
            writer.flush()
            memory = max(memory, status(os.getpid(), "VmRSS"))
            look(time.monotonic() - begin)
        for batch in session.finish():
            writer.add(batch.event, batch.rows)
        writer.close("complete", **ending(session))
        kept = open_capture(output).rows("cwnd_reset")
        if kept != session.tally.kept["cwnd_reset"]:
            raise SystemExit(f"{session.tally.kept['cwnd_reset']:,} resets came, {kept:,} are on disk")
        took = time.monotonic() - begin
        return Cost(100 * (_cpu_s() - before) / took, memory / 1e6, size(output) / took)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def lasting(report: BenchmarkResults, rate: float, seconds: float) -> None:
    """Report whether CPU and memory grow in one trace, by comparing its thirds, and what a day of it makes."""
    thirds: list[tuple[float, int]] = [(_cpu_s(), 0)]

    def look(now: float) -> None:
        if now >= len(thirds) * seconds / 3 and len(thirds) < 3:
            thirds.append((_cpu_s(), status(os.getpid(), "VmRSS")))

    cost = made_resets(rate, seconds, look)
    thirds.append((_cpu_s(), status(os.getpid(), "VmRSS")))
    first, last = (thirds[i + 1][0] - thirds[i][0] for i in (0, 2))
    what = f"{rate:,.0f} resets/s for {seconds:,.0f} s"
    report.add(f"{what}: CPU of the last third / the first", last / first)
    report.add(f"{what}: memory after the last third / the first", thirds[3][1] / thirds[1][1])
    report.add(f"{rate:,.0f} resets/s for 24 hours, estimated: disk", cost.disk * _DAY_S / 1e6, "MB")
    report.add(f"{rate:,.0f} resets/s for 24 hours, estimated: CPU", cost.cpu / 100 * _DAY_S / 60, "min")


def main() -> None:
    """Run the benchmark and write its report."""
    asked = options(
        __doc__,
        requests=("1000,10000,100000,300000", "block requests a second"),
        connections=("100,1000,9900", "idle connections"),
        resets=("1,100,10000,100000", "resets a second"),
        lasting=(180.0, "length in s of the trace whose thirds are compared"),
    )
    report = BenchmarkResults("growth")

    def rows(axis: str, text: str, each: str, cost: Callable[[int], tuple[Cost, float]]) -> None:
        for number in map(int, text.split(",")):
            took, reached = cost(number)
            what = f"{reached:,.0f} {axis}"
            report.add(f"{what}: CPU", took.cpu, "% of a CPU")
            report.add(f"{what}: CPU for each", took.cpu / 100 / reached * 1e6, each)
            report.add(f"{what}: memory", took.memory, "MB")
            report.add(f"{what}: disk", took.disk / 1e3, "kB/s")

    rows("block requests/s", asked.requests, "us", lambda rate: requests(rate, asked.seconds))
    rows(
        "idle connections",
        asked.connections,
        "us a second",
        lambda number: idle_connections(number, 5 * asked.seconds),
    )
    rows("resets/s", asked.resets, "us", lambda rate: (made_resets(rate, 2 * asked.seconds), rate))
    lasting(report, 10_000, asked.lasting)
    report.write()


if __name__ == "__main__":
    main()
