# SPDX-License-Identifier: Apache-2.0
"""The block requests that may have been in flight before each reset, a window of time after the other.

A capture's parts come nearly in the order of time. Once all that follow begin after a reset, nothing that was in flight
for it is still to come, so that only a few requests are in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from cwndtrace.analysis import threads
from cwndtrace.analysis.block_io import joined
from cwndtrace.analysis.cost import Bools, Ints
from cwndtrace.analysis.idle_disk import BATCH, LAST_PID, MARGIN_NS, NEEDS, Intervals, Submitters, of_journal

_NEVER: Final = np.iinfo(np.int64).max

Batches = Iterable[tuple[pd.DataFrame, int | None]]
"""Requests as the trace wrote them, with ``row``, their number in this order. The integer is the least ``start_ns`` of
all that follow, as far as is known; it may be wrong."""


class Windows(Protocol):
    """Block requests, of which those can be had that matter to some resets."""

    def of(self, wanted: Bools) -> Iterator[tuple[Ints, Submitters]]:
        """Yield some resets and all requests that may have been in flight for them, until all wanted ones had a turn.

        A reset that comes again replaces what was found for it before.
        """
        ...

    def rows(self, names: Ints, starts: Ints, /) -> Ints:
        """Return the rows of requests in ``block_io``, by their names and their ``start_ns``."""
        ...


class Whole:
    """All requests at once."""

    def __init__(self, block_io: pd.DataFrame) -> None:
        self._block_io = block_io

    def of(self, wanted: Bools) -> Iterator[tuple[Ints, Submitters]]:
        """Yield all wanted resets."""
        yield np.flatnonzero(wanted), Submitters(self._block_io)

    def rows(self, names: Ints, _starts: Ints, /) -> Ints:
        """Return the names, which are the rows or the caller's."""
        return names


class Parts:
    """The requests of a capture, read part by part, once for each call.

    ``batches`` reads these columns and ``row``, and ``starts`` yields ``start_ns`` of the same requests in order. With
    ``roomy`` another thread reads on while the caller works on what it got.
    """

    def __init__(
        self,
        resets: pd.DataFrame,
        batches: Callable[[tuple[str, ...]], Batches],
        starts: Callable[[], Iterable[Ints]],
        *,
        roomy: bool = False,
    ) -> None:
        self._resets, self._batches, self._starts = resets, batches, starts
        self._until = resets["ts_ns"].to_numpy(np.int64)
        self._since = self._until - resets["idle_us"].to_numpy(np.int64) * 1000
        self._roomy, self._trusting = roomy, True

    def of(self, wanted: Bools) -> Iterator[tuple[Ints, Submitters]]:
        """Yield the wanted resets in order of time, with requests as they were written."""
        try:
            yield from self._in_turn(wanted)
        except _NotSo:
            self._trusting = False
            yield from self._in_turn(wanted)

    def _in_turn(self, wanted: Bools) -> Iterator[tuple[Ints, Submitters]]:
        found = self._windows(wanted)
        return threads.ahead(found) if self._roomy else found

    def rows(self, names: Ints, starts: Ints, /) -> Ints:
        """Return how many requests are before each one in order of ``start_ns``; ties are as they were written."""
        return ranks(self._starts(), names, starts) if len(names) else names

    def _windows(self, wanted: Bools) -> Iterator[tuple[Ints, Submitters]]:
        left = np.flatnonzero(wanted)
        left = left[np.argsort(self._until[left], kind="stable")]
        # For each reset the begin of the first span that isn't over once it has had its turn.
        first = np.minimum.accumulate(self._since[left][::-1])[::-1]
        relevant = Relevant(self._resets[wanted])
        held: list[pd.DataFrame] = []
        rows, promised, limit = 0, 0, BATCH
        columns = ("row", *relevant.needs)
        for frame, rest in self._batches(relevant.needs):
            if len(frame) and int(frame["start_ns"].min()) < promised:
                raise _NotSo
            promised = rest if rest is not None and self._trusting else 0
            keep = relevant(frame)
            held.append(frame if keep.all() else frame[keep])
            rows += len(held[-1])
            ready = int(np.searchsorted(self._until[left], promised - MARGIN_NS)) if promised < _NEVER else 0
            if rows < limit or not ready:
                continue
            together = joined(held, columns, rows, in_order=False)
            yield left[:ready], Submitters(together)
            left, first = left[ready:], first[ready:]
            if not len(left):
                return
            together = together[together["done_ns"].to_numpy(np.int64) >= first[0] - MARGIN_NS]
            held, rows = [together], len(together)
            # What is held for a long idle time isn't copied again for each part.
            limit = max(BATCH, 2 * rows)
        if len(left) and held:
            yield left, Submitters(joined(held, columns, rows, in_order=False))


class _NotSo(Exception):
    """A part has an earlier request than its footer says."""


class Relevant:
    """A filter of block requests: it keeps those that may have been in flight for one of these ``resets``.

    Idle causes that are found from what it keeps are the same as from all requests.
    """

    def __init__(self, resets: pd.DataFrame) -> None:
        idle = resets[resets["reason"].astype(str) == "idle"]
        until = idle["ts_ns"].to_numpy(np.int64)
        since = until - idle["idle_us"].to_numpy(np.int64) * 1000 - MARGIN_NS
        order = np.argsort(since, kind="stable")
        spans = Intervals(since[order], until[order] + MARGIN_NS, 0)
        self._begins, self._ends = spans.starts, spans.ends
        self._pids = {name: _table(idle[name].to_numpy()) for name in ("tid", "tgid")}
        cgroup = idle["cgroup_id"].to_numpy(np.uint64)
        self._cgroups = np.unique(cgroup[cgroup > 0])

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns of ``NEEDS`` that say anything about these resets."""
        return NEEDS if len(self._cgroups) else NEEDS[: NEEDS.index("cgroup_id")]

    def __call__(self, requests: pd.DataFrame) -> Bools:
        """Return which of ``requests`` it keeps. They have the columns that it ``needs``."""
        begin, end = (requests[name].to_numpy(np.int64) for name in ("start_ns", "done_ns"))
        span = np.searchsorted(self._ends, begin)
        kept: Bools = np.append(self._begins, _NEVER)[span] <= end
        whose = np.zeros(len(requests), dtype=np.bool_)
        for name, wanted in self._pids.items():
            whose |= wanted[np.minimum(requests[name].to_numpy(), len(wanted) - 1)]
        if len(self._cgroups):
            whose |= np.isin(requests["cgroup_id"].to_numpy(np.uint64), self._cgroups)
            owner = np.nan_to_num(requests["owner_cgroup_id"].to_numpy()).astype(np.uint64)
            whose |= np.isin(owner, self._cgroups)
        return kept & (whose | of_journal(requests))


def _table(pids: npt.NDArray[Any]) -> Bools:
    """Return whether each pid is one of these, but for 0. The last item is for all that are greater."""
    known = np.unique(pids[(pids > 0) & (pids <= LAST_PID)])
    table = np.zeros(int(known.max(initial=0)) + 2, dtype=np.bool_)
    table[known] = True
    return table


def ranks(starts: Iterable[Ints], numbers: Ints, times: Ints) -> Ints:
    """Return the places that requests have in order of their start, by their numbers as they come in ``starts``.

    ``times`` are their starts. Of requests that start at once, the one that comes first is before the others.
    """
    found = np.zeros(len(numbers), dtype=np.int64)
    before = 0
    for some in starts:
        ordered = np.sort(some)
        found += np.searchsorted(ordered, times)
        ties = np.searchsorted(ordered, times, side="right") - np.searchsorted(ordered, times)
        later = numbers - before
        found += np.where(later >= len(some), ties, 0)
        for at in np.flatnonzero((ties > 1) & (later > 0) & (later < len(some))).tolist():
            found[at] += np.count_nonzero(some[: later[at]] == times[at])
        before += len(some)
    return found
