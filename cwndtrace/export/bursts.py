# SPDX-License-Identifier: Apache-2.0
"""The packets of a connection around its resets: which one may be the first after a reset, by time and number."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Self

from cwndtrace.export.segment import SYN, TcpSegment

FLOOR_US: Final = 10_000
"""The least time after a reset in which its packet is looked for, for round trips that are shorter than a delay of the
scheduler."""

EARLY_NS: Final = 100_000
"""By how much a packet may seem to be older than a reset before it: the clocks of both are read at other moments."""

_MOST_PLACES: Final = 64
"""The most interfaces on which the packets of one connection, or of one reset, are told apart."""


class Spot(NamedTuple):
    """Where a packet was seen: the number of the section, of its interface, and what the packet itself names."""

    section: int
    interface: int
    device: int


class Candidate(NamedTuple):
    """A packet that may be the first one after a reset.

    ``number`` is that of its block. ``named`` says that its interface is known to be the reset's, ``whole`` that
    nothing before it is known to be missing, ``clear`` that the clocks tell that it came later than the reset.
    """

    number: int
    seq: int
    place: Spot
    order: str
    bare: bool
    named: bool
    whole: bool
    clear: bool


@dataclass
class Reset:
    """A reset by its row, the span of UTC in which its packet is, and the packets that may be it, one a place.

    From ``clear_ns`` on, a packet is certainly a later one. ``index`` and ``device`` are the number and the name of the
    socket's interface in cwndtrace's own network namespace; 0 and empty for other namespaces.
    """

    row: Any
    reason: str
    at_ns: int
    start_ns: int
    clear_ns: int
    end_ns: int
    index: int
    device: str
    found: dict[Spot, Candidate] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Any, index: int, device: str) -> Self:
        """Return a reset by its row of ``Trace.verdicts`` with ``at_ns``, its time in UTC."""
        at_ns, start_ns = int(row.at_ns), int(row.at_ns) - EARLY_NS
        # Before these two nothing is sent for an RTO, and what a timeout sends again is known by its number.
        clear_ns = start_ns if row.reason in ("idle", "rto_loss") else at_ns
        if row.reason == "app_limited":  # the window falls right after packets that were sent
            clear_ns = at_ns + EARLY_NS
        end_ns = at_ns + 1000 * max(FLOOR_US, int(row.srtt_us))
        return cls(row.Index, row.reason, at_ns, start_ns, clear_ns, end_ns, index, device)

    def named(self, place: Spot, name: str) -> bool:
        """Return whether a packet's place, an interface of the file with this name, is the reset's interface."""
        if place.device and self.index:
            return place.device == self.index
        return bool(self.device) and self.device == name


@dataclass
class State:
    """The next sequence number of a connection: by what it sent, and by what its peer acknowledged."""

    sent: int | None = None
    acked: int | None = None

    def send(self, seen: TcpSegment) -> None:
        """Take note of a segment that was sent."""
        if seen.flags & SYN:
            self.sent, self.acked = seen.next_seq, None
        else:
            self.sent = _later(self.sent, seen.next_seq)

    def acknowledge(self, number: int) -> None:
        """Take note of what the peer acknowledged."""
        self.acked = _later(self.acked, number)

    def continues(self, reason: str, seen: TcpSegment) -> bool:
        """Return false if a segment can't be the first after a reset, by what was sent and acknowledged before."""
        if reason == "rto_loss":  # the first segment that isn't acknowledged is sent again
            return self.acked is None or seen.seq == self.acked
        # The file may lack what was sent, or the ACK of it.
        known = self.acked if self.sent is None else _later(self.acked, self.sent)
        if known is None:
            return True
        # After idle time there is nothing to send again; else that may be what is sent first.
        return seen.seq == known if reason == "idle" else _later(seen.seq, known) == known


@dataclass
class Flow:
    """A connection's addresses and ports: the resets with them by network namespace, and its state at each place."""

    resets: dict[int, list[Reset]] = field(default_factory=dict)
    states: dict[Spot, State] = field(default_factory=dict)

    def add(self, netns: int, reset: Reset) -> None:
        """Add a reset that is later than all others of its namespace."""
        resets = self.resets.setdefault(netns, [])
        if resets:
            # What is sent from the next reset on is that one's burst.
            resets[-1].end_ns = min(resets[-1].end_ns, reset.start_ns)
        resets.append(reset)

    def waiting(self, time_ns: int, place: Spot) -> Iterator[Reset]:
        """Yield the resets whose packet may be the one at this time and place, at most one of each namespace."""
        for resets in self.resets.values():
            begun = bisect_right(resets, time_ns, key=lambda reset: reset.start_ns)
            if not begun or time_ns >= (reset := resets[begun - 1]).end_ns:
                continue
            if place not in reset.found and len(reset.found) < _MOST_PLACES:
                yield reset

    def state(self, place: Spot) -> State:
        """Return the state at a place; that of the place that came first is forgotten where there are too many."""
        if place not in self.states and len(self.states) == _MOST_PLACES:
            del self.states[next(iter(self.states))]
        return self.states.setdefault(place, State())


def _later(known: int | None, number: int) -> int:
    """Return the later one of two sequence numbers, of which the first may not be known."""
    return number if known is None or (number - known) & 0xFFFF_FFFF < 1 << 31 else known
