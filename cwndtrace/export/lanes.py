# SPDX-License-Identifier: Apache-2.0
"""Spans that overlap, side by side: lanes on which none overlap, and how many there are at each moment."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Final

import numpy as np

from cwndtrace.analysis.cost import Ints

_NONE: Final = np.zeros(0, np.int64)


class Lanes:
    """Lanes for spans. On each lane a span begins when all earlier ones have ended, or later.

    Batches may overlap in time, but then more lanes may be needed. Memory is that of one number for each lane.
    """

    def __init__(self) -> None:
        self._ends: list[int] = []

    def place(self, start_ns: Ints, end_ns: Ints) -> Ints:
        """Return the lane of each span of a batch, numbered from 0: the first that is free.

        The batch is in order of the starts and, where these are equal, of the ends.
        """
        out = []
        busy = [(end, lane) for lane, end in enumerate(self._ends)]
        heapq.heapify(busy)
        free: list[int] = []
        for start, end in zip(start_ns.tolist(), end_ns.tolist(), strict=True):
            while busy and busy[0][0] <= start:
                heapq.heappush(free, heapq.heappop(busy)[1])
            if free:
                lane = heapq.heappop(free)
                self._ends[lane] = end
            else:
                lane = len(self._ends)
                self._ends.append(end)
            heapq.heappush(busy, (end, lane))
            out.append(lane)
        return np.array(out, dtype=np.int64)


class Depth:
    """How many spans there are at each moment. Spans come in batches, which may overlap in time.

    Memory is that of the begins and ends that a later batch may still come before.
    """

    def __init__(self) -> None:
        self._times, self._steps, self._depth = _NONE, _NONE, 0

    def add(self, start_ns: Ints, end_ns: Ints, until_ns: int) -> Iterator[tuple[int, int]]:
        """Take a batch, and yield each moment before ``until_ns`` at which the depth changes, with the new depth.

        All later batches begin at ``until_ns`` or later.
        """
        times = np.concatenate([self._times, start_ns, end_ns])
        steps = np.concatenate([self._steps, np.ones_like(start_ns), -np.ones_like(end_ns)])
        ready = times < until_ns
        self._times, self._steps = times[~ready], steps[~ready]
        moments, place = np.unique(times[ready], return_inverse=True)
        change = np.bincount(place, steps[ready], len(moments)).astype(np.int64)
        depth = self._depth + np.cumsum(change)
        self._depth = int(depth[-1]) if len(depth) else self._depth
        differs = change != 0
        yield from zip(moments[differs].tolist(), depth[differs].tolist(), strict=True)
