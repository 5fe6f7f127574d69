# SPDX-License-Identifier: Apache-2.0
"""Root's privileges: find the invoking user, act with that user's rights, and drop privileges.

Linux keeps capabilities, file-system ids and groups per thread. The functions here change the calling thread and the
threads that it starts later, except where they say that the C library changes all threads at once (setresuid).
"""

from __future__ import annotations

import ctypes
import os
import pwd
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cwndtrace import _libc

# include/uapi/linux/capability.h
DAC_READ_SEARCH: Final = 2
SETGID: Final = 6
SETUID: Final = 7
SYS_PTRACE: Final = 19
SYS_ADMIN: Final = 21
PERFMON: Final = 38
BPF: Final = 39
LOOKING: Final = frozenset({DAC_READ_SEARCH, SYS_PTRACE, SYS_ADMIN})
"""The capabilities for reading other users' /proc/PID/fd and its links, and for setns(2) into network namespaces."""

# include/uapi/linux/prctl.h
_PR_SET_KEEPCAPS: Final = 8
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION_3: Final = 0x20080522
_NOBODY: Final = 0xFFFFFFFF  # (uid_t)-1, which system calls take as "don't change it"

for _function in (_libc.lib.setfsuid, _libc.lib.setfsgid):
    _function.restype, _function.argtypes = ctypes.c_uint32, [ctypes.c_uint32]


@dataclass(frozen=True)
class User:
    """A user's ids as the kernel knows them; ``name`` is for people."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str


def invoking_user() -> User | None:
    """Return the user who called sudo (SUDO_UID, SUDO_GID); None if this isn't root, or no other user called sudo.

    Raises PermissionError if the variables name no user, or a user whom this process may not become. If it went on as
    root, it would do things for that user that the user may not do.
    """
    uid, gid = (os.environ.get(name) for name in ("SUDO_UID", "SUDO_GID"))
    if os.geteuid() != 0 or (uid is None and gid is None) or uid == "0":
        return None
    if uid is None or gid is None or not _is_id(uid) or not _is_id(gid) or not int(uid):
        raise PermissionError(1, "SUDO_UID and SUDO_GID name no user.")
    if not {SETUID, SETGID} <= held():
        raise PermissionError(1, f"SUDO_UID names user {uid}, whom this process may not become.")
    try:
        name = pwd.getpwuid(int(uid)).pw_name
        groups = tuple(os.getgrouplist(name, int(gid)))
    except KeyError:
        name, groups = uid, (int(gid),)
    return User(int(uid), int(gid), groups, name)


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) < _NOBODY


@contextmanager
def acting_as(user: User | None) -> Iterator[None]:
    """Access files with ``user``'s rights, and create them as ``user``, in this thread; change nothing for None.

    Raises OSError if this process may not.
    """
    # setfsuid(-1) changes nothing and returns the current id. A nested call leaves everything to the outer one.
    if user is None or _libc.lib.setfsuid(_NOBODY) == user.uid:
        yield
        return
    groups = os.getgroups()
    try:
        _become(user)
        yield
    finally:
        _libc.lib.setfsuid(os.geteuid())
        _libc.lib.setfsgid(os.getegid())
        _set_groups(groups)


def unreadable(user: User, files: Iterable[Path]) -> Path | None:
    """Return the first of ``files`` that ``user`` can't read; None if there is none."""
    with acting_as(user):
        for file in files:
            try:
                with file.open("rb"):
                    pass
            except OSError:
                return file
    return None


def _become(user: User) -> None:
    _set_groups(user.groups)
    _libc.lib.setfsgid(user.gid)
    _libc.lib.setfsuid(user.uid)
    # setfsuid() and setfsgid() report no errors, they only return the id that was set before.
    if (_libc.lib.setfsuid(_NOBODY), _libc.lib.setfsgid(_NOBODY)) != (user.uid, user.gid):
        raise PermissionError(1, f"this process may not act as {user.name}")


def _set_groups(groups: Iterable[int]) -> None:
    # The system call is made by its number, because the C library's function changes all threads.
    wanted = tuple(groups)
    _libc.syscall("setgroups", len(wanted), (ctypes.c_uint32 * len(wanted))(*wanted))


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Data(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


def held() -> frozenset[int]:
    """Return the permitted capabilities of this thread."""
    data = (_Data * 2)()
    _libc.check(_libc.lib.capget(ctypes.byref(_Header(_CAPABILITY_VERSION_3, 0)), data))
    mask = data[0].permitted | data[1].permitted << 32
    return frozenset(number for number in range(64) if mask >> number & 1)


def _hold(capabilities: frozenset[int]) -> None:
    """Set this thread's permitted and effective capabilities to exactly these, and clear the inheritable ones."""
    mask = sum(1 << number for number in capabilities)
    halves = [mask & 0xFFFFFFFF, mask >> 32]
    data = (_Data * 2)(*(_Data(half, half, 0) for half in halves))
    _libc.check(_libc.lib.capset(ctypes.byref(_Header(_CAPABILITY_VERSION_3, 0)), data))


def drop(user: User | None, keep: frozenset[int] = frozenset()) -> None:
    """Continue as ``user``, or as the current one for None, with only those capabilities of ``keep`` that are held.

    No other capabilities can be gained afterwards. With a ``user``, the ids change for all threads, and all threads but
    this one lose every capability; otherwise the other threads keep theirs (see ``still_privileged``). The bounding set
    can't be reduced without CAP_SETPCAP, but no capabilities can be gained from it any more. Descriptors stay open.
    Raises OSError.
    """
    keep &= held()
    with suppress(OSError):
        for number in range(64):  # the first capability that this kernel doesn't know ends the loop
            _libc.prctl(_PR_CAPBSET_READ, number)
            if number not in keep:
                _libc.prctl(_PR_CAPBSET_DROP, number)
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    if user is not None:
        _libc.prctl(_PR_SET_KEEPCAPS, 1)
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
        _libc.prctl(_PR_SET_KEEPCAPS, 0)
    _hold(keep)
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1)


def still_privileged(keep: frozenset[int] = frozenset()) -> list[str]:
    """Return the names of this process's threads that have other capabilities than ``keep``."""
    mask = sum(1 << number for number in keep)
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            status = (task / "status").read_text("utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        facts = dict(line.split(":\t", 1) for line in status.splitlines())
        if int(facts["CapPrm"], 16) & ~mask:
            names.append(facts["Name"])
    return names


def least(work: Callable[[], object], user: User | None, choices: Iterable[frozenset[int]]) -> frozenset[int]:
    """Return the first of ``choices`` with which ``user`` can do ``work``, each tried on a new thread.

    If none works, raises the error of ``work`` with the last one.
    """
    error: Exception | None = None
    threads: list[int] = []
    for keep in choices:

        def attempt(keep: frozenset[int] = keep) -> None:
            threads.append(threading.get_native_id())
            if user is not None:
                _become(user)
            _hold(keep)
            work()

        with ThreadPoolExecutor(max_workers=1) as pool:
            error = None
            try:
                pool.submit(attempt).result()
            except Exception as e:
                error = e
        _wait_until_gone(threads)
        if error is None:
            return keep
    raise error or ValueError("there are no capabilities to choose from")


def _wait_until_gone(threads: list[int]) -> None:
    """Wait until the kernel has removed these threads, for at most 10 s.

    Joining a thread waits only for its Python part, and the C library aborts if it changes the ids of all threads and
    one of them may not do that.
    """
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/self/task/{thread}").exists() for thread in threads) and time.monotonic() < deadline:
        time.sleep(0.0005)


def limit_library_threads() -> None:
    """Keep libraries from starting threads when they are imported, because ``drop`` couldn't reach those.

    numpy's linear algebra isn't used, and Arrow doesn't use jemalloc as its allocator here.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
