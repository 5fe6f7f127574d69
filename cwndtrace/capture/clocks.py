# SPDX-License-Identifier: Apache-2.0
"""The offset from CLOCK_MONOTONIC, which stamps the records, to UTC, which may be stepped while a trace runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cwndtrace.errors import CwndtraceError

_OFFSETS: Final = Path("/proc/self/timens_offsets")
STEP_NS: Final = 1_000_000
"""The least change of the offset, in ns, that counts as a step and not as an error of reading the clocks.

NTP's slewing moves both clocks alike, so it doesn't change the offset.
"""


def utc_offset_ns() -> int:
    """Return what to add to CLOCK_MONOTONIC to get UTC, in nanoseconds, from the tightest of five readings."""
    return _reading()[1]


def _reading(times: int = 5) -> tuple[int, int]:
    """Return the duration of the tightest of so many readings, and the offset that it found; both in nanoseconds."""
    best = (1 << 62, 0)
    for _ in range(times):
        before = time.monotonic_ns()
        wall = time.time_ns()
        after = time.monotonic_ns()
        best = min(best, (after - before, wall - (before + after) // 2))
    return best


def clock() -> dict[str, int]:
    """Return the two clocks now, as ``mono_ns`` and ``utc_offset_ns``."""
    return {"mono_ns": time.monotonic_ns(), "utc_offset_ns": utc_offset_ns()}


class Segments:
    """The offset to UTC over a trace, as segments with a constant offset.

    A step of the wall clock begins a new segment, and so does a suspend, which stops CLOCK_MONOTONIC. ``all`` holds the
    segments so far, each with the moment from which its offset holds. The first ``check`` after a step finds it, and
    dates it to the ``check`` before; in between, either offset may have held.
    """

    def __init__(self) -> None:
        mono_ns = time.monotonic_ns()
        # The reading's duration limits how exact the offset is: on a machine that stalls in each reading it is long.
        self._took, offset = _reading()
        self.all = [{"mono_ns": mono_ns, "utc_offset_ns": offset}]
        self._checked_ns = mono_ns

    @property
    def offset_ns(self) -> int:
        """Return the offset that holds now, in nanoseconds."""
        return self.all[-1]["utc_offset_ns"]

    def check(self) -> int:
        """Read the clocks, and return by how many nanoseconds the offset has changed, 0 if it hasn't."""
        now = time.monotonic_ns()
        took, offset = _reading(1)
        step = offset - self.offset_ns
        if abs(step) < STEP_NS + took + self._took:
            step = 0
        else:
            self._took, offset = _reading()
            step = offset - self.offset_ns
            self.all.append({"mono_ns": self._checked_ns, "utc_offset_ns": offset})
        self._checked_ns = now
        return step

    def offsets(self, mono_ns: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Return the offsets, in nanoseconds, that held at these moments of CLOCK_MONOTONIC."""
        starts = np.array([segment["mono_ns"] for segment in self.all[1:]], dtype=np.uint64)
        held = np.array([segment["utc_offset_ns"] for segment in self.all], dtype=np.int64)
        return held[np.searchsorted(starts, mono_ns.astype(np.uint64), side="right")]


def refuse_other_time() -> None:
    """Raise CwndtraceError in a time namespace whose CLOCK_MONOTONIC isn't the one that stamps the records."""
    try:
        lines = _OFFSETS.read_text(encoding="ascii").splitlines()
    except OSError:  # a kernel without time namespaces
        return
    for name, *offset in (line.split() for line in lines):
        if name == "monotonic" and any(int(part) for part in offset):
            raise CwndtraceError(
                f"this time namespace's clock is {offset[0]} s off the kernel's, which stamps the records",
                "trace from outside it: nsenter --time=/proc/1/ns/time",
            )
