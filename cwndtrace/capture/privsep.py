# SPDX-License-Identifier: Apache-2.0
"""Reads what takes privileges while a trace runs: other users' processes and other network namespaces.

``PrivilegedHelper`` does this in a separate process, so that the process that traces, writes and prints can drop its
privileges. The helper process answers a fixed set of questions, and reads only what the kernel provides.
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
from functools import cached_property
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Final

from cwndtrace import _libc, privileges
from cwndtrace.capture import connections
from cwndtrace.capture.source import Filters
from cwndtrace.errors import CwndtraceError, NotFound
from cwndtrace.kernel import cgroups, interfaces, netns, sockets
from cwndtrace.names.lookup import MOST_IDS, Found, Lookup
from cwndtrace.names.select import Selection

_JOIN_TIMEOUT_S: Final = 5.0
_QUICK_S: Final = 5
_SLOW_S: Final = 30
"""Time limits for an answer, in seconds: to the loop that empties the buffers, and for a snapshot."""
_QUESTION_BYTES: Final = 50 + 2 * 21 * MOST_IDS
"""The longest question: two lists of numbers with up to 20 digits."""


class NoReply(CwndtraceError):
    """A question got no answer. The trace can go on without it."""


class Helper:
    """Answers the questions with the privileges of this process.

    In ``PrivilegedHelper``, a question may get no answer. The result is then None or empty, and ``lacking`` names the
    parts that the trace goes on without.
    """

    lacking: str | None = None

    def __init__(
        self, filters: Filters, cpu_time: Callable[[], float] = time.thread_time, *, cmdline: bool = True
    ) -> None:
        self._filters = filters
        self._cpu_time = cpu_time
        self._cmdline = cmdline

    @cached_property
    def _lookup(self) -> Lookup:
        return Lookup(cmdline=self._cmdline)

    @cached_property
    def _selection(self) -> Selection | None:
        wanted = self._filters.workload
        return None if wanted is None else Selection(wanted, Lookup())

    def snapshot(self) -> tuple[list[connections.Columns], float] | None:
        """Return ``connections.look`` and the seconds of CPU time that it took, by ``cpu_time``."""
        begin = self._cpu_time()
        groups = self.cgroup_ids() if self._filters.by_cgroup else None
        taken = connections.look(self._filters, None if groups is None else groups[0])
        return taken, self._cpu_time() - begin

    def settings(self) -> dict[str, dict[str, Any]]:
        """Return ``netns.settings``."""
        return netns.settings()

    def idle_sysctls(self) -> list[tuple[netns.Namespace, int | None]]:
        """Return the traced network namespace, by default this process's, with its ``netns.idle_sysctl``.

        The list is empty if the namespace can't be reached.
        """
        inode = self._filters.netns or netns.own().inode
        # This stops at the first match, because visiting all namespaces is slow. This process's comes first.
        namespace = next((n for n in netns.all_reachable() if n.inode == inode), None)
        return [] if namespace is None else [(namespace, netns.idle_sysctl(namespace))]

    def watched(self) -> tuple[bool, str | None] | None:
        """Return whether the traced network namespace is reachable, and the traced interface's name if it is there."""
        if self._filters.netns is None:
            return True, None
        for namespace in netns.all_reachable():
            if namespace.inode == self._filters.netns:
                with suppress(NotFound, OSError):
                    by_name = interfaces.by_name(namespace)
                    return True, next((n for n, i in by_name.items() if i == self._filters.ifindex), None)
        return False, None

    def pid_sockets(self) -> set[int] | None:
        """Return the inodes of the sockets that the traced process holds."""
        return set() if self._filters.pid is None else sockets.inodes_of(self._filters.pid)

    def cgroup_ids(self) -> tuple[set[int], int] | None:
        """Return the ids of the traced cgroup and of those below it, and how many more weren't looked at."""
        if self._filters.cgroup is not None:
            return cgroups.ids(self._filters.cgroup)
        return (set(), 0) if self._selection is None else self._selection.ids()

    def names(self, groups: list[int], pids: list[int]) -> Found | None:
        """Return what these ids of cgroups and these pids stand for, at most ``MOST_IDS`` of each."""
        return self._lookup.find(groups, pids)

    def close(self) -> None:
        """Do nothing: this class holds no resources."""


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


_QUESTIONS: Final[dict[str, Callable[[Helper, str], Any]]] = {
    "snapshot": lambda helper, _: helper.snapshot(),
    "settings": lambda helper, _: helper.settings(),
    "idle_sysctls": lambda helper, _: helper.idle_sysctls(),
    "watched": lambda helper, _: helper.watched(),
    "pid_sockets": lambda helper, _: helper.pid_sockets(),
    "cgroup_ids": lambda helper, _: helper.cgroup_ids(),
    "names": lambda helper, ids: helper.names(*map(_numbers, ids.split(";"))),
}


class _Channel:
    """One end of a pair of sockets. Questions and answers have numbers, since an interrupt may lose an answer.

    A call waits at most ``timeout_s`` seconds. After a timeout, calls raise NoReply at once until the late answer has
    come.
    """

    def __init__(self, end: Connection, timeout_s: int) -> None:
        self._end = end
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._number = 0
        self._late = False
        # A process that is stopped in the middle of sending must not block this one. The channel is then closed.
        with socket.socket(fileno=os.dup(end.fileno())) as same:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                same.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", timeout_s, 0))

    def ask(self, question: str, argument: str = "-") -> Any:
        """Return the answer, which may be an exception. Raises NoReply, or EOFError or OSError for a broken channel."""
        with self._lock:
            try:
                if self._late:
                    self._receive(time.monotonic())
                self._number += 1
                self._end.send_bytes(f"{self._number} {question} {argument}".encode())
                return self._receive(time.monotonic() + self._timeout_s)
            except (EOFError, OSError):
                self._end.close()
                raise

    def _receive(self, deadline: float) -> Any:
        """Return the answer to the last question. Raises NoReply after ``deadline``, in seconds of CLOCK_MONOTONIC."""
        while True:
            if not self._end.poll(max(0.0, deadline - time.monotonic())):
                self._late = True
                raise NoReply(f"didn't answer within {self._timeout_s} s")
            try:
                number, answer = self._end.recv()
            except (EOFError, OSError):
                raise
            except Exception as e:  # some exceptions can be pickled and not unpickled
                raise NoReply(f"sent an answer that can't be read: {type(e).__name__}") from e
            if number == self._number:
                self._late = False
                return answer

    def close(self) -> None:
        self._end.close()


class PrivilegedHelper(Helper):
    """A helper in a separate process, which runs as ``user`` with the capabilities ``privileges.LOOKING`` only.

    Construct it while this process has one thread, which must outlive the helper process, and holds nothing that a
    fork shouldn't inherit. If the helper process ends or is stopped, questions get no answer from then on.
    """

    def __init__(self, filters: Filters, user: privileges.User | None, *, cmdline: bool = True) -> None:
        super().__init__(filters, cmdline=cmdline)
        context = multiprocessing.get_context("fork")
        # Snapshots and names may take long. They have separate channels, so that nothing waits for them.
        pairs = [context.Pipe() for _ in range(3)]
        ours, theirs = ([pair[i] for pair in pairs] for i in range(2))
        # Other namespaces are entered on threads of their own, whose time counts too.
        helper = Helper(filters, time.process_time, cmdline=cmdline)
        self._process = context.Process(
            target=_serve, args=(helper, user, os.getpid(), theirs, ours), name="helper", daemon=True
        )
        start_with_signals_blocked(self._process)
        for end in theirs:
            end.close()
        limits = _SLOW_S, _QUICK_S, _SLOW_S
        self._slow, self._quick, self._naming = (_Channel(end, s) for end, s in zip(ours, limits, strict=True))

    @property
    def pid(self) -> int:
        """Return the pid of the helper process."""
        return int(self._process.pid or 0)

    def _ask(self, channel: _Channel, question: str, argument: str = "-") -> Any:
        """Return the answer. If there is none, set ``lacking`` and return None."""
        try:
            answer = channel.ask(question, argument)
        except NoReply as e:
            answer = e
        except BlockingIOError:
            answer = NoReply("was stopped in the middle of an answer")
        except (EOFError, OSError):
            answer = NoReply("ended unexpectedly (see dmesg for the reason)")
        if isinstance(answer, NoReply):
            if self.lacking is None:
                self.lacking = f"the helper process {answer.cause}; {self._without()}"
            return None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _without(self) -> str:
        missing = ["snapshots of connections", "later changes of network settings and interfaces", "names of workloads"]
        if self._filters.pid is not None:
            missing.append("sockets that the process opens later")
        if self._filters.by_cgroup:
            missing.append("cgroups that are made later")
        return f"the trace goes on without {', '.join(missing)}"

    def snapshot(self) -> tuple[list[connections.Columns], float] | None:
        """Ask for ``Helper.snapshot``."""
        answer: tuple[list[connections.Columns], float] | None = self._ask(self._slow, "snapshot")
        return answer

    def settings(self) -> dict[str, dict[str, Any]]:
        """Ask for ``Helper.settings``."""
        answer: dict[str, dict[str, Any]] | None = self._ask(self._quick, "settings")
        return answer or {}

    def idle_sysctls(self) -> list[tuple[netns.Namespace, int | None]]:
        """Ask for ``Helper.idle_sysctls``."""
        answer: list[tuple[netns.Namespace, int | None]] | None = self._ask(self._quick, "idle_sysctls")
        return answer or []

    def watched(self) -> tuple[bool, str | None] | None:
        """Ask for ``Helper.watched``."""
        answer: tuple[bool, str | None] | None = self._ask(self._quick, "watched")
        return answer

    def pid_sockets(self) -> set[int] | None:
        """Ask for ``Helper.pid_sockets``."""
        answer: set[int] | None = self._ask(self._quick, "pid_sockets")
        return answer

    def cgroup_ids(self) -> tuple[set[int], int] | None:
        """Ask for ``Helper.cgroup_ids``."""
        answer: tuple[set[int], int] | None = self._ask(self._quick, "cgroup_ids")
        return answer

    def names(self, groups: list[int], pids: list[int]) -> Found | None:
        """Ask for ``Helper.names``."""
        argument = ";".join(",".join(map(str, numbers)) for numbers in (groups, pids))
        answer: Found | None = self._ask(self._naming, "names", argument)
        return answer

    def close(self) -> None:
        """End the helper process."""
        for channel in (self._slow, self._quick, self._naming):
            channel.close()
        # SIGKILL ends a stopped process too, and the helper process has nothing to clean up.
        self._process.kill()
        self._process.join(_JOIN_TIMEOUT_S)


def start_with_signals_blocked(process: BaseProcess) -> None:
    """Start a process with signals blocked, so that none reaches it before it calls ``ignore_signals``."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """Ignore the signals that a process group, a terminal or a service gets, in a process that its parent ends."""
    # The process's own faults still end it, and with SIGCHLD at its default it can wait for children.
    own = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS}
    for number in signal.valid_signals() - own - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _serve(
    helper: Helper, user: privileges.User | None, parent: int, ends: list[Connection], others: list[Connection]
) -> None:
    """Run the helper process until its parent ends. Signals to its process group don't end it."""
    ignore_signals()
    for end in others:
        end.close()
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    privileges.drop(user, privileges.LOOKING)
    # This follows drop(), since a change of ids undoes it. It ends a helper that is busy when its channels close.
    if not _libc.end_with_parent(parent):
        return
    threads = [threading.Thread(target=_answer, args=(helper, end), daemon=True) for end in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _answer(helper: Helper, end: Connection) -> None:
    with end, suppress(EOFError, OSError, ValueError):
        while True:
            # Questions are never unpickled: the asking process has dropped its privileges, and mustn't get this one's.
            number, question, argument = end.recv_bytes(_QUESTION_BYTES).decode("ascii").split(" ")
            try:
                answer = _QUESTIONS[question](helper, argument)
            except Exception as e:
                answer = e
            end.send_bytes(_packed(int(number), answer))


def _packed(number: int, answer: object) -> bytes:
    """Return a pickled answer, or a pickled NoReply for an answer that can't be pickled."""
    try:
        return pickle.dumps((number, answer))
    except Exception as e:
        return pickle.dumps((number, NoReply(f"couldn't send its answer: {type(e).__name__}")))
