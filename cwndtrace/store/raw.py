# SPDX-License-Identifier: Apache-2.0
"""Raw parts: records of a table as the kernel wrote them, in frames that are appended to a file.

A raw part begins with ``header(table)``. Each frame has the offset to UTC in ns that holds for its records, their
number, the CRC-32 of their bytes, the CRC-32 of these three, and the records. A frame that is cut off at the end of the
file, as a kill or a full disk leaves it, doesn't count.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import BinaryIO, Final

import numpy as np

from cwndtrace.format import plural
from cwndtrace.lazy import pa
from cwndtrace.records import arrow, layout
from cwndtrace.store.layout import MOST_PART_ROWS
from cwndtrace.store.meta import Part
from cwndtrace.store.parquet_limits import Footer, UnsafeFile

_MAGIC: Final = b"cwndtrace raw records 1\n"
_FRAME: Final = struct.Struct("<qIII")
_CHECKED: Final = _FRAME.size - 4
_SMALLEST: Final = 16
"""A frame has this many records on average, or the part is refused: reading takes time for each frame."""
_FEW: Final = 1000
_PIECES: Final = 512  # of the 1,024 that writev(2) takes


@cache
def header(table: str) -> bytes:
    """Return the first bytes of a table's raw parts, which differ where another version lays out its records otherwise.

    Raises UnsafeFile for a table whose rows aren't records.
    """
    if table not in layout.header().events:
        raise UnsafeFile("its table has no raw parts")
    fields = layout.event(table).fields
    enums = [layout.header().enums[f.unit.removeprefix("enum ")] for f in fields if f.unit.startswith("enum ")]
    members = [(f.name, f.ctype, f.count, f.offset, f.unit) for f in fields]
    digest = hashlib.sha256(repr((members, [sorted(enum.items()) for enum in enums])).encode()).hexdigest()
    return _MAGIC + f"{table}\n{digest}\n".encode()


class RawPart:
    """A raw part that is being written, in ``file``, which is new and unbuffered. Its methods raise OSError."""

    def __init__(self, table: str, file: BinaryIO) -> None:
        self._file = file
        self._size = layout.event(table).size
        self.part = Part(0, 0, 0)
        head = header(table)
        self._write([head])
        self.part = Part(0, len(head), zlib.crc32(head))

    def append(self, rows: list[arrow.TimedRecords]) -> None:
        """Append all of the rows, or none of them."""
        pieces: list[bytes | memoryview] = []
        crc, number = self.part.footer_crc32, 0
        for offset_ns, group in _alike(rows):
            records, count = zlib.crc32(b""), 0
            for data in group:
                records, count = zlib.crc32(data, records), count + len(data) // self._size
            head = struct.pack("<qII", offset_ns, count, records)
            head += zlib.crc32(head).to_bytes(4, "little")
            pieces += [head, *group]
            crc, number = zlib.crc32(head, crc), number + count
        try:
            self._write(pieces)
        except BaseException:
            os.ftruncate(self._file.fileno(), self.part.bytes)
            raise
        written = sum(map(len, pieces))
        self.part = Part(self.part.rows + number, self.part.bytes + written, crc)

    def _write(self, pieces: list[bytes | memoryview]) -> None:
        for at in range(0, len(pieces), _PIECES):
            some = pieces[at : at + _PIECES]
            missing = sum(map(len, some)) - os.writev(self._file.fileno(), some)
            if missing:  # the disk is nearly full: writing the rest tells why
                rest = b"".join(some)[-missing:]
                while rest:
                    rest = rest[os.write(self._file.fileno(), rest) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _alike(rows: list[arrow.TimedRecords]) -> Iterator[tuple[int, list[bytes | memoryview]]]:
    """Yield each offset to UTC, in ns, with the records that follow each other and have it."""
    last: tuple[int, list[bytes | memoryview]] | None = None
    for each in rows:
        offsets, size = each.utc_offsets_ns, layout.event(each.event).size
        if not len(offsets):
            continue
        starts = [0, *(np.flatnonzero(offsets[1:] != offsets[:-1]) + 1).tolist(), len(offsets)]
        for begin, end in pairwise(starts):
            whole = end - begin == len(offsets)
            data = each.data if whole else memoryview(each.data)[begin * size : end * size]
            offset_ns = int(offsets[begin])
            if last is not None and last[0] == offset_ns:
                last[1].append(data)
            else:
                if last is not None:
                    yield last
                last = offset_ns, [data]
    if last is not None:
        yield last


@dataclass
class _Frames:
    """The frames of a raw part of ``size`` bytes. ``footer`` has the facts of those that were iterated over."""

    table: str
    file: BinaryIO
    size: int

    def __post_init__(self) -> None:
        head = header(self.table)
        self._width = layout.event(self.table).size
        most = len(head) + MOST_PART_ROWS * (self._width + _FRAME.size)
        if self.size > most:
            raise UnsafeFile(f"it has {plural(self.size, 'byte')}, and a raw part has {most:,} at most")
        self.file.seek(0)
        begin = self.file.read(len(head))
        if begin != head[: len(begin)]:
            if begin.startswith(_MAGIC):
                raise UnsafeFile("its records are laid out as in another version of cwndtrace; read it by that one")
            raise UnsafeFile("it isn't a raw part of this table")
        self._columns = frozenset(arrow.schema(self.table).names)
        self.footer = Footer(0, len(begin), zlib.crc32(begin), self._columns)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Yield each whole frame's offset to UTC, in ns, and its records, up to the first damage."""
        frames = 0
        while len(head := self.file.read(_FRAME.size)) == _FRAME.size:
            offset_ns, count, crc, head_crc = _FRAME.unpack(head)
            if zlib.crc32(head[:_CHECKED]) != head_crc or not count:
                self._stop("it is damaged")
                return
            rows, frames = self.footer.rows + count, frames + 1
            if rows > MOST_PART_ROWS or frames > _FEW + rows / _SMALLEST:
                self._stop(f"it holds more than {MOST_PART_ROWS:,} rows, or too few in each frame")
                return
            if count * self._width > self.size - self.footer.size:
                return  # cut off
            records = self.file.read(count * self._width)
            if len(records) < count * self._width:
                return
            if zlib.crc32(records) != crc:
                self._stop("its records are damaged")
                return
            size = self.footer.size + len(head) + len(records)
            self.footer = Footer(rows, size, zlib.crc32(head, self.footer.crc), self._columns)
            yield offset_ns, records

    def _stop(self, damage: str) -> None:
        self.footer = Footer(self.footer.rows, self.footer.size, self.footer.crc, self._columns, damage)


def footer(table: str, file: BinaryIO, size: int) -> Footer:
    """Return the facts of the whole frames before the first damage: rows, bytes, and a checksum of their headers.

    Raises UnsafeFile for a file that isn't a raw part of this table and version, or exceeds the limits.
    """
    frames = _Frames(table, file, size)
    for _ in frames:
        pass
    return frames.footer


def read(table: str, file: BinaryIO, size: int) -> tuple[pa.Table, Footer]:
    """Return the rows of the whole frames before the first damage, and their ``footer``. Raises as ``footer`` does."""
    frames = _Frames(table, file, size)
    offsets, counts, data = [], [], []
    for offset_ns, records in frames:
        offsets.append(offset_ns)
        counts.append(len(records))
        data.append(records)
    each = np.repeat(np.array(offsets, np.int64), np.array(counts, np.int64) // layout.event(table).size)
    return arrow.TimedRecords(table, b"".join(data), each).to_arrow(), frames.footer
