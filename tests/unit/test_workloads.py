# SPDX-License-Identifier: Apache-2.0
"""The workload of each record, by its cgroup, its process, its connection or its network namespace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from cwndtrace.analysis.workloads import Naming, label, processes, workloads
from cwndtrace.records import arrow, frames

ID = "3f0a12b4c5d6" + "ab" * 26
S = 1_000_000_000
_TEXTS = ("path", "kind", "unit", "container_id", "container_name", "image", "runtime")
_POD = ("pod_namespace", "pod_name", "pod_uid")


def workload(cgroup_id: int, path: str, kind: str = "container", at: int = 0, last: int = 9, **more: Any) -> Any:
    row: dict[str, Any] = dict.fromkeys((*_TEXTS, *_POD), "")
    row |= {"time": 0, "first_ns": at * S, "last_ns": last * S, "cgroup_id": cgroup_id, "path": path, "kind": kind}
    return row | more


def process(pid: int, cgroup: str, comm: str = "main", at: int = 0, last: int = 9, **more: Any) -> Any:
    row = {"time": 0, "first_ns": at * S, "last_ns": last * S, "pid": pid, "start_ticks": at, "netns_ino": 7}
    return row | {"comm": comm, "cmdline": f"/bin/{comm} -x", "cgroup": cgroup} | more


def known(groups: list[Any], running: list[Any], version: str = "v2") -> Naming:
    rows = [pd.DataFrame(each, columns=arrow.schema(name).names) for name, each in zip(
        ("workloads", "processes"), (groups, running), strict=True
    )]  # fmt: skip
    named = workloads(rows[0])
    return Naming(named, processes(rows[1], named), version)


def resets(*rows: dict[str, Any]) -> pd.DataFrame:
    base = {"connection": "a", "cgroup_id": 0, "tgid": 0, "ts_ns": S, "netns_ino": 7, "comm": "thread", "process": ""}
    return pd.DataFrame([base | row for row in rows], columns=list(base))


def snapshots(*rows: dict[str, Any]) -> pd.DataFrame:
    base = {"connection": "a", "sock_cgroup_id": 0, "pid": 0, "ts_ns": S, "netns_ino": 7, "comm": "", "listener": ""}
    return pd.DataFrame([base | row for row in rows], columns=list(base))


def of_resets(names: Naming, *rows: dict[str, Any], seen: tuple[dict[str, Any], ...] = ()) -> list[str]:
    found, _, _ = names.of_connections(resets(*rows), snapshots(*seen))
    return list(found["workload"])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"container_name": "web", "container_id": ID}, "web"),
        ({"container_id": ID}, "3f0a12b4c5d6"),
        ({"container_id": "my-container-of-ctr"}, "my-container-of-ctr"),
        (
            {"container_name": "nginx", "container_id": ID, "pod_namespace": "prod", "pod_name": "web-7d9c"},
            "prod/web-7d9c/nginx",
        ),
        ({"container_id": ID, "pod_namespace": "prod", "pod_name": "web-7d9c"}, "prod/web-7d9c"),
        ({"pod_uid": "0a" * 16}, f"pod {'0a' * 16}"),
        ({"unit": "nginx.service", "path": "/system.slice/nginx.service"}, "nginx.service"),
        ({"path": "/custom"}, "/custom"),
    ],
)
def test_a_workload_has_the_name_that_people_know_it_by(row: dict[str, str], expected: str) -> None:
    assert label(dict.fromkeys((*_TEXTS, *_POD), "") | row) == expected


def test_with_version_2_the_cgroup_tells() -> None:
    names = known(
        [workload(5, "/docker/x", container_name="web"), workload(6, "/a", "unit", unit="a.service")],
        [process(30, "/a")],
    )
    assert of_resets(names, {"cgroup_id": 5, "tgid": 30}, {"cgroup_id": 6, "connection": "b"}) == [
        "web", "a.service"
    ]  # fmt: skip


@pytest.mark.parametrize("path", ["/", "/init.scope"])
def test_of_a_socket_that_systemd_made_the_process_tells(path: str) -> None:
    names = known(
        [workload(1, path, "cgroup"), workload(6, "/system.slice/a.service", "unit", unit="a.service")],
        [process(30, "/system.slice/a.service")],
    )
    assert of_resets(names, {"cgroup_id": 1, "tgid": 30}) == ["a.service"]
    assert of_resets(names, {"cgroup_id": 1}, seen=({"sock_cgroup_id": 1, "pid": 30},)) == ["a.service"]
    assert of_resets(names, {"cgroup_id": 1, "connection": "b"}) == [path]


def test_with_version_1_the_process_tells_and_another_record_of_the_connection() -> None:
    names = known(
        [
            workload(9, "/system.slice/containerd.service", "unit", unit="containerd.service"),
            workload(0, f"/docker/{ID}", container_name="web"),
        ],
        [process(30, f"/docker/{ID}", netns_ino=7), process(31, "/system.slice/cron.service", netns_ino=8)],
        "hybrid",
    )
    of_timer = {"cgroup_id": 9, "tgid": 0, "netns_ino": 8}
    assert of_resets(names, {"cgroup_id": 9, "tgid": 30}) == ["web"]
    assert of_resets(names, of_timer, {"cgroup_id": 9, "tgid": 30}) == ["web", "web"]
    assert of_resets(names, of_timer, seen=({"pid": 30, "sock_cgroup_id": 9},)) == ["web"]
    assert of_resets(names, of_timer) == ["containerd.service"]


def test_at_last_the_network_namespace_tells_if_it_is_one_workloads() -> None:
    paths = [f"/docker/{number * 32}" for number in ("0a", "0b")]
    containers = [workload(0, path, container_name=f"web{at}") for at, path in enumerate(paths)]
    both = [process(30, paths[0], netns_ino=7), process(31, paths[1], netns_ino=8)]
    row = {"netns_ino": 7}

    def found(*more: Any, version: str = "v1") -> tuple[list[str], int]:
        named, _, number = known(containers, [*both, *more], version).of_connections(resets(row), snapshots())
        return list(named["workload"]), number

    assert found() == (["web0"], 1)
    assert found(version="v2") == ([""], 0)
    assert found(process(32, paths[1], netns_ino=7)) == ([""], 0)
    assert found(process(33, "/system.slice/ssh.service", netns_ino=7)) == ([""], 0)


def test_the_containers_of_a_pod_share_its_network_namespace() -> None:
    pod = {"pod_namespace": "prod", "pod_name": "web"}
    names = known(
        [workload(0, "/p/a", container_name="nginx") | pod, workload(0, "/p/b", container_name="log") | pod],
        [process(30, "/p/a"), process(31, "/p/b")],
        "hybrid",
    )
    assert of_resets(names, {}) == ["prod/web"]


def test_a_pid_that_is_used_again_is_the_process_of_that_time() -> None:
    names = known([], [process(30, "/a", "first", at=1), process(30, "/b", "second", at=5)])
    rows = resets(*({"tgid": 30, "ts_ns": at * S, "connection": str(at)} for at in (0, 2, 5, 8)))
    found, _, _ = names.of_connections(rows, snapshots())
    assert list(found["process"]) == ["first", "first", "second", "second"]
    assert list(found["cmdline"]) == ["/bin/first -x", "/bin/first -x", "/bin/second -x", "/bin/second -x"]


def test_the_process_is_named_by_the_record_then_by_proc_then_by_its_thread() -> None:
    names = known([], [process(30, "/a", "leader")])
    rows = resets({"tgid": 30, "process": "own"}, {"tgid": 30}, {"tgid": 31})
    assert list(names.of_connections(rows, snapshots())[0]["process"]) == ["own", "leader", "thread"]


def test_rows_that_differ_in_their_end_only_are_one() -> None:
    rows = [workload(5, "/a", "cgroup", at=1, last=1), workload(5, "/a", "cgroup", at=1, last=7)]
    renamed = workload(5, "/a", "cgroup", at=3, last=3, image="new")
    found = workloads(pd.DataFrame([rows[1], renamed, rows[0]], columns=arrow.schema("workloads").names))
    assert list(zip(found["first_ns"], found["last_ns"], found["image"], strict=True)) == [
        (1 * S, 7 * S, ""), (3 * S, 3 * S, "new")
    ]  # fmt: skip


def test_without_any_name_all_is_empty() -> None:
    empty = [frames.frame(arrow.schema(name).empty_table(), name) for name in ("workloads", "processes")]
    named = workloads(empty[0])
    names = Naming(named, processes(empty[1], named))
    found, seen, inferred = names.of_connections(resets({"tgid": 5, "cgroup_id": 6}), snapshots({"pid": 5}))
    assert (list(found["workload"]), list(found["process"]), list(seen["workload"]), inferred) == (
        [""], ["thread"], [""], 0
    )  # fmt: skip
    assert names.of_connections(resets(), snapshots())[0].empty


def test_block_requests_get_the_workload_of_their_cgroup() -> None:
    names = known([workload(5, "/docker/x", container_name="web"), workload(6, "/b", container_name="web")], [])
    ids, pids = np.array([5, 6, 5, 7], np.uint64), np.array([1, 2, 3, 4], np.int64)
    assert names.of_requests(ids, pids).tolist() == ["web", "web", "web", ""]
    assert names.of_requests(ids[:0], pids[:0]).tolist() == []


def test_with_version_1_block_requests_get_the_workload_of_their_process() -> None:
    path = f"/docker/{ID}"
    shim = workload(9, "/system.slice/containerd.service", "unit", unit="containerd.service")
    groups = [shim, workload(0, path, container_name="old")]
    names = known(groups, [process(30, path), process(31, "/system.slice/cron.service")], "hybrid")
    found = names.of_requests(np.array([9, 9, 7], np.uint64), np.array([30, 31, 30], np.int64))
    assert found.tolist() == ["old", "containerd.service", "old"]
