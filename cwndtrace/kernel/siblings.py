# SPDX-License-Identifier: Apache-2.0
"""Finds the processes that share a traced process's work, such as the other workers of a server, from /proc."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cwndtrace.errors import NotFound
from cwndtrace.kernel import inet_diag, netns, sockets

_ESTABLISHED = 1 << 1
_FIRST = 1
"""The pid of the first process, which adopts others: children of it have nothing in common."""


@dataclass(frozen=True)
class Siblings:
    """The processes with a process's executable that hold TCP connections which that process doesn't hold.

    These are its children, its parent, and its parent's children; ``processes`` has pid and name, those with most
    connections first. ``held`` and ``others`` are numbers of established connections: the process's, and theirs.
    ``port`` is the local port that all of these have, ``cgroup`` the cgroup v2 that all processes are in, as in
    /proc/PID/cgroup; None where they have none in common.
    """

    processes: list[tuple[int, str]]
    held: int
    others: int
    port: int | None
    cgroup: str | None


def of(pid: int) -> Siblings | None:
    """Return the siblings of a process; None where it has none that hold connections, or is gone."""
    try:
        found = netns.inside(netns.find(str(pid)), lambda: inet_diag.dump(_ESTABLISHED))
    except (NotFound, OSError):
        return None
    ports = dict(zip(found.messages["inode"].tolist(), found.messages["sport"].tolist(), strict=True))
    mine = sockets.inodes_of(pid) & ports.keys()
    theirs = {relative: (sockets.inodes_of(relative) & ports.keys()) - mine for relative in _relatives(pid)}
    holders = sorted((relative for relative in theirs if theirs[relative]), key=lambda p: -len(theirs[p]))
    if not holders:
        return None
    others = set().union(*theirs.values())
    local = Counter(ports[inode] for inode in mine | others)
    groups = {_cgroup(member) for member in (pid, *holders)}
    return Siblings(
        processes=[(holder, sockets.comm(holder)) for holder in holders],
        held=len(mine),
        others=len(others),
        port=next(iter(local)) if len(local) == 1 else None,
        cgroup=groups.pop() if len(groups) == 1 else None,
    )


def _relatives(pid: int) -> list[int]:
    """Return the children, the parent and the parent's children of a process that run the same executable."""
    program, parent = _executable(pid), _parent(pid)
    near = []
    for other in sockets.pids():
        if other in (pid, os.getpid(), _FIRST):
            continue
        above = _parent(other)
        if pid == above or other == parent or (above == parent and parent not in (None, _FIRST)):
            near.append(other)
    return [other for other in near if program is not None and _executable(other) == program]


def _executable(pid: int) -> tuple[int, int] | None:
    with suppress(OSError):
        status = Path(f"/proc/{pid}/exe").stat()
        return status.st_dev, status.st_ino
    return None


def _parent(pid: int) -> int | None:
    with suppress(OSError):
        return int(sockets.stat(pid)[1])
    return None


def _cgroup(pid: int) -> str | None:
    """Return the path of a process's cgroup v2; None for the top one, which has all processes in it."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            if line.startswith("0::/") and line != "0::/":
                return line.removeprefix("0::")
    return None
