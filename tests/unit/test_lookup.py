# SPDX-License-Identifier: Apache-2.0
"""Looking ids up on this machine, and naming what a user selects."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cwndtrace.errors import NotFound
from cwndtrace.kernel import cgroups, host
from cwndtrace.names import lookup, processes, select
from cwndtrace.names.lookup import Lookup, Workload
from cwndtrace.names.runtimes import Names
from cwndtrace.names.select import Selection, Wanted

ID = "3f0a12b4c5d6" + "ab" * 26
POD = Names("nginx", "nginx:1", "containerd", "prod", "web-7d9c", "8f2b")


def workload(path: str, *, unit: str = "", container: str = "", names: Names = Names()) -> Workload:  # noqa: B008
    return Workload(1, path, "container" if container else "unit", unit, container, names)


CONTAINER = workload(f"/docker/{ID}", container=ID, names=Names("web"))
IN_POD = workload("/kubepods.slice/a", container=ID, names=POD)
UNIT = workload("/system.slice/nginx.service", unit="nginx.service")
USERS = workload("/user.slice/user-7.slice/user@7.service/app.slice/nginx.service", unit="nginx.service")


@pytest.mark.parametrize(
    ("wanted", "workload", "expected"),
    [
        (Wanted("container", "web"), CONTAINER, True),
        (Wanted("container", "w?b"), CONTAINER, True),
        (Wanted("container", ID[:6]), CONTAINER, True),
        (Wanted("container", ID), CONTAINER, True),
        (Wanted("container", ID[:5]), CONTAINER, False),
        (Wanted("container", "WEB"), CONTAINER, False),
        (Wanted("container", "nginx"), IN_POD, True),
        (Wanted("container", ""), UNIT, False),
        (Wanted("pod", "prod/web-7d9c"), IN_POD, True),
        (Wanted("pod", "prod/web-*"), IN_POD, True),
        (Wanted("pod", "prod/web"), IN_POD, False),
        (Wanted("pod", "web-7d9c"), IN_POD, False),
        (Wanted("pod", "/"), CONTAINER, False),
        (Wanted("unit", "nginx"), UNIT, True),
        (Wanted("unit", "nginx.service"), UNIT, True),
        (Wanted("unit", "nginx.socket"), UNIT, False),
        (Wanted("unit", "nginx"), USERS, False),
        (Wanted("unit", "*"), CONTAINER, False),
    ],
)
def test_a_name_means_what_it_means_to_the_tool_that_gave_it(
    wanted: Wanted, workload: Workload, expected: bool
) -> None:
    assert wanted.matches(workload) is expected


@pytest.fixture
def tree(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, int]], None]:
    """Return a function that makes these the cgroups of the host, path to id."""

    def make(paths: dict[str, int]) -> None:
        def walk(*_: object) -> Iterator[tuple[str, int]]:
            return iter(paths.items())

        monkeypatch.setattr(cgroups, "walk", walk)
        monkeypatch.setattr(cgroups, "root", lambda: Path("/nowhere"))
        monkeypatch.setattr(cgroups, "version", lambda: "v2")

    return make


def test_what_is_below_is_selected_too(tree: Callable[[dict[str, int]], None]) -> None:
    tree(
        {"": 1, "/system.slice": 2, "/system.slice/a.service": 3, "/system.slice/a.service/below": 4, "/a.service2": 5}
    )
    assert Selection(Wanted("unit", "a"), Lookup()).ids() == ({3, 4}, 0)


def test_a_name_that_none_has_lists_those_that_there_are(tree: Callable[[dict[str, int]], None]) -> None:
    tree({"": 1, **{f"/system.slice/u{number:02}.service": 9 + number for number in range(22)}})
    with pytest.raises(NotFound) as caught:
        Selection(Wanted("unit", "b"), Lookup()).check()
    assert caught.value.cause == "there is no unit b"
    assert caught.value.remedy.startswith("there are: u00.service, u01.service, ")
    assert caught.value.remedy.endswith("u19.service and 2 more")


def test_a_terminal_is_safe_from_the_names_that_are_listed(tree: Callable[[dict[str, int]], None]) -> None:
    tree({"/system.slice/\x1b[31m.service": 3})
    with pytest.raises(NotFound) as caught:
        Selection(Wanted("unit", "b"), Lookup()).check()
    assert "\x1b" not in caught.value.remedy


def test_a_process_has_its_first_threads_name_and_its_command_line() -> None:
    mine = processes.read(os.getpid())
    assert mine is not None
    assert mine.comm == Path("/proc/self/comm").read_text().strip()
    words = Path("/proc/self/cmdline").read_bytes()[: processes.CMDLINE_BYTES].rstrip(b"\0").replace(b"\0", b" ")
    assert mine.cmdline.encode() == words
    assert mine.netns_ino == Path("/proc/self/ns/net").stat().st_ino
    assert processes.read(os.getpid(), cmdline=False) == processes.Process(
        mine.pid, mine.start_ticks, mine.comm, "", mine.cgroup, mine.netns_ino
    )


def test_processes_and_cgroups_that_are_gone_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "path_of", lambda _: None)
    assert Lookup().find([12345], [1 << 22]) == lookup.Found()


@pytest.mark.parametrize("error", [NotFound("no cgroup v2", "mount it"), PermissionError(1, "not allowed")])
def test_where_no_cgroup_can_be_opened_by_its_id_processes_tell_theirs(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(_: int) -> str:
        raise error

    monkeypatch.setattr(cgroups, "path_of", refuse)
    monkeypatch.setattr(cgroups, "version", lambda: "v2")
    monkeypatch.setattr(host, "root", lambda: Path("/"))
    found = Lookup().find([1], [os.getpid()])
    assert [each.path for each in found.workloads] == [each.cgroup for each in found.processes]


def test_only_these_kinds_have_names() -> None:
    assert select.names("unit", CONTAINER) == []
    assert select.names("container", UNIT) == []
    assert select.names("pod", IN_POD) == ["prod/web-7d9c"]
