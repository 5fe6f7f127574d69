# SPDX-License-Identifier: Apache-2.0
"""What is looked at while a trace runs and takes power: other users' processes, other network namespaces.

``PrivilegedHelper`` does it in a process of its own, so that the one that traces, writes and prints can give its power
up. That process is asked by fixed questions, and reads nothing but what the kernel says.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Final

import pyarrow as pa

from cwndtrace import _libc, privileges
from cwndtrace.capture import connections
from cwndtrace.capture.source import Filters
from cwndtrace.errors import CwndtraceError, NotFound
from cwndtrace.kernel import cgroups, interfaces, netns, sockets

_PATIENCE_S: Final = 5.0
_QUICK_S: Final = 5
_SLOW_S: Final = 30
"""How long an answer may take: of what the loop that empties the buffers asks, and of a snapshot."""
_LONGEST_QUESTION: Final = 100


class NoReply(CwndtraceError):
    """A question got no answer, and the trace can go on without."""


class Helper:
    """Looks with the power of this process.

    An answer is None where there was none (see ``PrivilegedHelper``); ``lacking`` says then what the trace goes on
    without.
    """

    lacking: str | None = None

    def __init__(self, filters: Filters) -> None:
        self._filters = filters

    def snapshot(self, utc_offset_ns: int) -> tuple[pa.Table, float] | None:
        """See ``connections.snapshot``, and the seconds of CPU time that it took."""
        begin = time.thread_time()
        table = connections.snapshot(self._filters, utc_offset_ns)
        return table, time.thread_time() - begin

    def settings(self) -> dict[str, dict[str, Any]]:
        """See ``netns.settings``."""
        return netns.settings()

    def idle_sysctls(self) -> list[tuple[netns.Namespace, int | None]]:
        """The network namespace that is traced, or else this process's, and ``netns.idle_sysctl`` there."""
        inode = self._filters.netns or netns.own().inode
        # This process's comes first, and looking at all of them is most of what this takes.
        found = next((n for n in netns.all_reachable() if n.inode == inode), None)
        return [] if found is None else [(found, netns.idle_sysctl(found))]

    def watched(self) -> tuple[bool, str | None] | None:
        """Whether the traced network namespace can be reached, and the name of the traced interface if it is there."""
        if self._filters.netns is None:
            return True, None
        for namespace in netns.all_reachable():
            if namespace.inode == self._filters.netns:
                with suppress(NotFound, OSError):
                    by_name = interfaces.by_name(namespace)
                    return True, next((n for n, i in by_name.items() if i == self._filters.ifindex), None)
        return False, None

    def pid_sockets(self) -> set[int] | None:
        """Inodes of the sockets of the process that is traced."""
        return set() if self._filters.pid is None else sockets.inodes_of(self._filters.pid)

    def cgroup_ids(self) -> tuple[set[int], int] | None:
        """Ids of the cgroup that is traced and of those below it, and how many more weren't looked at."""
        return (set(), 0) if self._filters.cgroup is None else cgroups.ids(self._filters.cgroup)

    def close(self) -> None:
        """Nothing is held."""


_QUESTIONS: Final[dict[str, Callable[[Helper, int], Any]]] = {
    "snapshot": lambda helper, offset: helper.snapshot(offset),
    "settings": lambda helper, _: helper.settings(),
    "idle_sysctls": lambda helper, _: helper.idle_sysctls(),
    "watched": lambda helper, _: helper.watched(),
    "pid_sockets": lambda helper, _: helper.pid_sockets(),
    "cgroup_ids": lambda helper, _: helper.cgroup_ids(),
}


class _Channel:
    """One end of a pair of sockets; questions and answers have numbers, since an interrupt may lose an answer.

    Nothing waits for longer than ``patience_s``, and nobody again until the answer that is late has come.
    """

    def __init__(self, end: Connection, patience_s: int) -> None:
        self._end = end
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._number = 0
        self._late = False
        # For one who is stopped in the midst of sending: such a line is of no use any more.
        with socket.socket(fileno=os.dup(end.fileno())) as same:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                same.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", patience_s, 0))

    def ask(self, question: str, argument: int = 0) -> Any:
        """The answer, which may be an exception. Raises NoReply; EOFError or OSError where the line is broken."""
        with self._lock:
            try:
                if self._late:
                    self._receive(time.monotonic())
                self._number += 1
                self._end.send_bytes(f"{self._number} {question} {argument}".encode())
                return self._receive(time.monotonic() + self._patience_s)
            except (EOFError, OSError):
                self._end.close()
                raise

    def _receive(self, deadline: float) -> Any:
        """The answer to the last question."""
        while True:
            if not self._end.poll(max(0.0, deadline - time.monotonic())):
                self._late = True
                raise NoReply(f"didn't answer within {self._patience_s} s")
            try:
                number, answer = self._end.recv()
            except (EOFError, OSError):
                raise
            except Exception as e:  # an exception may be packed and not be unpacked
                raise NoReply(f"had an answer that can't be read: {type(e).__name__}") from e
            if number == self._number:
                self._late = False
                return answer

    def close(self) -> None:
        self._end.close()


class PrivilegedHelper(Helper):
    """A helper in a process of its own, which goes on as ``user`` with ``privileges.LOOKING`` and nothing else.

    To be made while this process has one thread, which lasts as long as it does, and holds nothing that a copy of it
    shouldn't. Should that process die or be stopped, answers are None from then on.
    """

    def __init__(self, filters: Filters, user: privileges.User | None) -> None:
        super().__init__(filters)
        context = multiprocessing.get_context("fork")
        # One for the thread of snapshots, which may take long, and one for the rest, which mustn't wait.
        pairs = [context.Pipe() for _ in range(2)]
        ours, theirs = ([pair[i] for pair in pairs] for i in range(2))
        self._process = context.Process(
            target=_serve, args=(filters, user, os.getpid(), theirs, ours), name="helper", daemon=True
        )
        start_with_signals_blocked(self._process)
        for end in theirs:
            end.close()
        self._slow, self._quick = (_Channel(end, s) for end, s in zip(ours, (_SLOW_S, _QUICK_S), strict=True))

    @property
    def pid(self) -> int:
        """Of the process that looks."""
        return int(self._process.pid or 0)

    def _ask(self, line: _Channel, question: str, argument: int = 0) -> Any:
        """The answer; None where there was none, after ``lacking`` was set."""
        try:
            answer = line.ask(question, argument)
        except NoReply as e:
            answer = e
        except BlockingIOError:
            answer = NoReply("was stopped in the midst of an answer")
        except (EOFError, OSError):
            answer = NoReply("was ended from outside (see dmesg for the reason)")
        if isinstance(answer, NoReply):
            if self.lacking is None:
                self.lacking = f"the process that looks at connections for this one {answer.cause}; {self._without()}"
            return None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _without(self) -> str:
        lost = ["snapshots of connections", "what became of network settings and interfaces"]
        if self._filters.pid is not None:
            lost.append("sockets that the process opened later")
        if self._filters.cgroup is not None:
            lost.append("cgroups that were made later")
        return f"the trace goes on without {', '.join(lost)}"

    def snapshot(self, utc_offset_ns: int) -> tuple[pa.Table, float] | None:
        """As in Helper."""
        found: tuple[pa.Table, float] | None = self._ask(self._slow, "snapshot", utc_offset_ns)
        return found

    def settings(self) -> dict[str, dict[str, Any]]:
        """As in Helper."""
        found: dict[str, dict[str, Any]] | None = self._ask(self._quick, "settings")
        return found or {}

    def idle_sysctls(self) -> list[tuple[netns.Namespace, int | None]]:
        """As in Helper."""
        found: list[tuple[netns.Namespace, int | None]] | None = self._ask(self._quick, "idle_sysctls")
        return found or []

    def watched(self) -> tuple[bool, str | None] | None:
        """As in Helper."""
        found: tuple[bool, str | None] | None = self._ask(self._quick, "watched")
        return found

    def pid_sockets(self) -> set[int] | None:
        """As in Helper."""
        found: set[int] | None = self._ask(self._quick, "pid_sockets")
        return found

    def cgroup_ids(self) -> tuple[set[int], int] | None:
        """As in Helper."""
        found: tuple[set[int], int] | None = self._ask(self._quick, "cgroup_ids")
        return found

    def close(self) -> None:
        """End the process."""
        for line in (self._slow, self._quick):
            line.close()
        # It holds nothing that an orderly end would be for, and may be stopped.
        self._process.kill()
        self._process.join(_PATIENCE_S)


def start_with_signals_blocked(process: BaseProcess) -> None:
    """Start a process that is to call ``ignore_signals``, so that no signal can come before it has."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """For a process that its parent ends: what a group, a terminal or a service gets isn't for it."""
    # An error of its own still ends it, and it can collect children.
    own = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS}
    for number in signal.valid_signals() - own - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _serve(
    filters: Filters, user: privileges.User | None, parent: int, ends: list[Connection], others: list[Connection]
) -> None:
    """The process that looks: it ends with the one that asks, whatever its group gets."""
    ignore_signals()
    for end in others:
        end.close()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    privileges.drop(user, privileges.LOOKING)
    # Behind that, since a change of the ids undoes it. It is for a process that is busy when its lines end.
    if not _libc.end_with_parent(parent):
        return
    helper = Helper(filters)
    threads = [threading.Thread(target=_answer, args=(helper, end), daemon=True) for end in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _answer(helper: Helper, end: Connection) -> None:
    with end, suppress(EOFError, OSError, ValueError):
        while True:
            # Never unpickled: who asks has given its power up, and mustn't get this one's.
            number, question, argument = end.recv_bytes(_LONGEST_QUESTION).decode("ascii").split(" ")
            try:
                answer = _QUESTIONS[question](helper, int(argument))
            except Exception as e:
                answer = e
            end.send_bytes(_packed(int(number), answer))


def _packed(number: int, answer: object) -> bytes:
    """An answer as it is sent; in place of one that can't be, that it can't."""
    try:
        return pickle.dumps((number, answer))
    except Exception as e:
        return pickle.dumps((number, NoReply(f"had an answer that can't be sent: {type(e).__name__}")))
