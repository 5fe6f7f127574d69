# SPDX-License-Identifier: Apache-2.0
"""The properties of a network path, and a model of when a packet that enters it leaves at the other end."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from cwndtrace.errors import UsageError
from cwndtrace.format import plural

MAX_RTT_MS: Final = 10_000.0
MIN_RATE: Final = 8_000.0
MAX_RATE: Final = 10e9
_MIN_QUEUE: Final = 64 << 10
# At up to this rate packets cross in the size that a real queue would see; above it, super-segments cross whole.
_SEGMENTS_UP_TO: Final = 200e6


@dataclass(frozen=True)
class Link:
    """The properties of a path: round-trip time, ``rate`` in bit/s each way (None: no limit), ``loss`` as a fraction.

    The loss applies to each direction. ``queue_bytes`` is how much may wait for the line before packets are dropped;
    None means one bandwidth-delay product, at least 64 KiB. ``seed`` makes losses repeatable.
    """

    rtt_ms: float
    rate: float | None = None
    loss: float = 0.0
    queue_bytes: int | None = None
    seed: int = 1

    def check(self) -> None:
        """Raise UsageError for a value that is out of range."""
        if not 0 < self.rtt_ms <= MAX_RTT_MS:
            raise UsageError(
                f"an RTT of {self.rtt_ms:g} ms is out of range", f"give one above 0 and up to {MAX_RTT_MS:g} ms"
            )
        if self.rate is not None and not MIN_RATE <= self.rate <= MAX_RATE:
            raise UsageError(
                f"a rate of {self.rate:g} bit/s is out of range", "give one from 8 kbit/s to 10 Gbit/s, or none"
            )
        if not 0 <= self.loss < 1:
            raise UsageError(
                f"a loss of {self.loss:g} is out of range", "give a fraction below 1: 0.01 is one packet in a hundred"
            )
        if self.queue_bytes is not None and self.queue_bytes < 3000:
            raise UsageError(
                f"a queue of {plural(self.queue_bytes, 'byte')} is too small",
                "it has to hold two packets: give 3000 bytes or more",
            )

    @property
    def one_way_ns(self) -> int:
        """The delay each way, in ns."""
        return round(self.rtt_ms * 1e6 / 2)

    @property
    def queue(self) -> int:
        """The queue's size in bytes; without a rate no packet queues."""
        if self.queue_bytes is not None:
            return self.queue_bytes
        return max(_MIN_QUEUE, round((self.rate or 0) / 8 * self.rtt_ms / 1e3))

    @property
    def segmented(self) -> bool:
        """True if packets have to cross one by one.

        A loss or a full queue would otherwise drop a super-segment, which is many packets at once.
        """
        return self.loss > 0 or (self.rate is not None and self.rate <= _SEGMENTS_UP_TO)


class Lane:
    """One direction of a path: a queue, then a line of limited rate, then a delay."""

    def __init__(self, link: Link, seed: int) -> None:
        self._delay_ns = link.one_way_ns
        self._ns_per_byte = 8e9 / link.rate if link.rate is not None else 0.0
        self._queue_ns = link.queue * self._ns_per_byte
        self._loss = link.loss
        self._random = random.Random(seed)
        self._free_ns = 0.0
        self.dropped = 0
        """packets that found the queue full"""
        self.lost = 0
        """packets lost at random"""

    def offer(self, now_ns: int, size: int) -> int | None:
        """Return when a packet of ``size`` bytes that enters now leaves, in ns; None if it is lost or dropped.

        Times never decrease, so packets leave in the order in which they are offered.
        """
        if self._loss and self._random.random() < self._loss:
            self.lost += 1
            return None
        if not self._ns_per_byte:
            return now_ns + self._delay_ns
        begin = max(float(now_ns), self._free_ns)
        took = size * self._ns_per_byte
        # An idle line takes a packet at once, so it fits even if the queue is smaller than the packet.
        if begin > now_ns and begin - now_ns + took > self._queue_ns:
            self.dropped += 1
            return None
        self._free_ns = begin + took
        return round(self._free_ns) + self._delay_ns
