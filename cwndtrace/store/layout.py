# SPDX-License-Identifier: Apache-2.0
"""Names, limits and identities that the writer and the reader of a capture share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from cwndtrace import format as fmt

SCHEMA_VERSION: Final = 4
"""The newest version of the format. It rises when an older reader would misread a capture, not for new columns and
tables. Since 2, ``ca_state`` of ``connections`` is text. Since 3, the first parts of a table may have been deleted.
Since 4, parts may be raw. A capture has the lowest version whose readers read it rightly."""

WINDOW_SCHEMA: Final = 3
"""The version of a capture whose first parts may be deleted, and of which none is raw."""

WHOLE_SCHEMA: Final = 2
"""The version of a capture whose parts are never deleted, and of which none is raw."""

META: Final = "meta.json"

_PARQUET: Final = ".parquet"
_RAW: Final = ".raw"
_RAW_NAME: Final = re.compile(r"_part-[0-9]{6,12}\.raw")

MOST_PART_ROWS: Final = 1 << 20
"""The most rows of one part: the writer drops rows beyond it, and the reader refuses parts whose footer counts more."""


def part_name(number: int) -> str:
    """Return the file name of a table's part; numbers begin with 1."""
    return f"part-{number:06}{_PARQUET}"


def raw_name(number: int) -> str:
    """Return the file name of the same part as long as it is raw.

    pandas, DuckDB and Spark skip names that begin with "_" in a folder that they read as Parquet.
    """
    return f"_part-{number:06}{_RAW}"


def is_raw(name: str) -> bool:
    """Return whether a file name is that of a raw part."""
    return _RAW_NAME.fullmatch(name) is not None


def final_name(name: str) -> str:
    """Return the file name that a part has, or will have, as Parquet."""
    return name[1:].removesuffix(_RAW) + _PARQUET if is_raw(name) else name


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
