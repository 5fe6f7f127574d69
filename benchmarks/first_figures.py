# SPDX-License-Identifier: Apache-2.0
"""What tracing costs on this machine: ``sudo python -m benchmarks.first_figures`` prints figures with their units.

Block I/O is fio's, 4 KiB random direct reads at queue depth 32 on a loop device over memory: about the fastest device
that there is, so that what the trace takes shows. Traced and untraced runs alternate, and each pair gives one
ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cwndtrace.capture.bcc import Kernel
from cwndtrace.capture.session import Session
from cwndtrace.lab.demo import cubic_connection
from tests.live.disk import loop

_STATS: Final = Path("/proc/sys/kernel/bpf_stats_enabled")
_DISK_BYTES: Final = 256 << 20


def attach_seconds() -> float:
    """From typing the command to its first line, which says that it is attached."""
    command = [sys.executable, "-m", "cwndtrace", "run", "-o", f"/tmp/cwndtrace-figures-{os.getpid()}.cwnd"]
    begin = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith("Tracing "):
                    return time.monotonic() - begin
            raise SystemExit("cwndtrace run never attached: see sudo cwndtrace doctor")
        finally:
            process.kill()
            subprocess.run(["rm", "-rf", command[-1]], check=True)


def iops(device: str, seconds: float) -> float:
    """Requests a second that fio gets from ``device``."""
    options = f"--filename={device} --rw=randread --bs=4k --direct=1 --ioengine=libaio --iodepth=32 --norandommap"
    limits = f"--time_based --runtime={seconds} --size={_DISK_BYTES} --output-format=json"
    done = subprocess.run(
        ["fio", "--name=figures", *options.split(), *limits.split()], capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout)["jobs"][0]["read"]["iops"])


class Traced:
    """A session on a thread of its own while it is entered; ``events``, ``lost`` and ``cpu_s`` afterwards."""

    def __enter__(self) -> Traced:
        self._session = Session(Kernel())
        self._stop = threading.Event()
        self._cpu_s = 0.0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.is_set():
            self._session.step()
        self._session.finish()
        usage = resource.getrusage(resource.RUSAGE_THREAD)
        self._cpu_s = usage.ru_utime + usage.ru_stime

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self.events = self._session.tally.kept["block_io"]
        self.lost = self._session.tally.lost["block_io"]
        self.cpu_s = self._cpu_s
        self._session.close()


def run_times(traced: Traced) -> dict[str, tuple[int, int]]:
    """By program: nanoseconds in it and runs of it, as the kernel counts them."""
    kernel = traced._session.source
    assert isinstance(kernel, Kernel)
    found: dict[str, tuple[int, int]] = {}
    for program in kernel._programs():
        for name, fd in program._loaded.items():
            text = Path(f"/proc/self/fdinfo/{fd}").read_text()
            values = dict(line.split(":\t") for line in text.splitlines() if ":\t" in line)
            ns, runs = found.get(name, (0, 0))
            found[name] = ns + int(values["run_time_ns"]), runs + int(values["run_cnt"])
    return found


@contextmanager
def bpf_stats() -> Iterator[None]:
    """Have the kernel count the time in BPF programs, as long as this is entered."""
    before = _STATS.read_text()
    _STATS.write_text("1")
    try:
        yield
    finally:
        _STATS.write_text(before)


def block_figures(pairs: int, seconds: float) -> None:
    """Rates with and without, what user space takes, and what is lost."""
    ratios, rates, cpu, lost, kept = [], [], [], 0, 0
    with loop(_DISK_BYTES) as disk:
        device = str(disk.path)
        iops(device, 1)
        for _ in range(pairs):
            plain = iops(device, seconds)
            with Traced() as traced:
                slow = iops(device, seconds)
            ratios.append(slow / plain)
            rates.append(slow)
            cpu.append(traced.cpu_s / traced.events * 1e6)
            lost, kept = lost + traced.lost, kept + traced.events
            print(f"  pair: {plain:,.0f} IOPS untraced, {slow:,.0f} traced ({slow / plain:.2f})", flush=True)
    print(f"block I/O traced:            {statistics.median(rates):,.0f} requests/s (median of {pairs})")
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"IOPS traced / untraced:      {statistics.median(ratios):.2f} (median; {spread})")
    print(f"CPU of user space per event: {statistics.median(cpu):.3f} us (decoding to Arrow included)")
    print(f"records lost:                {lost:,} of {kept + lost:,}")


def kernel_figures(seconds: float) -> None:
    """Nanoseconds in each program per run."""
    with bpf_stats(), loop(_DISK_BYTES) as disk, Traced() as traced, cubic_connection() as sender:
        iops(str(disk.path), seconds)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sender.sendall(bytes(100_000))
        times = run_times(traced)
    for name, (ns, runs) in sorted(times.items()):
        if runs:
            print(f"in the kernel: {name:<24} {ns / runs:6.0f} ns a run ({runs:,} runs)")
    requests = times["on_block_io_done"][1]
    total = sum(ns for name, (ns, _) in times.items() if name.startswith("on_block_"))
    print(f"in the kernel, all programs of one block request: {total / requests:.0f} ns")


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_figures", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs, traced and untraced")
    parser.add_argument("--seconds", type=float, default=4, help="how long each run is")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"Linux {os.uname().release}, {os.cpu_count()} CPUs, load before: {load:.1f}")
    starts = [attach_seconds() for _ in range(arguments.pairs)]
    spread = f"{min(starts):.2f} to {max(starts):.2f}"
    print(f"command to attached:         {statistics.median(starts):.2f} s (median of {len(starts)}; {spread})")
    block_figures(arguments.pairs, arguments.seconds)
    kernel_figures(arguments.seconds)


if __name__ == "__main__":
    main()
