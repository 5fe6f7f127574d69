# SPDX-License-Identifier: Apache-2.0
"""What is looked at while a trace runs and takes power: other users' processes, other network namespaces.

``Apart`` does it in a process of its own, so that the one that traces, writes and prints can give its power up. That
process is asked by fixed questions, and reads nothing but what the kernel says.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Final

import pyarrow as pa

from cwndtrace import power
from cwndtrace.capture import connections
from cwndtrace.capture.source import Filters
from cwndtrace.errors import CwndtraceError, NotFound
from cwndtrace.kernel import cgroups, interfaces, netns, sockets

_PATIENCE_S: Final = 5.0
_LONGEST_QUESTION: Final = 100


class Lookout:
    """Looks with the power of this process."""

    def __init__(self, filters: Filters) -> None:
        self._filters = filters

    def snapshot(self, utc_offset_ns: int) -> pa.Table:
        """See ``connections.snapshot``."""
        return connections.snapshot(self._filters, utc_offset_ns)

    def settings(self) -> dict[str, dict[str, Any]]:
        """See ``netns.settings``."""
        return netns.settings()

    def idle_sysctls(self) -> list[tuple[netns.Namespace, int | None]]:
        """The network namespace that is traced, or else this process's, and ``netns.idle_sysctl`` there."""
        inode = self._filters.netns or netns.own().inode
        # This process's comes first, and looking at all of them is most of what this takes.
        found = next((n for n in netns.all_reachable() if n.inode == inode), None)
        return [] if found is None else [(found, netns.idle_sysctl(found))]

    def watched(self) -> tuple[bool, str | None]:
        """Whether the traced network namespace can be reached, and the name of the traced interface if it is there."""
        if self._filters.netns is None:
            return True, None
        for namespace in netns.all_reachable():
            if namespace.inode == self._filters.netns:
                with suppress(NotFound, OSError):
                    by_name = interfaces.by_name(namespace)
                    return True, next((n for n, i in by_name.items() if i == self._filters.ifindex), None)
        return False, None

    def pid_sockets(self) -> set[int]:
        """Inodes of the sockets of the process that is traced."""
        return set() if self._filters.pid is None else sockets.inodes_of(self._filters.pid)

    def cgroup_ids(self) -> tuple[set[int], int]:
        """Ids of the cgroup that is traced and of those below it, and how many more weren't looked at."""
        return (set(), 0) if self._filters.cgroup is None else cgroups.ids(self._filters.cgroup)

    def close(self) -> None:
        """Nothing is held."""


_QUESTIONS: Final[dict[str, Callable[[Lookout, int], Any]]] = {
    "snapshot": lambda look, offset: look.snapshot(offset),
    "settings": lambda look, _: look.settings(),
    "idle_sysctls": lambda look, _: look.idle_sysctls(),
    "watched": lambda look, _: look.watched(),
    "pid_sockets": lambda look, _: look.pid_sockets(),
    "cgroup_ids": lambda look, _: look.cgroup_ids(),
}


class _Line:
    """One end of a pair of sockets; questions and answers have numbers, since an interrupt may lose an answer."""

    def __init__(self, end: Connection) -> None:
        self.end = end
        self._lock = threading.Lock()
        self._number = 0

    def ask(self, question: str, argument: int = 0) -> Any:
        with self._lock:
            self._number += 1
            try:
                self.end.send_bytes(f"{self._number} {question} {argument}".encode())
                number, answer = self.end.recv()
                while number != self._number:
                    number, answer = self.end.recv()
            except (EOFError, OSError) as e:
                cause = "the process that looks at connections for this one was ended from outside"
                raise CwndtraceError(cause, "see dmesg for the reason, or trace with --stay-root") from e
        if isinstance(answer, Exception):
            raise answer
        return answer


class Apart(Lookout):
    """A lookout in a process of its own, which goes on as ``user`` with ``power.LOOKING`` and nothing else.

    To be made while this process has one thread and holds nothing that a copy of it shouldn't.
    """

    def __init__(self, filters: Filters, user: power.User | None) -> None:
        super().__init__(filters)
        context = multiprocessing.get_context("fork")
        # One for the thread of snapshots, which may take long, and one for the rest, which mustn't wait.
        pairs = [context.Pipe() for _ in range(2)]
        ours, theirs = ([pair[i] for pair in pairs] for i in range(2))
        self._process = context.Process(target=_look, args=(filters, user, theirs, ours), name="lookout", daemon=True)
        self._process.start()
        for end in theirs:
            end.close()
        self._slow, self._quick = (_Line(end) for end in ours)

    @property
    def pid(self) -> int:
        """Of the process that looks."""
        return int(self._process.pid or 0)

    def snapshot(self, utc_offset_ns: int) -> pa.Table:
        """As in Lookout."""
        return self._slow.ask("snapshot", utc_offset_ns)

    def settings(self) -> dict[str, dict[str, Any]]:
        """As in Lookout."""
        found: dict[str, dict[str, Any]] = self._quick.ask("settings")
        return found

    def idle_sysctls(self) -> list[tuple[netns.Namespace, int | None]]:
        """As in Lookout."""
        found: list[tuple[netns.Namespace, int | None]] = self._quick.ask("idle_sysctls")
        return found

    def watched(self) -> tuple[bool, str | None]:
        """As in Lookout."""
        found: tuple[bool, str | None] = self._quick.ask("watched")
        return found

    def pid_sockets(self) -> set[int]:
        """As in Lookout."""
        found: set[int] = self._quick.ask("pid_sockets")
        return found

    def cgroup_ids(self) -> tuple[set[int], int]:
        """As in Lookout."""
        found: tuple[set[int], int] = self._quick.ask("cgroup_ids")
        return found

    def close(self) -> None:
        """End the process."""
        for line in (self._slow, self._quick):
            line.end.close()
        self._process.join(_PATIENCE_S)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join(_PATIENCE_S)


def _look(filters: Filters, user: power.User | None, ends: list[Connection], others: list[Connection]) -> None:
    """The process that looks: it ends with the one that asks, whose signals aren't for it."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for end in others:
        end.close()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    power.drop(user, power.LOOKING)
    look = Lookout(filters)
    threads = [threading.Thread(target=_answer, args=(look, end), daemon=True) for end in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _answer(look: Lookout, end: Connection) -> None:
    with suppress(EOFError, OSError, ValueError):
        while True:
            # Never unpickled: who asks has given its power up, and mustn't get this one's.
            number, question, argument = end.recv_bytes(_LONGEST_QUESTION).decode("ascii").split(" ")
            try:
                answer = _QUESTIONS[question](look, int(argument))
            except Exception as e:
                answer = e
            end.send((int(number), answer))
