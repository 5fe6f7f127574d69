# SPDX-License-Identifier: Apache-2.0
"""What /proc tells of a process: its name, its command line, its cgroup and its network namespace."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cwndtrace.kernel.sockets import comm, stat
from cwndtrace.names import place

CMDLINE_BYTES: Final = 200
"""The most bytes that are kept of a command line."""
_CGROUP_BYTES: Final = 1 << 20
_STARTTIME: Final = 19
"""Field 22 of proc_pid_stat(5), among those that ``stat`` returns."""


@dataclass(frozen=True)
class Process:
    """A process. ``start_ticks`` is its start time since boot in clock ticks, which tells it from others of its pid.

    ``comm`` is the name of its thread group's leader. ``cmdline`` is its arguments, joined by spaces and cut, and empty
    for a kernel thread. ``cgroup`` is ``place.of_process``. ``netns_ino`` is 0 where it may not be seen.
    """

    pid: int
    start_ticks: int
    comm: str
    cmdline: str
    cgroup: str
    netns_ino: int


def read(pid: int, *, cmdline: bool = True) -> Process | None:
    """Return a process; None once it is gone."""
    folder = Path(f"/proc/{pid}")
    try:
        start = int(stat(pid)[_STARTTIME])
        groups = _head(folder / "cgroup", _CGROUP_BYTES).decode("utf-8", "backslashreplace")
        words = _head(folder / "cmdline", CMDLINE_BYTES) if cmdline else b""
    except (OSError, ValueError, IndexError):
        return None
    try:
        netns = os.stat(folder / "ns/net").st_ino  # noqa: PTH116
    except OSError:
        netns = 0
    name = comm(pid)
    text = words.rstrip(b"\0").replace(b"\0", b" ").decode("utf-8", "ignore")
    return Process(pid, start, name, text, place.of_process(groups), netns) if name else None


def _head(path: Path, most: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = b""
        while len(data) < most and (more := os.read(fd, most - len(data))):
            data += more
        return data
    finally:
        os.close(fd)
