# SPDX-License-Identifier: Apache-2.0
"""``struct tcp_info``: where its members are, and that of one's own socket as a typed record."""

from __future__ import annotations

import socket
import struct
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from cwndtrace.format import plural

FIELDS: Final = {
    "state": ("B", 0), "ca_state": ("B", 1), "rto": ("I", 8), "snd_mss": ("I", 16), "unacked": ("I", 24),
    "last_data_sent": ("I", 44), "last_data_recv": ("I", 52), "rtt": ("I", 68), "rttvar": ("I", 72),
    "snd_ssthresh": ("I", 76), "snd_cwnd": ("I", 80), "total_retrans": ("I", 100), "pacing_rate": ("Q", 104),
    "bytes_acked": ("Q", 120), "bytes_received": ("Q", 128), "notsent_bytes": ("I", 144), "min_rtt": ("I", 148),
    "delivery_rate": ("Q", 160), "busy_time": ("Q", 168), "rwnd_limited": ("Q", 176), "sndbuf_limited": ("Q", 184),
    "bytes_sent": ("Q", 200), "snd_wnd": ("I", 228),
}  # fmt: skip
"""Members of ``struct tcp_info`` (include/uapi/linux/tcp.h) without ``tcpi_``: the code of their type for ``struct``,
and their offset in bytes. The struct only grows at its end, so an older kernel returns a prefix."""
SIZE: Final = 232
_LEAST: Final = 104
"""Bytes that every kernel returns."""
_ROOM: Final = 512


@dataclass(frozen=True)
class TcpInfo:
    """Fields of ``struct tcp_info``, named without ``tcpi_``; a field that this kernel doesn't have is 0."""

    state: int = 0
    """TCP state"""
    ca_state: int = 0
    """0 open, 1 disorder, 2 CWR, 3 recovery, 4 loss"""
    rto: int = 0
    """retransmission timeout, µs"""
    snd_mss: int = 0
    """bytes"""
    unacked: int = 0
    """segments in flight"""
    last_data_sent: int = 0
    """time since data was last sent, ms"""
    last_data_recv: int = 0
    """time since data was last received, ms"""
    rtt: int = 0
    """smoothed round-trip time, µs"""
    rttvar: int = 0
    """µs"""
    snd_ssthresh: int = 0
    """slow start threshold, segments; 2147483647 if it was never set"""
    snd_cwnd: int = 0
    """congestion window, segments"""
    total_retrans: int = 0
    """segments"""
    pacing_rate: int = 0
    """bytes/s"""
    bytes_acked: int = 0
    """bytes"""
    bytes_received: int = 0
    """bytes"""
    notsent_bytes: int = 0
    """bytes queued and not yet sent"""
    min_rtt: int = 0
    """µs"""
    delivery_rate: int = 0
    """bytes/s, of the last sample"""
    busy_time: int = 0
    """with data under way, µs"""
    rwnd_limited: int = 0
    """of it held back by the receiver's window, µs"""
    sndbuf_limited: int = 0
    """of it held back by the send buffer, µs"""
    bytes_sent: int = 0
    """bytes, retransmissions included"""
    snd_wnd: int = 0
    """window that the peer offers, bytes; 0 before Linux 5.4"""

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """Parse the bytes of ``getsockopt(TCP_INFO)``. Raises ValueError for fewer than every kernel returns."""
        if len(raw) < _LEAST:
            raise ValueError(
                f"TCP_INFO has {plural(len(raw), 'byte')}, fewer than the {_LEAST} that every kernel returns"
            )
        whole = raw.ljust(SIZE, b"\0")
        return cls(
            **{name: struct.unpack_from(f"={code}", whole, offset)[0] for name, (code, offset) in FIELDS.items()}
        )

    @classmethod
    def of(cls, sock: socket.socket) -> Self:
        """Return the current TCP_INFO of a socket."""
        return cls.parse(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ROOM))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, for JSON."""
        return asdict(self)
