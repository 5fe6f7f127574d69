# SPDX-License-Identifier: Apache-2.0
"""What bcc doesn't offer of bpf(2): running a raw tracepoint program on a given CPU, and whether it can be called."""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Final

_SYS_BPF: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280}
_BPF_MAP_CREATE: Final = 0
_BPF_MAP_TYPE_ARRAY: Final = 2
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


class _MapCreate(ctypes.Structure):
    _fields_ = [
        ("map_type", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
    ]


def try_map() -> None:
    """Make the least map and free it. Raises OSError where that is refused, ENOSYS on an unknown machine."""
    attr = _MapCreate(map_type=_BPF_MAP_TYPE_ARRAY, key_size=4, value_size=4, max_entries=1)
    os.close(_bpf(_BPF_MAP_CREATE, attr))


def _bpf(command: int, attr: ctypes.Structure) -> int:
    number = _SYS_BPF.get(platform.machine())
    if number is None:
        raise OSError(38, f"bpf(2) has no known number on {platform.machine()}")
    result = int(_libc.syscall(number, command, ctypes.byref(attr), ctypes.sizeof(attr)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def run_raw_tracepoint(prog_fd: int, cpu: int, *args: int) -> None:
    """Run the program once on ``cpu`` with the tracepoint arguments ``args``.

    Raises OSError: ENXIO for a CPU that is offline, EPERM without the right, ENOSYS on an unknown machine.
    """
    ctx = (ctypes.c_uint64 * len(args))(*args)
    attr = _TestRun(
        prog_fd=prog_fd,
        ctx_size_in=ctypes.sizeof(ctx),
        ctx_in=ctypes.addressof(ctx),
        flags=_BPF_F_TEST_RUN_ON_CPU,
        cpu=cpu,
    )
    _bpf(_BPF_PROG_TEST_RUN, attr)
