# SPDX-License-Identifier: Apache-2.0
"""Tests of interfaces and namespaces that are renamed, moved or removed while traced, and of a stepped wall clock."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import cwndtrace
from tests.harness import tcp
from tests.harness.command import call, running, send_after_idle
from tests.harness.tcp import Connect
from tests.harness.wall_clock import follow_steps

pytestmark = pytest.mark.live


def test_interfaces_and_namespaces_that_vanish_are_reported(
    make_space: Callable[[], tcp.Space], connect: Connect, tmp_path: Path
) -> None:
    """Interfaces are renamed, moved and removed, and their namespace is deleted; the traces go on."""
    a, b, other = make_space(), make_space(), make_space()
    tcp.join(a, b, "cwt0", ["10.9.1.1/24"], ["10.9.1.2/24"])
    tcp.join(a, b, "cwt1", ["10.9.2.1/24"], ["10.9.2.2/24"])
    with (
        running("-i", "cwt0", "-n", a.name, "--no-block", "-o", tmp_path / "0.cwnd") as renamed,
        running("-i", "cwt1", "-n", a.name, "--no-block", "-o", tmp_path / "1.cwnd") as moved,
    ):
        connection = connect(a, to=b, address="10.9.1.2", device="cwt0")
        send_after_idle(connection)
        a.ip("link", "set", "cwt0", "down")
        a.ip("link", "set", "cwt0", "name", "wan0", "up")
        a.ip("link", "set", "cwt1", "netns", other.name)
        renamed.wait_for(re.compile("warning: interface cwt0 is called wan0 now; the trace goes on"), 20)
        moved.wait_for(re.compile("warning: interface cwt1 is gone, removed or moved to another network namespace"), 20)
        send_after_idle(connection)
        a.ip("link", "del", "wan0")
        renamed.wait_for(re.compile("warning: interface wan0 is gone"), 20)
        connection.close()
        a.close()
        for run in (renamed, moved):
            run.wait_for(re.compile("warning: the traced network namespace has no name and no process"), 20)
            assert run.process.poll() is None
        for run in (renamed, moved):
            code, _, stderr = run.end()
            assert (code, "Traceback" in stderr) == (0, False)
    for name, resets in (("0.cwnd", 2), ("1.cwnd", 0)):
        trace = cwndtrace.load(tmp_path / name)
        assert (trace.status, len(trace.resets)) == ("complete", resets)


STEPPED = """
import os, sys, time
wall, flag = time.time_ns, sys.argv.pop(1)

def stepped():
    return wall() + (int(open(flag).read() or 0) if os.path.exists(flag) else 0)

time.time_ns = stepped
from cwndtrace.cli import main
main()
"""


def test_a_step_of_the_wall_clock_is_recorded(space: tcp.Space, connect: Connect, tmp_path: Path) -> None:
    """The step is of hours in either direction, and only the tracer sees it."""
    flag = tmp_path / "flag"

    def step(ns: int) -> None:
        # The rename is atomic; a file that is written in place is empty for a moment.
        new = tmp_path / "new"
        new.write_text(str(ns))
        new.rename(flag)

    follow_steps(space, connect(), tmp_path / "a.cwnd", step, python=("-c", STEPPED, str(flag)))


def test_a_time_namespace_is_refused(space: tcp.Space, tmp_path: Path) -> None:
    """The clock of a time namespace differs from the one in records."""
    before = ("unshare", "--fork", "--time", "--monotonic", "100000")
    done = call("run", "-n", space.name, "-d", "1s", "-o", tmp_path / "a.cwnd", before=before)
    if "unshare" in done.stderr:
        pytest.skip(f"needs CONFIG_TIME_NS: {done.stderr.strip()}")
    assert done.returncode == 1
    assert "time namespace's clock is 100000 s off" in done.stderr
    assert "nsenter --time" in done.stderr
    assert not (tmp_path / "a.cwnd").exists()
