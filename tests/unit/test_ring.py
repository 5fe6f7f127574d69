# SPDX-License-Identifier: Apache-2.0
"""A ring buffer is read as Documentation/bpf/ringbuf.rst has it, in anonymous memory that the test writes as a kernel.

The layout: a page with the consumer's position, a page with the producer's, then the data. An entry is a header of
eight bytes, of which the first four are the length with two bits, then the content; each begins at a multiple of eight.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwndtrace.capture import ring as ring_module
from cwndtrace.capture.block_program import RING_PAGES, spare_pages
from cwndtrace.capture.ring import Ring

PAGE = mmap.PAGESIZE
SIZE = PAGE
BUSY, DISCARDED = 1 << 31, 1 << 30
ALL = 1 << 40
"""More bytes than any ring has."""


class Producer:
    """The kernel's side of a ring buffer of ``size`` bytes."""

    def __init__(self, size: int = SIZE) -> None:
        self.fd = os.memfd_create("ring", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, 2 * PAGE + size)
        self.memory = mmap.mmap(self.fd, 2 * PAGE + size)
        self.position = 0
        self._size = size

    def start(self, position: int) -> None:
        """Let both sides be at this position, as after so many bytes."""
        self.position = position
        struct.pack_into("=Q", self.memory, 0, position)
        struct.pack_into("=Q", self.memory, PAGE, position)

    @property
    def consumed(self) -> int:
        (position,) = struct.unpack_from("=Q", self.memory, 0)
        return int(position)

    def free(self) -> int:
        return self._size - (self.position - self.consumed)

    def put(self, content: bytes, *, flags: int = 0) -> int:
        """Write an entry, and return its place for ``commit``."""
        place = self.position
        # The padding isn't zero, so that a reader of too much is seen.
        self._write(place, struct.pack("=II", len(content) | flags, 0) + content + b"\xee" * (-len(content) % 8))
        self.position += (8 + len(content) + 7) & ~7
        assert self.free() >= 0
        struct.pack_into("=Q", self.memory, PAGE, self.position)
        return place

    def commit(self, place: int, length: int, flags: int = 0) -> None:
        """End the writing of a busy entry."""
        self._write(place, struct.pack("=I", length | flags))

    def _write(self, place: int, data: bytes) -> None:
        at = place % self._size
        before_end = data[: self._size - at]
        self.memory[2 * PAGE + at : 2 * PAGE + at + len(before_end)] = before_end
        self.memory[2 * PAGE : 2 * PAGE + len(data) - len(before_end)] = data[len(before_end) :]

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)


@pytest.fixture
def producer() -> Iterator[Producer]:
    made = Producer()
    yield made
    made.close()


@pytest.fixture
def ring(producer: Producer) -> Iterator[Ring]:
    opened = Ring(producer.fd, SIZE)
    yield opened
    opened.close()


def test_entries_come_in_order_and_their_room_is_freed(producer: Producer, ring: Ring) -> None:
    assert ring.read(ALL)[0] == []
    contents = [b"a", b"12345678", b"", b"x" * 9, bytes(range(100))]
    for content in contents:
        producer.put(content)
    assert ring.read(ALL)[0] == contents
    assert producer.consumed == producer.position == 8 + 8 + 16 + 8 + 24 + 112
    assert ring.read(ALL)[0] == []


def test_a_busy_entry_holds_up_those_after_it(producer: Producer, ring: Ring) -> None:
    producer.put(b"first")
    busy = producer.put(b"second", flags=BUSY)
    producer.put(b"third")
    assert ring.read(ALL)[0] == [b"first"]
    assert producer.consumed == busy
    assert ring.read(ALL)[0] == []
    producer.commit(busy, len(b"second"))
    assert ring.read(ALL)[0] == [b"second", b"third"]
    assert producer.free() == SIZE


def test_a_discarded_entry_is_skipped_and_frees_its_room(producer: Producer, ring: Ring) -> None:
    producer.put(b"dropped", flags=DISCARDED)
    assert ring.read(ALL)[0] == []
    assert producer.free() == SIZE
    producer.put(b"dropped too", flags=DISCARDED)
    producer.put(b"kept")
    producer.put(b"x" * 17, flags=DISCARDED)
    assert ring.read(ALL)[0] == [b"kept"]
    assert producer.free() == SIZE


def test_an_entry_that_is_busy_and_discarded_is_busy(producer: Producer, ring: Ring) -> None:
    place = producer.put(b"1234", flags=BUSY | DISCARDED)
    producer.put(b"next")
    assert ring.read(ALL)[0] == []
    producer.commit(place, 4, DISCARDED)
    assert ring.read(ALL)[0] == [b"next"]


@pytest.mark.parametrize("before_end", range(0, 64, 8))
def test_an_entry_may_go_on_at_the_beginning(producer: Producer, ring: Ring, before_end: int) -> None:
    """The kernel writes it in one run, because it maps the data twice in a row; the ring here maps it once."""
    producer.start(7 * SIZE - before_end)
    content = bytes(range(1, 49))
    producer.put(content)
    producer.put(b"after it")
    assert ring.read(ALL)[0] == [content, b"after it"]


def test_a_full_ring_is_read_whole(producer: Producer, ring: Ring) -> None:
    for start in (0, 8, SIZE - 8):
        producer.start(start)
        producer.put(b"y" * (SIZE - 8))
        assert producer.free() == 0
        assert ring.read(ALL)[0] == [b"y" * (SIZE - 8)]


def test_what_is_committed_while_it_reads_is_read_too(
    producer: Producer, ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No wakeup is sent for an entry that is committed while an earlier one is unread."""
    producer.put(b"0")
    busy = producer.put(b"1", flags=BUSY)
    copied = ring._bytes

    def copy(at: int, size: int) -> bytes:
        if producer.position < 64:
            producer.commit(busy, 1)
            for number in range(2, 8):
                producer.put(b"%d" % number)
        return copied(at, size)

    monkeypatch.setattr(ring, "_bytes", copy)
    assert ring.read(ALL)[0] == [b"%d" % number for number in range(8)]


ENTRY = st.tuples(st.binary(max_size=300), st.sampled_from(["", "discarded", "late"]))


@given(st.integers(0, 1 << 40), st.lists(st.lists(ENTRY)))
def test_any_entries_come_out_as_they_went_in(start: int, rounds: list[list[tuple[bytes, str]]]) -> None:
    """Entries of any length, some discarded, some committed only after a read, from anywhere in the ring on."""
    producer = Producer()
    producer.start(8 * start)
    ring = Ring(producer.fd, SIZE)
    wanted: list[bytes] = []
    got: list[bytes] = []
    try:
        for entries in rounds:
            late: list[tuple[int, int]] = []
            for content, how in entries:
                if producer.free() < 320:
                    break
                place = producer.put(content, flags={"discarded": DISCARDED, "late": BUSY, "": 0}[how])
                wanted += [content] if how != "discarded" else []
                late += [(place, len(content))] if how == "late" else []
            got += ring.read(ALL)[0]
            assert got == wanted[: len(got)]
            for place, length in late:
                producer.commit(place, length)
            got += ring.read(ALL)[0]
            assert got == wanted
            assert producer.free() == SIZE
    finally:
        ring.close()
        producer.close()


def test_a_map_that_cannot_be_mapped_raises_an_error_and_leaves_nothing(
    producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:ring")

    before = mapped()
    read_only = os.open(f"/proc/self/fd/{producer.fd}", os.O_RDONLY)
    try:
        # The consumer's page has to be written.
        with pytest.raises(PermissionError):
            Ring(read_only, SIZE)
    finally:
        os.close(read_only)
    assert mapped() == before
    real = ring_module._mmap

    def no_data(fd: int, size: int, protection: int, offset: int, *rest: int) -> int:
        if offset == 2 * PAGE:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return real(fd, size, protection, offset, *rest)

    monkeypatch.setattr(ring_module, "_mmap", no_data)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        Ring(producer.fd, SIZE)
    assert mapped() == before


def test_closing_twice_is_closing_once(producer: Producer) -> None:
    ring = Ring(producer.fd, SIZE)
    ring.close()
    ring.close()


# ---- windows ---------------------------------------------------------------------------------------


@contextmanager
def made(size: int) -> Iterator[tuple[Ring, Producer]]:
    """Yield the reader and the writer of a ring of ``size`` bytes."""
    producer = Producer(size)
    reader = Ring(producer.fd, size)
    try:
        yield reader, producer
    finally:
        reader.close()
        producer.close()


@pytest.mark.parametrize("windows", [1, 4])
def test_entries_cross_the_windows_that_are_mapped_in_turn(monkeypatch: pytest.MonkeyPatch, windows: int) -> None:
    """They cross the end of the ring, too."""
    size = 4 * PAGE
    monkeypatch.setattr(ring_module, "_WINDOW", size // windows)
    lengths = random.Random(1)
    with made(size) as (reader, producer):
        for _ in range(300):
            sent = []
            while producer.free() > size // 2:
                sent.append(lengths.randbytes(lengths.choice((1, 8, 88, 1000, PAGE, PAGE + 9))))
                producer.put(sent[-1])
            assert reader.read(ALL) == (sent, False)
            assert producer.consumed == producer.position
    assert producer.position > 100 * size


def test_a_full_ring_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_module, "_WINDOW", PAGE)
    entry = bytes(PAGE // 4 - 8)
    with made(16 * PAGE) as (reader, producer):
        for _ in range(64):
            producer.put(entry)
        for _ in range(4):
            entries, more = reader.read(4 * PAGE)
            assert (len(entries), more) == (16, True)
        assert reader.read(4 * PAGE) == ([], False)


@pytest.mark.slow
def test_a_large_ring_is_mapped_only_where_it_is_read() -> None:
    """What is mapped counts as this process's memory."""
    with made(4 << 20) as (reader, producer):
        seen = set()
        for _ in range(1000):
            producer.put(bytes(22_000))
            assert len(reader.read(ALL)[0]) == 1
            maps = Path("/proc/self/maps").read_text().splitlines()
            mapped = [line.split()[0].split("-") for line in maps if "memfd:ring" in line]
            seen.add(sum(int(end, 16) - int(begin, 16) for begin, end in mapped))
        writers = (4 << 20) + 2 * PAGE
        assert seen == {writers + (512 << 10) + 2 * PAGE}


@pytest.mark.parametrize(
    ("memory", "size"), [(0, 0), (512, 0), (880, 0), (1024, 2), (2048, 8), (4096, 32), (8192, 64), (1 << 20, 64)]
)
def test_the_rings_of_block_requests_take_a_hundredth_of_memory_or_8_mib(memory: int, size: int) -> None:
    """Both are in MiB."""
    pages = spare_pages(memory << 20)
    assert pages * 4096 == size << 20
    assert not pages or (pages + RING_PAGES) * 4096 <= (memory << 20) // 100
