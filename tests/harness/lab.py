# SPDX-License-Identifier: Apache-2.0
"""The lab's commands in the background, its processes, and objects that a run may leave on the machine."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd

from cwndtrace.kernel import netns
from cwndtrace.lab import cleanup, disk
from cwndtrace.lab.path import End
from tests.harness import tcp
from tests.harness.command import COMMAND, ENVIRONMENT


class PathEnd(tcp.Here):
    """One end of a path of the lab, for connections."""

    def __init__(self, end: End) -> None:
        self.name, self.inode = end.namespace.name, end.namespace.inode
        self.address, self.device = end.address, end.device
        self._namespace = end.namespace

    def enter(self, work: Callable[[], Any]) -> Any:
        """Call ``work`` in this namespace and return its result."""
        return netns.inside(self._namespace, work)


def tcp_sysctls() -> dict[str, str]:
    """Return those of the host's TCP settings that can be read, without keys, which the kernel changes itself."""
    folder = Path("/proc/sys/net/ipv4")
    return {f.name: f.read_text() for f in folder.glob("tcp_*") if os.access(f, os.R_OK) and "key" not in f.name}


def processes_of(pid: int) -> list[int]:
    """Return the pids of the lab's processes that a parent started."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(part.startswith(b"cwndtrace.lab.") for part in command) and str(pid).encode() in command:
                pids.append(int(entry.name))
    return pids


def leftovers_of(pid: int) -> list[str]:
    """Return the namespaces, cgroups, configfs devices, notes and loop devices whose names have a run's pid."""
    prefix = f"cwt-{pid}-"
    folders = [
        Path("/run/netns"),
        disk.CONFIGFS,
        cleanup.NOTES,
        *Path("/sys/fs/cgroup").glob("*"),
        Path("/sys/fs/cgroup"),
    ]
    names = [str(entry) for folder in folders if folder.is_dir() for entry in folder.iterdir() if prefix in entry.name]
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        if prefix in backing.read_text():
            names.append(str(backing))
    return names


def unrecorded(taken: pd.DataFrame, resets: pd.DataFrame) -> list[tuple[str, int]]:
    """Return setting and size in bytes of each burst whose window fell, by TCP_INFO, without a record of that."""
    idle = resets[resets["reason"] == "idle"]
    bursts = []
    for row in taken[taken["cwnd_after"] < taken["cwnd_before"]].itertuples():
        during = idle[(idle["ts_ns"] >= row.start_ns) & (idle["ts_ns"] <= row.end_ns) & (idle["sport"] == row.sport)]
        windows = list(zip(during["cwnd_before"], during["cwnd_after"], strict=True))
        if windows != [(row.cwnd_before, row.cwnd_after)]:
            bursts.append((str(row.setting), int(str(row.burst_bytes))))
    return bursts


class Started:
    """A command in the background; ``output`` has its stdout and stderr as far as ``wait_for`` has read them."""

    def __init__(self, *arguments: str | Path, before: tuple[str, ...] = ()) -> None:
        command = [*before, *COMMAND, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        self.output = ""

    def wait_for(self, pattern: re.Pattern[str], seconds: float = 60) -> re.Match[str]:
        """Read the output until ``pattern`` is in it, and return the match."""
        assert self.process.stdout is not None
        fd, deadline = self.process.stdout.fileno(), time.monotonic() + seconds
        while not (match := pattern.search(self.output)):
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            more = os.read(fd, 65536).decode() if ready else ""
            assert more, f"{pattern.pattern} never came: {self.output}"
            self.output += more
        return match

    def end(self, number: signal.Signals | None = None) -> tuple[int, str]:
        """Send a signal, unless it is None, wait for the end, and return the exit code and all output."""
        if number is not None:
            self.process.send_signal(number)
        more, _ = self.process.communicate(timeout=90)
        self.output += more.decode()
        return self.process.returncode, self.output

    def child(self, role: bytes) -> int:
        """Return the pid of the lab's process with ``role`` among its arguments, once it runs."""
        pids: list[int] = []

        def there() -> bool:
            for pid in processes_of(self.process.pid):
                with suppress(OSError):
                    if role in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                        pids.append(pid)
            return bool(pids) or self.process.poll() is not None

        tcp.until(there, 60, f"the lab's {role.decode()}")
        assert pids, self.end()
        return pids[0]


@contextmanager
def started(*arguments: str | Path, before: tuple[str, ...] = ()) -> Iterator[Started]:
    """Start a command in the background; kill it on exit if it still runs."""
    command = Started(*arguments, before=before)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.process.kill()
            command.process.communicate()


@contextmanager
def serving(before: tuple[str, ...] = ()) -> Iterator[tuple[Started, str]]:
    """Run ``cwndtrace serve`` on a free port of loopback; yield it and the argument of ``--against`` for it."""
    with started("serve", "--host", "127.0.0.1", "--port", "0", before=before) as server:
        port = server.wait_for(
            re.compile(r"^Listening on 127\.0\.0\.1 port (\d+); press Ctrl-C to stop\.$", re.MULTILINE)
        )[1]
        yield server, f"127.0.0.1:{port}"
