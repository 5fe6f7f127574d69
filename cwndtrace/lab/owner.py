# SPDX-License-Identifier: Apache-2.0
"""Names for what the lab makes, from which the next start can tell whose it was and whether that one is gone."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

PREFIX: Final = "cwt"
_NAME: Final = re.compile(rf"{PREFIX}-(\d+)-([0-9a-f]+)-(\d+)(?:-[a-z]+)?$")
_serial = itertools.count(1)


def started(pid: int) -> int:
    """When a process started, in clock ticks since boot; raises OSError once it is gone."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    # comm may hold spaces and brackets: count from the last bracket. Field 22 of proc(5).
    return int(stat.rpartition(")")[2].split()[19])


@dataclass(frozen=True)
class Owner:
    """Who made something: a process, by pid and start (pids come round again), and which of its labs it was."""

    pid: int
    start: int
    serial: int

    @classmethod
    def new(cls) -> Self:
        """This process, with the next serial number."""
        return cls(os.getpid(), started(os.getpid()), next(_serial))

    @classmethod
    def of(cls, name: str) -> Self | None:
        """The owner that a name tells of; None for a name that isn't the lab's."""
        match = _NAME.fullmatch(name)
        return cls(int(match[1]), int(match[2], 16), int(match[3])) if match else None

    def name(self, what: str = "") -> str:
        """A name for ``what`` (lower-case letters): ``cwt-PID-START-SERIAL-what``."""
        return f"{PREFIX}-{self.pid}-{self.start:x}-{self.serial}" + (f"-{what}" if what else "")

    @property
    def alive(self) -> bool:
        """Whether that very process is still there."""
        try:
            return started(self.pid) == self.start
        except OSError:
            return False
