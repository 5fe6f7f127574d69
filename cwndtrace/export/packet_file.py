# SPDX-License-Identifier: Apache-2.0
"""Opening a file of captured packets, and its errors with cause and remedy."""

from __future__ import annotations

import gzip
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from cwndtrace.errors import CwndtraceError
from cwndtrace.export.pcapng import Damaged

_GZIP = b"\x1f\x8b"


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file of packets for reading, decompressed if gzip made it.

    Raises CwndtraceError where it can't be read, also where Damaged is raised in the context.
    """
    with ExitStack() as stack:
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                cause = f"{path} isn't a regular file, and it has to be read twice."
                raise CwndtraceError(cause, "Save the packets to a file first.")
            file = stack.enter_context(path.open("rb"))
            compressed = file.read(2) == _GZIP
            file.seek(0)
        except OSError as e:
            cure = "Give a file of packets that you can read."
            raise CwndtraceError(f"{path} can't be read: {e.strerror}.", cure) from e
        try:
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file)) if compressed else file
        except Damaged as e:
            cure = "If it was cut off, or is still written, take the packets before that: editcap -F pcapng IN OUT"
            raise CwndtraceError(f"{path} can't be read: {e}.", cure) from e
