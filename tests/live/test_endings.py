# SPDX-License-Identifier: Apache-2.0
"""Tests of resets, and of expected resets that don't happen, other than by a plain send.

These are a closed window that opens again, a send that blocks, a retransmission timeout, a window that goes unused, and
connections that end meanwhile.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time

import pytest

from cwndtrace.capture.connections import snapshot
from cwndtrace.capture.source import Filters
from tests.harness import tcp
from tests.harness.link import VethLink
from tests.harness.tcp import Connect, until
from tests.harness.tracing import EMULATED, EXACT, Record, Tracer, check

pytestmark = pytest.mark.live


def test_a_closed_window_that_opens_is_reset(tracer: Tracer, connect: Connect) -> None:
    connection = connect(read_buffer=200_000)
    connection.grow()
    closed = connection.fill()
    connection.idle(tcp.IDLE_S)
    send = connection.reopen()
    assert (send.reason, send.before.snd_wnd, closed.unsent > 0) == ("idle", 0, True)
    check(tracer, connection)


def test_a_send_that_blocks_is_withdrawn(counter: Tracer, counted_space: tcp.Space, connect: Connect) -> None:
    connection = connect(counted_space, read_buffer=200_000)
    connection.grow()
    connection.fill()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    # If the machine is slow, the first of these sends ends idle time.
    with contextlib.suppress(BlockingIOError):
        # The pieces are small, because the kernel takes the last one whole, whatever its size.
        while True:
            connection.send(lambda: connection.sock.send(b"x", socket.MSG_DONTWAIT | socket.MSG_EOR))
    counter.settle()
    before = counter.tally.withdrawn

    def blocked() -> None:
        with pytest.raises(BlockingIOError):
            connection.sock.send(b"x" * 100_000, socket.MSG_DONTWAIT)

    connection.idle(tcp.IDLE_S)
    send = connection.send(blocked)
    assert send.reason is None
    assert send.before.last_snd_us > send.before.rto_us
    seen = check(counter, connection)
    assert connection.reopen().reason == "idle"
    assert check(counter, connection) == seen + 1
    if counter.probe == "sendmsg":
        assert counter.tally.withdrawn > before


def test_each_send_behind_a_closed_window_is_a_reset(tracer: Tracer, connect: Connect) -> None:
    """As long as nothing can be sent, each new buffer is another restart."""
    connection = connect(read_buffer=200_000)
    connection.grow(80)
    connection.fill()
    connection.idle(0.25)
    # MSG_EOR ends the buffer of each send.
    for _ in range(3):
        connection.send(lambda: connection.sock.send(b"x", socket.MSG_EOR))
    assert [s.reason for s in connection.sends[-3:]] == ["idle"] * 3
    windows = [s.before.cwnd for s in connection.sends[-3:]] + [connection.info().cwnd]
    assert windows == sorted(windows, reverse=True)
    connection.until(lambda i: i.last_ack_us < i.last_snd_us - 50_000, "the ACK of a window probe")
    held = connection.info().unsent
    connection.reopen()
    if tracer.probe == "tcp_probe":
        # Nothing is sent between these falls, so tcp_probe sees them as one, with the one of the ACK that opens the
        # window.
        last = tracer.of(connection)[-1]
        assert (last["cwnd_before"], last["unsent_bytes"]) == (windows[0], held)
        assert last["cwnd_after"] <= windows[-1]
    else:
        check(tracer, connection)


def test_a_window_at_the_initial_window_stays(counter: Tracer, counted_space: tcp.Space, connect: Connect) -> None:
    connections = [connect(counted_space) for _ in range(3)]
    for connection in connections:
        connection.send()
    counter.settle()
    before = counter.tally.unchanged
    for connection in connections:
        connection.idle(tcp.IDLE_S)
    for connection in connections:
        connection.send()
        assert connection.sends[-1].before.cwnd == connection.sends[-1].after.cwnd == tcp.INIT_CWND
    assert check(counter, *connections) == 0
    counter.settle()
    # The tracepoint fires only if the window falls, and tcp_probe only compares windows, so both count nothing.
    seen = 0 if counter.probe in ("tracepoint", "tcp_probe") else len(connections)
    assert counter.tally.unchanged - before == seen


def test_appending_to_corked_data_is_no_restart(counter: Tracer, counted_space: tcp.Space, connect: Connect) -> None:
    connection = connect(counted_space)
    connection.grow()
    connection.idle(tcp.IDLE_S)
    before = counter.tally.withdrawn
    with tcp.corked(connection.sock):
        connection.send()
        connection.send()
        first, second = connection.sends[-2:]
        assert (first.reason, second.reason, second.before.unsent) == ("idle", None, 100)
        assert second.before.last_snd_us > second.before.rto_us
    connection.quiet()
    records = counter.of(connection)
    assert [(r["cwnd_before"], r["cwnd_after"]) for r in records] == [(first.before.cwnd, first.after.cwnd)]
    assert counter.tally.withdrawn == before
    if counter.probe != "tcp_probe":
        assert check(counter, connection) == 1


def test_a_reset_of_corked_data_is_kept_if_the_connection_is_aborted(tracer: Tracer, connect: Connect) -> None:
    connection = connect()
    connection.grow()
    connection.idle(tcp.IDLE_S)
    connection.sock.setsockopt(socket.IPPROTO_TCP, tcp.CORK, 1)
    send = connection.send()
    assert (send.reason, send.after.unsent) == ("idle", 100)
    connection.cookie = lambda: 0  # type: ignore[method-assign]
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.sock.close()
    if tracer.probe == "tcp_probe":
        assert not tracer.of(connection)
    else:
        assert check(tracer, connection) == 1


def test_a_new_connection_in_the_memory_of_an_old_one_has_no_reset(tracer: Tracer, connect: Connect) -> None:
    """The state of a connection with a large window must not be taken for that of the next socket at its address."""
    first = [connect() for _ in range(20)]
    for connection in first:
        connection.grow()
        connection.close()
    # An old window would be taken for a new socket's only after more idle time than the RTO, which is 200 ms here.
    time.sleep(0.25)
    second = [connect() for _ in range(20)]
    for connection in second:
        connection.send()
    assert check(tracer, *second) == 0


# ---- retransmission timeouts ------------------------------------------------------------------------------


def test_retransmission_timeouts_are_resets(tracer: Tracer, link: VethLink, connect: Connect) -> None:
    kinds = [("cubic", 1), ("reno", 1), ("cubic", 20), ("reno", 20)]
    connections = [connect(link.a, to=link.b, address="10.9.0.2", device="cwt0", ca=ca) for ca, _ in kinds]
    for connection in connections:
        connection.grow()
    with link.cut():
        timeouts = link.timeouts()
        for connection, (_, segments) in zip(connections, kinds, strict=True):
            # If cutting the link took long, this send ends idle time; the timeout lowers the window that it leaves.
            connection.send(lambda c=connection, n=segments: c.sock.send(bytes(1448 * n)))  # type: ignore[misc]
        # getsockopt(TCP_INFO) would hold the socket's lock, and the timeout would then run in the calling task.
        until(lambda: link.timeouts() >= timeouts + len(kinds), 20, "the retransmission timeouts")
        afters = [c.info() for c in connections]
    for connection, after in zip(connections, afters, strict=True):
        check_timeout(tracer, connection, connection.sends[-1].after, after)
    for connection in connections:
        # Recovery is no reset. After it, no retransmission is left for the next test to see.
        connection.quiet()
    assert len(timeouts_of(tracer, *connections)) == (len(kinds) if tracer.sees("rto_loss") else 0)


def timeouts_of(tracer: Tracer, *connections: tcp.TcpConnection) -> list[Record]:
    return [r for r in tracer.of(*connections) if r["reason"] != "idle"]


def check_timeout(tracer: Tracer, connection: tcp.TcpConnection, before: tcp.Info, after: tcp.Info) -> None:
    assert (after.ca_state, before.ca_state, after.cwnd < before.cwnd) == (4, 0, True)
    if not tracer.sees("rto_loss"):
        assert not timeouts_of(tracer, connection)
        return
    (record,) = timeouts_of(tracer, connection)
    # The tracepoint shows only prior_ssthresh, which comes from tcp_current_ssthresh().
    before_ssthresh = before.ssthresh
    if tracer.probe not in EXACT:
        before_ssthresh = max(before.ssthresh, (before.cwnd >> 1) + (before.cwnd >> 2))
    truth = {
        "reason": "rto_loss",
        "probe": tracer.probes["rto_loss"],
        "ca_name": connection.ca,
        "ca_state": "loss",
        "cwnd_before": before.cwnd,
        "cwnd_after": after.cwnd,
        "ssthresh_before": before_ssthresh,
        "ssthresh_after": after.ssthresh,
        "rto_us": before.rto_us,
        "srtt_us": before.srtt_us,
        "bytes_acked": before.bytes_acked,
        "ifindex": connection.ifindex,
        "tgid": 0,
        "tid": 0,
        "comm": "",
    }
    assert {name: record[name] for name in truth} == truth


# ---- windows that go unused -------------------------------------------------------------------------------


@pytest.mark.skipif(
    EMULATED, reason="a jiffy is too short for an emulated machine; tests/vm/test_probes.py uses netem for this"
)
def test_idle_time_of_exactly_the_rto_costs_half_of_the_unused_window(tracer: Tracer, connect: Connect) -> None:
    """It is too short for a restart, but long enough for tcp_cwnd_application_limited()."""
    connections = [connect(ca=ca) for ca in ("cubic", "reno")]
    for connection in connections * 3:
        connection.grow(60)
        connection.until(lambda i: i.last_snd_us >= i.rto_us, "idle time of an RTO")
        connection.send()
    reasons = [s.reason for c in connections for s in c.sends]
    assert "app_limited" in reasons
    check(tracer, *connections)


def test_snapshots_have_no_mini_sockets_of_closed_connections(
    tracer: Tracer, space: tcp.Space, connect: Connect
) -> None:
    """In FIN-WAIT-2 and TIME-WAIT the kernel keeps only a mini socket, which has addresses and no window."""
    tracer.settle()
    # With a tcp_fin_timeout of 60 s or less, a mini socket replaces the socket at once.
    space.sysctl("net.ipv4.tcp_fin_timeout", "60")
    half, whole, closed = connect(), connect(), connect()
    half.sock.shutdown(socket.SHUT_WR)
    half.until(lambda _: tcp_state(half) == "FIN-WAIT-2", "the other end's ACK")
    ports = {c.sport: c for c in (half, whole, closed)}
    closed.drain.pause(closed.peer)
    closed.sock.close()

    def remains() -> bool:
        return b"FIN-WAIT-2" in tcp.run("ss", "-N", space.name, "-tan", f"sport = :{closed.sport}").encode()

    until(remains, 20, "a mini socket in FIN-WAIT-2")
    rows = [row for row in snapshot(Filters(), 0).to_pylist() if row["netns_ino"] == space.inode]
    by_port = {row["sport"]: row for row in rows if row["sport"] in ports and row["dport"] == ports[row["sport"]].dport}
    assert {(by_port[c.sport]["state"], by_port[c.sport]["cwnd"] > 0) for c in (half, whole)} == {
        ("FIN-WAIT-2", True),
        ("ESTAB", True),
    }
    assert closed.sport not in by_port
    assert all(row["cwnd"] > 0 and row["mss"] > 0 for row in rows)


def tcp_state(connection: tcp.TcpConnection) -> str:
    """Return the state of the sending end by its usual name."""
    raw = connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return {1: "ESTAB", 4: "FIN-WAIT-1", 5: "FIN-WAIT-2"}.get(raw[0], str(raw[0]))
