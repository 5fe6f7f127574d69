# SPDX-License-Identifier: Apache-2.0
"""Measure what following a socket after a reset costs for each of its ACKs and writes (as root).

    sudo .venv/bin/python -m benchmarks.following

In each turn, a connection over lo sends in bulk, is idle for longer than its RTO, and sends in bulk again. With Reno
its window is followed for ten thousand ACKs, unless it is back at once; such turns are left out. What a followed ACK
takes beyond another one is the time in the programs, as the kernel counts it, less the time that as many runs took
before. The round trip over lo is so short that about every second ACK gives a sample; on a longer path hardly any does.
"""

from __future__ import annotations

import socket
import time
from contextlib import closing
from typing import Final

import numpy as np

from benchmarks.common import BenchmarkResults, Values, options
from cwndtrace.capture.live import Kernel
from cwndtrace.lab.demo import connection
from cwndtrace.records.layout import event
from tests.harness.sysctl import sysctl

_WANTED: Final = {"a followed ACK, beyond another one": "at most 150 ns"}
_WARM_S, _BULK_S, _IDLE_S = 0.3, 0.4, 0.5
_WRITE: Final = bytes(4096)
_LEAST_ACKS: Final = 3000

_Runs = dict[str, tuple[int, int]]
"""Runs and nanoseconds by program."""


def bulk(sender: socket.socket, seconds: float) -> None:
    """Send without a pause."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(64):
            sender.sendall(_WRITE)


def run(kernel: Kernel, sender: socket.socket) -> _Runs:
    """Send in bulk, and return the runs of each program meanwhile, and the time that they took."""
    before = kernel.run_times()
    bulk(sender, _BULK_S)
    after = kernel.run_times()
    return {name: (after[name][0] - runs, after[name][1] - ns) for name, (runs, ns) in before.items()}


def turn(kernel: Kernel) -> tuple[_Runs, _Runs, int, int]:
    """Return the runs before a reset and after it, and the ACKs and samples of the window that was followed then."""
    with connection(b"reno") as sender:
        bulk(sender, _WARM_S)
        plain = run(kernel, sender)
        time.sleep(_IDLE_S)
        kernel.poll(0)
        followed = run(kernel, sender)
    read: dict[str, bytes] = {"cwnd_recovery": b"", "cwnd_sample": b""}
    deadline = time.monotonic() + 5
    while not read["cwnd_recovery"] and time.monotonic() < deadline:
        for name, raw in kernel.poll(0.1):
            read[name] = read.get(name, b"") + raw
    records = np.frombuffer(read["cwnd_recovery"], event("cwnd_recovery").dtype)
    return plain, followed, int(records["acks"].sum()), len(read["cwnd_sample"]) // event("cwnd_sample").size


def beyond(program: str, plain: _Runs, followed: _Runs, acks: int) -> float:
    """Return the time of a program, in ns for each ACK, beyond that of as many runs before the reset."""
    (runs, ns), (before_runs, before_ns) = followed[program], plain[program]
    return (ns - runs * before_ns / max(before_runs, 1)) / acks


def main() -> None:
    """Run the benchmark and write its report."""
    asked = options(__doc__, rounds=(20, "turns"))
    report = BenchmarkResults("following", _WANTED)
    on_ack, on_write, shares = [], [], []
    with sysctl("kernel.bpf_stats_enabled", 1), closing(Kernel(block=False)) as kernel:
        kernel.begin(time.monotonic_ns())
        for _ in range(asked.rounds):
            plain, followed, acks, samples = turn(kernel)
            if acks >= _LEAST_ACKS:
                on_ack.append(beyond("on_tcp_probe", plain, followed, acks))
                on_write.append(beyond("on_tcp_sendmsg_locked", plain, followed, acks))
                shares.append(samples / acks)
        kernel.stop()
    if not on_ack:
        raise SystemExit("in no turn was a window followed for long enough; give more --rounds")
    report.add("turns in which a window was followed", float(len(on_ack)), "")
    report.add("a followed ACK, beyond another one", Values("ns", on_ack))
    report.add("samples for each ACK", Values("", shares))
    report.add("the writes for each ACK, beyond others", Values("ns", on_write))
    report.write()


if __name__ == "__main__":
    main()
