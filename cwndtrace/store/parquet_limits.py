# SPDX-License-Identifier: Apache-2.0
"""Limits on the memory and time that reading a Parquet file takes, checked before anything is allocated.

A few bytes of a file can stand for gigabytes: rows that are all alike, pages that claim a large unpacked size, or
columns that share the same pages. pyarrow allocates whatever the file asks for. The footer has the number of rows, and
a header in front of each page has its size. Both are in Thrift's compact protocol (parquet-format), which this module
parses itself, because pyarrow's own view of a footer ends the process if a statistic in it has the wrong length.

A separate process with resource limits would bound memory and time too. But a notebook that loads a capture would have
to start one, get the rows back through a pipe, and distinguish a limit from damage.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, BinaryIO, Final

from cwndtrace.format import plural
from cwndtrace.store.layout import MOST_PART_ROWS

MOST_BYTES: Final = 1 << 29
"""The most memory for one part's rows, and for all its unpacked pages, in bytes. Parts of cwndtrace take less than half
of it."""

MOST_PAGES: Final = 20_000
"""The most pages of one part. The largest part that cwndtrace writes has 2,000."""

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
"""The fields of a Thrift struct, by number."""


class UnsafeFile(ValueError):
    """A file that must not be read; the message says why."""


@dataclass(frozen=True)
class Footer:
    """The facts of a part that need none of its pages: rows, size in bytes, checksum of the footer, columns.

    A raw part has no footer, see ``raw.footer``; ``damage`` says what is wrong with the rest of it.
    ``least`` has the least value of 64-bit columns, as far as the footer says. Nobody has compared it with the rows.
    """

    rows: int
    size: int
    crc: int
    columns: frozenset[str] = field(default=frozenset(), compare=False)
    damage: str = field(default="", compare=False)
    least: Mapping[str, int] = field(default_factory=dict, compare=False)


def check(file: BinaryIO, size: int) -> list[str]:
    """Return the names of the text columns, to be read as dictionaries.

    Raises UnsafeFile for a file that isn't Parquet, or that would take more than the limits.
    """
    footer = Thrift(_footer(file, size)).struct()
    with _complete():
        columns, _ = _sound(footer)
        chunks = sorted(_place(size, chunk[3]) for group in footer[4] for chunk in group[1])
        if any(end > begin for (_, end), (begin, _) in pairwise(chunks)):
            raise UnsafeFile("its columns overlap")
        work = _Work()
        for begin, end in chunks:
            _unpacked(file, begin, end, work)
    return [name for name, type_number in columns if type_number == _TEXT]


def footer(file: BinaryIO, size: int) -> Footer:
    """Return the facts in the footer, without checking the pages. Raises UnsafeFile as ``check`` does."""
    raw = _footer(file, size)
    with _complete():
        fields = Thrift(raw).struct()
        columns, rows = _sound(fields)
        names = [name for name, _ in columns]
        return Footer(rows, size, zlib.crc32(raw), frozenset(names), least=_least(names, fields[4]))


@contextmanager
def _complete() -> Iterator[None]:
    """Raise UnsafeFile where a field that the block reads is missing or has the wrong type."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, UnicodeDecodeError):
        raise UnsafeFile("its footer is incomplete or damaged") from None


def _sound(footer: Fields) -> tuple[list[tuple[str, int]], int]:
    """Return name and type of each column, and the number of rows."""
    columns, groups = _columns(footer), list(footer[4])
    if len(columns) > _MOST_COLUMNS or len(groups) > _MOST_GROUPS:
        raise UnsafeFile(f"{plural(len(columns), 'column')} in {plural(len(groups), 'group')} are too many")
    if any(group[3] < 0 or len(group[1]) != len(columns) for group in groups):
        raise UnsafeFile("its row groups don't match its footer")
    rows = sum(group[3] for group in groups)
    if rows != footer[3]:
        raise UnsafeFile("its footer and its row groups count different numbers of rows")
    if rows > MOST_PART_ROWS:
        raise UnsafeFile(f"it says that it holds {plural(rows, 'row')}, and a part has {MOST_PART_ROWS:,} at most")
    return columns, rows


def _least(names: list[str], groups: list[Fields]) -> dict[str, int]:
    """Return the least value of each column of 64 bits; without those that lack it in a row group."""
    found = {}
    for number, name in enumerate(names):
        chunks = [group[1][number].get(3) for group in groups]
        statistics = [chunk.get(12) if isinstance(chunk, dict) else None for chunk in chunks]
        least = [each.get(6) if isinstance(each, dict) else None for each in statistics]
        known = [value for value in least if isinstance(value, bytes) and len(value) == 8]
        if known and len(known) == len(least):
            found[name] = min(int.from_bytes(value, "little") for value in known)
    return found


def _footer(file: BinaryIO, size: int) -> bytes:
    """Return the bytes of FileMetaData."""
    file.seek(max(0, size - 8))
    length, magic = int.from_bytes(file.read(4), "little"), file.read(4)
    if size < 12 or magic != b"PAR1" or length > min(size - 12, _MOST_FOOTER):
        raise UnsafeFile("it has no Parquet footer")
    file.seek(size - 8 - length)
    return file.read(length)


def _columns(footer: Fields) -> list[tuple[str, int]]:
    """Return name and type of each column. Raises UnsafeFile for nested columns."""
    root, *elements = footer[2]
    if root.get(5) != len(elements):
        raise UnsafeFile("its columns are nested")
    columns = []
    for element in elements:
        name, type_number = element[4].decode("utf-8"), element.get(1)
        if element.get(5) or element.get(3) == _REPEATED or type_number is None:
            raise UnsafeFile(f"column {name} is nested")
        if not 0 <= type_number <= _TEXT:
            type_name = _TYPES[type_number] if 0 <= type_number < len(_TYPES) else type_number
            raise UnsafeFile(f"column {name} is of type {type_name}")
        columns.append((name, type_number))
    return columns


def _place(size: int, chunk: Fields) -> tuple[int, int]:
    """Return the offsets in bytes where the pages of a column (ColumnMetaData) begin and end."""
    at, dictionary = chunk[9], chunk.get(11, 0)
    if dictionary > 0:
        at = min(at, dictionary)
    end = at + chunk[7]
    if not 0 <= at <= end <= size:
        raise UnsafeFile("a column lies outside the file")
    return at, end


@dataclass
class _Work:
    """Totals of the pages checked so far: their number, bytes of their headers, bytes unpacked."""

    pages: int = 0
    headers: int = 0
    unpacked: int = 0

    def add(self, header: int, unpacked: int) -> None:
        self.pages, self.headers, self.unpacked = self.pages + 1, self.headers + header, self.unpacked + unpacked
        if self.pages > MOST_PAGES or self.headers > _MOST_HEADERS:
            raise UnsafeFile(f"it has more than {MOST_PAGES:,} pages, or {_MOST_HEADERS:,} bytes of page headers")
        if unpacked > _MOST_PAGE or self.unpacked > MOST_BYTES:
            raise UnsafeFile(
                f"its pages would unpack to more than {MOST_BYTES:,} bytes, or one of them to more than {_MOST_PAGE:,}"
            )


def _unpacked(file: BinaryIO, at: int, end: int, work: _Work) -> None:
    """Add the pages between two offsets to ``work``. Raises UnsafeFile where they exceed a limit."""
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
    """A reader of Thrift's compact protocol; ``at`` is its offset in bytes. Raises UnsafeFile for anything else."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self.at = 0

    def struct(self) -> Fields:
        """Return a struct and everything in it. If a field number repeats, the last one counts, as in Thrift."""
        try:
            return self._struct(0)
        except IndexError:
            raise UnsafeFile("its metadata is cut off") from None

    def _byte(self) -> int:
        self.at += 1
        return self._raw[self.at - 1]

    def _number(self) -> int:
        """Read a varint."""
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
                raise UnsafeFile("it holds a number longer than 10 bytes")

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
            raise UnsafeFile("it is nested too deeply")
        fields: Fields = {}
        field = 0
        while byte := self._byte():
            field = field + (byte >> 4) if byte >> 4 else self._signed()
            type_id = byte & 0xF
            # The type id of a boolean field is its value.
            fields[field] = type_id == 1 if type_id in (1, 2) else self._value(type_id, depth)
        return fields

    def _value(self, type_id: int, depth: int) -> Any:
        if type_id in (4, 5, 6):
            return self._signed()
        if type_id == 8:
            return self._bytes(self._number())
        if type_id == 12:
            return self._struct(depth + 1)
        if type_id in (9, 10):
            byte = self._byte()
            count, inner = byte >> 4, byte & 0xF
            if count == 15:
                count = self._number()
            if count > len(self._raw) - self.at:  # each takes a byte at least
                raise IndexError
            return [self._value(inner, depth + 1) for _ in range(count)]
        if type_id in (1, 2, 3):  # a boolean in a list, or a byte
            return self._byte()
        if type_id == 7:
            return self._bytes(8)
        raise UnsafeFile(f"it holds a value of unknown type {type_id}")
