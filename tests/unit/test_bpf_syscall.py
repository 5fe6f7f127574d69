# SPDX-License-Identifier: Apache-2.0
"""What bpf(2) and perf_event_open(2) get has each value at its place in include/uapi/linux/{bpf,perf_event}.h."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cwndtrace import _libc
from cwndtrace.capture import bpf_syscall
from cwndtrace.kernel import facts

Answer = Callable[[bytes], int]


def refusal(number: int) -> Answer:
    def refuse(_: bytes) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


def u32(raw: bytes, *places: int) -> list[int]:
    return [struct.unpack_from("I", raw, place)[0] for place in places]


def u64(raw: bytes, place: int) -> int:
    return int(struct.unpack_from("Q", raw, place)[0])


class BpfCalls:
    """A kernel that answers each command with the next of its answers; ``asked`` are the commands with their bytes."""

    def __init__(self) -> None:
        self.answers: dict[int | str, list[Answer]] = {}
        self.asked: list[tuple[int | str, bytes]] = []
        self.arguments: list[Any] = []

    def __call__(self, name: str, *arguments: Any) -> int:
        if name == "bpf":
            command, attr, size = arguments
            raw = ctypes.string_at(ctypes.addressof(attr._obj), size)
            return self._answer(command, raw)
        assert name == "perf_event_open"
        attr, *self.arguments = arguments
        return self._answer(name, ctypes.string_at(ctypes.addressof(attr._obj), ctypes.sizeof(attr._obj)))

    def _answer(self, command: int | str, raw: bytes) -> int:
        self.asked.append((command, raw))
        return self.answers[command].pop(0)(raw)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> BpfCalls:
    made = BpfCalls()
    monkeypatch.setattr(_libc, "syscall", made)
    return made


def test_a_map_is_made_as_asked(calls: BpfCalls) -> None:
    calls.answers[0] = [lambda _: 7]
    assert bpf_syscall.create_map("a_name_of_twenty_chars", 5, 4, 8, 1000, 3) == 7
    ((_, raw),) = calls.asked
    assert u32(raw, 0, 4, 8, 12, 16, 20, 24) == [5, 4, 8, 1000, 3, 0, 0]
    assert raw[28:44] == b"a_name_of_twent\0"


def test_a_map_that_locked_memory_forbids_is_tried_again_without_the_limit(
    calls: BpfCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: raised.append(limit))
    calls.answers[0] = [refusal(errno.EPERM), lambda _: 8]
    assert bpf_syscall.create_map("m", 1, 4, 4, 1, 0) == 8
    assert raised == [(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))]
    calls.answers[0] = [refusal(errno.EINVAL)]
    with pytest.raises(OSError, match="Invalid argument"):
        bpf_syscall.create_map("m", 1, 4, 4, 1, 0)

    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    calls.answers[0] = [refusal(errno.EPERM)] * 2
    with pytest.raises(PermissionError):
        bpf_syscall.create_map("m", 1, 4, 4, 1, 0)


def test_the_smallest_map_is_freed(calls: BpfCalls) -> None:
    descriptor = os.open("/dev/null", os.O_RDONLY)
    calls.answers[0] = [lambda _: descriptor]
    bpf_syscall.try_map()
    assert u32(calls.asked[0][1], 0, 4, 8, 12, 16) == [2, 4, 4, 1, 0]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_program_is_loaded_with_its_instructions(calls: BpfCalls) -> None:
    def load(raw: bytes) -> int:
        kind, number = u32(raw, 0, 4)
        assert (kind, number) == (26, 2)
        assert ctypes.string_at(u64(raw, 8), 16) == bytes(range(16))
        assert ctypes.string_at(u64(raw, 16)) == b"GPL"
        assert (u32(raw, 24, 28, 40, 44, 64), u64(raw, 32)) == ([0, 0, 0, 0, 0], 0)
        assert raw[48:64] == b"on_tcp_probe_fo\0"
        assert u32(raw, 68, 108) == [24, 4711]
        return 9

    calls.answers[5] = [load]
    assert bpf_syscall.load_program("on_tcp_probe_follow", bpf_syscall.TRACING, bytes(range(16)), 24, 4711) == 9


LOG = b"0: R1=ctx()\nR2 !read_ok\n\nprocessed 1 insns\nverification time 5 usec\n"


@pytest.mark.parametrize(
    ("log", "words"),
    [(LOG, "Invalid argument (R2 !read_ok)"), (b"", "Invalid argument"), (b"processed 1\n", "Invalid argument")],
)
def test_a_refused_program_says_why(calls: BpfCalls, log: bytes, words: str) -> None:
    def refuse(raw: bytes) -> int:
        level, size = u32(raw, 24, 28)
        assert (level, size) == (1, 1 << 20)
        ctypes.memmove(u64(raw, 32), log, len(log))
        raise OSError(errno.EINVAL, "Invalid argument")

    calls.answers[5] = [refusal(errno.EINVAL), refuse]
    with pytest.raises(OSError, match="Invalid argument") as caught:
        bpf_syscall.load_program("p", 17, bytes(8))
    assert (caught.value.errno, caught.value.strerror) == (errno.EINVAL, words)


def test_a_program_that_may_not_be_loaded_is_not_tried_again(calls: BpfCalls) -> None:
    calls.answers[5] = [refusal(errno.EPERM)]
    with pytest.raises(PermissionError):
        bpf_syscall.load_program("p", 17, bytes(8))
    calls.answers[5] = [refusal(errno.EAGAIN), lambda _: 5]
    assert bpf_syscall.load_program("p", 17, bytes(8)) == 5


def test_a_kernel_has_compare_and_swap_if_it_loads_one(calls: BpfCalls) -> None:
    descriptor = os.open("/dev/null", os.O_RDONLY)
    calls.answers[5] = [lambda _: descriptor]
    assert bpf_syscall.has_compare_and_swap()
    # BPF_ATOMIC | BPF_DW | BPF_STX on the stack, with BPF_CMPXCHG, then an exit.
    assert u32(calls.asked[0][1], 0, 4) == [17, 6]
    code = bpf_syscall._COMPARE_AND_SWAP
    assert (code[24], struct.unpack_from("i", code, 28)[0], code[40]) == (0xDB, 0xF1, 0x95)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    calls.answers[5] = [refusal(errno.EINVAL)] * 2
    assert not bpf_syscall.has_compare_and_swap()


def test_a_program_is_attached_to_a_tracepoint_or_to_its_own_target(calls: BpfCalls) -> None:
    names = []

    def attached(raw: bytes) -> int:
        names.append(ctypes.string_at(u64(raw, 0)) if u64(raw, 0) else None)
        assert u32(raw, 8) == [11]
        return 12

    calls.answers[17] = [attached, attached]
    assert bpf_syscall.attach(11, "tcp_probe") == 12
    assert bpf_syscall.attach(11) == 12
    assert names == [b"tcp_probe", None]


@pytest.fixture
def event(calls: BpfCalls, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> int:
    """Return the descriptor of the perf event that the kernel makes."""
    (tmp_path / "type").write_text("8\n")
    monkeypatch.setattr(facts, "KPROBES", tmp_path / "type")
    descriptor = os.open("/dev/null", os.O_RDONLY)
    calls.answers["perf_event_open"] = [lambda _: descriptor]
    return descriptor


@pytest.mark.parametrize("back", [False, True])
def test_a_kprobe_is_linked_to_an_event(calls: BpfCalls, event: int, back: bool) -> None:
    def opened(raw: bytes) -> int:
        assert u32(raw, 0, 4) == [8, len(raw)]
        assert (u64(raw, 8), ctypes.string_at(u64(raw, 56)), u64(raw, 64)) == (int(back), b"tcp_enter_loss", 0)
        return event

    def linked(raw: bytes) -> int:
        assert u32(raw, 0, 4, 8, 12) == [11, event, 41, 0]
        return 13

    calls.answers |= {"perf_event_open": [opened], 28: [linked]}
    assert bpf_syscall.attach_kprobe(11, "tcp_enter_loss", back) == 13
    assert calls.arguments == [-1, 0, -1, 8]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(event)


def test_a_kprobe_of_an_older_kernel_is_the_event_itself(
    calls: BpfCalls, event: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to: list[tuple[int, ...]] = []
    monkeypatch.setattr(fcntl, "ioctl", lambda *call: set_to.append(call))
    calls.answers[28] = [refusal(errno.EINVAL)]
    assert bpf_syscall.attach_kprobe(11, "f", False) == event
    assert set_to == [(event, 0x40042408, 11)]
    os.close(event)


def test_a_link_that_is_refused_leaves_no_event(calls: BpfCalls, event: int) -> None:
    calls.answers[28] = [refusal(errno.EPERM)]
    with pytest.raises(PermissionError):
        bpf_syscall.attach_kprobe(11, "f", False)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(event)


@pytest.mark.usefixtures("event")
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EPERM, "Operation not permitted"), (errno.ENOSYS, "Function not implemented"),
        (errno.EACCES, "refused by kernel.perf_event_paranoid without CAP_SYS_ADMIN"),
        (errno.ENOENT, "not traceable (No such file or directory)"),
    ],
)  # fmt: skip
def test_a_kprobe_that_is_refused_says_why(calls: BpfCalls, number: int, words: str) -> None:
    calls.answers["perf_event_open"] = [refusal(number)]
    with pytest.raises(OSError, match=re.escape(words)) as caught:
        bpf_syscall.attach_kprobe(11, "f", False)
    assert (caught.value.errno, caught.value.strerror) == (number, words)


def test_a_program_runs_once_on_a_cpu(calls: BpfCalls) -> None:
    calls.answers[10] = [lambda _: 0]
    bpf_syscall.run_raw_tracepoint(11, 3)
    raw = calls.asked[0][1]
    assert u32(raw, 0, 64, 68) == [11, 1, 3]
    assert not any(raw[4:64])


def test_what_was_missed_is_read_from_the_kernels_structs(calls: BpfCalls) -> None:
    def told(raw: bytes) -> int:
        descriptor, length = u32(raw, 0, 4)
        assert descriptor == 13
        values = {48: 77} if length < 100 else {192: 5_000, 200: 60, 208: 7}
        for place, value in values.items():
            ctypes.memmove(u64(raw, 8) + place, struct.pack("Q", value), 8)
        return 0

    calls.answers[15] = [told, told, refusal(errno.EINVAL), refusal(errno.EBADF)]
    assert bpf_syscall.kprobe_missed(13) == 77
    assert bpf_syscall.program_stats(13) == (5_000, 60, 7)
    assert bpf_syscall.kprobe_missed(13) == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        bpf_syscall.program_stats(13)


class Hash:
    """A hash of the kernel's, which answers lookups, updates, deletions and the next key."""

    def __init__(self, calls: BpfCalls) -> None:
        self.values: dict[bytes, bytes] = {}
        methods = {1: self._lookup, 2: self._update, 3: self._delete, 4: self._next}
        calls.answers |= {command: [method] * 20 for command, method in methods.items()}

    def _key(self, raw: bytes) -> bytes:
        assert u32(raw, 0) == [21]
        assert u64(raw, 24) == 0
        return ctypes.string_at(u64(raw, 8), 4)

    def _lookup(self, raw: bytes) -> int:
        if (key := self._key(raw)) not in self.values:
            raise FileNotFoundError(errno.ENOENT, "none")
        ctypes.memmove(u64(raw, 16), self.values[key], 8)
        return 0

    def _update(self, raw: bytes) -> int:
        self.values[self._key(raw)] = ctypes.string_at(u64(raw, 16), 8)
        return 0

    def _delete(self, raw: bytes) -> int:
        if self.values.pop(self._key(raw), None) is None:
            raise FileNotFoundError(errno.ENOENT, "none")
        return 0

    def _next(self, raw: bytes) -> int:
        known = list(self.values)
        at = known.index(self._key(raw)) + 1 if u64(raw, 8) else 0
        if at == len(known):
            raise FileNotFoundError(errno.ENOENT, "none")
        ctypes.memmove(u64(raw, 16), known[at], 4)
        return 0


def test_a_map_keeps_what_is_stored_in_it(calls: BpfCalls) -> None:
    kernel = Hash(calls)
    for number in (1, 2, 3):
        bpf_syscall.update(21, struct.pack("I", number), struct.pack("Q", 10 * number))
    assert bpf_syscall.lookup(21, struct.pack("I", 2), 8) == struct.pack("Q", 20)
    assert bpf_syscall.lookup(21, struct.pack("I", 9), 8) is None
    assert list(bpf_syscall.keys(21, 4)) == [struct.pack("I", number) for number in (1, 2, 3)]
    bpf_syscall.delete(21, struct.pack("I", 2))
    bpf_syscall.delete(21, struct.pack("I", 2))
    assert list(kernel.values) == [struct.pack("I", 1), struct.pack("I", 3)]
    assert list(bpf_syscall.keys(21, 4)) == list(kernel.values)


@pytest.mark.parametrize(("text", "number"), [("0\n", 1), ("0-7\n", 8), ("0-3,8-11\n", 12), ("0,5\n", 6)])
def test_possible_cpus(text: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "possible").write_text(text)
    places = {"/sys/devices/system/cpu/possible": tmp_path / "possible"}
    monkeypatch.setattr(bpf_syscall, "Path", places.__getitem__)
    assert bpf_syscall.possible_cpus.__wrapped__() == number
