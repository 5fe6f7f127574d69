# SPDX-License-Identifier: Apache-2.0
"""Looks up what the ids in records stand for: workloads by cgroup id, processes by pid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from cwndtrace.errors import NotFound
from cwndtrace.kernel import cgroups, host
from cwndtrace.names import place, processes
from cwndtrace.names.files import HostFiles
from cwndtrace.names.processes import Process
from cwndtrace.names.runtimes import Names, Runtimes

MOST_IDS: Final = 2048
"""The most ids that are looked up at once."""


@dataclass(frozen=True)
class Workload:
    """A cgroup by its id and path (see ``place.Place``), with the names of its container and pod.

    ``cgroup_id`` is 0 for a path that only a process in it has shown: on hosts with cgroup v1.
    """

    cgroup_id: int
    path: str
    kind: str
    unit: str
    container_id: str
    names: Names


@dataclass(frozen=True)
class Found:
    """What was found of some ids; those that are gone are absent."""

    workloads: list[Workload] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)


class Lookup:
    """Looks up ids. Needs to read files that belong to root, and other users' processes."""

    def __init__(self, *, cmdline: bool = True) -> None:
        self._runtimes = Runtimes(HostFiles(host.root()))
        self._cmdline = cmdline
        # With cgroup v2 alone, the socket's or the task's cgroup tells all that a process's could.
        self._by_process = cgroups.version() != "v2"

    def find(self, groups: Iterable[int], pids: Iterable[int]) -> Found:
        """Return the workloads of cgroup ids, and the processes."""
        found = Found()
        for group in groups:
            path = self._path_of(group)
            if path is not None:
                found.workloads.append(self.workload(path, group))
        paths = {each.path for each in found.workloads}
        for pid in pids:
            process = processes.read(pid, cmdline=self._cmdline)
            if process is not None:
                found.processes.append(process)
                if self._by_process and process.cgroup not in paths:
                    paths.add(process.cgroup)
                    found.workloads.append(self.workload(process.cgroup, 0))
        return found

    def _path_of(self, group: int) -> str | None:
        try:
            return cgroups.path_of(group)
        except (NotFound, OSError):
            # Without cgroup v2, or without the right to open a cgroup by its id, processes tell theirs.
            self._by_process = True
            return None

    def workload(self, path: str, cgroup_id: int) -> Workload:
        """Return the workload of a cgroup's path."""
        where = self._runtimes.other_container(place.parse(path))
        return Workload(cgroup_id, path, where.kind, where.unit, where.container_id, self._runtimes.names(where))
