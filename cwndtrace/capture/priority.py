# SPDX-License-Identifier: Apache-2.0
"""The CPU priority of the thread that empties the buffers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_NICE: Final = -10


def nice() -> int:
    """Return the calling thread's nice value, from -20 (which gets the most CPU time) to 19."""
    return os.getpriority(os.PRIO_PROCESS, 0)


@contextmanager
def raised() -> Iterator[None]:
    """Give the calling thread nice -10 until the exit, and none of the threads and processes that it starts meanwhile.

    Nothing changes where the kernel refuses it (it takes CAP_SYS_NICE or RLIMIT_NICE), or where the user has chosen
    another nice value or scheduler.
    """
    changed = _raise()
    try:
        yield
    finally:
        if changed:
            os.setpriority(os.PRIO_PROCESS, 0, 0)


def _raise() -> bool:
    if nice() != 0 or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    try:
        # What the thread starts has nice 0 again then (sched(7)).
        os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    except OSError:
        return False
    return True
