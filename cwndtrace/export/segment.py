# SPDX-License-Identifier: Apache-2.0
"""The TCP segment in a captured packet: its addresses and ports, and where its header is."""

from __future__ import annotations

import ipaddress
import struct
from typing import Final, NamedTuple

ETHERNET: Final = 1
COOKED: Final = 113
COOKED_2: Final = 276
_FAMILY_FIRST: Final = (0, 108)
_PLAIN_IP: Final = (12, 14, 101, 228, 229)
LINKS: Final = frozenset({ETHERNET, COOKED, COOKED_2, *_FAMILY_FIRST, *_PLAIN_IP})
"""The LINKTYPE_ numbers that are understood: Ethernet, Linux cooked 1 and 2, BSD loopback, and IP without a link."""

_TAGS: Final = (0x8100, 0x88A8, 0x9100)
_MOST_TAGS: Final = 4
_MOST_EXTENSIONS: Final = 8
_TCP: Final = 6
_OPTIONS_OF_IPV6: Final = (0, 43, 60)
_FRAGMENT: Final = 44
_AUTHENTICATION: Final = 51

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10


class TcpSegment(NamedTuple):
    """A TCP segment. ``flow`` is what ``flow`` returns for its source and destination; ``payload`` is in bytes."""

    flow: bytes
    seq: int
    ack: int | None
    flags: int
    payload: int

    @property
    def next_seq(self) -> int:
        """The sequence number after this segment."""
        return (self.seq + self.payload + bool(self.flags & SYN) + bool(self.flags & FIN)) & 0xFFFF_FFFF


def flow(source: str, sport: int, destination: str, dport: int) -> bytes:
    """Return addresses and ports as they are in a packet, joined."""
    ends = (ipaddress.ip_address(end).packed for end in (source, destination))
    return b"".join(ends) + struct.pack(">HH", sport, dport)


def segment(link: int, data: bytes, wire: int) -> TcpSegment | None:
    """Return the TCP segment in a packet of which ``data`` was captured and ``wire`` bytes were sent.

    None for what isn't TCP over IP, for later fragments, and where too little was captured.
    """
    try:
        at = _network(link, data)
        if at is None:
            return None
        return _ipv4(data, at, wire) if data[at] >> 4 == 4 else _ipv6(data, at, wire) if data[at] >> 4 == 6 else None
    except (IndexError, struct.error):
        return None


def device(link: int, data: bytes) -> int:
    """Return the index of the interface that a packet itself names, which only Linux cooked 2 does; else 0."""
    return int.from_bytes(data[4:8], "big") if link == COOKED_2 else 0


def _network(link: int, data: bytes) -> int | None:
    """Return where the network header begins; None where the link says that it isn't IP's."""
    if link in _PLAIN_IP:
        return 0
    if link in _FAMILY_FIRST:
        return 4
    if link not in LINKS:
        return None
    kind, at = {ETHERNET: (12, 14), COOKED: (14, 16), COOKED_2: (0, 20)}[link]
    protocol = struct.unpack_from(">H", data, kind)[0]
    for _ in range(_MOST_TAGS):
        if protocol not in _TAGS:
            break
        protocol = struct.unpack_from(">H", data, at + 2)[0]
        at += 4
    return at if protocol in (0x0800, 0x86DD) else None


def _ipv4(data: bytes, at: int, wire: int) -> TcpSegment | None:
    length, fragment = struct.unpack_from(">H2xH", data, at + 2)
    if data[at + 9] != _TCP or fragment & 0x1FFF:
        return None
    # Hardware that makes the packets of a large one leaves no length for it.
    end = at + length if length else wire
    return _tcp(data, at + 4 * (data[at] & 0x0F), end, data[at + 12 : at + 20])


def _ipv6(data: bytes, at: int, wire: int) -> TcpSegment | None:
    length, following = struct.unpack_from(">HB", data, at + 4)
    end, ends = at + 40 + length if length else wire, data[at + 8 : at + 40]
    at += 40
    for _ in range(_MOST_EXTENSIONS):
        if following == _TCP:
            return _tcp(data, at, end, ends)
        if following == _FRAGMENT and struct.unpack_from(">H", data, at + 2)[0] & 0xFFF8:
            return None
        if following in _OPTIONS_OF_IPV6:
            size = 8 * (data[at + 1] + 1)
        elif following == _AUTHENTICATION:
            size = 4 * (data[at + 1] + 2)
        elif following == _FRAGMENT:
            size = 8
        else:
            return None
        following, at = data[at], at + size
    return None


def _tcp(data: bytes, at: int, end: int, ends: bytes) -> TcpSegment | None:
    ports, seq, ack, size, flags = struct.unpack_from(">4sIIBB", data, at)
    payload = end - at - 4 * (size >> 4)
    if payload < 0:
        return None
    return TcpSegment(ends + ports, seq, ack if flags & ACK else None, flags, payload)
