# SPDX-License-Identifier: Apache-2.0
"""``struct tcp_info`` of one's own socket as a typed record, against which tests check the tracer."""

from __future__ import annotations

import socket
import struct
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Self

from cwndtrace.format import plural

# include/uapi/linux/tcp.h. The struct only grows at its end, so an older kernel returns a prefix.
_HEAD: Final = struct.Struct("=7BB24I")
_TAIL: Final = (
    ("Q", "pacing_rate"),
    ("Q", "max_pacing_rate"),
    ("Q", "bytes_acked"),
    ("Q", "bytes_received"),
    ("I", "segs_out"),
    ("I", "segs_in"),
    ("I", "notsent_bytes"),
    ("I", "min_rtt"),
    ("I", "data_segs_in"),
    ("I", "data_segs_out"),
    ("Q", "delivery_rate"),
    ("Q", "busy_time"),
    ("Q", "rwnd_limited"),
    ("Q", "sndbuf_limited"),
    ("I", "delivered"),
    ("I", "delivered_ce"),
    ("Q", "bytes_sent"),
    ("Q", "bytes_retrans"),
    ("I", "dsack_dups"),
    ("I", "reord_seen"),
    ("I", "rcv_ooopack"),
    ("I", "snd_wnd"),
)
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
        if len(raw) < _HEAD.size:
            raise ValueError(
                f"TCP_INFO has {plural(len(raw), 'byte')}, fewer than the {_HEAD.size} that every kernel returns"
            )
        head = _HEAD.unpack_from(raw)
        values = {
            "state": head[0], "ca_state": head[1], "rto": head[8], "snd_mss": head[10], "unacked": head[12],
            "last_data_sent": head[17], "last_data_recv": head[19], "rtt": head[23], "rttvar": head[24],
            "snd_ssthresh": head[25], "snd_cwnd": head[26], "total_retrans": head[31],
        }  # fmt: skip
        known = {f.name for f in fields(cls)}
        offset = _HEAD.size
        for code, name in _TAIL:
            size = struct.calcsize("=" + code)
            if offset + size > len(raw):
                break
            if name in known:
                (values[name],) = struct.unpack_from("=" + code, raw, offset)
            offset += size
        return cls(**values)

    @classmethod
    def of(cls, sock: socket.socket) -> Self:
        """Return the current TCP_INFO of a socket."""
        return cls.parse(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ROOM))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, for JSON."""
        return asdict(self)
