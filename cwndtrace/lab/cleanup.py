# SPDX-License-Identifier: Apache-2.0
"""Putting back what a killed run left, and leaving a note where a host's sysctl is changed.

Only what carries the name of an owner that is gone is touched (see cwndtrace.lab.owner).
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from cwndtrace.errors import CwndtraceError, KernelLacks, PermissionNeeded
from cwndtrace.kernel import sockets
from cwndtrace.lab import disk, namespaces
from cwndtrace.lab.owner import Owner

NOTES: Final = Path("/run/cwndtrace")


def sweep() -> list[str]:
    """Remove what dead owners left: processes, namespaces with their devices, cgroups, null_blk devices, sysctls.

    Returns a line for each thing. Needs root. Raises CwndtraceError for what it finds and can't remove.
    """
    done: list[str] = []
    for path in _left_in(namespaces.RUN):
        for pid in _ours_in(path.stat().st_ino):
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


def _ours_in(inode: int) -> list[int]:
    """Processes of the lab in a network namespace."""
    found = []
    for pid in sockets.pids():
        with suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if Path(f"/proc/{pid}/ns/net").stat().st_ino == inode and b"\0cwndtrace.lab." in command:
                found.append(pid)
    return found


def _removed(what: str, path: Path, remove: Callable[[Path], None]) -> list[str]:
    try:
        remove(path)
    except OSError as e:
        raise CwndtraceError(f"{what}, left by a run that was killed, can't be removed: {e}", f"see {path}") from e
    return [what]


@contextmanager
def host_sysctl(owner: Owner, name: str, value: str) -> Iterator[Callable[[str], None]]:
    """Set a sysctl of this process's own namespace and put the old value back at the end.

    Yields a function that sets another value. The old one is noted on disk first, so that ``sweep`` puts it back
    after a kill.
    """
    file = Path("/proc/sys", *name.split("."))
    note = NOTES / owner.name("sysctl")
    try:
        old = file.read_text(encoding="ascii").strip()
        NOTES.mkdir(parents=True, exist_ok=True)
        with note.open("w", encoding="utf-8") as out:
            json.dump({"name": name, "value": old, "netns": here()}, out)
            out.flush()
            os.fsync(out.fileno())
    except FileNotFoundError:
        raise KernelLacks(f"there is no {name} here") from None
    except PermissionError:
        raise PermissionNeeded(f"changing {name} needs root", "prefix the command with sudo") from None

    def write(text: str) -> None:
        try:
            file.write_text(text, encoding="ascii")
        except OSError as e:
            raise PermissionNeeded(f"{name} can't be changed: {e.strerror}", "run as root, in no container") from e

    try:
        write(value)
        yield write
    finally:
        _put_back(note)


def _of_here(note: Path) -> bool:
    """Whether a note is this namespace's: one from another (a container that shares /run) is for a start over there."""
    with suppress(ValueError, KeyError, FileNotFoundError):
        return bool(json.loads(note.read_text(encoding="utf-8"))["netns"] == here())
    return True


def _put_back(note: Path) -> None:
    with suppress(ValueError, KeyError, FileNotFoundError):
        saved = json.loads(note.read_text(encoding="utf-8"))
        Path("/proc/sys", *saved["name"].split(".")).write_text(saved["value"], encoding="ascii")
    note.unlink(missing_ok=True)
