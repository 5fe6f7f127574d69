# SPDX-License-Identifier: Apache-2.0
"""Tests of more records and connections than a trace can take: those not kept are counted, and no memory grows."""

from __future__ import annotations

import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

import cwndtrace
from cwndtrace.capture import bpf_syscall, live
from tests.harness import tcp
from tests.harness.command import running, within
from tests.harness.disk import go, loop, reader
from tests.harness.processes import descriptors, resident
from tests.harness.soak import Churn, amount
from tests.harness.tcp import Connect, until
from tests.harness.tracing import Tracer

pytestmark = pytest.mark.live

STOPPED_S: Final = 5


SMALL_BLOCK = (
    "-c",
    "from cwndtrace.capture import live; live.RING_PAGES, live.spare_pages = 256, lambda _: 256;"
    " from cwndtrace.cli import main; main()",
)
"""Arguments that start the command with buffers for 24,000 block requests, instead of up to 850,000."""


def test_a_stopped_trace_counts_lost_block_requests(tmp_path: Path) -> None:
    """Each request of a process is kept or counted as lost, and none twice."""
    reads = 50_000
    with (
        loop() as disk,
        reader(disk, reads) as child,
        running("-p", str(child.pid), "-o", tmp_path / "a.cwnd", python=SMALL_BLOCK) as run,
    ):
        begin, before = time.monotonic(), disk.stat()
        tcp.stop(run.process.pid)
        with disk.counted(reads):
            go(child)
        assert (disk.stat() - before).reads == reads
        time.sleep(max(0.0, begin + STOPPED_S - time.monotonic()))
        run.process.send_signal(signal.SIGCONT)
        code, stdout, stderr = run.end()
    assert code == 0, stderr
    trace = cwndtrace.load(tmp_path / "a.cwnd")
    counts = trace.meta["counts"]["block_io"]
    print(f"{reads} reads: {counts}")
    assert len(trace.block_io) == counts["kept"]
    assert counts["lost"] > 10_000
    assert counts["kept"] + counts["lost"] == reads
    assert sum(span["lost"] for span in trace.meta["lossy"] if span["event"] == "block_io") == counts["lost"]
    assert f"lost so far: {counts['lost']:,} block_io" in stderr
    assert "; lost 0 resets, " in stdout


SMALL = ("-c", "from cwndtrace.capture import live; live._RESET_PAGES = 64; from cwndtrace.cli import main; main()")
"""Arguments that start the command with a buffer for 700 resets, instead of 11,000."""


def test_a_stopped_trace_counts_lost_resets(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    """Each reset is kept or counted as lost, and so is each recovery of a window."""
    connections = [connect(read_buffer=1_000_000) for _ in range(150)]
    for connection in connections:
        connection.grow(160)
    with (
        running("-n", space.name, "--no-block", "-q", "-o", tmp_path / "a.cwnd", wait=False, python=SMALL) as stopped,
        running("-n", space.name, "--no-block", "-q", "-o", tmp_path / "b.cwnd", wait=False) as other,
    ):
        for path in (tmp_path / "a.cwnd", tmp_path / "b.cwnd"):
            tcp.until(lambda path=path: (path / "meta.json").exists(), 60, "both attached")  # type: ignore[misc]
        first = {c.key: len(c.sends) for c in connections}
        begin = time.monotonic()
        tcp.stop(stopped.process.pid)
        resets = 0
        while resets < 2000 or time.monotonic() < begin + STOPPED_S:
            time.sleep(max(0.0, 0.25 - connections[0].info().last_snd_us / 1e6))
            for connection in connections:
                if connection.info().cwnd <= tcp.INIT_CWND:
                    connection.grow(160)
            for connection in connections:
                connection.send()
            resets = sum(s.reason == "idle" for c in connections for s in c.sends[first[c.key] :])
        stopped.process.send_signal(signal.SIGCONT)
        code, _, stderr = stopped.end()
        assert code == 0, stderr
        assert other.end()[0] == 0
    trace, whole = (cwndtrace.load(tmp_path / name) for name in ("a.cwnd", "b.cwnd"))
    counts, all_of_them = trace.meta["counts"], whole.meta["counts"]
    print(f"{resets} resets: {counts}; beside it: {all_of_them}")
    assert counts["cwnd_reset"]["lost"] > 0
    for name in ("cwnd_reset", "cwnd_recovery"):
        assert all_of_them[name]["lost"] == 0
        assert counts[name]["kept"] + counts[name]["lost"] == all_of_them[name]["kept"]
    assert all_of_them["cwnd_reset"]["kept"] == resets
    assert len(trace.resets) == counts["cwnd_reset"]["kept"]


@contextmanager
def room_for_files(number: int) -> Iterator[None]:
    """Raise the limit of open files to ``number`` meanwhile; raises ValueError if the hard limit is lower."""
    old = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(number, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)


SINK = """
import select, socket
listener, peers, epoll = socket.create_server(("127.0.0.1", 0), backlog=1000), {}, select.epoll()
epoll.register(listener, select.EPOLLIN)
print(listener.getsockname()[1], flush=True)
while True:
    for fd, _ in epoll.poll():
        if fd == listener.fileno():
            peer, _ = listener.accept()
            peers[peer.fileno()] = peer
            epoll.register(peer, select.EPOLLIN)
        elif not peers[fd].recv(1 << 20):
            peers.pop(fd).close()
"""


@contextmanager
def sink(space: tcp.Space) -> Iterator[tuple[str, int]]:
    """Yield the address of a server in a namespace that reads all data; it is a process, because files are limited."""
    command = [*within(space), sys.executable, "-c", SINK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield "127.0.0.1", int(process.stdout.readline())
        finally:
            process.kill()


def connected(address: tuple[str, int]) -> socket.socket:
    """Return a cubic connection to an address."""
    sock = socket.socket()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.connect(address)
    return sock


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_resets_of_very_many_connections_are_kept(counted_space: tcp.Space, tmp_path: Path) -> None:
    """Each of 10,000 connections is reset at once, while others come and go; memory and maps don't grow."""
    number, seconds = amount(1000, 10_000), amount(5, 90)
    socks = list[socket.socket]()
    try:
        with (
            room_for_files(number + 1000),
            sink(counted_space) as address,
            Tracer(netns=counted_space.name) as tracer,
            running("-n", counted_space.name, "--no-block", "-o", tmp_path / "a.cwnd") as run,
        ):
            socks = counted_space.enter(lambda: [connected(address) for _ in range(number)])
            for sock in socks:
                sock.sendall(bytes(60_000))
            for sock in socks:
                tcp.until(lambda s=sock: not tcp.info(s).unacked, 20, "an ACK of all")  # type: ignore[misc]
            tcp.until(lambda: tcp.info(socks[-1]).last_snd_us > 400_000, 20, "the last one to have been idle")
            with Churn(counted_space) as churn:
                begin = time.monotonic()
                resets = 0
                for sock in socks:
                    before = tcp.info(sock).cwnd
                    sock.send(b"x" * 100)
                    resets += tcp.info(sock).cwnd < before
                tcp.until(lambda: time.monotonic() > begin + seconds / 2 and churn.made > 100, 120, "half of it")
                first, files = resident(run.process.pid), descriptors(run.process.pid)
                tcp.until(lambda: time.monotonic() > begin + seconds, 120, "all of it")
                last, made, took = resident(run.process.pid), churn.made, time.monotonic() - begin
                assert descriptors(run.process.pid) <= files + 2
            for sock in socks:
                sock.close()
            tracer.settle()
            programs = tracer._session.source._resets  # type: ignore[attr-defined]
            tcp.until(lambda: not any(p.values("followed") for p in programs), 30, "no closed connection followed")
            if tracer.probe == "sendmsg":
                assert not programs[0].values("pending")
            assert not any(any(number) for p in programs for number in p.values("follow_buckets"))
            code, _, stderr = run.end()
    finally:
        for sock in socks:
            sock.close()
    assert code == 0, stderr
    trace = cwndtrace.load(tmp_path / "a.cwnd")
    grown = (last - first) / 1e6
    print(f"{number} connections: {resets} resets; {made} more at {made / took:.0f}/s; memory grew by {grown:.1f} MB")
    assert resets == number
    counts = trace.meta["counts"]["cwnd_reset"]
    # On a busy machine, one of the short connections may have idle time too.
    mine = trace.resets[trace.resets["dport"] == address[1]]
    assert len(mine) == mine["sport"].nunique() == resets <= counts["kept"] == len(trace.resets)
    # Skipped runs of a program count as lost, although none was a reset.
    assert counts["lost"] <= resets / 1000
    # In the short form, most of this is the allocator's warm-up.
    assert last - first < 20e6


def test_resets_of_more_windows_than_the_map_holds_are_counted(
    monkeypatch: pytest.MonkeyPatch, make_space: Callable[[], tcp.Space], drain: tcp.Drain
) -> None:
    """With probe tcp_probe each reset is kept or counted as lost, and a connection that closes makes room."""
    monkeypatch.setattr(live, "_WINDOWS", 8)
    space = make_space()
    with Tracer("tcp_probe", netns=space.name, idle_only=True) as tracer:
        for _ in range(2):
            connections = [tcp.connect(space, drain) for _ in range(12)]
            try:
                tracer.settle()  # until then nothing has been counted
                before = len(tracer.records), tracer.tally.lost["cwnd_reset"]
                for connection in connections:
                    connection.grow()
                resets = 0
                for connection in connections:
                    connection.idle(0.4)
                    resets += connection.send().reason == "idle"
                assert resets == len(connections)
                tracer.settle()
                kept, lost = (len(tracer.records) - before[0], tracer.tally.lost["cwnd_reset"] - before[1])
                # Both ends of a connection are in the namespace, and each end has a window.
                assert 1 <= kept <= 8
                # A window without room counts at each end of a flight, because a reset may follow each.
                assert kept + lost >= resets
            finally:
                for connection in connections:
                    connection.close()
            windows = tracer._session.source._resets[0]  # type: ignore[attr-defined]
            until(lambda w=windows: not list(bpf_syscall.keys(w._maps["windows"][0], 8)), 20, "an empty map")  # type: ignore[misc]
