# SPDX-License-Identifier: Apache-2.0
"""Tests of the tracepoint's text in tracefs against the BPF record of the same reset, and the kernel's selftest."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cwndtrace.capture.live import Kernel
from tests.harness.sysctl import sysctl
from tests.harness.tcp import Connect, TcpConnection
from tests.harness.tracing import Tracer

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("patched")]

EVENT = Path("/sys/kernel/tracing/events/tcp/tcp_cwnd_reset")
TRACE = Path("/sys/kernel/tracing/trace")


@pytest.fixture
def text() -> Iterator[Path]:
    """The trace file of tracefs, with the event enabled."""
    TRACE.write_text("")
    (EVENT / "enable").write_text("1")
    try:
        yield TRACE
    finally:
        (EVENT / "enable").write_text("0")


def parse(line: str) -> dict[str, str]:
    """Return the name=value pairs in a line of the trace."""
    return dict(re.findall(r"(\w+)=(\S+)", line.partition("tcp_cwnd_reset: ")[2]))


def events(trace: Path, connection: TcpConnection) -> list[dict[str, str]]:
    """Return the events of a connection."""
    parsed = [parse(line) for line in trace.read_text().splitlines() if "tcp_cwnd_reset: " in line]
    return [event for event in parsed if event["src"].endswith(f":{connection.sport}")]


@pytest.mark.parametrize("kind", [{}, {"address": "::1"}, {"mapped": True}], ids=["IPv4", "IPv6", "mapped"])
def test_the_text_and_the_record_agree(text: Path, connect: Connect, kind: dict[str, Any]) -> None:
    with Tracer("tracepoint") as tracer:
        connection = connect(**kind)
        connection.grow()
        time.sleep(0.6)
        connection.send()
        (record,) = [r for r in tracer.of(connection) if r["reason"] == "idle"]
    (printed,) = [event for event in events(text, connection) if event["reason"] == "idle"]
    for name in ("cwnd_before", "cwnd_after", "ssthresh_before", "ssthresh_after", "rto_us", "srtt_us", "mss"):
        assert int(printed[name]) == record[name], name
    for name, same in {"snd_wnd": "snd_wnd", "unacked_bytes": "unacked_bytes", "notsent_bytes": "unsent_bytes"}.items():
        assert int(printed[name]) == record[same], name
    # The event has idle times in whole milliseconds.
    assert int(printed["idle_us"]) == record["idle_us"] // 1000 * 1000
    assert printed["state"] == f"TCP_{record['tcp_state'].upper()}"
    native = "address" in kind
    assert printed["family"] == ("AF_INET6" if kind else "AF_INET")
    shape = "[{}]:{}" if native else "[::ffff:{}]:{}" if kind else "{}:{}"
    assert printed["src"] == shape.format(record["saddr"], record["sport"])
    assert printed["dest"] == shape.format(record["daddr"], record["dport"])
    assert int(printed["sock_cookie"], 16) == connection.cookie()


def test_nothing_is_printed_where_the_window_did_not_fall(text: Path, connect: Connect) -> None:
    connection = connect()
    connection.send()
    connection.quiet()
    time.sleep(0.6)
    assert connection.send().reason is None
    assert events(text, connection) == []


def test_the_selftest_passes() -> None:
    program = Path(os.environ["CWNDTRACE_VM_KERNEL"]) / "selftests/tcp_cwnd_reset"
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=600)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert re.search(r"^ok \d+", done.stdout, re.MULTILINE)
    assert "not ok" not in done.stdout
    assert "SKIP" not in done.stdout


def test_the_time_of_a_program_run_is_measured(connect: Connect) -> None:
    # The kernel counts the time itself. Under software emulation the figure is only good for comparisons.
    with (
        sysctl("kernel.bpf_stats_enabled", 1),
        closing(Kernel(probe="tracepoint", block=False, reasons=("idle",))) as kernel,
    ):
        connections = [connect() for _ in range(20)]
        for connection in connections:
            connection.grow()
        time.sleep(0.6)
        for connection in connections:
            connection.send()
        runs, spent = kernel.run_times()["on_tcp_cwnd_reset"]
    print(f"on_tcp_cwnd_reset: {runs} runs, {spent / runs:.0f} ns each")
    assert runs >= len(connections)
