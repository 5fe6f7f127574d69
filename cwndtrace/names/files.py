# SPDX-License-Identifier: Apache-2.0
"""Reads files below the host's root directory, which programs of unknown intent may have written."""

from __future__ import annotations

import errno
import json
import os
import stat
from itertools import islice
from pathlib import Path
from typing import Any, Final

from cwndtrace.kernel import host

MOST_BYTES: Final = 8 << 20
"""The most that is read of a file. A container's config has some 10 kB, a list of 10,000 containers 6 MB."""
MOST_ENTRIES: Final = 65_536


class HostFiles:
    """The files below one directory. No path and no symbolic link leads out of it (``host.opened_in``)."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def json(self, path: str) -> Any:
        """Return the content of a JSON file; None where there is no readable one, or it is too large."""
        try:
            return json.loads(self.read(path))
        except (OSError, ValueError, RecursionError):
            return None

    def read(self, path: str) -> bytes:
        """Return the content of a regular file. Raises OSError, with EFBIG for one beyond ``MOST_BYTES``."""
        # A device or a pipe isn't opened, because that may have side effects.
        place = host.opened_in(self._fd, path, os.O_PATH)
        try:
            if not stat.S_ISREG(os.fstat(place).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            with open(f"/proc/thread-self/fd/{place}", "rb") as file:  # noqa: PTH123
                content = file.read(MOST_BYTES + 1)
        finally:
            os.close(place)
        if len(content) > MOST_BYTES:
            raise OSError(errno.EFBIG, "too large", path)
        return content

    def names(self, path: str) -> list[str]:
        """Return the printable names among the first ``MOST_ENTRIES`` of a directory; none where it isn't readable."""
        try:
            fd = host.opened_in(self._fd, path, os.O_DIRECTORY)
        except OSError:
            return []
        try:
            with os.scandir(fd) as entries:
                return [name for entry in islice(entries, MOST_ENTRIES) if (name := entry.name).isprintable()]
        except OSError:
            return []
        finally:
            os.close(fd)

    def stamp(self, path: str) -> tuple[int, ...] | None:
        """Return what changes when a file or a directory changes; None where there is none."""
        try:
            fd = host.opened_in(self._fd, path, os.O_PATH)
        except OSError:
            return None
        try:
            status = os.fstat(fd)
            return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the directory."""
        os.close(self._fd)
