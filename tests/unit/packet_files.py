# SPDX-License-Identifier: Apache-2.0
"""Files of packets made by hand, byte by byte, so that tests know each of them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from tests.unit import frames

UTC_NS: Final = frames.MONO + frames.OFFSET
"""The beginning of the captures of ``frames``, in ns since 1970."""

Option = tuple[int, bytes]


def padded(data: bytes) -> bytes:
    """Return data filled up to a multiple of four bytes."""
    return data + bytes(-len(data) % 4)


def options(order: str, *given: Option) -> bytes:
    """Return options with their end; nothing for none."""
    if not given:
        return b""
    each = [struct.pack(f"{order}HH", code, len(value)) + padded(value) for code, value in given]
    return b"".join(each) + bytes(4)


def block(order: str, kind: int, body: bytes) -> bytes:
    """Return a block of pcapng."""
    return struct.pack(f"{order}II", kind, len(body) + 12) + body + struct.pack(f"{order}I", len(body) + 12)


def section(order: str = "<", length: int = -1, *given: Option) -> bytes:
    """Return the block that begins a section."""
    return block(order, 0x0A0D0D0A, struct.pack(f"{order}IHHq", 0x1A2B3C4D, 1, 0, length) + options(order, *given))


def interface(order: str = "<", link: int = 1, *given: Option) -> bytes:
    """Return the block of an interface."""
    return block(order, 1, struct.pack(f"{order}HHI", link, 0, 0) + options(order, *given))


def packet(order: str, ticks: int, data: bytes, *given: Option, number: int = 0, old: bool = False) -> bytes:
    """Return the block of a packet."""
    clock = ticks >> 32, ticks & 0xFFFFFFFF, len(data), len(data)
    head = struct.pack(f"{order}HH4I", number, 0, *clock) if old else struct.pack(f"{order}5I", number, *clock)
    return block(order, 2 if old else 6, head + padded(data) + options(order, *given))


def commented(order: str, raw: bytes, text: str, captured: int) -> bytes:
    """Return the block of a packet of ``captured`` bytes with a comment in front of its options."""
    body, kind = raw[8:-4], struct.unpack(f"{order}I", raw[:4])[0]
    at = 20 + captured + -captured % 4
    comment = options(order, (1, text.encode()))
    return block(order, kind, body[:at] + comment[: None if at == len(body) else -4] + body[at:])


def ticks(at_s: float, per_second: int = 1_000_000) -> int:
    """Return a time, in seconds after the start of a capture, as ticks since 1970."""
    return (UTC_NS + round(at_s * 1e9)) * per_second // 1_000_000_000


def segment(seq: int, payload: int, *, reply: bool = False, ack: int = 1, flags: str = "A", **fields: Any) -> Any:
    """Return an IP packet of the connection of ``frames.reset``, or of its peer."""
    row = {"saddr": "10.1.0.1", "sport": 443, "daddr": "10.2.0.9", "dport": 51324} | fields
    ends = [(row["saddr"], row["sport"]), (row["daddr"], row["dport"])]
    source, destination = reversed(ends) if reply else ends
    network = (IPv6 if ":" in str(row["saddr"]) else IP)(src=source[0], dst=destination[0])
    tcp = TCP(sport=source[1], dport=destination[1], seq=seq % 2**32, ack=ack % 2**32, flags=flags)
    return network / tcp / (b"x" * payload)


def classic(order: str, per_second: int, link: int, packets: Sequence[tuple[float, bytes]]) -> bytes:
    """Return a classic pcap file of packets and their times in seconds."""
    magic = 0xA1B2C3D4 if per_second == 1_000_000 else 0xA1B23C4D
    raw = struct.pack(f"{order}IHHiIII", magic, 2, 4, 0, 0, 262144, link)
    for at_s, data in packets:
        raw += struct.pack(f"{order}4I", *divmod(ticks(at_s, per_second), per_second), len(data), len(data)) + data
    return raw
