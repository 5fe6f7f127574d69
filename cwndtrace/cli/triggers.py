# SPDX-License-Identifier: Apache-2.0
"""Dumps of a running trace when a signal comes or a condition holds."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from cwndtrace import privileges
from cwndtrace.capture.session import Batch
from cwndtrace.cli.conditions import Condition
from cwndtrace.cli.dump import ARRIVED_S, beside, told
from cwndtrace.errors import CaptureError, CwndtraceError
from cwndtrace.recorder import Observer
from cwndtrace.store import ThreadedWriter
from cwndtrace.store.dump import Moments, dump
from cwndtrace.store.folder import remove
from cwndtrace.store.layout import show

AFTER_S: Final = 3.0
"""The time, in seconds, that a dump has of what came after the moment that asked for it."""


class Triggers(Observer):
    """An observer that dumps the window around a moment, on a thread of its own, so that no record waits for it.

    ``asked`` returns True if a person has asked for a dump since its last call. Conditions cause at most one dump in
    ``every_s`` seconds. A dump has the last ``window_s`` seconds, or the whole trace for None. At most ``most`` are
    kept; the oldest of this trace are removed. ``read_ns`` returns the moment up to which the writer has all records,
    in ns of CLOCK_MONOTONIC. ``say`` is called on the loop's thread with a line for people, and with
    a cause and a cure where a dump failed. ``hurried`` ends the waiting for a dump at the end of the trace.
    """

    def __init__(
        self,
        writer: ThreadedWriter,
        *,
        read_ns: Callable[[], int],
        asked: Callable[[], bool],
        conditions: Sequence[Condition],
        every_s: float,
        most: int,
        window_s: float | None,
        user: privileges.User | None,
        say: Callable[..., None],
        hurried: Callable[[], bool] = lambda: False,
    ) -> None:
        self._writer = writer
        self._read_ns = read_ns
        self._asked = asked
        self._conditions = conditions
        self._every_s = every_s
        self._most = most
        self._window_s = window_s
        self._user = user
        self._say = say
        self._hurried = hurried
        self._again_s = 0.0
        self._pending: tuple[float, str] | None = None
        self._thread: threading.Thread | None = None
        self._news: queue.SimpleQueue[tuple[str, ...]] = queue.SimpleQueue()
        self._made: deque[Path] = deque()

    def turn(self, batches: list[Batch]) -> bool:
        """Look at new batches, and begin a dump that is due."""
        now = time.monotonic()
        if self._asked():
            self._ask(now, "SIGUSR1")
        for condition in self._conditions:
            if condition.met(batches, now) and now >= self._again_s:
                self._again_s = now + self._every_s
                self._ask(now, condition.text)
        if self._pending and self._read_ns() >= (self._pending[0] + AFTER_S + ARRIVED_S) * 1e9 and not self._dumping():
            self._begin(*self._pending)
        self._tell()
        return True

    def refused(self, error: CaptureError) -> None:
        """Do nothing: a disk that refuses rows is another observer's matter."""

    def finish(self, batches: list[Batch]) -> None:  # noqa: ARG002
        """Wait for a dump that was begun, and make one that is asked for."""
        self._wait()
        if self._asked():
            self._ask(time.monotonic(), "SIGUSR1")
        if self._pending and not self._hurried():
            self._begin(*self._pending)
            self._wait()
        self._tell()

    def _ask(self, now_s: float, why: str) -> None:
        if self._pending is None:
            self._pending = now_s, why

    def _begin(self, moment_s: float, why: str) -> None:
        self._pending = None
        self._thread = threading.Thread(target=self._run, args=(moment_s, why), name="dump", daemon=True)
        self._thread.start()

    def _dumping(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _wait(self) -> None:
        while self._thread is not None and self._thread.is_alive() and not self._hurried():
            self._thread.join(0.1)

    def _tell(self) -> None:
        while not self._news.empty():  # this thread is the only one that takes
            self._say(*self._news.get())

    def _run(self, moment_s: float, why: str) -> None:
        try:
            self._dump(moment_s, why)
        except CwndtraceError as e:
            self._news.put((f"the dump for {why} failed: {e.cause}", e.remedy))
        except Exception as e:  # whatever it is, the trace goes on
            self._news.put((f"the dump for {why} failed ({type(e).__name__}: {e}); the trace goes on", ""))

    def _dump(self, moment_s: float, why: str) -> None:
        self._writer.wait()
        capture = self._writer.capture()
        begin = capture.about.begin.mono_ns if capture.about.begin else 0
        end = min(int((moment_s + AFTER_S) * 1e9), time.monotonic_ns())
        start = begin if self._window_s is None else max(begin, end - int(self._window_s * 1e9))
        place = beside(self._writer.path)
        made = dump(capture, place, Moments(start, end), why=why, user=self._user)
        self._made.append(place)
        self._news.put((f"dumped to {show(place)} because of {why}: {told(made, capture)}",))
        while len(self._made) > self._most:
            oldest = self._made.popleft()
            try:
                remove(oldest, self._user)
            except FileNotFoundError:  # somebody has moved it, or removed it
                continue
            except OSError as e:
                self._news.put((f"{show(oldest)} can't be removed: {e.strerror}", "Remove it yourself."))
