# SPDX-License-Identifier: Apache-2.0
"""Cgroups are found and walked. A folder stands in for their file system, whose type is then that of the folder's."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from pathlib import Path

import pytest

from cwndtrace import _libc
from cwndtrace.errors import NotFound
from cwndtrace.kernel import cgroups, host


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "top"
    for name in ("web/one", "web/two", "db"):
        (made / name).mkdir(parents=True)
    (made / "cgroup.procs").touch()
    (made / "db" / "link").symlink_to(made / "web")
    monkeypatch.setattr(cgroups, "_open", lambda folder: os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
    return made


def test_all_cgroups_below_one_are_walked_upper_levels_first(top: Path) -> None:
    unseen = [0]
    paths = list(cgroups.walk(top, unseen))
    assert [inode for _, inode in paths] == [(top / f".{path}").stat().st_ino for path, _ in paths]
    names = [path for path, _ in paths]
    assert names[0] == ""
    assert sorted(names[1:3]) == ["/db", "/web"]
    assert sorted(names[3:]) == ["/web/one", "/web/two"]
    assert unseen == [0]
    assert cgroups.ids(top) == ({inode for _, inode in paths}, 0)


def test_cgroups_beyond_the_limit_are_counted(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for most, found in ((5, (5, 0)), (4, (4, 1)), (3, (3, 2)), (1, (1, 2))):
        monkeypatch.setattr(cgroups, "_MOST_FOLDERS", most)
        ids, unseen = cgroups.ids(top)
        assert (len(ids), unseen) == found


@pytest.mark.parametrize(
    ("number", "unseen"), [(errno.ENOENT, 0), (errno.ENODEV, 0), (errno.ENOTDIR, 0), (errno.EACCES, 1)]
)
def test_a_cgroup_that_vanishes_is_not_missed_but_one_that_is_closed_is(
    top: Path, monkeypatch: pytest.MonkeyPatch, number: int, unseen: int
) -> None:
    below = cgroups._below

    def refuse(descriptor: int, name: str) -> list[tuple[str, int]]:
        if name == "./db":
            raise OSError(number, os.strerror(number))
        return below(descriptor, name)

    monkeypatch.setattr(cgroups, "_below", refuse)
    ids, more = cgroups.ids(top)
    assert (len(ids), more) == (5, unseen)


def test_a_walk_leaves_no_descriptor_open(top: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    cgroups.ids(top)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_folder_of_another_file_system_is_no_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match="not a cgroup"):
        cgroups._open(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before

    def fstatfs(_: int, out: ctypes.Array[ctypes.c_char]) -> int:
        struct.pack_into("l", out, 0, 0x63677270)
        return 0

    monkeypatch.setattr(_libc.lib, "fstatfs", fstatfs)
    os.close(cgroups._open(tmp_path))
    with pytest.raises(OSError, match="not a cgroup"):
        cgroups._open(tmp_path, 0x27E0EB)
    monkeypatch.setattr(_libc.lib, "fstatfs", lambda *_: -1)
    with pytest.raises(OSError, match="not a cgroup"):
        cgroups._open(tmp_path)


@pytest.mark.parametrize(
    ("mounts", "version"), [("2", "v2"), ("1", "v1"), ("12", "hybrid"), ("21", "hybrid"), ("", "none")]
)
@pytest.mark.parametrize("everything", [True, False])
def test_the_versions_are_those_that_are_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounts: str, version: str, everything: bool
) -> None:
    kinds = {"1": "cgroup", "2": "cgroup2"}
    text = "".join(f"30 20 0:9 / /a rw - {kinds[each]} {kinds[each]} rw\n" for each in mounts)
    (tmp_path / "mountinfo").write_text(f"{text}31 20 0:8 / /proc rw shared:1 - proc proc rw\n")
    asked = []

    def path(place: str) -> Path:
        asked.append(place)
        return tmp_path / "mountinfo"

    monkeypatch.setattr(host, "sees_all_processes", lambda: everything)
    monkeypatch.setattr(cgroups, "_MOUNTS", tmp_path / "mountinfo")
    made = Path
    monkeypatch.setattr(cgroups, "Path", lambda place: path(place) if place == "/proc/1/mountinfo" else made(place))
    assert cgroups.version() == version
    assert asked == (["/proc/1/mountinfo"] if everything else [])


def test_the_mounts_are_those_of_this_process() -> None:
    assert ("proc", "/", Path("/proc")) in set(cgroups._mounts(cgroups._MOUNTS))


@pytest.fixture
def by_handle(top: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, Path | int]:
    """Return what the kernel opens by a cgroup's id: a path, or an error's number."""
    there: dict[int, Path | int] = {}

    def syscall(name: str, _: int, handle: ctypes.Array[ctypes.c_char], flags: int) -> int:
        size, kind, number = struct.unpack_from("=IiQ", handle.raw)
        assert (name, size, kind, len(handle.raw)) == ("open_by_handle_at", 8, 0xFE, 16)
        assert flags == os.O_PATH | os.O_CLOEXEC
        what = there.get(number, errno.ESTALE)
        if isinstance(what, int):
            raise OSError(what, os.strerror(what))
        return os.open(what, flags)

    descriptor = os.open(top, os.O_RDONLY)
    monkeypatch.setattr(cgroups, "_top", lambda: descriptor)
    monkeypatch.setattr(_libc, "syscall", syscall)
    return there


def test_a_cgroup_has_the_path_below_the_top(top: Path, by_handle: dict[int, Path | int]) -> None:
    strange = top / os.fsdecode(b"a\xff")
    strange.mkdir()
    by_handle |= {1: top, 2: top / "web" / "one", 3: strange, 4: errno.ENOENT, 5: errno.EPERM}
    assert cgroups.path_of(1) == "/"
    assert cgroups.path_of(2) == "/web/one"
    # In ISO-8859-1 the byte is a character.
    assert cgroups.path_of(3) == ("/a\xff" if os.fsdecode(b"\xff") == "\xff" else "/a\\xff")
    assert cgroups.path_of(4) is None
    assert cgroups.path_of(99) is None
    with pytest.raises(PermissionError):
        cgroups.path_of(5)


def test_a_folder_is_shown_as_users_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "root", lambda: Path("/proc/1/root"))
    assert cgroups.shown(Path("/proc/1/root/sys/fs/cgroup/web")) == "/sys/fs/cgroup/web"
    assert cgroups.shown(Path("/proc/self/fd/7/web/one")) == "/web/one"
    assert cgroups.shown(Path("/proc/self/fd/7")) == "/."
    assert cgroups.shown(Path("/sys/fs/cgroup/web")) == "/sys/fs/cgroup/web"


def test_without_a_mount_point_cgroups_are_mounted_without_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text("")
    monkeypatch.setattr(cgroups, "mount_point", lambda mounts=tmp_path / "mounts", of=cgroups.mount_point: of(mounts))
    monkeypatch.setattr(cgroups, "_mount_detached", lambda: 7)
    assert cgroups.root() == Path("/proc/self/fd/7")

    def refuse() -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(cgroups, "_mount_detached", refuse)
    with pytest.raises(NotFound) as caught:
        cgroups.root()
    assert str(caught.value.cause) == (
        "cgroup v2 isn't mounted where this process can see it, and this process may not mount it: "
        "Operation not permitted"
    )
    assert caught.value.remedy == "mount -t cgroup2 none /sys/fs/cgroup, as root"


def test_a_mount_without_a_mount_point_is_made_and_its_context_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    context = os.open("/dev/null", os.O_RDONLY)

    def syscall(*call: object) -> int:
        calls.append(call)
        return context if call[0] == "fsopen" else 9

    monkeypatch.setattr(_libc, "syscall", syscall)
    assert cgroups._mount_detached.__wrapped__() == 9
    assert calls == [
        ("fsopen", b"cgroup2", 1), ("fsconfig", context, 6, None, None, 0), ("fsmount", context, 1, 0),
    ]  # fmt: skip
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(context)
