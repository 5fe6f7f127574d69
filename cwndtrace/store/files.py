# SPDX-License-Identifier: Apache-2.0
"""Opening files of a capture that a stranger may have made: no link, no device, no pipe, nothing without end."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from cwndtrace.format import plural
from cwndtrace.store import parquet_limits
from cwndtrace.store.parquet_limits import Footer, UnsafeFile

MOST_META: Final = 16 << 20
"""Bytes of meta.json; a namespace takes about 200, a part 35."""

MOST_VALUES: Final = 1_000_000
"""Values in meta.json; a part takes three, and each takes up to 100 bytes of memory."""

MOST_PARTS: Final = 100_000
"""Parts of one table, whatever else lies in its folder counted with them."""


@contextmanager
def plain(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file, opened by its own name, and its size in bytes. Raises OSError, or UnsafeFile for any other."""
    try:
        # Not to wait for a writer, where it is a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeFile("it is a symbolic link") from error
        if error.errno == errno.ENXIO:
            raise UnsafeFile("it is no regular file") from error
        raise
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnsafeFile("it is no regular file")
        yield file, status.st_size


def meta(path: Path) -> bytes:
    """The bytes of meta.json, which ask for no more memory than what they may say is worth."""
    with plain(path) as (file, size):
        if size > MOST_META:
            raise UnsafeFile(f"it has {plural(size, 'byte')}, and {MOST_META:,} are the most")
        raw = file.read(MOST_META)
    # Each value but the first of a list or a mapping has a comma before it. Some are in texts: never mind.
    if sum(raw.count(each) for each in (b",", b"[", b"{")) > MOST_VALUES:
        raise UnsafeFile(f"it holds more than {MOST_VALUES:,} values")
    return raw


def parts(folder: Path) -> list[Path]:
    """The parts in the folder of a table; none where that is a link. Raises UnsafeFile where there are too many."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in islice(entries, MOST_PARTS + 1)]
    if len(names) > MOST_PARTS:
        raise UnsafeFile(f"more than {MOST_PARTS:,} parts are too many")
    return [folder / name for name in sorted(names) if name.endswith(".parquet") and not name.startswith((".", "_"))]


@contextmanager
def parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """A part, opened; its memory is bounded. Raises what pyarrow raises, OSError and UnsafeFile."""
    with plain(path) as (file, size):
        texts = parquet_limits.check(file, size)
        with (
            _native(file) as source,
            pq.ParquetFile(source, read_dictionary=texts, page_checksum_verification=True) as opened,
        ):
            yield opened


def footer(path: Path) -> Footer:
    """What a part says of itself in its footer. Raises OSError and UnsafeFile."""
    with plain(path) as (file, size):
        return parquet_limits.footer(file, size)


def _native(file: BinaryIO) -> pa.NativeFile:
    """The same file for pyarrow, which reads it without Python where the system has a name for it."""
    name = f"/proc/self/fd/{file.fileno()}"
    return pa.OSFile(name) if Path(name).exists() else pa.PythonFile(file, "r")


def read(opened: pq.ParquetFile, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows, of these columns as far as there are such, as their types say. Raises what pyarrow raises."""
    schema = opened.schema_arrow
    names = [name for name in schema.names if columns is None or name in columns]
    # As Arrow will hold them: by the schema that a part may bring along, values are wider than their pages tell.
    width = sum(kind.bit_width // 8 if _fixed(kind) else _POINTER for kind in (schema.field(n).type for n in names))
    if opened.metadata.num_rows * width > parquet_limits.MOST_BYTES:
        raise UnsafeFile(f"its rows would take more than {parquet_limits.MOST_BYTES:,} bytes")
    # By this thread alone. Where there is no memory for another one of Arrow's, it frees what those before still use.
    table = opened.read(names, use_threads=False)
    if len(table) * sum(map(_longest_text, table.columns)) > parquet_limits.MOST_BYTES:
        raise UnsafeFile(f"its texts, written out, would take more than {parquet_limits.MOST_BYTES:,} bytes")
    # Indices outside of their dictionary, text that is no UTF-8: not looked at while reading.
    table.validate(full=True)
    return table


_POINTER: Final = 16


def _fixed(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_primitive, pa.types.is_dictionary, pa.types.is_decimal)
    return any(is_one(kind) for is_one in kinds)


def _longest_text(column: pa.ChunkedArray) -> int:
    """Bytes of the longest text in a dictionary: as frames each row has its own."""
    import pyarrow.compute as pc  # takes longer than a trace's start has; pandas has loaded it where rows are read

    if not pa.types.is_dictionary(column.type):
        return 0
    return max((pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0 for chunk in column.chunks), default=0)
