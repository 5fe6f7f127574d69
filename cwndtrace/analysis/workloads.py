# SPDX-License-Identifier: Apache-2.0
"""The workload of each record: the systemd unit, the container or the pod whose cgroup or process it names.

With cgroup v2 alone, a record's cgroup tells its workload. On a host with cgroup v1, containers need not have a cgroup
v2 of their own. There the process tells it, then, if it is a container's, the cgroup, then another record of the same
connection, and at last the network namespace, if processes of one workload only were seen in it. The last is inferred.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

ADDED: Final = {"workload": "name of the workload, for people; empty where it isn't known"}
_ID_DIGITS: Final = 12
_WHOLE_ID: Final = 64
_CONTAINED: Final = ("container", "pod")
TELL_NOTHING: Final = frozenset({"/", "/init.scope"})
"""Paths from which no workload follows: a socket that systemd made for a service stays in systemd's own cgroup."""

_Texts = npt.NDArray[np.object_]


def label(row: Mapping[Any, Any]) -> str:
    """Return the name of a workload, for people, from a row of the table ``workloads``.

    It is NAMESPACE/POD/CONTAINER for a container of Kubernetes, the name of any other container, or 12 digits of its id
    where its name isn't known, the systemd unit or slice, and for any other cgroup its path.
    """
    number = row["container_id"]
    name = row["container_name"] or (number[:_ID_DIGITS] if len(number) == _WHOLE_ID else number)
    if row["pod_name"]:
        return "/".join(part for part in (row["pod_namespace"], row["pod_name"], row["container_name"]) if part)
    return str(name or (f"pod {row['pod_uid']}" if row["pod_uid"] else row["unit"]) or row["path"])


def workloads(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the table ``workloads`` with one row per cgroup and name, its whole span, and ``ADDED``."""
    out = _spans(rows)
    return out.assign(workload=pd.Series([label(row) for row in out.to_dict("records")], index=out.index, dtype="str"))


def processes(rows: pd.DataFrame, known: pd.DataFrame) -> pd.DataFrame:
    """Return the table ``processes`` with one row per process and name, its whole span, and ``ADDED``.

    ``known`` is the result of ``workloads``.
    """
    out = _spans(rows)
    by_path = dict(zip(known["path"], known["workload"], strict=True))
    found = [by_path.get(path, path) for path in out["cgroup"]]
    return out.assign(workload=pd.Series(found, index=out.index, dtype="str"))


def _spans(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row for all that are alike but for ``last_ns``, with the last of these, in order of time."""
    alike = [name for name in rows.columns if name not in ("time", "last_ns")]
    last = rows.groupby(alike, sort=False, dropna=False)["last_ns"].transform("max") if len(rows) else rows["last_ns"]
    return rows.assign(last_ns=last).drop_duplicates(alike).sort_values("first_ns", kind="stable", ignore_index=True)


@dataclass(frozen=True)
class Naming:
    """The names in a capture: the results of ``workloads`` and ``processes``, and the version of its cgroups."""

    workloads: pd.DataFrame
    processes: pd.DataFrame
    cgroups: str = "v2"

    def of_connections(self, resets: pd.DataFrame, snapshots: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, int]:
        """Return both frames of a Trace with ``workload``, ``process`` and ``cmdline``.

        The number is that of the connections whose workload is inferred from their network namespace.
        """
        both = [
            self._named(frame, *columns)
            for frame, columns in ((resets, ("cgroup_id", "tgid")), (snapshots, ("sock_cgroup_id", "pid")))
        ]
        everywhere = pd.concat([frame[["connection", "workload"]] for frame in both])
        strong = everywhere[everywhere["workload"] != ""].drop_duplicates("connection", keep="last")
        named = dict(zip(strong["connection"], strong["workload"], strict=True))
        spaces = self._by_namespace()
        inferred: set[str] = set()
        out = []
        for frame in both:
            own, weak = (frame[name].to_numpy(object) for name in ("workload", "weak"))
            of_connection = _looked_up(frame["connection"], named)
            of_space = _looked_up(frame["netns_ino"], spaces)
            inferred |= set(frame["connection"][(own == "") & (of_connection == "") & (of_space != "")])
            labels = weak
            for better in (of_space, of_connection, own):
                labels = np.where(better != "", better, labels)
            out.append(frame.assign(workload=pd.Series(labels, index=frame.index, dtype="str")).drop(columns="weak"))
        return out[0], out[1], len(inferred)

    def of_namespaces(self, resets: pd.DataFrame, snapshots: pd.DataFrame) -> dict[str, tuple[dict[Any, Any], ...]]:
        """Return the workloads whose connections are in each network namespace, by its inode: rows of ``workloads``.

        Takes the frames that ``of_connections`` returns. Those with most records come first.
        """
        rows = {row["workload"]: row for row in self.workloads.to_dict("records")}
        both = pd.concat([frame[["netns_ino", "workload"]] for frame in (resets, snapshots)])
        counts = both[both["workload"].isin(rows)].value_counts()
        found: dict[str, list[dict[Any, Any]]] = {}
        for inode, name in counts.index:
            found.setdefault(str(inode), []).append(rows[name])
        return {inode: tuple(mine) for inode, mine in found.items()}

    def of_requests(self, owners: npt.NDArray[np.uint64], pids: npt.NDArray[np.int64]) -> pd.Categorical:
        """Return the workload of block requests by the cgroup that owns each; empty where it isn't known.

        On a host with cgroup v1, the submitting process tells it if it is a container's.
        """
        # There are millions of requests, and few cgroups and processes: each pair of them is looked up once.
        groups, of_group = np.unique(owners, return_inverse=True)
        known, of_pid = np.unique(pids if self.cgroups != "v2" else np.zeros(1, np.int64), return_inverse=True)
        pairs, codes = np.unique(of_group * len(known) + of_pid, return_inverse=True)
        by_group = dict(zip(self.workloads["cgroup_id"], self.workloads["workload"], strict=True))
        contained = self.processes["cgroup"].isin(self.workloads.loc[self.workloads["kind"].isin(_CONTAINED), "path"])
        mine = self.processes[contained]
        by_pid = dict(zip(mine["pid"], mine["workload"], strict=True)) if self.cgroups != "v2" else {}
        labels = [
            by_pid.get(int(known[pair % len(known)])) or by_group.get(int(groups[pair // len(known)]), "")
            for pair in pairs.tolist()
        ]
        names, of = np.unique(np.array(labels, dtype=object), return_inverse=True)
        return pd.Categorical.from_codes(of[codes], names.tolist())

    def _named(self, frame: pd.DataFrame, group: str, pid: str) -> pd.DataFrame:
        """Return a frame with names; ``weak`` is what the cgroup says where nothing better is known."""
        at = self._process_rows(frame[pid].to_numpy(np.int64), frame["ts_ns"].to_numpy(np.int64))
        by_process = {name: self._of_process(at, name) for name in ("workload", "cgroup", "comm", "cmdline")}
        told = np.array([path not in TELL_NOTHING for path in by_process["cgroup"]], dtype=np.bool_)
        by_process["workload"] = np.where(told, by_process["workload"], "")
        by_group, sure = self._of_groups(frame[group].to_numpy(np.uint64))
        if self.cgroups == "v2":
            labels = np.where(sure, by_group, by_process["workload"])
        else:
            labels = np.where(by_process["workload"] != "", by_process["workload"], np.where(sure, by_group, ""))
        comm = frame["comm"].astype(object).to_numpy()
        own = frame["process"].fillna("").astype(object).to_numpy() if "process" in frame else np.full(len(frame), "")
        new = {
            "workload": labels,
            "weak": np.where(labels == "", by_group, ""),
            "process": np.where(own != "", own, np.where(by_process["comm"] != "", by_process["comm"], comm)),
            "cmdline": by_process["cmdline"],
        }
        columns = {name: pd.Series(value, index=frame.index, dtype="str") for name, value in new.items()}
        return frame.assign(**columns)

    def _of_groups(self, ids: npt.NDArray[np.uint64]) -> tuple[_Texts, npt.NDArray[np.bool_]]:
        """Return the workload of each cgroup, and whether it is surely that of its sockets."""
        known = {row["cgroup_id"]: row for row in self.workloads.to_dict("records") if row["cgroup_id"]}
        distinct, codes = np.unique(ids, return_inverse=True)
        rows = [known.get(number) for number in distinct.tolist()]
        labels = np.array([row["workload"] if row else "" for row in rows], dtype=object)
        alone = self.cgroups == "v2"
        sure = [row is not None and tells(row, alone=alone) for row in rows]
        return labels[codes], np.array(sure, dtype=np.bool_)[codes]

    def _process_rows(self, pids: npt.NDArray[np.int64], ts_ns: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the row of the process that had each pid then, -1 where none is known.

        It is the last one that was seen before, or the first one after: a process is first seen after its record.
        """
        known, first = (self.processes[name].to_numpy(np.int64) for name in ("pid", "first_ns"))
        processes, rows = np.lexsort((first, known)), np.argsort(pids, kind="stable")
        found = np.full(len(pids), -1, np.int64)
        for pid in np.intersect1d(known, pids[pids > 0]).tolist():
            mine, its = (
                order[slice(*np.searchsorted(values, (pid, pid + 1), sorter=order))]
                for values, order in ((known, processes), (pids, rows))
            )
            last = np.searchsorted(first[mine], ts_ns[its], side="right") - 1
            found[its] = mine[np.maximum(last, 0)]
        return found

    def _of_process(self, rows: npt.NDArray[np.int64], name: str) -> _Texts:
        return np.append(self.processes[name].to_numpy(object), "")[rows]

    def _by_namespace(self) -> dict[int, str]:
        """Return the workloads of network namespaces in which processes of one workload only were seen."""
        if self.cgroups == "v2":
            return {}
        contained = set(self.workloads.loc[self.workloads["kind"].isin(_CONTAINED), "path"])
        rows = self.processes[self.processes["netns_ino"] > 0]
        others = set(rows.loc[~rows["cgroup"].isin(contained), "netns_ino"])
        mine = rows[~rows["netns_ino"].isin(others)]
        found = {}
        for space, labels in mine.groupby("netns_ino")["workload"]:
            names = set(labels)
            # The containers of a pod share its network namespace.
            pods = {"/".join(name.split("/")[:2]) for name in names}
            if len(names) == 1:
                found[int(str(space))] = names.pop()
            elif len(pods) == 1 and all("/" in name for name in names):
                found[int(str(space))] = pods.pop()
        return found


def _looked_up(keys: pd.Series, known: Mapping[Any, str]) -> _Texts:
    """Return the text of each key; empty where it has none. There are few distinct keys."""
    codes, distinct = pd.factorize(keys)
    return np.array([*(known.get(key, "") for key in distinct), ""], dtype=object)[codes]


def tells(row: Mapping[Any, Any], *, alone: bool) -> bool:
    """Return whether a socket's cgroup, a row of ``workloads``, surely names its workload.

    ``alone`` says that the host has cgroup v2 only.
    """
    return row["path"] not in TELL_NOTHING if alone else row["kind"] in _CONTAINED
