# SPDX-License-Identifier: Apache-2.0
"""Tests of idle resets whose window changes again before an ACK or a send confirms them, and of those without either.

Probe sendmsg computes what a restart leaves, and looks at the window later, which may have grown or fallen by then.
"""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from tests.harness import tcp
from tests.harness.link import VethLink
from tests.harness.tcp import Connect, until
from tests.harness.tracing import Record, Tracer

pytestmark = pytest.mark.live

SMALL = 20_000
"""More than a window of ten segments of 1,460 bytes, so that the window grows, and less than a buffer takes."""
IDLE_S = 1.0


def was_idle(connection: tcp.TcpConnection) -> tcp.Info:
    """Let a connection grow its window and be idle until it falls to the initial one, and return TCP_INFO then."""
    connection.grow(24, burst=40_000)
    return connection.idle(IDLE_S)


def check(tracer: Tracer, connection: tcp.TcpConnection, before: tcp.Info, since_ns: int) -> Record:
    """Return the only record since then, and compare its windows with the kernel's rule."""

    def records() -> list[Record]:
        tracer.settle()
        return [r for r in tracer.taken(connection) if r["ts_ns"] >= since_ns and r["reason"] == "idle"]

    until(records, 20, "the record")
    (record,) = records()
    halvings = -(-record["idle_us"] // before.rto_us) - 1
    assert (record["cwnd_before"], record["ssthresh_before"]) == (before.cwnd, before.ssthresh)
    assert record["cwnd_after"] == max(before.cwnd >> halvings, tcp.INIT_CWND) < before.cwnd
    assert record["ssthresh_after"] == max(before.ssthresh, (before.cwnd >> 1) + (before.cwnd >> 2))
    return record


def test_a_window_that_grew_behind_a_peers_fin(tracer: Tracer, connect: Connect) -> None:
    """The kernel tells of no ACK once the peer has shut its side down, so the next send comes after the growth."""
    if tracer.probe == "tcp_probe":
        pytest.skip("the kernel tells tcp_probe of no ACK there")
    connection = connect()
    connection.peer.shutdown(socket.SHUT_WR)
    before, since = was_idle(connection), time.monotonic_ns()
    connection.sock.send(bytes(SMALL))
    grown = connection.quiet()
    connection.sock.send(b"x")
    record = check(tracer, connection, before, since)
    assert record["tcp_state"] == "close_wait"
    assert grown.cwnd > record["cwnd_after"]


def test_a_window_that_grew_while_the_connection_closed(tracer: Tracer, connect: Connect) -> None:
    connection = connect()
    before, since = was_idle(connection), time.monotonic_ns()
    connection.sock.send(bytes(SMALL))
    connection.sock.close()
    check(tracer, connection, before, since)


def test_a_timeout_before_the_first_ack(tracer: Tracer, link: VethLink, connect: Connect) -> None:
    connection = connect(link.a, to=link.b, address="10.9.0.2", device="cwt0")
    before, since = was_idle(connection), time.monotonic_ns()
    with link.cut():
        timeouts = link.timeouts()
        connection.sock.send(bytes(SMALL))
        # getsockopt(TCP_INFO) would hold the socket's lock, and the timeout would then run in the calling task.
        until(lambda: link.timeouts() > timeouts, 20, "a retransmission timeout")
    check(tracer, connection, before, since)
    connection.quiet()
    assert [r["reason"] for r in tracer.taken(connection) if r["ts_ns"] >= since] == [
        "idle",
        *(["rto_loss"] if tracer.sees("rto_loss") else []),
    ]


def test_local_congestion_before_the_first_ack(tracer: Tracer, link: VethLink, connect: Connect) -> None:
    """The queue of the device drops the burst and says so, which lowers ssthresh at once."""
    connection = connect(link.a, to=link.b, address="10.9.0.2", device="cwt0")
    before, since = was_idle(connection), time.monotonic_ns()
    tcp.run("tc", "-n", link.a.name, "qdisc", "replace", "dev", "cwt0", "root", "tbf", "rate", "20mbit",
            "burst", "3000", "limit", "1")  # fmt: skip
    try:
        connection.sock.send(bytes(SMALL))
        connection.until(lambda i: i.ca_state > 1, "a reduction")
    finally:
        tcp.run("tc", "-n", link.a.name, "qdisc", "del", "dev", "cwt0", "root")
    check(tracer, connection, before, since)
    connection.quiet()


def test_a_trace_that_ends_before_the_ack(tracer: Tracer, link: VethLink, connect: Connect) -> None:
    connection = connect(link.a, to=link.b, address="10.9.0.2", device="cwt0")
    with contextlib.ExitStack() as stack:
        short = stack.enter_context(Tracer(tracer.probe, netns=link.a.name, idle_only=True))
        before, since = was_idle(connection), time.monotonic_ns()
        stack.enter_context(link.cut())
        connection.sock.send(b"x")
        short.close()
    connection.quiet()
    (record,) = [r for r in short.records if r["ts_ns"] >= since]
    assert (record["cwnd_before"], record["cwnd_after"] < before.cwnd) == (before.cwnd, True)
    assert [r["reset_ts_ns"] for r in short.recoveries if r["reset_ts_ns"] >= since] == [record["ts_ns"]]
