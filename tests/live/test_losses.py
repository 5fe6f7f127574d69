# SPDX-License-Identifier: Apache-2.0
"""Tests of windows that fall by a loss, or by what the kernel takes for one, with real packets that are dropped."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

import pytest

from tests.harness import tcp
from tests.harness.link import VethLink
from tests.harness.raw_peer import HERE, PEER, PORT, RawPeer
from tests.harness.tcp import Connect
from tests.harness.tracing import EMULATED, EXACT, Record, Tracer

pytestmark = pytest.mark.live

NOT_IN_TIME = pytest.mark.skipif(
    EMULATED, reason="an emulated machine can't restore the link before the timeout; tests/vm/test_probes.py uses netem"
)


def lose_a_tail(link: VethLink, connection: tcp.TcpConnection) -> bool:
    """Lose a segment with nothing behind it; return true if a tail loss probe, and no timeout, repaired that."""
    timeouts = link.timeouts()
    with link.cut():
        connection.send()
    connection.quiet()
    return link.timeouts() == timeouts


def repaired(connection: tcp.TcpConnection) -> tuple[tcp.Info, tcp.Info]:
    """Send what shows that the probe repaired a loss; return TCP_INFO before the send and after its ACK."""
    before = connection.info()
    connection.sock.send(b"x" * 100)
    return before, connection.quiet()


def check_repair(tracer: Tracer, connection: tcp.TcpConnection, before: tcp.Info, after: tcp.Info) -> None:
    (record,) = [r for r in tracer.of(connection) if r["reason"] == "tlp_loss"]
    truth: Record = {
        "probe": tracer.probes["tlp_loss"],
        "ca_name": connection.ca,
        "ca_state": "open",
        "tcp_state": "established",
        "cwnd_before": before.cwnd,
        "cwnd_after": after.cwnd,
        "ssthresh_before": before.ssthresh,
        "ssthresh_after": after.ssthresh,
        "unsent_bytes": 0,
        "unacked_bytes": 0,
        "total_retrans": after.total_retrans,
    }
    assert {name: record[name] for name in truth} == truth


@NOT_IN_TIME
@pytest.mark.parametrize("ca", ["cubic", "reno"])
def test_a_loss_that_a_tail_loss_probe_repairs_is_a_reset(
    tracer: Tracer, link: VethLink, connect: Connect, ca: str
) -> None:
    """The kernel counts the same: TCPLossProbeRecovery."""
    connection = connect(link.a, to=link.b, address="10.9.0.2", device="cwt0", ca=ca)
    for _ in range(20):
        connection.grow(40)
        recoveries = link.a.counter("TCPLossProbeRecovery")
        if not lose_a_tail(link, connection):
            continue
        # Nothing says yet that this was a loss: the ACK may have been for the first transmission.
        assert link.a.counter("TCPLossProbeRecovery") == recoveries
        before, after = repaired(connection)
        if before.cwnd > after.cwnd:
            break
    assert (link.a.counter("TCPLossProbeRecovery"), after.cwnd) == (recoveries + 1, after.ssthresh)
    assert tracer.sees("tlp_loss")
    check_repair(tracer, connection, before, after)


@NOT_IN_TIME
def test_a_repaired_loss_that_shows_after_idle_time(tracer: Tracer, link: VethLink, connect: Connect) -> None:
    """Idle time between the probe and the ACK that shows the loss changes ssthresh, and the loss ends the following."""
    connection = connect(link.a, to=link.b, address="10.9.0.2", device="cwt0", ca="reno")
    # This loss sets ssthresh, so that idle time raises it once the window is larger.
    tcp.until(lambda: lose_a_tail(link, connection) and repaired(connection), 20, "a loss that a probe repairs")
    tcp.until(lambda: connection.grow(40).cwnd and lose_a_tail(link, connection), 20, "another")
    probed = connection.idle(tcp.IDLE_S)
    falls = len(tracer.of(connection))
    # The restart of the window in this send sets ssthresh, before its ACK shows the loss.
    connection.send()
    after = connection.quiet()
    idle, loss = tracer.of(connection)[falls:]
    assert (idle["reason"], idle["cwnd_before"], idle["ssthresh_before"]) == ("idle", probed.cwnd, probed.ssthresh)
    assert (loss["reason"], loss["cwnd_before"], loss["cwnd_after"]) == ("tlp_loss", idle["cwnd_after"], after.cwnd)
    assert probed.ssthresh != loss["ssthresh_before"] == idle["ssthresh_after"]
    assert loss["ssthresh_after"] == after.ssthresh
    connection.send()
    connection.quiet()
    tracer.settle()
    (end,) = [r for r in tracer.recoveries if (r["skaddr"], r["reset_ts_ns"]) == (idle["skaddr"], idle["ts_ns"])]
    assert end["outcome"] == "loss"


@NOT_IN_TIME
def test_a_repaired_loss_is_seen_once_the_peer_has_closed_its_side(
    tracer: Tracer, link: VethLink, connect: Connect
) -> None:
    """The kernel tells tcp_probe of no ACK then."""
    connection = connect(link.a, to=link.b, address="10.9.0.2", device="cwt0")
    connection.grow(40)
    connection.peer.shutdown(socket.SHUT_WR)
    for _ in range(20):
        if lose_a_tail(link, connection):
            before, after = repaired(connection)
            if after.cwnd < before.cwnd:
                break
    (record,) = [r for r in tracer.of(connection) if r["reason"] == "tlp_loss"]
    assert (record["tcp_state"], record["cwnd_before"], record["cwnd_after"], record["ssthresh_before"]) == (
        "close_wait",
        before.cwnd,
        after.cwnd,
        before.ssthresh,
    )


def test_the_end_of_a_reduction_is_no_repaired_loss(tracer: Tracer, link: VethLink, connect: Connect) -> None:
    """ECN and local congestion enter CWR too, and leave it at a later ACK."""
    for space in (link.a, link.b):
        space.sysctl("net.ipv4.tcp_ecn", "1")
    try:
        connection = connect(link.a, to=link.b, address="10.9.0.2", device="cwt0")
        connection.grow(40)
        # A queue that is shorter than the burst, and of which the sender is told (local congestion).
        link.a.ip("link", "set", "cwt0", "txqueuelen", "2")
        tcp.run("tc", "-n", link.a.name, "qdisc", "replace", "dev", "cwt0", "root", "tbf", "rate", "20mbit",
                "burst", "3000", "limit", "9000")  # fmt: skip
        connection.until(lambda i: bool(connection.sock.send(bytes(60_000))) and i.ca_state == 2, "a reduction")
        connection.quiet()
        connection.until(lambda i: bool(connection.send()) and i.ca_state == 0, "its end")
    finally:
        for space in (link.a, link.b):
            space.sysctl("net.ipv4.tcp_ecn", "2")
        tcp.run("tc", "-n", link.a.name, "qdisc", "del", "dev", "cwt0", "root")
    assert [r for r in tracer.of(connection) if r["reason"] == "tlp_loss"] == []


# ---- a peer that shrinks its window ------------------------------------------------------------------------


@pytest.fixture
def peer(make_space: Callable[[], tcp.Space]) -> Iterator[RawPeer]:
    """A peer that answers as the test says."""
    with RawPeer(make_space()) as raw:
        yield raw


def test_a_timeout_with_a_closed_window_says_so(tracer: Tracer, peer: RawPeer) -> None:
    """The kernel's retransmissions become probes of the window then, and nothing was lost."""
    with peer.space.enter(socket.socket) as sock:
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sock.connect((PEER, PORT))
        peer.answer(60_000)
        tcp.until(lambda: tcp.info(sock).snd_wnd, 20, "the connection")
        sock.send(bytes(3000))
        peer.take(3000)
        peer.ack(0, missing=1000)
        before = tcp.info(sock)
        assert (before.snd_wnd, before.unacked > 0) == (0, True)
        tcp.until(lambda: tcp.info(sock).cwnd < before.cwnd, 20, "the timeout")
        peer.ack(60_000)
        tcp.until(lambda: not tcp.info(sock).unacked, 20, "the ACK")
        sport = sock.getsockname()[1]
    (record,) = [r for r in tracer.within(peer.space.inode) if r["sport"] == sport]
    truth: Record = {
        "reason": "rto_loss", "snd_wnd": 0, "tcp_state": "established", "unacked_bytes": 1000, "unsent_bytes": 0,
        "cwnd_before": before.cwnd, "cwnd_after": 1, "saddr": HERE, "daddr": PEER,
    }  # fmt: skip
    assert {name: record[name] for name in truth} == truth
    assert record["idle_us"] >= record["rto_us"] or tracer.probe in EXACT
