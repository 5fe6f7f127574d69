# SPDX-License-Identifier: Apache-2.0
"""Tests of resets after idle time, against TCP_INFO: each has a record, no record is false, and every field is right.

They cover each way to send, and each kind of address, congestion control and route that matters to the kernel's rule,
with each probe that this kernel has.
"""

from __future__ import annotations

import heapq
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import cwndtrace
from cwndtrace.capture.live import Kernel
from cwndtrace.capture.session import Session
from cwndtrace.capture.source import Filters
from cwndtrace.kernel import ladder
from tests.harness import tcp
from tests.harness.disk import loop
from tests.harness.tcp import Connect, until
from tests.harness.tracing import Tracer, check, expect_one, expected, left_out

pytestmark = pytest.mark.live

KINDS: tuple[dict[str, object], ...] = (
    {"ca": "cubic"},
    {"ca": "reno", "from_server": True},
    {"ca": "cubic", "address": "::1", "from_server": True},
    {"ca": "reno", "address": "::1"},
    {"ca": "cubic", "mapped": True},
    {"ca": "reno", "mapped": True, "from_server": True},
    {"ca": "cubic", "address": "127.1.2.3", "from_server": True},
)
"""The number of connections is prime, so no two of them stay in step."""

IDLE_RTO = (0.3, 0.6, 0.96, 0.98, 1.0, 1.02, 1.04, 1.1, 1.5, 2.1, 3.2)
"""Idle times in retransmission timeouts; most are near one."""


@pytest.mark.parametrize("probe", [probe.name for probe in ladder.PROBES])
def test_the_probe_works_here(probe: str) -> None:
    why = left_out().get(probe)
    if why:
        pytest.skip(f"probe {probe}: {why}; the kernels of tests/vm have it")


def idle_and_send(connections: list[tcp.TcpConnection]) -> None:
    """Let each connection send bursts with idle times between them, in a random order of times."""
    order = random.Random(7)
    idle_times = {i: order.sample(IDLE_RTO, len(IDLE_RTO)) for i in range(len(connections))}
    due: list[tuple[float, int]] = []

    def burst(i: int) -> None:
        rto = connections[i].grow().rto_us / 1e6
        if idle_times[i]:
            heapq.heappush(due, (time.monotonic() + idle_times[i].pop() * rto, i))

    for i in range(len(connections)):
        burst(i)
    while due:
        when, i = heapq.heappop(due)
        time.sleep(max(0.0, when - time.monotonic()))
        connections[i].send()
        burst(i)


def test_every_reset_has_a_record_and_no_record_is_false(tracer: Tracer, connect: Connect) -> None:
    connections = [connect(**kind) for kind in KINDS]
    idle_and_send(connections)
    resets = check(tracer, *connections)
    sends = sum(len(c.sends) for c in connections)
    idle = [r["idle_us"] - s.before.last_snd_us for c in connections for s, r in idle_pairs(tracer, c)]
    print(f"{tracer.probe}: {resets} resets in {sends} sends; idle time minus TCP_INFO's, in us: {sorted(set(idle))}")
    # Four of eleven idle times are longer than delays can make the short ones.
    assert resets >= 4 * len(connections)
    assert sends - resets >= 2 * len(connections)


def idle_pairs(tracer: Tracer, connection: tcp.TcpConnection) -> list[tuple[tcp.Send, dict[str, int]]]:
    pairs = zip(expected(connection, tracer), tracer.of(connection), strict=True)
    return [(s, r) for s, r in pairs if s.reason == "idle"]


def was_idle(connect: Connect, **options: object) -> tcp.TcpConnection:
    """Return a connection that has grown its window and has then been idle."""
    connection = connect(**options)
    connection.grow()
    connection.idle(tcp.IDLE_S)
    return connection


def test_sendfile_causes_a_reset(tracer: Tracer, connect: Connect) -> None:
    connection = was_idle(connect)
    with tempfile.TemporaryFile() as file:
        file.write(b"x" * 100)
        file.flush()
        connection.send(lambda: os.sendfile(connection.sock.fileno(), file.fileno(), 0, 100))
    expect_one(tracer, connection)


def test_a_zero_copy_send_causes_a_reset(tracer: Tracer, connect: Connect) -> None:
    connection = was_idle(connect)
    tcp.allow_zerocopy(connection.sock)
    connection.send(lambda: connection.sock.send(b"x" * 1000, tcp.MSG_ZEROCOPY))
    expect_one(tracer, connection)


def test_a_gathered_write_causes_a_reset(tracer: Tracer, connect: Connect) -> None:
    connection = was_idle(connect)
    connection.send(lambda: connection.sock.sendmsg([b"x" * 50] * 20))
    expect_one(tracer, connection)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_record_does_not_count_the_burst_after_it(tracer: Tracer, connect: Connect, address: str) -> None:
    """The three segments go to the device as one packet."""
    connection = was_idle(connect, address=address)
    send = connection.send(lambda: connection.sock.send(b"x" * 4000))
    assert send.after.bytes_sent == send.before.bytes_sent + 4000
    expect_one(tracer, connection)


def test_corked_pieces_cause_one_reset_when_the_first_is_queued(tracer: Tracer, connect: Connect) -> None:
    connection = was_idle(connect)

    def in_pieces() -> None:
        with tcp.corked(connection.sock):
            for _ in range(5):
                connection.sock.send(b"x" * 50)

    connection.send(in_pieces)
    expect_one(tracer, connection)


def test_a_record_names_the_child_that_writes(tracer: Tracer, connect: Connect) -> None:
    connection = connect()
    connection.grow()
    with tcp.ForkedSender(connection.sock) as child:
        connection.idle(tcp.IDLE_S)
        send = connection.send(child.send, child.who)
    assert send.comm == "sh"
    assert send.tgid != os.getpid()
    expect_one(tracer, connection)


def test_a_record_names_the_thread_that_writes(tracer: Tracer, connect: Connect) -> None:
    connection = was_idle(connect)
    ready, go, sent = threading.Event(), threading.Event(), threading.Event()
    who: list[tuple[int, int, str]] = []

    def have_it_sent() -> None:
        go.set()
        sent.wait()

    def work() -> None:
        Path("/proc/thread-self/comm").write_text("writer")
        who.append((os.getpid(), threading.get_native_id(), "writer"))
        ready.set()
        go.wait()
        connection.sock.send(b"x")
        sent.set()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    send = connection.send(have_it_sent, who[0])
    thread.join()
    assert send.tid != send.tgid
    expect_one(tracer, connection)


def test_a_record_has_the_cookie_that_getsockopt_returned(tracer: Tracer, connect: Connect) -> None:
    connection = connect()
    cookie = connection.cookie()
    connection.grow()
    connection.idle(tcp.IDLE_S)
    connection.send()
    expect_one(tracer, connection)
    assert tracer.of(connection)[0]["sock_cookie"] == cookie != 0


def test_a_record_has_the_time_since_data_last_came_in(tracer: Tracer, connect: Connect) -> None:
    connection = connect()
    connection.grow()
    time.sleep(tcp.IDLE_S / 2)
    connection.peer.send(b"a request")
    connection.idle(tcp.IDLE_S)
    connection.send()
    expect_one(tracer, connection)
    record = tracer.of(connection)[0]
    assert tcp.IDLE_S / 3 < record["last_rcv_us"] / 1e6 < record["idle_us"] / 1e6 - tcp.IDLE_S / 3


def test_the_initial_window_of_a_route_is_the_lower_limit(tracer: Tracer, space: tcp.Space, connect: Connect) -> None:
    space.ip("route", "replace", "local", "127.9.9.9", "dev", "lo", "table", "local", "initcwnd", "20")
    connection = connect(address="127.9.9.9", init_cwnd=20)
    # The window is at least twice the initial one, since half of less would be below that and look the same.
    connection.grow(40)
    connection.idle(1.3)
    send = connection.send()
    assert send.after.cwnd == 20
    expect_one(tracer, connection)


def test_namespaces_with_the_same_addresses_and_ports_are_told_apart(
    tracer: Tracer, make_space: Callable[[], tcp.Space], connect: Connect
) -> None:
    same: dict[str, object] = {"source": ("127.0.0.1", 40001), "port": 40002}
    pair = [connect(make_space(), **same) for _ in range(2)]
    assert pair[0].key[1:] == pair[1].key[1:]
    for connection in pair:
        connection.grow()
    pair[0].idle(tcp.IDLE_S)
    pair[0].send()
    pair[1].grow()
    pair[1].idle(tcp.IDLE_S)
    pair[1].send()
    assert check(tracer, *pair) == 3
    assert [len(tracer.of(c)) for c in pair] == [1, 2]


def test_nothing_is_recorded_where_the_sysctl_is_off(
    counter: Tracer, counted_space: tcp.Space, connect: Connect
) -> None:
    counted_space.sysctl("net.ipv4.tcp_slow_start_after_idle", "0")
    try:
        expect_nothing(counter, connect(counted_space))
    finally:
        counted_space.sysctl("net.ipv4.tcp_slow_start_after_idle", "1")


def test_nothing_is_recorded_for_an_exempt_congestion_control(
    counter: Tracer, counted_space: tcp.Space, connect: Connect
) -> None:
    if "bbr" not in Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split():
        pytest.skip("this kernel has no BBR; a kernel with CONFIG_TCP_CONG_BBR does (modprobe tcp_bbr)")
    expect_nothing(counter, connect(counted_space, ca="bbr"))


def expect_nothing(counter: Tracer, connection: tcp.TcpConnection) -> None:
    """Assert that an idle connection has no reset, and that no counter expects one."""
    counter.settle()
    before = counter.tally.unchanged, counter.tally.withdrawn
    for _ in range(2):
        connection.grow(11)
        connection.idle(tcp.IDLE_S)
        send = connection.send()
        assert send.before.last_snd_us > send.before.rto_us
        assert send.reason is None
    assert not counter.within(connection.space.inode, since_ns=connection.sends[0].start_ns)
    assert (counter.tally.unchanged, counter.tally.withdrawn) == before


def test_a_large_write_is_one_reset(tracer: Tracer, connect: Connect) -> None:
    connection = was_idle(connect)
    before, resets = connection.info(), check(tracer, connection)
    assert resets == 0
    connection.sock.sendall(bytes(500_000))
    connection.quiet()
    records = tracer.of(connection)
    assert [(r["cwnd_before"], r["cwnd_after"]) for r in records] == [
        (before.cwnd, restarted(before.cwnd, records[0]["idle_us"], before.rto_us))
    ]


def restarted(cwnd: int, idle_us: int, rto_us: int) -> int:
    """Return the window after tcp_cwnd_restart(): half for each whole RTO of idle time, but not below ten."""
    halvings = -(-idle_us // rto_us) - 1
    return max(cwnd >> halvings, min(cwnd, tcp.INIT_CWND))


def test_two_hundred_connections_are_traced_at_once(tracer: Tracer, connect: Connect) -> None:
    connections = [connect(ca=("cubic", "reno")[i % 2]) for i in range(200)]
    for connection in connections:
        connection.grow(burst=60_000)
    for connection in connections:
        connection.idle(tcp.IDLE_S)
    for connection in connections:
        connection.send()
    assert all(c.sends[-1].reason == "idle" for c in connections)
    assert check(tracer, *connections) == 200


def test_the_public_stream_yields_a_reset(tracer: Tracer, connect: Connect) -> None:
    connection = connect()
    with cwndtrace.stream(port=connection.sport, block=False, probe=tracer.probe) as batches:
        connection.grow()
        connection.idle(tcp.IDLE_S)
        connection.send()
        batches.stop()
        frames = [b.to_pandas() for b in batches if b.event == "cwnd_reset"]
    expect_one(tracer, connection)
    assert len(frames) == 1
    assert frames[0][["cwnd_before", "cwnd_after"]].to_numpy().tolist() == [
        [connection.sends[-1].before.cwnd, connection.sends[-1].after.cwnd]
    ]


def test_tracing_begins_at_one_moment_for_all_events(tracer: Tracer, connect: Connect, space: tcp.Space) -> None:
    """Programs are attached one after the other; records from before the session are neither kept nor counted."""
    connection = connect()
    filters = Filters(netns=space.inode)
    with loop() as disk:
        kernel = Kernel(filters, probe=tracer.probe)
        try:
            connection.grow()
            connection.idle(tcp.IDLE_S)
            early = connection.send()
            connection.grow()
            disk.read(1)
            session = Session(kernel)
            begin = session.start["mono_ns"]
            connection.idle(tcp.IDLE_S)
            late = connection.send()
            disk.read(2)
            batches = session.step()

            def requested() -> bool:
                batches.extend(session.step())
                return session.tally.kept["block_io"] > 0

            until(requested, 20, "a request")
            batches += session.finish()
        finally:
            kernel.close()
    assert (early.reason, late.reason) == ("idle", "idle")
    assert early.end_ns < begin < late.start_ns
    rows = [row for batch in batches for row in batch.to_dicts()]
    resets = [row["ts_ns"] for row in rows if row["event"] == "cwnd_reset"]
    assert len(resets) == 1
    assert late.start_ns <= resets[0] <= late.end_ns
    began = {"cwnd_recovery": "reset_ts_ns", "cwnd_sample": "reset_ts_ns", "block_io": "start_ns"}
    times = [row[began[row["event"]]] for row in rows if row["event"] in began]
    assert times
    assert min(times) >= begin
    assert {row["dev"] for row in rows if row["event"] == "block_io"} >= {disk.dev}
