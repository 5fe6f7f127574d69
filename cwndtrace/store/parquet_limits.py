# SPDX-License-Identifier: Apache-2.0
"""How much memory and time a Parquet file asks for, counted before any of it is given.

A few bytes of a file can say that they are gigabytes: by rows that are all alike, by pages that say how large they are
when unpacked, or by columns that all lie in the same pages. pyarrow gives what is asked. The rows are in the footer,
the pages' sizes in front of each page, both in Thrift's compact protocol (parquet-format), which is read here and
nowhere else: pyarrow's own view of a footer ends the process where a statistic in it has the wrong length.

A process of its own with limits would bound all that too, but whoever loads a capture in a notebook would have to start
one, get its rows back through a pipe, and tell a limit from damage.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, BinaryIO, Final

from cwndtrace.format import plural
from cwndtrace.store.layout import MOST_PART_ROWS

MOST_BYTES: Final = 1 << 29
"""Memory of one part's rows, and of all its pages unpacked: a part that cwndtrace writes takes less than half of it."""

MOST_PAGES: Final = 20_000
"""Pages of one part; the largest that cwndtrace writes has 2,000."""

_MOST_PAGE: Final = 64 << 20
_MOST_HEADERS: Final = 2 << 20
_MOST_FOOTER: Final = 1 << 20
_MOST_COLUMNS: Final = 200
_MOST_GROUPS: Final = 1000
_LONGEST_HEADER: Final = 1 << 16
_DEEPEST: Final = 16
_TYPES: Final = ("BOOLEAN", "INT32", "INT64", "INT96", "FLOAT", "DOUBLE", "BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
_TEXT: Final = _TYPES.index("BYTE_ARRAY")
_REPEATED: Final = 2

Fields = dict[int, Any]
"""A Thrift struct: its fields by number."""


class UnsafeFile(ValueError):
    """A part that may not be read, and why."""


@dataclass(frozen=True)
class Footer:
    """What a part says of itself without its pages: rows, size in bytes, the checksum of its footer, its columns."""

    rows: int
    size: int
    crc: int
    columns: frozenset[str] = field(default=frozenset(), compare=False)


def check(file: BinaryIO, size: int) -> list[str]:
    """Columns of text, to be read as dictionaries. Raises UnsafeFile for what isn't Parquet or asks for too much."""
    footer = Thrift(_footer(file, size)).struct()
    with _complete():
        columns, _ = _sound(footer)
        chunks = sorted(_place(size, chunk[3]) for group in footer[4] for chunk in group[1])
        if any(end > begin for (_, end), (begin, _) in pairwise(chunks)):
            raise UnsafeFile("its columns lie in each other")
        work = _Work()
        for begin, end in chunks:
            _unpacked(file, begin, end, work)
    return [name for name, kind in columns if kind == _TEXT]


def footer(file: BinaryIO, size: int) -> Footer:
    """What the footer says; the pages aren't looked at. Raises UnsafeFile as ``check`` does."""
    raw = _footer(file, size)
    with _complete():
        columns, rows = _sound(Thrift(raw).struct())
        return Footer(rows, size, zlib.crc32(raw), frozenset(name for name, _ in columns))


@contextmanager
def _complete() -> Iterator[None]:
    """Raises UnsafeFile where what is read in it isn't there, or is something else."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, UnicodeDecodeError):
        raise UnsafeFile("its footer lacks what a footer has") from None


def _sound(footer: Fields) -> tuple[list[tuple[str, int]], int]:
    """Name and type of each column, and the number of rows."""
    columns, groups = _columns(footer), list(footer[4])
    if len(columns) > _MOST_COLUMNS or len(groups) > _MOST_GROUPS:
        raise UnsafeFile(f"{plural(len(columns), 'column')} in {plural(len(groups), 'group')} are too many")
    if any(group[3] < 0 or len(group[1]) != len(columns) for group in groups):
        raise UnsafeFile("its groups of rows don't agree with its footer")
    found = sum(group[3] for group in groups)
    if found != footer[3]:
        raise UnsafeFile("its footer counts other rows than its groups")
    if found > MOST_PART_ROWS:
        raise UnsafeFile(f"it says that it holds {plural(found, 'row')}, a part has {MOST_PART_ROWS:,} at most")
    return columns, found


def _footer(file: BinaryIO, size: int) -> bytes:
    """FileMetaData, as it lies there."""
    file.seek(max(0, size - 8))
    length, magic = int.from_bytes(file.read(4), "little"), file.read(4)
    if size < 12 or magic != b"PAR1" or length > min(size - 12, _MOST_FOOTER):
        raise UnsafeFile("it has no footer of Parquet")
    file.seek(size - 8 - length)
    return file.read(length)


def _columns(footer: Fields) -> list[tuple[str, int]]:
    """Name and type of each column; all lie side by side."""
    root, *elements = footer[2]
    if root.get(5) != len(elements):
        raise UnsafeFile("its columns are nested")
    found = []
    for element in elements:
        name, kind = element[4].decode("utf-8"), element.get(1)
        if element.get(5) or element.get(3) == _REPEATED or kind is None:
            raise UnsafeFile(f"column {name} is nested")
        if not 0 <= kind <= _TEXT:
            raise UnsafeFile(f"column {name} is of type {_TYPES[kind] if 0 <= kind < len(_TYPES) else kind}")
        found.append((name, kind))
    return found


def _place(size: int, chunk: Fields) -> tuple[int, int]:
    """Where the pages of a column (ColumnMetaData) begin and end."""
    at, dictionary = chunk[9], chunk.get(11, 0)
    if dictionary > 0:
        at = min(at, dictionary)
    end = at + chunk[7]
    if not 0 <= at <= end <= size:
        raise UnsafeFile("a column lies outside of the file")
    return at, end


@dataclass
class _Work:
    """What the pages looked at so far come to: how many, bytes of their headers, bytes unpacked."""

    pages: int = 0
    headers: int = 0
    unpacked: int = 0

    def add(self, header: int, unpacked: int) -> None:
        self.pages, self.headers, self.unpacked = self.pages + 1, self.headers + header, self.unpacked + unpacked
        if self.pages > MOST_PAGES or self.headers > _MOST_HEADERS:
            raise UnsafeFile(
                f"it has more than {MOST_PAGES:,} pages, or more of their headers than {_MOST_HEADERS:,} bytes"
            )
        if unpacked > _MOST_PAGE or self.unpacked > MOST_BYTES:
            raise UnsafeFile(f"its pages would unpack to more than {MOST_BYTES:,} bytes, or one to {_MOST_PAGE:,}")


def _unpacked(file: BinaryIO, at: int, end: int, work: _Work) -> None:
    """Add the pages between two places to ``work``. Raises UnsafeFile where that is too much."""
    while at < end:
        file.seek(at)
        header = Thrift(file.read(min(_LONGEST_HEADER, end - at)))
        fields = header.struct()
        unpacked, packed = fields[2], fields[3]
        if unpacked < 0 or packed < 0:
            raise UnsafeFile("a page has a negative size")
        work.add(header.at, unpacked)
        at += header.at + packed


class Thrift:
    """Reads the compact protocol; ``at`` is where it stands. Raises UnsafeFile for what isn't it."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self.at = 0

    def struct(self) -> Fields:
        """A struct and all in it; of fields of one number the last counts, as for Thrift."""
        try:
            return self._struct(0)
        except IndexError:
            raise UnsafeFile("what it says of itself is cut off") from None

    def _byte(self) -> int:
        self.at += 1
        return self._raw[self.at - 1]

    def _number(self) -> int:
        """A varint."""
        byte = self._raw[self.at]
        self.at += 1
        if byte < 0x80:  # most are
            return byte
        value, shift = byte & 0x7F, 7
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise UnsafeFile("it holds a number without end")

    def _signed(self) -> int:
        value = self._number()
        return (value >> 1) ^ -(value & 1)

    def _bytes(self, count: int) -> bytes:
        if count > len(self._raw) - self.at:
            raise IndexError
        self.at += count
        return self._raw[self.at - count : self.at]

    def _struct(self, depth: int) -> Fields:
        if depth > _DEEPEST:
            raise UnsafeFile("it is nested too deep")
        found: Fields = {}
        field = 0
        while byte := self._byte():
            field = field + (byte >> 4) if byte >> 4 else self._signed()
            kind = byte & 0xF
            # A boolean is said by its kind.
            found[field] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 8:
            return self._bytes(self._number())
        if kind == 12:
            return self._struct(depth + 1)
        if kind in (9, 10):
            byte = self._byte()
            count, inner = byte >> 4, byte & 0xF
            if count == 15:
                count = self._number()
            if count > len(self._raw) - self.at:  # each takes a byte at least
                raise IndexError
            return [self._value(inner, depth + 1) for _ in range(count)]
        if kind in (1, 2, 3):  # booleans in a list
            return self._byte()
        if kind == 7:
            return self._bytes(8)
        raise UnsafeFile(f"it holds a value of kind {kind}")
