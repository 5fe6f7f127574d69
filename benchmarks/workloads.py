# SPDX-License-Identifier: Apache-2.0
"""Measure what names cost with 1,000 containers, each with a process and a connection (as root).

    sudo .venv/bin/python -m benchmarks.workloads

The containers are cgroups with bundles as containerd leaves them in /run/containerd. ``run`` is measured with them and
without, in turns; the lookups are measured by themselves too.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Final

from benchmarks.common import COMMAND, BenchmarkResults, TracerProcess, Values, folder, options, status
from cwndtrace.capture import connections
from cwndtrace.capture.source import Filters
from cwndtrace.kernel import cgroups
from cwndtrace.names.lookup import Lookup
from cwndtrace.names.select import Selection, Wanted
from cwndtrace.store import open_capture

_WANTED: Final = {
    "names: memory of both processes / without": "at most 1.2",
    "names: CPU of both processes / without": "at most 2",
    "look all up for the first time": "at most 1 s",
}
_TASKS: Final = Path("/run/containerd/io.containerd.runtime.v2.task/cwndtrace-benchmark")


@dataclass
class Container:
    """A container of the benchmark: the folder of its cgroup, and its process."""

    group: Path
    process: multiprocessing.Process


def _member(group: Path | None, port: int, ready: Event, ended: Event) -> None:
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the parent's ends of all other connections
    if group is not None:
        (group / "cgroup.procs").write_text("0")
    with socket.create_connection(("127.0.0.1", port)):
        ready.set()
        ended.wait()


@contextmanager
def members(number: int, *, contained: bool) -> Iterator[list[Container]]:
    """Yield so many processes with a connection each, in containers of their own or not."""
    top = cgroups.mount_point() / "cwndtrace-benchmark"
    made: list[Container] = []
    held: list[socket.socket] = []
    ended = multiprocessing.Event()
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        try:
            for _ in range(number):
                name = os.urandom(32).hex()
                group = top / name
                if contained:
                    group.mkdir(parents=True)
                    _write_bundle(name, f"/{group.relative_to(cgroups.mount_point())}")
                ready = multiprocessing.Event()
                arguments = (group if contained else None, listener.getsockname()[1], ready, ended)
                made.append(Container(group, multiprocessing.Process(target=_member, args=arguments, daemon=True)))
                made[-1].process.start()
                held.append(listener.accept()[0])
                assert ready.wait(60)
            yield made
        finally:
            ended.set()
            for each in made:
                each.process.join()
            for sock in held:
                sock.close()
            for place in [*(each.group for each in made), top] if contained else ():
                _remove(place)
            shutil.rmtree(_TASKS, ignore_errors=True)
            for above in _TASKS.parents[:2]:
                with contextlib.suppress(OSError):
                    above.rmdir()


def _remove(group: Path) -> None:
    deadline = time.monotonic() + 30
    while group.exists():
        with contextlib.suppress(OSError):
            group.rmdir()
        assert time.monotonic() < deadline, f"{group} isn't empty"


def _write_bundle(name: str, path: str) -> None:
    keys = {"container-type": "container", "container-name": "web", "sandbox-name": f"web-{name[:8]}"}
    keys |= {"sandbox-namespace": "default", "image-name": "docker.io/library/nginx:1.29"}
    annotations = {f"io.kubernetes.cri.{key}": value for key, value in keys.items()}
    # A real one has some 10 kB, most of it mounts and filtered system calls.
    rest = {"process": {"args": ["nginx"] * 50}, "mounts": [{"destination": "/proc", "type": "proc"}] * 100}
    place = _TASKS / name / "config.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"annotations": annotations, "linux": {"cgroupsPath": path}} | rest))


def run(seconds: float, place: Path) -> dict[str, float]:
    """Run a trace; return memory and CPU time of the tracer and its helper, and what it named."""
    output = place / f"{time.monotonic_ns()}.cwnd"
    with TracerProcess([*COMMAND, "run", "-q", "--no-block", "-o", str(output)], "", stdout=-3) as tracer:
        while not (output / "connections").exists():
            time.sleep(0.01)
        time.sleep(seconds)  # this is what is measured
        children = Path(f"/proc/{tracer.process.pid}/task/{tracer.process.pid}/children").read_text().split()
        both = [tracer.process.pid, *map(int, children)]
        memory = sum(status(pid, "VmRSS") for pid in both)
        cpu = sum(_ticks(pid) for pid in both)
    capture = open_capture(output)
    named = len(set(capture.table("workloads", ["container_id"])["container_id"].to_pylist()) - {""})
    return {"MB": memory / 1e6, "CPU s": cpu, "named": named}


def _ticks(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def timed(work: Callable[[], object], rounds: int) -> Values:
    """Return the CPU time of each round, in ms."""
    values = Values("ms")
    for _ in range(rounds):
        begin = time.process_time()
        work()
        values.all.append((time.process_time() - begin) * 1000)
    return values


def main() -> None:
    """Run the benchmark and write its report."""
    asked = options(__doc__, containers=(1000, "number of containers"))
    report = BenchmarkResults("workloads", _WANTED)
    number = asked.containers
    with folder() as place:
        runs: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for contained in [True, False] * asked.rounds:
            with members(number, contained=contained):
                runs[contained].append(run(asked.seconds * 5, place))
        for name, unit in (("MB", "MB"), ("CPU s", "s")):
            what = {"MB": "memory", "CPU s": "CPU"}[name]
            for contained, label in ((True, f"{number} containers"), (False, f"{number} processes without")):
                report.add(f"{what} of both processes: {label}", Values(unit, [each[name] for each in runs[contained]]))
            ratios = [mine[name] / other[name] for mine, other in zip(runs[True], runs[False], strict=True)]
            report.add(f"names: {what} of both processes / without", Values("", ratios))
        report.add("containers that were named", Values("", [each["named"] for each in runs[True]]))
    with members(number, contained=True) as made:
        groups, pids = [each.group.stat().st_ino for each in made], [each.process.pid or 0 for each in made]
        begin = time.process_time()
        lookup = Lookup()
        found = lookup.find(groups, pids)
        report.add("look all up for the first time", time.process_time() - begin, "s")
        assert len({each.names.pod_name for each in found.workloads}) >= number
        report.add("look all up again", timed(lambda: lookup.find(groups, pids), asked.rounds))
        selection = Selection(Wanted("pod", "default/*"), lookup)
        begin = time.process_time()
        selection.ids()
        report.add("--pod: select for the first time", time.process_time() - begin, "s")
        report.add("--pod: select again, each second", timed(selection.ids, asked.rounds))
        report.add("a snapshot of connections", timed(lambda: connections.snapshot(Filters(), 0), asked.rounds))
    with members(number, contained=False):
        report.add("the same without containers", timed(lambda: connections.snapshot(Filters(), 0), asked.rounds))
    report.write()


if __name__ == "__main__":
    main()
