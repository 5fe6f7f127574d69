# SPDX-License-Identifier: Apache-2.0
"""What a long path is like, and when a packet that enters it comes out at the other end."""

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
# Above this, whole super-segments cross, below it the queue sees packets of the size that a real one would.
_SEGMENTS_UP_TO: Final = 200e6


@dataclass(frozen=True)
class Link:
    """A path: ``rtt_ms`` there and back, ``rate`` in bit/s each way (None: no limit), ``loss`` as a fraction each way.

    ``queue_bytes`` is what may wait for the line before packets are dropped; None for one bandwidth-delay
    product, at least 64 KiB. ``seed`` makes losses repeatable.
    """

    rtt_ms: float
    rate: float | None = None
    loss: float = 0.0
    queue_bytes: int | None = None
    seed: int = 1

    def check(self) -> None:
        """Raise UsageError for what no path can be."""
        if not 0 < self.rtt_ms <= MAX_RTT_MS:
            raise UsageError(f"no RTT of {self.rtt_ms:g} ms", f"give one above 0 and up to {MAX_RTT_MS:g} ms")
        if self.rate is not None and not MIN_RATE <= self.rate <= MAX_RATE:
            raise UsageError(f"no rate of {self.rate:g} bit/s", "give one from 8 kbit/s to 10 Gbit/s, or none")
        if not 0 <= self.loss < 1:
            raise UsageError(f"no loss of {self.loss:g}", "give a fraction below 1, 0.01 for one packet in a hundred")
        if self.queue_bytes is not None and self.queue_bytes < 3000:
            raise UsageError(
                f"no queue of {plural(self.queue_bytes, 'byte')}", "it has to hold two packets: 3000 or more"
            )

    @property
    def one_way_ns(self) -> int:
        """Delay each way."""
        return round(self.rtt_ms * 1e6 / 2)

    @property
    def queue(self) -> int:
        """The queue's size in bytes; without a rate nothing ever queues."""
        if self.queue_bytes is not None:
            return self.queue_bytes
        return max(_MIN_QUEUE, round((self.rate or 0) / 8 * self.rtt_ms / 1e3))

    @property
    def segmented(self) -> bool:
        """Whether packets have to cross one by one, because a loss or a short queue would hit too many at once."""
        return self.loss > 0 or (self.rate is not None and self.rate <= _SEGMENTS_UP_TO)


class Lane:
    """One direction of a path: a line that sends so many bytes a second, a queue before it, a delay behind it."""

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
        """When a packet of ``size`` bytes that comes in now goes out, ns; None if it never does.

        Times never go back, so that what is offered in order goes out in order.
        """
        if self._loss and self._random.random() < self._loss:
            self.lost += 1
            return None
        if not self._ns_per_byte:
            return now_ns + self._delay_ns
        begin = max(float(now_ns), self._free_ns)
        took = size * self._ns_per_byte
        # A packet that finds the line idle always fits, however small the queue.
        if begin > now_ns and begin - now_ns + took > self._queue_ns:
            self.dropped += 1
            return None
        self._free_ns = begin + took
        return round(self._free_ns) + self._delay_ns
