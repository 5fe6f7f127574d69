# SPDX-License-Identifier: Apache-2.0
"""cgroup v2: finding a folder's ids. A cgroup's id is the inode number of its folder."""

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

_CGROUP2_SUPER_MAGIC: Final = 0x63677270
# The same number on every architecture.
_FSOPEN_CLOEXEC, _FSMOUNT_CLOEXEC, _FSCONFIG_CMD_CREATE = 1, 1, 6
_MOST_FOLDERS: Final = 65_536
"""So many are looked at, since whoever is traced may make as many as he likes."""


def mount_point(mounts: Path = Path("/proc/self/mounts")) -> Path:
    """Where cgroup v2 is mounted; raises NotFound where it isn't."""
    for line in mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise NotFound("cgroup v2 isn't mounted", "mount -t cgroup2 none /sys/fs/cgroup")


def root() -> Path:
    """Where cgroup v2 can be reached by this process and by those that it forks.

    ``ip netns exec`` puts another /sys in place of the one with the cgroups: then it is a mount that no folder shows.
    Raises NotFound where that is refused as well.
    """
    try:
        return mount_point()
    except NotFound as e:
        try:
            return Path(f"/proc/self/fd/{_mount_apart()}")
        except OSError as refused:
            cause = f"{e.cause} where this process can see it, and it may not mount it: {refused.strerror}"
            raise NotFound(cause, f"{e.remedy}, as root") from refused


@cache
def _mount_apart() -> int:
    """A descriptor of cgroup v2's top folder, mounted in no place (fsmount(2), since Linux 5.2)."""
    context = _libc.syscall("fsopen", b"cgroup2", _FSOPEN_CLOEXEC)
    try:
        _libc.syscall("fsconfig", context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _libc.syscall("fsmount", context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)


def shown(folder: Path) -> str:
    """A folder as a person knows it, also where it is reached through a descriptor."""
    return str(folder) if folder.parts[:4] != ("/", "proc", "self", "fd") else f"/{Path(*folder.parts[5:])}"


def find(name: str) -> Path:
    """The folder of a cgroup, given as a path or relative to the mount point, as in /proc/PID/cgroup.

    Raises NotFound, naming the mount point, where there is none.
    """
    top = root()
    for candidate in (top / name.lstrip("/"), Path(name).absolute()):
        with suppress(OSError, ValueError):
            os.close(_open(candidate))
            return candidate
    where = top if top.parts[1] != "proc" else "the top of cgroup v2"
    raise NotFound(f"no cgroup {name}", f"give a folder below {where}, as in the last line of /proc/PID/cgroup")


def _open(folder: Path) -> int:
    """A descriptor of a cgroup's folder. Raises OSError for any other one, however its files are called."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    # struct statfs begins with the file system's type, a long.
    about = ctypes.create_string_buffer(512)
    if _libc.lib.fstatfs(fd, about) == 0 and ctypes.c_long.from_buffer(about).value == _CGROUP2_SUPER_MAGIC:
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "not a cgroup", str(folder))


def ids(folder: Path) -> tuple[set[int], int]:
    """The ids of a cgroup and of all that are below it now, and how many folders more weren't looked at.

    The uppermost come first. One that vanishes meanwhile isn't there; once ``folder`` itself is gone, nothing is.
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
                # Linux says so of a cgroup that was removed while it is open.
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
    """Names and inodes of the cgroups right below one."""
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
    try:
        with os.scandir(fd) as entries:
            return [(entry.name, entry.inode()) for entry in entries if entry.is_dir(follow_symlinks=False)]
    finally:
        os.close(fd)
