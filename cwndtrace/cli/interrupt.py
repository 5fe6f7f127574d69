# SPDX-License-Identifier: Apache-2.0
"""Signals: orderly termination, and requests."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any, Self

from cwndtrace.format import plural


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

    @property
    def signals(self) -> int:
        """How many signals have come."""
        return self._count

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


class Patience:
    """How long the end of a trace may make Parquet of raw parts: until the next signal.

    ``say`` is told once that this happens, if it takes more than a second.
    """

    def __init__(self, interrupt: Interrupt, say: Callable[[str], None]) -> None:
        self._interrupt = interrupt
        self._say = say
        self._begun: tuple[float, int] | None = None
        self._said = False

    def left(self, rows: int) -> bool:
        """Return whether to go on with this many rows."""
        if self._begun is None:
            self._begun = time.monotonic(), self._interrupt.signals
        begun_s, signals = self._begun
        if not self._said and time.monotonic() - begun_s > 1.0:
            self._said = True
            self._say(f"Making Parquet of {plural(rows, 'record')} that came too fast (Ctrl-C leaves them as they are)")
        return self._interrupt.signals == signals


class DumpSignal:
    """A context manager in which SIGUSR1, which otherwise ends a process, is a request for a dump."""

    def __init__(self) -> None:
        self._asked = False
        self._old: Any = None

    def taken(self) -> bool:
        """Return True if the signal has come since the last call, once or more often."""
        asked, self._asked = self._asked, False
        return asked

    def _handle(self, number: int, frame: Any) -> None:  # noqa: ARG002
        self._asked = True

    def __enter__(self) -> Self:
        self._old = signal.signal(signal.SIGUSR1, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGUSR1, self._old)
