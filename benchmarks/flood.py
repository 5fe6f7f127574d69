# SPDX-License-Identifier: Apache-2.0
"""Measure how many events a second the complete path keeps: BPF slabs, ring buffer, Arrow, Parquet (as root).

    sudo .venv/bin/python -m benchmarks.flood

A process makes system calls at a given rate, and each becomes a record in the slabs of block I/O (flood.bpf.c).
This needs at least two CPUs, one for the process and one for the tracer.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import cwndtrace
from benchmarks.common import BenchmarkResults, folder, options, size, status
from cwndtrace.capture import live
from cwndtrace.capture.block_program import BlockProgram
from cwndtrace.capture.connections import snapshot
from cwndtrace.capture.session import Session, describe, ending
from cwndtrace.capture.source import Filters
from cwndtrace.cli.live import BlockFigures
from cwndtrace.kernel import ladder
from cwndtrace.store import CaptureWriter, ThreadedWriter

_WANTED = {
    "highest rate kept without loss": "at least 1,000,000 events/s",
    "highest rate offered": "more than 1,500,000 events/s",
    "memory at most": "at most 300 MB",
}
_GENERATOR = """
import os, sys, time
from itertools import repeat
sys.stdin.readline()
rate, seconds = float(sys.argv[1]), float(sys.argv[2])
call, step = os.getppid, 0.001
begin = time.monotonic()
made = 0
while (now := time.monotonic() - begin) < seconds:
    # A step has at most the calls of 4 ms, so that no burst follows a pause.
    due = min(int(now * rate) - made, int(rate * 0.004) + 1)
    for _ in repeat(None, due):
        call()
    made += due
    if rate * (time.monotonic() - begin) < made + rate * step / 2:
        time.sleep(step / 4)
print(made / (time.monotonic() - begin))
"""


def run(rate: float, seconds: float, place: Path) -> dict[str, float]:
    """Run one flood, and return the rate offered, events kept and lost, CPU in us and bytes an event, memory in MB."""
    generator = subprocess.Popen(
        [sys.executable, "-c", _GENERATOR, str(rate), str(seconds)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    flooded = BlockProgram(
        "sys_enter",
        Path(__file__).with_name("flood.bpf.c"),
        (ladder.Attachment("raw_tracepoint", "sys_enter", "on_sys_enter"),),
        {"FLOOD_TGID": generator.pid},
    )
    snapshot(Filters(), 0)  # as run does: it loads modules for which the first records would otherwise wait
    with Session(live.Kernel(reasons=(), block_program=flooded)) as session:
        kept_by = CaptureWriter.create(place, describe(session, Filters(), cwndtrace.__version__))
        writer = ThreadedWriter(kept_by)
        figures, done, rates = BlockFigures(), threading.Event(), list[float]()

        def flood() -> None:
            rates.append(float(generator.communicate("go\n")[0]))
            done.set()

        thread = threading.Thread(target=flood)
        before = resource.getrusage(resource.RUSAGE_SELF)
        thread.start()
        most = 0
        while not done.is_set():
            for batch in session.step():
                writer.add(batch.event, batch.rows)
                if batch.event == "block_io":  # the names of processes come as tables
                    figures.add(batch)
            writer.flush()
            most = max(most, status(os.getpid(), "VmRSS"))
        for batch in session.finish():
            writer.add(batch.event, batch.rows)
        figures.count()
        writer.close("complete", **ending(session))
        thread.join()
        after = resource.getrusage(resource.RUSAGE_SELF)
        kept, lost = session.tally.kept["block_io"], session.tally.lost["block_io"]
    return {
        "offered": rates[0],
        "kept": kept,
        "lost": lost + kept_by.lost["block_io"],
        "on disk": cwndtrace.store.open_capture(place).rows("block_io"),
        "user": (after.ru_utime - before.ru_utime) / max(kept, 1) * 1e6,
        "system": (after.ru_stime - before.ru_stime) / max(kept, 1) * 1e6,
        "bytes": size(place / "block_io") / max(kept, 1),
        "memory": most / 1e6,
    }


def main() -> None:
    """Run the benchmark and write its report."""
    asked = options(__doc__, rates=("0.25e6,0.5e6,1e6,1.25e6,1.5e6,2e6,4e6", "events a second to offer"))
    report = BenchmarkResults("flood", _WANTED)
    best, offered, memory = 0.0, 0.0, 0.0
    print(f"{'OFFERED/s':>12} {'KEPT/s':>12} {'LOST':>8} {'USER us':>8} {'SYS us':>8} {'BYTES':>6} {'MB':>6}")
    for rate in (float(text) for text in asked.rates.split(",")):
        with folder() as place:
            got = run(rate, asked.seconds, place / "flood.cwnd")
        if got["kept"] != got["on disk"]:
            raise SystemExit(f"{got['kept']:,} records were kept, but {got['on disk']:,} are on disk")
        share = got["lost"] / (got["kept"] + got["lost"])
        kept = got["offered"] * (1 - share)
        print(
            f"{got['offered']:>12,.0f} {kept:>12,.0f} {share:>8.2%} {got['user']:>8.3f} {got['system']:>8.3f} "
            f"{got['bytes']:>6.1f} {got['memory']:>6.0f}",
            flush=True,
        )
        report.figures[f"at {rate:,.0f}/s"] = got
        best = max(best, got["offered"] if not got["lost"] else 0)
        offered, memory = max(offered, got["offered"]), max(memory, got["memory"])
    report.add("highest rate kept without loss", best, "events/s")
    report.add("highest rate offered", offered, "events/s")
    report.add("memory at most", memory, "MB")
    report.write()


if __name__ == "__main__":
    main()
