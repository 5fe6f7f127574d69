# SPDX-License-Identifier: Apache-2.0
"""Finds the processes that hold sockets, from /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def inodes_of(pid: int) -> set[int]:
    """Return the inodes of the sockets that a process holds; an empty set once it is gone."""
    found: set[int] = set()
    # This uses os, because pathlib is slow for tens of thousands of descriptors.
    with suppress(OSError):
        folder = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in os.listdir(folder):  # noqa: PTH208
                with suppress(OSError):
                    target = os.readlink(name, dir_fd=folder)
                    if target.startswith("socket:["):
                        found.add(int(target[8:-1]))
        finally:
            os.close(folder)
    return found


def pids() -> Iterator[int]:
    """Return the pids of the present processes."""
    return (int(name) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208


def stat(pid: int | str) -> list[bytes]:
    """Return the fields of /proc/PID/stat from the third on, the state. Raises OSError once the process is gone."""
    # The second field, the name, may hold anything, so the others follow the last bracket.
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()


def comm(pid: int) -> str:
    """Return a process's name, empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").rstrip("\n")
    except OSError:
        return ""


def holders() -> dict[int, tuple[int, str]]:
    """Return pid and name of a process that holds each socket, by inode: the process with the lowest pid."""
    held: dict[int, tuple[int, str]] = {}
    for pid in sorted(pids()):
        inodes = inodes_of(pid) - held.keys()
        if inodes:
            held |= dict.fromkeys(inodes, (pid, comm(pid)))
    return held


class SocketHolders:
    """A cached table of the processes that hold sockets.

    A lookup reads the descriptors of every process, so it is repeated only for sockets that are new, and every
    ``refresh_s`` seconds.
    """

    def __init__(self, refresh_s: float = 30.0) -> None:
        self._refresh_s = refresh_s
        self._held: dict[int, tuple[int, str]] = {}
        self._looked_at = float("-inf")

    def of(self, inodes: set[int]) -> dict[int, tuple[int, str]]:
        """Return pid and name of a process that holds each of these sockets, by inode; (0, "") where no process does.

        The result may hold other sockets too.
        """
        if time.monotonic() - self._looked_at > self._refresh_s or inodes - self._held.keys() - {0}:
            self._looked_at = time.monotonic()
            self._held = dict.fromkeys(inodes, (0, "")) | holders()
        return self._held
