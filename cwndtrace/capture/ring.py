# SPDX-License-Identifier: Apache-2.0
"""Reads a BPF ring buffer in place, in memory that the kernel shares (Documentation/bpf/ringbuf.rst)."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from typing import Final

from cwndtrace import _libc

_BUSY, _DISCARDED = 1 << 31, 1 << 30
_HEADER: Final = 8
_FAILED: Final = ctypes.c_void_p(-1).value

# This calls libc, because Python's mmap checks the length against the file's size, which a BPF map doesn't have.
_libc.lib.mmap.restype = ctypes.c_void_p
_libc.lib.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.lib.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _mmap(fd: int, size: int, protection: int, offset: int) -> int:
    at: int = _libc.lib.mmap(None, size, protection, mmap.MAP_SHARED, fd, offset)
    if at == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return at


class Ring:
    """A BPF ring buffer that is read in place: the map ``map_fd`` of ``size`` bytes. Raises OSError if mmap fails."""

    def __init__(self, map_fd: int, size: int) -> None:
        page = mmap.PAGESIZE
        self._maps: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        self._lock.acquire()
        # The kernel can map the data twice in a row. This maps it once, so that this process's memory counts it once.
        for length, protection, offset in (
            (page, mmap.PROT_READ | mmap.PROT_WRITE, 0),
            (page + size, mmap.PROT_READ, page),
        ):
            try:
                self._maps.append((_mmap(map_fd, length, protection, offset), length))
            except OSError:
                self.close()
                raise
        (consumer, _), (producer, _) = self._maps
        self._consumer = ctypes.c_uint64.from_address(consumer)
        self._producer = ctypes.c_uint64.from_address(producer)
        self._data, self._size = producer + page, size

    def read(self) -> list[bytes]:
        """Return each complete entry, oldest first, and free their room."""
        entries: list[bytes] = []
        # Repeat until nothing is found: the kernel sends no wakeup for an entry that is committed while an earlier one
        # is unread (bpf_ringbuf_commit() in kernel/bpf/ringbuf.c).
        while self._read_complete(entries):
            pass
        return entries

    def _read_complete(self, entries: list[bytes]) -> bool:
        """Append the entries that are complete now to ``entries`` and free their room; return whether there was one."""
        begin = position = self._consumer.value
        complete = []
        end = self._producer.value
        self._barrier()  # Read an entry's length after the producer position that covers it.
        while position < end:
            at = position % self._size
            length = ctypes.c_uint32.from_address(self._data + at).value
            if length & _BUSY:
                break
            size = length & ~_DISCARDED
            if not length & _DISCARDED:
                complete.append(((at + _HEADER) % self._size, size))
            position += (size + _HEADER + 7) & ~7
        self._barrier()  # Read an entry's content after the length that marks it complete.
        entries += [self._bytes(at, size) for at, size in complete]
        self._barrier()  # Free the room after reading the content.
        self._consumer.value = position
        self._barrier()  # Look for more entries after freeing the room.
        return position != begin

    def _barrier(self) -> None:
        """Order all loads and stores of this thread before it against those after it, on every CPU.

        A release followed by an acquire of the same lock does that: no access moves from before the release to after
        it, or from after the acquire to before it, and the two keep their order ([L]; po; [A] in tools/memory-model's
        terms for arm64).
        """
        self._lock.release()
        self._lock.acquire()

    def _bytes(self, at: int, size: int) -> bytes:
        before_end = min(size, self._size - at)
        entry = ctypes.string_at(self._data + at, before_end)
        return entry if before_end == size else entry + ctypes.string_at(self._data, size - before_end)

    def close(self) -> None:
        """Unmap the buffer. ``read`` must not be called afterwards."""
        while self._maps:
            _libc.lib.munmap(*self._maps.pop())
