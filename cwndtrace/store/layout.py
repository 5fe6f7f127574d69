# SPDX-License-Identifier: Apache-2.0
"""Names, limits and identities that the writer and the reader of a capture share."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cwndtrace import format as fmt

SCHEMA_VERSION: Final = 2
"""The version of the format. It rises when an older reader would misread a capture, not for new columns and tables.
Since 2, ``ca_state`` of ``connections`` is text."""

META: Final = "meta.json"

MOST_PART_ROWS: Final = 1 << 20
"""The most rows of one part: the writer drops rows beyond it, and the reader refuses parts whose footer counts more."""


def part_name(number: int) -> str:
    """Return the file name of a table's part; numbers begin with 1."""
    return f"part-{number:06}.parquet"


def show(path: Path) -> str:
    """Return a path as text for a message, without control characters."""
    return fmt.clean(str(path))


def boot_id() -> str:
    """Return the kernel's id of this boot; empty where it can't be read."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def process_start(pid: int) -> int | None:
    """Return a process's start time in clock ticks since boot; None if it has ended, even if it is still a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # Field 22 of /proc/PID/stat in proc(5). comm may hold spaces and brackets, so count from the last bracket.
    state, *rest = stat.rpartition(b")")[2].split()
    return None if state in (b"Z", b"X") else int(rest[18])
