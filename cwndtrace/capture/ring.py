# SPDX-License-Identifier: Apache-2.0
"""Reading a BPF ring buffer where it is, in memory that the kernel shares (Documentation/bpf/ringbuf.rst)."""

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

# By hand, because Python's mmap compares with the size of the file, and a map has none.
_libc.lib.mmap.restype = ctypes.c_void_p
_libc.lib.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.lib.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _mapped(fd: int, size: int, protection: int, offset: int) -> int:
    at: int = _libc.lib.mmap(None, size, protection, mmap.MAP_SHARED, fd, offset)
    if at == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return at


class Ring:
    """The ring buffer ``map_fd`` of ``size`` bytes; raises OSError where it can't be mapped."""

    def __init__(self, map_fd: int, size: int) -> None:
        page = mmap.PAGESIZE
        self._maps: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        self._lock.acquire()
        # The kernel offers the data twice in a row; once is enough, and counts as memory of this process once.
        for length, protection, offset in (
            (page, mmap.PROT_READ | mmap.PROT_WRITE, 0),
            (page + size, mmap.PROT_READ, page),
        ):
            try:
                self._maps.append((_mapped(map_fd, length, protection, offset), length))
            except OSError:
                self.close()
                raise
        (consumer, _), (producer, _) = self._maps
        self._consumer = ctypes.c_uint64.from_address(consumer)
        self._producer = ctypes.c_uint64.from_address(producer)
        self._data, self._size = producer + page, size

    def read(self) -> list[bytes]:
        """Each entry that is complete, oldest first; their room is free then."""
        found: list[bytes] = []
        # Until a turn finds nothing: the kernel wakes nobody for an entry that comes while an earlier one is still to
        # be read (bpf_ringbuf_commit() in kernel/bpf/ringbuf.c).
        while self._read_complete(found):
            pass
        return found

    def _read_complete(self, found: list[bytes]) -> bool:
        """Add the entries that are complete now to ``found``, and free their room; whether there was one."""
        begin = position = self._consumer.value
        complete = []
        end = self._producer.value
        self._barrier()  # An entry's length is read after the position that says that there is one.
        while position < end:
            at = position % self._size
            length = ctypes.c_uint32.from_address(self._data + at).value
            if length & _BUSY:
                break
            size = length & ~_DISCARDED
            if not length & _DISCARDED:
                complete.append(((at + _HEADER) % self._size, size))
            position += (size + _HEADER + 7) & ~7
        self._barrier()  # Its content is read after the length that says that it is complete.
        found += [self._bytes(at, size) for at, size in complete]
        self._barrier()  # Its room is given back after it is read, and whether there is more is asked after that.
        self._consumer.value = position
        self._barrier()
        return position != begin

    def _barrier(self) -> None:
        """Order all loads and stores of this thread before against those after, on every CPU.

        A release followed by an acquire of the same lock does that: the first lets nothing before it pass, the second
        nothing after it, and neither passes the other ([L]; po; [A] in tools/memory-model's terms for arm64).
        """
        self._lock.release()
        self._lock.acquire()

    def _bytes(self, at: int, size: int) -> bytes:
        before_end = min(size, self._size - at)
        found = ctypes.string_at(self._data + at, before_end)
        return found if before_end == size else found + ctypes.string_at(self._data, size - before_end)

    def close(self) -> None:
        """Unmap it; ``read`` may not be called any more."""
        while self._maps:
            _libc.lib.munmap(*self._maps.pop())
