# SPDX-License-Identifier: Apache-2.0
"""How long starting takes beside the peers, and what a trace costs while nothing happens (as root).

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
    Report,
    Running,
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
from tests.live.test_overload import children

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
    """Seconds of wall clock."""
    begin = time.monotonic()
    subprocess.run([*COMMAND, "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - begin


def attached_s(*command: str, ready: str) -> float:
    """From the command to the line that says that it records."""
    with Running(list(command), ready) as tracer:
        return tracer.started_s


def cwndtrace_s(fresh: bool = False) -> float:
    """The same of ``cwndtrace run``; ``fresh`` as on its very first start."""
    if fresh:
        shutil.rmtree(program_cache.FOLDER, ignore_errors=True)
    with folder() as place:
        return attached_s(*COMMAND, "run", "-o", str(place / "a.cwnd"), ready="Tracing ")


def family(tracer: Running) -> list[int]:
    """The process and those that it started."""
    pid = tracer.process.pid
    return [pid, *children(pid)]


def used(tracer: Running) -> float:
    """Seconds of CPU of all of these."""
    return sum(sum(cpu_seconds(pid)) for pid in family(tracer))


def pss(pid: int) -> int:
    """Bytes in memory, of shared ones its share."""
    match = re.search(r"^Pss:\s*(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def main() -> None:
    """Measure and report."""
    asked = options(__doc__, idle=(20.0, "seconds of doing nothing"))
    report = Report("starting", _WANTED)
    report.add("cwndtrace --help", Values("s", [help_s() for _ in range(asked.rounds)]))
    ways: dict[str, Callable[[], float]] = {
        "cwndtrace run, first start": partial(cwndtrace_s, True),
        "cwndtrace run": cwndtrace_s,
    }
    if has("bpftrace"):
        ways["bpftrace, two block tracepoints"] = partial(attached_s, "bpftrace", "-e", _BPFTRACE, ready="attached")
    for name, command in biosnoops().items():
        # It says that it is attached by its header alone, and that lies in a buffer if nothing is done.
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
    with folder() as place, Running([*COMMAND, "run", "-o", str(place / "a.cwnd")], "Tracing ") as tracer:
        time.sleep(3)  # the imports of the first snapshot aren't idling
        before = used(tracer)
        time.sleep(asked.idle)
        spent = used(tracer) - before
        report.add("idle: CPU", 100 * spent / asked.idle, "% of a core")
        report.add("idle: memory", status(tracer.process.pid, "VmRSS") / 1e6, "MB")
        report.add(
            "idle: memory of both processes, what they share counted once", sum(map(pss, family(tracer))) / 1e6, "MB"
        )
    report.write()


if __name__ == "__main__":
    main()
