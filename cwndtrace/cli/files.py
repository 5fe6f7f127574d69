# SPDX-License-Identifier: Apache-2.0
"""The files that commands leave besides captures: whole or not at all, and for nobody but their owner."""

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
    """Have ``path`` hold what ``fill`` writes, with mode 0600, and leave what was there where that fails.

    A file of that name is replaced, and nothing is written through a link to one: somebody else may have put it there.
    A pipe or a device is written into. Raises CwndtraceError.
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
        kind = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise OSError(errno.ELOOP, "it is a symbolic link that leads nowhere") from None
        return False
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if stat.S_ISREG(kind) and link:
        raise OSError(errno.ELOOP, "it is a symbolic link to a file")
    return not stat.S_ISREG(kind)


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
