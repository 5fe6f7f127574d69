# SPDX-License-Identifier: Apache-2.0
"""The one command of bpf(2) that bcc doesn't offer: running a raw tracepoint program on a given CPU."""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Final

_SYS_BPF: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280}
_BPF_PROG_TEST_RUN: Final = 10
_BPF_F_TEST_RUN_ON_CPU: Final = 1


class _TestRun(ctypes.Structure):
    _fields_ = [
        ("prog_fd", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("data_in", ctypes.c_uint64),
        ("data_out", ctypes.c_uint64),
        ("repeat", ctypes.c_uint32),
        ("duration", ctypes.c_uint32),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_uint64),
        ("ctx_out", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
    ]


_libc = ctypes.CDLL(None, use_errno=True)


def run_raw_tracepoint(prog_fd: int, cpu: int, *args: int) -> None:
    """Run the program once on ``cpu`` with the tracepoint arguments ``args``.

    Raises OSError: ENXIO for a CPU that is offline, EPERM without the right, ENOSYS on an unknown machine.
    """
    number = _SYS_BPF.get(platform.machine())
    if number is None:
        raise OSError(38, f"bpf(2) has no known number on {platform.machine()}")
    ctx = (ctypes.c_uint64 * len(args))(*args)
    attr = _TestRun(
        prog_fd=prog_fd,
        ctx_size_in=ctypes.sizeof(ctx),
        ctx_in=ctypes.addressof(ctx),
        flags=_BPF_F_TEST_RUN_ON_CPU,
        cpu=cpu,
    )
    if _libc.syscall(number, _BPF_PROG_TEST_RUN, ctypes.byref(attr), ctypes.sizeof(attr)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
