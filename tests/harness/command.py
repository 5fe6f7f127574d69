# SPDX-License-Identifier: Apache-2.0
"""The command ``cwndtrace`` as a process, as the live tests start it."""

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
_PLACES = os.pathsep.join([CHECKOUT, *filter(None, [os.environ.get("PYTHONPATH")])])  # make mutants adds a place
ENVIRONMENT = {**os.environ, "PYTHONPATH": _PLACES, "PYTHONDONTWRITEBYTECODE": "1"}
ATTACHED = re.compile(r"^Tracing .+: idle by \w+")
LONG_S = 300 if EMULATED else 60
"""The time that a start may take."""

Done = subprocess.CompletedProcess[str]


def call(*arguments: str | Path, cwd: Path | None = None, before: tuple[str, ...] = (), seconds: float = 120) -> Done:
    """Run the command to its end, with ``before`` in front, such as sudo; raise TimeoutExpired after ``seconds``."""
    command = [*before, *COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=seconds, env=ENVIRONMENT, cwd=cwd
    )


def lasting(stderr: str) -> list[str]:
    """Return the lines of ``stderr`` but those that say what is being done, which appear only where it takes long."""
    return [line for line in stderr.splitlines() if not line.endswith(" ...")]


class Running:
    """``cwndtrace run`` in the background; ``stderr`` has its stderr as far as ``wait_for`` has read it.

    The constructor waits until the probes are attached; ``wait=False`` is for a trace that doesn't report that.
    """

    def __init__(
        self,
        *arguments: str | Path,
        before: tuple[str, ...] = (),
        stdout: int | None = None,
        wait: bool = True,
        python: tuple[str, ...] = ("-P", "-m", "cwndtrace"),
    ) -> None:
        command = [*before, sys.executable, *python, "run", *map(str, arguments)]
        out = subprocess.PIPE if stdout is None else stdout
        self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        self.stderr = ""
        if wait:
            self.wait_for(ATTACHED)

    def wait_for(self, pattern: re.Pattern[str], seconds: float = LONG_S) -> None:
        """Read its stderr until a line matches ``pattern``."""
        assert self.process.stderr is not None
        fd, deadline = self.process.stderr.fileno(), time.monotonic() + seconds
        while not any(pattern.search(line) for line in self.stderr.splitlines()):
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            more = os.read(fd, 65536).decode() if ready else ""
            assert more, f"{pattern.pattern} never came: {self.stderr} (exit code {self.process.poll()})"
            self.stderr += more

    def end(self, number: signal.Signals | None = signal.SIGINT) -> tuple[int, str, str]:
        """Send a signal, unless it is None, wait for the end, and return the exit code, stdout and stderr."""
        if number is not None:
            self.process.send_signal(number)
        stdout, rest = self.process.communicate(timeout=LONG_S)
        return self.process.returncode, stdout or "", self.stderr + rest


@contextmanager
def running(
    *arguments: str | Path,
    before: tuple[str, ...] = (),
    stdout: int | None = None,
    wait: bool = True,
    python: tuple[str, ...] = ("-P", "-m", "cwndtrace"),
) -> Iterator[Running]:
    """Start ``cwndtrace run`` as Running does; kill it on exit if it still runs."""
    run = Running(*arguments, before=before, stdout=stdout, wait=wait, python=python)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.kill()
            run.process.communicate()


def read_until(fd: int, pattern: bytes, output: bytes = b"") -> bytes:
    """Read a terminal's output until ``pattern`` is in it, and return all of it, ``output`` first."""
    deadline = time.monotonic() + LONG_S
    while not re.search(pattern, output, re.MULTILINE):
        assert select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0], output
        output += os.read(fd, 65536)
    return output


def send_after_idle(connection: tcp.TcpConnection) -> tcp.Send:
    """Let a connection be idle for longer than the RTO, and return the send that then resets its window."""
    connection.grow()
    connection.idle(tcp.IDLE_S)
    send = connection.send()
    assert send.reason == "idle", send
    return send


def within(space: tcp.Space) -> tuple[str, ...]:
    """Return what stands before a command that runs in a network namespace."""
    return ("ip", "netns", "exec", space.name)


def assert_short(done: Done, code: int, *patterns: str) -> None:
    """Assert this exit code, one or two lines on stderr that match all patterns, and nothing on stdout."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = lasting(done.stderr)
    assert 1 <= len(lines) <= 2, done.stderr
    assert lines[0].startswith("cwndtrace: ")
    for pattern in patterns:
        assert re.search(pattern, done.stderr), done.stderr
