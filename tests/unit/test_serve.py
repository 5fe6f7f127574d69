# SPDX-License-Identifier: Apache-2.0
"""The lab's server answers its own protocol, within limits, and discards everything else."""

from __future__ import annotations

import re
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from cwndtrace.cli import reproduce
from cwndtrace.errors import CwndtraceError, KernelLacks, UsageError
from cwndtrace.kernel.tcp_info import TcpInfo
from cwndtrace.lab import serve, wire
from tests.harness.command import COMMAND, ENVIRONMENT
from tests.harness.loopback import need_loopback
from tests.harness.tcp import until
from tests.harness.users import need_command


@pytest.fixture
def errors() -> list[CwndtraceError]:
    return []


@pytest.fixture
def server(errors: list[CwndtraceError]) -> Iterator[serve.Server]:
    need_loopback()
    with serve.Server("127.0.0.1", 0, serve.Settings(on_error=errors.append)) as listener:
        thread = threading.Thread(target=listener.run)
        thread.start()
        yield listener
        listener.close()
        thread.join(10)
        assert not thread.is_alive()


def connect(server: serve.Server, opening: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", server.port), 60)
    sock.sendall(opening)
    return sock


def test_the_server_answers_requests(server: serve.Server) -> None:
    with connect(server, wire.HELLO + wire.REPLY) as sock:
        assert wire.receive(sock, 4) == wire.HELLO
        for number, size in enumerate((16, 100_000, 3_000_000)):
            sock.sendall(wire.REQUEST.pack(size, number, 0.0, 0))
            answer = wire.receive(sock, size)
            assert wire.STAMP.unpack_from(answer)[0] == number
            assert 0 < wire.STAMP.unpack_from(answer)[1] <= time.monotonic_ns()


def test_the_server_acknowledges_and_counts_bursts(server: serve.Server) -> None:
    with connect(server, wire.HELLO + wire.SINK) as sock:
        assert wire.receive(sock, 4) == wire.HELLO
        for size in (16, 2_000_000):
            burst = bytearray(size)
            wire.STAMP.pack_into(burst, 0, 1, size)
            sock.sendall(burst)
            assert wire.receive(sock, 1) == wire.DONE
    assert server.totals.bursts_taken == 2


def test_the_server_discards_data_of_other_protocols(server: serve.Server) -> None:
    with connect(server, b"GET / HTTP/1.1\r\n" + bytes(500_000)) as sock:
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""


@pytest.mark.parametrize(
    "request_",
    [
        wire.REQUEST.pack(1 << 60, 1, 0.0, 0),
        wire.REQUEST.pack(1, 1, 0.0, 0),
        wire.REQUEST.pack(100, 1, -1.0, 1),
        wire.REQUEST.pack(100, 1, float("nan"), 1),
        wire.REQUEST.pack(100, 1, 1e30, 1),
        wire.REQUEST.pack(100, 1, 0.0, 9),
        wire.REQUEST.pack(100, 1, 0.0, 2),
    ],
)
def test_the_server_refuses_requests_out_of_bounds(
    server: serve.Server, errors: list[CwndtraceError], request_: bytes
) -> None:
    with connect(server, wire.HELLO + wire.REPLY) as sock:
        wire.receive(sock, 4)
        sock.sendall(request_)
        assert sock.recv(1) == b""
    assert len(errors) == 1


def test_the_server_limits_the_connections_of_a_peer(server: serve.Server) -> None:
    socks = [connect(server, wire.HELLO + wire.REPLY) for _ in range(serve.MAX_OF_ONE_PEER)]
    try:
        for sock in socks:
            wire.receive(sock, 4)
        with connect(server, b"") as one_more:
            assert one_more.recv(1) == b""
        assert server.totals.refused == 1
    finally:
        for sock in socks:
            sock.close()


def test_ipv6_addresses_of_one_64_bit_prefix_are_one_peer() -> None:
    assert serve.peer_of("192.0.2.7") == serve.peer_of("::ffff:192.0.2.7") == "192.0.2.7"
    assert serve.peer_of("2001:db8::1") == serve.peer_of("2001:db8:0:0:ffff::2") == "2001:db8::/64"
    assert serve.peer_of("fe80::1%eth0") == "fe80::/64"
    assert serve.peer_of("::1") == "::/64"


@pytest.mark.parametrize(
    "opening",
    [b"", wire.HELLO[:1], b"wrong", wire.HELLO + wire.REPLY + bytes(7), wire.HELLO + wire.SINK + bytes(7)],
    ids=["nothing", "half a greeting", "as a plain sink", "half a request", "half a stamp"],
)
def test_a_connection_that_is_silent_within_a_message_is_closed(server: serve.Server, opening: bytes) -> None:
    server.settings.silence_s = 0.3
    with connect(server, opening) as sock:
        assert sock.recv(5) in (b"", wire.HELLO)
        assert sock.recv(1) == b""


def test_a_client_that_leaves_during_idle_time_frees_its_place(server: serve.Server) -> None:
    with connect(server, wire.HELLO + wire.REPLY) as sock:
        wire.receive(sock, len(wire.HELLO))
        begin = time.monotonic()
        sock.sendall(wire.REQUEST.pack(16, 1, 0.3, wire.IDLE_MODES.index("timer")))
        wire.receive(sock, 16)
        assert time.monotonic() - begin >= 0.3
        sock.sendall(wire.REQUEST.pack(16, 2, wire.MAX_IDLE_S, wire.IDLE_MODES.index("timer")))
    until(lambda: not server.totals.open, 60, "the connections to end")
    assert server.totals.bursts_sent == 1


@pytest.mark.parametrize("most", ["MAX_OF_ONE_PEER", "MAX_CONNECTIONS"])
def test_the_connection_that_is_idle_longest_is_closed_for_a_new_one(
    server: serve.Server, monkeypatch: pytest.MonkeyPatch, most: str
) -> None:
    monkeypatch.setattr(serve, most, 3)
    with ExitStack() as stack:
        socks = [stack.enter_context(connect(server, wire.HELLO + wire.REPLY)) for _ in range(3)]
        for sock in socks:
            wire.receive(sock, len(wire.HELLO))
        until(lambda: len(server._idle_since) == 3, 60, "three idle connections")
        with connect(server, b"") as one_more:
            assert one_more.recv(1) == b""
        with server._lock:
            for sock in server._idle_since:
                number = [mine.getsockname() for mine in socks].index(sock.getpeername())
                server._idle_since[sock] -= (30, 90, 60)[number]
        with connect(server, wire.HELLO + wire.REPLY) as one_more:
            assert wire.receive(one_more, len(wire.HELLO)) == wire.HELLO
            assert socks[1].recv(1) == b""
            for sock in (socks[0], socks[2], one_more):
                sock.sendall(wire.REQUEST.pack(16, 1, 0.0, 0))
                wire.receive(sock, 16)
    until(lambda: not server.totals.open, 60, "the connections to end")


def not_reading(server: serve.Server) -> socket.socket:
    """Return a peer with a small receive buffer that requests the largest burst and reads nothing of it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(60)
    sock.connect(("127.0.0.1", server.port))
    sock.sendall(wire.HELLO + wire.REPLY)
    wire.receive(sock, len(wire.HELLO))
    sock.sendall(wire.REQUEST.pack(wire.MAX_BURST, 1, 0.0, 0))
    return sock


def test_a_client_that_does_not_read_is_disconnected(server: serve.Server) -> None:
    server.settings.patience_s = 0.3
    with not_reading(server):
        until(lambda: not server.totals.open, 60, "the connections to end")
    assert server.totals.connections == 1
    assert server.totals.bursts_sent == 0


@pytest.mark.parametrize("bounded", [True, False])
def test_a_bounded_server_leaves_little_of_a_burst_unsent_in_the_kernel(
    server: serve.Server, monkeypatch: pytest.MonkeyPatch, bounded: bool
) -> None:
    # This is less than the limit of any host, up to which the kernel would grow the buffer.
    server.settings.sndbuf = 400_000
    monkeypatch.setattr(serve, "UNSENT", 64 << 10)
    server.settings.bounded = bounded
    with not_reading(server):
        (sock,) = server.totals.open
        until(lambda: TcpInfo.of(sock).notsent_bytes and not select.select([], [sock], [], 0)[1], 60, "a full buffer")
        # The last piece that the server sends below the limit has up to 64 KB.
        assert (TcpInfo.of(sock).notsent_bytes <= serve.UNSENT + (64 << 10)) == bounded


def test_refusals_are_reported_every_ten_seconds_and_at_the_end(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, refusals, totals = [0.0], reproduce._Refusals(), serve.ServerCounters()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    reports = []
    for clock[0], totals.refused, last in ((0, 0, 0), (1, 1, 0), (2, 5, 0), (11, 5, 0), (30, 5, 0), (31, 6, 1)):
        refusals.tell(totals, last=bool(last))
        reports.append(capfd.readouterr().err)
    line = "refused so far: {} (too many at once)\n".format
    assert reports == ["", line("1 connection"), "", line("5 connections"), "", line("6 connections")]


def test_a_request_may_come_in_pieces(server: serve.Server) -> None:
    request = wire.REQUEST.pack(100, 3, 0.0, 0)
    with connect(server, wire.HELLO + wire.REPLY) as sock:
        wire.receive(sock, len(wire.HELLO))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(request[:7])
        # Wait until the server's kernel has acknowledged the first piece.
        until(lambda: not TcpInfo.of(sock).unacked, 60, "the acknowledgement")
        sock.sendall(request[7:])
        assert wire.STAMP.unpack(wire.receive(sock, 100)[: wire.STAMP.size])[0] == 3


def test_a_thread_that_cannot_start_ends_only_its_connection(
    server: serve.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(_: threading.Thread) -> None:
        monkeypatch.setattr(threading.Thread, "start", start)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with connect(server, b"") as sock:
        assert sock.recv(1) == b""
    assert not server.totals.open
    with connect(server, wire.HELLO + wire.REPLY) as sock:
        assert wire.receive(sock, len(wire.HELLO)) == wire.HELLO


def test_a_burst_that_takes_longer_than_patience_s_ends_the_connection(server: serve.Server) -> None:
    server.settings.patience_s = 0.3

    def dribble(sock: socket.socket) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            # Each byte arrives long before any timeout of a single receive.
            sock.sendall(b"x")
            time.sleep(0.05)

    with connect(server, wire.HELLO + wire.SINK) as sock:
        wire.receive(sock, len(wire.HELLO))
        sock.sendall(wire.STAMP.pack(1, wire.MAX_BURST))
        with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
            dribble(sock)


@pytest.mark.parametrize("done", [0, 1, 15, 16, 17, 1 << 20, (1 << 20) + 15, (3 << 20) + 4])
def test_the_parts_of_a_burst_are_its_stamp_and_zeros(done: int) -> None:
    stamp, size = wire.STAMP.pack(2**64 - 1, 2**63), (3 << 20) + 5
    assert b"".join(wire._parts(stamp, size, done)) == (stamp + bytes(size - len(stamp)))[done:]


@pytest.mark.slow
def test_the_command_says_where_it_listens_and_in_the_end_what_it_served() -> None:
    need_loopback()
    need_command()
    command = [*COMMAND, "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=ENVIRONMENT) as process:
        try:
            assert process.stderr
            said = re.fullmatch(
                r"Listening on 127\.0\.0\.1 port (\d+); press Ctrl-C to stop\.\n", process.stderr.readline()
            )
            assert said
            socket.create_connection(("127.0.0.1", int(said[1])), 60).close()
            process.send_signal(signal.SIGTERM)
            stdout, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert re.fullmatch(r"[01] connections?; received 0 bursts \(0 B\), sent 0 bursts\n", stdout)


def test_a_server_that_cannot_listen_names_the_reason(server: serve.Server) -> None:
    with pytest.raises(UsageError, match="is taken"):
        serve.Server("127.0.0.1", server.port)
    with pytest.raises(UsageError, match="there is no port"):
        serve.Server("127.0.0.1", 70_000)
    with pytest.raises(UsageError, match="can't listen on"):
        serve.Server("192.0.2.77", 0)


def test_an_unknown_congestion_control_is_refused() -> None:
    with pytest.raises(KernelLacks, match="no congestion control nonesuch") as caught:
        serve.Server("127.0.0.1", 0, serve.Settings(cc="nonesuch"))
    assert "reno" in caught.value.remedy
