# SPDX-License-Identifier: Apache-2.0
"""A program is loaded with its maps, attached once and detached whole; its maps are read as C laid them out."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from cwndtrace.capture import bpf_syscall, program
from cwndtrace.capture.program_cache import Image, Map
from cwndtrace.errors import KernelLacks
from cwndtrace.kernel.ladder import Attachment

MAP_VALUE = 0x18  # BPF_LD | BPF_IMM | BPF_DW, whose source register says that the number is a map
COUNTERS = (("lost", "<u8"), ("seen", "<u8"))
RING = Map("events", 27, 0, 0, 4096, 0)
HASH = Map("wanted", 1, 8, 1, 3, 0)
PER_CPU = Map("counters", 6, 4, 16, 1, 0, COUNTERS)
ROWS = Map("followed", 1, 8, 12, 10, 0, (("at", "<u8"), ("n", "<u4")))


def instruction(code: int, source: int, number: int) -> bytes:
    return bytes([code, source << 4 | 1, 0, 0]) + number.to_bytes(4, "little")


def uses(index: int) -> bytes:
    """Return the instructions that load a map, which take two places."""
    return instruction(MAP_VALUE, 1, index) + bytes(8)


NUMBER = instruction(MAP_VALUE, 0, 1) + bytes(8)
"""It loads the plain number 1."""
PROGRAMS = {"raw": uses(1) + NUMBER + uses(3), "typed": uses(0), "shared": NUMBER, "probe": NUMBER}
IMAGE = Image(PROGRAMS, (RING, HASH, PER_CPU, ROWS))


class MadeKernel:
    """It stands for bpf(2). Descriptors are those of /dev/null, so that it is seen which of them are open."""

    TRACING, RAW_TRACEPOINT, KPROBE = bpf_syscall.TRACING, bpf_syscall.RAW_TRACEPOINT, bpf_syscall.KPROBE
    TRACE_RAW_TP, TRACE_FENTRY = bpf_syscall.TRACE_RAW_TP, bpf_syscall.TRACE_FENTRY
    TRACE_FEXIT = bpf_syscall.TRACE_FEXIT

    def __init__(self) -> None:
        self.open: dict[int, Any] = {}
        self.refuses: dict[str, int] = {}
        self.values: dict[int, dict[bytes, bytes]] = {}
        self.runs: list[tuple[int, int]] = []
        self.offline = {1}
        self.cpus = 2

    def _made(self, what: Any, name: str) -> int:
        if name in self.refuses:
            raise OSError(self.refuses[name], os.strerror(self.refuses[name]))
        descriptor = os.open("/dev/null", os.O_RDONLY)
        self.open[descriptor] = what
        return descriptor

    def create_map(self, name: str, *rest: int) -> int:
        return self._made((name, *rest), name)

    def load_program(self, name: str, kind: int, insns: bytes, attach_type: int = 0, attach_btf_id: int = 0) -> int:
        return self._made((name, kind, insns, attach_type, attach_btf_id), name)

    def attach(self, fd: int, tracepoint: str | None = None) -> int:
        return self._made(("link", self.open[fd][0], tracepoint), f"link {tracepoint or self.open[fd][0]}")

    def attach_kprobe(self, fd: int, function: str, back: bool) -> int:
        return self._made(("link", self.open[fd][0], function, back), f"link {function}")

    def run_raw_tracepoint(self, fd: int, cpu: int) -> None:
        if cpu in self.offline:
            raise OSError(errno.ENXIO, "offline")
        self.runs.append((fd, cpu))

    def possible_cpus(self) -> int:
        return self.cpus

    def lookup(self, fd: int, key: bytes, size: int) -> bytes | None:
        value = self.values[fd].get(key)
        assert value is None or len(value) == size
        return value

    def keys(self, fd: int, size: int) -> Iterator[bytes]:
        assert all(len(key) == size for key in self.values[fd])
        yield from [*self.values[fd], bytes([9] * size)]  # the last one is removed meanwhile

    def update(self, fd: int, key: bytes, value: bytes) -> None:
        self.values.setdefault(fd, {})[key] = value

    def delete(self, fd: int, key: bytes) -> None:
        del self.values[fd][key]

    def program_stats(self, fd: int) -> tuple[int, int, int]:
        return (100, 5, len(self.open[fd][0]))

    def kprobe_missed(self, fd: int) -> int:
        assert fd in self.open
        return 3

    def there(self) -> list[Any]:
        """Return what is open still."""
        found = []
        for descriptor, what in self.open.items():
            try:
                os.fstat(descriptor)
            except OSError:
                continue
            found.append(what)
        return found

    def tracepoint_id(self, name: str) -> int | None:
        return {"tcp_probe": 71}.get(name)

    def function_id(self, name: str) -> int | None:
        return {"tcp_enter_loss": 72}.get(name)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[MadeKernel]:
    kernel = MadeKernel()
    monkeypatch.setattr(program, "bpf", kernel)
    yield kernel
    for descriptor in kernel.open:
        with suppress(OSError):
            os.close(descriptor)


def fd_of(made: MadeKernel, name: str) -> int:
    return next(descriptor for descriptor, what in made.open.items() if what[0] == name)


RAW = Attachment("raw_tracepoint", "tcp_destroy_sock", "raw")
TYPED = Attachment("tp_btf", "tcp_probe", "typed")
ENTRY = Attachment("fentry", "tcp_enter_loss", "shared")
EXIT = Attachment("fexit", "tcp_enter_loss", "shared")
KPROBE, BACK = Attachment("kprobe", "f", "probe"), Attachment("kretprobe", "g", "probe")


def test_each_kind_of_program_is_loaded_for_its_place(made: MadeKernel) -> None:
    loaded = program.Program(IMAGE)
    loaded.attach((RAW, TYPED, ENTRY, KPROBE, BACK), made)  # type: ignore[arg-type]
    programs = {what[0]: (what[1], *what[3:]) for what in made.there() if len(what) == 5}
    assert programs == {
        "raw": (17, 0, 0), "typed": (26, 23, 71), "shared_tcp_enter_loss": (26, 24, 72), "probe": (2, 0, 0),
    }  # fmt: skip
    assert [what[1:] for what in made.there() if what[0] == "link"] == [
        ("raw", "tcp_destroy_sock"), ("typed", None), ("shared_tcp_enter_loss", None),
        ("probe", "f", False), ("probe", "g", True),
    ]  # fmt: skip


def test_the_numbers_of_maps_become_their_descriptors(made: MadeKernel) -> None:
    loaded = program.Program(IMAGE)
    fd = loaded.load("raw")
    assert loaded.load("raw") == fd
    code = made.open[fd][2]
    assert code == uses(fd_of(made, "wanted")) + NUMBER + uses(fd_of(made, "followed"))


def test_a_program_is_attached_once(made: MadeKernel) -> None:
    loaded = program.Program(IMAGE)
    loaded.attach((RAW, TYPED), made)  # type: ignore[arg-type]
    loaded.attach((TYPED, EXIT, RAW), made)  # type: ignore[arg-type]
    links = [what[1] for what in made.there() if what[0] == "link"]
    assert links == ["raw", "typed", "shared_tcp_enter_loss"]
    loaded.detach()
    assert [what for what in made.there() if what[0] == "link"] == []
    loaded.attach((RAW,), made)  # type: ignore[arg-type]
    assert len([what for what in made.there() if what[0] == "link"]) == 1


@pytest.mark.parametrize(
    ("number", "euid", "why"),
    [
        (errno.EINVAL, 0, "tp_btf tcp_probe: Invalid argument"),
        (errno.EPERM, 1000, "tp_btf tcp_probe: Operation not permitted"),
        (errno.EPERM, 0, "tp_btf tcp_probe: refused by this system's policy (Operation not permitted)"),
    ],
)
def test_if_one_is_refused_those_of_before_stay_and_the_others_go(
    made: MadeKernel, monkeypatch: pytest.MonkeyPatch, number: int, euid: int, why: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    loaded = program.Program(IMAGE)
    loaded.attach((EXIT, BACK), made)  # type: ignore[arg-type]
    made.refuses["link typed"] = number
    with pytest.raises(KernelLacks) as caught:
        loaded.attach((RAW, KPROBE, TYPED), made)  # type: ignore[arg-type]
    assert str(caught.value.cause if hasattr(caught.value, "cause") else caught.value) == why
    assert [what[1] for what in made.there() if what[0] == "link"] == ["shared_tcp_enter_loss", "probe"]
    del made.refuses["link typed"]
    loaded.attach((RAW, TYPED), made)  # type: ignore[arg-type]
    assert sorted(what[1] for what in made.there() if what[0] == "link") == [
        "probe", "raw", "shared_tcp_enter_loss", "typed",
    ]  # fmt: skip


def test_a_map_that_is_refused_leaves_none(made: MadeKernel) -> None:
    made.refuses["followed"] = errno.ENOMEM
    with pytest.raises(KernelLacks, match="the BPF map followed can't be created: Cannot allocate memory"):
        program.Program(IMAGE)
    assert len(made.open) == 3
    assert made.there() == []


def test_everything_is_closed_in_the_end(made: MadeKernel) -> None:
    loaded = program.Program(IMAGE)
    loaded.attach((RAW, KPROBE), made)  # type: ignore[arg-type]
    loaded.close()
    loaded.close()
    assert made.there() == []


@pytest.mark.usefixtures("made")
def test_a_ring_that_cannot_be_mapped_is_named() -> None:
    loaded = program.Program(IMAGE)
    with pytest.raises(KernelLacks, match="the ring buffer events can't be read: "):
        loaded.open_ring("events", lambda _: None)
    assert loaded.ring_fds == []


def test_entries_of_each_ring_go_to_its_function(made: MadeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    class MadeRing:
        def __init__(self, fd: int, size: int) -> None:
            assert size == 4096
            self.entries = [[b"a", b"b"], []] if fd == fd_of(made, "events") else [[b"c"]]

        def read(self, most: int) -> tuple[list[bytes], bool]:
            assert most == 1000
            return self.entries.pop(0), bool(self.entries)

        def close(self) -> None:
            self.entries = []

    monkeypatch.setattr(program, "Ring", MadeRing)
    loaded, received = program.Program(IMAGE), list[bytes]()
    loaded.open_ring("events", received.append)
    assert loaded.ring_fds == [fd_of(made, "events")]
    assert loaded.consume(1000) is True
    assert loaded.consume(1000) is False
    assert received == [b"a", b"b"]
    loaded.close()


def test_a_program_runs_on_each_cpu_that_is_online(made: MadeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda _: 4)
    loaded = program.Program(IMAGE)
    loaded.run_everywhere("raw")
    assert made.runs == [(fd_of(made, "raw"), cpu) for cpu in (0, 2, 3)]

    def refuse(*_: int) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(made, "run_raw_tracepoint", refuse)
    with pytest.raises(PermissionError):
        loaded.run_everywhere("raw")


def test_counters_are_summed_over_cpus(made: MadeKernel) -> None:
    loaded = program.Program(IMAGE)
    raw = np.array([1, 10, 2, 20], np.uint64).tobytes()
    made.values[fd_of(made, "counters")] = {bytes(4): raw}
    assert loaded.each_cpu("counters") == [raw[:16], raw[16:]]
    assert loaded.totals() == {"lost": 3, "seen": 30}


def test_a_value_for_each_cpu_is_padded_to_eight_bytes(made: MadeKernel) -> None:
    loaded = program.Program(Image({}, (Map("odd", 6, 4, 13, 1, 0),)))
    made.values[fd_of(made, "odd")] = {bytes(4): b"a" * 13 + b"\0\0\0" + b"b" * 13 + b"\0\0\0"}
    assert loaded.each_cpu("odd") == [b"a" * 13, b"b" * 13]
    made.values[fd_of(made, "odd")] = {}
    assert loaded.each_cpu("odd") == []


def test_rows_have_the_members_of_the_struct(made: MadeKernel) -> None:
    loaded = program.Program(IMAGE)
    value = (7).to_bytes(8, "little") + (8).to_bytes(4, "little")
    made.values[fd_of(made, "followed")] = {(258).to_bytes(8, "little"): value}
    ((key, row),) = loaded.rows("followed")
    assert (key, int(row["at"]), int(row["n"])) == (258, 7, 8)
    assert loaded.values("followed") == [value]
    assert (loaded.offset("followed", "at"), loaded.offset("followed", "n")) == (0, 8)
    assert loaded.dtype("followed").itemsize == 12


def test_a_hash_holds_the_keys_that_are_wanted_as_far_as_there_is_room(made: MadeKernel) -> None:
    loaded = program.Program(IMAGE)

    def synced(*keys: int) -> tuple[int, list[int]]:
        left = loaded.sync_keys("wanted", set(keys))
        held = made.values.get(fd_of(made, "wanted"), {})
        assert set(held.values()) <= {b"\1"}
        return left, sorted(int.from_bytes(key, "little") for key in held)

    assert synced() == (0, [])
    assert synced(5, 300) == (0, [5, 300])
    assert synced(9, 5, 300, 2, 4) == (2, [2, 5, 300])
    assert synced(300, 1) == (0, [1, 300])
    assert synced() == (0, [])


def test_runs_and_what_was_missed_are_told_by_program(made: MadeKernel) -> None:
    loaded = program.Program(IMAGE)
    loaded.attach((RAW, KPROBE, BACK), made)  # type: ignore[arg-type]
    assert loaded.run_times() == {"raw": (5, 100), "probe": (5, 100)}
    assert loaded.missed() == {"raw": 3, "probe": 5, "kprobe": 6}
    # What was missed before the kprobes were detached still counts.
    loaded.detach()
    assert loaded.missed()["kprobe"] == 6
