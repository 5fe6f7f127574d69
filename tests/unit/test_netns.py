# SPDX-License-Identifier: Apache-2.0
"""Namespaces, cgroups, processes and interfaces by name, as far as it goes without root."""

from __future__ import annotations

import gzip
import os
import socket
from pathlib import Path

import pytest

from cwndtrace.capture import target
from cwndtrace.capture.source import Filters
from cwndtrace.errors import KernelLacks, NotFound, UsageError
from cwndtrace.kernel import cgroups, facts, netns, setns, sockets
from cwndtrace.tcp import IDLE_SYSCTL


def test_this_namespace_is_found_by_each_of_its_names() -> None:
    own = netns.own()
    assert own.inode == Path("/proc/self/ns/net").stat().st_ino
    for text in (str(os.getpid()), "/proc/self/ns/net", str(own.inode)):
        assert netns.find(text).inode == own.inode
    assert own.inode in {each.inode for each in netns.all_reachable()}


def test_each_namespace_comes_once() -> None:
    inodes = [each.inode for each in netns.all_reachable()]
    assert len(inodes) == len(set(inodes))
    assert inodes[0] == netns.own().inode


@pytest.mark.parametrize("text", ["nowhere", "4294967295", "/etc/passwd/x", "/etc/passwd", "/proc/self/ns", "", "."])
def test_a_namespace_that_is_not_there_lists_those_that_are(text: str) -> None:
    with pytest.raises(NotFound, match="no network namespace") as caught:
        netns.find(text)
    assert "there are: this" in caught.value.remedy


def test_only_a_network_namespace_is_opened(tmp_path: Path) -> None:
    """Nothing else is, not even to look what it is: a pipe would have this wait, and a device may act."""
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


def test_a_process_is_named_with_its_namespace() -> None:
    assert netns.find(str(os.getpid())).name == f"{sockets.comm(os.getpid())}[{os.getpid()}]"


def test_a_sysctl() -> None:
    assert netns.read_sysctl(IDLE_SYSCTL) in (0, 1)


def test_sockets_of_a_process_and_their_holders() -> None:
    with socket.socket() as made:
        inode = os.fstat(made.fileno()).st_ino
        assert inode in sockets.inodes_of(os.getpid())
        pid, name = sockets.holders()[inode]
        assert pid == os.getpid()
        assert name == sockets.comm(pid)
    assert inode not in sockets.inodes_of(os.getpid())
    assert sockets.inodes_of(2**22 + 1) == set()
    assert sockets.comm(2**22 + 1) == ""


# ---- what a person names ---------------------------------------------------------------------------


def test_filters_of_nothing_let_all_through() -> None:
    assert target.resolve() == Filters()


def test_plain_filters() -> None:
    filters = target.resolve(pid=os.getpid(), port=443, family=6, min_idle_s=0.25)
    assert (filters.pid, filters.port, filters.family, filters.min_idle_us) == (os.getpid(), 443, 10, 250_000)
    assert target.resolve(family=4).family == 2


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_ports_out_of_range(port: int) -> None:
    with pytest.raises(UsageError, match=f"no port {port}"):
        target.resolve(port=port)


def test_a_rest_is_not_negative() -> None:
    with pytest.raises(UsageError, match="can't be negative"):
        target.resolve(min_idle_s=-1)


def test_a_process_that_is_not_there() -> None:
    with pytest.raises(NotFound, match="no process 4194305"):
        target.resolve(pid=2**22 + 1)


@pytest.mark.parametrize("pid", [0, -1])
def test_a_pid_that_is_none(pid: int) -> None:
    with pytest.raises(NotFound, match=f"no process {pid}"):
        target.resolve(pid=pid)


# ---- cgroups ---------------------------------------------------------------------------------------


def test_where_cgroups_are(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("proc /proc proc rw 0 0\nnone /a/cgroup2 cgroup2 rw 0 0\n")
    assert cgroups.mount_point(mounts) == Path("/a/cgroup2")
    mounts.write_text("proc /proc proc rw 0 0\n")
    with pytest.raises(NotFound, match="isn't mounted") as caught:
        cgroups.mount_point(mounts)
    assert caught.value.remedy.startswith("mount -t cgroup2")


def test_a_folder_that_looks_like_a_cgroup_is_none(tmp_path: Path) -> None:
    """Anybody can make a file of that name."""
    (tmp_path / "cgroup.controllers").touch()
    for name in (str(tmp_path), str(tmp_path / "cgroup.controllers"), "/proc", "nothing", "no\0thing"):
        with pytest.raises(NotFound, match="cgroup"):
            cgroups.find(name)
    assert cgroups.ids(tmp_path) == (set(), 0)
    assert cgroups.ids(tmp_path / "gone") == (set(), 0)


# ---- facts -----------------------------------------------------------------------------------------


def test_hz_from_the_kernels_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.gz").write_bytes(gzip.compress(b"CONFIG_HZ_300=y\nCONFIG_HZ=300\n"))
    assert facts.hz(proc=tmp_path) == 300


def test_hz_from_boot(tmp_path: Path) -> None:
    (tmp_path / f"config-{os.uname().release}").write_text("CONFIG_HZ=100\n")
    assert facts.hz(boot=tmp_path, proc=tmp_path) == 100


def test_hz_that_nothing_tells(tmp_path: Path) -> None:
    with pytest.raises(KernelLacks, match="can't tell the kernel's HZ") as caught:
        facts.hz(boot=tmp_path, proc=tmp_path)
    assert "/boot" in caught.value.remedy
