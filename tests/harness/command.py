# SPDX-License-Identifier: Apache-2.0
"""The command ``cwndtrace`` as a process of its own, as the live tests start it."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness import tcp
from tests.harness.tracing import EMULATED

COMMAND = [sys.executable, "-P", "-m", "cwndtrace"]
CHECKOUT = str(Path(__file__).resolve().parents[2])
ENVIRONMENT = {**os.environ, "PYTHONPATH": CHECKOUT, "PYTHONDONTWRITEBYTECODE": "1"}
ATTACHED = re.compile(r"^Tracing .+: idle by \w+")
LONG_S = 300 if EMULATED else 60
"""How long a start may take."""


Done = subprocess.CompletedProcess[str]


def call(*arguments: str | Path, cwd: Path | None = None, before: tuple[str, ...] = (), seconds: float = 120) -> Done:
    """Run the command to its end, for so long at most; ``before`` stands before it, as sudo would."""
    command = [*before, *COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=seconds, env=ENVIRONMENT, cwd=cwd
    )


class Running:
    """``cwndtrace run`` in the background, attached once this has been made, unless it says nothing (``said``)."""

    def __init__(
        self,
        *arguments: str | Path,
        before: tuple[str, ...] = (),
        stdout: int | None = None,
        said: bool = True,
        python: tuple[str, ...] = ("-P", "-m", "cwndtrace"),
    ) -> None:
        command = [*before, sys.executable, *python, "run", *map(str, arguments)]
        out = subprocess.PIPE if stdout is None else stdout
        self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        self.said = ""
        if said:
            self.wait_for(ATTACHED)

    def wait_for(self, pattern: re.Pattern[str], seconds: float = LONG_S) -> None:
        """Read its stderr until a line of it matches."""
        assert self.process.stderr is not None
        fd, deadline = self.process.stderr.fileno(), time.monotonic() + seconds
        while not any(pattern.search(line) for line in self.said.splitlines()):
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            more = os.read(fd, 65536).decode() if ready else ""
            assert more, f"{pattern.pattern} never came: {self.said} (exit code {self.process.poll()})"
            self.said += more

    def end(self, number: signal.Signals | None = signal.SIGINT) -> tuple[int, str, str]:
        """Send a signal; its exit code, what it printed and what it said."""
        if number is not None:
            self.process.send_signal(number)
        stdout, stderr = self.process.communicate(timeout=LONG_S)
        return self.process.returncode, stdout or "", self.said + stderr


@contextmanager
def running(
    *arguments: str | Path,
    before: tuple[str, ...] = (),
    stdout: int | None = None,
    said: bool = True,
    python: tuple[str, ...] = ("-P", "-m", "cwndtrace"),
) -> Iterator[Running]:
    made = Running(*arguments, before=before, stdout=stdout, said=said, python=python)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.process.kill()
            made.process.communicate()


def read_until(fd: int, pattern: bytes, shown: bytes = b"") -> bytes:
    """``shown`` and what else a terminal shows, until ``pattern`` is in it."""
    deadline = time.monotonic() + LONG_S
    while not re.search(pattern, shown, re.MULTILINE):
        assert select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0], shown
        shown += os.read(fd, 65536)
    return shown


def send_after_idle(connection: tcp.Connection) -> tcp.Send:
    """A reset that is known."""
    connection.grow()
    time.sleep(connection.info().rto_us / 1e6 + 0.15)
    send = connection.send()
    assert send.reason == "idle", send
    return send


def within(space: tcp.Space) -> tuple[str, ...]:
    return ("ip", "netns", "exec", space.name)


def assert_short(done: Done, code: int, *patterns: str) -> None:
    """One or two lines on stderr, nothing on stdout, no traceback, the right exit code."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert 1 <= len(lines) <= 2, done.stderr
    assert lines[0].startswith("cwndtrace: ")
    for pattern in patterns:
        assert re.search(pattern, done.stderr), done.stderr
