# SPDX-License-Identifier: Apache-2.0
"""A source that yields the records that a test gives it, the third implementation of the protocol Source.

``session_of`` makes a session that has the records of its source and nothing of the machine that tests run on.
"""

from __future__ import annotations

from copy import deepcopy

from cwndtrace.capture.privsep import Helper
from cwndtrace.capture.session import Session
from cwndtrace.capture.source import TICK_SECONDS, Counts, Filters, RawRecords, Source
from cwndtrace.privileges import User


class FakeSource:
    """A source whose polls return the items of ``polls`` in order; ``count`` holds the counters, which tests set.

    ``waits`` are the times, in seconds, that polls were to wait for records.
    """

    events: tuple[str, ...] = ("cwnd_reset", "block_io")

    def __init__(self, *polls: list[RawRecords], last: list[RawRecords] | None = None) -> None:
        self.probes: dict[str, str | None] = {"idle": "sendmsg", "rto_loss": None, "app_limited": None}
        self.tried: dict[str, dict[str, str]] = {"idle": {"fentry": "refused"}}
        self.block_probe: str | None = "block_io_start"
        self.lacking: str | None = None
        self.longest_tick_s = TICK_SECONDS
        self.read_ns = 0
        self.count = Counts(lost=dict.fromkeys(self.events, 0))
        self.closed = False
        self.begun_ns = 0
        self.waits: list[float] = []
        self._polls = list(polls)
        self._last = last or []

    def begin(self, mono_ns: int) -> None:
        self.begun_ns = mono_ns

    def poll(self, timeout_s: float) -> list[RawRecords]:
        self.waits.append(timeout_s)
        return self._polls.pop(0) if self._polls else []

    def counts(self) -> Counts:
        return deepcopy(self.count)

    def exhausted(self) -> bool:
        return not self._polls

    def capabilities_needed(self, user: User | None) -> frozenset[int]:  # noqa: ARG002
        return frozenset()

    def stop(self) -> list[RawRecords]:
        return self._last

    def close(self) -> None:
        self.closed = True


class NoNames(Helper):
    """A helper that looks up no names: which workloads and processes this machine has is not for a test to know."""

    def names(self, groups: list[int], pids: list[int]) -> None:  # noqa: ARG002
        return None


def session_of(source: Source) -> Session:
    """Return a session whose batches are those of its source alone."""
    return Session(source, helper=NoNames(Filters()))
