# SPDX-License-Identifier: Apache-2.0
"""Names for what the lab makes, from which a later run can tell if the process that made it has ended."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass
from typing import Final, Self

from cwndtrace.store.layout import process_start

PREFIX: Final = "cwt"
_NAME: Final = re.compile(rf"{PREFIX}-(\d+)-([0-9a-f]+)-(\d+)(?:-[a-z]+)?$")
_serial = itertools.count(1)


@dataclass(frozen=True)
class Owner:
    """The lab that made something: a process's pid and start time, as pids are reused, and a serial number in it."""

    pid: int
    start: int
    serial: int

    @classmethod
    def new(cls) -> Self:
        """Return an owner for this process with the next serial number."""
        return cls(os.getpid(), process_start(os.getpid()) or 0, next(_serial))

    @classmethod
    def of(cls, name: str) -> Self | None:
        """Return the owner from a name that ``name`` made; None for any other name."""
        match = _NAME.fullmatch(name)
        return cls(int(match[1]), int(match[2], 16), int(match[3])) if match else None

    def name(self, what: str = "") -> str:
        """Return a name for ``what`` (lower-case letters): ``cwt-PID-START-SERIAL-what``."""
        return f"{PREFIX}-{self.pid}-{self.start:x}-{self.serial}" + (f"-{what}" if what else "")

    @property
    def alive(self) -> bool:
        """True if this process is still running, and its pid not reused."""
        return process_start(self.pid) == self.start
