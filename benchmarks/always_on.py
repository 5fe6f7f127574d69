# SPDX-License-Identifier: Apache-2.0
"""Measure what a trace that is always on costs while it is asked: scrapes of its metrics, and dumps (as root).

    sudo .venv/bin/python -m benchmarks.always_on

fio reads a loop device over memory, and connections are idle beside it. In turns nobody asks the trace, or its metrics
are read each second, or the last minute is dumped each second. What it kept of the disk's requests is compared.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Final

from benchmarks.common import COMMAND, METRICS, BenchmarkResults, TracerProcess, Values, fio, folder, options, size
from benchmarks.tcp import connected
from cwndtrace.store import open_capture
from tests.harness.disk import Disk, loop

_TURNS: Final = ("nobody asks", "scraped each second", "dumped each second")
_WANTED: Final = {f"{turn}: lost": "0" for turn in _TURNS}
_BYTES: Final = 256 << 20
_AT: Final = re.compile(r"http://127\.0\.0\.1:(\d+)/metrics")
_PAUSE_S: Final = 1.0


class AlwaysOn:
    """Runs of fio beside a trace, and what was found in them."""

    def __init__(self, disk: Disk, seconds: float) -> None:
        self._disk, self._seconds = disk, seconds
        self.figures: dict[str, Values] = {}

    def note(self, what: str, unit: str, value: float) -> None:
        """Keep one measurement."""
        self.figures.setdefault(what, Values(unit)).all.append(value)

    def run(self, name: str, ask: Callable[[int, Path], None] | None) -> None:
        """Trace while fio reads, and call ``ask`` each second with the port of the metrics and the capture."""
        untraced = fio(str(self._disk.path), self._seconds)["iops"]
        with folder() as place:
            output, stop = place / "trace.cwnd", threading.Event()
            command = [*COMMAND, "run", "--keep", "2m", *METRICS, "-o", str(output)]
            with TracerProcess(command, "/metrics") as tracer:
                found = _AT.search(tracer.said())
                if found is None:
                    raise SystemExit(f"the trace named no port: {tracer.said()[-400:]}")

                def asking() -> None:
                    while ask is not None and not stop.wait(_PAUSE_S):
                        ask(int(found[1]), output)

                thread = threading.Thread(target=asking)
                thread.start()
                before = sum(tracer.usage())
                got = fio(str(self._disk.path), self._seconds)
                cpu = sum(tracer.usage()) - before
                stop.set()
                thread.join()
            counts = open_capture(output).meta["counts"]["block_io"]
        self.note(f"{name}: traced / untraced IOPS", "", got["iops"] / untraced)
        self.note(f"{name}: the trace's CPU for each request", "us", cpu / got["requests"] * 1e6)
        self.note(f"{name}: lost", "events", counts["lost"])

    def scrape(self, port: int, _: Path) -> None:
        """Read the metrics once."""
        begin = time.monotonic()
        with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as client:
            client.request("GET", "/metrics")
            text = client.getresponse().read()
        self.note("a scrape", "ms", 1000 * (time.monotonic() - begin))
        self.note("a scrape's length", "kB", len(text) / 1e3)

    def dump(self, _: int, output: Path) -> None:
        """Dump the last minute once."""
        with folder() as place:
            begin = time.monotonic()
            command = [*COMMAND, "dump", str(output), "--last", "1m", "-o", str(place / "dump.cwnd")]
            subprocess.run(command, check=True, capture_output=True)
            self.note("a dump, start of the command included", "s", time.monotonic() - begin)
            self.note("requests in a dump", "events", open_capture(place / "dump.cwnd").rows("block_io"))
            self.note("a dump's size", "MB", size(place / "dump.cwnd") / 1e6)


def main() -> None:
    """Run the benchmark and write its report."""
    asked = options(__doc__, connections=(5000, "number of idle connections"))
    report = BenchmarkResults("always_on", _WANTED)
    with loop(_BYTES) as disk, connected(asked.connections):
        runs = AlwaysOn(disk, max(asked.seconds, 3 * _PAUSE_S))
        for _ in range(asked.rounds):
            for turn, ask in zip(_TURNS, (None, runs.scrape, runs.dump), strict=True):
                runs.run(turn, ask)
    for what, values in runs.figures.items():
        report.add(what, values)
    report.write()


if __name__ == "__main__":
    main()
