# SPDX-License-Identifier: Apache-2.0
"""Common parts of the benchmarks: pairs of runs, reports as text and JSON, and a description of the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cwndtrace import isolated

# In a guest of tools/vm, CWNDTRACE_VM is its name, and its results go to a separate folder.
RESULTS: Final = Path("benchmarks/results", os.environ.get("CWNDTRACE_VM", ""))
START_LIMIT_S: Final = 180  # bcc compiles for a minute in an emulated machine
METRICS: Final = ("--metrics", "127.0.0.1:0")
"""Options of ``cwndtrace run`` that serve metrics, at a port that is free."""
COMMAND: Final = (*isolated.python("-m", "cwndtrace"),)
# The benchmarks' folders belong to root. With these variables cwndtrace would write as the user, and couldn't.
for _name in ("SUDO_UID", "SUDO_GID"):
    os.environ.pop(_name, None)


def machine() -> dict[str, Any]:
    """Return the properties of the machine that the figures depend on."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": model[1] if model else platform.machine(),
        "cpus": os.cpu_count(),
        "memory_GB": round(int(memory[1]) * 1024 / 1e9, 1) if memory else None,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "bpf_jit": Path("/proc/sys/net/core/bpf_jit_enable").read_text().strip(),
        "load_1_min": os.getloadavg()[0],
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@dataclass
class Values:
    """Measurements of one quantity in one unit; their text is the median, the minimum and the maximum."""

    unit: str = ""
    all: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median; NaN if there are no measurements."""
        return statistics.median(self.all) if self.all else float("nan")

    def __str__(self) -> str:
        if not self.all:
            return "not measured"
        digits = ",.0f" if abs(self.median) >= 1000 else ".3g" if self.unit else ".3f"
        spread = f" ({min(self.all):{digits}} to {max(self.all):{digits}})" if len(self.all) > 1 else ""
        return f"{self.median:{digits}}{f' {self.unit}' if self.unit else ''}{spread}"


class BenchmarkResults:
    """The figures of one benchmark: each is printed when it is added, and ``write`` saves all as JSON."""

    def __init__(self, name: str, target: Mapping[str, str] | None = None) -> None:
        self.name, self.machine, self.figures = name, machine(), dict[str, Any]()
        self._target = target or {}
        about = self.machine
        print(
            f"# {name}: {about['cpu']}, {about['cpus']} CPUs, Linux {about['kernel']}, load {about['load_1_min']:.1f}"
        )

    def add(self, what: str, values: Values | float | str, unit: str = "") -> None:
        """Print and keep one figure."""
        figure = Values(unit, [float(values)]) if isinstance(values, (int, float)) else values
        wanted = f"   [wanted: {self._target[what]}]" if what in self._target else ""
        print(f"{what:<58} {figure}{wanted}", flush=True)
        raw = figure if isinstance(figure, str) else {"unit": figure.unit, "median": figure.median, "all": figure.all}
        self.figures[what] = {"value": raw, "wanted": self._target.get(what)}

    def write(self) -> None:
        """Write the figures to ``benchmarks/results``, or in a guest to the guest's folder there."""
        RESULTS.mkdir(parents=True, exist_ok=True)
        file = RESULTS / f"{self.name}.json"
        file.write_text(json.dumps({"machine": self.machine, "figures": self.figures}, indent=1) + "\n")
        print(f"written to {file}", flush=True)


def paired(ways: Mapping[str, Callable[[], float]], rounds: int, baseline: str, unit: str) -> dict[str, Values]:
    """Run the ways in turns (A B A B) for ``rounds``, and return the values of each.

    Under "NAME / BASELINE" the result has each round's ratio to the baseline.
    """
    results = {name: Values(unit) for name in ways}
    results |= {f"{name} / {baseline}": Values() for name in ways if name != baseline}
    for _ in range(rounds):
        now = {name: way() for name, way in ways.items()}
        for name, value in now.items():
            results[name].all.append(value)
            if name != baseline:
                results[f"{name} / {baseline}"].all.append(value / now[baseline])
    return results


def fio(device: str, seconds: float, depth: int = 32) -> dict[str, float]:
    """Read ``device`` at random with direct 4 KiB reads; return ``iops``, ``p99_us`` (of latency) and ``requests``."""
    options = f"--filename={device} --rw=randread --bs=4k --direct=1 --ioengine=libaio --iodepth={depth}"
    limits = f"--norandommap --time_based --runtime={seconds} --output-format=json"
    command = ["fio", "--name=benchmark", *options.split(), *limits.split()]
    read = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["jobs"][0]["read"]
    p99 = read["clat_ns"]["percentile"]["99.000000"] / 1000
    return {"iops": read["iops"], "requests": read["total_ios"], "p99_us": p99}


def status(pid: int, name: str) -> int:
    """Return a size from /proc/PID/status, such as VmRSS or VmHWM, in bytes; 0 if the process has none."""
    match = re.search(rf"^{name}:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def cpu_seconds(pid: int) -> tuple[float, float]:
    """Return user and system time of a process with all its threads, in seconds."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    tick = os.sysconf("SC_CLK_TCK")
    return int(user) / tick, int(system) / tick


class TracerProcess:
    """A context manager that runs a tracer in a separate process.

    On entry it waits until the tracer prints ``ready``; ``stop`` interrupts the tracer and waits for its end.
    """

    def __init__(self, command: list[str], ready: str, **how: Any) -> None:
        self._command, self._ready, self._how = command, ready, how

    def __enter__(self) -> TracerProcess:
        begin = time.monotonic()
        self._output = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            self._command, stderr=subprocess.STDOUT, **{"stdout": self._output, "text": True, **self._how}
        )
        while self._ready and self._ready not in self.said():
            if self.process.poll() is not None or time.monotonic() - begin > START_LIMIT_S:
                self.process.kill()
                raise SystemExit(f"{self._command[0]} didn't start: {self.said()[-400:]}")
            time.sleep(0.002)
        self.started_s = time.monotonic() - begin
        return self

    def said(self) -> str:
        """Return the tracer's output so far, unless the caller redirected it."""
        self._output.flush()
        return os.pread(self._output.fileno(), 1 << 24, 0).decode("utf-8", "replace")

    def usage(self) -> tuple[float, float]:
        """Return the tracer's user and system time so far, in seconds."""
        return cpu_seconds(self.process.pid)

    def stop(self) -> None:
        """Send SIGINT, as Ctrl-C does, and wait for the tracer's end; kill it after 60 s."""
        if self.process.poll() is None:
            self.process.send_signal(2)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self._output.close()


@contextmanager
def folder() -> Iterator[Path]:
    """Yield a temporary folder for captures, in ``TMPDIR``."""
    with tempfile.TemporaryDirectory(prefix="cwndtrace-bench-") as name:
        yield Path(name)


def size(path: Path) -> int:
    """Return the size of a file, or of all files below a folder, in bytes."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def has(command: str) -> bool:
    """Return true if a command is installed; print a line if it isn't."""
    installed = shutil.which(command) is not None
    if not installed:
        print(f"{command} isn't installed, so it is left out. To install it: tools/setup packages bench")
    return installed


def biosnoops() -> dict[str, list[str]]:
    """Return the commands of the two biosnoop tools, bcc's and libbpf-tools', as far as they are installed.

    ``CWNDTRACE_PEERS_ROOT`` may name the root of another distribution, whose newer versions are then used.
    """
    root = os.environ.get("CWNDTRACE_PEERS_ROOT")
    path = f"{root}/usr/sbin:{root}/usr/bin" if root else None
    # These are Debian's names. On other distributions bcc's is called biosnoop too, but isn't on the PATH.
    names = {"bcc's biosnoop": ("biosnoop-bpfcc",), "libbpf-tools' biosnoop": ("biosnoop-libbpf", "biosnoop")}
    commands = {}
    for what, candidates in names.items():
        name = next((name for name in candidates if shutil.which(name, path=path)), None)
        if name:
            commands[what] = [*(("chroot", root) if root else ()), name]
        else:
            print(f"{what} isn't installed, so it is left out. To install it: tools/setup packages bench")
    return commands


def options(doc: str | None, **extra: tuple[Any, str]) -> argparse.Namespace:
    """Parse ``--rounds``, ``--seconds`` and a benchmark's further options, given as (default, help)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in {
        "rounds": (5, "runs of each"),
        "seconds": (4.0, "length of a run in s"),
        **extra,
    }.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} ({default})")
    return parser.parse_args()
