# SPDX-License-Identifier: Apache-2.0
"""Measure the cost of tracing resets for TCP over loopback, and the cost of many connections for tracing (as root).

    sudo .venv/bin/python -m benchmarks.tcp

Bulk and request/response run with each probe that this kernel allows, and without. They run between two processes, each
on its own CPU, because the scheduler's placement makes more of a difference than any tracer.
"""

from __future__ import annotations

import os
import random
import resource
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager

from benchmarks.common import COMMAND, BenchmarkResults, TracerProcess, Values, folder, options
from cwndtrace.capture import connections
from cwndtrace.capture.live import Kernel
from cwndtrace.capture.session import Batch, Session
from cwndtrace.capture.source import Filters
from cwndtrace.errors import CwndtraceError
from cwndtrace.kernel import ladder

_WANTED = {
    "snapshot": "at most 150 ms for 10,000 sockets",
    **{
        f"{what}: {probe} / untraced": "at least 0.99"
        for probe in ("tracepoint", "fentry", "kprobe")
        for what in ("bulk",)
    },
    **{f"bulk: {probe} / untraced": "at least 0.97" for probe in ("sendmsg", "tcp_probe")},
    **{f"requests/s: {probe.name} / untraced": "at least 0.98" for probe in ladder.PROBES},
}
_BURST = bytes(100_000)
_SERVER = """
import os, socket, sys
os.sched_setaffinity(0, {os.cpu_count() - 1})
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    peer, _ = listener.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if sys.argv[1] == "bulk":
        room = bytearray(1 << 20)
        while peer.recv_into(room):
            pass
    else:
        while got := peer.recv(64):
            peer.sendall(got)
"""


def _connect(kind: str) -> tuple[subprocess.Popen[str], socket.socket]:
    server = subprocess.Popen([sys.executable, "-c", _SERVER, kind], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    sender = socket.socket()
    sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sender.connect(("127.0.0.1", int(server.stdout.readline())))
    return server, sender


def bulk(seconds: float) -> dict[str, float]:
    """Return the rate of a bulk transfer in GB/s."""
    server, sender = _connect("bulk")
    with server, sender:
        data, sent, begin = bytes(1 << 18), 0, time.monotonic()
        while time.monotonic() - begin < seconds:
            sender.sendall(data)
            sent += len(data)
        took = time.monotonic() - begin
        sender.close()
    return {"GB/s": sent / took / 1e9}


def exchanges(seconds: float) -> dict[str, float]:
    """Make requests of 64 bytes with answers; return the rate a second and the 99th percentile of the time in us."""
    server, sender = _connect("exchange")
    with server, sender:
        data, took, begin = bytes(64), list[float](), time.perf_counter()
        now = begin
        while now - begin < seconds:
            sender.sendall(data)
            sender.recv(64)
            before, now = now, time.perf_counter()
            took.append(now - before)
        sender.close()
    return {"requests/s": len(took) / (now - begin), "p99": statistics.quantiles(took, n=100)[98] * 1e6}


def probes() -> list[str]:
    """Return the names of the probes that load on this kernel."""
    names = []
    for probe in ladder.PROBES:
        try:
            Kernel(probe=probe.name, block=False, reasons=("idle",)).close()
            names.append(probe.name)
        except CwndtraceError as e:
            print(f"probe {probe.name} is left out: {e.cause[:150]}")
    return names


def throughput(report: BenchmarkResults, rounds: int, seconds: float) -> None:
    """Report bulk and request/response, each untraced, then traced, then with the programs attached but not read."""
    every = os.sched_getaffinity(0)
    try:
        _throughput(report, rounds, seconds, every)
    finally:
        os.sched_setaffinity(0, every)


def _throughput(report: BenchmarkResults, rounds: int, seconds: float, every: set[int]) -> None:
    def both() -> dict[str, float]:
        os.sched_setaffinity(0, {min(every)})
        got = {**bulk(seconds), **exchanges(seconds)}
        os.sched_setaffinity(0, every)
        return got

    figures: dict[str, Values] = {}

    def note(name: str, value: float, unit: str = "") -> None:
        figures.setdefault(name, Values(unit)).all.append(value)

    available = probes()
    for _ in range(rounds):
        for probe in available:
            plain = both()
            with folder() as place:
                command = [*COMMAND, "run", "--no-block", "--probe", probe, "-o", str(place / "a.cwnd")]
                with TracerProcess(command, "Tracing "):
                    traced = both()
            with closing(Kernel(probe=probe, block=False)):
                alone = both()
            for name, what, unit in (
                ("GB/s", "bulk", "GB/s"),
                ("requests/s", "requests/s", "/s"),
                ("p99", "p99", "us"),
            ):
                note(f"{what}: untraced", plain[name], unit)
                note(f"{what}: {probe}", traced[name], unit)
                note(f"{what}: {probe} / untraced", traced[name] / plain[name])
                note(f"{what}: {probe} / untraced, nobody reading", alone[name] / plain[name])
    for name in sorted(figures):
        report.add(name, figures[name])


@contextmanager
def connected(number: int) -> Iterator[list[socket.socket]]:
    """Yield the sending ends of so many connections over loopback, to one port, whose data is read away.

    They are fewer where the limit on open files allows no more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = max(soft, min(hard, 2 * number + 200))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    number = min(number, (soft - 200) // 2)
    senders: list[socket.socket] = []
    receivers = dict[int, socket.socket]()
    poll = select.epoll()
    stop = threading.Event()

    def drain() -> None:
        while not stop.is_set():
            for fd, _ in poll.poll(0.1):
                receivers[fd].recv(1 << 20)

    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        thread = threading.Thread(target=drain)
        thread.start()
        try:
            for _ in range(number):
                sender = socket.socket()
                sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
                # Loopback's large segments would make a burst too few segments for the window to grow.
                sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1000)
                sender.connect(listener.getsockname())
                receiver, _ = listener.accept()
                receivers[receiver.fileno()] = receiver
                poll.register(receiver, select.EPOLLIN)
                senders.append(sender)
            yield senders
        finally:
            stop.set()
            thread.join()
            for sock in (*senders, *receivers.values()):
                sock.close()
            poll.close()


def waking(report: BenchmarkResults, number: int, size: int) -> None:
    """Report what is recorded when idle connections send ``size`` bytes each, and whether following costs records.

    With one byte a restart is all there is. With more, each connection is followed until its window is back.
    """
    with connected(number) as senders:
        what = f"{len(senders):,} connections wake with {size:,} bytes"
        # Idle time lowers only windows above the initial one, so a burst makes them grow.
        for sender in senders:
            sender.sendall(_BURST)
        time.sleep(2.0)  # the idle time, which is longer than any RTO here
        port = senders[0].getpeername()[1]
        kept: Counter[str] = Counter()

        def count(batches: list[Batch]) -> None:
            for batch in batches:
                kept[batch.event] += len(batch)

        with Session(Kernel(Filters(port=port), block=False, reasons=("idle",))) as session:
            random.Random(1).shuffle(senders)
            due = sum(_window(sender) > 10 for sender in senders)
            for i, sender in enumerate(senders):
                sender.sendall(bytes(size))
                if i % 100 == 0:
                    count(session.step(0))
            time.sleep(0.2)
            for _ in range(3):
                count(session.step(0.1))
            count(session.finish())
            lost = session.tally.lost
        report.add(f"{what}: windows above the initial one before", due, "connections")
        for event in ("cwnd_reset", "cwnd_recovery", "cwnd_sample"):
            report.add(f"{what}: {event} recorded; lost", f"{kept[event]:,}; {lost[event]:,}")


def many(report: BenchmarkResults, number: int) -> None:
    """Report the time of snapshots of many connections, and what is recorded when they wake."""
    with connected(number // 2):  # a connection has both of its ends here
        snapshots(report)
    for size in (1, 100_000):
        waking(report, number, size)


def snapshots(report: BenchmarkResults) -> None:
    """Report the time of a snapshot of all sockets in ms, and their number."""
    taken = []
    for _ in range(7):
        begin = time.monotonic()
        rows = len(connections.snapshot(Filters(), 0))
        taken.append((time.monotonic() - begin) * 1000)
    report.add("first snapshot, of new sockets", taken[0], "ms")
    report.add("snapshot", Values("ms", taken[1:]))
    report.add("snapshot: sockets", rows, "sockets")


def _window(sock: socket.socket) -> int:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int.from_bytes(info[80:84], sys.byteorder)  # tcpi_snd_cwnd


def main() -> None:
    """Run the benchmark and write its report."""
    asked = options(__doc__, connections=(10_000, "number of idle connections"))
    report = BenchmarkResults("tcp", _WANTED)
    many(report, asked.connections)
    throughput(report, asked.rounds, asked.seconds)
    report.write()


if __name__ == "__main__":
    main()
