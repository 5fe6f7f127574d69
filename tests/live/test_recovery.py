# SPDX-License-Identifier: Apache-2.0
"""Tests of each outcome of a window after a reset, against TCP_INFO of the socket meanwhile.

The programs follow a window on ACKs. Each getsockopt(TCP_INFO) is timed and holds the socket's lock, so if an ACK comes
between two of them, the time of its record lies between them too.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from cwndtrace.analysis import cost
from cwndtrace.lab.link import Link
from cwndtrace.lab.path import open_path
from tests.harness import tcp
from tests.harness.lab import PathEnd
from tests.harness.link import VethLink
from tests.harness.tcp import Connect
from tests.harness.tracing import Record, Tracer

pytestmark = pytest.mark.live


def idle(connection: tcp.TcpConnection, seconds: float = tcp.IDLE_S) -> tcp.Send:
    """Let a connection be idle, and return the send that then resets its window."""
    connection.idle(seconds)
    send = connection.send()
    assert send.reason == "idle", send
    return send


def recovery(tracer: Tracer, reset: Record) -> Record:
    """Return the record of the recovery after a reset, and assert that there is exactly one."""

    def matching() -> list[Record]:
        tracer.settle()
        return [r for r in tracer.recoveries if (r["skaddr"], r["reset_ts_ns"]) == (reset["skaddr"], reset["ts_ns"])]

    tcp.until(matching, 20, "the record of a recovery")
    (record,) = matching()
    return record


def check(tracer: Tracer, connection: tcp.TcpConnection, send: tcp.Send) -> tuple[Record, Record]:
    """Return the records of a send's reset and of its recovery, and compare the fields that both have."""
    (reset,) = (r for r in tracer.of(connection) if send.start_ns <= r["ts_ns"] <= send.end_ns)
    record = recovery(tracer, reset)
    truth = {
        "reason": "idle",
        "target": send.before.cwnd,
        "cwnd_start": send.after.cwnd,
        "netns_ino": connection.space.inode,
    }
    assert {name: record[name] for name in truth} == truth
    if connection.sock.fileno() >= 0:
        # The cookie is read only now, because getsockopt makes one.
        assert record["sock_cookie"] in (0, connection.cookie())
    return reset, record


# ---- over a path with a long round trip ----------------------------------------------


class LimitedEnd(PathEnd):
    """An end of the lab's path whose new connections can begin with a slow start threshold."""

    private = True

    def limit(self, to: LimitedEnd, drain: tcp.Drain, ssthresh: int) -> None:
        """Make new connections to another end begin with this slow start threshold, in segments."""

        def write() -> None:
            Path("/proc/sys/net/ipv4/tcp_no_ssthresh_metrics_save").write_text("0")

        self.enter(write)
        tcp.run("ip", "-n", self.name, "route", "add", to.address, "dev", "lab0", "ssthresh", "lock", str(ssthresh))

        def leave_metrics() -> str:
            connection = tcp.connect(self, drain, to=to, address=to.address, device="lab0")
            connection.send()
            connection.quiet()
            connection.close()
            return tcp.run("ip", "-n", self.name, "tcp_metrics", "show")

        # The kernel uses a route's metrics only once an earlier connection has left some. A connection whose
        # retransmission timer has expired leaves none (tcp_update_metrics() in net/ipv4/tcp_metrics.c).
        tcp.until(leave_metrics, 60, "the metrics of a route")


@contextmanager
def far(rtt_ms: float) -> Iterator[tuple[LimitedEnd, LimitedEnd]]:
    """Yield both ends of a path with this RTT."""
    with open_path(Link(rtt_ms=rtt_ms)) as path:
        yield LimitedEnd(path.client), LimitedEnd(path.server)


def watch_until_regained(connection: tcp.TcpConnection, target: int) -> tuple[int, int, tcp.Info]:
    """Return a time before the ACK that brought the window back to ``target``, one after it, and TCP_INFO then.

    The record has the time at which that ACK comes in, and the window grows after the kernel has processed it. The last
    TCP_INFO with a smaller window may begin between the two, so the one before it is used as the earlier time.
    """
    before_ns, last_ns, deadline = 0, 0, time.monotonic() + 20
    while True:
        begin_ns, seen = time.monotonic_ns(), connection.info()
        if seen.cwnd >= target:
            return before_ns, time.monotonic_ns(), seen
        assert time.monotonic() < deadline, f"the window never came back to {target}: {seen}"
        before_ns, last_ns = last_ns, begin_ns
        time.sleep(0.0005)


def regain_once(tracer: Tracer, connection: tcp.TcpConnection) -> float | None:
    """Make a reset, follow its recovery, and check its record; return the error of the predicted time, in round trips.

    The error is positive if the recovery took longer. Returns None if a stalled machine caused retransmissions.
    """
    # The window is no larger than necessary, because reno grows by one segment a round trip in the last quarter.
    connection.grow(40, burst=100_000)
    send = idle(connection, 1.0)
    connection.sock.sendall(bytes(1_500_000))
    below_ns, back_ns, back = watch_until_regained(connection, send.before.cwnd)
    end = connection.quiet()
    if end.total_retrans:
        return None
    reset, record = check(tracer, connection, send)
    assert send.after.cwnd <= send.before.cwnd // 2
    assert record["outcome"] == "regained"
    assert below_ns <= record["end_ts_ns"] <= back_ns
    # The record has the window after the ACK that brought it back, and TCP_INFO may have come some ACKs later.
    assert send.before.cwnd <= record["cwnd_end"] <= back.cwnd
    assert record["ssthresh_end"] == back.ssthresh
    assert 0 < record["bytes_acked"] <= end.bytes_acked - reset["bytes_acked"]
    assert 0 < record["acks"] <= record["bytes_acked"] // back.mss + 2
    samples = [s for s in tracer.samples if s["reset_ts_ns"] == reset["ts_ns"] and s["skaddr"] == reset["skaddr"]]
    assert samples
    assert all(send.after.cwnd <= s["cwnd"] < send.before.cwnd for s in samples)
    times = [reset["ts_ns"], *(s["ts_ns"] for s in samples)]
    assert all(b - a >= 0.9 * send.before.min_rtt_us * 1000 for a, b in pairwise(times))
    took_us = (record["end_ts_ns"] - record["reset_ts_ns"]) / 1000
    (regain_us,) = cost.price(pd.DataFrame([{**reset, "burst_bytes": 1_500_000}]))["regain_us"]
    off: float = (took_us - regain_us) / reset["srtt_us"]
    print(f"{tracer.probe}: {send.before.cwnd} -> {send.after.cwnd}, off by {off:+.2f} round trips of {took_us:.0f} us")
    return off


@pytest.mark.parametrize(
    ("ca", "ssthresh", "least", "most"),
    [
        ("cubic", 0, -1, 1),
        ("reno", 30, -2, 2),
        # Soon after slow start, cubic grows by a twentieth per round trip, not by half.
        ("cubic", 30, -1, 8),
    ],
    ids=["slow start", "reno", "cubic"],
)
def test_a_regained_window_is_recorded(
    tracer: Tracer, drain: tcp.Drain, ca: str, ssthresh: int, least: int, most: int
) -> None:
    """The window grows in slow start all the way, or by the congestion control's rule from a threshold on."""
    with far(40) as (here, there):
        if ssthresh:
            here.limit(there, drain, ssthresh)
        # If the machine stalls, packets are late and a recovery takes longer, but not three in a row.
        for _ in range(3):
            connection = tcp.connect(here, drain, to=there, address=there.address, device="lab0", ca=ca)
            try:
                off = regain_once(tracer, connection)
            finally:
                connection.close()
            if off is not None and least < off < most:
                break
    assert off is not None
    assert least < off < most


# ---- on loopback -----------------------------------------------------------------------------------


def test_a_second_reset_ends_the_recovery(tracer: Tracer, connect: Connect) -> None:
    connection = connect()
    connection.grow(80)
    first = idle(connection)
    second = idle(connection)
    # A small send makes no window grow, so the second reset begins where the first one ended.
    assert second.before.cwnd == first.after.cwnd > second.after.cwnd
    reset, record = check(tracer, connection, first)
    again = tracer.of(connection)[-1]
    assert record["outcome"] == "reset_again"
    assert record["end_ts_ns"] == again["ts_ns"] > reset["ts_ns"]
    assert (record["cwnd_end"], record["ssthresh_end"]) == (second.before.cwnd, second.after.ssthresh)
    assert record["bytes_acked"] == second.before.bytes_acked - first.before.bytes_acked == 100
    connection.close()
    _, last = check(tracer, connection, second)
    assert last["outcome"] == "closed"


@pytest.mark.parametrize("kind", ["timeout", "duplicate ACKs"])
def test_a_loss_ends_the_recovery(tracer: Tracer, link: VethLink, connect: Connect, kind: str) -> None:
    connection = connect(link.a, to=link.b, address="10.9.0.2", device="cwt0")
    connection.grow(80)
    connection.idle(tcp.IDLE_S)
    with link.cut():
        send = connection.send(lambda: connection.sock.send(bytes(3 * 1448)))
        assert send.reason == "idle"
        if kind == "timeout":
            lost = connection.until(lambda i: i.ca_state == 4, "a retransmission timeout")
            lost_ns = time.monotonic_ns()
    if kind == "duplicate ACKs":
        # These segments arrive, and their ACKs report the missing ones.
        connection.sock.send(bytes(12 * 1448))
    end = connection.quiet()
    assert end.total_retrans > send.before.total_retrans
    done_ns = time.monotonic_ns()
    _, record = check(tracer, connection, send)
    assert record["outcome"] == "loss"
    assert record["cwnd_end"] < send.before.cwnd
    assert send.end_ns < record["end_ts_ns"] <= done_ns
    assert 0 <= record["bytes_acked"] <= end.bytes_acked - send.before.bytes_acked
    if kind == "timeout":
        # No ACK came while the link was cut. Following ends when all that was lost has been acknowledged.
        assert record["end_ts_ns"] > lost_ns
        assert record["ssthresh_end"] == lost.ssthresh


def test_closing_the_connection_ends_the_recovery(tracer: Tracer, connect: Connect) -> None:
    connection = connect()
    connection.grow(80)
    send = idle(connection)
    before = connection.quiet()
    cookie, begin_ns = connection.cookie(), time.monotonic_ns()
    connection.close()
    _, record = check(tracer, connection, send)
    assert (record["outcome"], record["sock_cookie"]) == ("closed", cookie)
    assert begin_ns < record["end_ts_ns"] <= time.monotonic_ns()
    assert (record["cwnd_end"], record["ssthresh_end"]) == (before.cwnd, before.ssthresh)
    # These are the bytes of the small send, and perhaps the FIN.
    assert record["bytes_acked"] == 100


def test_a_close_by_rst_leaves_what_the_last_ack_showed(tracer: Tracer, connect: Connect) -> None:
    """tcp_disconnect() clears the socket's counters before the programs see that it ends."""
    connection = connect()
    connection.grow(80)
    send = idle(connection)
    before = connection.quiet()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    _, record = check(tracer, connection, send)
    assert record["outcome"] == "closed"
    # The programs see an ACK before the kernel has counted what it acknowledges.
    assert record["bytes_acked"] in (0, 100)
    assert record["cwnd_end"] == before.cwnd


def test_the_end_of_the_capture_ends_the_recovery(
    tracer: Tracer, make_space: Callable[[], tcp.Space], drain: tcp.Drain
) -> None:
    space = make_space()
    connection = tcp.connect(space, drain)
    try:
        with Tracer(tracer.probe, netns=space.name, idle_only=True) as short:
            connection.grow(80)
            send = idle(connection)
            connection.quiet()
            (reset,) = short.of(connection)
            assert short.recoveries == []
            begin_ns = time.monotonic_ns()
        (record,) = (r for r in short.recoveries if r["reset_ts_ns"] == reset["ts_ns"])
    finally:
        connection.close()
    assert (record["outcome"], record["reason"], record["skaddr"]) == ("capture_end_idle", "idle", reset["skaddr"])
    assert begin_ns < record["end_ts_ns"] <= time.monotonic_ns()
    assert (record["target"], record["cwnd_start"]) == (send.before.cwnd, send.after.cwnd)
    assert record["cwnd_end"] == send.after.cwnd
    assert record["netns_ino"] == space.inode
