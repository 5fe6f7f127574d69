# SPDX-License-Identifier: Apache-2.0
"""Putting back what a killed run left, and leaving a note where a host's sysctl is changed.

Only what carries the name of an owner that is gone is touched (see cwndtrace.lab.owner).
"""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from cwndtrace.errors import CwndtraceError, KernelLacks, PermissionNeeded
from cwndtrace.kernel import sockets
from cwndtrace.lab import disk, namespaces
from cwndtrace.lab.owner import Owner
from cwndtrace.tcp import IDLE_SYSCTL

NOTES: Final = Path("/run/cwndtrace")
_LONGEST_NOTE: Final = 1000
_SYSCTL: Final = Path("/proc/sys", *IDLE_SYSCTL.split("."))


def sweep() -> list[str]:
    """Remove what dead owners left: processes, namespaces with their devices, cgroups, null_blk devices, sysctls.

    Returns a line for each thing. Needs root. Raises CwndtraceError for what it finds and can't remove.
    """
    done: list[str] = []
    for path in _left_in(namespaces.RUN):
        if path.is_dir():  # whoever made it, the lab didn't
            continue
        for pid in _ours_in(path):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                done.append(f"process {pid}")
        done += _removed(f"namespace {path.name}", path, namespaces.remove)
    with suppress(KernelLacks):
        for path in _left_in(disk.groups()):
            done += _removed(f"cgroup {path.name}", path, disk.remove_group)
    for path in _left_in(disk.CONFIGFS):
        done += _removed(f"device {path.name}", path, disk.remove_null_blk)
    for path in _left_in(NOTES):
        if _of_here(path):
            done += _removed(f"sysctl of {path.name}", path, _put_back)
    return done


def here() -> int:
    """The inode of the network namespace that the calling thread is in."""
    return Path("/proc/thread-self/ns/net").stat().st_ino


def _left_in(folder: Path) -> list[Path]:
    """Entries whose name tells of an owner that is gone."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    return [e for e in entries if (owner := Owner.of(e.name)) is not None and not owner.alive]


def _ours_in(namespace: Path) -> list[int]:
    """Processes of the lab in a network namespace."""
    found: list[int] = []
    with suppress(OSError):
        there = namespace.stat()
        for pid in sockets.pids():
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                # By device as well: a namespace's file that nothing is mounted on has an inode of another file system.
                if b"\0cwndtrace.lab." in command and os.path.samestat(Path(f"/proc/{pid}/ns/net").stat(), there):
                    found.append(pid)
    return found


def _removed(what: str, path: Path, remove: Callable[[Path], None]) -> list[str]:
    try:
        remove(path)
    except OSError as e:
        raise CwndtraceError(f"{what}, left by a run that was killed, can't be removed: {e}", f"see {path}") from e
    return [what]


@contextmanager
def host_sysctl(owner: Owner, value: str) -> Iterator[Callable[[str], None]]:
    """Set IDLE_SYSCTL in this process's own namespace and put the old value back at the end.

    Yields a function that sets another value. The old one is noted on disk first, so that ``sweep`` puts it back
    after a kill.
    """
    note = owner.name("sysctl")
    try:
        old = _SYSCTL.read_text(encoding="ascii").strip()
        with _notes(make=True) as folder:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(note, flags, 0o600, dir_fd=folder), "w", encoding="utf-8") as out:
                json.dump({"value": old, "netns": here()}, out)
                out.flush()
                os.fsync(out.fileno())
    except FileNotFoundError:
        raise KernelLacks(f"there is no {IDLE_SYSCTL} here") from None
    except PermissionError:
        raise PermissionNeeded(f"changing {IDLE_SYSCTL} needs root", "prefix the command with sudo") from None

    def write(text: str) -> None:
        try:
            _SYSCTL.write_text(text, encoding="ascii")
        except OSError as e:
            cause = f"{IDLE_SYSCTL} can't be changed: {e.strerror}"
            raise PermissionNeeded(cause, "run as root, in no container") from e

    try:
        write(value)
        yield write
    finally:
        _put_back(NOTES / note)


@contextmanager
def _notes(*, make: bool = False) -> Iterator[int]:
    """A descriptor of the notes' folder. Raises CwndtraceError where anybody but root may have written there."""
    if make:
        with suppress(FileExistsError):
            NOTES.mkdir(mode=0o700)
    try:
        folder = os.open(NOTES, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError as e:  # a link is none either
        raise CwndtraceError(f"{NOTES} is no folder", f"see who made it, and remove it: rm {NOTES}") from e
    try:
        about = os.fstat(folder)
        if about.st_uid != 0 or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            cause = f"what is noted in {NOTES} can't be trusted: others than root may write there"
            raise CwndtraceError(cause, f"see what is in it, and remove it: rm -r {NOTES}")
        yield folder
    finally:
        os.close(folder)


def _noted(note: Path) -> tuple[str, int] | None:
    """What ``host_sysctl`` wrote down: the value to put back, and in which namespace. None where it is no such note."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError), _notes() as folder:
        # A pipe would have this wait for ever.
        fd = os.open(note.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with os.fdopen(fd, "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_uid != 0 or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return None
            saved = json.loads(file.read(_LONGEST_NOTE))
        if saved["value"] in ("0", "1"):
            return saved["value"], int(saved["netns"])
    return None


def _of_here(note: Path) -> bool:
    """Whether a note is this namespace's: one from another (a container that shares /run) is for a start over there."""
    found = _noted(note)
    return found is None or found[1] == here()


def _put_back(note: Path) -> None:
    """Set what the note says, if it is one, and remove it. No file but this sysctl's is ever written."""
    if (found := _noted(note)) is not None:
        with suppress(FileNotFoundError):
            _SYSCTL.write_text(found[0], encoding="ascii")
    with suppress(FileNotFoundError), _notes() as folder:
        os.unlink(note.name, dir_fd=folder)
