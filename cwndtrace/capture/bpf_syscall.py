# SPDX-License-Identifier: Apache-2.0
"""bpf(2): test whether it may be called, make and access maps, load, attach and run programs.

kprobes are made with perf_event_open(2). All functions raise OSError.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

from cwndtrace import _libc
from cwndtrace.kernel import facts

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT_KEY = range(5)
_PROG_LOAD, _PROG_TEST_RUN, _OBJ_GET_INFO_BY_FD, _RAW_TRACEPOINT_OPEN, _LINK_CREATE = 5, 10, 15, 17, 28
_PERF_FLAG_FD_CLOEXEC: Final = 8
_PERF_EVENT_IOC_SET_BPF: Final = 0x40042408
_PERF_EVENT: Final = 41
_TEST_RUN_ON_CPU: Final = 1
_LOG_BYTES: Final = 1 << 20
_COMPARE_AND_SWAP: Final = bytes.fromhex(
    "b700000000000000"  # r0 = 0
    "b701000001000000"  # r1 = 1
    "7b0af8ff00000000"  # *(u64 *)(r10 - 8) = r0
    "db1af8fff1000000"  # r0 = cmpxchg_64(r10 - 8, r0, r1)
    "b700000000000000"  # r0 = 0
    "9500000000000000"  # exit
)

KPROBE, RAW_TRACEPOINT, TRACING = 2, 17, 26
"""Program types (enum bpf_prog_type)."""
TRACE_RAW_TP, TRACE_FENTRY, TRACE_FEXIT = 23, 24, 25
"""Attach types of TRACING programs (enum bpf_attach_type)."""
_ARRAY: Final = 2
"""A map type (enum bpf_map_type)."""


def _attr(*fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type("Attr", (ctypes.Structure,), {"_fields_": list(fields)})


_U32, _U64, _NAME = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_char * 16
_MapCreate: Final = _attr(
    ("map_type", _U32), ("key_size", _U32), ("value_size", _U32), ("max_entries", _U32), ("map_flags", _U32),
    ("inner_map_fd", _U32), ("numa_node", _U32), ("map_name", _NAME),
)  # fmt: skip
_MapElement: Final = _attr(("map_fd", _U32), ("padding", _U32), ("key", _U64), ("value", _U64), ("flags", _U64))
_ProgLoad: Final = _attr(
    ("prog_type", _U32), ("insn_cnt", _U32), ("insns", _U64), ("license", _U64), ("log_level", _U32),
    ("log_size", _U32), ("log_buf", _U64), ("kern_version", _U32), ("prog_flags", _U32), ("prog_name", _NAME),
    ("prog_ifindex", _U32),
    ("expected_attach_type", _U32), ("prog_btf_fd", _U32), ("func_info_rec_size", _U32), ("func_info", _U64),
    ("func_info_cnt", _U32), ("line_info_rec_size", _U32), ("line_info", _U64), ("line_info_cnt", _U32),
    ("attach_btf_id", _U32),
)  # fmt: skip
_LinkCreate: Final = _attr(("prog_fd", _U32), ("target_fd", _U32), ("attach_type", _U32), ("flags", _U32))
_Info: Final = _attr(("fd", _U32), ("length", _U32), ("info", _U64))
# struct bpf_link_info where perf_event.type is a kprobe's. Members that an older kernel doesn't fill in stay 0.
_KprobeInfo: Final = _attr(
    ("type", _U32), ("id", _U32), ("prog_id", _U32), ("padding", _U32), ("perf_type", _U32), ("more_padding", _U32),
    ("function", _U64), ("name_length", _U32), ("offset", _U32), ("address", _U64), ("missed", _U64), ("cookie", _U64),
)  # fmt: skip
# struct bpf_prog_info up to the counters of a program's runs.
_ProgInfo: Final = _attr(("before", ctypes.c_char * 192), ("run_time_ns", _U64), ("run_cnt", _U64), ("missed", _U64))
# struct perf_event_attr up to config2. For the kprobe PMU, config is 1 for a kretprobe, and config1 is the address of
# the function's name.
_PerfEvent: Final = _attr(
    ("type", _U32), ("size", _U32), ("config", _U64), ("sample_period", _U64), ("sample_type", _U64),
    ("read_format", _U64), ("bits", _U64), ("wakeup_events", _U32), ("breakpoint", _U32), ("config1", _U64),
    ("config2", _U64),
)  # fmt: skip
_RawTracepoint: Final = _attr(("name", _U64), ("prog_fd", _U32), ("padding", _U32))
_TestRun: Final = _attr(
    ("prog_fd", _U32), ("retval", _U32), ("data_size_in", _U32), ("data_size_out", _U32), ("data_in", _U64),
    ("data_out", _U64), ("repeat", _U32), ("duration", _U32), ("ctx_size_in", _U32), ("ctx_size_out", _U32),
    ("ctx_in", _U64), ("ctx_out", _U64), ("flags", _U32), ("cpu", _U32), ("batch_size", _U32), ("padding", _U32),
)  # fmt: skip


def _bpf(command: int, attr: ctypes.Structure) -> int:
    return _libc.syscall("bpf", command, ctypes.byref(attr), ctypes.sizeof(attr))


def run_raw_tracepoint(prog_fd: int, cpu: int) -> None:
    """Run the program once on ``cpu``.

    Raises ENXIO for a CPU that is offline, EPERM without the privileges, and ENOSYS on an unknown machine.
    """
    _bpf(_PROG_TEST_RUN, _TestRun(prog_fd=prog_fd, flags=_TEST_RUN_ON_CPU, cpu=cpu))


def run_with_argument(prog_fd: int, argument: bytes) -> None:
    """Run a raw tracepoint program once on this CPU, with eight bytes as its argument. Raises as the one above."""
    place = ctypes.create_string_buffer(argument, len(argument))
    _bpf(_PROG_TEST_RUN, _TestRun(prog_fd=prog_fd, ctx_size_in=len(argument), ctx_in=ctypes.addressof(place)))


def create_map(name: str, kind: int, key_size: int, value_size: int, max_entries: int, flags: int) -> int:
    """Return a descriptor of a new map; sizes are in bytes."""
    attr = _MapCreate(kind, key_size, value_size, max_entries, flags, map_name=name.encode()[:15])
    try:
        return _bpf(_MAP_CREATE, attr)
    except PermissionError:
        # Before Linux 5.11, a map counts as locked memory, of which the default limit allows very little.
        with suppress(ValueError, OSError):  # where the limit may not be raised, the second try raises the error
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return _bpf(_MAP_CREATE, attr)


def try_map() -> None:
    """Make the smallest possible map and free it. Raises ENOSYS on an unknown machine."""
    os.close(create_map("try", _ARRAY, 4, 4, 1, 0))


def load_program(name: str, kind: int, insns: bytes, attach_type: int = 0, attach_btf_id: int = 0) -> int:
    """Load a program, declared as GPL like all programs here, and return its descriptor.

    Where the verifier refuses the program, the error's text holds the last line of the verifier's log.
    """
    code, licence = ctypes.create_string_buffer(insns, len(insns)), ctypes.create_string_buffer(b"GPL")
    attr = _ProgLoad(
        prog_type=kind,
        insn_cnt=len(insns) // 8,
        insns=ctypes.addressof(code),
        license=ctypes.addressof(licence),
        prog_name=name.encode()[:15],
        expected_attach_type=attach_type,
        attach_btf_id=attach_btf_id,
    )
    try:
        return _bpf(_PROG_LOAD, attr)
    except OSError as first:
        if first.errno == errno.EPERM:
            raise
        # The log slows the verifier down, so only a second try asks for it.
        log = ctypes.create_string_buffer(_LOG_BYTES)
        attr.log_level, attr.log_size, attr.log_buf = 1, _LOG_BYTES, ctypes.addressof(log)
        try:
            return _bpf(_PROG_LOAD, attr)
        except OSError as e:
            lines = [line for line in log.value.decode("utf-8", "replace").splitlines() if line.strip()]
            lines = [line for line in lines if not line.startswith(("processed ", "verification time"))]
            raise OSError(e.errno, f"{e.strerror} ({lines[-1].strip()})" if lines else e.strerror) from e


def has_compare_and_swap() -> bool:
    """Return whether this kernel takes programs with an atomic compare-and-swap of 64 bits, by loading one.

    The verifier has it since Linux 5.12, and the just-in-time compiler for arm64 since 5.18.
    """
    try:
        os.close(load_program("try", RAW_TRACEPOINT, _COMPARE_AND_SWAP))
    except OSError:
        return False
    return True


def attach(prog_fd: int, tracepoint: str | None = None) -> int:
    """Attach to a raw tracepoint, or with None attach a TRACING program to its target; return a descriptor.

    Closing the descriptor detaches the program.
    """
    name = ctypes.create_string_buffer((tracepoint or "").encode())
    return _bpf(_RAW_TRACEPOINT_OPEN, _RawTracepoint(ctypes.addressof(name) if tracepoint else 0, prog_fd))


def attach_kprobe(prog_fd: int, function: str, back: bool) -> int:
    """Attach to the entry of a kernel function, or with ``back`` to its return; return a descriptor.

    Closing the descriptor detaches the program.
    """
    name = ctypes.create_string_buffer(function.encode())
    pmu = int(facts.KPROBES.read_text(encoding="ascii"))
    attr = _PerfEvent(pmu, ctypes.sizeof(_PerfEvent), int(back), config1=ctypes.addressof(name))
    # perf_event_open(2) needs a CPU here, but the program runs on all CPUs.
    try:
        event = _libc.syscall("perf_event_open", ctypes.byref(attr), -1, 0, -1, _PERF_FLAG_FD_CLOEXEC)
    except OSError as e:
        if e.errno in (errno.EPERM, errno.ENOSYS):
            raise
        if e.errno == errno.EACCES:
            raise OSError(e.errno, "refused by kernel.perf_event_paranoid without CAP_SYS_ADMIN") from e
        raise OSError(e.errno, f"not traceable ({e.strerror})") from e
    try:
        link = _bpf(_LINK_CREATE, _LinkCreate(prog_fd, event, _PERF_EVENT))
    except OSError as e:
        if e.errno == errno.EINVAL:  # before Linux 5.15 perf events have no links
            fcntl.ioctl(event, _PERF_EVENT_IOC_SET_BPF, prog_fd)
            return int(event)
        os.close(event)
        raise
    os.close(event)
    return link


def kprobe_missed(link_fd: int) -> int:
    """Return how many calls or returns a kprobe missed, as when an interrupt came while another kprobe was running.

    Kernels before 6.7 don't report it; the result is 0 there.
    """
    info = _KprobeInfo()
    with suppress(OSError):
        _bpf(_OBJ_GET_INFO_BY_FD, _Info(link_fd, ctypes.sizeof(info), ctypes.addressof(info)))
    return int(info.missed)


def program_stats(prog_fd: int) -> tuple[int, int, int]:
    """Return a program's run time in nanoseconds, its runs, and the runs that the kernel skipped.

    The kernel counts time and runs while kernel.bpf_stats_enabled is 1. It skips a run when the program is already
    running on that CPU; kernels before 5.12 don't report skipped runs, and the number is 0 there.
    """
    info = _ProgInfo()
    _bpf(_OBJ_GET_INFO_BY_FD, _Info(prog_fd, ctypes.sizeof(info), ctypes.addressof(info)))
    return info.run_time_ns, info.run_cnt, info.missed


@cache
def possible_cpus() -> int:
    """Return how many values a per-CPU map has for each key."""
    last = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii").strip()
    return int(last.replace(",", "-").rpartition("-")[2]) + 1


def lookup(map_fd: int, key: bytes, size: int) -> bytes | None:
    """Return the ``size`` bytes under ``key``; None where the map doesn't have it."""
    place, value = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(size)
    try:
        _bpf(_MAP_LOOKUP, _MapElement(map_fd, 0, ctypes.addressof(place), ctypes.addressof(value)))
    except FileNotFoundError:
        return None
    return value.raw


def update(map_fd: int, key: bytes, value: bytes) -> None:
    """Store ``value`` under ``key``."""
    place, what = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(value, len(value))
    _bpf(_MAP_UPDATE, _MapElement(map_fd, 0, ctypes.addressof(place), ctypes.addressof(what)))


def delete(map_fd: int, key: bytes) -> None:
    """Remove ``key`` if the map has it."""
    place = ctypes.create_string_buffer(key, len(key))
    try:
        _bpf(_MAP_DELETE, _MapElement(map_fd, 0, ctypes.addressof(place)))
    except FileNotFoundError:
        return


def keys(map_fd: int, size: int) -> Iterator[bytes]:
    """Yield each key of a hash, ``size`` bytes long. A key that is removed meanwhile may restart the iteration."""
    following = ctypes.create_string_buffer(size)
    before: Any = None
    while True:
        at = ctypes.addressof(before) if before is not None else 0
        try:
            _bpf(_MAP_NEXT_KEY, _MapElement(map_fd, 0, at, ctypes.addressof(following)))
        except FileNotFoundError:
            return
        yield following.raw
        before = ctypes.create_string_buffer(following.raw, size)
