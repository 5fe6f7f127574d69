# SPDX-License-Identifier: Apache-2.0
"""What is traced is resolved from names and numbers, refused where it makes no sense, and named for people."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from cwndtrace.capture import clocks, target
from cwndtrace.capture.source import Filters
from cwndtrace.errors import CwndtraceError, NotFound, PermissionNeeded, UsageError
from cwndtrace.kernel import cgroups, host, interfaces, netns


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "sees_all_processes", lambda: True)
    monkeypatch.setattr(cgroups, "shown", lambda folder: f"/shown{folder}")


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"port": 0}, "no port 0"),
        ({"port": -1}, "no port -1"),
        ({"port": 65536}, "no port 65536"),
        ({"min_idle_s": -0.001}, "idle time can't be negative"),
        ({"cgroup": "a", "unit": "b"}, "more than one workload is named"),
        ({"container": "a", "pod": "default/b"}, "more than one workload is named"),
        ({"pod": "web"}, "no namespace of Kubernetes in web"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(UsageError) as caught:
        target.resolve(**options)
    assert caught.value.cause == cause


def test_numbers_up_to_their_limits_are_taken() -> None:
    for port in (1, 443, 65535):
        assert target.resolve(port=port).port == port
    filters = target.resolve(family=4, min_idle_s=0.0015, pid=os.getpid())
    assert (filters.family, filters.min_idle_us, filters.pid) == (socket.AF_INET, 1500, os.getpid())
    assert target.resolve(min_idle_s=0).min_idle_us == 0
    assert target.resolve(family=6).family == socket.AF_INET6
    assert target.resolve() == Filters()


def test_a_process_that_is_not_there_is_refused() -> None:
    with pytest.raises(NotFound, match="no process 4194305") as caught:
        target.resolve(pid=2**22 + 1)
    assert caught.value.remedy == "see ps; to trace one that isn't running yet, filter by port or cgroup"


def test_an_interface_is_looked_up_in_the_namespace_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    blue, own = netns.Namespace(42, "blue", Path("/run/netns/blue")), netns.own()
    monkeypatch.setattr(netns, "find", lambda name: {"blue": blue}[name])
    monkeypatch.setattr(
        interfaces, "find", lambda name, where: {("eth0", 42): 7, ("eth0", own.inode): 3}[name, where.inode]
    )
    here = target.resolve(iface="eth0")
    assert (here.ifindex, here.netns, here.netns_name) == (3, own.inode, None)
    there = target.resolve(iface="eth0", namespace="blue")
    assert (there.ifindex, there.netns, there.netns_name) == (7, 42, "blue")
    alone = target.resolve(namespace="blue")
    assert (alone.ifindex, alone.netns, alone.netns_name) == (None, 42, "blue")


@pytest.mark.parametrize(
    ("filters", "iface", "words"),
    [
        ({}, None, "this machine"),
        ({"port": 443}, "eth0", "eth0, port 443"),
        ({"pid": 7, "cgroup": Path("/web")}, None, "process 7, cgroup /shown/web"),
        ({"unit": "nginx.service"}, None, "unit nginx.service"),
        ({"pod": "default/web"}, None, "pod default/web"),
        ({"netns": 42}, None, "this machine"),
        ({"netns": 42, "netns_name": "blue"}, None, "network namespace blue (inode 42)"),
        ({"netns": 42, "netns_name": "blue", "port": 1}, None, "port 1 in network namespace blue (inode 42)"),
    ],
)
def test_what_is_traced_has_a_name(filters: dict[str, Any], iface: str | None, words: str) -> None:
    assert target.named(Filters(**filters), iface) == words


def test_tracing_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PermissionNeeded, match="tracing needs root") as caught:
        target.need_root("tracing")
    assert caught.value.remedy == "prefix the command with sudo"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    target.need_root("tracing")


@pytest.mark.parametrize(
    ("offsets", "off"),
    [
        ("monotonic           0         0\nboottime            0         0\n", None),
        ("monotonic        3600         0\nboottime            0         0\n", "3600"),
        ("monotonic           0        -1\nboottime            0         0\n", "0"),
        ("monotonic           0         0\nboottime           10         0\n", None),
        (None, None),
    ],
)
def test_a_namespace_with_another_clock_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offsets: str | None, off: str | None
) -> None:
    if offsets is not None:
        (tmp_path / "offsets").write_text(offsets)
    monkeypatch.setattr(clocks, "_OFFSETS", tmp_path / "offsets")
    if off is None:
        clocks.refuse_other_time()
        return
    with pytest.raises(CwndtraceError, match=f"this time namespace's clock is {off} s off the kernel's") as caught:
        clocks.refuse_other_time()
    assert caught.value.remedy == "trace from outside it: nsenter --time=/proc/1/ns/time"
