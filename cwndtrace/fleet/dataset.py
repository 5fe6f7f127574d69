# SPDX-License-Identifier: Apache-2.0
"""The result of a fleet on disk: ``TABLE/host=NAME/KEY.parquet``, where KEY stands for one capture.

The file of a capture in ``captures`` is written last and removed first. Without it the capture isn't in the result, so
whoever reads never sees a half.
"""

from __future__ import annotations

import io
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Final

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cwndtrace.errors import CaptureError, CwndtraceError
from cwndtrace.fleet import names, tables
from cwndtrace.fleet.tables import Frames
from cwndtrace.format import clean
from cwndtrace.store import files
from cwndtrace.store.reader import read_errors

_MARK: Final = "captures"
_STAMP: Final = b"stamp"
_FILES: Final = "host=*/*.parquet"


class Dataset:
    """A result in the folder ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, *, resume: bool) -> Dataset:
        """Make the folder, or go on with the result in it. Raises CwndtraceError where that can't be."""
        try:
            path.mkdir(0o700, exist_ok=True)
            if not resume and any(path.iterdir()):
                raise CwndtraceError(
                    f"{path} isn't empty", "add --resume to go on with the result in it, or choose another folder"
                )
            for folder in (*path.glob("*"), *path.glob("*/host=*")):
                refuse_stranger(folder)
        except OSError as error:
            raise CwndtraceError(f"{path} can't be written: {error.strerror}", "choose another folder") from error
        return cls(path)

    @staticmethod
    def is_one(path: Path) -> bool:
        """Return whether there is a result in a folder that this user can read."""
        with suppress(OSError):
            return any((path / _MARK).glob(_FILES))
        return False

    def known(self) -> dict[str, tuple[str, str]]:
        """Return status and stamp of each capture in the result, by the name of its file."""
        there = {}
        for file in self._files():
            with suppress(*read_errors()), files.parquet(file) as opened:
                stamp = (opened.schema_arrow.metadata or {}).get(_STAMP, b"").decode("ascii", "replace")
                there[file.name] = str(files.read(opened, ["status"])["status"][0]), stamp
        return there

    def put(self, packed: dict[str, bytes], stamp: str) -> None:
        """Write the tables of one capture, as ``pack`` gives them, in place of what is there of it.

        Raises CwndtraceError where they can't be written.
        """
        try:
            self._put(packed, stamp)
        except OSError as error:
            cause = f"{clean(str(self.path))} can't be written: {error.strerror}"
            raise CwndtraceError(cause, "once it can be, --resume goes on with what is there") from error

    def _put(self, packed: dict[str, bytes], stamp: str) -> None:
        about = pq.read_table(pa.BufferReader(packed[_MARK]))
        host, capture = str(about["host"][0]), str(about["capture"][0])
        folder, name = names.folder(host), names.file(capture)
        self._remove(name)
        self._folders[name] = [folder]
        for table in sorted(packed, key=lambda table: table == _MARK):
            raw = packed[table]
            if table == _MARK:
                known = about.schema.metadata or {}
                raw = _parquet(about.replace_schema_metadata({**known, _STAMP: stamp.encode()}))
            self._write(self.path / table / folder, name, raw)

    @cached_property
    def _folders(self) -> dict[str, list[str]]:
        """The folders of hosts that have files of a capture, by the files' name.

        A search of all folders for each capture would take a time that grows with the square of the number of hosts.
        """
        there: dict[str, list[str]] = {}
        for table in tables.COLUMNS:
            for file in (self.path / table).glob(_FILES):
                folders = there.setdefault(file.name, [])
                if file.parent.name not in folders:
                    folders.append(file.parent.name)
        return there

    def _remove(self, name: str) -> None:
        for table in sorted(tables.COLUMNS, key=lambda table: table != _MARK):
            for folder in self._folders.get(name, ()):
                (self.path / table / folder / name).unlink(missing_ok=True)

    def _write(self, folder: Path, name: str, raw: bytes) -> None:
        folder.mkdir(0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".", dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(raw)
            os.replace(temporary, folder / name)  # noqa: PTH105
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)  # noqa: PTH108
            raise

    def read(self, table: str) -> pd.DataFrame:
        """Return all rows of a table, in order of host and capture.

        Raises CaptureError for a file that can't be read, and KeyError for an unknown table.
        """
        schema, parts = tables.schema(table), []
        for mark in self._files():
            file = self.path / table / mark.parent.name / mark.name
            try:
                with files.parquet(file) as opened:
                    parts.append(files.read(opened).select(schema.names).cast(schema))
            except FileNotFoundError:  # the capture has no row of this table
                continue
            except read_errors() as error:
                cause = f"{clean(str(file))} can't be read: {clean(str(error))[:200]}."
                raise CaptureError(cause, "Delete it, and compute the result again with --resume.") from error
        # One conversion of all rows takes a tenth of the time of one for each capture.
        return tables.combined(table, [tables.to_frame(table, pa.concat_tables(parts))] if parts else [])

    def _files(self) -> Iterator[Path]:
        yield from sorted((self.path / _MARK).glob(_FILES))


def refuse_stranger(folder: Path) -> None:
    """Raise CwndtraceError for a link, and for what another user made: files below it may be anybody's.

    A result is written and files in it are removed by their names.
    """
    about = folder.lstat()
    if stat.S_ISLNK(about.st_mode) or about.st_uid != os.geteuid():
        what = "is a link" if stat.S_ISLNK(about.st_mode) else "belongs to another user"
        raise CwndtraceError(f"{clean(str(folder))} {what}", "choose another folder for the result")


def pack(frames: Frames) -> dict[str, bytes]:
    """Return the tables of one capture that have rows, as Parquet."""
    return {name: _parquet(tables.to_arrow(name, frame)) for name, frame in frames.named().items() if len(frame)}


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(
        table, buffer, compression="zstd", use_dictionary=False, write_statistics=False, write_page_checksum=True
    )
    return buffer.getvalue()
