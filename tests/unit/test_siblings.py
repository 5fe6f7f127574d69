# SPDX-License-Identifier: Apache-2.0
"""The processes that share a traced process's work are found, and a warning names them and a filter for all."""

from __future__ import annotations

import pytest

from cwndtrace.cli import preflight
from cwndtrace.kernel import siblings, sockets
from cwndtrace.kernel.siblings import Siblings
from tests.harness.loopback import need_loopback
from tests.harness.workers import serving


@pytest.fixture
def loopback() -> None:
    need_loopback()


@pytest.mark.usefixtures("loopback")
def test_the_other_workers_of_a_server_are_found() -> None:
    with serving(1, 3, 0, 2) as server:
        first, second, third, fourth = server.workers
        name = sockets.comm(first)
        found = siblings.of(first)
        assert found is not None
        assert found.processes == [(second, name), (fourth, name)]
        assert (found.held, found.others, found.port) == (1, 5, server.port)
        of_third = siblings.of(third)
        assert of_third is not None
        assert (of_third.held, of_third.others) == (0, 6)


@pytest.mark.usefixtures("loopback")
def test_the_workers_of_a_master_are_found() -> None:
    with serving(1, 2) as server:
        found = siblings.of(server.master)
        assert found is not None
        assert [pid for pid, _ in found.processes] == server.workers[::-1]
        assert (found.held, found.others) == (0, 3)


@pytest.mark.usefixtures("loopback")
def test_a_worker_without_others_has_no_siblings() -> None:
    with serving(2) as server:
        assert siblings.of(server.workers[0]) is None


@pytest.mark.usefixtures("loopback")
def test_a_process_that_is_gone_has_no_siblings() -> None:
    with serving(1, 1) as server:
        gone = server.master
    assert siblings.of(gone) is None


@pytest.mark.parametrize(
    ("port", "cgroup", "cure"),
    [
        (443, "/system.slice/nginx.service", "--cgroup /system.slice/nginx.service traces all of them"),
        (None, "/a b", "--cgroup '/a b' traces all of them"),
        (443, None, "--port 443 traces all of them"),
        (None, None, "trace without -p, or by --cgroup or --port"),
    ],
)
def test_the_warning_says_what_traces_all_of_them(port: int | None, cgroup: str | None, cure: str) -> None:
    text = preflight.left_out(813, Siblings([(814, "nginx")], 43, 17, port, cgroup))
    assert text == (
        f"process 813 has 43 of 60 connections of its program: nginx[814] holds 17 that aren't traced ({cure})"
    )


def test_the_warning_names_a_few_processes() -> None:
    workers = [(pid, "nginx") for pid in range(814, 820)]
    text = preflight.left_out(813, Siblings(workers, 1, 6, 443, None))
    assert "nginx[814], nginx[815], nginx[816] and 3 more hold 6 that aren't traced" in text
    text = preflight.left_out(813, Siblings(workers[:2], 1, 6, 443, None))
    assert "nginx[814] and nginx[815] hold 6" in text
