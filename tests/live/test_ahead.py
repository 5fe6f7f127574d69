# SPDX-License-Identifier: Apache-2.0
"""Connections are named before their windows are reset, and only those; the truth is TCP_INFO around the next send."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cwndtrace.analysis import ahead
from cwndtrace.capture.connections import snapshot
from cwndtrace.capture.source import Filters
from cwndtrace.kernel import netns
from cwndtrace.lab import path as paths
from cwndtrace.lab.link import Link
from cwndtrace.lab.namespaces import write_sysctl
from cwndtrace.tcp import IDLE_SYSCTL
from tests.harness import tcp
from tests.harness.command import call
from tests.harness.lab import PathEnd

pytestmark = pytest.mark.live

RTT_MS = 40
WINDOW = 100
"""Segments: a burst of such a window loses more than a millisecond from the initial window."""


@pytest.fixture(scope="module")
def path() -> Iterator[paths.Path]:
    """A path whose round trip makes a reset cost something; the tests send from its server's end."""
    with paths.open_path(Link(rtt_ms=RTT_MS), force="relay") as opened:
        for end in (opened.server, opened.client):
            write_sysctl(end.namespace, "net.ipv4.tcp_no_metrics_save", "1")
        yield opened


def connected(path: paths.Path, drain: tcp.Drain, ca: str = "cubic") -> tcp.TcpConnection:
    near, far = PathEnd(path.server), PathEnd(path.client)
    connection = tcp.connect(near, drain, address=far.address, to=far, device=near.device, ca=ca)
    connection.grow(WINDOW)
    return connection


def due_now(c: tcp.TcpConnection) -> bool:
    """Return whether the connection is named now."""
    settings = {namespace.inode: netns.idle_sysctl(namespace) for namespace in netns.all_reachable()}
    rows = ahead.due(snapshot(Filters(), 0).to_pandas(), settings)
    mine = (rows["netns_ino"] == c.space.inode) & (rows["sport"] == c.sport) & (rows["dport"] == c.dport)
    return bool(mine.any())


def doctor(c: tcp.TcpConnection, what: str) -> list[dict[str, Any]]:
    """Return what doctor says of the connection."""
    done = call("doctor", "--json")
    assert done.returncode == 0, done.stderr
    ends = ("netns_ino", "saddr", "sport", "daddr", "dport")
    return [row for row in json.loads(done.stdout)[what] if tuple(row[name] for name in ends) == c.key]


def test_a_connection_is_named_once_it_is_idle_longer_than_the_rto_and_is_then_reset(
    path: paths.Path, drain: tcp.Drain
) -> None:
    c = connected(path, drain)
    try:
        # A pause of the machine between the send and the snapshot would be idle time, so the attempt is repeated.
        def unnamed_while_busy() -> bool:
            c.send()
            named = due_now(c)
            i = c.info()
            return i.last_snd_us < i.rto_us and not named

        tcp.until(unnamed_while_busy, 20, "a snapshot within an RTO of a send")
        before = c.grow(WINDOW).cwnd
        c.idle(0)
        assert due_now(c)
        (found,) = doctor(c, "due")
        assert found["idle_us"] > found["rto_us"]
        sent = c.send()
        assert sent.reason == "idle"
        # More idle time has passed since, so the window may fall further than it was said.
        assert found["cwnd"] == before == sent.before.cwnd
        assert sent.after.cwnd <= found["cwnd_next"] < before
    finally:
        c.close()


def test_the_predicted_window_is_the_kernels(path: paths.Path, drain: tcp.Drain) -> None:
    c = connected(path, drain)
    try:

        def predicted_in_time() -> bool:
            c.grow(WINDOW)
            i = c.idle(0)
            settings = {c.space.inode: 1}
            rows = ahead.due(snapshot(Filters(netns=c.space.inode), 0).to_pandas(), settings)
            (after,) = rows.loc[rows["sport"] == c.sport, "cwnd_next"]
            sent = c.send()
            # Between the snapshot and the send, the idle time must not have passed another RTO.
            same = sent.before.last_snd_us + 8000 < 2 * i.rto_us
            assert not same or sent.after.cwnd == after
            return same

        tcp.until(predicted_in_time, 30, "a send within two RTOs")
    finally:
        c.close()


def test_no_connection_is_named_whose_window_stays(path: paths.Path, drain: tcp.Drain) -> None:
    exempt, off = connected(path, drain, ca="bbr"), connected(path, drain)
    try:
        for c in (exempt, off):
            c.idle(0)
        assert due_now(off)
        write_sysctl(path.server.namespace, IDLE_SYSCTL, "0")
        assert not due_now(exempt)
        assert not due_now(off)
        assert [doctor(c, "due") for c in (exempt, off)] == [[], []]
        sent = off.send()
        assert sent.after.cwnd == sent.before.cwnd
        write_sysctl(path.server.namespace, IDLE_SYSCTL, "1")
        exempt.idle(0)
        assert not due_now(exempt)
    finally:
        write_sysctl(path.server.namespace, IDLE_SYSCTL, "1")
        for c in (exempt, off):
            c.close()


def test_messages_slower_than_the_rto_are_named(path: paths.Path, drain: tcp.Drain) -> None:
    c, stop = connected(path, drain), threading.Event()

    def beat() -> None:
        while not stop.wait(1.5 * c.info().rto_us / 1e6):
            c.sock.send(bytes(20))

    heart = threading.Thread(target=beat)
    heart.start()
    found: list[dict[str, Any]] = []
    try:

        def named() -> bool:
            found[:] = doctor(c, "heartbeats")
            return bool(found)

        tcp.until(named, 60, "the heartbeats")
        assert found[0]["idle_us"] > found[0]["rto_us"]
        assert found[0]["bytes"] % 20 == 0
        tcp.until(lambda: c.info().cwnd == tcp.INIT_CWND, 20, "the window to fall")
    finally:
        stop.set()
        heart.join()
        c.close()
