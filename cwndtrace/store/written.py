# SPDX-License-Identifier: Apache-2.0
"""Ask a running trace up to which moment its records are on disk.

The process that asks holds a lock, see flock(2), on the capture's folder, for which it needs no right but to read it.
The trace looks for such a lock at each turn, and while there is one it notes the moment in meta.json. Nobody asks most
of the time, and notes without a question would make an idle trace write to the disk.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from typing import Final

from cwndtrace.errors import CaptureError
from cwndtrace.store.layout import show
from cwndtrace.store.reader import Capture, open_capture

MOST_S: Final = 15.0
"""The longest wait for a trace's answer, in seconds."""
_AGAIN_S: Final = 0.05


def when_written(capture: Capture, moment_ns: int, most_s: float = MOST_S) -> tuple[Capture, bool]:
    """Wait until all records from before a moment of CLOCK_MONOTONIC, in ns, are on disk, at most ``most_s`` seconds.

    Returns the ``capture`` as it is then, and whether they are. They are as far as they ever will be if no process
    writes the capture any more. A trace of an earlier version gives no answer. Raises CaptureError.
    """
    deadline, path = time.monotonic() + most_s, capture.path
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CaptureError(f"{show(path)} can't be opened: {error.strerror}.", "Give another.") from error
    try:
        while True:
            if capture.status != "running" or (capture.about.written_to or 0) >= moment_ns:
                return capture, True
            if time.monotonic() >= deadline:
                return capture, False
            # Not to wait for a lock: the trace holds its own for microseconds, but a stranger's may never end.
            with suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
            time.sleep(_AGAIN_S)
            capture = open_capture(path)
    finally:
        os.close(folder)
