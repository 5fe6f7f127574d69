# SPDX-License-Identifier: Apache-2.0
"""Open the files of a capture that may be untrusted.

Links, devices and pipes are refused, and so are files of unbounded size.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from cwndtrace.format import plural
from cwndtrace.lazy import pa, pq
from cwndtrace.store import parquet_limits, raw
from cwndtrace.store.layout import final_name, is_raw
from cwndtrace.store.parquet_limits import Footer, UnsafeFile

Result = TypeVar("Result")

MOST_META: Final = 16 << 20
"""The largest meta.json that is read, in bytes. A namespace takes about 200 bytes, a part 35."""

MOST_VALUES: Final = 1_000_000
"""The most values in a meta.json. A part takes three, and each value takes up to 100 bytes of memory."""

MOST_PARTS: Final = 100_000
"""The most parts of one table, counting every other file in its folder too."""

_RAW_COPIES: Final = 4
"""Reading a raw part holds its records twice, and makes columns of them."""

_HEADROOM: Final = 16 << 20
"""The memory that has to be free in addition to a part's rows, in bytes."""


@contextmanager
def plain(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file, and yield it with its size in bytes.

    Raises OSError, or UnsafeFile for a symbolic link and for anything else that isn't a regular file.
    """
    try:
        # O_NONBLOCK, because opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeFile("it is a symbolic link") from error
        if error.errno == errno.ENXIO:
            raise UnsafeFile("it isn't a regular file") from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise UnsafeFile("it isn't a regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file, status.st_size


def meta(path: Path) -> bytes:
    """Return the bytes of meta.json. Raises OSError, and UnsafeFile where parsing them could take too much memory."""
    with plain(path) as (file, size):
        if size > MOST_META:
            raise UnsafeFile(f"it has {plural(size, 'byte')}, and the limit is {MOST_META:,}")
        raw = file.read(MOST_META)
    # In a list or a mapping, each value but the first has a comma before it. Commas in texts are counted too.
    if sum(raw.count(separator) for separator in (b",", b"[", b"{")) > MOST_VALUES:
        raise UnsafeFile(f"it holds more than {MOST_VALUES:,} values")
    return raw


def parts(folder: Path) -> list[Path]:
    """Return the parts in a table's folder, none if it's missing or a link. Raises UnsafeFile for too many.

    A raw part isn't among them if there is a Parquet part of the same number: that has the same rows.
    """
    if folder.is_symlink() or not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in islice(entries, MOST_PARTS + 1)]
    if len(names) > MOST_PARTS:
        raise UnsafeFile(f"more than {MOST_PARTS:,} parts are too many")
    parquets = [name for name in names if name.endswith(".parquet") and not name.startswith((".", "_"))]
    raws = [name for name in names if is_raw(name) and final_name(name) not in parquets]
    return [folder / name for name in sorted(parquets + raws, key=final_name)]


@contextmanager
def parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a part whose memory is bounded. Raises OSError, UnsafeFile and the errors of pyarrow."""
    with plain(path) as (file, size), opened_parquet(file, size) as opened:
        yield opened


@contextmanager
def opened_parquet(file: BinaryIO, size: int) -> Iterator[pq.ParquetFile]:
    """Do what ``parquet`` does with a file that ``plain`` has opened."""
    texts = _text_columns(file, size)
    _need_memory(0)
    with (
        _native(file) as source,
        pq.ParquetFile(source, read_dictionary=texts, page_checksum_verification=True) as opened,
    ):
        yield opened


def _text_columns(file: BinaryIO, size: int) -> list[str]:
    """Return what ``parquet_limits.check`` does. A file that hasn't changed since isn't checked again."""
    status = os.fstat(file.fileno())
    # Nobody but the system sets the time of the last change.
    key = status.st_dev, status.st_ino, size, status.st_mtime_ns, status.st_ctime_ns
    if key not in _checked:
        texts = parquet_limits.check(file, size)
        if len(_checked) >= _MOST_CHECKED:
            _checked.clear()
        _checked[key] = texts
    return _checked[key]


_MOST_CHECKED: Final = 4096
_checked: dict[tuple[int, ...], list[str]] = {}


def footer(path: Path) -> Footer:
    """Return the facts in the footer of a part, or those of a raw part. Raises OSError and UnsafeFile."""
    with plain(path) as (file, size):
        return raw.footer(path.parent.name, file, size) if is_raw(path.name) else parquet_limits.footer(file, size)


def either(path: Path, use: Callable[[Path], Result]) -> Result:
    """Return ``use(path)``, and where that is a raw part that has become Parquet since, do the same with the latter."""
    try:
        return use(path)
    except FileNotFoundError:
        if not is_raw(path.name):
            raise
        return use(path.with_name(final_name(path.name)))


def table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Return all rows of a part, raw or not, as ``read`` does. Raises as ``parquet`` and ``read`` do."""
    if is_raw(path.name):
        return _raw_table(path, columns)
    # pq.read_table would turn a folder named host=... in the path into a column.
    with parquet(path) as opened:
        return read(opened, columns)


def _raw_table(path: Path, columns: Sequence[str] | None) -> pa.Table:
    with plain(path) as (file, size):
        _need_memory(_RAW_COPIES * min(size, parquet_limits.MOST_BYTES))
        rows, _ = raw.read(path.parent.name, file, size)
    return rows if columns is None else rows.select([name for name in rows.column_names if name in columns])


def _native(file: BinaryIO) -> pa.NativeFile:
    """Return the same file for pyarrow, which reads it without going through Python where /proc has a name for it."""
    name = f"/proc/self/fd/{file.fileno()}"
    return pa.OSFile(name) if Path(name).exists() else pa.PythonFile(file, "r")


def read(opened: pq.ParquetFile, columns: Sequence[str] | None = None) -> pa.Table:
    """Return all rows of these columns, or of all columns for None; a column that the part lacks is left out.

    Raises UnsafeFile where the rows would take too much memory, and the errors of pyarrow.
    """
    schema = opened.schema_arrow
    names = [name for name in schema.names if columns is None or name in columns]
    # The width in memory: the Arrow schema stored in a part may make values wider than they are in its pages.
    width = sum(dtype.bit_width // 8 if _fixed(dtype) else _POINTER for dtype in (schema.field(n).type for n in names))
    size = opened.metadata.num_rows * width
    if size > parquet_limits.MOST_BYTES:
        raise UnsafeFile(f"its rows would take more than {parquet_limits.MOST_BYTES:,} bytes")
    _need_memory(2 * size)  # decoding holds pages and values at the same time
    # Arrow's own threads aren't used: where memory for another thread is lacking, Arrow frees memory that the earlier
    # threads still use.
    table = opened.read(names, use_threads=False)
    if len(table) * sum(map(_longest_text, table.columns)) > parquet_limits.MOST_BYTES:
        raise UnsafeFile(f"its texts would take more than {parquet_limits.MOST_BYTES:,} bytes in a DataFrame")
    # Reading doesn't check that indices are inside their dictionary and that text is UTF-8.
    table.validate(full=True)
    return table


def _need_memory(size: int) -> None:
    """Raise OSError where ``size`` bytes and some more aren't free.

    If memory runs out in libparquet or Arrow, they may end the process: std::bad_alloc passes through code that can't
    catch it, such as parquet::arrow::FileReader::Make(). This check prevents that unless another thread takes the
    memory meanwhile.
    """
    mmap.mmap(-1, size + _HEADROOM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()


def has_memory(size: int) -> bool:
    """Return whether ``size`` bytes and some more are free. Without them, two threads mustn't read at once.

    Each may take what the other one has just been promised. Python's start of a thread may even wait for ever.
    """
    try:
        _need_memory(size)
    except OSError:
        return False
    return True


_POINTER: Final = 16


def _fixed(dtype: pa.DataType) -> bool:
    checks = (pa.types.is_primitive, pa.types.is_dictionary, pa.types.is_decimal)
    return any(check(dtype) for check in checks)


def _longest_text(column: pa.ChunkedArray) -> int:
    """Return the bytes of the longest text in a column's dictionaries: in a DataFrame each row has its own copy."""
    import pyarrow.compute as pc  # too slow to load when a trace starts; where rows are read, pandas has loaded it

    if not pa.types.is_dictionary(column.type):
        return 0
    return max((pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0 for chunk in column.chunks), default=0)
