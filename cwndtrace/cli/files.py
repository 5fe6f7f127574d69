# SPDX-License-Identifier: Apache-2.0
"""Writing of files other than captures. Such a file is replaced as a whole, and only its owner can read it."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from cwndtrace.errors import CwndtraceError


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write the output of ``fill`` to ``path`` with mode 0600; if that fails, keep the old file.

    A regular file is replaced. A symbolic link that dangles or leads to a file is refused, because another user may
    have put it there. A pipe or a device is written to directly. Raises CwndtraceError.
    """
    try:
        if _is_stream(path):
            with path.open("wb") as file:
                fill(file)
        else:
            _replace(path, fill)
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise CwndtraceError(f"{path} can't be written: {reason}.", "Choose another file.") from e


def _is_stream(path: Path) -> bool:
    try:
        link = stat.S_ISLNK(path.lstat().st_mode)
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise OSError(errno.ELOOP, "it is a dangling symbolic link") from None
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if stat.S_ISREG(mode) and link:
        raise OSError(errno.ELOOP, "it is a symbolic link to a file")
    return not stat.S_ISREG(mode)


def _replace(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=".cwndtrace-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            fill(file)
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108
        raise
