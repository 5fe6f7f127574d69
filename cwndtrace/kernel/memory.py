# SPDX-License-Identifier: Apache-2.0
"""Finds how much memory this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from cwndtrace.errors import NotFound
from cwndtrace.kernel import cgroups

_OWN: Final = Path("/proc/self/cgroup")


def limit() -> int:
    """Return the machine's memory in bytes, or the least limit (memory.max) of this process's cgroups v2 if it is less.

    Limits that can't be read, as those of cgroups v1, don't count.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(NotFound, OSError):
        return min([machine, *_limits(cgroups.root(), _OWN.read_text(encoding="utf-8", errors="surrogateescape"))])
    return machine


def _limits(top: Path, own: str) -> Iterator[int]:
    """Yield the limits below ``top``, a path of cgroup v2's root, of the cgroup in ``own`` (/proc/PID/cgroup)."""
    path = next((line[3:].strip("/") for line in own.splitlines() if line.startswith("0::/")), "")
    folder = top / path
    for cgroup in (folder, *folder.parents)[: len(Path(path).parts) + 1]:
        with suppress(OSError, ValueError):  # there is no file in the uppermost one, and "max" is no number
            yield int((cgroup / "memory.max").read_text(encoding="ascii"))
