# SPDX-License-Identifier: Apache-2.0
"""How much memory a Parquet file asks for, counted before any of it is given.

A few bytes of a file can say that they are gigabytes: by rows that are all alike, or by pages that say how large they
are when unpacked. pyarrow gives what is asked. The rows are in the footer; the pages' sizes are in front of each page,
in Thrift's compact protocol (parquet-format, PageHeader), which is read here and nowhere else.
"""

from __future__ import annotations

from typing import BinaryIO, Final

import pyarrow.parquet as pq

MOST_BYTES: Final = 1 << 30
"""Memory of one part, and of all its pages unpacked: a part that cwndtrace writes takes less than half of it."""

_MOST_COLUMNS: Final = 200
_MOST_GROUPS: Final = 1000
_LONGEST_HEADER: Final = 1 << 16
_WIDEST: Final = 16  # bytes a value, but text, which is kept once for each that differs
_FIXED: Final = {"BOOLEAN", "INT32", "INT64", "INT96", "FLOAT", "DOUBLE"}
_TEXT: Final = {"BYTE_ARRAY"}


class Refused(ValueError):
    """A part that may not be read, and why."""


def check(file: BinaryIO, size: int, meta: pq.FileMetaData) -> list[str]:
    """Columns of text, to be read as dictionaries. Raises Refused for a file that asks for too much."""
    if meta.num_columns > _MOST_COLUMNS or meta.num_row_groups > _MOST_GROUPS:
        raise Refused(f"{meta.num_columns} columns in {meta.num_row_groups} groups are too many")
    texts = []
    for index in range(meta.num_columns):
        column = meta.schema.column(index)
        if column.max_repetition_level or column.max_definition_level > 1 or "." in column.path:
            raise Refused(f"column {column.path} is nested")
        if column.physical_type not in _FIXED | _TEXT:
            raise Refused(f"column {column.path} is of type {column.physical_type}")
        if column.physical_type in _TEXT:
            texts.append(column.path)
    rows, total = 0, 0
    for number in range(meta.num_row_groups):
        group = meta.row_group(number)
        rows += group.num_rows
        if group.num_rows < 0 or group.num_columns != meta.num_columns:
            raise Refused("its groups of rows don't agree with its footer")
        for index in range(group.num_columns):
            total += _unpacked(file, size, group.column(index))
            if total > MOST_BYTES:
                raise Refused(f"its pages would unpack to more than {MOST_BYTES:,} bytes")
    if rows != meta.num_rows:
        raise Refused("its footer counts other rows than its groups")
    if rows * max(meta.num_columns, 1) * _WIDEST > 4 * MOST_BYTES:
        raise Refused(f"it says that it holds {rows:,} rows")
    return texts


def _unpacked(file: BinaryIO, size: int, chunk: pq.ColumnChunkMetaData) -> int:
    """Bytes that the pages of a column say they take."""
    at = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None and chunk.dictionary_page_offset > 0:
        at = min(at, chunk.dictionary_page_offset)
    end = at + chunk.total_compressed_size
    if not 0 <= at <= end <= size:
        raise Refused("a column lies outside of the file")
    total = 0
    while at < end:
        file.seek(at)
        header = _Header(file.read(min(_LONGEST_HEADER, end - at)))
        unpacked, packed = header.sizes()
        if unpacked < 0 or packed < 0:
            raise Refused("a page has a negative size")
        total += unpacked
        at += header.at + packed
        if total > MOST_BYTES:
            break
    return total


class _Header:
    """A PageHeader; ``at`` is where it ends once ``sizes`` was called."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self.at = 0

    def sizes(self) -> tuple[int, int]:
        """uncompressed_page_size and compressed_page_size, in bytes."""
        try:
            found = self._struct(0)
        except IndexError:
            raise Refused("a page's header is cut off") from None
        if 2 not in found or 3 not in found:
            raise Refused("a page doesn't say how large it is")
        return found[2], found[3]

    def _byte(self) -> int:
        self.at += 1
        return self._raw[self.at - 1]

    def _number(self) -> int:
        """A varint."""
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise Refused("a page's header holds a number without end")

    def _signed(self) -> int:
        value = self._number()
        return (value >> 1) ^ -(value & 1)

    def _struct(self, depth: int) -> dict[int, int]:
        """Its 32-bit numbers by field; of fields of one number the last counts, as for Thrift."""
        if depth > 8:
            raise Refused("a page's header is nested too deep")
        found: dict[int, int] = {}
        field = 0
        while byte := self._byte():
            field = field + (byte >> 4) if byte >> 4 else self._signed()
            kind = byte & 0xF
            if kind == 5:
                found[field] = self._signed()
            else:
                self._skip(kind, depth)
        return found

    def _skip(self, kind: int, depth: int) -> None:
        if kind in (1, 2):  # true and false: all is said
            return
        if kind == 3:
            self._byte()
        elif kind in (4, 5, 6):
            self._number()
        elif kind == 7:
            self._pass(8)
        elif kind == 8:
            self._pass(self._number())
        elif kind in (9, 10):
            byte = self._byte()
            count = self._number() if byte >> 4 == 15 else byte >> 4
            for _ in range(min(count, _LONGEST_HEADER)):
                # Here a boolean takes a byte.
                self._skip(3 if byte & 0xF in (1, 2) else byte & 0xF, depth)
        elif kind == 12:
            self._struct(depth + 1)
        else:
            raise Refused(f"a page's header holds a value of kind {kind}")

    def _pass(self, count: int) -> None:
        self.at += count
        if self.at > len(self._raw):
            raise IndexError
