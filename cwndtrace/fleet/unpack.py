# SPDX-License-Identifier: Apache-2.0
"""Bring a capture that is packed or elsewhere into a private folder, within limits on bytes, files and names."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final

import pyarrow as pa

from cwndtrace.errors import CaptureError
from cwndtrace.fleet import names
from cwndtrace.fleet.places import Located
from cwndtrace.format import size as in_bytes
from cwndtrace.store import files
from cwndtrace.store.layout import META
from cwndtrace.store.parquet_limits import UnsafeFile

MOST_BYTES: Final = 4 << 30
"""The most bytes of one capture that are downloaded or unpacked."""

_MOST_MEMBERS: Final = 100_000
_LARGEST_HEADER: Final = 1 << 20
"""The largest header of a member: tarfile reads one that holds a long name into memory at once."""
_MOST_READS: Final = 1_000_000
"""The most reads of an archive: older versions of tarfile never end with some that have negative sizes."""
_CHUNK: Final = 1 << 20


@contextmanager
def opened(found: Located, scratch: Path, most: int = MOST_BYTES) -> Iterator[Path]:
    """Yield the folder of a capture. What had to be brought into ``scratch`` is removed in the end.

    Raises CaptureError for an archive that isn't one capture, OSError and UnsafeFile, and for a capture elsewhere
    whatever the library of its protocol raises.
    """
    if not found.packed and not found.place:
        yield Path(found.where)
        return
    folder = scratch / "capture"
    folder.mkdir(0o700)
    try:
        allowed = _Allowance(most)
        if not found.packed:
            _download(found, folder, allowed)
            yield folder
        else:
            with _archive(found, scratch, allowed) as file:
                yield _unpack(file, folder, allowed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Allowance:
    """How many bytes and files of one capture may still be written."""

    def __init__(self, most: int) -> None:
        self._most = self._bytes = most
        self._files = _MOST_MEMBERS

    def bytes(self, number: int) -> None:
        """Take note that so many bytes will be written. Raises UnsafeFile where that is too much."""
        self._bytes -= number
        if self._bytes < 0:
            raise UnsafeFile(f"it takes more than {in_bytes(self._most)}")

    def file(self) -> None:
        """Take note of one more file or folder. Raises UnsafeFile where that is too many."""
        self._files -= 1
        if self._files < 0:
            raise UnsafeFile(f"it holds more than {_MOST_MEMBERS:,} files")


def _copy(source: Any, target: Path, allowed: _Allowance) -> None:
    """Write a new file, and count the bytes that come and not those that were announced."""
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        while chunk := source.read(_CHUNK):
            allowed.bytes(len(chunk))
            file.write(chunk)


def _place(folder: Path, name: PurePosixPath) -> Path:
    target = folder.joinpath(*name.parts)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return target


# ---- tar files --------------------------------------------------------------------------------------


class _Careful(io.RawIOBase):
    """A file that refuses to read much at once, as a header in a hostile archive may ask."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = _MOST_READS

    def read(self, size: int = -1) -> bytes:
        self._left -= 1
        if not 0 <= size <= _LARGEST_HEADER or self._left < 0:
            raise UnsafeFile("it has a header that is too large, or headers without an end")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


@contextmanager
def _archive(found: Located, scratch: Path, allowed: _Allowance) -> Iterator[BinaryIO]:
    """Yield the tar file without its compression."""
    with _near(found) as source:
        codec = names.compression(found.where)
        if codec is None and not found.place:
            yield source
            return
        plain = scratch / "archive.tar"
        try:
            _copy(source if codec is None else pa.CompressedInputStream(source, codec), plain, allowed)
            with plain.open("rb") as file:
                yield file
        finally:
            plain.unlink(missing_ok=True)


@contextmanager
def _near(found: Located) -> Iterator[Any]:
    if found.place:
        with _file_system(found).open(found.where, "rb") as file:
            yield file
    else:
        with files.plain(Path(found.where)) as (file, _):
            yield file


def _unpack(file: BinaryIO, folder: Path, allowed: _Allowance) -> Path:
    """Write the files of a tar file below ``folder``, and return where its capture is.

    Nothing of the archive counts but names, bytes and times of plain files. That is stricter than tarfile's own filter
    "data", which Python 3.11.2 doesn't have.
    """
    found = []
    try:
        with tarfile.open(fileobj=_Careful(file), mode="r:") as archive:
            for member in archive:
                allowed.file()
                name = names.inside(member.name)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse() or not name.parts:
                    raise UnsafeFile("it holds a link, a device or a sparse file")
                content = archive.extractfile(member)
                assert content is not None
                target = _place(folder, name)
                _copy(content, target, allowed)
                if name.name == META:
                    found.append(target)
                    os.utime(target, (member.mtime, member.mtime))
    except (tarfile.TarError, EOFError, OverflowError) as error:
        raise UnsafeFile(f"it isn't a sound tar file: {error}") from error
    if len(found) != 1:
        cause = f"It holds {len(found) or 'no'} capture{'' if len(found) == 1 else 's'}."
        raise CaptureError(cause, "Pack one capture into one file: tar -cf NAME.cwnd.tar NAME.cwnd")
    return found[0].parent


# ---- folders elsewhere ------------------------------------------------------------------------------


def _file_system(found: Located) -> Any:
    from fsspec.core import url_to_fs

    # Only the user's own URL is taken apart: one with a path of the other end in it could name any file of this host.
    return url_to_fs(found.place)[0]


def _download(found: Located, folder: Path, allowed: _Allowance) -> None:
    fs = _file_system(found)
    for path, short in found.files:
        allowed.file()
        target = _place(folder, names.inside(short))
        with fs.open(path, "rb") as source:
            _copy(source, target, allowed)
        if short == META and found.modified is not None:
            os.utime(target, (found.modified, found.modified))
