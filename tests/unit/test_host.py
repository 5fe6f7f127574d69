# SPDX-License-Identifier: Apache-2.0
"""The host as it is found from inside a container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cwndtrace import _libc
from cwndtrace.kernel import host

HOST_ROOT = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
OVERLAY = "700 690 0:55 / / rw,relatime - overlay overlay rw,lowerdir=/l\n"


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a made /proc: this process is in a container and has the host's pid namespace."""
    for pid, mounts in (("1", HOST_ROOT), ("self", OVERLAY)):
        (tmp_path / pid / "ns").mkdir(parents=True)
        (tmp_path / pid / "ns/pid").touch()
        (tmp_path / pid / "mountinfo").write_text(mounts)
    monkeypatch.setattr(host, "_FIRST_PID", (tmp_path / "self/ns/pid").stat().st_ino)
    (tmp_path / "1/root").mkdir()
    return tmp_path


def test_root_is_process_1s_inside_a_container(proc: Path) -> None:
    assert host.in_container(proc)
    assert host.find_root(proc) == (proc / "1/root", None)


def test_a_folder_of_the_hosts_disk_as_root_is_a_container_too(proc: Path) -> None:
    (proc / "self/mountinfo").write_text("27 1 254:0 /srv/web / rw,relatime - ext4 /dev/vda rw\n")
    assert host.in_container(proc)


def test_the_same_root_in_another_mount_namespace_is_no_container(proc: Path) -> None:
    (proc / "self/mountinfo").write_text(HOST_ROOT.replace("27 1", "900 899"))
    assert not host.in_container(proc)
    assert host.find_root(proc) == (Path("/"), None)


def test_a_mount_point_may_have_any_name(proc: Path) -> None:
    for pid in ("1", "self"):
        (proc / pid / "mountinfo").write_bytes(b"40 27 0:9 / /mnt/\xff rw - tmpfs tmpfs rw\n" + HOST_ROOT.encode())
    assert not host.in_container(proc)


def test_mounted_host_is_the_root_where_process_1_is_forbidden(proc: Path) -> None:
    (proc / "1/root").rmdir()
    (proc / "self/mountinfo").write_text(f"{OVERLAY}701 700 254:0 / /host ro,relatime - ext4 /dev/vda rw\n")
    assert host.find_root(proc) == (Path("/host"), None)


def test_another_file_system_at_the_mounted_place_is_refused(proc: Path) -> None:
    (proc / "1/root").rmdir()
    (proc / "self/mountinfo").write_text(f"{OVERLAY}701 700 254:0 /srv /host ro,relatime - ext4 /dev/vda rw\n")
    root, lacking = host.find_root(proc)
    assert root == Path("/")
    assert lacking is not None
    assert "No such file" in lacking


def test_process_1_of_another_pid_namespace_is_not_the_host(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_FIRST_PID", 1)
    assert host.in_container(proc)
    assert host.find_root(proc) == (Path("/"), "this process isn't in the host's pid namespace")


def test_only_the_kernels_first_cgroup_namespace_is_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[tuple[int, int]] = []
    first, other = tmp_path / "first", tmp_path / "other"
    first.touch()
    other.touch()
    tried = [tmp_path / "forbidden", other, first]
    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(host, "_FIRST_CGROUP", first.stat().st_ino)
    monkeypatch.setattr(host, "in_first_cgroup_namespace", lambda: False)
    monkeypatch.setattr(host, "namespaces", lambda kind: tried if kind == "cgroup" else [])
    monkeypatch.setattr(_libc, "setns", lambda fd, kind: entered.append((os.fstat(fd).st_ino, kind)))
    assert host.enter_cgroup_namespace()
    assert entered == [(first.stat().st_ino, _libc.CLONE_NEWCGROUP)]
    tried.pop()
    assert not host.enter_cgroup_namespace()
    monkeypatch.setattr(host, "in_first_cgroup_namespace", lambda: True)
    assert host.enter_cgroup_namespace()
    assert len(entered) == 1
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_absolute_links_stay_below_the_hosts_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/name").write_text("the host's")
    (tmp_path / "var").mkdir()
    (tmp_path / "var/run").symlink_to("/run")
    (tmp_path / "var/out").symlink_to("../../../../etc/passwd")
    monkeypatch.setattr(host, "root", lambda: tmp_path)
    with os.fdopen(host.opened("/var/run/name")) as file:
        assert file.read() == "the host's"
    with pytest.raises(FileNotFoundError):
        host.opened("/var/out")
