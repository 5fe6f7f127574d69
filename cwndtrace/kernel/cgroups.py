# SPDX-License-Identifier: Apache-2.0
"""Finds the ids of cgroups (v2). A cgroup's id is the inode number of its folder."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

from cwndtrace import _libc
from cwndtrace.errors import NotFound
from cwndtrace.kernel import host

# Types of file systems, from include/uapi/linux/magic.h.
_CGROUP_SUPER_MAGIC, _CGROUP2_SUPER_MAGIC = 0x27E0EB, 0x63677270
# These numbers are the same on every architecture.
_FSOPEN_CLOEXEC, _FSMOUNT_CLOEXEC, _FSCONFIG_CMD_CREATE = 1, 1, 6
_FILEID_KERNFS = 0xFE
_MOUNTS: Final = Path("/proc/self/mountinfo")
_MOST_FOLDERS: Final = 65_536
"""The largest number of folders that ``ids`` looks at: a traced process may create any number of cgroups."""


def _mounted(kind: str, mounts: Path) -> list[Path]:
    """Return the mount points of a type of file system; a container's, which have only a part of it, are left out."""
    return [where for found, top, where in _mounts(mounts) if (found, top) == (kind, "/")]


def _mounts(mounts: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield the type of each file system, the folder of it that is mounted, and the mount point."""
    for line in mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        mount, _, system = line.partition(" - ")
        _, _, _, top, where, *_ = mount.split(" ")
        yield system.split(" ")[0], top, Path(where)


def mount_point(mounts: Path = _MOUNTS) -> Path:
    """Return the mount point of cgroup v2. Raises NotFound where it isn't mounted."""
    for where in _mounted("cgroup2", mounts):
        return where
    raise NotFound("cgroup v2 isn't mounted", "mount -t cgroup2 none /sys/fs/cgroup")


def root() -> Path:
    """Return a path to the top of cgroup v2 that is valid in this process and in those that it forks.

    ``ip netns exec`` replaces the /sys that has the cgroups, and a container has only its own there. This then mounts
    cgroup v2 without a mount point, from the top of the calling thread's cgroup namespace. Raises NotFound where the
    kernel refuses that as well.
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


def version() -> str:
    """Return which versions of cgroups this host has mounted: "v2", "v1", "hybrid" for both, or "none"."""
    kinds = {kind for kind, _, _ in _mounts(Path("/proc/1/mountinfo") if host.sees_all_processes() else _MOUNTS)}
    there = "cgroup" in kinds, "cgroup2" in kinds
    return {(False, True): "v2", (True, False): "v1", (True, True): "hybrid"}.get(there, "none")


def path_of(cgroup_id: int) -> str | None:
    """Return the path of a cgroup v2 by its id, as in /proc/PID/cgroup; None once it is gone.

    Needs CAP_DAC_READ_SEARCH. Raises NotFound where there is no cgroup v2, and OSError where the kernel refuses.
    """
    top = _top()
    # struct file_handle of include/linux/fs.h, with the identifier of kernfs (include/linux/exportfs.h).
    handle = ctypes.create_string_buffer(struct.pack("=IiQ", 8, _FILEID_KERNFS, cgroup_id), 16)
    try:
        fd = _libc.syscall("open_by_handle_at", top, handle, os.O_PATH | os.O_CLOEXEC)
    except OSError as e:
        if e.errno in (errno.ESTALE, errno.ENOENT):
            return None
        raise
    try:
        path, above = (os.readlink(f"/proc/thread-self/fd/{each}") for each in (fd, top))  # noqa: PTH115
    finally:
        os.close(fd)
    below = path.removeprefix(above.rstrip("/"))
    return below.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") or "/"


@cache
def _top() -> int:
    return os.open(root(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def shown(folder: Path) -> str:
    """Return the path of a folder as users know it, also where it is reached through a descriptor."""
    if folder.parts[:4] == ("/", "proc", "self", "fd"):
        return f"/{Path(*folder.parts[5:])}"
    return f"/{folder.relative_to(host.root())}" if folder.is_relative_to(host.root()) else str(folder)


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
    unseen = [0]
    return {inode for _, inode in walk(folder, unseen)}, unseen[0]


def walk(folder: Path, unseen: list[int]) -> Iterator[tuple[str, int]]:
    """Yield path, relative to ``folder``, and id of a cgroup and of all cgroups below it, upper levels first.

    The number of folders that weren't looked at is added to ``unseen[0]``.
    """
    try:
        top = _open(folder)
    except OSError:
        return
    try:
        yield "", os.fstat(top).st_ino
        number, waiting = 1, deque([""])
        while waiting:
            name = waiting.popleft()
            try:
                below = _below(top, f".{name}")
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as e:
                # Linux returns ENODEV for a cgroup that was removed while it is open.
                unseen[0] += e.errno != errno.ENODEV
                continue
            for inner, inode in below:
                if number < _MOST_FOLDERS:
                    number += 1
                    waiting.append(f"{name}/{inner}")
                    yield waiting[-1], inode
                else:
                    unseen[0] += 1
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
