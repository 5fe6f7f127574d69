# SPDX-License-Identifier: Apache-2.0
"""Network namespaces of the lab's own, kept under /run/netns as ``ip netns`` does, and what is set in them."""

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
    """Make one and keep it at ``path``; its inode."""
    _libc.check(_libc.lib.unshare(_libc.CLONE_NEWNET))
    # Of the thread, not of the process: only this thread is in the new namespace.
    source = b"/proc/thread-self/ns/net"
    _libc.check(_libc.lib.mount(source, os.fsencode(path), b"none", _MS_BIND, None))
    return Path("/proc/thread-self/ns/net").stat().st_ino


@contextmanager
def namespace(name: str) -> Iterator[Namespace]:
    """A new network namespace, gone again at the end together with its devices and sysctls.

    Raises PermissionNeeded without root, KernelLacks where the kernel or a sandbox refuses.
    """
    path = RUN / name
    try:
        RUN.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o444, exist_ok=False)
    except PermissionError:
        raise PermissionNeeded("the lab makes network namespaces, which needs root", "prefix it with sudo") from None
    try:
        try:
            with ThreadPoolExecutor(max_workers=1) as pool:
                inode = pool.submit(_create, path).result()
        except PermissionError as e:
            cause = f"no network namespace could be made: {e.strerror}"
            raise PermissionNeeded(cause, "run as root, in no sandbox") from e
        yield Namespace(inode, name, path)
    finally:
        remove(path)


def remove(path: Path) -> None:
    """Unmount and remove a namespace's file; fine if it is gone already."""
    _libc.lib.umount2(os.fsencode(path), _MNT_DETACH)
    with suppress(FileNotFoundError):
        path.unlink()


def write_sysctl(where: Namespace, name: str, value: str) -> None:
    """Set a sysctl in a namespace. Raises KernelLacks where there is no such sysctl per namespace."""

    def write() -> None:
        file = Path("/proc/sys", *name.split("."))
        if not file.exists():
            raise KernelLacks(f"this kernel has no {name} in a network namespace", "Linux 4.15 or later has it")
        file.write_text(value, encoding="ascii")

    inside(where, write)
