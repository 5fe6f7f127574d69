# SPDX-License-Identifier: Apache-2.0
"""Tests of unusual connections: their records are right, or docs/kernels.md says that they aren't covered."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable

import pandas as pd
import pytest

from cwndtrace.analysis.connections import identify
from cwndtrace.records.arrow import schema
from tests.harness import tcp
from tests.harness.link import VethLink
from tests.harness.tcp import Connect
from tests.harness.tracing import EXACT, Tracer, expect_one, key

pytestmark = pytest.mark.live

MPTCP = 262
TCP_ULP = 31
SOL_TLS = 282
TLS_TX = 1
TLS_1_2 = 0x0303
AES_GCM_128 = 51
FAST_OPEN_BOTH = 0x003
REUSE = 0x400
"""A flag of net.ipv4.tcp_fastopen, for servers that don't set TCP_FASTOPEN."""


class Maker:
    """A maker of connections in a namespace, for tcp.connect; ``how`` connects the socket."""

    cgroup_id = tcp.own_cgroup()

    def __init__(self, space: tcp.Space, how: Callable[[socket.socket, tuple[str, int]], None], kind: int = 0) -> None:
        self._space, self._how, self._kind = space, how, kind

    def connect(self, address: str, port: int, *_: object) -> socket.socket:
        """Return a cubic connection to an IPv4 address."""
        sock: socket.socket = self._space.enter(lambda: socket.socket(proto=self._kind))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._how(sock, (address, port))
        return sock


def test_resets_after_a_fast_open_are_right(
    tracer: Tracer, make_space: Callable[[], tcp.Space], connect: Connect
) -> None:
    """The SYN carries data, before the connection exists."""
    space = make_space()
    space.sysctl("net.ipv4.tcp_fastopen", str(FAST_OPEN_BOTH | REUSE))

    def fast(sock: socket.socket, to: tuple[str, int]) -> None:
        sock.sendto(b"x" * 500, socket.MSG_FASTOPEN, to)

    # The first connection gets a cookie, the second one uses it.
    for connection in [connect(space, by=Maker(space, fast)) for _ in range(2)]:
        connection.grow()
        connection.idle(tcp.IDLE_S)
        connection.send()
        expect_one(tracer, connection)
    assert space.counter("TCPFastOpenActive") >= 1


def test_resets_after_a_retransmitted_syn_are_right(tracer: Tracer, link: VethLink, connect: Connect) -> None:
    """The timeout of the SYN lowers the window to 1, and the connection begins with the initial window again."""
    started: list[float] = []

    def late(sock: socket.socket, to: tuple[str, int]) -> None:
        sock.setblocking(False)
        with link.cut():
            timeouts = link.timeouts()
            with contextlib.suppress(BlockingIOError):
                sock.connect(to)
            started.append(time.monotonic())
            tcp.until(lambda: link.timeouts() > timeouts, 20, "the SYN's timeout")
        sock.settimeout(20)
        tcp.until(lambda: tcp.info(sock).snd_wnd, 20, "the connection")
        sock.settimeout(None)

    connection = connect(link.a, to=link.b, address="10.9.0.2", device="cwt0", by=Maker(link.a, late))
    assert tcp.info(connection.sock).total_retrans >= 1
    first = tracer.of(connection)
    assert [(r["reason"], r["cwnd_before"], r["cwnd_after"], r["idle_us"], r["tcp_state"]) for r in first] in (
        [],
        [("rto_loss", tcp.INIT_CWND, 1, 0, "syn_sent")],
    )
    if tracer.probe in EXACT and tracer.sees("rto_loss"):
        assert first
    connection.grow()
    connection.idle(tcp.IDLE_S)
    connection.send()
    assert [r["reason"] for r in tracer.of(connection)][len(first) :] == ["idle"]


def test_a_reset_over_a_link_local_address_has_its_interface(tracer: Tracer, link: VethLink, connect: Connect) -> None:
    """The scope of such an address is the interface, whose number the record has."""

    def local(space: tcp.Space) -> str:
        lines = space.ip("-6", "-o", "addr", "show", "dev", "cwt0", "scope", "link").splitlines()
        return next((line.split()[3].split("/")[0] for line in lines if "tentative" not in line), "")

    tcp.until(lambda: local(link.b) and local(link.a), 20, "link-local addresses")
    address = local(link.b)
    index = link.a.index("cwt0")
    there = link.b.index("cwt0")

    def listen() -> socket.socket:
        sock = socket.socket(socket.AF_INET6)
        sock.bind((address, 0, 0, there))
        sock.listen()
        return sock

    def call(port: int) -> socket.socket:
        sock = socket.socket(socket.AF_INET6)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect((address, port, 0, index))
        return sock

    shared = connect(link.a, to=link.b, address="10.9.0.2", device="cwt0")
    with link.b.enter(listen) as listener:
        sock = link.a.enter(lambda: call(listener.getsockname()[1]))
        peer = listener.accept()[0]
    shared.drain.add(peer)
    connection = tcp.TcpConnection(
        link.a, sock, peer, shared.drain, int(socket.AF_INET6), "cubic", index, tcp.own_cgroup()
    )
    try:
        for end in ("saddr", "daddr"):
            setattr(connection, end, getattr(connection, end).split("%")[0])
        connection.grow()
        connection.idle(tcp.IDLE_S)
        connection.send()
        expect_one(tracer, connection)
        assert tracer.of(connection)[0]["daddr"] == address
    finally:
        connection.close()


def test_resets_with_tls_in_the_kernel_are_right(tracer: Tracer, connect: Connect) -> None:
    """Data that the kernel encrypts comes to the socket by other functions, and leaves it by the same."""
    connection = connect()
    try:
        connection.sock.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
    except OSError as e:
        pytest.skip(f"needs CONFIG_TLS: {e}")
    # struct tls12_crypto_info_aes_gcm_128: iv, key, salt, record number.
    keys = struct.pack("=HH8s16s4s8s", TLS_1_2, AES_GCM_128, *(os.urandom(n) for n in (8, 16, 4)), bytes(8))
    connection.sock.setsockopt(SOL_TLS, TLS_TX, keys)
    connection.grow()
    connection.idle(tcp.IDLE_S)
    connection.send()
    expect_one(tracer, connection)


def test_resets_of_mptcp_subflows_are_seen_except_by_sendmsg(
    tracer: Tracer, make_space: Callable[[], tcp.Space]
) -> None:
    """Probe ``sendmsg`` sees no reset of a subflow (docs/kernels.md)."""
    space = make_space()
    try:
        listener, sock = space.enter(lambda: [socket.socket(proto=MPTCP) for _ in range(2)])
    except OSError as e:
        pytest.skip(f"needs CONFIG_MPTCP: {e}")
    with listener, sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        sock.connect(listener.getsockname())
        peer = listener.accept()[0]
        drain = tcp.Drain()
        drain.add(peer)
        try:
            begin = time.monotonic_ns()
            for _ in range(3):
                sock.sendall(bytes(300_000))
                time.sleep(tcp.IDLE_S)
            sock.send(b"x" * 100)
            records = tracer.within(space.inode, since_ns=begin)
        finally:
            drain.close()
            peer.close()
    assert bool(records) == (tracer.probe != "sendmsg")
    assert all(r["cwnd_after"] < r["cwnd_before"] for r in records)


def test_the_same_ports_one_after_the_other_are_two_connections(
    tracer: Tracer, space: tcp.Space, connect: Connect
) -> None:
    """The two connections have no cookies, and perhaps sockets at the same address."""
    ends: dict[str, object] = {"source": ("127.0.0.1", 40011), "port": 40012}
    records = []
    for least in (200, 24):
        connection = connect(space, **ends)
        connection.cookie = lambda: 0  # type: ignore[method-assign]
        connection.grow(least)
        for _ in range(2):
            connection.idle(tcp.IDLE_S)
            connection.send()
            connection.grow(least)
        assert check_since(tracer, connection) >= 2
        records.append(len([r for r in tracer.records if key(r) == connection.key]))
        # This avoids TIME_WAIT.
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    mine = [r for r in tracer.records if key(r) == connection.key]
    frame = pd.DataFrame(mine).assign(time=pd.Timestamp(0, tz="UTC"))
    resets, _ = identify(frame, schema("connections").empty_table().to_pandas())
    names = list(resets["connection"])
    assert len(set(names[: records[0]])) == len(set(names[records[0] :])) == 1
    assert names[0] != names[-1]


def check_since(tracer: Tracer, connection: tcp.TcpConnection) -> int:
    """Assert that each reset since the first send has a record, and no record is without one; return their number."""
    sends = [s for s in connection.sends if s.reason == "idle"]
    records = [r for r in tracer.of(connection) if r["ts_ns"] >= connection.sends[0].start_ns and r["reason"] == "idle"]
    assert [(r["cwnd_before"], r["cwnd_after"]) for r in records] == [(s.before.cwnd, s.after.cwnd) for s in sends]
    return len(records)


@pytest.mark.long
def test_resets_are_right_when_sequence_numbers_wrap(tracer: Tracer, connect: Connect) -> None:
    """More than 4 GiB go over one connection, with idle times before and after the wrap."""
    connection = connect()
    chunk = bytes(1 << 20)
    for _ in range(18):
        for _ in range(256):
            connection.sock.sendall(chunk)
        connection.quiet()
        connection.grow()
        connection.idle(tcp.IDLE_S)
        assert connection.send().reason == "idle"
    assert connection.info().bytes_acked > 1 << 32
    # A burst that takes longer than an RTO may hide another reset, so only those of recorded sends are compared.
    assert check_since(tracer, connection) >= 18
