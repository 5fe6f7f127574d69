# SPDX-License-Identifier: Apache-2.0
"""Opening files of a capture that a stranger may have made: no link, no device, no pipe, nothing without end."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from cwndtrace.store import pages
from cwndtrace.store.pages import Refused

MOST_META: Final = 64 << 20
"""Bytes of meta.json; a namespace takes about 200."""

MOST_PARTS: Final = 100_000
"""Parts of one table: five days of the writer's."""


@contextmanager
def plain(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file, opened by its own name, and its size in bytes. Raises OSError, and Refused for anything else."""
    try:
        # Not to wait for a writer, where it is a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Refused("it is a symbolic link") from error
        if error.errno == errno.ENXIO:
            raise Refused("it is no regular file") from error
        raise
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Refused("it is no regular file")
        yield file, status.st_size


def meta(path: Path) -> bytes:
    """The bytes of meta.json."""
    with plain(path) as (file, size):
        if size > MOST_META:
            raise Refused(f"it has {size:,} bytes")
        return file.read(MOST_META)


def parts(folder: Path) -> list[Path]:
    """The parts in the folder of a table; none where that is a link. Raises Refused where there are too many."""
    if folder.is_symlink():
        return []
    found = sorted(p for p in folder.glob("*.parquet") if not p.name.startswith((".", "_")))
    if len(found) > MOST_PARTS:
        raise Refused(f"{len(found):,} parts are too many")
    return found


@contextmanager
def parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """A part, opened; its memory is bounded. Raises what pyarrow raises, OSError and Refused."""
    with plain(path) as (file, size):
        texts = pages.check(file, size)
        with (
            _native(file) as source,
            pq.ParquetFile(source, read_dictionary=texts, page_checksum_verification=True) as opened,
        ):
            yield opened


def rows(path: Path) -> int:
    """How many rows a part has, from its footer alone. Raises OSError and Refused."""
    with plain(path) as (file, size):
        return pages.rows(file, size)


def _native(file: BinaryIO) -> pa.NativeFile:
    """The same file for pyarrow, which reads it without Python where the system has a name for it."""
    name = f"/proc/self/fd/{file.fileno()}"
    return pa.OSFile(name) if Path(name).exists() else pa.PythonFile(file, "r")


def read(opened: pq.ParquetFile, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows, of these columns as far as there are such, as their types say. Raises what pyarrow raises."""
    names = None if columns is None else [name for name in opened.schema_arrow.names if name in columns]
    table = opened.read(names)
    # Indices outside of their dictionary, text that is no UTF-8: not looked at while reading.
    table.validate(full=True)
    return table
