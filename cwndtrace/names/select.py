# SPDX-License-Identifier: Apache-2.0
"""Finds the cgroups of a container, a pod or a systemd unit that a user names."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from cwndtrace.errors import NotFound
from cwndtrace.format import clean
from cwndtrace.kernel import cgroups, sockets
from cwndtrace.names.lookup import Lookup, Workload
from cwndtrace.names.place import SHARED

_LEAST_ID: Final = 6
"""The fewest digits of a container's id that name it."""
_SHOWN: Final = 20


@dataclass(frozen=True)
class Wanted:
    """What a user names: ``kind`` is container, pod or unit. ``*`` and ``?`` in ``text`` are as in a shell."""

    kind: str
    text: str

    def matches(self, workload: Workload) -> bool:
        """Return whether this is the workload, or one of those, that the user means."""
        return any(fnmatchcase(name, self._pattern()) for name in names(self.kind, workload)) or (
            self.kind == "container"
            and len(self.text) >= _LEAST_ID
            and bool(workload.container_id)
            and workload.container_id.startswith(self.text)
        )

    def _pattern(self) -> str:
        # As systemctl does: a name without a suffix is a service's.
        return f"{self.text}.service" if self.kind == "unit" and "." not in self.text else self.text


def names(kind: str, workload: Workload) -> list[str]:
    """Return the names by which a user may mean this workload as a container, a pod or a unit."""
    if kind == "unit":
        # A user's own service manager has units of any name.
        users = workload.unit and "/user@" in workload.path.rpartition(workload.unit)[0]
        return [] if users or not workload.unit else [workload.unit]
    if kind == "pod":
        pod = workload.names
        return [f"{pod.pod_namespace}/{pod.pod_name}"] if pod.pod_name else []
    return [workload.names.container_name] if workload.names.container_name else []


class Selection:
    """The cgroups of what a user names, and those below them. Several threads may use it."""

    def __init__(self, wanted: Wanted, lookup: Lookup) -> None:
        self._wanted = wanted
        self._lookup = lookup
        self._known: dict[tuple[str, int], Workload] = {}
        self._lock = threading.Lock()

    def ids(self) -> tuple[set[int], int]:
        """Return the ids of the present cgroups, and how many folders weren't looked at."""
        unseen = [0]
        with self._lock:
            chosen: dict[str, int] = {}
            for workload in self._all(unseen):
                above = workload.path.rpartition("/")[0]
                if above in chosen or self._wanted.matches(workload):
                    chosen[workload.path] = workload.cgroup_id
        return set(chosen.values()), unseen[0]

    def _all(self, unseen: list[int]) -> Iterator[Workload]:
        """Yield all cgroups; a name that was found once isn't looked up again."""
        before, self._known = self._known, {}
        for path, cgroup_id in cgroups.walk(cgroups.root(), unseen):
            key = path or "/", cgroup_id
            workload = before.get(key)
            if workload is None or (workload.container_id and not workload.names.container_name):
                workload = self._lookup.workload(*key)
            self._known[key] = workload
            yield workload

    def check(self) -> None:
        """Raise NotFound where there is none, with the names of those that there are."""
        if self.ids()[0]:
            return
        kind = self._wanted.kind
        there = sorted({name for workload in self._known.values() for name in names(kind, workload)})
        cause = f"there is no {kind} {self._wanted.text}"
        if kind != "unit" and (pid := self._of_version_1()):
            raise NotFound(
                f"{kind} {self._wanted.text} has no cgroup v2 of its own, and the kernel tells no other cgroup of a "
                "connection",
                f"select its network namespace: --netns {pid}",
            )
        shown = ", ".join(map(clean, there[:_SHOWN])) + (f" and {len(there) - _SHOWN} more" if there[_SHOWN:] else "")
        raise NotFound(cause, f"there are: {shown}" if there else f"no {kind} can be seen from here")

    def _of_version_1(self) -> int | None:
        """Return a process of the workload if it is known by a cgroup v1 only."""
        if cgroups.version() == "v2":
            return None
        seen = {workload.path for workload in self._known.values()} | SHARED
        for pid in sockets.pids():
            for process in self._lookup.find((), (pid,)).processes:
                if process.cgroup not in seen and self._wanted.matches(self._lookup.workload(process.cgroup, 0)):
                    return pid
        return None
