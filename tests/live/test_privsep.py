# SPDX-License-Identifier: Apache-2.0
"""Tests of signals to all processes of a trace at once, and of a helper process that is killed or stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest

import cwndtrace
from tests.harness import tcp
from tests.harness.captures import assert_complete
from tests.harness.command import COMMAND, ENVIRONMENT, LONG_S, running, send_after_idle
from tests.harness.processes import children
from tests.harness.tcp import Connect, stop, until
from tests.harness.users import BY_SUDO, helper_of

pytestmark = pytest.mark.live

KINDS = [(), BY_SUDO]
"""A trace by root, and one by sudo, whose processes become the invoking user."""
IDS = ["root", "sudo"]


def group_of(*arguments: str | Path, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start ``cwndtrace run`` in a new process group."""
    command = [*before, *COMMAND, "run", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, process_group=0)


def assert_ends_cleanly(process: subprocess.Popen[str], path: Path, resets: int, code: int = 0) -> None:
    """Assert that a trace ends with this exit code, a summary and a complete capture."""
    try:
        stdout, stderr = process.communicate(timeout=LONG_S)
    finally:
        process.kill()
    assert process.returncode == code, stderr
    assert f"kept {resets} reset" in stdout
    assert "The capture is in" in stderr
    assert not re.search("Traceback|ended unexpectedly", stderr)
    assert_complete(path, resets)


def wait_until_attached(path: Path) -> None:
    until(lambda: (path / "meta.json").exists(), LONG_S, "a trace under way")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("before", KINDS, ids=IDS)
def test_a_signal_to_the_group_ends_a_trace_cleanly(
    connect: Connect,
    space: tcp.Space,
    home: Path,
    before: tuple[str, ...],
    number: signal.Signals,
) -> None:
    """``kill -TERM -- -PGID`` and terminals signal a group, and systemctl stop each process of a cgroup."""
    path = home / "a.cwnd"
    process = group_of("-n", space.name, "--no-block", "-o", path, before=before)
    try:
        wait_until_attached(path)
        send_after_idle(connect())
        until(lambda: (path / "cwnd_reset").exists(), 20, "the reset")
        (helper,) = children(process.pid)
        os.killpg(process.pid, number)
    except BaseException:
        process.kill()
        raise
    assert_ends_cleanly(process, path, 1)
    assert not Path(f"/proc/{helper}").exists()


def test_timeout_ends_a_trace_cleanly(space: tcp.Space, tmp_path: Path) -> None:
    """timeout(1) signals the process and then its group; this must not count as a second signal."""
    path = tmp_path / "a.cwnd"
    # The trace may run by then or still be starting; both end cleanly.
    process = group_of("-n", space.name, "--no-block", "-o", path, before=("timeout", "8"))
    assert_ends_cleanly(process, path, 0, code=124)


@pytest.mark.parametrize("before", KINDS, ids=IDS)
def test_a_signal_to_the_group_while_a_trace_starts_ends_it_cleanly(
    space: tcp.Space, home: Path, before: tuple[str, ...]
) -> None:
    path = home / "a.cwnd"
    process = group_of("-n", space.name, "--no-block", "-o", path, before=before)
    try:
        until(lambda: children(process.pid), LONG_S, "its first child")
        assert not path.exists()
        os.killpg(process.pid, signal.SIGTERM)
    except BaseException:
        process.kill()
        raise
    assert_ends_cleanly(process, path, 0)


LACKS = "the helper process {}; the trace goes on without snapshots of connections"


@pytest.mark.parametrize("before", KINDS, ids=IDS)
def test_a_trace_goes_on_when_its_helper_is_killed(
    connect: Connect, space: tcp.Space, home: Path, before: tuple[str, ...]
) -> None:
    """The trace reports the missing parts once on stderr, and in the capture."""
    path, why = home / "a.cwnd", LACKS.format("ended unexpectedly (see dmesg for the reason)")
    with running("-n", space.name, "-i", "lo", "--no-block", "-o", path, before=before) as run:
        os.kill(helper_of(run), signal.SIGKILL)
        run.wait_for(re.compile(re.escape(f"cwndtrace: {why}")), 20)
        send_after_idle(connect())
        until(lambda: (path / "cwnd_reset").exists(), 20, "a reset that came later")
        code, stdout, stderr = run.end()
    assert code == 0, stderr
    assert "kept 1 reset" in stdout
    assert stderr.count("the trace goes on without") == 1
    trace = cwndtrace.load(path)
    assert (trace.status, len(trace.resets)) == ("complete", 1)
    assert [line.startswith(why) for line in trace.meta["lacking"]] == [True]
    assert trace.warnings == trace.meta["lacking"]


def test_a_helper_killed_before_the_last_snapshot_is_reported(space: tcp.Space, tmp_path: Path) -> None:
    with running("-n", space.name, "--no-block", "-o", tmp_path / "a.cwnd") as run:
        # The trace is stopped first, so it notices nothing before it ends.
        stop(run.process.pid)
        os.kill(helper_of(run), signal.SIGKILL)
        run.process.send_signal(signal.SIGINT)
        run.process.send_signal(signal.SIGCONT)
        code, _, stderr = run.end(None)
    assert (code, stderr.count(LACKS.format("ended unexpectedly (see dmesg for the reason)"))) == (0, 1), stderr
    assert len(json.loads((tmp_path / "a.cwnd" / "meta.json").read_text())["lacking"]) == 1


def test_a_trace_goes_on_when_its_helper_is_stopped(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    """The first question waits for an answer until a time limit; later questions and the end don't wait."""
    path = tmp_path / "a.cwnd"
    with running("-n", space.name, "-i", "lo", "--no-block", "-o", path) as run:
        helper = helper_of(run)
        stop(helper)
        run.wait_for(re.compile(LACKS.format(r"didn't answer within \d+ s")), 60)
        send_after_idle(connect())
        until(lambda: (path / "cwnd_reset").exists(), 20, "a reset that came later")
        begin = time.monotonic()
        code, stdout, stderr = run.end()
        took = time.monotonic() - begin
    assert (code, stderr.count("the trace goes on without")) == (0, 1), stderr
    assert "kept 1 reset" in stdout
    trace = cwndtrace.load(path)
    assert (trace.status, len(trace.resets), len(trace.warnings)) == ("complete", 1, 1)
    # A summary takes a few seconds on a busy machine, and the trace waits at most ten for the last snapshot.
    assert took < 30
    assert not Path(f"/proc/{helper}").exists()


def test_a_helper_that_answers_again_is_asked_again(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    path = tmp_path / "a.cwnd"
    with running("-n", space.name, "-i", "lo", "--no-block", "-o", path) as run:
        stop(helper_of(run))
        run.wait_for(re.compile(LACKS.format(r"didn't answer within \d+ s")), 60)
        os.kill(helper_of(run), signal.SIGCONT)
        connection = connect()
        seen = lambda: connection.sport in set(cwndtrace.load(path).connections["sport"])  # noqa: E731
        until(seen, 60, "the new connection in a snapshot")
        code, _, stderr = run.end()
    assert (code, stderr.count("the trace goes on without")) == (0, 1), stderr


def test_snapshots_keep_coming_while_the_machine_is_busy(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    """Eight busy processes for each CPU leave the helper process a ninth of one."""
    path, connection = tmp_path / "a.cwnd", connect()
    number = 8 * (os.cpu_count() or 1)

    def moments() -> list[int]:
        rows = cwndtrace.load(path).connections
        return sorted(rows[rows["sport"] == connection.sport]["ts_ns"].unique().tolist())

    with running("-n", space.name, "--no-block", "-o", path) as run, ExitStack() as stack:
        for _ in range(number):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(busy.kill)
        until(lambda: len(moments()) >= 5, 90, "five snapshots")
        end_ns = time.monotonic_ns()
        code, _, stderr = run.end()
    assert code == 0, stderr
    found = moments()
    gaps = [(after - before) / 1e9 for before, after in pairwise(found)]
    print(f"with {number} busy processes, {len(found)} snapshots, at most {max(gaps):.1f} s apart")
    assert max(gaps) <= 10
    assert found[-1] > end_ns
    assert cwndtrace.load(path).warnings == []
