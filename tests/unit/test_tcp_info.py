# SPDX-License-Identifier: Apache-2.0
"""TCP_INFO is read at the right offsets."""

from __future__ import annotations

import socket
import struct

import pytest

from cwndtrace.kernel.tcp_info import TcpInfo
from tests.harness.loopback import need_loopback

OFFSETS = {
    "rto": 8, "snd_mss": 16, "unacked": 24, "last_data_sent": 44, "last_data_recv": 52, "rtt": 68, "rttvar": 72,
    "snd_ssthresh": 76, "snd_cwnd": 80, "total_retrans": 100, "notsent_bytes": 144, "min_rtt": 148, "snd_wnd": 228,
}  # fmt: skip
LONG_OFFSETS = {
    "pacing_rate": 104, "bytes_acked": 120, "bytes_received": 128, "delivery_rate": 160, "busy_time": 168,
    "rwnd_limited": 176, "sndbuf_limited": 184, "bytes_sent": 200,
}  # fmt: skip
"""The offsets in struct tcp_info, from a C compiler."""


def raw_info() -> bytes:
    raw = bytearray(280)
    raw[0], raw[1] = 1, 3
    for number, offset in enumerate(OFFSETS.values(), start=100):
        struct.pack_into("=I", raw, offset, number)
    for number, offset in enumerate(LONG_OFFSETS.values(), start=1 << 40):
        struct.pack_into("=Q", raw, offset, number)
    return bytes(raw)


def test_tcp_info_is_read_at_the_offsets_of_the_compiler() -> None:
    info = TcpInfo.parse(raw_info())
    assert (info.state, info.ca_state) == (1, 3)
    assert [getattr(info, name) for name in OFFSETS] == list(range(100, 100 + len(OFFSETS)))
    assert [getattr(info, name) for name in LONG_OFFSETS] == list(range(1 << 40, (1 << 40) + len(LONG_OFFSETS)))


def test_fields_that_an_older_kernel_lacks_are_zero() -> None:
    info = TcpInfo.parse(raw_info()[:192])
    assert info.sndbuf_limited
    assert info.bytes_sent == info.snd_wnd == 0
    with pytest.raises(ValueError, match="TCP_INFO has 90 bytes"):
        TcpInfo.parse(bytes(90))


def test_tcp_info_of_a_connected_socket_is_plausible() -> None:
    need_loopback()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        info = TcpInfo.of(sock)
    assert info.state == 1
    assert info.snd_cwnd >= 10
    assert 500 < info.snd_mss < 66_000
