# SPDX-License-Identifier: Apache-2.0
"""The relay: two TUN devices, one in each namespace, and between them the delay, the rate and the loss of a path.

A process of its own (see cwndtrace.lab.child) with arguments PARENT LINK NAMESPACE NAMESPACE, LINK as JSON. The
devices vanish with the process. It says ``{"ready": …}``, then answers each line on stdin with its figures so far.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import select
import struct
import sys
import time
from collections import deque
from typing import Any, Final

from cwndtrace.lab.child import be_punctual, enter, live_with, say
from cwndtrace.lab.link import Lane, Link

DEVICE: Final = "lab0"
_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_IFF_TUN: Final = 0x0001
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
# Checksums are never computed, and super-segments of up to 64 KB cross whole (linux/if_tun.h).
_CHECKSUM: Final = 0x01
_TSO: Final = 0x02 | 0x04 | 0x08
_HEADER: Final = 10  # struct virtio_net_hdr; gso_type at 1, gso_size at 4, csum_start at 6
_ROOM: Final = _HEADER + (1 << 16)
_BATCH: Final = 64
_BUCKET_NS: Final = 50_000
# The longest sleep: of a packet that comes in while this process is held up, at most so much is missed.
_NAP_NS: Final = 10_000_000


class Lateness:
    """How long after their time packets went out: a histogram of 50 µs steps, and the worst."""

    def __init__(self) -> None:
        self._buckets = [0] * 2001
        self.worst_ns = 0

    def add(self, late_ns: int) -> None:
        """Count one packet."""
        self._buckets[min(late_ns // _BUCKET_NS, 2000)] += 1
        if late_ns > self.worst_ns:
            self.worst_ns = late_ns

    def quantile_ms(self, q: float) -> float:
        """At most this late, ms (the upper edge of a step), were the share ``q`` of the packets."""
        left = q * sum(self._buckets)
        for index, count in enumerate(self._buckets):
            left -= count
            if left <= 0:
                return min((index + 1) * _BUCKET_NS, self.worst_ns) / 1e6
        return self.worst_ns / 1e6


class Direction:
    """From one device to the other."""

    def __init__(self, source: int, sink: int, lane: Lane) -> None:
        self.source = source
        self.sink = sink
        self.lane = lane
        self.waiting: deque[tuple[int, int, bytes]] = deque()
        self.packets = 0
        self.bytes = 0
        self.refused = 0
        self.late = Lateness()

    def take(self, slept_ns: int) -> None:
        """Take in what the device holds, a batch at most, after sleeping ``slept_ns`` longer than meant."""
        for _ in range(_BATCH):
            try:
                packet = os.read(self.source, _ROOM)
            except BlockingIOError:
                return
            due = self.lane.offer(time.monotonic_ns(), wire_size(packet))
            if due is not None:
                self.waiting.append((due, slept_ns, packet))

    def give(self) -> None:
        """Send what is due."""
        waiting = self.waiting
        while waiting:
            due, slept_ns, packet = waiting[0]
            late = time.monotonic_ns() - due
            if late < 0:
                return
            waiting.popleft()
            try:
                os.write(self.sink, packet)
            except OSError as e:
                if e.errno not in (errno.EAGAIN, errno.ENOBUFS, errno.EIO, errno.EINVAL):
                    raise
                self.refused += 1
            self.packets += 1
            self.bytes += len(packet) - _HEADER
            self.late.add(late + slept_ns)

    def figures(self) -> dict[str, Any]:
        """What crossed, what didn't, and how late it was."""
        return {
            "packets": self.packets,
            "bytes": self.bytes,
            "dropped": self.lane.dropped,
            "lost": self.lane.lost,
            "refused": self.refused,
            "late_p99_ms": self.late.quantile_ms(0.99),
            "late_max_ms": self.late.worst_ns / 1e6,
        }


def wire_size(packet: bytes) -> int:
    """Bytes that a packet with its virtio header takes on a line: a super-segment has headers for each segment."""
    size = len(packet) - _HEADER
    if packet[1] == 0:
        return size
    # hdr_len is only a hint and may count data too; where TCP begins and how long its header is are exact.
    segment, tcp = struct.unpack_from("=HH", packet, 4)
    headers = tcp + (packet[_HEADER + tcp + 12] >> 4) * 4
    return int(size + headers * ((size - headers - 1) // segment))


def open_tun(namespace: str, segmented: bool) -> int:
    """A non-blocking TUN device named ``lab0`` in a namespace. Raises OSError."""
    enter(namespace)
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    request = struct.pack("=16sH14x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR)
    fcntl.ioctl(fd, _TUNSETIFF, request)
    fcntl.ioctl(fd, _TUNSETOFFLOAD, _CHECKSUM if segmented else _CHECKSUM | _TSO)
    return fd


def relay(link: Link, namespaces: list[str]) -> None:
    """Carry packets until stdin ends."""
    first, second = (open_tun(namespace, link.segmented) for namespace in namespaces)
    directions = [
        Direction(first, second, Lane(link, link.seed)),
        Direction(second, first, Lane(link, link.seed + 1)),
    ]
    by_source = {d.source: d for d in directions}
    say({"ready": os.getpid()})
    be_punctual()
    # Nothing here forms cycles, and a collection would make packets late.
    gc.disable()
    while True:
        dues = [d.waiting[0][0] for d in directions if d.waiting]
        before = time.monotonic_ns()
        meant = max(0, min([before + _NAP_NS, *dues]) - before)
        # select takes microseconds, where epoll rounds up to whole milliseconds.
        ready = select.select([first, second, 0], [], [], meant / 1e9)[0]
        # When a packet came in isn't known; but it may have waited since this process should have been awake.
        slept = max(0, time.monotonic_ns() - before - meant)
        for fd in ready:
            if fd:
                by_source[fd].take(slept)
            elif not os.read(0, 4096):
                return
            else:
                cpu = time.process_time()
                say({"to_second": directions[0].figures(), "to_first": directions[1].figures(), "cpu_s": cpu})
        for direction in directions:
            direction.give()


def main() -> None:
    """Set up as the command line says, relay, and report an error as a message."""
    parent, link, *namespaces = sys.argv[1:]
    live_with(int(parent))
    try:
        relay(Link(**json.loads(link)), namespaces)
    except OSError as e:
        say({"error": f"no TUN device: {e.strerror}", "errno": e.errno, "remedy": "load the module: modprobe tun"})


if __name__ == "__main__":
    main()
