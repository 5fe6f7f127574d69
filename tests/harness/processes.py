# SPDX-License-Identifier: Apache-2.0
"""Facts about running processes, read from /proc."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def children(pid: int) -> list[int]:
    """Return the pids of a process's children. Not every kernel lists them in /proc/PID/task/TID/children."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        # A process that ends during the loop has no stat file.
        with contextlib.suppress(OSError):
            if path.read_text().rpartition(")")[2].split()[1] == str(pid):
                pids.append(int(path.parent.name))
    return pids


def descriptors(pid: int) -> int:
    """Return the number of open file descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208


def resident(pid: int) -> int:
    """Return the resident memory of a process and its descendants, in bytes."""
    own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return own + sum(resident(child) for child in children(pid))
