# SPDX-License-Identifier: Apache-2.0
"""The metrics of a running trace.

The loop that empties the rings only puts batches aside. A thread of its own counts them, and takes at most a twentieth
of a CPU while nothing presses; whoever asks for the figures reads what it has counted.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cwndtrace.analysis.histogram import LatencyHistogram
from cwndtrace.capture.connections import pause_s
from cwndtrace.capture.session import Batch, Session, devices
from cwndtrace.metrics import families as f
from cwndtrace.metrics.families import Snapshot
from cwndtrace.metrics.figures import Figures, seconds, summed
from cwndtrace.metrics.slots import Slots
from cwndtrace.records import arrow
from cwndtrace.tcp import EXEMPT

MOST_WORKLOADS: Final = 50
MOST_DEVICES: Final = 32
_EVERY_S: Final = 1.0
_SYSCTL_EVERY_S: Final = 30.0
_SILENT_S: Final = 5.0
"""Events flow if the loop, which takes a fifth of a second a turn, has turned within this time."""
_LAST_S: Final = 2.0
"""How long the end of a trace waits for what is still to be counted."""
_MOST_REQUESTS: Final = 131_072
"""The block requests that are kept to find the cause of idle time; they take 12 MB."""
_COUNTED: Final = ("cwnd_reset", "cwnd_recovery", "connections", "workloads", "processes")


class Requests(Protocol):
    """The statistics of block I/O that the views keep, see ``cli.live.BlockFigures``."""

    latency: dict[tuple[str, str], LatencyHistogram]
    bytes: dict[tuple[str, str], int]
    errors: dict[tuple[str, str], int]

    def count(self) -> None:
        """Bring them up to date."""


class Metrics:
    """The metrics of a trace. ``turn``, ``stopping`` and ``finish`` belong to the loop, the rest to any thread.

    ``block`` is read by the loop alone. ``cgroups`` is the version of the machine's cgroups. ``startup_s`` says how
    long the start took. ``dropped`` returns how many lines of output were dropped so far.
    """

    def __init__(
        self, session: Session, block: Requests, *, version: str, cgroups: str, startup_s: Callable[[], float]
    ) -> None:
        self.dropped: Callable[[], int] = lambda: 0
        self.begun_ns = time.time_ns()
        self._session = session
        self._source_events = session.source.events
        self._cgroups = cgroups
        self._startup_s = startup_s
        self._block, self._block_at = block, 0.0
        self._requests: Snapshot = {}
        self._device_slots = Slots(MOST_DEVICES, lambda _: None)
        self._devices = devices()
        self._figures = Figures()
        self._slots = Slots(MOST_WORKLOADS, lambda name: self._figures.drop("workload", name))
        self._figures.add(f.BUILD, (version,), 1)
        self._lock = threading.Lock()
        self._new: list[Batch] = []
        self._kept_requests: deque[arrow.TimedRecords] = deque()
        self._rows = self._gone_ns = 0
        self._tally: tuple[dict[str, int], dict[str, int]] = {}, {}
        self._turned = time.monotonic()
        self._ending = self._last = False
        self._fresh, self._wake = threading.Event(), threading.Event()
        self._error = ""
        self._judge: Any = None
        self._names: dict[str, list[pa.Table]] = {}
        self._busy: _Busy | None = None
        self._sysctl_at = 0.0
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        """Start counting. The thread has the privileges that the caller has now."""
        self._figures.set(f.STARTUP, self._startup_s())
        self._turned = time.monotonic()
        self._thread.start()

    def turn(self, batches: list[Batch]) -> None:
        """Take the batches of one turn. This only puts them aside, and copies the figures of block I/O each second."""
        now = time.monotonic()
        self._turned = now
        self._tally = dict(self._session.tally.kept), dict(self._session.tally.lost)
        with self._lock:
            for batch in batches:
                if batch.event in _COUNTED:
                    self._new.append(batch)
                    self._fresh.set()
                elif batch.event == "block_io" and isinstance(batch.rows, arrow.TimedRecords):
                    self._keep(batch.rows)
        if now >= self._block_at:
            self._block_at = now + _EVERY_S
            self._requests = self._of_block()

    def stopping(self) -> None:
        """Say from now on that no events flow."""
        self._ending = True

    def finish(self, batches: list[Batch]) -> None:
        """Take the last batches, and count all that is left, for two seconds at most."""
        self._block_at = 0.0
        self.turn(batches)
        self._last = True
        self._wake.set()
        self._fresh.set()
        if self._thread.ident is not None:
            self._thread.join(_LAST_S)

    def health(self) -> str:
        """Return why no events flow; empty where they do."""
        if self._error:
            return f"the metrics aren't counted any more: {self._error}"
        if self._ending:
            return "the trace is ending"
        silent = time.monotonic() - self._turned
        return f"the trace has done nothing for {silent:.0f} s" if silent > _SILENT_S else ""

    def snapshot(self) -> Snapshot:
        """Return all metrics as of about a second ago. Those without a value are absent."""
        kept, lost = self._tally
        more: Snapshot = {
            f.KEPT: {(name,): number for name, number in kept.items()},
            f.LOST: {(name,): number for name, number in lost.items()},
            f.DROPPED: {(): self.dropped()},
        }
        found = self._figures.snapshot() | self._requests | more
        return {family: found[family] for family in f.FAMILIES if found.get(family)}

    def _keep(self, rows: arrow.TimedRecords) -> None:
        self._kept_requests.append(rows)
        self._rows += len(rows)
        while self._rows > _MOST_REQUESTS:
            gone = self._kept_requests.popleft()
            self._rows -= len(gone)
            self._gone_ns = max(self._gone_ns, int(gone.records["done_ns"].max()))

    def _of_block(self) -> Snapshot:
        self._block.count()
        out: Snapshot = {family: {} for family in (f.REQUESTS, f.BYTES, f.ERRORS, f.LATENCY)}
        if any(device not in self._devices for device, _ in self._block.latency):
            # A device that isn't in /proc/partitions keeps its number, so this happens once for each.
            here = devices()
            self._devices = {device: here.get(device, device) for device, _ in self._block.latency} | here
        for pair, histogram in self._block.latency.items():
            labels = self._device_slots.label(self._devices[pair[0]]), pair[1]
            summed(out[f.REQUESTS], labels, histogram.count)
            summed(out[f.BYTES], labels, self._block.bytes[pair])
            summed(out[f.ERRORS], labels, self._block.errors[pair])
            summed(out[f.LATENCY], labels, seconds(histogram, f.LATENCY))
        return out

    # ---- in the thread ----

    def _run(self) -> None:
        try:
            while True:
                begin, cpu = time.monotonic(), time.thread_time()
                self._fresh.clear()  # before the rest, so that nothing that comes in meanwhile is missed
                last = self._last
                self._count(last=last)
                if last:
                    break
                self._wake.wait(pause_s(_EVERY_S, time.thread_time() - cpu, time.monotonic() - begin))
                if self._judge is None or self._judge.done:
                    self._fresh.wait()
        except Exception as e:  # health() says it; the trace goes on
            self._error = f"{type(e).__name__}: {e}"

    def _count(self, *, last: bool) -> None:
        with self._lock:
            new, self._new = self._new, []
            requests, gone_ns = list(self._kept_requests), self._gone_ns
        by_event: dict[str, list[Any]] = {name: [] for name in _COUNTED}
        for batch in new:
            by_event[batch.event].append(batch.rows)
        for table in by_event["connections"]:
            self._count_connections(table)
        if time.monotonic() >= self._sysctl_at and not last:
            self._sysctl_at = time.monotonic() + _SYSCTL_EVERY_S
            for _, value in self._session.helper.idle_sysctls():
                if value is not None:
                    self._figures.set(f.IDLE_SYSCTL, value)
        self._count_resets(by_event, requests, gone_ns, last=last)

    def _count_connections(self, table: pa.Table) -> None:
        """Count a snapshot. A connection that wasn't in the one before was busy since it was made."""
        names = table["ca_name"].value_counts().to_pylist()
        self._figures.set(f.CONNECTIONS, len(table))
        self._figures.set(f.EXEMPT, sum(row["counts"] for row in names if row["values"] in EXEMPT))
        now = _Busy.of(table)
        if self._busy is not None:
            self._figures.add(f.BUSY, (), now.since(self._busy))
        self._busy = now

    def _count_resets(
        self, by_event: dict[str, list[Any]], requests: list[arrow.TimedRecords], gone_ns: int, *, last: bool
    ) -> None:
        for name in ("workloads", "processes"):
            if by_event[name]:
                self._names[name] = [arrow.joined(self._names.get(name, []) + by_event[name])]
        if self._judge is None and not by_event["cwnd_reset"]:
            return
        # This imports pandas, which takes 40 MB, so it waits for the first reset.
        from cwndtrace.metrics.judge import Judge, News

        if self._judge is None:
            self._judge = Judge(
                cgroups=self._cgroups,
                follows="cwnd_recovery" in self._source_events,
                recorded="block_io" in self._source_events,
                started_ns=self._session.start["mono_ns"],
            )
        names, self._names = self._names, {}
        news = News(
            by_event["cwnd_reset"],
            by_event["cwnd_recovery"],
            names.get("workloads", []),
            names.get("processes", []),
            requests,
            gone_ns,
        )
        named, judged = self._judge.take(news, self._devices, time.monotonic_ns(), last=last)
        for (reason, probe, workload), rows in named.groupby(["reason", "probe", "workload"]):
            self._figures.add(f.RESETS, (reason, probe, self._slots.label(workload)), len(rows))
        for reason, rows in named.groupby("reason"):
            share = rows["cwnd_after"].to_numpy(np.float64) / np.maximum(rows["cwnd_before"].to_numpy(np.float64), 1)
            self._figures.observe(f.WINDOW, (str(reason),), share)
            if reason == "idle":
                self._figures.observe(f.IDLE, (), rows["idle_us"].to_numpy(np.float64) / 1e6)
        for (cause, result, workload), rows in judged.groupby(["cause", "verdict", "workload"]):
            cost_s = float(rows["lost_us"].sum()) / 1e6
            labels = cause, result, self._slots.label(workload, cost_s)
            self._figures.add(f.JUDGED, labels, len(rows))
            self._figures.add(f.COST, labels, cost_s)


@dataclass(frozen=True)
class _Busy:
    """The busy times in a snapshot, us, in order of the connections' ``key``."""

    ts_ns: int
    key: npt.NDArray[np.uint64]
    us: npt.NDArray[np.int64]

    @classmethod
    def of(cls, table: pa.Table) -> _Busy:
        if not len(table):
            return cls(0, np.zeros(0, np.uint64), np.zeros(0, np.int64))
        space, cookie, us, ts_ns = (
            arrow.values(table[name].combine_chunks()) for name in ("netns_ino", "sock_cookie", "busy_us", "ts_ns")
        )
        key = (space.astype(np.uint64) << np.uint64(40)) ^ cookie
        order = np.argsort(key)
        return cls(int(ts_ns.max()), key[order], us[order].astype(np.int64))

    def since(self, before: _Busy) -> float:
        """Return the seconds that connections were busy for since another snapshot.

        One that wasn't in it counts if it can have been made since then.
        """
        if not len(self.key):
            return 0.0
        new = np.where(self.us <= (self.ts_ns - before.ts_ns) // 1000, self.us, 0)
        if not len(before.key):
            return float(new.sum()) / 1e6
        place = np.minimum(np.searchsorted(before.key, self.key), len(before.key) - 1)
        more = np.where(before.key[place] == self.key, self.us - before.us[place], new)
        return float(np.maximum(more, 0).sum()) / 1e6
