# SPDX-License-Identifier: Apache-2.0
"""A peer on a TUN device that answers TCP as a test says, to do what the kernel's own receiver doesn't."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import time
from types import TracebackType
from typing import Final, NamedTuple, Self

from tests.harness import tcp

HERE: Final = "10.8.0.1"
PEER: Final = "10.8.0.2"
PORT: Final = 80
ACK: Final = 0x10
SYN: Final = 0x02
_TUNSETIFF: Final = 0x400454CA
_IFF_TUN_NO_PI: Final = 0x1001
_START: Final = 5000
"""The peer's initial sequence number."""


class Segment(NamedTuple):
    """A segment that came from the kernel."""

    port: int
    seq: int
    flags: int
    length: int


class RawPeer:
    """The only host (10.8.0.2) behind a TUN device ``tun0`` of a namespace, which has 10.8.0.1 there.

    It sends nothing by itself: what came in stays unanswered until ``answer`` or ``ack``.
    """

    def __init__(self, space: tcp.Space) -> None:
        self.space = space
        self._fd = int(space.enter(_open))
        self._port = 0
        self.received = 0
        """the sequence number that the peer expects next"""
        space.ip("addr", "add", f"{HERE}/24", "dev", "tun0")
        space.ip("link", "set", "tun0", "up")

    def read(self, flags: int = 0) -> Segment:
        """Return the next segment that has data or ``flags``; fail after 20 s."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if not select.select([self._fd], [], [], 1)[0]:
                continue
            segment = _parse(os.read(self._fd, 65536))
            if segment and (segment.length or segment.flags & flags):
                return segment
        raise AssertionError("waited 20 s in vain for a segment")

    def answer(self, window: int) -> None:
        """Answer a SYN that comes in."""
        syn = self.read(SYN)
        self._port, self.received = syn.port, syn.seq + 1
        self._send(_START, SYN | ACK, window, struct.pack(">BBH", 2, 4, 1460))

    def take(self, size: int) -> None:
        """Read segments until ``size`` more bytes have come in; they aren't acknowledged yet."""
        end = self.received + size
        while self.received != end:
            segment = self.read()
            self.received = max(self.received, segment.seq + segment.length)

    def ack(self, window: int, missing: int = 0) -> None:
        """Acknowledge all that was taken but the last ``missing`` bytes, and offer a window of so many bytes."""
        self._send(_START + 1, ACK, window, missing=missing)

    def _send(self, seq: int, flags: int, window: int, options: bytes = b"", missing: int = 0) -> None:
        words = 5 + len(options) // 4
        header = struct.pack(
            ">HHIIBBHHH", PORT, self._port, seq, self.received - missing, words << 4, flags, window, 0, 0
        )
        ends = socket.inet_aton(PEER) + socket.inet_aton(HERE)
        body = bytearray(header + options)
        pseudo = ends + struct.pack(">BBH", 0, socket.IPPROTO_TCP, len(body))
        body[16:18] = struct.pack(">H", _checksum(pseudo + body))
        ip = bytearray(struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, socket.IPPROTO_TCP, 0) + ends)
        ip[10:12] = struct.pack(">H", _checksum(ip))
        os.write(self._fd, bytes(ip + body))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._fd)


def _open() -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"tun0", _IFF_TUN_NO_PI))
    return fd


def _parse(packet: bytes) -> Segment | None:
    if packet[0] >> 4 != 4 or packet[9] != socket.IPPROTO_TCP:
        return None
    header = (packet[0] & 15) * 4
    port, _, seq, _, words, flags = struct.unpack_from(">HHIIBB", packet, header)
    return Segment(port, seq, flags, len(packet) - header - (words >> 4) * 4)


def _checksum(data: bytes | bytearray) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total
