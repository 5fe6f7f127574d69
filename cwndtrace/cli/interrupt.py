# SPDX-License-Identifier: Apache-2.0
"""Ending in order when a signal asks for it."""

from __future__ import annotations

import signal
import time
from typing import Any, Self


class Interrupt:
    """While it is entered, SIGINT, SIGTERM and SIGHUP set ``requested`` in place of what they did.

    A second one sets ``hurried``, a third raises KeyboardInterrupt; an end that is under way isn't spoilt by an
    impatient key. The same one once more within ``together_s`` seconds is no second one: a timeout(1) sends it to the
    process and to its group, a sudo and a terminal both pass it on. A SIGHUP that nohup has shut off stays shut off.
    """

    def __init__(self, together_s: float = 1.0) -> None:
        self._together_s = together_s
        self._count = 0
        self._last: dict[int, float] = {}
        self._old: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether there was one."""
        return self._count > 0

    @property
    def hurried(self) -> bool:
        """Whether there were two."""
        return self._count > 1

    def _handle(self, number: int, frame: Any) -> None:  # noqa: ARG002
        now = time.monotonic()
        again, self._last[number] = now - self._last.get(number, float("-inf")) < self._together_s, now
        if again:
            return
        self._count += 1
        if self._count > 2:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
