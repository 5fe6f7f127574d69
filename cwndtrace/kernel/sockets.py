# SPDX-License-Identifier: Apache-2.0
"""Which process holds which socket, from /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def inodes_of(pid: int) -> set[int]:
    """Inodes of the sockets that a process holds; empty once it is gone."""
    found: set[int] = set()
    # By os, not pathlib, because there may be ten thousands.
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
    """The processes there are now."""
    return (int(name) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208


def comm(pid: int) -> str:
    """A process's name, empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").rstrip("\n")
    except OSError:
        return ""


def holders() -> dict[int, tuple[int, str]]:
    """Each socket's inode to a process that holds it: the one with the least pid, and its name."""
    held: dict[int, tuple[int, str]] = {}
    for pid in sorted(pids()):
        inodes = inodes_of(pid) - held.keys()
        if inodes:
            held |= dict.fromkeys(inodes, (pid, comm(pid)))
    return held


class SocketHolders:
    """Who holds which sockets, looked up again only for new ones, and for all of them every half minute.

    To look is to read the descriptors of every process there is.
    """

    def __init__(self, refresh_s: float = 30.0) -> None:
        self._refresh_s = refresh_s
        self._held: dict[int, tuple[int, str]] = {}
        self._looked_at = float("-inf")

    def of(self, inodes: set[int]) -> dict[int, tuple[int, str]]:
        """At least these sockets' inodes to process and name; 0 and "" where nobody was found."""
        if time.monotonic() - self._looked_at > self._refresh_s or inodes - self._held.keys() - {0}:
            self._looked_at = time.monotonic()
            self._held = dict.fromkeys(inodes, (0, "")) | holders()
        return self._held
