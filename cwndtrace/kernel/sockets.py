# SPDX-License-Identifier: Apache-2.0
"""Which process holds which socket, from /proc."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_SOCKET = re.compile(r"socket:\[(\d+)\]")


def inodes_of(pid: int) -> set[int]:
    """Inodes of the sockets that a process holds; empty once it is gone."""
    found: set[int] = set()
    with suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                match = _SOCKET.match(str(file.readlink()))
                if match:
                    found.add(int(match[1]))
    return found


def pids() -> Iterator[int]:
    """The processes there are now."""
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


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
