# SPDX-License-Identifier: Apache-2.0
"""Looking up names while a trace runs, with a stand-in for the helper that looks them up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pytest

from cwndtrace.capture import names as module
from cwndtrace.capture.names import NameLookups, ids
from cwndtrace.names.lookup import Found, Workload
from cwndtrace.names.processes import Process
from cwndtrace.names.runtimes import Names
from cwndtrace.records import arrow, layout
from tests.harness.tcp import until
from tests.unit import frames

WEB = Workload(5, "/docker/x", "container", "", "ab" * 32, Names("web", "nginx", "docker"))
MAIN = Process(30, 1234, "main", "/bin/main -x", "/docker/x", 7)


@dataclass
class KnownHost:
    """What there is; ``asked`` are the questions."""

    workloads: dict[int, Workload] = field(default_factory=lambda: {5: WEB})
    processes: dict[int, Process] = field(default_factory=lambda: {30: MAIN})
    asked: list[tuple[list[int], list[int]]] = field(default_factory=list)
    answers: bool = True

    def ask(self, groups: list[int], pids: list[int]) -> Found | None:
        self.asked.append((sorted(groups), sorted(pids)))
        if not self.answers:
            return None
        return Found(
            [self.workloads[each] for each in groups if each in self.workloads],
            [self.processes[each] for each in pids if each in self.processes],
        )


@pytest.fixture
def known_host() -> KnownHost:
    return KnownHost()


@pytest.fixture
def lookups(known_host: KnownHost) -> Iterator[NameLookups]:
    made = NameLookups(known_host.ask)
    yield made
    made.finish(0)


def timed(*records: layout.Records) -> arrow.TimedRecords:
    import numpy as np

    rows = np.concatenate(records)
    return arrow.TimedRecords("cwnd_reset", rows.tobytes(), np.zeros(len(rows), np.int64))


def reset(cgroup_id: int = 5, tgid: int = 30) -> arrow.TimedRecords:
    return timed(frames.reset(cgroup_id=cgroup_id, tgid=tgid))


def rows(found: dict[str, pa.Table], name: str) -> list[dict[str, Any]]:
    return found[name].to_pylist() if name in found else []


class Collected:
    """All rows that have come so far."""

    def __init__(self, lookups: NameLookups) -> None:
        self.lookups = lookups
        self.tables: dict[str, list[dict[str, Any]]] = {"workloads": [], "processes": []}

    def add(self, found: dict[str, pa.Table]) -> None:
        for name, mine in self.tables.items():
            mine += rows(found, name)

    def until(self, name: str, number: int) -> list[dict[str, Any]]:
        def there() -> bool:
            self.add(self.lookups.drain(0))
            return len(self.tables[name]) >= number

        until(there, 20, f"{number} rows of {name}")
        return self.tables[name]


def test_the_ids_of_all_kinds_of_rows_are_found() -> None:
    records = timed(frames.reset(cgroup_id=5, tgid=30), frames.reset(cgroup_id=5, tgid=0), frames.reset(cgroup_id=6))
    assert ids(records) == ({5, 6}, {30, 4242})
    assert ids(frames.snapshots(frames.snapshot(sock_cgroup_id=8, pid=9, listener_pid=10))) == ({8}, {9, 10})
    assert ids(frames.snapshots()) == (set(), set())


def test_each_id_is_looked_up_once_and_its_row_has_all_names(known_host: KnownHost, lookups: NameLookups) -> None:
    for _ in range(3):
        lookups.see(reset())
    collected = Collected(lookups)
    (row,) = collected.until("workloads", 1)
    (process,) = collected.until("processes", 1)
    assert (row["cgroup_id"], row["path"], row["container_name"], row["runtime"]) == (5, "/docker/x", "web", "docker")
    assert (process["pid"], process["comm"], process["cmdline"], process["cgroup"]) == (
        30, "main", "/bin/main -x", "/docker/x"
    )  # fmt: skip
    assert known_host.asked == [([5], [30])]


def test_rows_without_a_new_id_do_not_wake_the_thread(lookups: NameLookups) -> None:
    lookups.see(reset())
    assert lookups._wake.is_set()
    lookups._wake.clear()
    lookups.see(reset())
    assert not lookups._wake.is_set()


def test_the_last_row_tells_when_it_was_last_there(lookups: NameLookups) -> None:
    lookups.see(reset())
    collected = Collected(lookups)
    (first,) = collected.until("workloads", 1)
    (last,) = rows(lookups.finish(0), "workloads")
    assert last["first_ns"] == first["first_ns"] == first["last_ns"] < last["last_ns"]


def test_what_is_gone_was_last_there_when_a_record_last_had_it(known_host: KnownHost, lookups: NameLookups) -> None:
    lookups.see(reset())
    (first,) = Collected(lookups).until("processes", 1)
    before = time.monotonic_ns()
    lookups.see(reset())
    after = time.monotonic_ns()
    known_host.processes.clear()
    found = lookups.finish(0)
    (last,) = rows(found, "processes")
    assert first["first_ns"] == last["first_ns"] < before <= last["last_ns"] <= after
    assert rows(found, "workloads")[0]["last_ns"] > after


def test_ids_that_come_last_are_looked_up_too(lookups: NameLookups) -> None:
    lookups.drain(0)
    lookups.see(reset())
    found = lookups.finish(0)
    assert [row["container_name"] for row in rows(found, "workloads")] == ["web", "web"]


def test_a_new_name_and_a_pid_that_is_used_again_are_noticed(
    known_host: KnownHost, lookups: NameLookups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AGAIN_S", 0.01)
    lookups.see(reset())
    collected = Collected(lookups)
    collected.until("processes", 1)
    known_host.workloads[5] = replace(WEB, names=replace(WEB.names, container_name="new"))
    known_host.processes[30] = replace(MAIN, start_ticks=9999, comm="other")

    def noticed() -> bool:
        collected.add(lookups.drain(0))
        groups, pids = collected.tables["workloads"], collected.tables["processes"]
        return "new" in {row["container_name"] for row in groups} and "other" in {row["comm"] for row in pids}

    until(noticed, 20, "both new rows")


def test_a_name_stays_when_the_files_that_tell_it_are_gone(known_host: KnownHost, lookups: NameLookups) -> None:
    lookups.see(reset())
    Collected(lookups).until("workloads", 1)
    known_host.workloads[5] = replace(WEB, names=Names(runtime="docker"))
    (last,) = rows(lookups.finish(0), "workloads")
    assert last["container_name"] == "web"


def test_an_id_that_was_gone_is_looked_up_when_it_comes_again(
    known_host: KnownHost, lookups: NameLookups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AGAIN_S", 0.01)
    del known_host.processes[30]
    lookups.see(reset())
    collected = Collected(lookups)
    collected.until("workloads", 1)
    until(lambda: 30 not in lookups._used[1], 20, "the pid to be forgotten")
    known_host.processes[30] = MAIN
    lookups.see(reset())
    collected.until("processes", 1)


def test_without_answers_nothing_is_known_and_nothing_fails(known_host: KnownHost, lookups: NameLookups) -> None:
    known_host.answers = False
    lookups.see(reset())
    lookups.drain(0)
    until(lambda: known_host.asked, 20, "the question")
    assert lookups.finish(0) == {}


def test_an_error_ends_the_lookups_and_not_the_trace() -> None:
    def fail(*_: list[int]) -> Found:
        raise OSError("broken")

    lookups = NameLookups(fail)
    lookups.see(reset())
    lookups.drain(0)
    until(lambda: lookups.lacking is not None, 20, "the error")
    assert "OSError: broken" in str(lookups.lacking)
    assert lookups.finish(0) == {}


def test_no_more_than_so_many_ids_are_known(known_host: KnownHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_KNOWN", 2)
    lookups = NameLookups(known_host.ask)
    for pid in range(1, 10):
        lookups.see(reset(tgid=pid))
    lookups.finish(0)
    assert sorted({pid for _, pids in known_host.asked for pid in pids}) == [1, 2]


def test_rows_of_what_is_still_there_come_again(lookups: NameLookups) -> None:
    """A window of the past deletes the rows of long ago."""
    lookups.repeat_s = 0.05
    lookups.see(reset())
    found = Collected(lookups).until("processes", 4)
    assert {(row["first_ns"], row["comm"]) for row in found} == {(found[0]["first_ns"], "main")}
    assert [row["last_ns"] for row in found] == sorted(row["last_ns"] for row in found)
