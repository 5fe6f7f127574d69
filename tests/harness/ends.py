# SPDX-License-Identifier: Apache-2.0
"""Processes of other programs on the ends of a path, which are ended when the test is."""

from __future__ import annotations

import os
import pwd
import select
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from tests.harness import tcp
from tests.harness.command import ENVIRONMENT
from tests.harness.lab import PathEnd

PATIENCE_S: Final = 30
"""How long a program may take to start or to answer."""
_PIPE_BYTES: Final = 1 << 20
_ESTABLISHED: Final = "01"


@dataclass(frozen=True)
class Kept:
    """A connection that is kept open: its ports at the near and the far end, and a function that makes a burst.

    ``burst`` returns once the far end has all of it.
    """

    sport: int
    dport: int
    burst: Callable[[], object]


class Ends:
    """Starts programs on both ends of a path; they are ended when ``stack`` is closed, and their files removed."""

    def __init__(self, near: PathEnd, far: PathEnd, stack: ExitStack) -> None:
        self.near, self.far = near, far
        self.stack = stack
        self.folder = Path(stack.enter_context(TemporaryDirectory(prefix="cwndtrace-programs-")))
        self.folder.chmod(0o755)

    def new_folder(self, name: str) -> Path:
        """Return a new folder below ``folder``."""
        path = self.folder / name
        path.mkdir()
        return path

    def start(
        self, where: PathEnd, *command: str | Path, user: str | None = None, number: int = signal.SIGTERM
    ) -> subprocess.Popen[bytes]:
        """Start a program at an end of the path, with pipes as stdin and stdout; ``number`` is the signal that ends it.

        It runs as root or as ``user``, and what it writes to stderr is in ``log()``.
        """
        as_user: dict[str, Any] = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
        with (self.folder / "log").open("ab") as log:
            process = where.enter(
                lambda: subprocess.Popen(
                    [str(part) for part in command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=ENVIRONMENT,
                    cwd=self.folder,
                    **as_user,
                )
            )
        self.stack.callback(_end, process, number)
        return process  # type: ignore[no-any-return]

    def serve(self, port: int, *command: str | Path, at: PathEnd | None = None, user: str | None = None) -> None:
        """Start a server, by default at the near end, and return once it listens on this port."""
        where = at or self.near
        process = self.start(where, *command, user=user, number=signal.SIGINT)

        def listens() -> bool:
            assert process.poll() is None, self.log()
            return any(found == port for _, found in where.enter(tcp.listening))

        tcp.until(listens, PATIENCE_S, f"{command[0]} to listen")

    def ask(self, where: PathEnd, *command: str | Path) -> Asked:
        """Start a client that answers lines."""
        return Asked(self.start(where, *command), self.log)

    def keep(self, port: int, connect: Callable[[], Callable[[], object]]) -> Kept:
        """Return the connection to this port of the near end that ``connect`` opens; ``connect`` returns its burst."""
        before = self.far.enter(lambda: _connected(port))
        burst = connect()
        new: set[int] = set()

        def found() -> bool:
            new.update(self.far.enter(lambda: _connected(port)) - before)
            return bool(new)

        tcp.until(found, PATIENCE_S, f"a connection to port {port}")
        assert len(new) == 1, f"{len(new)} connections to port {port}"
        return Kept(port, new.pop(), burst)

    def log(self) -> str:
        """Return what the programs wrote to stderr."""
        return (self.folder / "log").read_text("utf-8", "replace")


def _end(process: subprocess.Popen[bytes], number: int) -> None:
    process.send_signal(number)
    try:
        process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def _connected(port: int) -> set[int]:
    """Return the local ports of the connections to a remote port, in the calling thread's network namespace."""
    tables = (Path("/proc/thread-self/net", name).read_text() for name in ("tcp", "tcp6"))
    lines = [line.split() for table in tables for line in table.splitlines()[1:]]
    ends = [[int(end.split(":")[1], 16) for end in line[1:3]] for line in lines if line[3] == _ESTABLISHED]
    return {local for local, remote in ends if remote == port}


class Asked:
    """A client process that reads lines from a pipe and answers on another."""

    def __init__(self, process: subprocess.Popen[bytes], log: Callable[[], str]) -> None:
        self._process, self._log, self._read = process, log, b""

    def ask(self, line: str, answers: int = 1) -> bytes:
        """Write a line, and return this many lines of answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        return self.read(answers)

    def read(self, lines: int) -> bytes:
        """Return this many lines, once they have come."""
        assert self._process.stdout is not None
        while self._read.count(b"\n") < lines:
            ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE_S)
            more = os.read(self._process.stdout.fileno(), _PIPE_BYTES) if ready else b""
            assert more, f"{self._process.args!r} doesn't answer: {self._log()}"
            self._read += more
        *answer, self._read = self._read.split(b"\n", lines)
        return b"\n".join(answer)
