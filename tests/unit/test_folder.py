# SPDX-License-Identifier: Apache-2.0
"""Files land in the folder that was opened, whatever others put in its path, and never in what is there already."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from cwndtrace.store import folder
from cwndtrace.store.folder import Folder, UnsafePath


def names(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir())


@pytest.fixture
def made(tmp_path: Path) -> Folder:
    return Folder.make(tmp_path / "new", None)


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all that this user owns somebody else's: neither root's nor that of the user for whom files are made."""
    monkeypatch.setattr(folder, "_file_system_uid", lambda: 54321)
    plain = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        status = plain(descriptor)
        return os.stat_result([*status[:4], 12345, *status[5:]])

    monkeypatch.setattr(os, "fstat", fstat)


def test_a_folder_is_new_empty_and_its_owners(tmp_path: Path, made: Folder) -> None:
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert made.path.resolve() == tmp_path / "new"
    for there in ("new", "file"):
        (tmp_path / "file").touch()
        with pytest.raises(FileExistsError):
            Folder.make(tmp_path / there, None)
    with pytest.raises(FileNotFoundError):
        Folder.make(tmp_path / "none" / "new", None)
    with pytest.raises(NotADirectoryError):
        Folder.make(tmp_path / "file" / "new", None)


@pytest.mark.usefixtures("strangers")
def test_a_strangers_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafePath, match="somebody put another folder in its place"):
        Folder.make(tmp_path / "new", None)


def test_a_folder_that_somebody_filled_at_once_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(parent: int, name: str) -> None:
        os.mkdir(name, dir_fd=parent)
        os.mkdir(f"{name}/theirs", dir_fd=parent)

    monkeypatch.setattr(folder, "_make_in", make)
    with pytest.raises(UnsafePath, match="somebody put another folder in its place"):
        Folder.make(tmp_path / "new", None)


def test_links_of_the_own_user_are_followed_and_endless_ones_are_not(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "relative").symlink_to("real")
    (tmp_path / "absolute").symlink_to(tmp_path / "relative")
    Folder.make(tmp_path / "absolute" / "new", None).close()
    assert (tmp_path / "real" / "new").is_dir()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels") as caught:
        Folder.make(tmp_path / "loop" / "new", None)
    assert caught.value.errno == errno.ELOOP


def test_forty_links_are_followed_as_by_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    for number in range(41):
        (tmp_path / str(number + 1)).symlink_to(str(number))
    Folder.make(tmp_path / "40" / "new", None).close()
    with pytest.raises(OSError, match="Too many levels"):
        Folder.make(tmp_path / "41" / "newer", None)


@pytest.mark.usefixtures("strangers")
def test_a_strangers_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(UnsafePath, match="a symbolic link in the path belongs to user 12345"):
        folder._reach(tmp_path / "link")
    os.close(folder._reach(tmp_path / "real"))


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    before = len(names(Path("/proc/self/fd")))
    for name in ("a/b", "loop/b", "new"):
        try:
            Folder.make(tmp_path / name, None).close()
        except OSError:
            continue
    folder.refuse(tmp_path / "other", None)
    folder.rename(tmp_path / "new", "newer", None)
    folder.remove(tmp_path / "newer", None)
    assert len(names(Path("/proc/self/fd"))) == before
    assert names(tmp_path) == ["loop"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, made: Folder) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise ZeroDivisionError

    made.write("one", lambda file: file.write(b"first"))
    with pytest.raises(ZeroDivisionError):
        made.write("one", fail)
    with pytest.raises(ZeroDivisionError):
        made.write("two", fail)
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "new").iterdir()] == [("one", b"first")]
    assert (tmp_path / "new" / "one").stat().st_mode & 0o777 == 0o600
    made.write("one", lambda file: file.write(b"second"))
    assert (tmp_path / "new" / "one").read_bytes() == b"second"


def test_a_new_file_goes_neither_into_one_that_is_there_nor_through_a_link(tmp_path: Path, made: Folder) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "new" / "link").symlink_to(victim)
    (tmp_path / "new" / "there").write_bytes(b"old")
    (tmp_path / "new" / "dangling").symlink_to(tmp_path / "none")
    for name in ("link", "there", "dangling"):
        with pytest.raises(FileExistsError), made._new(name):
            pytest.fail("it was opened")
    # A leftover, or a link in its place, is removed and not followed.
    (tmp_path / "new" / ".one.tmp").symlink_to(victim)
    made.write("one", lambda file: file.write(b"mine"))
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "none").exists()
    assert (tmp_path / "new" / "one").read_bytes() == b"mine"


def test_a_folder_that_was_moved_stays_the_one_that_is_written_to(tmp_path: Path, made: Folder) -> None:
    (tmp_path / "new").rename(tmp_path / "moved")
    (tmp_path / "new").mkdir()
    made.write("one", lambda file: file.write(b"x"))
    with made.inside("below") as below:
        below.write("two", lambda file: file.write(b"y"))
        below.sync()
    with made.inside("below") as again:
        assert names(again.path) == ["two"]
    assert names(tmp_path / "moved") == ["below", "one"]
    assert names(tmp_path / "new") == []


def test_a_folder_below_is_not_reached_through_a_link(tmp_path: Path, made: Folder) -> None:
    (tmp_path / "new" / "below").symlink_to(tmp_path)
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        made.inside("below")


def test_only_files_of_the_own_user_are_linked(tmp_path: Path, made: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "part").write_bytes(b"rows")
    with (tmp_path / "part").open("rb") as part:
        assert made.link("mine", part)
        assert (tmp_path / "new" / "mine").samefile(tmp_path / "part")
        assert not made.link("mine", part)
        monkeypatch.setattr(folder, "_file_system_uid", lambda: 54321)
        assert not made.link("theirs", part)
    assert names(tmp_path / "new") == ["mine"]


def test_a_lock_is_seen_wherever_the_folder_has_been_moved(tmp_path: Path, made: Folder) -> None:
    assert not made.locked()
    (place,) = (path for path in tmp_path.iterdir() if path.is_dir())
    place.rename(tmp_path / "moved")
    descriptor = os.open(tmp_path / "moved", os.O_RDONLY)
    try:
        assert not made.locked()
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        assert made.locked()
        assert made.locked()
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        assert not made.locked()
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # looking for a lock leaves none
        assert made.locked()
    finally:
        os.close(descriptor)
    assert not made.locked()


def test_where_no_lock_can_be_had_there_is_none(made: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    assert not made.locked()
    monkeypatch.undo()
    made.close()
    assert not made.locked()


def test_a_discarded_file_may_be_gone_already(tmp_path: Path, made: Folder) -> None:
    made.discard("none")
    (tmp_path / "new" / "one").touch()
    made.discard("one")
    assert names(tmp_path / "new") == []


def test_what_would_be_refused_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder.refuse(tmp_path / "new", None)
    (tmp_path / "dangling").symlink_to("none")
    for there in (tmp_path, tmp_path / "dangling"):
        with pytest.raises(FileExistsError):
            folder.refuse(there, None)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def access(path: str, mode: int, **options: object) -> bool:
        asked.append((path, mode, options["effective_ids"]))
        return False

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(PermissionError):
        folder.refuse(tmp_path / "new", None)
    assert asked == [(".", os.W_OK | os.X_OK, True)]


def test_a_folder_is_renamed_beside_itself_and_removed_with_all_in_it(tmp_path: Path) -> None:
    (tmp_path / "a" / "below").mkdir(parents=True)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    folder.rename(tmp_path / "a", "b", None)
    assert names(tmp_path) == ["b", "kept"]
    folder.remove(tmp_path / "b", None)
    assert names(tmp_path) == ["kept"]
    assert names(tmp_path / "kept") == ["file"]
    with pytest.raises(FileNotFoundError):
        folder.remove(tmp_path / "b", None)


def test_nothing_can_be_made_in_proc_and_in_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing can be made in that file system"):
        Folder.make(Path("/proc/new"), None)
    gone = tmp_path / "gone"
    gone.mkdir()
    descriptor = os.open(gone, os.O_RDONLY | os.O_DIRECTORY)
    gone.rmdir()
    with pytest.raises(FileNotFoundError):
        folder._make_in(descriptor, "new")
    os.close(descriptor)
