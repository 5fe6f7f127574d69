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
_MAP_FIXED: Final = 0x10
# Pages of a ring count as this process's memory once they are mapped, whether they are read or not.
_WINDOW: Final = 512 << 10
_FAILED: Final = ctypes.c_void_p(-1).value

# This calls libc, because Python's mmap checks the length against the file's size, which a BPF map doesn't have.
_libc.lib.mmap.restype = ctypes.c_void_p
_libc.lib.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.lib.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _mmap(fd: int, size: int, protection: int, offset: int, at: int | None = None) -> int:
    """Map a part of a file, with ``at`` in place of what is mapped there; return the address."""
    flags = mmap.MAP_SHARED | (_MAP_FIXED if at else 0)
    mapped: int = _libc.lib.mmap(at, size, protection, flags, fd, offset)
    if mapped == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return mapped


class Ring:
    """A BPF ring buffer that is read in place: the map ``map_fd`` of ``size`` bytes. Raises OSError if mmap fails.

    Of the data, a window is mapped at a time, and the next one in its place.
    """

    def __init__(self, map_fd: int, size: int) -> None:
        page = mmap.PAGESIZE
        self._fd, self._size, self._window = map_fd, size, min(size, _WINDOW)
        self._maps: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        self._lock.acquire()
        for length, protection, offset in (
            (page, mmap.PROT_READ | mmap.PROT_WRITE, 0),
            (page, mmap.PROT_READ, page),
            (self._window, mmap.PROT_READ, 2 * page),
        ):
            try:
                self._maps.append((_mmap(map_fd, length, protection, offset), length))
            except OSError:
                self.close()
                raise
        (consumer, _), (producer, _), (self._data, _) = self._maps
        self._consumer = ctypes.c_uint64.from_address(consumer)
        self._producer = ctypes.c_uint64.from_address(producer)
        self._shown = 0

    def read(self, most: int) -> tuple[list[bytes], bool]:
        """Return complete entries, oldest first, and free their room; and whether there may be more.

        That is so once the entries take ``most`` bytes of the ring, which they exceed by a window at most.
        """
        entries: list[bytes] = []
        begin = self._consumer.value
        # Repeat until nothing is found: the kernel sends no wakeup for an entry that is committed while an earlier one
        # is unread (bpf_ringbuf_commit() in kernel/bpf/ringbuf.c).
        while self._read_complete(entries):
            if self._consumer.value - begin >= most:
                return entries, True
        return entries, False

    def _read_complete(self, entries: list[bytes]) -> bool:
        """Append the entries of one window that are complete now to ``entries`` and free their room.

        Return whether there was one.
        """
        begin = position = self._consumer.value
        complete = []
        end = min(self._producer.value, begin - begin % self._window + self._window)
        self._barrier()  # Read an entry's length after the producer position that covers it.
        if position < end:
            self._show(position)
        while position < end:
            length = ctypes.c_uint32.from_address(self._data + position % self._window).value
            if length & _BUSY:
                break
            size = length & ~_DISCARDED
            if not length & _DISCARDED:
                complete.append((position + _HEADER, size))
            position += (size + _HEADER + 7) & ~7
        self._barrier()  # Read an entry's content after the length that marks it complete.
        entries += [self._bytes(at, size) for at, size in complete]
        self._barrier()  # Free the room after reading the content.
        self._consumer.value = position
        self._barrier()  # Look for more entries after freeing the room.
        return position != begin

    def _show(self, position: int) -> None:
        """Map the window of the data that has this position."""
        offset = position % self._size // self._window * self._window
        if offset != self._shown:
            _mmap(self._fd, self._window, mmap.PROT_READ, 2 * mmap.PAGESIZE + offset, self._data)
            self._shown = offset

    def _barrier(self) -> None:
        """Order all loads and stores of this thread before it against those after it, on every CPU.

        A release followed by an acquire of the same lock does that: no access moves from before the release to after
        it, or from after the acquire to before it, and the two keep their order ([L]; po; [A] in tools/memory-model's
        terms for arm64).
        """
        self._lock.release()
        self._lock.acquire()

    def _bytes(self, position: int, size: int) -> bytes:
        parts = []
        while size > 0:
            self._show(position)
            at = position % self._window
            parts.append(ctypes.string_at(self._data + at, min(size, self._window - at)))
            position += len(parts[-1])
            size -= len(parts[-1])
        return b"".join(parts)

    def close(self) -> None:
        """Unmap the buffer. ``read`` must not be called afterwards."""
        while self._maps:
            _libc.lib.munmap(*self._maps.pop())
