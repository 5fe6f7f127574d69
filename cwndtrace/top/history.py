# SPDX-License-Identifier: Apache-2.0
"""The windows of all connections over the last minutes, and the plot of one of them as text."""

from __future__ import annotations

from collections import deque
from typing import Any, Final

import numpy as np
import numpy.typing as npt

MOST_POINTS: Final = 300_000
"""The most points that are kept, those that came last: about 9 MB."""

_TYPE: Final = np.dtype([("cookie", "u8"), ("skaddr", "u8"), ("ts_ns", "i8"), ("cwnd", "i4")])
_Points = npt.NDArray[Any]
BARS: Final = " ▁▂▃▄▅▆▇█"
PLAIN_BARS: Final = " .:-=+*%#"
"""The same for terminals without these characters."""


class History:
    """The congestion window of each connection when it was seen, by socket cookie, or by socket where that is 0."""

    def __init__(self) -> None:
        self._chunks: deque[_Points] = deque()
        self._number = 0

    def add(self, **columns: npt.ArrayLike) -> None:
        """Add points with the columns cookie, skaddr, ts_ns (CLOCK_MONOTONIC) and cwnd (segments)."""
        lengths = [len(np.atleast_1d(column)) for column in columns.values()]
        points = np.zeros(max(lengths), _TYPE)
        for name, column in columns.items():
            points[name] = column
        self._chunks.append(points)
        self._number += len(points)
        while self._number - len(self._chunks[0]) >= MOST_POINTS:
            self._number -= len(self._chunks.popleft())

    def of(self, cookie: int, skaddr: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Return the times and the windows of one connection, in order of time."""
        if not self._chunks:
            return np.zeros(0, np.int64), np.zeros(0, np.int32)
        if len(self._chunks) > 1:
            self._chunks = deque([np.concatenate(self._chunks)])
        points = self._chunks[0]
        same = (points["cookie"] == 0) & (points["skaddr"] == skaddr) & (skaddr > 0)
        if cookie:
            same |= points["cookie"] == cookie
        mine = points[same]
        mine = mine[np.argsort(mine["ts_ns"], kind="stable")]
        return mine["ts_ns"], mine["cwnd"]


def spark(values: list[float], bars: str = BARS) -> str:
    """Return numbers as one line of bars, the largest as a full one, and 0 as an underscore."""
    most, steps = max(values, default=0.0), len(bars) - 1
    return "".join(bars[max(round(v / most * steps), 1)] if v > 0 else "_" for v in values)


def plot(
    times: npt.NDArray[np.int64],
    windows: npt.NDArray[np.int32],
    span: tuple[int, int],
    size: tuple[int, int],
    bars: str = BARS,
) -> list[str]:
    """Return a window over time as ``size`` (columns, rows) of text, the largest windows in the first row.

    ``span`` is from when to when, in ns. Each column is filled up to the smallest window in its time, and lighter up to
    the largest. A window holds until the next point.
    """
    columns, rows = size
    light = "░" if bars is BARS else "."
    low, high = _per_column(times, windows, span, columns)
    most = max(int(windows.max()), 1) if len(windows) else 1
    lines = []
    for row in range(rows - 1, -1, -1):
        line = ""
        for at in range(columns):
            if np.isnan(low[at]):
                line += " "
                continue
            full, any_part = (value / most * rows - row for value in (low[at], high[at]))
            if full >= 1:
                line += bars[-1]
            elif any_part >= 0.5 and any_part - full >= 0.5:
                line += light
            else:
                line += bars[max(round(full * (len(bars) - 1)), 0)] if full > 0 else " "
        lines.append(line)
    return lines


def _per_column(
    times: npt.NDArray[np.int64], windows: npt.NDArray[np.int32], span: tuple[int, int], columns: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the smallest and the largest window in each column, not a number before the first point."""
    edges = np.linspace(span[0], max(span[1], span[0] + 1), columns + 1)
    low, high = np.full(columns, np.nan), np.full(columns, np.nan)
    first = np.searchsorted(times, edges, side="left")
    for at in range(columns):
        inside = windows[first[at] : first[at + 1]]
        before = windows[first[at] - 1 : first[at]] if first[at] else windows[:0]
        seen = np.concatenate([before, inside])
        if len(seen):
            low[at], high[at] = seen.min(), seen.max()
    return low, high
