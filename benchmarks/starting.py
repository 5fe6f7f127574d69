# SPDX-License-Identifier: Apache-2.0
"""Measure the start-up time, compared with other tracers, and the cost of tracing while nothing happens (as root).

sudo .venv/bin/python -m benchmarks.starting
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.common import (
    COMMAND,
    METRICS,
    BenchmarkResults,
    TracerProcess,
    Values,
    biosnoops,
    cpu_seconds,
    folder,
    has,
    options,
    paired,
    status,
)
from cwndtrace.capture import program_cache
from tests.harness.processes import children

_WANTED = {
    "cwndtrace --help": "at most 0.15 s",
    "cwndtrace run": "at most 1.0 s",
    "idle: CPU": "at most 0.5 % of a core",
    "idle: memory": "at most 160 MB",
}
_BPFTRACE = (
    'BEGIN { printf("attached\\n"); } tracepoint:block:block_io_start { @s[args->dev, args->sector] = nsecs; } '
    "tracepoint:block:block_io_done { delete(@s[args->dev, args->sector]); }"
)


def help_s() -> float:
    """Return the wall-clock time of ``cwndtrace --help`` in s."""
    begin = time.monotonic()
    subprocess.run([*COMMAND, "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - begin


def attached_s(*command: str, ready: str) -> float:
    """Return the time in s from the start of a tracer until it prints ``ready``."""
    with TracerProcess(list(command), ready) as tracer:
        return tracer.started_s


def cwndtrace_s(*extra: str, fresh: bool = False) -> float:
    """Return the same time for ``cwndtrace run``; with ``fresh``, that of the first start, which compiles."""
    if fresh:
        shutil.rmtree(program_cache.FOLDER, ignore_errors=True)
    with folder() as place:
        return attached_s(*COMMAND, "run", "-o", str(place / "a.cwnd"), *extra, ready="Tracing ")


def family(tracer: TracerProcess) -> list[int]:
    """Return the pids of the tracer and its children."""
    pid = tracer.process.pid
    return [pid, *children(pid)]


def used(tracer: TracerProcess) -> float:
    """Return the CPU time of the tracer and its children, in s."""
    return sum(sum(cpu_seconds(pid)) for pid in family(tracer))


def pss(pid: int) -> int:
    """Return the proportional set size of a process in bytes: shared pages count in part."""
    match = re.search(r"^Pss:\s*(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def idle(report: BenchmarkResults, seconds: float, *extra: str) -> None:
    """Report CPU and memory of ``cwndtrace run`` with further options, while nothing happens."""
    what = " ".join(["idle", *extra[:1]])
    with folder() as place, TracerProcess([*COMMAND, "run", "-o", str(place / "a.cwnd"), *extra], "Tracing ") as tracer:
        time.sleep(3)  # leave out the imports of the first snapshot
        before = used(tracer)
        time.sleep(seconds)
        spent = used(tracer) - before
        report.add(f"{what}: CPU", 100 * spent / seconds, "% of a core")
        report.add(f"{what}: memory", status(tracer.process.pid, "VmRSS") / 1e6, "MB")
        together = sum(map(pss, family(tracer))) / 1e6
        report.add(f"{what}: memory of both processes, what they share counted once", together, "MB")


def main() -> None:
    """Run the benchmark and write its report."""
    asked = options(__doc__, idle=(20.0, "seconds of tracing while nothing happens"))
    report = BenchmarkResults("starting", _WANTED)
    report.add("cwndtrace --help", Values("s", [help_s() for _ in range(asked.rounds)]))
    ways: dict[str, Callable[[], float]] = {
        "cwndtrace run, first start": partial(cwndtrace_s, fresh=True),
        "cwndtrace run": cwndtrace_s,
        "cwndtrace run --metrics": partial(cwndtrace_s, *METRICS),
    }
    if has("bpftrace"):
        ways["bpftrace, two block tracepoints"] = partial(attached_s, "bpftrace", "-e", _BPFTRACE, ready="attached")
    for name, command in biosnoops().items():
        # Its only sign of being attached is its header, which would stay in its output buffer while nothing happens.
        at_once = ("env", "PYTHONUNBUFFERED=1", "stdbuf", "-oL")
        ways[name] = partial(attached_s, *at_once, *command, ready="TIME(s)")
    for name in [n for n in ways if not n.startswith("cwndtrace")]:
        try:
            ways[name]()
        except SystemExit as e:
            report.add(f"{name} doesn't run here", str(e)[:200])
            del ways[name]
    for what, values in paired(ways, asked.rounds, "cwndtrace run", "s").items():
        report.add(what, values)
    idle(report, asked.idle)
    idle(report, asked.idle, *METRICS)
    report.write()


if __name__ == "__main__":
    main()
