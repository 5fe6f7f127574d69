# SPDX-License-Identifier: Apache-2.0
"""Namespaces, cgroups and processes are found by name, without root."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from cwndtrace.capture import target
from cwndtrace.capture.source import Filters
from cwndtrace.errors import NotFound, UsageError
from cwndtrace.kernel import cgroups, host, netns, setns, sockets
from cwndtrace.tcp import IDLE_SYSCTL


def test_the_own_namespace_is_found_by_each_of_its_names() -> None:
    own = netns.own()
    assert own.inode == Path("/proc/self/ns/net").stat().st_ino
    for text in (str(os.getpid()), "/proc/self/ns/net", str(own.inode)):
        assert netns.find(text).inode == own.inode
    assert own.inode in {namespace.inode for namespace in netns.all_reachable()}


def test_each_namespace_is_listed_once() -> None:
    inodes = [namespace.inode for namespace in netns.all_reachable()]
    assert len(inodes) == len(set(inodes))
    assert inodes[0] == netns.own().inode


@pytest.mark.parametrize("text", ["nowhere", "4294967295", "/etc/passwd/x", "/etc/passwd", "/proc/self/ns", "", "."])
def test_an_unknown_namespace_raises_an_error_that_lists_the_known_ones(text: str) -> None:
    with pytest.raises(NotFound, match="no network namespace") as caught:
        netns.find(text)
    assert "there are: this" in caught.value.remedy


def test_only_a_network_namespace_is_opened(tmp_path: Path) -> None:
    """Other files aren't opened even to find their type, because a pipe would block and a device might act."""
    pipe, plain = tmp_path / "pipe", tmp_path / "plain"
    os.mkfifo(pipe)
    plain.touch()
    for path in (pipe, plain, Path("/dev/null"), tmp_path, Path("/proc/self/ns/mnt")):
        with pytest.raises(OSError, match=r"not a (network )?namespace"):
            setns.opened(path)
        with pytest.raises(NotFound):
            netns.find(str(path))
    own = netns.own()
    os.close(setns.opened(own.path, own.inode))
    with pytest.raises(OSError, match="another network namespace is there now"):
        setns.opened(own.path, own.inode + 1)


def test_a_namespace_found_by_pid_is_named_after_its_process() -> None:
    assert netns.find(str(os.getpid())).name == f"{sockets.comm(os.getpid())}[{os.getpid()}]"


def test_the_idle_sysctl_is_0_or_1() -> None:
    assert netns.read_sysctl(IDLE_SYSCTL) in (0, 1)


def test_the_sockets_of_a_process_and_their_holders_are_found() -> None:
    with socket.socket() as sock:
        inode = os.fstat(sock.fileno()).st_ino
        assert inode in sockets.inodes_of(os.getpid())
        pid, name = sockets.holders()[inode]
        assert pid == os.getpid()
        assert name == sockets.comm(pid)
    assert inode not in sockets.inodes_of(os.getpid())
    assert sockets.inodes_of(2**22 + 1) == set()
    assert sockets.comm(2**22 + 1) == ""


# ---- filters of the command line -------------------------------------------------------------------


def test_no_arguments_give_empty_filters() -> None:
    assert target.resolve() == Filters()


def test_filters_are_in_the_units_of_the_kernel() -> None:
    filters = target.resolve(pid=os.getpid(), port=443, family=6, min_idle_s=0.25)
    assert (filters.pid, filters.port, filters.family, filters.min_idle_us) == (os.getpid(), 443, 10, 250_000)
    assert target.resolve(family=4).family == 2


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_ports_out_of_range_are_refused(port: int) -> None:
    with pytest.raises(UsageError, match=f"no port {port}"):
        target.resolve(port=port)


def test_a_negative_idle_time_is_refused() -> None:
    with pytest.raises(UsageError, match="can't be negative"):
        target.resolve(min_idle_s=-1)


def test_an_unknown_process_is_refused() -> None:
    with pytest.raises(NotFound, match="no process 4194305"):
        target.resolve(pid=2**22 + 1)


@pytest.mark.parametrize("pid", [0, -1])
def test_a_pid_below_1_is_refused(pid: int) -> None:
    with pytest.raises(NotFound, match=f"no process {pid}"):
        target.resolve(pid=pid)


def test_a_pid_of_another_pid_namespace_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel knows processes by their pids on the host, so such a filter would let another process through."""
    monkeypatch.setattr(host, "sees_all_processes", lambda: False)
    with pytest.raises(UsageError, match="another pid on the host") as caught:
        target.resolve(pid=os.getpid())
    assert "--pid=host" in caught.value.remedy
    assert target.resolve(port=443) == Filters(port=443)


def test_in_a_container_an_unknown_interface_may_be_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "in_container", lambda: True)
    monkeypatch.setattr(netns, "hosts_inode", lambda: None)
    with pytest.raises(NotFound, match="no interface nothing0") as caught:
        target.resolve(iface="nothing0")
    assert caught.value.remedy.endswith("start this container with --network=host")


def test_named_namespaces_are_those_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run/netns").mkdir(parents=True)
    (tmp_path / "run/netns/blue").symlink_to("/proc/self/ns/net")
    monkeypatch.setattr(host, "root", lambda: tmp_path)
    assert netns.find("blue").path == tmp_path / "run/netns/blue"


# ---- cgroups ---------------------------------------------------------------------------------------


def test_the_mount_point_of_cgroups_is_found(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    proc = "22 27 0:21 / /proc rw,relatime shared:1 - proc proc rw\n"
    part = "41 40 0:36 /../web /b/cgroup2 rw - cgroup2 cgroup2 rw\n"
    mounts.write_text(f"{proc}{part}42 40 0:36 / /a/cgroup2 rw,relatime - cgroup2 cgroup2 rw\n")
    assert cgroups.mount_point(mounts) == Path("/a/cgroup2")
    mounts.write_text(f"{proc}{part}")
    with pytest.raises(NotFound, match="isn't mounted") as caught:
        cgroups.mount_point(mounts)
    assert caught.value.remedy.startswith("mount -t cgroup2")


def test_a_folder_that_only_looks_like_a_cgroup_is_refused(tmp_path: Path) -> None:
    """Any user can create a file of that name."""
    (tmp_path / "cgroup.controllers").touch()
    for name in (str(tmp_path), str(tmp_path / "cgroup.controllers"), "/proc", "nothing", "no\0thing"):
        with pytest.raises(NotFound, match="cgroup"):
            cgroups.find(name)
    assert cgroups.ids(tmp_path) == (set(), 0)
    assert cgroups.ids(tmp_path / "gone") == (set(), 0)


@pytest.mark.parametrize(("below", "remedy"), [(True, "0::"), (False, "unified_cgroup_hierarchy")])
def test_a_cgroup_v1_is_refused_by_each_form_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: bool, remedy: str
) -> None:
    v1, v2 = tmp_path / "memory", tmp_path / "unified"
    for folder in (v1 / "docker" / "x", v2 / "web" if below else v2):
        folder.mkdir(parents=True)

    def opened(folder: Path, kind: int = 2) -> int:
        if (v2 if kind == 2 else v1) not in (folder, *folder.parents):
            raise OSError
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    monkeypatch.setattr(cgroups, "_CGROUP_SUPER_MAGIC", 1)
    monkeypatch.setattr(cgroups, "_open", opened)
    monkeypatch.setattr(cgroups, "_mounted", lambda kind, _: [v1] if kind == "cgroup" else [v2])
    for name in ("docker/x", "/docker/x", str(v1 / "docker/x")):
        with pytest.raises(NotFound, match=rf"{v1}/docker/x is a cgroup v1") as caught:
            cgroups.find(name)
        assert remedy in caught.value.remedy
    with pytest.raises(NotFound, match="no cgroup docker/y"):
        cgroups.find("docker/y")
    assert cgroups.find("/") == v2
