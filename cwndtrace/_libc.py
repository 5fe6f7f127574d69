# SPDX-License-Identifier: Apache-2.0
"""Calls into the C library, for functions that Python itself lacks.

A call that fails raises OSError with the kernel's error number.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
from typing import Final

CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWNET: Final = 0x40000000
"""The types of cgroup and network namespaces, for ``setns`` and ``unshare`` (include/uapi/linux/sched.h)."""

_PR_SET_PDEATHSIG: Final = 1
# Numbers of system calls: arch/x86/entry/syscalls/syscall_64.tbl, and include/uapi/asm-generic/unistd.h for the others.
_SINCE_5: Final = {"fsopen": 430, "fsconfig": 431, "fsmount": 432, "openat2": 437}
_GENERIC: Final = _SINCE_5 | {"setgroups": 159, "perf_event_open": 241, "open_by_handle_at": 265, "bpf": 280}
_NUMBERS: Final = {
    "x86_64": _GENERIC | {"setgroups": 116, "perf_event_open": 298, "open_by_handle_at": 304, "bpf": 321},
    "aarch64": _GENERIC,
    "riscv64": _GENERIC,
}

lib: Final = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> int:
    """Return a call's result. Raises OSError with the number in errno where it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def syscall(name: str, *arguments: object) -> int:
    """Make a system call by its name. Raises OSError with ENOSYS on a machine whose number for it isn't in _NUMBERS."""
    number = _NUMBERS.get(platform.machine(), {}).get(name)
    if number is None:
        raise OSError(errno.ENOSYS, f"{name}(2) has no known number on {platform.machine()}")
    return check(lib.syscall(number, *arguments))


def prctl(option: int, *arguments: int) -> int:
    """Call prctl(2)."""
    # Some options refuse anything but zeros in the arguments that they don't use.
    padded = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    return check(lib.prctl(option, *padded))


def end_with_parent(parent: int) -> bool:
    """Have the kernel kill this process when ``parent`` ends; returns False where it has ended already.

    The kernel forgets this when the process changes its user or group ids (commit_creds() in kernel/cred.c).
    """
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


def setns(fd: int, kind: int = CLONE_NEWNET) -> None:
    """Move the calling thread into the namespace ``fd``, which has to be of this kind."""
    check(lib.setns(fd, kind))
