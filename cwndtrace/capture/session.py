# SPDX-License-Identifier: Apache-2.0
"""A tracing session: turns a source's raw records into batches, dates losses, and describes the trace."""

from __future__ import annotations

import math
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from cwndtrace.capture import priority
from cwndtrace.capture.clocks import Segments, clock
from cwndtrace.capture.connections import Snapshots
from cwndtrace.capture.names import NameLookups
from cwndtrace.capture.privsep import Helper
from cwndtrace.capture.source import TICK_SECONDS, Filters, RawRecords, Source
from cwndtrace.kernel import cgroups, facts, interfaces, netns
from cwndtrace.lazy import pa
from cwndtrace.records import arrow, layout

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Batch:
    """Records of one event that came in together, in the order in which the kernel delivered them."""

    event: str
    rows: pa.Table | arrow.TimedRecords

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def table(self) -> pa.Table:
        """Return the records as an Arrow table, which is built on first use."""
        return self.rows.to_arrow() if isinstance(self.rows, arrow.TimedRecords) else self.rows

    def head(self, most: int) -> Batch:
        """Return a batch of the first ``most`` records."""
        return self if len(self) <= most else Batch(self.event, self.rows.slice(0, most))

    def to_pandas(self) -> pd.DataFrame:
        """Return a DataFrame with one row per record, whose columns are those of ``arrow.schema(event)``.

        ``time`` is in UTC, and texts are made ``clean``. Numbers are as in the frames of a Trace.
        """
        from cwndtrace.records import frames  # it imports pandas, which a trace doesn't need otherwise

        return frames.frame(arrow.clean_texts(self.table), self.event)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return one dict per record, as ``--json`` prints them."""
        return arrow.table_to_dicts(self.event, self.table)


MOST_SPANS: Final = 1000


@dataclass
class Loss:
    """The number of records of one event that were lost between two moments of CLOCK_MONOTONIC."""

    event: str
    start_ns: int
    end_ns: int
    lost: int


@dataclass
class Tally:
    """Counts of the records kept and lost so far. ``lossy`` are the spans during which the loss counters moved.

    ``left_out`` counts the cgroups and sockets that a filter had no room for, see ``source.Counts``.
    """

    kept: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    unchanged: int = 0
    withdrawn: int = 0
    guessed: int = 0
    lossy: list[Loss] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def add(self, loss: Loss) -> None:
        """Add a span. Beyond MOST_SPANS per event, merge the two closest spans, since losses may go on for days."""
        self.lossy.append(loss)
        spans = [span for span in self.lossy if span.event == loss.event]
        if len(spans) > MOST_SPANS:
            before, after = min(pairwise(spans), key=lambda pair: pair[1].start_ns - pair[0].end_ns)
            before.end_ns, before.lost = after.end_ns, before.lost + after.lost
            self.lossy = [span for span in self.lossy if span is not after]

    def meta(self) -> dict[str, Any]:
        """Return the tally as a capture's meta.json holds it."""
        names = sorted({*self.kept, *self.lost})
        return {
            "counts": {n: {"kept": self.kept.get(n, 0), "lost": self.lost.get(n, 0)} for n in names},
            "unchanged": self.unchanged,
            "withdrawn": self.withdrawn,
            "guessed": self.guessed,
            "lossy": [asdict(loss) for loss in self.lossy],
            "left_out": self.left_out,
        }


class Session:
    """Turns a source's raw records into batches.

    Use it as a context manager: call ``step`` until done, then ``finish`` once. Both update ``tally``. All records and
    snapshots from before ``read_ns``, in ns of CLOCK_MONOTONIC, have been returned.
    """

    def __init__(self, source: Source, snapshots: Snapshots | None = None, helper: Helper | None = None) -> None:
        self.source = source
        self.helper = helper or Helper(Filters())
        self.tally = Tally(kept=dict.fromkeys(source.events, 0))
        self.clock = Segments()
        self.start = self.clock.all[0]
        source.begin(self.start["mono_ns"])
        self.snapshots = snapshots
        self.names = NameLookups(self.helper.names)
        self.spaces: dict[str, dict[str, Any]] = {}
        self._checked_ns = self.start["mono_ns"]
        self._tick_s = TICK_SECONDS
        self.read_ns = 0

    def step(self, timeout_s: float = TICK_SECONDS) -> list[Batch]:
        """Return the batches that came in, after waiting at most ``timeout_s`` seconds for the first."""
        raw = self.source.poll(timeout_s)
        self._tick_s = TICK_SECONDS if raw else min(2 * self._tick_s, self.source.longest_tick_s)
        self.clock.check()
        batches = self._batches(raw)
        read_ns: float = self.source.read_ns
        if self.snapshots is not None:
            read_ns = min(read_ns, self.snapshots.since_ns)  # first, because the snapshot may end meanwhile
            batches += self._looked_up("connections", self.snapshots.drain())
        self.read_ns = int(read_ns)
        self._see(batches)
        batches += self._named(self.names.drain(self.clock.offset_ns))
        self._count()
        return batches

    def turns(self, stop: Callable[[], bool], duration_s: float | None = None) -> Iterator[list[Batch]]:
        """Yield each step's batches until ``stop`` returns true, ``duration_s`` seconds are over or the source ends."""
        end = math.inf if duration_s is None else time.monotonic() + duration_s
        while not stop() and (left := end - time.monotonic()) > 0 and not self.source.exhausted():
            yield self.step(min(self._tick_s, left))

    def finish(self) -> list[Batch]:
        """Stop the source and return the last batches."""
        raw = self.source.stop()
        self.clock.check()
        batches = self._batches(raw)
        if self.snapshots is not None:
            batches += self._looked_up("connections", self.snapshots.finish())
        self._see(batches)
        batches += self._named(self.names.finish(self.clock.offset_ns))
        self._count()
        return batches

    def _batches(self, raw: list[RawRecords]) -> list[Batch]:
        by_event: dict[str, list[bytes]] = {}
        for name, data in raw:
            by_event.setdefault(name, []).append(data)
        batches = []
        for name, together in by_event.items():
            data = b"".join(together)
            records = layout.decode(name, data)
            if len(records):
                offsets = self.clock.offsets(records[layout.event(name).fields[0].name])
                batches.append(Batch(name, arrow.TimedRecords(name, data, offsets)))
                self.tally.kept[name] = self.tally.kept.get(name, 0) + len(records)
        return batches

    def _looked_up(self, name: str, tables: Iterable[pa.Table]) -> list[Batch]:
        batches = [Batch(name, table) for table in tables]
        rows = sum(len(batch) for batch in batches)
        self.tally.kept[name] = self.tally.kept.get(name, 0) + rows
        return batches

    def _see(self, batches: list[Batch]) -> None:
        for batch in batches:
            self.names.see(batch.rows)

    def _named(self, tables: dict[str, pa.Table]) -> list[Batch]:
        return [batch for name, table in tables.items() for batch in self._looked_up(name, [table])]

    @property
    def lacking(self) -> str | None:
        """Return a sentence that names the parts that the trace goes on without, and why; None where there are none."""
        if self.helper.lacking is None and self.snapshots is not None and self.snapshots.late:
            return "the last snapshot of connections took too long; the trace ends without it"
        return self.helper.lacking or self.names.lacking

    def meta(self) -> dict[str, Any]:
        """Return meta.json's entries on kept, lost and missing records, as of now."""
        return {**self.tally.meta(), "lacking": [line for line in (self.source.lacking, self.lacking) if line]}

    def _count(self) -> None:
        counts, now = self.source.counts(), time.monotonic_ns()
        for name, total in counts.lost.items():
            more = total - self.tally.lost.get(name, 0)
            self.tally.lost[name] = total
            if more <= 0:
                continue
            last = next((loss for loss in reversed(self.tally.lossy) if loss.event == name), None)
            if last is not None and last.end_ns == self._checked_ns:
                last.end_ns, last.lost = now, last.lost + more
            else:
                self.tally.add(Loss(name, self._checked_ns, now, more))
        self.tally.unchanged, self.tally.withdrawn = counts.unchanged, counts.withdrawn
        self.tally.guessed = counts.guessed
        self.tally.left_out = counts.left_out
        self._checked_ns = now

    def close(self) -> None:
        """Close the source and the helper."""
        self.source.close()
        self.helper.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def describe(session: Session, filters: Filters, version: str) -> dict[str, Any]:
    """Return meta.json's entries on the machine and the request, at the start. The writer adds those on itself.

    The calling thread is the one that empties the buffers.
    """
    here = netns.own()
    session.spaces = netns.settings()
    return {
        "version": version,
        "host": socket.gethostname(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "hz": facts.hz(),
        "command": sys.argv,
        "filters": {k: cgroups.shown(v) if k == "cgroup" else v for k, v in asdict(filters).items() if v is not None},
        "started": arrow.iso_time(session.start["mono_ns"] + session.start["utc_offset_ns"]),
        "ended": None,
        "clock": _clocks(session),
        "sysctls": session.spaces,
        "probes": session.source.probes,
        "block_probe": session.source.block_probe,
        "reader_nice": priority.nice(),
        "cgroups": cgroups.version(),
        "devices": devices(),
        "interfaces": {str(index): name for name, index in interfaces.by_name(here).items()},
        **session.meta(),
    }


def devices() -> dict[str, str]:
    """Return the present block devices, "major:minor" to name, from /proc/partitions."""
    rows = [line.split() for line in Path("/proc/partitions").read_text(encoding="ascii").splitlines()[2:]]
    return {f"{major}:{minor}": name for major, minor, _, name in rows}


def _clocks(session: Session, end: dict[str, int] | None = None) -> dict[str, Any]:
    return {"start": session.start, "end": end, "segments": session.clock.all}


def checkpoint(session: Session) -> dict[str, Any]:
    """Return the entries of meta.json that a killed trace couldn't write at its end: losses and wall clock segments."""
    return {"clock": _clocks(session), **session.meta()}


def ending(session: Session) -> dict[str, Any]:
    """Return the entries of meta.json that are written at the end, except the status."""
    spaces = session.helper.settings()  # first, because it takes time, and the end is that of the last records
    end = clock()
    return {
        "ended": arrow.iso_time(end["mono_ns"] + end["utc_offset_ns"]),
        "clock": _clocks(session, end),
        # Namespaces that appeared after the start have their settings at the end.
        "sysctls": {**spaces, **session.spaces},
        "sysctls_end": {inode: space | {"new": inode not in session.spaces} for inode, space in spaces.items()},
        **session.meta(),
    }
