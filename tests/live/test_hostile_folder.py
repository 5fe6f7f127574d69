# SPDX-License-Identifier: Apache-2.0
"""Tests in which root writes a capture where another user keeps replacing folders and files by symbolic links.

Nothing outside of the capture may be created, changed, replaced or given to another user. The attacker is a process of
another user.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pytest

from cwndtrace import privileges
from cwndtrace.errors import CaptureError
from cwndtrace.records import arrow
from cwndtrace.store import CaptureWriter
from tests.harness.users import GID, UID, need_readable_checkout

pytestmark = pytest.mark.live

ATTACKER = privileges.User(UID, GID, (GID,), "attacker")
SECONDS = 1.5
TABLES = ("block_io", "cwnd_reset")

ATTACK = """
import itertools, json, os, sys
capture, victim, tables = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
done = dict.fromkeys(("capture", "folder", "file", "refused"), 0)

def swap(kind, path, target):
    aside = f"{path}.aside"
    try:
        os.rename(path, aside)
        os.symlink(target, path)
        done[kind] += 1
        os.unlink(path)
        os.rename(aside, path)
    except OSError:
        done["refused"] += 1
        for undo in (lambda: os.path.islink(path) and os.unlink(path), lambda: os.rename(aside, path)):
            try:
                undo()
            except OSError:
                pass

def plant(path, target):
    # Put a link where a file will be written.
    try:
        os.symlink(target, path)
        done["file"] += 1
        os.unlink(path)
    except OSError:
        done["refused"] += 1

print("ready", flush=True)
for n in itertools.count(1):
    if n % 50 == 0 and os.path.exists(sys.argv[4]):
        break
    swap("capture", capture, victim)
    for table in tables:
        swap("folder", f"{capture}/{table}", victim)
        for part in range(1, 4):
            for name in (f"part-{part:06}.parquet", f".part-{part:06}.parquet.tmp"):
                plant(f"{capture}/{table}/{name}", f"{victim}/new")
                plant(f"{capture}/{table}/{name}", f"{victim}/file")
    for name in (".meta.json.tmp", "meta.json"):
        plant(f"{capture}/{name}", f"{victim}/file")
        swap("file", f"{capture}/{name}", f"{victim}/file")
print(json.dumps(done), flush=True)
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with ``victim``, which belongs to root, and ``home``, which belongs to the attacker."""
    need_readable_checkout()
    folder = Path(tempfile.mkdtemp(prefix="cwndtrace-test-", dir="/tmp"))
    folder.chmod(0o755)
    (folder / "victim").mkdir()
    (folder / "victim/file").write_text("root's")
    (folder / "home").mkdir()
    os.chown(folder / "home", UID, GID)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def state(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return inode, owner, group, mode, size and mtime in ns of a folder and of everything in it."""
    paths = [folder, *(p for p in folder.rglob("*"))]
    states = {str(p): p.lstat() for p in paths}
    return {name: (s.st_ino, s.st_uid, s.st_gid, s.st_mode, s.st_size, s.st_mtime_ns) for name, s in states.items()}


@contextmanager
def attacked(place: Path, capture: Path) -> Iterator[dict[str, int]]:
    """Run the attacker meanwhile; the yielded dict has the counts of its actions afterwards."""
    stop = place / "stop"
    command = [sys.executable, "-c", ATTACK, str(capture), str(place / "victim"), ",".join(TABLES), str(stop)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, user=UID, group=GID, extra_groups=[])
    done: dict[str, int] = {}
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield done
        stop.touch()
        done |= json.loads(process.communicate(timeout=60)[0])
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def rows(number: int) -> pa.Table:
    schema = arrow.schema(TABLES[number % len(TABLES)])
    return pa.Table.from_pylist([dict.fromkeys(schema.names)], schema=schema)


def write(writer: CaptureWriter, path: Path, victim: Path) -> tuple[int, int, int]:
    """Write parts for some seconds; return the counts of parts, refusals, and times that the path led to the victim."""
    written = refused = led = 0
    begin = time.monotonic()
    while (spent := time.monotonic() - begin) < SECONDS or (not led and spent < 20 * SECONDS):
        writer.add(TABLES[written % len(TABLES)], rows(written))
        try:
            writer.flush(force=True)
            writer.update_meta(parts=written)
            written += 1
        except CaptureError:
            refused += 1
        with suppress(OSError):
            led += path.stat().st_ino == victim.stat().st_ino
    return written, refused, led


@pytest.mark.parametrize("user", [None, ATTACKER], ids=["root's capture", "the attacker's own capture"])
def test_links_in_place_of_folders_and_files_lead_nowhere(user: privileges.User | None, place: Path) -> None:
    victim, path = place / "victim", place / "home/a.cwnd"
    before = state(victim)
    writer = CaptureWriter.create(path, {}, user=user)
    with attacked(place, path) as done:
        written, refused, led = write(writer, path, victim)
    print(f"{written} parts written, {refused} refused, the path led to the victim {led} times, attacker: {done}")
    assert state(victim) == before
    assert (victim / "file").read_text() == "root's"
    assert done["capture"] > 50
    assert led > 0, "the attacker never won the race"
    if user is None:
        # The attacker can't change anything inside root's capture, and moving the whole capture does no harm.
        assert refused == 0
        writer.close()
        assert sum(writer.capture().rows(table) for table in TABLES) == written
    else:
        assert done["folder"] > 50
        with_owner = {p.lstat().st_uid for p in (place / "home").rglob("*")}
        assert with_owner == {UID}


def test_captures_are_made_in_the_given_folder_or_nowhere(place: Path) -> None:
    """The folder above becomes a link while captures are made."""
    victim, folder = place / "victim", place / "home/folder"
    folder.mkdir()
    os.chown(folder, UID, GID)
    before = state(victim)
    created = refused = 0
    reasons = set[str]()
    with attacked(place, folder) as done:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            try:
                CaptureWriter.create(folder / f"{created}.cwnd", {}).close()
                created += 1
            except CaptureError as e:
                refused += 1
                reasons.add(e.cause.split(".cwnd ")[-1])
    print(f"{created} captures made, {refused} refused, attacker: {done}, {reasons}")
    assert state(victim) == before
    assert (created > 0, refused > 0) == (True, True)
    assert any("symbolic link" in reason for reason in reasons), reasons
    assert sum(1 for _ in (place / "home").rglob("meta.json")) == created


def test_a_link_of_roots_is_followed_and_an_untrusted_one_is_not(place: Path) -> None:
    (place / "rooted").symlink_to(place / "victim")
    (place / "home/planted").symlink_to(place / "victim")
    os.lchown(place / "home/planted", UID, GID)
    CaptureWriter.create(place / "rooted/a.cwnd", {}).close()
    assert (place / "victim/a.cwnd/meta.json").is_file()
    with pytest.raises(CaptureError, match=f"a symbolic link in the path belongs to user {UID}") as caught:
        CaptureWriter.create(place / "home/planted/b.cwnd", {})
    assert "-o" in caught.value.remedy
    # With the rights of the link's owner the link can't be followed, so root makes nothing.
    with pytest.raises(CaptureError):
        CaptureWriter.create(place / "home/planted/b.cwnd", {}, user=ATTACKER)
    assert not (place / "victim/b.cwnd").exists()


def test_only_the_calling_thread_acts_as_the_user(place: Path) -> None:
    entered, leave, seen = threading.Event(), threading.Event(), list[int]()

    def act() -> None:
        with privileges.acting_as(ATTACKER):
            with privileges.acting_as(ATTACKER):
                pass
            (place / "home/mine").touch()
            entered.set()
            leave.wait(20)
        (place / "home/roots").touch()

    thread = threading.Thread(target=act)
    thread.start()
    assert entered.wait(20)
    (place / "home/others").touch()
    seen.append(os.geteuid())
    leave.set()
    thread.join()
    owners = {name: (place / "home" / name).stat().st_uid for name in ("mine", "others", "roots")}
    assert (owners, seen) == ({"mine": UID, "others": 0, "roots": 0}, [0])
    with privileges.acting_as(ATTACKER), pytest.raises(PermissionError):
        (place / "victim/x").touch()
    # run uses this to find out whether it can continue as the user, who may not be able to read the installation.
    open_, closed = place / "victim/file", place / "closed"
    closed.touch(mode=0o600)
    assert privileges.unreadable(ATTACKER, [open_, place / "home/mine"]) is None
    assert privileges.unreadable(ATTACKER, [open_, closed]) == closed
