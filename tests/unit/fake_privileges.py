# SPDX-License-Identifier: Apache-2.0
"""A kernel's view of one thread's privileges, for tests that neither have any nor may lose them."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable
from typing import Any

import pytest

from cwndtrace import _libc, privileges

LAST = 40
"""The last capability that this kernel knows."""
NOBODY = 0xFFFFFFFF


class FakeKernel:
    """It obeys the rules of capabilities(7) and setfsuid(2); ``said`` has what was asked for, in order."""

    def __init__(self, *, may_reduce: bool = True, may_become: bool = True) -> None:
        self.permitted = self.effective = frozenset(range(LAST + 1))
        self.inheritable: frozenset[int] = frozenset({1})
        self.bounding = set(range(LAST + 1))
        self.ambient, self.keeps, self.locked = True, False, False
        self.ids = [(0, 0, 0), (0, 0, 0)]
        self.fsuid = self.fsgid = 0
        self.groups: tuple[int, ...] = (0, 4)
        self._may_reduce, self._may_become = may_reduce, may_become

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
        """Have ``privileges`` ask this kernel."""
        monkeypatch.setattr(_libc, "lib", self)
        monkeypatch.setattr(_libc, "syscall", self.syscall)
        for name in ("setgroups", "setresuid", "setresgid", "getgroups", "geteuid", "getegid"):
            monkeypatch.setattr(os, name, getattr(self, name))
        return self

    def capget(self, header: Any, data: Any) -> int:
        """Write the thread's capabilities."""
        assert header._obj.version == 0x20080522
        assert header._obj.pid == 0
        for half in range(2):
            for name in ("effective", "permitted", "inheritable"):
                mask = sum(1 << number for number in getattr(self, name)) >> 32 * half & 0xFFFFFFFF
                setattr(data[half], name, mask)
        return 0

    def capset(self, header: Any, data: Any) -> int:
        """Set them; no permitted one can be gained."""
        assert header._obj.version == 0x20080522
        wanted = {}
        for name in ("effective", "permitted", "inheritable"):
            mask = getattr(data[0], name) | getattr(data[1], name) << 32
            wanted[name] = frozenset(number for number in range(64) if mask >> number & 1)
        assert wanted["permitted"] <= self.permitted
        self.permitted, self.effective = wanted["permitted"], wanted["effective"]
        self.inheritable = wanted["inheritable"]
        return 0

    def prctl(self, option: int, *arguments: ctypes.c_ulong) -> int:
        """Do what prctl(2) does, or set errno."""
        first = int(arguments[0].value)
        match option:
            case 23 | 24 if first > LAST:
                return self._refuse(errno.EINVAL)
            case 8 if first > 1:
                return self._refuse(errno.EINVAL)
            case 23:
                return int(first in self.bounding)
            case 24 if not self._may_reduce:
                return self._refuse(errno.EPERM)
            case 24:
                self.bounding.discard(first)
            case 47:
                assert first == 4
                self.ambient = False
            case 8:
                self.keeps = bool(first)
            case 38:
                assert first == 1
                self.locked = True
            case _:
                return self._refuse(errno.EINVAL)
        return 0

    def _refuse(self, number: int) -> int:
        ctypes.set_errno(number)
        return -1

    def setfsuid(self, uid: int) -> int:
        """Set the id if that is allowed, and return the one before."""
        before = self.fsuid
        if uid != NOBODY and (self._may_become or uid == self.ids[0][1]):
            self.fsuid = uid
        return before

    def setfsgid(self, gid: int) -> int:
        """Do the same for the group."""
        before = self.fsgid
        if gid != NOBODY and (self._may_become or gid == self.ids[1][1]):
            self.fsgid = gid
        return before

    def syscall(self, name: str, count: int, groups: Iterable[int]) -> int:
        """Set this thread's groups."""
        assert name == "setgroups"
        self.groups = tuple(groups)
        assert count == len(self.groups)
        return 0

    def setgroups(self, groups: Iterable[int]) -> None:
        """Set all threads' groups."""
        assert privileges.SETGID in self.effective
        self.groups = tuple(groups)

    def setresgid(self, *ids: int) -> None:
        """Set the group's ids."""
        assert privileges.SETGID in self.effective
        assert self.ids[0] == (0, 0, 0)
        self.ids[1] = (ids[0], ids[1], ids[2])
        self.fsgid = ids[1]

    def setresuid(self, *ids: int) -> None:
        """Set the user's ids, with which all capabilities are lost unless they were to be kept."""
        assert privileges.SETUID in self.effective
        self.ids[0] = (ids[0], ids[1], ids[2])
        self.fsuid = ids[1]
        self.effective = frozenset()
        self.permitted = self.permitted if self.keeps else frozenset()

    def getgroups(self) -> list[int]:
        """Return the groups."""
        return list(self.groups)

    def geteuid(self) -> int:
        """Return the effective user's id."""
        return self.ids[0][1]

    def getegid(self) -> int:
        """Return the effective group's id."""
        return self.ids[1][1]
