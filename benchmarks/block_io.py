# SPDX-License-Identifier: Apache-2.0
"""Measure the cost of tracing block I/O beside perf, bpftrace, trace-cmd and biosnoop in the same run (as root).

    sudo .venv/bin/python -m benchmarks.block_io

fio reads 4 KiB at random, at queue depth 32, from a loop device over memory. That is about the fastest device there is,
so the cost of a tracer is visible. Each tracer's run follows an untraced one. ``--device`` names another device to
read, such as one of null_blk; then neither programs nor encodings are measured by themselves.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import (
    COMMAND,
    METRICS,
    START_LIMIT_S,
    BenchmarkResults,
    TracerProcess,
    Values,
    biosnoops,
    fio,
    folder,
    has,
    options,
    size,
)
from cwndtrace.capture.block_program import BLOCK_IO, BLOCK_IO_OLD, BLOCK_PROGRAMS, BlockProgram
from cwndtrace.capture.live import Kernel
from cwndtrace.capture.session import Session
from cwndtrace.capture.source import TICK_SECONDS
from cwndtrace.kernel import ladder
from cwndtrace.store import open_capture
from tests.harness.disk import Disk, loop
from tests.harness.sysctl import sysctl
from tests.harness.tcp import until

_BYTES: Final = 256 << 20
_WANTED = {
    "IOPS: cwndtrace / untraced": "at least 0.95",
    "cwndtrace: user CPU an event": "at most 0.4 us",
    "cwndtrace: bytes an event": "at most 20",
    "cwndtrace: lost": "0",
    "cwndtrace: kept + lost - diskstats": "0",
}
_BPFTRACE: Final = (
    'BEGIN { printf("attached\\n"); } '
    "tracepoint:block:block_io_start { @s[args->dev, args->sector] = nsecs; @c[args->dev, args->sector] = comm; } "
    "tracepoint:block:block_io_done /@s[args->dev, args->sector]/ "
    '{ printf("%s %d %d\\n", @c[args->dev, args->sector], nsecs, (nsecs - @s[args->dev, args->sector]) / 1000); '
    "delete(@s[args->dev, args->sector]); delete(@c[args->dev, args->sector]); } END { clear(@s); clear(@c); }"
)


def cwndtrace_run(disk: Disk, seconds: float, place: Path, *extra: str) -> dict[str, float]:
    """Run fio under ``cwndtrace run`` and return its figures; CPU is that of the whole process, in us an event."""
    output = place / "trace.cwnd"
    before = disk.stat()
    with TracerProcess([*COMMAND, "run", "-q", "-o", str(output), *extra], "", stdout=-3) as tracer:
        _until_written(tracer, output)
        _until_idle(tracer)
        used = tracer.usage()
        got = fio(str(disk.path), seconds)
        now = tracer.usage()
        tracer.stop()
    counted = disk.stat() - before
    capture = open_capture(output)
    counts = capture.meta["counts"]["block_io"]
    kept = sum(1 for dev in capture.table("block_io", ["dev"])["dev"].to_pylist() if dev == disk.dev)
    return {
        "iops": got["iops"],
        "p99_us": got["p99_us"],
        "user": (now[0] - used[0]) / kept * 1e6,
        "system": (now[1] - used[1]) / kept * 1e6,
        "bytes": size(output / "block_io") / counts["kept"],
        "kept": kept,
        "lost": counts["lost"],
        "off": kept + counts["lost"] - counted.reads - counted.writes - counted.discards,
    }


def _until_written(tracer: TracerProcess, output: Path) -> None:
    until((output / "meta.json").exists, START_LIMIT_S, f"the capture: {tracer.said()}")


def _until_idle(tracer: TracerProcess) -> None:
    """Wait until the tracer has imported what it needs only later, which takes an emulated CPU many seconds."""

    def idle() -> bool:
        before = sum(tracer.usage())
        time.sleep(0.5)
        return sum(tracer.usage()) - before < 0.05

    until(idle, START_LIMIT_S, "the tracer to be idle")


@dataclass(frozen=True)
class Peer:
    """Another tracer: the text it prints when it is attached, its output file, and the command that lists that file.

    A tracer without such a command prints its records, and its output goes to the file.
    """

    command: list[str]
    ready: str
    file: Path
    lists: tuple[str, ...] = ()

    def kept(self) -> int:
        """Return how many of fio's requests the tracer kept; of a trace's two events for each, one is counted."""
        with subprocess.Popen(
            [*(self.lists or ("cat",)), str(self.file)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as listing:
            assert listing.stdout is not None
            return sum(b"fio" in line and (not self.lists or b"block_io_start" in line) for line in listing.stdout)


def peer(which: Peer, disk: Disk, seconds: float) -> dict[str, float]:
    """Run fio under another tracer and return its figures; ``kept`` is the share of the requests that it kept."""
    with (
        which.file.open("w") as written,
        TracerProcess(
            which.command, which.ready if which.lists else "", **({} if which.lists else {"stdout": written})
        ) as tracer,
    ):
        if not which.lists:
            _until_printed(tracer, which, disk)
        got = fio(str(disk.path), seconds)
        tracer.stop()
    kept = which.kept()
    return {"iops": got["iops"], "bytes": size(which.file) / max(kept, 1), "kept": kept / got["requests"]}


def _until_printed(tracer: TracerProcess, which: Peer, disk: Disk) -> None:
    def ready() -> bool:
        time.sleep(0.1)  # bcc compiles, which needs all of an emulated machine's CPU
        disk.read(*range(128))  # the output for these reads flushes the header from the tracer's buffer
        return which.ready in which.file.read_text() or tracer.process.poll() is not None

    until(ready, START_LIMIT_S, f"{which.command} attached")
    if tracer.process.poll() is not None:
        raise SystemExit(which.file.read_text().strip()[-300:])


def peers(place: Path, disk: Disk) -> dict[str, Peer]:
    """Return the other tracers that are installed, by name."""
    tracers = {}
    events = ["-e", "block:block_io_start", "-e", "block:block_io_done"]
    if has("perf"):
        file = place / "perf.data"
        lists = ("perf", "script", "-F", "comm,event", "-i")
        tracers["perf record"] = Peer(["perf", "record", "-q", "-a", *events, "-o", str(file)], "", file, lists)
    if has("trace-cmd"):
        file = place / "trace.dat"
        command = ["stdbuf", "-oL", "trace-cmd", "record", *events, "-o", str(file)]
        tracers["trace-cmd"] = Peer(command, "Hit Ctrl^C", file, ("trace-cmd", "report", "-i"))
    if has("bpftrace"):
        tracers["bpftrace printing"] = Peer(["bpftrace", "-e", _BPFTRACE], "attached", place / "bpftrace.txt")
    for name, command in biosnoops().items():
        tracers[name] = Peer([*command, "-d", disk.path.name], "TIME(s)", place / "biosnoop.txt")
    return tracers


def in_kernel(report: BenchmarkResults, disk: Disk, seconds: float) -> None:
    """Report the time of each BPF program in ns a run, which includes the time that the counting itself takes."""
    for program in BLOCK_PROGRAMS:
        with sysctl("kernel.bpf_stats_enabled", 1), Session(Kernel(reasons=(), block_program=program)) as session:
            with _drained(session, 2):
                fio(str(disk.path), seconds)
            kernel = session.source
            assert isinstance(kernel, Kernel)
            for name, (runs, spent) in sorted(kernel.run_times().items()):
                if runs:
                    label = f"in the kernel, {program.name}: {name}"
                    report.add(label, spent / runs, "ns a run, the counting included")
            session.finish()


EMPTY: Final = BlockProgram(
    "block_io_start",
    Path(__file__).with_name("empty.bpf.c"),
    tuple(
        ladder.Attachment("tp_btf", target, program)
        for target, program in (
            ("block_io_done", "empty_done"),
            ("block_rq_issue", "empty_issue"),
            ("block_io_start", "empty_start"),
        )
    ),
)
"""Programs that do nothing on the same tracepoints."""


def layers(report: BenchmarkResults, disk: Disk, rounds: int, seconds: float) -> None:
    """Report the share of the untraced rate that remains with empty programs, the real ones, and Arrow conversion."""
    ways = {
        "empty programs": (EMPTY, 0),
        "the programs, what they hand over thrown away": (BLOCK_IO, 1),
        "and made Arrow": (BLOCK_IO, 2),
        "the programs for kernels before 6.5, thrown away": (BLOCK_IO_OLD, 1),
    }
    found = {name: Values() for name in ways}
    for _ in range(rounds):
        for name, (program, depth) in ways.items():
            base = fio(str(disk.path), seconds)["iops"]
            with Session(Kernel(reasons=(), block_program=program)) as session, _drained(session, depth):
                found[name].all.append(fio(str(disk.path), seconds)["iops"] / base)
    for name, values in found.items():
        report.add(f"of untraced IOPS: {name}", values)


@contextmanager
def _drained(session: Session, depth: int) -> Iterator[None]:
    """Run a thread that reads the ring buffer (depth 1), or also converts it to batches (2), until the exit."""
    stop = threading.Event()

    def drain() -> None:
        while not stop.wait(0 if depth else 0.1):
            if depth == 1:
                session.source.poll(TICK_SECONDS)
            elif depth:
                session.step()

    thread = threading.Thread(target=drain)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def encodings(report: BenchmarkResults, table: pa.Table, place: Path) -> None:
    """Report bytes and CPU an event of codecs and encodings, for one part of a real capture."""
    clocks = ("time", "start_ns", "issue_ns", "done_ns")
    dictionary = [name for name in table.column_names if name not in (*clocks, "sector")]
    delta = {"use_dictionary": dictionary, "column_encoding": dict.fromkeys(clocks, "DELTA_BINARY_PACKED")}
    split = {"use_dictionary": dictionary, "column_encoding": dict.fromkeys(clocks, "BYTE_STREAM_SPLIT")}
    ways: dict[str, dict[str, Any]] = {
        "dictionaries everywhere, zstd": {"compression": "zstd"},
        "clocks as differences, no codec": {**delta, "compression": "none"},
        "clocks as differences, lz4": {**delta, "compression": "lz4"},
        "clocks as differences, snappy": {**delta, "compression": "snappy"},
        "clocks as differences, zstd (taken)": {**delta, "compression": "zstd"},
        "clocks as differences, zstd level 3": {**delta, "compression": "zstd", "compression_level": 3},
        "the same, row groups of 16,384": {**delta, "compression": "zstd", "row_group_size": 16_384},
        "clocks by byte streams, zstd": {**split, "compression": "zstd"},
    }
    file = place / "part.parquet"
    for what, how in ways.items():
        spent = []
        for _ in range(5):
            begin = time.process_time()
            pq.write_table(table, file, write_page_checksum=True, **how)
            spent.append((time.process_time() - begin) / len(table) * 1e6)
        report.add(f"Parquet: {what}: bytes", size(file) / len(table), "bytes an event")
        report.add(f"Parquet: {what}: CPU", Values("us an event", spent))


def main() -> None:
    """Run the benchmark and write its report."""
    asked = options(__doc__, device=("", "block device to read; default: a loop device"))
    report = BenchmarkResults("block_io", _WANTED)
    given = nullcontext(Disk(Path(asked.device), -1, 0)) if asked.device else loop(_BYTES)
    with given as disk, folder() as place:
        fio(str(disk.path), 1)
        ways: dict[str, Callable[[], dict[str, float]]] = {
            "untraced": partial(fio, str(disk.path), asked.seconds),
            "cwndtrace": partial(cwndtrace_run, disk, asked.seconds, place),
            "cwndtrace --metrics": partial(cwndtrace_run, disk, asked.seconds, place, *METRICS),
        }
        for name, which in peers(place, disk).items():
            ways[name] = partial(peer, which, disk, asked.seconds)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        table = None
        for _ in range(asked.rounds):
            for name, way in list(ways.items()):
                if name != "untraced":
                    # Each tracer's run is compared with an untraced run right before it.
                    runs["untraced"].append(ways["untraced"]())
                try:
                    if name != "untraced":
                        runs[name].append({**way(), "base": runs["untraced"][-1]["iops"]})
                except SystemExit as e:
                    report.add(f"{name} doesn't run here", str(e)[:200])
                    del ways[name]
                if name.startswith("cwndtrace"):
                    if table is None:
                        table = open_capture(place / "trace.cwnd").table("block_io").slice(0, 262_144).combine_chunks()
                    shutil.rmtree(place / "trace.cwnd")
        report.add("IOPS: untraced", Values("IOPS", [run["iops"] for run in runs["untraced"]]))
        for name in ways:
            if name == "untraced" or not runs[name]:
                continue
            report.add(f"IOPS: {name}", Values("IOPS", [run["iops"] for run in runs[name]]))
            report.add(f"IOPS: {name} / untraced", Values("", [run["iops"] / run["base"] for run in runs[name]]))
            report.add(f"{name}: bytes an event", Values("bytes", [run["bytes"] for run in runs[name]]))
            if not name.startswith("cwndtrace"):
                report.add(f"{name}: share of requests kept", Values("", [run["kept"] for run in runs[name]]))
        for name in ("cwndtrace", "cwndtrace --metrics"):
            for what, unit in (("user", "us"), ("system", "us")):
                report.add(f"{name}: {what} CPU an event", Values(unit, [run[what] for run in runs[name]]))
            report.add(f"{name}: lost", sum(run["lost"] for run in runs[name]), "events")
            report.add(f"{name}: kept", sum(run["kept"] for run in runs[name]), "events")
            report.add(f"{name}: kept + lost - diskstats", sum(run["off"] for run in runs[name]), "events")
        layers(report, disk, asked.rounds, asked.seconds)
        if not asked.device:
            in_kernel(report, disk, asked.seconds)
            assert table is not None
            encodings(report, table, place)
    report.write()


if __name__ == "__main__":
    main()
