# SPDX-License-Identifier: Apache-2.0
"""Tests that change a whole machine, so they run only in a guest of tools/vm.

They step its clock, freeze its tasks as for a suspend, use up a quota, and lock the kernel down. The last can't be
undone.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import cwndtrace
from tests.harness import tcp
from tests.harness.captures import block_io_rows
from tests.harness.command import LONG_S, Done, assert_short, call, running, send_after_idle
from tests.harness.disk import file_system, loop
from tests.harness.guest import in_guest
from tests.harness.tcp import Connect
from tests.harness.users import BY_SUDO, GID, UID, home_of
from tests.harness.wall_clock import HOUR_NS, follow_steps

pytestmark = pytest.mark.vm

PM_TEST: Final = Path("/sys/power/pm_test")
LOCKDOWN: Final = Path("/sys/kernel/security/lockdown")
# linux/quota.h and uapi/linux/quota.h
Q_SETQUOTA: Final = 0x800008
QIF_BLIMITS: Final = 1
SYS_QUOTACTL: Final = 179
"""The system call's number on x86-64."""


@pytest.fixture(scope="module", autouse=True)
def guest() -> None:
    """Skip the tests outside of a guest."""
    if not in_guest():
        pytest.skip("needs a guest of its own: make vm-test")


@pytest.fixture
def wall_clock() -> Iterator[None]:
    """Set the wall clock right again at the end."""
    offset = time.time_ns() - time.monotonic_ns()
    yield
    time.clock_settime_ns(time.CLOCK_REALTIME, time.monotonic_ns() + offset)


@pytest.mark.usefixtures("wall_clock")
def test_a_step_of_the_wall_clock_is_recorded(space: tcp.Space, connect: Connect, tmp_path: Path) -> None:
    """The step is of hours in either direction, and all of the machine sees it."""
    right = time.time_ns() - time.monotonic_ns()

    def step(ns: int) -> None:
        time.clock_settime_ns(time.CLOCK_REALTIME, time.monotonic_ns() + right + ns)

    follow_steps(space, connect(), tmp_path / "a.cwnd", step)


@pytest.mark.usefixtures("wall_clock")
def test_a_trace_survives_being_frozen_as_for_a_suspend(space: tcp.Space, connect: Connect, tmp_path: Path) -> None:
    """The kernel freezes every task, its first step of a suspend, and UTC is an hour later when they continue."""
    path = tmp_path / "a.cwnd"
    PM_TEST.write_text("freezer")
    try:
        connection = connect()

        def known() -> list[tcp.Send]:
            sends = [s for s in connection.sends if s.reason == "idle"]
            tcp.until(lambda: len(cwndtrace.load(path).resets) >= len(sends), LONG_S, "the records")
            return sends

        with running("-n", space.name, "--no-block", "-o", path) as run:
            send_after_idle(connection)
            early = len(known())
            # The freeze lasts five seconds. A guest that gets no CPU meanwhile may miss them: one measured 0.15 s.
            for _ in range(3):
                connection.grow()
                before, begin = connection.quiet(), time.monotonic_ns()
                # The writing task isn't frozen; write() returns when the freeze is over.
                Path("/sys/power/state").write_text("freeze")
                frozen = time.monotonic_ns() - begin
                if frozen > 4_000_000_000:
                    break
            assert frozen > 4_000_000_000
            time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() + HOUR_NS)
            connection.idle(0)
            was_idle = connection.send()
            assert was_idle.reason == "idle"
            assert was_idle.before.last_snd_us > before.last_snd_us + 4_000_000
            known()
            send_after_idle(connection)
            sends = known()
            code, _, stderr = run.end()
    finally:
        PM_TEST.write_text("none")
    assert (code, "Traceback" in stderr) == (0, False), stderr
    trace = cwndtrace.load(path)
    assert (trace.status, trace.warnings) == ("complete", [])
    stamps = list(trace.resets["ts_ns"])
    assert all(s.start_ns <= stamp <= s.end_ns for s, stamp in zip(sends, stamps, strict=True))
    assert len(trace.meta["clock"]["segments"]) == 2
    offset = time.time() - time.monotonic()
    errors_s = [at.timestamp() - stamp / 1e9 - offset for at, stamp in zip(trace.resets["time"], stamps, strict=True)]
    assert all(abs(off + HOUR_NS / 1e9) < 1 for off in errors_s[:early]), errors_s
    assert abs(errors_s[-1]) < 1, errors_s


def set_quota(device: Path, uid: int, blocks: int) -> None:
    """Set a user's quota on the file system of this device, in KiB; 0 is no limit. Raises OSError."""
    # struct if_dqblk: hard and soft limit of blocks, space; the same for inodes; two times; a mask of valid members.
    limits = struct.pack("=8QI4x", blocks, blocks, 0, 0, 0, 0, 0, 0, QIF_BLIMITS)
    command = Q_SETQUOTA << 8  # of users
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(SYS_QUOTACTL, command, str(device).encode(), uid, limits):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(device))


def test_a_quota_that_is_used_up_is_reported_once(space: tcp.Space) -> None:
    """The rows that were written stay readable, and the others wait until there is room again."""
    with (
        home_of(UID, GID) as home,
        loop() as limited,
        file_system(limited, home / "limited", make="-O quota", mount="-o usrquota") as folder,
        loop() as disk,
    ):
        os.chown(folder, UID, GID)
        path, ballast = folder / "a.cwnd", folder / "ballast"
        with running("-n", space.name, "-o", path, before=BY_SUDO) as run:
            disk.read(*range(100))
            tcp.until(lambda: (path / "block_io").exists() and block_io_rows(path) >= 100, LONG_S, "the first rows")
            ballast.write_bytes(bytes(1 << 20))
            os.chown(ballast, UID, GID)
            set_quota(limited.path, UID, 1024)
            disk.read(*range(500))
            run.wait_for(re.compile("Disk quota exceeded"))
            assert block_io_rows(path) >= 100
            assert run.process.poll() is None
            set_quota(limited.path, UID, 0)
            tcp.until(lambda: block_io_rows(path) >= 600, LONG_S, "the rows that waited")
            code, _, stderr = run.end()
        assert (code, stderr.count("Disk quota exceeded"), "Traceback" in stderr) == (0, 1, False), stderr
        trace = cwndtrace.load(path)
        assert (trace.status, trace.warnings) == ("complete", [])
        assert len(trace.block_io) == trace.meta["counts"]["block_io"]["kept"]


def test_lockdown_refuses_new_traces_and_not_running_ones(space: tcp.Space, tmp_path: Path) -> None:
    """This is the last test, because a lockdown can't be undone."""

    def briefly(name: str) -> Done:
        return call("run", "-n", space.name, "-d", "1s", "-o", tmp_path / name, seconds=LONG_S)

    with running("-n", space.name, "-o", tmp_path / "before.cwnd") as run:
        LOCKDOWN.write_text("integrity")
        assert briefly("integrity.cwnd").returncode == 0
        LOCKDOWN.write_text("confidentiality")
        assert_short(briefly("no.cwnd"), 77, "lockdown=confidentiality keeps BPF from reading", "lockdown=integrity")
        assert not (tmp_path / "no.cwnd").exists()
        code, _, stderr = run.end()
    # A trace that was attached before goes on.
    assert (code, "Traceback" in stderr) == (0, False), stderr
    assert cwndtrace.load(tmp_path / "before.cwnd").status == "complete"
