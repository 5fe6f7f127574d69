# SPDX-License-Identifier: Apache-2.0
"""Removal of what a killed run left, and the notes from which a changed sysctl of the host is restored.

This module removes only things whose name holds an owner process that has ended (see cwndtrace.lab.owner).
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
    """Remove the leftovers of owners that have ended, and return a line for each.

    These are processes, namespaces with their devices, cgroups, null_blk devices and sysctls. Needs root. Raises
    CwndtraceError for a leftover that can't be removed.
    """
    done: list[str] = []
    for path in _left_in(namespaces.RUN):
        if path.is_dir():  # the lab's entries are files
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
    """Return the inode of the network namespace that the calling thread is in."""
    return Path("/proc/thread-self/ns/net").stat().st_ino


def _left_in(folder: Path) -> list[Path]:
    """Return the folder's entries whose name holds an owner that has ended."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    return [e for e in entries if (owner := Owner.of(e.name)) is not None and not owner.alive]


def _ours_in(namespace: Path) -> list[int]:
    """Return the pids of the lab's processes in a network namespace."""
    lab_pids: list[int] = []
    with suppress(OSError):
        there = namespace.stat()
        for pid in sockets.pids():
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                # samestat compares the device too: a namespace file with nothing mounted on it has an inode number of
                # another file system, which may be equal by chance.
                if b"\0cwndtrace.lab." in command and os.path.samestat(Path(f"/proc/{pid}/ns/net").stat(), there):
                    lab_pids.append(pid)
    return lab_pids


def _removed(what: str, path: Path, remove: Callable[[Path], None]) -> list[str]:
    try:
        remove(path)
    except OSError as e:
        raise CwndtraceError(f"{what}, left by a run that was killed, can't be removed: {e}", f"see {path}") from e
    return [what]


@contextmanager
def host_sysctl(owner: Owner, value: str) -> Iterator[Callable[[str], None]]:
    """Set IDLE_SYSCTL in this process's own namespace and restore the old value on exit.

    Yields a function that sets another value. The old value is first written to a note in a file, from which
    ``sweep`` restores it if this process is killed.
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
            raise PermissionNeeded(cause, "run as root, outside any container") from e

    try:
        write(value)
        yield write
    finally:
        _put_back(NOTES / note)


@contextmanager
def _notes(*, make: bool = False) -> Iterator[int]:
    """Yield a descriptor of the notes' folder. Raises CwndtraceError if a user other than root may write there."""
    if make:
        with suppress(FileExistsError):
            NOTES.mkdir(mode=0o700)
    try:
        folder = os.open(NOTES, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError as e:  # O_NOFOLLOW with O_DIRECTORY gives this error for a symbolic link too
        raise CwndtraceError(f"{NOTES} is no folder", f"find out what made it, and remove it: rm {NOTES}") from e
    try:
        about = os.fstat(folder)
        if about.st_uid != 0 or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            cause = f"the sysctl values saved in {NOTES} can't be trusted: users other than root may write there"
            raise CwndtraceError(cause, f"check its contents, and remove it: rm -r {NOTES}")
        yield folder
    finally:
        os.close(folder)


def _noted(note: Path) -> tuple[str, int] | None:
    """Return the value to restore and its namespace's inode from a note of ``host_sysctl``; None for another file."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError), _notes() as folder:
        # Without O_NONBLOCK, opening a pipe would wait for ever.
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
    """Return true if a note is of this network namespace, or is no valid note.

    A note of another namespace (of a container that shares /run) is left for a run in that namespace.
    """
    saved = _noted(note)
    return saved is None or saved[1] == here()


def _put_back(note: Path) -> None:
    """Restore the sysctl from a note, if the note is valid, and remove the note. No other file is written."""
    if (saved := _noted(note)) is not None:
        with suppress(FileNotFoundError):
            _SYSCTL.write_text(saved[0], encoding="ascii")
    with suppress(FileNotFoundError), _notes() as folder:
        os.unlink(note.name, dir_fd=folder)
