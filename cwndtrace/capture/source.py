# SPDX-License-Identifier: Apache-2.0
"""The interface of a source of records, with its filters and counters. This module doesn't use BPF."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from cwndtrace.names.select import Wanted
from cwndtrace.privileges import User

TICK_SECONDS: Final = 0.15
"""The period of the BPF programs that run on demand, which bounds how long a record waits in a CPU's buffer.

It is less than the shortest RTO, as the BPF program ``refresh`` needs.
"""

IDLE_TICK_SECONDS: Final = 0.45
"""The same while no records come, since each turn of the loop costs half a millisecond of CPU time."""

RawRecords = tuple[str, bytes]
"""An event's name, and complete records of that event as the kernel wrote them, one after the other."""


@dataclass(frozen=True)
class Filters:
    """The filters of a trace, which the kernel applies. A filter that is None lets everything through.

    ``ifindex`` is an index in the namespace ``netns`` (an inode), so it is never set without ``netns``. ``netns_name``
    is for messages. ``cgroup`` is a folder of cgroup v2, and includes its descendants. ``container``, ``pod`` and
    ``unit`` are names, as in ``names.select``; at most one of these four is set. ``min_idle_us`` applies to resets
    only.
    """

    ifindex: int | None = None
    netns: int | None = None
    netns_name: str | None = None
    pid: int | None = None
    port: int | None = None
    family: int | None = None
    cgroup: Path | None = None
    container: str | None = None
    pod: str | None = None
    unit: str | None = None
    min_idle_us: int | None = None

    @property
    def workload(self) -> Wanted | None:
        """What ``container``, ``pod`` or ``unit`` names; None where none is set."""
        named = {"container": self.container, "pod": self.pod, "unit": self.unit}
        return next((Wanted(kind, text) for kind, text in named.items() if text is not None), None)

    @property
    def by_cgroup(self) -> bool:
        """Whether a set of cgroups is traced."""
        return self.cgroup is not None or self.workload is not None


@dataclass
class Counts:
    """Totals since the start, counted in the kernel.

    ``lost`` counts the records that could not be kept, by event; ``unchanged`` the restarts that left the window as it
    was; ``withdrawn`` the restarts that were due and didn't happen. ``guessed`` counts the block requests that are
    charged to the task that queued them, because the kernel didn't show who submitted them. ``left_out`` is the largest
    number, at one time, of "cgroups" and of "sockets" that matched the filters and that their maps had no room for.
    """

    lost: dict[str, int] = field(default_factory=dict)
    unchanged: int = 0
    withdrawn: int = 0
    guessed: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


class Source(Protocol):
    """A source of raw records: the running kernel (capture.live) or a recording (tests/harness/replay.py).

    ``block_probe`` is the tracepoint at which block requests begin, None where block I/O isn't traced. ``lacking`` says
    what the trace goes on without, and why; None if that is nothing. ``longest_tick_s`` is the longest time, in
    seconds, that may pass between two calls of ``poll``. ``poll`` has returned all records that were made before
    ``read_ns``, in nanoseconds of CLOCK_MONOTONIC.
    """

    probes: dict[str, str | None]
    tried: dict[str, dict[str, str]]
    events: tuple[str, ...]
    block_probe: str | None
    lacking: str | None
    longest_tick_s: float
    read_ns: int

    def begin(self, mono_ns: int) -> None:
        """Leave out records and counts from before ``mono_ns``, in nanoseconds of CLOCK_MONOTONIC, for all events."""

    def poll(self, timeout_s: float) -> list[RawRecords]:
        """Return the records that came in, after waiting at most ``timeout_s`` seconds for the first."""

    def counts(self) -> Counts:
        """Return the counters."""

    def exhausted(self) -> bool:
        """Return whether no more records can come."""

    def capabilities_needed(self, user: User | None) -> frozenset[int]:
        """Return the fewest capabilities (numbers) with which ``user`` can go on; None is this process's own user."""

    def stop(self) -> list[RawRecords]:
        """Stop tracing and return all records that were still under way. ``counts`` stays callable."""

    def close(self) -> None:
        """Free everything. No other method may be called afterwards."""
