# SPDX-License-Identifier: Apache-2.0
"""What a source of records is, and what can be asked of it. Knows nothing of BPF."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from cwndtrace.privileges import User

TICK_SECONDS: Final = 0.15
"""How long what no CPU hands over by itself may wait; less than the shortest RTO, for the BPF program ``refresh``."""

RawRecords = tuple[str, bytes]
"""An event's name, and whole records of that event as the kernel wrote them, one after the other."""


@dataclass(frozen=True)
class Filters:
    """What to trace; everything that is None lets all through. All of it is decided in the kernel.

    ``ifindex`` counts in the namespace ``netns`` (an inode), so it never comes without; ``netns_name`` is for people.
    ``cgroup`` is a folder of cgroup v2; its descendants belong to it. ``min_idle_us`` applies to idle resets alone.
    """

    ifindex: int | None = None
    netns: int | None = None
    netns_name: str | None = None
    pid: int | None = None
    port: int | None = None
    family: int | None = None
    cgroup: Path | None = None
    min_idle_us: int | None = None


@dataclass
class Counts:
    """Totals since the start, counted in the kernel.

    ``lost`` are records that could not be kept, per event; ``unchanged`` idle restarts that left the window
    as it was; ``withdrawn`` restarts that were due and didn't happen. ``left_out`` are the most cgroups and sockets at
    a time of what was asked for that the filters had no room for, by kind.
    """

    lost: dict[str, int] = field(default_factory=dict)
    unchanged: int = 0
    withdrawn: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


class Source(Protocol):
    """Something that yields raw records: the running kernel (capture.live) or a recording (capture.replay)."""

    probes: dict[str, str | None]
    tried: dict[str, dict[str, str]]
    events: tuple[str, ...]

    def begin(self, mono_ns: int) -> None:
        """Tracing begins at this moment of CLOCK_MONOTONIC, for all events: nothing is given or counted from before."""

    def poll(self, timeout_s: float) -> list[RawRecords]:
        """What came in, waiting at most ``timeout_s`` seconds for the first of it."""

    def counts(self) -> Counts:
        """The counters now."""

    def exhausted(self) -> bool:
        """Whether nothing can come any more."""

    def power_needed(self, user: User | None) -> frozenset[int]:
        """The least capabilities (numbers) with which ``user`` can go on; None is this process's own user."""

    def stop(self) -> list[RawRecords]:
        """Stop tracing and return all that was still under way. ``counts`` stays callable."""

    def close(self) -> None:
        """Free everything; nothing else may be called afterwards."""
