# SPDX-License-Identifier: Apache-2.0
"""Measure what a trace keeps of a flooded disk while it gets hardly any CPU (as root).

    sudo .venv/bin/python -m benchmarks.starved
    sudo .venv/bin/python -m benchmarks.starved --seconds 600

Eight busy processes for each CPU run beside fio, which reads a loop device over memory and has priority over all, as if
another machine's requests came in. So the trace has to read at the highest rate with a small part of a CPU. All of them
are of one session and one cgroup, as jobs of one shell are; a machine that groups tasks shares out its CPUs otherwise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from benchmarks.common import (
    COMMAND,
    START_LIMIT_S,
    BenchmarkResults,
    TracerProcess,
    Values,
    fio,
    folder,
    options,
    status,
)
from cwndtrace.store import open_capture
from tests.harness.disk import Disk, loop
from tests.harness.tcp import until

_PER_CPU: Final = 8
_BYTES: Final = 256 << 20
_WANTED = {"lost": "0", "waiting in memory at the end, and not written": "0"}
_FIGURES: Final = {
    "requests of the flood": "requests/s",
    "kept": "events",
    "lost": "events",
    "lost of all": "%",
    "waiting in memory at the end, and not written": "events",
    "the trace's CPU": "% of a CPU",
    "the trace's memory at most": "MB",
}


@contextmanager
def busy_machine() -> Iterator[None]:
    """Keep all CPUs busy until the exit, with ``_PER_CPU`` processes for each."""
    with ExitStack() as stack:
        for _ in range(_PER_CPU * (os.cpu_count() or 1)):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        yield


@contextmanager
def first() -> Iterator[None]:
    """Give what this process starts nice -20 until the exit."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, -20)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


def run(disk: Disk, seconds: float, place: Path) -> tuple[float, ...]:
    """Trace ``disk`` on a busy machine and return the values of ``_FIGURES``."""
    output = place / "trace.cwnd"
    with TracerProcess([*COMMAND, "run", "-q", "-o", str(output)], "", stdout=-3) as tracer:
        until((output / "meta.json").exists, START_LIMIT_S, f"the capture: {tracer.said()}")
        before = sum(tracer.usage())
        with busy_machine(), first():
            rate = fio(str(disk.path), seconds)["iops"]
            used = sum(tracer.usage()) - before
            memory = status(tracer.process.pid, "VmHWM")
        tracer.stop()
    meta = open_capture(output).meta
    kept, lost = (meta["counts"]["block_io"][which] for which in ("kept", "lost"))
    unwritten = sum(meta.get("unwritten", {}).values())
    return rate, kept, lost, 100 * lost / (kept + lost), unwritten, 100 * used / seconds, memory / 1e6


def main() -> None:
    """Run the benchmark and write its report."""
    asked = options(__doc__, rounds=(1, "runs"), seconds=(60.0, "length of a run in s"))
    report = BenchmarkResults("starved", _WANTED)
    figures = {what: Values(unit) for what, unit in _FIGURES.items()}
    with loop(_BYTES) as disk:
        for _ in range(asked.rounds):
            with folder() as place:
                for values, value in zip(figures.values(), run(disk, asked.seconds, place), strict=True):
                    values.all.append(value)
    for what, values in figures.items():
        report.add(what, values)
    report.write()


if __name__ == "__main__":
    main()
