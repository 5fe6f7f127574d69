# SPDX-License-Identifier: Apache-2.0
"""Block I/O that was in flight while connections were idle, by whose it was.

A request is in flight from its start to its end. Gaps of up to ``BRIDGE_NS`` between two requests count too: a thread
that waits for many short requests in turn needs about that long to wake up and to make the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from operator import itemgetter
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

MARGIN_NS: Final = _GOES_ON_NS + BRIDGE_NS
"""A request so near to a span still has a say in what was in flight in it."""

LAST_PID: Final = 1 << 22
"""PID_MAX_LIMIT of include/linux/threads.h."""

NEEDS: Final = ("start_ns", "done_ns", "tgid", "tid", "op", "comm", "device", "cgroup_id", "owner_cgroup_id", "flags")
"""The columns of ``block_io`` from which the block I/O in flight is found."""

REQ_SYNC: Final = 1 << 3
"""REQ_SYNC of include/linux/blk_types.h, without the operation's eight bits: a task waits for this write."""

BATCH: Final = 1 << 18
"""About how many requests are processed at once: few enough that their data nearly stays in the CPU's caches."""


def covered(begin: Ints, end: Ints, since: Ints, until: Ints, *, bridge: int = 0) -> Ints:
    """Return how much of each span [since, until] the intervals [begin, end] cover, in the unit of the arguments.

    A moment that several intervals cover counts once. Gaps of up to ``bridge`` between intervals count as covered.
    Intervals are in the order of their start and may overlap. Spans may overlap and come in any order.
    """
    busy = Intervals(begin, end, bridge).busy
    return np.where(until > since, busy(until) - busy(since), 0)


class Intervals:
    """Intervals in the order of their start; ``reach`` is the latest end up to each of them.

    ``starts`` and ``ends`` are those of the intervals that are left once overlapping ones are joined.
    """

    def __init__(self, begin: Ints, end: Ints, bridge: int) -> None:
        self.reach = np.maximum.accumulate(end)
        first = np.empty(len(begin), dtype=np.bool_)
        first[:1] = True
        np.greater(begin[1:] - bridge, self.reach[:-1], out=first[1:])
        self.starts = begin[first]
        # The last item is for moments before all intervals.
        self._ends = np.append(self.reach[np.append(first[1:], True)[: len(first)]], 0)
        self._before = np.append(0, np.cumsum(self.ends - self.starts))

    @property
    def ends(self) -> Ints:
        return self._ends[:-1]

    def busy(self, moment: Ints) -> Ints:
        """Return how much is covered up to each moment."""
        index = np.searchsorted(self.starts, moment, side="right")
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

    def of(self, at: Ints) -> Spans:
        """Return the spans ``at``."""
        return Spans(self.since[at], self.data[at], self.until[at])


@dataclass(frozen=True)
class InFlight:
    """Block I/O that was in flight in ``Spans``, with one item for each of them.

    The first two are us from ``since`` to ``data`` and from ``data`` to ``until``. ``late`` is True if some was shortly
    before ``until``, and ``goes_on`` if some was at ``until`` or shortly after. ``requests`` began after ``data``, and
    ``device`` is the one that was in flight for longest after it; empty where none was. ``last`` is the row of the
    request that ended last from ``since`` to ``until``, and ``last_ns`` its start. Both are -1 where none did, or where
    some was in flight for less than a quarter of the span, which is too little to have been waited for.
    """

    before_us: npt.NDArray[np.float64]
    own_us: npt.NDArray[np.float64]
    late: Bools
    goes_on: Bools
    requests: Ints
    device: npt.NDArray[np.object_]
    last: Ints
    last_ns: Ints

    @classmethod
    def none(cls, number: int) -> InFlight:
        """Return no block I/O for this number of spans."""
        us, flags = np.zeros((2, number)), np.zeros((2, number), dtype=np.bool_)
        requests, device = np.zeros(number, np.int64), np.full(number, "", dtype=object)
        return cls(us[0], us[1], flags[0], flags[1], requests, device, np.full(number, -1), np.full(number, -1))

    def where(self, chosen: Bools, other: InFlight) -> InFlight:
        """Return these values where ``chosen``, and those of ``other`` elsewhere."""
        both = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return InFlight(*(np.where(chosen, mine, its) for mine, its in both))

    def put(self, at: Ints, other: InFlight) -> None:
        """Replace the values of the spans ``at`` by those of ``other``."""
        for f in fields(self):
            getattr(self, f.name)[at] = getattr(other, f.name)


class Submitters:
    """Block I/O by who submitted it.

    ``block_io`` has the columns ``NEEDS``, in any order; ``row`` names its requests, by default their rows. Of requests
    that start at once, the one that comes first is taken for the earlier one.
    """

    def __init__(self, block_io: pd.DataFrame) -> None:
        self._rows = block_io
        self._names = block_io["row"].to_numpy() if "row" in block_io else np.arange(len(block_io))

    def threads(self, tid: Ints, spans: Spans) -> InFlight:
        """Return the block I/O of each thread; none for thread 0."""
        return self._in_flight(self._rows["tid"].to_numpy(), tid, spans)

    def processes(self, tgid: Ints, spans: Spans) -> InFlight:
        """Return the block I/O of each process; none for process 0."""
        return self._in_flight(self._rows["tgid"].to_numpy(), tgid, spans)

    def cgroups(self, cgroup: npt.NDArray[np.uint64], spans: Spans) -> tuple[InFlight, InFlight]:
        """Return the block I/O that each cgroup owns, first without write-back in the background; none for cgroup 0.

        What a kernel thread submits counts where the kernel charges another cgroup than the thread's.
        """
        known = np.unique(cgroup[cgroup > 0])
        if not len(known):
            none = InFlight.none(len(cgroup))
            return none, none
        submitter, owner = self._rows["cgroup_id"].to_numpy(), self._rows["owner_cgroup_id"].to_numpy()
        owner = np.where(owner > 0, owner, submitter)
        kernel = _named(self._rows, "comm", lambda comm: comm.startswith(("kworker/", "jbd2/"))) & (owner == submitter)
        place = np.searchsorted(known, owner)
        place = np.where((np.append(known, 0)[place] == owner) & ~kernel, place + 1, 0)
        key = np.where(cgroup > 0, np.searchsorted(known, cgroup) + 1, 0)
        background = (place > 0) & (owner != submitter) & _named(self._rows, "op", lambda op: op == "write")
        if background.any():
            background &= np.nan_to_num(self._rows["flags"].to_numpy()).astype(np.int64) & REQ_SYNC == 0
        waited = self._in_flight(np.where(background, 0, place), key, spans)
        return waited, self._in_flight(place, key, spans) if background.any() else waited

    def has_journal(self) -> bool:
        """Return whether there are requests of a file system's journal, or flushes."""
        return bool(of_journal(self._rows).any())

    def written(self, tgid: Ints, spans: Spans) -> npt.NDArray[np.object_]:
        """Return the device to which each process wrote most in its span; empty where it wrote to none."""
        return self._in_flight(self._writers(), tgid, spans).device

    def journals(self, device: npt.NDArray[np.object_], writers: Ints, spans: Spans) -> InFlight:
        """Return the block I/O for which a process may wait that has written to ``device`` and waits for its journal.

        That are the journal's requests, flushes, and the writes of the processes ``writers``, on this device; none for
        an empty one.
        """
        disks = self._rows["device"].astype("category").cat
        number = {str(name): at for at, name in enumerate(disks.categories, start=1)} | {"": 0}
        key = np.array([number.get(name, 0) for name in device], dtype=np.int64)
        waits = of_journal(self._rows) | np.isin(self._writers(), writers)
        return self._in_flight(np.where(waits, disks.codes.to_numpy().astype(np.int64) + 1, 0), key, spans)

    def _writers(self) -> Ints:
        """Return the process that submitted each write; 0 for other requests."""
        return np.where(_named(self._rows, "op", lambda op: op == "write"), self._rows["tgid"].to_numpy(np.int64), 0)

    def _in_flight(self, owner: npt.NDArray[np.integer], key: Ints, spans: Spans) -> InFlight:
        """Return the block I/O of each span's owner: of the rows whose ``owner`` is the span's ``key``; none for 0."""
        found = InFlight.none(len(key))
        wanted = np.flatnonzero((key > 0) & (key <= LAST_PID) & (spans.until > spans.since))
        if not len(wanted):
            return found
        beyond = int(key[wanted].max()) + 1
        owner = np.minimum(owner, beyond)
        seen = np.zeros(beyond + 1, dtype=np.bool_)
        seen[owner] = True
        wanted = wanted[seen[key[wanted]]]
        if not len(wanted):
            return found
        # Order by owner and then by time, so that the spans of an owner are contiguous.
        wanted = wanted[np.lexsort((spans.until[wanted], key[wanted]))]
        # The owners get numbers from 1; all others are 0.
        owners, first = np.unique(key[wanted], return_index=True)
        number = np.zeros(beyond + 1, dtype=np.min_scalar_type(len(owners)))
        number[owners] = np.arange(1, len(owners) + 1)
        group = number[owner]
        # A stable sort, by radix, keeps the order within each owner.
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
        offset = at * stretch - zero
        begin, end = begin + offset, end + offset
        if (begin[1:] < begin[:-1]).any():
            order = np.argsort(begin, kind="stable")
            moved = np.flatnonzero(order != np.arange(len(order)))  # few, as one rarely has two that overlap
            for column in (rows, at, begin, end):
                column[moved] = column[order[moved]]
        since, data, until = (
            moments[here] + (whose * stretch - zero) for moments in (spans.since, spans.data, spans.until)
        )
        all_of_it = Intervals(begin, end, BRIDGE_NS)
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
        waited = np.flatnonzero(4 * (all_of_it.busy(until) - all_of_it.busy(since)) >= until - since)
        if len(waited):
            by_end = np.argsort(end, kind="stable")
            ended = by_end[np.searchsorted(end, until[waited], side="right", sorter=by_end) - 1]
            # Before all ends the index is -1, and that request ended after the span.
            its_own = (at[ended] == whose[waited]) & (end[ended] > since[waited]) & (end[ended] <= until[waited])
            found.last[here[waited]] = np.where(its_own, self._names[rows[ended]], -1)
            found.last_ns[here[waited]] = np.where(its_own, begin[ended] - (whose[waited] * stretch - zero), -1)
        disks = self._rows["device"].astype("category").cat
        code = disks.codes.to_numpy()[rows]
        best, names = np.zeros(len(here)), np.full(len(here), "", dtype=object)
        # Of two that were in flight for equally long it is always the same one, in whatever order they came.
        for number, disk in sorted(enumerate(map(str, disks.categories)), key=itemgetter(1)):
            its = np.flatnonzero(code == number)
            if not len(its):
                continue
            of_disk = Intervals(begin[its], end[its], BRIDGE_NS) if len(its) < len(code) else all_of_it
            time = of_disk.busy(until) - of_disk.busy(data)
            best, names = np.maximum(time, best), np.where(time > best, disk, names)
        found.device[here] = names


def of_journal(requests: pd.DataFrame) -> Bools:
    """Return which requests are those of a file system's journal, or flushes."""
    return _named(requests, "comm", lambda comm: comm.startswith("jbd2/")) | _named(
        requests, "op", lambda op: op == "flush"
    )


def _named(rows: pd.DataFrame, column: str, wanted: Callable[[str], bool]) -> Bools:
    """Return which rows have a wanted text in a column of few texts."""
    labels = rows[column].astype("category").cat
    chosen = np.array([wanted(str(label)) for label in labels.categories], dtype=np.bool_)
    return np.append(chosen, False)[labels.codes.to_numpy()] if chosen.any() else np.zeros(len(rows), dtype=np.bool_)


def _batches(sizes: Ints) -> Iterator[range]:
    """Return ranges of indices into ``sizes``, each with a sum of about ``BATCH`` or less, or with one index."""
    number = (np.cumsum(sizes) - 1) // BATCH
    cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(sizes)]
    return (range(begin, end) for begin, end in pairwise(cuts))
