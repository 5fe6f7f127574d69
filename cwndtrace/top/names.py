# SPDX-License-Identifier: Apache-2.0
"""The names of workloads and processes as they come, by the rule of analysis/workloads.py."""

from __future__ import annotations

from typing import Any, Final

from cwndtrace.analysis.workloads import TELL_NOTHING, label, tells

MOST: Final = 50_000
"""The most processes, and the most cgroups, whose names are kept: those that were named last."""


class LiveNames:
    """The workload of a cgroup and a process, and the name of a process. Where a pid was used again, the last counts.

    A workload that ``report`` infers from other records, as on hosts with cgroup v1, is left empty here.
    """

    def __init__(self) -> None:
        self.version = 0
        """It changes with each new name."""
        self.alone = True
        """True where the host has cgroup v2 only."""
        self._groups: dict[int, dict[str, Any]] = {}
        self._labels: dict[str, str] = {}
        self._processes: dict[int, tuple[str, str]] = {}

    def add_workloads(self, rows: list[dict[str, Any]]) -> None:
        """Take rows of the table ``workloads``."""
        for row in rows:
            name = label(row)
            _keep(self._labels, row["path"], name)
            if row["cgroup_id"]:
                _keep(self._groups, row["cgroup_id"], {**row, "workload": name})
        self.version += 1

    def add_processes(self, rows: list[dict[str, Any]]) -> None:
        """Take rows of the table ``processes``."""
        for row in rows:
            _keep(self._processes, row["pid"], (row["comm"], row["cgroup"]))
        self.version += 1

    def process(self, pid: int) -> str:
        """Return the name of a process; empty where it isn't known."""
        return self._processes.get(pid, ("", ""))[0]

    def workload(self, group: int, pid: int) -> str:
        """Return the workload of a socket by its cgroup and the process that holds it; empty where it isn't known."""
        row = self._groups.get(group)
        by_group: str = row["workload"] if row else ""
        path = self._processes.get(pid, ("", ""))[1]
        by_process = self._labels.get(path, path) if path and path not in TELL_NOTHING else ""
        sure = row is not None and tells(row, alone=self.alone)
        if self.alone:
            return by_group if sure else by_process or by_group
        return by_process or by_group


def _keep(known: dict[Any, Any], key: Any, value: Any) -> None:
    known.pop(key, None)
    known[key] = value
    if len(known) > MOST:
        del known[next(iter(known))]
