# SPDX-License-Identifier: Apache-2.0
"""The relay: it carries packets between two TUN devices in two namespaces, with a path's delay, rate and loss.

It is a separate process (see cwndtrace.lab.child) with the arguments PARENT LINK NAMESPACE NAMESPACE, where LINK is
JSON. The kernel removes the devices when the process ends. The relay sends ``{"ready": …}``, then answers each line on
stdin with its figures so far.
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
# linux/if_tun.h: with these, no checksum is computed, and super-segments of up to 64 KB cross whole.
_CHECKSUM: Final = 0x01
_TSO: Final = 0x02 | 0x04 | 0x08
_HEADER: Final = 10  # struct virtio_net_hdr; gso_type at 1, gso_size at 4, csum_start at 6
_ROOM: Final = _HEADER + (1 << 16)
_BATCH: Final = 64
_BUCKET_NS: Final = 50_000
# The longest sleep. Lateness counts from the planned end of a sleep, so of a packet that arrives while the kernel
# doesn't run this process, at most this much of its lateness goes unnoticed.
_NAP_NS: Final = 10_000_000


class Lateness:
    """The lateness of packets: a histogram in steps of 50 µs, and the maximum."""

    def __init__(self) -> None:
        self._buckets = [0] * 2001
        self.worst_ns = 0

    def add(self, late_ns: int) -> None:
        """Count a packet that left ``late_ns`` after its time."""
        self._buckets[min(late_ns // _BUCKET_NS, 2000)] += 1
        if late_ns > self.worst_ns:
            self.worst_ns = late_ns

    def quantile_ms(self, q: float) -> float:
        """Return the lateness in ms (the upper edge of a step) that a share ``q`` of the packets didn't exceed."""
        left = q * sum(self._buckets)
        for index, count in enumerate(self._buckets):
            left -= count
            if left <= 0:
                return min((index + 1) * _BUCKET_NS, self.worst_ns) / 1e6
        return self.worst_ns / 1e6


class Direction:
    """One direction of the relay, from a source device to a sink device."""

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
        """Read up to a batch of packets from the source, after a sleep that was ``slept_ns`` longer than planned."""
        for _ in range(_BATCH):
            try:
                packet = os.read(self.source, _ROOM)
            except BlockingIOError:
                return
            due = self.lane.offer(time.monotonic_ns(), wire_size(packet))
            if due is not None:
                self.waiting.append((due, slept_ns, packet))

    def give(self) -> None:
        """Send the packets that are due."""
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
        """Return the counts of packets and bytes, of dropped, lost and refused packets, and the lateness in ms."""
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
    """Return the bytes that a packet (with its virtio header) takes on a line: each segment has its own headers."""
    size = len(packet) - _HEADER
    if packet[1] == 0:
        return size
    # hdr_len is only a hint and may include data, while csum_start and the length in the TCP header are exact.
    segment, tcp = struct.unpack_from("=HH", packet, 4)
    headers = tcp + (packet[_HEADER + tcp + 12] >> 4) * 4
    return int(size + headers * ((size - headers - 1) // segment))


def open_tun(namespace: str, segmented: bool) -> int:
    """Open a non-blocking TUN device named ``lab0`` in a namespace and return its descriptor. Raises OSError."""
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
    # The objects here form no reference cycles, and a garbage collection would make packets late.
    gc.disable()
    while True:
        dues = [d.waiting[0][0] for d in directions if d.waiting]
        before = time.monotonic_ns()
        meant = max(0, min([before + _NAP_NS, *dues]) - before)
        # select has a timeout in microseconds; that of epoll is in whole milliseconds.
        ready = select.select([first, second, 0], [], [], meant / 1e9)[0]
        # The arrival time of a packet isn't known, but it may have waited since this process should have woken.
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
    """Run the relay that the command line describes, and send an error to the parent as a message."""
    parent, link, *namespaces = sys.argv[1:]
    live_with(int(parent))
    try:
        relay(Link(**json.loads(link)), namespaces)
    except OSError as e:
        error = f"a TUN device can't be opened: {e.strerror}"
        say({"error": error, "errno": e.errno, "remedy": "load the module: modprobe tun"})


if __name__ == "__main__":
    main()
