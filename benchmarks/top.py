# SPDX-License-Identifier: Apache-2.0
"""Measure what it costs to watch a trace of 10,000 connections for a minute (needs no root).

    .venv/bin/python -m benchmarks.top

A process writes the capture as a trace does: all connections every ten seconds, eight resets and 80 block requests a
second. The full screen runs on a terminal of 120 columns and 40 rows, which this process reads away.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import struct
import subprocess
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks.common import COMMAND, BenchmarkResults, Values, cpu_seconds, status
from tests.unit.writing import written

_WANTED: Final = {f"{page}: CPU": "less than 3 %" for page in ("connections", "workloads", "devices", "resets")}
_CONNECTIONS: Final = 10_000
_SIZE: Final = (40, 120)
_SETTLED_S: Final = 15.0


class Terminal120:
    """A terminal whose output is read away; ``drawn`` is the number of bytes so far."""

    def __init__(self) -> None:
        self._own, self.descriptor = pty.openpty()
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", *_SIZE, 0, 0))
        self.drawn = 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while data := os.read(self._own, 65536):
            self.drawn += len(data)


@contextmanager
def watching(path: Path, page: str, terminal: Terminal120) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``top`` on the terminal."""
    end = terminal.descriptor
    environment = {**os.environ, "TERM": "xterm-256color"}
    command = [*COMMAND, "top", str(path), "--page", page]
    with subprocess.Popen(command, stdin=end, stdout=end, stderr=end, env=environment) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    """Measure each page, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="time to measure each page")
    asked = parser.parse_args()
    results = BenchmarkResults("top", _WANTED)
    with tempfile.TemporaryDirectory() as folder, written(Path(folder, "a.cwnd"), _CONNECTIONS):
        for page in ("connections", "workloads", "devices", "resets"):
            terminal = Terminal120()
            with watching(Path(folder, "a.cwnd"), page, terminal) as process:
                time.sleep(_SETTLED_S)
                begin, drawn, at = sum(cpu_seconds(process.pid)), terminal.drawn, time.monotonic()
                time.sleep(asked.seconds)
                took = time.monotonic() - at
                percent = (sum(cpu_seconds(process.pid)) - begin) / took * 100
                results.add(f"{page}: CPU", Values("%", [percent]))
                results.add(f"{page}: memory", status(process.pid, "VmRSS") / 1e6, "MB")
                results.add(f"{page}: drawn per second", (terminal.drawn - drawn) / took / 1e3, "kB")
    results.write()


if __name__ == "__main__":
    main()
