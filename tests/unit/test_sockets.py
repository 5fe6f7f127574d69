# SPDX-License-Identifier: Apache-2.0
"""The processes that hold sockets are looked up once, and again for new sockets or after a while."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from cwndtrace.kernel import sockets


def test_a_process_holds_its_sockets_and_nothing_else(tmp_path: Path) -> None:
    with socket.socket() as one, socket.socket() as two, (tmp_path / "file").open("w"):
        mine = {os.fstat(each.fileno()).st_ino for each in (one, two)}
        assert mine <= sockets.inodes_of(os.getpid())
        assert os.getpid() in set(sockets.pids())
        held = sockets.holders()
        assert {held[inode] for inode in mine} == {(os.getpid(), sockets.comm(os.getpid()))}
    assert not mine & sockets.inodes_of(os.getpid())
    assert sockets.inodes_of(2**22 + 1) == set()
    assert sockets.comm(2**22 + 1) == ""
    assert sockets.stat(os.getpid())[1] == str(os.getppid()).encode()
    assert sockets.comm(os.getpid()) == Path("/proc/self/comm").read_text().strip()


def test_a_socket_that_several_processes_hold_is_that_of_the_lowest_pid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "pids", lambda: iter([30, 4, 100]))
    monkeypatch.setattr(sockets, "inodes_of", lambda pid: {30: {1, 2}, 4: {2, 3}, 100: {1}}[pid])
    monkeypatch.setattr(sockets, "comm", lambda pid: f"c{pid}")
    assert sockets.holders() == {1: (30, "c30"), 2: (4, "c4"), 3: (4, "c4")}


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the times of the lookups, and have the test set the time: its last item."""
    times = [1000.0]

    def holders() -> dict[int, tuple[int, str]]:
        times.insert(-1, times[-1])
        return {1: (len(times), "x"), 7: (7, "y")}

    monkeypatch.setattr(sockets, "holders", holders)
    monkeypatch.setattr(sockets, "time", Hand(times))
    return times


class Hand:
    """A clock that shows the last of some times."""

    def __init__(self, times: list[float]) -> None:
        self._times = times

    def monotonic(self) -> float:
        """Return it, in seconds."""
        return self._times[-1]


def test_holders_are_looked_up_for_new_sockets_and_every_half_minute(looked: list[float]) -> None:
    holders = sockets.SocketHolders()

    def lookups(*inodes: int, at: float) -> int:
        looked[-1] = at
        holders.of(set(inodes))
        return len(looked) - 1

    assert lookups(1, at=1000) == 1
    assert lookups(1, at=1001) == 1
    assert lookups(1, 7, at=1001) == 1
    assert lookups(1, 2, at=1002) == 2
    # Nobody holds it, which is known now. 0 stands for sockets without a file.
    assert lookups(1, 2, 0, at=1003) == 2
    assert lookups(1, 2, at=1032) == 2
    assert lookups(1, 2, at=1032.5) == 3
    assert lookups(1, at=1062.5) == 3
    assert lookups(1, at=1062.6) == 4


@pytest.mark.usefixtures("looked")
def test_a_socket_that_no_process_holds_has_none() -> None:
    found: dict[int, Any] = sockets.SocketHolders().of({1, 2})
    assert found == {1: (2, "x"), 2: (0, ""), 7: (7, "y")}
