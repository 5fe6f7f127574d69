# SPDX-License-Identifier: Apache-2.0
"""Finds the ids of cgroups (v2). A cgroup's id is the inode number of its folder."""

from __future__ import annotations

import ctypes
import errno
import os
from collections import deque
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

from cwndtrace import _libc
from cwndtrace.errors import NotFound

# Types of file systems, from include/uapi/linux/magic.h.
_CGROUP_SUPER_MAGIC, _CGROUP2_SUPER_MAGIC = 0x27E0EB, 0x63677270
# These numbers are the same on every architecture.
_FSOPEN_CLOEXEC, _FSMOUNT_CLOEXEC, _FSCONFIG_CMD_CREATE = 1, 1, 6
_MOUNTS: Final = Path("/proc/self/mounts")
_MOST_FOLDERS: Final = 65_536
"""The largest number of folders that ``ids`` looks at: a traced process may create any number of cgroups."""


def _mounted(kind: str, mounts: Path) -> list[Path]:
    """Return the mount points of a type of file system."""
    lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return [Path(where) for _, where, found, *_ in map(str.split, lines) if found == kind]


def mount_point(mounts: Path = _MOUNTS) -> Path:
    """Return the mount point of cgroup v2. Raises NotFound where it isn't mounted."""
    for where in _mounted("cgroup2", mounts):
        return where
    raise NotFound("cgroup v2 isn't mounted", "mount -t cgroup2 none /sys/fs/cgroup")


def root() -> Path:
    """Return a path to the top of cgroup v2 that is valid in this process and in those that it forks.

    ``ip netns exec`` replaces the /sys that has the cgroups. This then mounts cgroup v2 without a mount point. Raises
    NotFound where the kernel refuses that as well.
    """
    try:
        return mount_point()
    except NotFound as e:
        try:
            return Path(f"/proc/self/fd/{_mount_detached()}")
        except OSError as refused:
            cause = f"{e.cause} where this process can see it, and this process may not mount it: {refused.strerror}"
            raise NotFound(cause, f"{e.remedy}, as root") from refused


@cache
def _mount_detached() -> int:
    """Return a descriptor of cgroup v2's top folder, mounted without a mount point (fsmount(2), since Linux 5.2)."""
    context = _libc.syscall("fsopen", b"cgroup2", _FSOPEN_CLOEXEC)
    try:
        _libc.syscall("fsconfig", context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _libc.syscall("fsmount", context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)


def shown(folder: Path) -> str:
    """Return the path of a folder as users know it, also where it is reached through a descriptor."""
    return str(folder) if folder.parts[:4] != ("/", "proc", "self", "fd") else f"/{Path(*folder.parts[5:])}"


def find(name: str) -> Path:
    """Return the folder of a cgroup, given as a path or relative to the mount point, as in /proc/PID/cgroup.

    Raises NotFound where there is none, naming the mount point, or saying that it is a cgroup v1.
    """
    top = root()
    for candidate in (top / name.lstrip("/"), Path(name).absolute()):
        with suppress(OSError, ValueError):
            os.close(_open(candidate))
            return candidate
    for candidate in (Path(name).absolute(), *(where / name.lstrip("/") for where in _mounted("cgroup", _MOUNTS))):
        with suppress(OSError, ValueError):
            os.close(_open(candidate, _CGROUP_SUPER_MAGIC))
            cause = f"{candidate} is a cgroup v1: the kernel tells only the cgroup v2 of connections and block requests"
            raise NotFound(cause, _instead_of_version_1(top))
    where = top if top.parts[1] != "proc" else "the top of cgroup v2"
    raise NotFound(f"no cgroup {name}", f"give a folder below {where}, as in the last line of /proc/PID/cgroup")


def _instead_of_version_1(top: Path) -> str:
    with suppress(OSError):
        fd = _open(top)
        try:
            if _below(fd, "."):
                return "give the cgroup v2 of its processes, which the line 0:: of /proc/PID/cgroup has"
        finally:
            os.close(fd)
    return "select by --pid or --port, or boot with systemd.unified_cgroup_hierarchy=1: all cgroups here are v1"


def _open(folder: Path, kind: int = _CGROUP2_SUPER_MAGIC) -> int:
    """Return a descriptor of a cgroup's folder. Raises OSError for any other folder, whatever files it has."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    # struct statfs begins with the file system's type, a long.
    statfs = ctypes.create_string_buffer(512)
    if _libc.lib.fstatfs(fd, statfs) == 0 and ctypes.c_long.from_buffer(statfs).value == kind:
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "not a cgroup", str(folder))


def ids(folder: Path) -> tuple[set[int], int]:
    """Return the ids of a cgroup and of all cgroups below it, and how many more folders weren't looked at.

    Upper levels are looked at first. A cgroup that vanishes meanwhile is left out. If ``folder`` itself is gone, the
    result is empty.
    """
    try:
        top = _open(folder)
    except OSError:
        return set(), 0
    try:
        found, unseen = {os.fstat(top).st_ino}, 0
        waiting = deque(["."])
        while waiting:
            name = waiting.popleft()
            try:
                below = _below(top, name)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as e:
                # Linux returns ENODEV for a cgroup that was removed while it is open.
                unseen += e.errno != errno.ENODEV
                continue
            for inner, inode in below:
                if len(found) < _MOST_FOLDERS:
                    found.add(inode)
                    waiting.append(f"{name}/{inner}")
                else:
                    unseen += 1
        return found, unseen
    finally:
        os.close(top)


def _below(top: int, name: str) -> list[tuple[str, int]]:
    """Return names and inodes of the cgroups directly below one."""
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
    try:
        with os.scandir(fd) as entries:
            return [(entry.name, entry.inode()) for entry in entries if entry.is_dir(follow_symlinks=False)]
    finally:
        os.close(fd)
