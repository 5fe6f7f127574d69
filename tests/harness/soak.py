# SPDX-License-Identifier: Apache-2.0
"""How much the tests marked ``soak`` do: a little in ``make test``, all of it in ``make soak``; and a steady load."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from tests.harness import tcp
from tests.harness.disk import BLOCK, Disk, aligned

SECONDS: Final = float(os.environ.get("CWNDTRACE_SOAK_SECONDS", "0"))
"""How long the longest test of ``make soak`` runs; 0 in ``make test``."""


def amount(short: int, full: int) -> int:
    """``full`` in ``make soak``, ``short`` else."""
    return full if SECONDS else short


@dataclass(frozen=True)
class Read:
    """One block read: CLOCK_MONOTONIC before and after it, in nanoseconds."""

    begin_ns: int
    end_ns: int


class Load:
    """Block reads at a steady rate, and connections that are idle and are reset, on threads, while it is entered.

    ``reads`` and the connections' ``sends`` are the truth that a capture is held against.
    """

    def __init__(self, disk: Disk, connections: list[tcp.Connection], reads_per_s: int) -> None:
        self.reads: list[Read] = []
        self.connections = connections
        self.errors: list[BaseException] = []
        self._disk = disk
        self._pause = 1 / reads_per_s
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._guard, args=(work,)) for work in (self._read, self._idle_connections)
        ]

    def _guard(self, work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as e:
            self.errors.append(e)

    def _read(self) -> None:
        block, blocks = 0, self._disk.size // BLOCK
        with self._disk.opened() as fd, aligned(BLOCK) as buffer:
            while not self._stop.is_set():
                begin = time.monotonic_ns()
                os.preadv(fd, [buffer], block * BLOCK)
                self.reads.append(Read(begin, time.monotonic_ns()))
                block = (block + 1) % blocks
                time.sleep(self._pause)

    def _idle_connections(self) -> None:
        while not self._stop.is_set():
            for connection in self.connections:
                connection.grow()
            if self._stop.wait(0.4):
                break
            for connection in self.connections:
                connection.send()

    def resets(self) -> list[tcp.Send]:
        """The sends so far that reset a window after idle time."""
        return [s for c in self.connections for s in list(c.sends) if s.reason == "idle"]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self.errors and error is None:
            raise self.errors[0]
