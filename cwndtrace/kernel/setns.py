# SPDX-License-Identifier: Apache-2.0
"""Enters network namespaces. One descriptor serves to open, check and enter, so that no other one is entered."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Final

from cwndtrace import _libc

_NS_GET_NSTYPE: Final = 0xB703


def opened(path: str | Path, inode: int | None = None) -> int:
    """Return a descriptor of the network namespace at ``path``. With ``inode``, accept only that namespace.

    Raises OSError for any other file. It isn't opened then, because opening a device or a pipe may have side effects.
    """
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        # All namespaces are files of one file system, nsfs.
        if os.fstat(place).st_dev != os.stat("/proc/thread-self/ns/net").st_dev:  # noqa: PTH116
            raise OSError(errno.EINVAL, "not a namespace", str(path))
        fd = os.open(f"/proc/thread-self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(place)
    try:
        if fcntl.ioctl(fd, _NS_GET_NSTYPE) != _libc.CLONE_NEWNET:
            raise OSError(errno.EINVAL, "not a network namespace", str(path))
        if inode is not None and os.fstat(fd).st_ino != inode:
            raise OSError(errno.ESTALE, "another network namespace is there now", str(path))
    except BaseException:
        os.close(fd)
        raise
    return fd


def enter(path: str | Path, inode: int) -> None:
    """Move the calling thread into the network namespace ``inode`` at ``path``, and into no other. Raises OSError."""
    fd = opened(path, inode)
    try:
        _libc.setns(fd)
    finally:
        os.close(fd)
