# SPDX-License-Identifier: Apache-2.0
"""More than a trace can take, and more connections than it ever saw: what isn't kept is counted, and nothing grows."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest

import cwndtrace
from tests.live import tcp
from tests.live.conftest import Connect
from tests.live.disk import loop
from tests.live.test_run import running

pytestmark = pytest.mark.live

STOPPED_S: Final = 5

READER = """
import mmap, os, sys
fd, reads = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), int(sys.argv[2])
buffer = mmap.mmap(-1, 4096)
print("ready", flush=True)
sys.stdin.readline()
for i in range(reads):
    os.preadv(fd, [buffer], i % 1000 * 4096)
print("done", flush=True)
sys.stdin.readline()
"""


def test_a_reader_that_is_stopped_under_a_flood_of_block_requests(tmp_path: Path) -> None:
    """Each request of a process is kept or counted as lost, none twice."""
    reads = 200_000
    with (
        loop() as disk,
        subprocess.Popen(
            [sys.executable, "-c", READER, str(disk.path), str(reads)], stdin=-1, stdout=-1, text=True
        ) as child,
    ):
        assert child.stdin
        assert child.stdout
        try:
            assert child.stdout.readline() == "ready\n"
            with running("-p", str(child.pid), "-o", tmp_path / "a.cwnd") as run:
                begin, before = time.monotonic(), disk.stat()
                run.process.send_signal(signal.SIGSTOP)
                with disk.counted(reads):
                    print(file=child.stdin, flush=True)
                    assert child.stdout.readline() == "done\n"
                assert (disk.stat() - before).reads == reads
                time.sleep(max(0.0, begin + STOPPED_S - time.monotonic()))
                run.process.send_signal(signal.SIGCONT)
                code, shown, said = run.end()
        finally:
            child.kill()
    assert code == 0, said
    trace = cwndtrace.load(tmp_path / "a.cwnd")
    counts = trace.meta["counts"]["block_io"]
    print(f"{reads} reads: {counts}")
    assert len(trace.block_io) == counts["kept"]
    assert counts["lost"] > 10_000
    assert counts["kept"] + counts["lost"] == reads
    assert sum(span["lost"] for span in trace.meta["lossy"] if span["event"] == "block_io") == counts["lost"]
    assert f"lost so far: {counts['lost']:,} block_io" in said
    assert "; lost 0 and " in shown


SMALL = ("-c", "from cwndtrace.capture import bcc; bcc._RESET_PAGES = 64; from cwndtrace.cli import main; main()")
"""The command with room for 700 resets between kernel and reader, in place of 11,000."""


def test_a_reader_that_is_stopped_under_a_flood_of_resets(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    """Each reset is kept or counted as lost; so is how each window came back."""
    connections = [connect(read_buffer=1_000_000) for _ in range(150)]
    for connection in connections:
        connection.grow(160)
    with (
        running("-n", space.name, "--no-block", "-q", "-o", tmp_path / "a.cwnd", said=False, python=SMALL) as stopped,
        running("-n", space.name, "--no-block", "-q", "-o", tmp_path / "b.cwnd", said=False) as other,
    ):
        for path in (tmp_path / "a.cwnd", tmp_path / "b.cwnd"):
            tcp.until(lambda path=path: (path / "meta.json").exists(), 60, "both attached")  # type: ignore[misc]
        first = {c.key: len(c.sends) for c in connections}
        begin = time.monotonic()
        stopped.process.send_signal(signal.SIGSTOP)
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
        code, _, said = stopped.end()
        assert code == 0, said
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
