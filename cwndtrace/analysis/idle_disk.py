# SPDX-License-Identifier: Apache-2.0
"""Block I/O that was in flight while connections were idle, by whose it was.

A request is in flight from its start to its end. Gaps of up to ``BRIDGE_NS`` between two requests count too: a thread
that waits for many short requests in turn needs about that long to wake up and to make the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from cwndtrace.analysis.cost import Bools, Ints

BRIDGE_NS: Final = 100_000
"""The longest gap between two requests that counts as in flight, ns."""

_LAST_PART: Final = 0.1
"""A sender that waited for block I/O sends soon after it ends: within this part of the time that it waited."""

_GOES_ON_NS: Final = 10_000_000
"""Block I/O that begins so soon after a send goes on: it isn't what the sender had waited for."""

_LAST_PID: Final = 1 << 22
"""PID_MAX_LIMIT of include/linux/threads.h."""

_BATCH: Final = 1 << 19
"""About how many requests are processed at once: few enough that their data nearly stays in the CPU's caches."""


def covered(begin: Ints, end: Ints, since: Ints, until: Ints, *, bridge: int = 0) -> Ints:
    """Return how much of each span [since, until] the intervals [begin, end] cover, in the unit of the arguments.

    A moment that several intervals cover counts once. Gaps of up to ``bridge`` between intervals count as covered.
    Intervals are in the order of their start and may overlap. Spans may overlap and come in any order.
    """
    busy = _Intervals(begin, end, bridge).busy
    return np.where(until > since, busy(until) - busy(since), 0)


class _Intervals:
    """Intervals in the order of their start; ``reach`` is the latest end up to each of them."""

    def __init__(self, begin: Ints, end: Ints, bridge: int) -> None:
        self.reach = np.maximum.accumulate(end)
        last = np.flatnonzero(begin[1:] > self.reach[:-1] + bridge)
        self._starts = np.append(begin[:1], begin[last + 1])
        # The last one is for moments before all intervals.
        self._ends = np.append(self.reach[last], [*self.reach[-1:], 0])
        self._before = np.append(0, np.cumsum(self._ends[:-1] - self._starts))

    def busy(self, moment: Ints) -> Ints:
        """Return how much is covered up to each moment."""
        index = np.searchsorted(self._starts, moment, side="right")
        still_to_come: Ints = np.maximum(self._ends[index - 1] - moment, 0)
        return self._before[index] - np.where(index > 0, still_to_come, 0)


@dataclass(frozen=True)
class Spans:
    """The idle time before each reset, in ns of CLOCK_MONOTONIC.

    From ``since`` to ``data`` the sender may have waited for its peer; from ``data`` to ``until`` it didn't.
    """

    since: Ints
    data: Ints
    until: Ints


@dataclass(frozen=True)
class InFlight:
    """Block I/O that was in flight in ``Spans``, with one item for each of them.

    The first two are us from ``since`` to ``data`` and from ``data`` to ``until``. ``late`` is True if some was shortly
    before ``until``, and ``goes_on`` if some was at ``until`` or shortly after. ``requests`` began after ``data``, and
    ``device`` is the one that was in flight for longest after it; empty where none was.
    """

    before_us: npt.NDArray[np.float64]
    own_us: npt.NDArray[np.float64]
    late: Bools
    goes_on: Bools
    requests: Ints
    device: npt.NDArray[np.object_]

    @classmethod
    def none(cls, number: int) -> InFlight:
        """Return no block I/O for this number of spans."""
        us, flags = np.zeros((2, number)), np.zeros((2, number), dtype=np.bool_)
        requests, device = np.zeros(number, np.int64), np.full(number, "", dtype=object)
        return cls(us[0], us[1], flags[0], flags[1], requests, device)

    def where(self, chosen: Bools, other: InFlight) -> InFlight:
        """Return these values where ``chosen``, and those of ``other`` elsewhere."""
        both = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return InFlight(*(np.where(chosen, mine, its) for mine, its in both))


class Submitters:
    """The block I/O of a capture by who submitted it.

    ``block_io`` has the columns of ``block_io.USED``, in order of ``start_ns``. ``column`` returns another column of
    the same rows: ``tid`` or ``cgroup_id``, which are only needed for some captures.
    """

    def __init__(self, block_io: pd.DataFrame, column: Callable[[str], npt.NDArray[np.integer]]) -> None:
        self._rows, self._column = block_io, column

    def threads(self, tid: Ints, spans: Spans) -> InFlight:
        """Return the block I/O of each thread; none for thread 0."""
        if not tid.any():
            return InFlight.none(len(tid))
        return self._in_flight(self._column("tid"), tid, spans)

    def processes(self, tgid: Ints, spans: Spans) -> InFlight:
        """Return the block I/O of each process; none for process 0."""
        return self._in_flight(self._rows["tgid"].to_numpy(), tgid, spans)

    def cgroups(self, cgroup: npt.NDArray[np.uint64], spans: Spans) -> InFlight:
        """Return the block I/O of each cgroup without that of the kernel's own threads; none for cgroup 0."""
        known = np.unique(cgroup[cgroup > 0])
        if not len(known):
            return InFlight.none(len(cgroup))
        of_row = self._column("cgroup_id")
        place = np.searchsorted(known, of_row)
        kernel = self._named("comm", lambda comm: comm.startswith(("kworker/", "jbd2/")))
        found = (np.append(known, 0)[place] == of_row) & ~kernel
        key = np.where(cgroup > 0, np.searchsorted(known, cgroup) + 1, 0)
        return self._in_flight(np.where(found, place + 1, 0), key, spans)

    def journals(self, tgid: Ints, spans: Spans) -> InFlight:
        """Return the block I/O for which a process may wait that has written to a device and waits for its journal.

        That are the journal's requests, flushes, and the writes of all these processes, on the device to which the
        process wrote most in its span; none where it wrote to none.
        """
        journal = self._named("comm", lambda comm: comm.startswith("jbd2/")) | self._named(
            "op", lambda op: op == "flush"
        )
        if not journal.any():
            return InFlight.none(len(tgid))
        writers = np.where(self._named("op", lambda op: op == "write"), self._rows["tgid"].to_numpy(), 0)
        disks = self._rows["device"].astype("category").cat
        number = {str(name): at for at, name in enumerate(disks.categories, start=1)} | {"": 0}
        key = np.array([number[name] for name in self._in_flight(writers, tgid, spans).device], dtype=np.int64)
        waits = journal | np.isin(writers, np.unique(tgid[key > 0]))
        return self._in_flight(np.where(waits, disks.codes.to_numpy().astype(np.int64) + 1, 0), key, spans)

    def _named(self, column: str, wanted: Callable[[str], bool]) -> Bools:
        """Return which rows have a wanted text in a column of few texts."""
        labels = self._rows[column].astype("category").cat
        chosen = np.array([wanted(str(label)) for label in labels.categories], dtype=np.bool_)
        return np.append(chosen, False)[labels.codes.to_numpy()]

    def _in_flight(self, owner: npt.NDArray[np.integer], key: Ints, spans: Spans) -> InFlight:
        """Return the block I/O of each span's owner: of the rows whose ``owner`` is the span's ``key``; none for 0."""
        found = InFlight.none(len(key))
        wanted = np.flatnonzero((key > 0) & (key <= _LAST_PID) & (spans.until > spans.since))
        seen = np.zeros(_LAST_PID + 2, dtype=np.bool_)
        seen[np.minimum(owner, _LAST_PID + 1)] = True
        wanted = wanted[seen[key[wanted]]]
        if not len(wanted):
            return found
        # Order by owner and then by time, so that the spans of an owner are contiguous.
        wanted = wanted[np.lexsort((spans.until[wanted], key[wanted]))]
        # The owners get numbers from 1; all others are 0.
        owners, first = np.unique(key[wanted], return_index=True)
        beyond = int(owners[-1]) + 1
        number = np.zeros(beyond + 1, dtype=np.min_scalar_type(len(owners)))
        number[owners] = np.arange(1, len(owners) + 1)
        group = number[np.minimum(owner, beyond)]
        # The rows are in order of time, and a stable sort by owner, by radix, keeps that order within each owner.
        rows = np.argsort(group, kind="stable")
        bounds = np.searchsorted(group, np.arange(1, len(owners) + 2), sorter=rows)
        ends = np.append(first, len(wanted))
        # One at a time would be slow for a hundred thousand owners, and all at once for the memory of millions of rows.
        for batch in _batches(np.diff(bounds)):
            here = wanted[ends[batch.start] : ends[batch.stop]]
            whose = np.repeat(np.arange(len(batch)), np.diff(ends[batch.start : batch.stop + 1]))
            at = np.repeat(np.arange(len(batch)), np.diff(bounds[batch.start : batch.stop + 1]))
            self._measure(found, rows[bounds[batch.start] : bounds[batch.stop]], at, here, whose, spans)
        return found

    def _measure(self, found: InFlight, rows: Ints, at: Ints, here: Ints, whose: Ints, spans: Spans) -> None:
        """Fill in ``found`` for the spans ``here``; ``at`` and ``whose`` number the owners of rows and of spans."""
        # These columns have a few bytes a row, and the whole of the frame doesn't fit into the CPU's caches.
        begin, end = (
            self._rows[name].to_numpy()[rows].astype(np.int64, copy=False) for name in ("start_ns", "done_ns")
        )
        # Each owner gets a stretch of one long time axis to itself, so that one call handles all of them.
        zero = min(int(begin.min()), int(spans.since[here].min()))
        stretch = max(int(end.max()), int(spans.until[here].max())) - zero + _GOES_ON_NS + 1
        begin, end = begin + (at * stretch - zero), end + (at * stretch - zero)
        since, data, until = (
            moments[here] + (whose * stretch - zero) for moments in (spans.since, spans.data, spans.until)
        )
        all_of_it = _Intervals(begin, end, BRIDGE_NS)
        upto_data = all_of_it.busy(data)
        found.before_us[here] = (upto_data - all_of_it.busy(since)) / 1000
        found.own_us[here] = (all_of_it.busy(until) - upto_data) / 1000
        begun = np.searchsorted(begin, until)
        found.requests[here] = begun - np.searchsorted(begin, data)
        last_end = np.where(begun > 0, all_of_it.reach[begun - 1], -1)
        next_begin = begin[np.minimum(begun, len(begin) - 1)]
        soon = (next_begin >= until) & (next_begin <= until + _GOES_ON_NS)
        found.late[here] = last_end > until - (until - since) * _LAST_PART
        found.goes_on[here] = soon | (last_end > until)
        disks = self._rows["device"].astype("category").cat
        code = disks.codes.to_numpy()[rows]
        used = np.flatnonzero(np.bincount(code, minlength=len(disks.categories))).tolist()
        best, names = np.zeros(len(here)), np.full(len(here), "", dtype=object)
        for disk in used:
            its = np.flatnonzero(code == disk)
            of_disk = _Intervals(begin[its], end[its], BRIDGE_NS) if len(used) > 1 else all_of_it
            time = of_disk.busy(until) - of_disk.busy(data)
            best, names = np.maximum(time, best), np.where(time > best, str(disks.categories[disk]), names)
        found.device[here] = names


def _batches(sizes: Ints) -> Iterator[range]:
    """Return ranges of indices into ``sizes``, each with a sum of about ``_BATCH`` or less, or with one index."""
    number = (np.cumsum(sizes) - 1) // _BATCH
    cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(sizes)]
    return (range(begin, end) for begin, end in pairwise(cuts))
