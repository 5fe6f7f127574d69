# SPDX-License-Identifier: Apache-2.0
"""What the writer and the reader of a capture agree on."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cwndtrace import format as fmt

SCHEMA_VERSION: Final = 1
"""Raised when a reader of the version before would misread a capture; new columns and tables don't count."""

META: Final = "meta.json"

MOST_PART_ROWS: Final = 1 << 20
"""Rows of one part: the writer gives up on more, and the reader on parts that say that they have more."""


def part_name(number: int) -> str:
    """The file of a table's part; numbers begin with 1."""
    return f"part-{number:06}.parquet"


def show(path: Path) -> str:
    """A path for a message, without what could steer a terminal."""
    return fmt.clean(str(path))


def boot_id() -> str:
    """The kernel's name for this boot; empty where it tells none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it is gone, or dead and not yet collected."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    state, *rest = stat.rpartition(b")")[2].split()
    return None if state in (b"Z", b"X") else int(rest[18])
