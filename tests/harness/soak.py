# SPDX-License-Identifier: Apache-2.0
"""Loads for long tests. Tests marked ``soak`` do little in ``make test``, and all of their work in ``make soak``."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tests.harness import tcp
from tests.harness.command import within
from tests.harness.disk import BLOCK, Disk, aligned

SECONDS: Final = float(os.environ.get("CWNDTRACE_SOAK_SECONDS", "0"))
"""The duration of the longest test of ``make soak``; 0 in ``make test``."""


def amount(short: int, full: int) -> int:
    """Return ``full`` in ``make soak``, and ``short`` otherwise."""
    return full if SECONDS else short


@dataclass(frozen=True)
class Read:
    """CLOCK_MONOTONIC before and after one block read, in nanoseconds."""

    begin_ns: int
    end_ns: int


def without_row(rows: pd.DataFrame, disk: Disk, reads: list[Read]) -> NDArray[np.bool_]:
    """Return for each of these reads of this process whether it has no block I/O row."""
    mine = rows[(rows["dev"] == disk.dev) & (rows["tgid"] == os.getpid())]
    starts = np.sort(mine["start_ns"].to_numpy(dtype=np.int64))
    begins, ends = (np.array([getattr(r, name) for r in reads], dtype=np.int64) for name in ("begin_ns", "end_ns"))
    counts = np.searchsorted(starts, ends, side="right") - np.searchsorted(starts, begins, side="left")
    assert (counts <= 1).all()
    return np.asarray(counts == 0)


class Load:
    """A load that runs on threads while it is entered: block reads at a steady rate, and connections that get resets.

    Captures are compared with ``reads`` and with the connections' ``sends``.
    """

    def __init__(self, disk: Disk, connections: list[tcp.TcpConnection], reads_per_s: int) -> None:
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
        """Return the sends so far that reset a window after idle time."""
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


CHURN: Final = """
import socket, struct, sys, time
rate, listener = int(sys.argv[1]), socket.create_server(("127.0.0.1", 0), backlog=1000)
abort, made, begin = struct.pack("ii", 1, 0), 0, time.monotonic()
print("ready", flush=True)
while True:
    with socket.socket() as a:
        a.connect(listener.getsockname())
        b, _ = listener.accept()
        with b:
            a.send(b"x" * 3000)
            b.recv(10000)
            # This avoids TIME_WAIT, which would soon use up the ports.
            a.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, abort)
    made += 1
    if made % 100 == 0:
        print(made, flush=True)
        time.sleep(max(0.0, begin + made / rate - time.monotonic()))
"""


class Churn:
    """A load that opens and aborts ``rate`` connections per second in a namespace while it is entered."""

    def __init__(self, space: tcp.Space, rate: int = 2000) -> None:
        command = [*within(space), sys.executable, "-c", CHURN, str(rate)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.made = 0
        self._thread = threading.Thread(target=self._count)
        self._thread.start()

    def _count(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.made = int(line) if line != "ready\n" else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()
        assert self._process.stdout
        self._process.stdout.close()
