# SPDX-License-Identifier: Apache-2.0
"""The lab's network namespaces, kept under /run/netns as ``ip netns`` does, and the sysctls set in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from cwndtrace import _libc
from cwndtrace.errors import KernelLacks, PermissionNeeded
from cwndtrace.kernel.netns import Namespace, inside

RUN: Final = Path("/run/netns")
_MS_BIND: Final = 0x1000
_MNT_DETACH: Final = 2


def _create(path: Path) -> int:
    """Move this thread to a new network namespace, mount the namespace at ``path``, and return its inode."""
    _libc.check(_libc.lib.unshare(_libc.CLONE_NEWNET))
    # Only this thread is in the new namespace, so the path has to be the thread's and not the process's.
    source = b"/proc/thread-self/ns/net"
    _libc.check(_libc.lib.mount(source, os.fsencode(path), b"none", _MS_BIND, None))
    return Path("/proc/thread-self/ns/net").stat().st_ino


@contextmanager
def namespace(name: str) -> Iterator[Namespace]:
    """Yield a new network namespace, and remove it on exit together with its devices and sysctls.

    Raises PermissionNeeded without root or if a sandbox refuses, OSError for any other failure.
    """
    path = RUN / name
    try:
        RUN.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o444, exist_ok=False)
    except PermissionError:
        raise PermissionNeeded(
            "the lab makes network namespaces, which needs root", "prefix the command with sudo"
        ) from None
    try:
        try:
            with ThreadPoolExecutor(max_workers=1) as pool:
                inode = pool.submit(_create, path).result()
        except PermissionError as e:
            cause = f"no network namespace could be made: {e.strerror}"
            raise PermissionNeeded(cause, "run as root, outside any sandbox") from e
        yield Namespace(inode, name, path)
    finally:
        remove(path)


def remove(path: Path) -> None:
    """Unmount and remove a namespace's file, which may be gone already."""
    _libc.lib.umount2(os.fsencode(path), _MNT_DETACH)
    with suppress(FileNotFoundError):
        path.unlink()


def write_sysctl(where: Namespace, name: str, value: str) -> None:
    """Set a sysctl in a namespace. Raises KernelLacks if the kernel has no such sysctl per namespace."""

    def write() -> None:
        file = Path("/proc/sys", *name.split("."))
        if not file.exists():
            raise KernelLacks(f"this kernel has no {name} in a network namespace", "Linux 4.15 or later has it")
        file.write_text(value, encoding="ascii")

    inside(where, write)
