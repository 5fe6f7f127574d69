# SPDX-License-Identifier: Apache-2.0
"""A test of other tracers on the same probes at the same time: all of them see every event."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import cwndtrace
from tests.harness import tcp
from tests.harness.command import running, send_after_idle
from tests.harness.disk import go, loop, reader
from tests.harness.tcp import Connect

pytestmark = pytest.mark.live

READS = 5000
TRACEFS = 'mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing; exec "$0" "$@"'
BPFTRACE = """
tracepoint:block:block_io_start /pid == %d/ { @requests = count(); }
tracepoint:tcp:tcp_probe { @acks = count(); }
BEGIN { printf("ready\\n"); }
"""


@pytest.mark.skipif(
    not (shutil.which("bpftrace") and shutil.which("perf")),
    reason="needs bpftrace and perf: apt install bpftrace linux-perf",
)
def test_bpftrace_perf_and_two_cwndtraces_see_every_request(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    with loop() as disk, reader(disk, READS) as child:
        private = ("unshare", "--mount", "sh", "-c", TRACEFS)
        peers = [
            [*private, "bpftrace", "-e", BPFTRACE % child.pid],
            [*private, "perf", "stat", "-e", "block:block_io_start", "-p", str(child.pid)],
        ]
        with (
            subprocess.Popen(peers[0], stdout=-1, stderr=subprocess.STDOUT, text=True) as bpftrace,
            subprocess.Popen(peers[1], stdout=-1, stderr=subprocess.STDOUT, text=True) as perf,
            running("-p", str(child.pid), "-o", tmp_path / "a.cwnd") as one,
            running("-p", str(child.pid), "-o", tmp_path / "b.cwnd") as two,
            running("-n", space.name, "--no-block", "-o", tmp_path / "c.cwnd") as three,
        ):
            assert bpftrace.stdout
            assert perf.stdout
            while "ready" not in (line := bpftrace.stdout.readline()):
                assert line, "bpftrace never started"
            send = send_after_idle(connect())
            with disk.counted(READS):
                go(child)
            for run in (one, two, three):
                assert run.end()[0] == 0
            bpftrace.send_signal(signal.SIGINT)
            perf.send_signal(signal.SIGINT)
            counted = bpftrace.stdout.read(), perf.stdout.read()
    requests = int(re.search(r"@requests: (\d+)", counted[0])[1])  # type: ignore[index]
    measured = int(re.search(r"([\d,]+) +block:block_io_start", counted[1])[1].replace(",", ""))  # type: ignore[index]
    assert int(re.search(r"@acks: (\d+)", counted[0])[1]) > 0  # type: ignore[index]
    traces = [cwndtrace.load(tmp_path / name) for name in ("a.cwnd", "b.cwnd")]
    print(f"{READS} reads: bpftrace {requests}, perf {measured}, cwndtrace {[len(t.block_io) for t in traces]}")
    assert (requests, measured) == (READS, READS)
    for trace in traces:
        # A security policy may hide the end of a request from every tracer; that counts as lost.
        assert len(trace.block_io) + trace.lost("block_io") == READS
    assert list(cwndtrace.load(tmp_path / "c.cwnd").resets["cwnd_before"]) == [send.before.cwnd]
