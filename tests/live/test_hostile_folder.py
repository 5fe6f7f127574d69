# SPDX-License-Identifier: Apache-2.0
"""Root writes a capture where another user replaces folders and files by symbolic links as fast as it can.

Nothing outside the capture may be made, changed, replaced or given away. The attacker is a process of another user.
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
from tests.harness.users import GID, UID
from tests.others import need_readable_checkout

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
    # A link where a file is about to be written.
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
    """A folder with a ``victim`` of root's and a ``home`` of the attacker's."""
    need_readable_checkout()
    made = Path(tempfile.mkdtemp(prefix="cwndtrace-test-", dir="/tmp"))
    made.chmod(0o755)
    (made / "victim").mkdir()
    (made / "victim/file").write_text("root's")
    (made / "home").mkdir()
    os.chown(made / "home", UID, GID)
    try:
        yield made
    finally:
        shutil.rmtree(made)


def state(folder: Path) -> dict[str, tuple[int, ...]]:
    """All that could be changed of what isn't the attacker's."""
    paths = [folder, *(p for p in folder.rglob("*"))]
    found = {str(p): p.lstat() for p in paths}
    return {name: (s.st_ino, s.st_uid, s.st_gid, s.st_mode, s.st_size, s.st_mtime_ns) for name, s in found.items()}


@contextmanager
def attacked(place: Path, capture: Path) -> Iterator[dict[str, int]]:
    """An attacker at work; what it did is in the dict afterwards."""
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
    """Write parts for some seconds: parts written, refusals, and how often the path led to the victim."""
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
def test_links_in_place_of_folders_and_files(user: privileges.User | None, place: Path) -> None:
    victim, path = place / "victim", place / "home/a.cwnd"
    before = state(victim)
    writer = CaptureWriter.create(path, {}, user=user)
    with attacked(place, path) as done:
        written, refused, led = write(writer, path, victim)
    print(f"{written} parts written, {refused} refused, the path led to the victim {led} times, attacker: {done}")
    assert state(victim) == before
    assert (victim / "file").read_text() == "root's"
    assert done["capture"] > 50
    assert led > 0, "the attacker never got in between"
    if user is None:
        # Inside root's capture the attacker may do nothing, and moving all of it is no hindrance.
        assert refused == 0
        writer.close()
        assert sum(writer.capture().rows(table) for table in TABLES) == written
    else:
        assert done["folder"] > 50
        with_owner = {p.lstat().st_uid for p in (place / "home").rglob("*")}
        assert with_owner == {UID}


def test_where_the_capture_is_made(place: Path) -> None:
    """The folder above it becomes a link while captures are made: they land in it or nowhere."""
    victim, folder = place / "victim", place / "home/folder"
    folder.mkdir()
    os.chown(folder, UID, GID)
    before = state(victim)
    made = refused = 0
    reasons = set[str]()
    with attacked(place, folder) as done:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            try:
                CaptureWriter.create(folder / f"{made}.cwnd", {}).close()
                made += 1
            except CaptureError as e:
                refused += 1
                reasons.add(e.cause.split(".cwnd ")[-1])
    print(f"{made} captures made, {refused} refused, attacker: {done}, {reasons}")
    assert state(victim) == before
    assert (made > 0, refused > 0) == (True, True)
    assert any("symbolic link" in reason for reason in reasons), reasons
    assert sum(1 for _ in (place / "home").rglob("meta.json")) == made


def test_a_link_of_roots_is_followed_and_a_strangers_is_not(place: Path) -> None:
    (place / "rooted").symlink_to(place / "victim")
    (place / "home/planted").symlink_to(place / "victim")
    os.lchown(place / "home/planted", UID, GID)
    CaptureWriter.create(place / "rooted/a.cwnd", {}).close()
    assert (place / "victim/a.cwnd/meta.json").is_file()
    with pytest.raises(CaptureError, match=f"a symbolic link in the path belongs to user {UID}") as caught:
        CaptureWriter.create(place / "home/planted/b.cwnd", {})
    assert "-o" in caught.value.remedy
    # Whose link it is may follow it with their own rights, which don't reach there: root then makes nothing.
    with pytest.raises(CaptureError):
        CaptureWriter.create(place / "home/planted/b.cwnd", {}, user=ATTACKER)
    assert not (place / "victim/b.cwnd").exists()


def test_acting_as_somebody_is_this_threads_alone(place: Path) -> None:
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
    # By which run finds out whether it can go on as somebody: an installation may be root's alone.
    open_, closed = place / "victim/file", place / "closed"
    closed.touch(mode=0o600)
    assert privileges.unreadable(ATTACKER, [open_, place / "home/mine"]) is None
    assert privileges.unreadable(ATTACKER, [open_, closed]) == closed
