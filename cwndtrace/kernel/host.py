# SPDX-License-Identifier: Apache-2.0
"""Finds the host from inside a container: its root folder and its cgroup namespace.

A container that is started with the host's pid namespace has the host's processes in its /proc, but a root, and often
a cgroup namespace, of its own. Outside of containers all functions here return what a process has anyway.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

from cwndtrace import _libc

# The inodes of the namespaces that the kernel starts with, include/linux/proc_ns.h.
_FIRST_CGROUP, _FIRST_PID = 0xEFFFFFFB, 0xEFFFFFFC
_RESOLVE_IN_ROOT, _RESOLVE_NO_MAGICLINKS = 0x10, 0x02  # include/uapi/linux/openat2.h
_PROC: Final = Path("/proc")
_MOUNTED: Final = Path("/host")
"""Where a container may have the host's root, for hosts that forbid /proc/1/root; ``kubectl debug node`` has it."""


def sees_all_processes(proc: Path = _PROC) -> bool:
    """Return whether /proc has all processes of the machine: this process is in the kernel's first pid namespace."""
    try:
        return (proc / "self/ns/pid").stat().st_ino == _FIRST_PID
    except OSError:
        return False


def in_container(proc: Path = _PROC) -> bool:
    """Return whether this process sees only a part of the processes, or has another root than process 1."""
    return not sees_all_processes(proc) or _mounted_at("/", proc / "self") != _mounted_at("/", proc / "1")


def root() -> Path:
    """Return the host's root folder: "/" outside of containers; inside, /proc/1/root, or /host if that is forbidden.

    Where none of them is the host's, returns "/", and ``lacking_root`` says why. Links below it may be absolute, and
    would lead into the container: open files by ``opened``.
    """
    return _found()[0]


def lacking_root() -> str | None:
    """Return why ``root`` isn't the host's; None where it is."""
    return _found()[1]


@cache
def _found() -> tuple[Path, str | None]:
    return find_root()


def find_root(proc: Path = _PROC, mounted: Path = _MOUNTED) -> tuple[Path, str | None]:
    """Return what ``root`` and ``lacking_root`` return, without their cache."""
    if not sees_all_processes(proc):
        return Path("/"), "this process isn't in the host's pid namespace"
    if not in_container(proc):
        return Path("/"), None
    place = proc / "1/root"
    try:
        os.close(os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as e:
        there = _mounted_at(str(mounted), proc / "self")
        if there is not None and there == _mounted_at("/", proc / "1"):
            return mounted, None
        return Path("/"), f"{place}: {e.strerror}"
    return place, None


def _mounted_at(place: str, process: Path) -> tuple[str, str] | None:
    """Return device and folder of the file system that a process has at ``place``; None if nothing is mounted there.

    This file, unlike /proc/1/root and /proc/1/ns, can be read without CAP_SYS_PTRACE.
    """
    found = None
    with suppress(OSError):
        for line in (process / "mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            _, _, device, folder, where, *_ = line.split(" ")
            if where == place:
                found = device, folder  # the last one covers those before it
    return found


def opened(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Return a descriptor of a file or folder of the host, by its path on the host.

    Symbolic links, absolute ones too, lead to where they lead on the host, and never out of its root. Raises OSError.
    """
    anchor = os.open(root(), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return opened_in(anchor, path, flags)
    finally:
        os.close(anchor)


def opened_in(anchor: int, path: str | Path, flags: int) -> int:
    """Return a descriptor of a file or folder, as ``opened`` does, with the open folder ``anchor`` as the root."""
    try:
        name = os.fsencode(path)
    except UnicodeError as e:
        raise OSError(errno.EINVAL, "not a path") from e
    # struct open_how: flags, mode, resolve
    how = (ctypes.c_uint64 * 3)(flags | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    return _libc.syscall("openat2", anchor, name or b".", how, ctypes.sizeof(how))


def namespaces(kind: str) -> list[Path]:
    """Return the files to try, in this order, that open the host's namespace of a kind; none where it can't be seen."""
    if not sees_all_processes():
        return []
    # Process 2 is the kernel's own and is in the first namespaces always. A security module may forbid process 1.
    return [Path(f"/proc/{pid}/ns/{kind}") for pid in (1, 2)]


def in_first_cgroup_namespace() -> bool:
    """Return whether the calling thread sees the paths of cgroups as the kernel has them."""
    try:
        return Path("/proc/thread-self/ns/cgroup").stat().st_ino == _FIRST_CGROUP
    except OSError:
        return True  # this kernel has no cgroup namespaces


def enter_cgroup_namespace() -> bool:
    """Move the calling thread, and those that it starts later, into the kernel's first cgroup namespace.

    Paths in /proc/PID/cgroup and mounts of cgroup v2 begin at the host's top from then on. Returns False where that
    isn't possible: it takes CAP_SYS_ADMIN, CAP_SYS_PTRACE and the host's pid namespace.
    """
    if in_first_cgroup_namespace():
        return True
    for path in namespaces("cgroup"):
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if os.fstat(fd).st_ino == _FIRST_CGROUP:
                    _libc.setns(fd, _libc.CLONE_NEWCGROUP)
                    return True
            finally:
                os.close(fd)
    return False
