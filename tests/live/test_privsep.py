# SPDX-License-Identifier: Apache-2.0
"""Signals to all processes of a trace at once, and a process that looks which dies or stands still."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
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
"""Root's own trace, and one whose processes are the invoking user's once they have begun."""
IDS = ["root", "sudo"]


def group_of(*arguments: str | Path, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """``cwndtrace run`` and what it starts, in a process group of their own."""
    command = [*before, *COMMAND, "run", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, process_group=0)


def assert_in_order(process: subprocess.Popen[str], path: Path, resets: int, code: int = 0) -> None:
    """It ends by itself, with all that an end has."""
    try:
        shown, said = process.communicate(timeout=LONG_S)
    finally:
        process.kill()
    assert process.returncode == code, said
    assert f"kept {resets} reset" in shown
    assert "The capture is in" in said
    assert not re.search("Traceback|ended unexpectedly", said)
    assert_complete(path, resets)


def begun(path: Path) -> None:
    until(lambda: (path / "meta.json").exists(), LONG_S, "a trace under way")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("before", KINDS, ids=IDS)
def test_the_group_is_told_to_end(
    connect: Connect,
    space: tcp.Space,
    home: Path,
    before: tuple[str, ...],
    number: signal.Signals,
) -> None:
    """As by ``kill -TERM -- -PGID``, a terminal, and systemctl stop, which tells each process of a cgroup."""
    path = home / "a.cwnd"
    process = group_of("-n", space.name, "--no-block", "-o", path, before=before)
    try:
        begun(path)
        send_after_idle(connect())
        until(lambda: (path / "cwnd_reset").exists(), 20, "the reset")
        (helper,) = children(process.pid)
        os.killpg(process.pid, number)
    except BaseException:
        process.kill()
        raise
    assert_in_order(process, path, 1)
    assert not Path(f"/proc/{helper}").exists()


def test_timeout_ends_it(space: tcp.Space, tmp_path: Path) -> None:
    """It tells the process and then its group: that is no second signal, which would cost the summary."""
    path = tmp_path / "a.cwnd"
    # At work by then, or still starting: both end in order.
    process = group_of("-n", space.name, "--no-block", "-o", path, before=("timeout", "8"))
    assert_in_order(process, path, 0, code=124)


@pytest.mark.parametrize("before", KINDS, ids=IDS)
def test_the_group_is_told_to_end_while_it_starts(space: tcp.Space, home: Path, before: tuple[str, ...]) -> None:
    path = home / "a.cwnd"
    process = group_of("-n", space.name, "--no-block", "-o", path, before=before)
    try:
        until(lambda: children(process.pid), LONG_S, "its first child")
        assert not path.exists()
        os.killpg(process.pid, signal.SIGTERM)
    except BaseException:
        process.kill()
        raise
    assert_in_order(process, path, 0)


LACKS = "the helper process {}; the trace goes on without snapshots of connections"


@pytest.mark.parametrize("before", KINDS, ids=IDS)
def test_the_helper_is_killed(connect: Connect, space: tcp.Space, home: Path, before: tuple[str, ...]) -> None:
    """The trace goes on, and says once what it lacks, to who looks on and in the capture."""
    path, why = home / "a.cwnd", LACKS.format("ended unexpectedly (see dmesg for the reason)")
    with running("-n", space.name, "-i", "lo", "--no-block", "-o", path, before=before) as run:
        os.kill(helper_of(run), signal.SIGKILL)
        run.wait_for(re.compile(re.escape(f"cwndtrace: {why}")), 20)
        send_after_idle(connect())
        until(lambda: (path / "cwnd_reset").exists(), 20, "a reset that came later")
        code, shown, said = run.end()
    assert code == 0, said
    assert "kept 1 reset" in shown
    assert said.count("the trace goes on without") == 1
    trace = cwndtrace.load(path)
    assert (trace.status, len(trace.resets)) == ("complete", 1)
    assert [line.startswith(why) for line in trace.meta["lacking"]] == [True]
    assert trace.warnings == trace.meta["lacking"]


def test_it_is_killed_after_all_was_looked_at(space: tcp.Space, tmp_path: Path) -> None:
    """What it was asked for last is said to be lacking too."""
    with running("-n", space.name, "--no-block", "-o", tmp_path / "a.cwnd") as run:
        # It is stopped first, so that it finds out nothing of what happens between.
        stop(run.process.pid)
        os.kill(helper_of(run), signal.SIGKILL)
        run.process.send_signal(signal.SIGINT)
        run.process.send_signal(signal.SIGCONT)
        code, _, said = run.end(None)
    assert (code, said.count(LACKS.format("ended unexpectedly (see dmesg for the reason)"))) == (0, 1), said
    assert len(json.loads((tmp_path / "a.cwnd" / "meta.json").read_text())["lacking"]) == 1


def test_the_helper_stands_still(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    """A question waits for a while, none after it does, and neither does the end."""
    path = tmp_path / "a.cwnd"
    with running("-n", space.name, "-i", "lo", "--no-block", "-o", path) as run:
        helper = helper_of(run)
        stop(helper)
        run.wait_for(re.compile(LACKS.format(r"didn't answer within \d+ s")), 60)
        send_after_idle(connect())
        until(lambda: (path / "cwnd_reset").exists(), 20, "a reset that came later")
        begin = time.monotonic()
        code, shown, said = run.end()
        took = time.monotonic() - begin
    assert (code, said.count("the trace goes on without")) == (0, 1), said
    assert "kept 1 reset" in shown
    trace = cwndtrace.load(path)
    assert (trace.status, len(trace.resets), len(trace.warnings)) == ("complete", 1, 1)
    # A summary takes a few seconds where the machine is busy; the last snapshot at most ten.
    assert took < 30
    assert not Path(f"/proc/{helper}").exists()


def test_it_answers_again(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    """What was stopped and goes on is asked anew."""
    path = tmp_path / "a.cwnd"
    with running("-n", space.name, "-i", "lo", "--no-block", "-o", path) as run:
        stop(helper_of(run))
        run.wait_for(re.compile(LACKS.format(r"didn't answer within \d+ s")), 60)
        os.kill(helper_of(run), signal.SIGCONT)
        connection = connect()
        seen = lambda: connection.sport in set(cwndtrace.load(path).connections["sport"])  # noqa: E731
        until(seen, 60, "the new connection in a snapshot")
        code, _, said = run.end()
    assert (code, said.count("the trace goes on without")) == (0, 1), said
