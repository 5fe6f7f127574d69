# SPDX-License-Identifier: Apache-2.0
"""CLOCK_MONOTONIC, which records are stamped with, against UTC, which may be stepped while a trace runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cwndtrace.errors import CwndtraceError

_OFFSETS: Final = Path("/proc/self/timens_offsets")
STEP_NS: Final = 1_000_000
"""A change of the offset that is no error of reading it. NTP's slewing moves both clocks alike, so there is no less."""


def utc_offset_ns() -> int:
    """What to add to CLOCK_MONOTONIC to get UTC, in nanoseconds; the tightest of a few readings."""
    return _reading()[1]


def _reading(times: int = 5) -> tuple[int, int]:
    """How long the tightest of so many readings took, and the offset that it found; both in nanoseconds."""
    best = (1 << 62, 0)
    for _ in range(times):
        before = time.monotonic_ns()
        wall = time.time_ns()
        after = time.monotonic_ns()
        best = min(best, (after - before, wall - (before + after) // 2))
    return best


def clock() -> dict[str, int]:
    """The two clocks now: ``mono_ns`` and ``utc_offset_ns``."""
    return {"mono_ns": time.monotonic_ns(), "utc_offset_ns": utc_offset_ns()}


class Segments:
    """The offset to UTC over a trace: constant but for steps of the wall clock, and for suspends, which stop
    CLOCK_MONOTONIC.

    ``all`` are the segments so far, each with the moment from which its offset holds. A step is seen by the next
    ``check``, and dated to the one before: in between, either offset may have held.
    """

    def __init__(self) -> None:
        mono_ns = time.monotonic_ns()
        # How exactly the offset that holds is known: a machine that stalls within each reading knows it badly.
        self._took, offset = _reading()
        self.all = [{"mono_ns": mono_ns, "utc_offset_ns": offset}]
        self._checked_ns = mono_ns

    @property
    def offset_ns(self) -> int:
        """The one that holds now."""
        return self.all[-1]["utc_offset_ns"]

    def check(self) -> int:
        """Look whether the offset has changed; by how many nanoseconds, 0 if it hasn't."""
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
        """The offsets that held at these moments of CLOCK_MONOTONIC."""
        starts = np.array([segment["mono_ns"] for segment in self.all[1:]], dtype=np.uint64)
        held = np.array([segment["utc_offset_ns"] for segment in self.all], dtype=np.int64)
        return held[np.searchsorted(starts, mono_ns.astype(np.uint64), side="right")]


def refuse_other_time() -> None:
    """Raise CwndtraceError in a time namespace whose CLOCK_MONOTONIC isn't what the kernel stamps records by."""
    try:
        lines = _OFFSETS.read_text(encoding="ascii").splitlines()
    except OSError:  # a kernel without time namespaces
        return
    for name, *offset in (line.split() for line in lines):
        if name == "monotonic" and any(int(part) for part in offset):
            raise CwndtraceError(
                f"this time namespace's clock is {offset[0]} s off the kernel's, which records are stamped by",
                "trace from outside of it: nsenter --time=/proc/1/ns/time",
            )
