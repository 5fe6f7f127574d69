# SPDX-License-Identifier: Apache-2.0
"""cgroup v2: finding a folder's ids. A cgroup's id is the inode number of its folder."""

from __future__ import annotations

import os
from pathlib import Path

from cwndtrace.errors import NotFound


def mount_point(mounts: Path = Path("/proc/self/mounts")) -> Path:
    """Where cgroup v2 is mounted; raises NotFound where it isn't."""
    for line in mounts.read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise NotFound("cgroup v2 isn't mounted", "mount -t cgroup2 none /sys/fs/cgroup")


def find(name: str) -> Path:
    """The folder of a cgroup, given as a path or relative to the mount point, as in /proc/PID/cgroup.

    Raises NotFound, naming the mount point, where there is none.
    """
    root = mount_point()
    for candidate in (root / name.lstrip("/"), Path(name)):
        if candidate.is_dir() and (candidate / "cgroup.controllers").exists():
            return candidate
    raise NotFound(f"no cgroup {name}", f"give a folder below {root}, as in the last line of /proc/PID/cgroup")


def ids(folder: str | Path) -> set[int]:
    """The ids of a cgroup and of all that are below it now; empty once it is gone."""
    return {Path(parent).stat().st_ino for parent, _, _ in os.walk(folder)}
