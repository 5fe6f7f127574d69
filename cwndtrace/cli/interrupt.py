# SPDX-License-Identifier: Apache-2.0
"""Orderly termination by signals."""

from __future__ import annotations

import signal
import time
from typing import Any, Self


class Interrupt:
    """A context manager in which SIGINT, SIGTERM and SIGHUP only set ``requested``.

    A second signal sets ``hurried``, and a third raises KeyboardInterrupt, so that one more key press doesn't break an
    orderly end. A signal that is repeated within ``together_s`` seconds counts once: timeout(1) sends it to the process
    and to its process group, and sudo and the terminal may both deliver it. SIGHUP stays ignored under nohup.
    """

    def __init__(self, together_s: float = 1.0) -> None:
        self._together_s = together_s
        self._count = 0
        self._last: dict[int, float] = {}
        self._old: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """True after the first signal."""
        return self._count > 0

    @property
    def hurried(self) -> bool:
        """True after the second signal."""
        return self._count > 1

    def _handle(self, number: int, frame: Any) -> None:  # noqa: ARG002
        now = time.monotonic()
        repeated, self._last[number] = now - self._last.get(number, float("-inf")) < self._together_s, now
        if repeated:
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
