# SPDX-License-Identifier: Apache-2.0
"""Which sealed parts of a capture are to be deleted, so that it holds a window of the past."""

from __future__ import annotations

import heapq
import math
from typing import Final

from cwndtrace.errors import UsageError
from cwndtrace.format import nominal_size

NAMES: Final = frozenset({"workloads", "processes"})
"""The tables whose rows say what ids in other tables stand for."""

LEAST_KEEP_S: Final = 10.0
"""The shortest window, in seconds."""
LEAST_KEEP_BYTES: Final = 20_000_000
"""The smallest window, in bytes. Parts that aren't sealed yet aren't compressed, and may take a few megabytes each."""

_PARTS: Final = 10
"""A window is made of at least this many parts, so that it holds at most a tenth more than asked for."""
_REPEATS: Final = 4
_NAMES_S: Final = 1800.0
"""The shortest time for which rows of names are kept, in seconds, where only the size is limited."""


def window(keep_s: float | None, keep_bytes: int | None) -> Window | None:
    """Return the window of these limits, None for neither. Raises UsageError for one that is smaller than a part."""
    if keep_s is not None and keep_s < LEAST_KEEP_S:
        cause = f"--keep is {keep_s:g} s, and a window takes at least {LEAST_KEEP_S:g} s: parts are deleted as a whole"
        raise UsageError(cause, f"write --keep {LEAST_KEEP_S:g}s or more")
    if keep_bytes is not None and keep_bytes < LEAST_KEEP_BYTES:
        least = nominal_size(LEAST_KEEP_BYTES)
        cause = (
            f"--keep-size is {nominal_size(keep_bytes)}, and a window takes at least {least}: parts are deleted whole"
        )
        raise UsageError(cause, f"write --keep-size {least.replace(' ', '')} or more")
    if keep_s is None and keep_bytes is None:
        return None
    return Window(math.inf if keep_s is None else keep_s, math.inf if keep_bytes is None else keep_bytes)


class Window:
    """The sealed parts of a capture, of which those that leave the window are taken out, whole and in order.

    ``keep_s`` is its length in seconds, and ``keep_bytes`` the size of the whole capture, which it exceeds by the parts
    that aren't sealed; infinite where there is no limit. A part is as old as the youngest of its rows, by the time at
    which that came in. ``kept_from`` is the age of the youngest part taken out, in ns of CLOCK_MONOTONIC: all records
    of later moments are still there, since no record comes in before its moment. It is 0 as long as no part is.

    Rows of ``NAMES`` are old where what they name still lives, so the trace writes those rows again every ``repeat_s``
    seconds. Their parts are deleted once all records of that time are.
    """

    def __init__(self, keep_s: float = math.inf, keep_bytes: float = math.inf) -> None:
        self.keep_s = keep_s
        self.keep_bytes = keep_bytes
        self.kept_from = 0
        self._names_s = keep_s if math.isfinite(keep_s) else _NAMES_S
        self._bytes = 0
        self._records: list[tuple[int, str, int, int]] = []
        self._names: list[tuple[int, str, int, int]] = []

    @property
    def most_seal_s(self) -> float:
        """The age, in seconds, at which a part has to be sealed."""
        return self.keep_s / _PARTS

    @property
    def repeat_s(self) -> float:
        """The time after which names that are still in use are to be written again, in seconds."""
        return self._names_s / _REPEATS

    def add(self, table: str, number: int, size: int, arrived_ns: int) -> None:
        """Take note of a sealed part with ``size`` bytes, whose last row came in at ``arrived_ns``."""
        self._bytes += size
        heapq.heappush(self._names if table in NAMES else self._records, (arrived_ns, table, number, size))

    def resize(self, table: str, number: int, size: int) -> None:
        """Take note that a sealed part has another size, in bytes, than when it was added."""
        for parts in (self._records, self._names):
            for at, (arrived_ns, *part, before) in enumerate(parts):
                if part == [table, number]:
                    parts[at] = arrived_ns, table, number, size  # the heap's order doesn't depend on the size
                    self._bytes += size - before

    def overdue(self, now_ns: int, unsealed: int) -> list[tuple[str, int]]:
        """Take out the parts that have left the window; returns the table and number of each, in order by table.

        ``unsealed`` is the size in bytes of the parts that aren't sealed.
        """
        out = []
        horizon = now_ns - self.keep_s * 1e9
        while self._records and (self._records[0][0] < horizon or self._bytes + unsealed > self.keep_bytes):
            arrived, table, number, size = heapq.heappop(self._records)
            self._bytes -= size
            self.kept_from = max(self.kept_from, arrived + 1)
            out.append((table, number))
        unused = min(max(self.kept_from, horizon), now_ns - self._names_s * 1e9)
        while self._names and self._names[0][0] < unused:
            _, table, number, size = heapq.heappop(self._names)
            self._bytes -= size
            out.append((table, number))
        return out

    def due_ns(self) -> float:
        """Return the moment of CLOCK_MONOTONIC, in ns, at which the next part leaves the window by its age."""
        return (
            min((parts[0][0] for parts in (self._records, self._names) if parts), default=math.inf) + self.keep_s * 1e9
        )
