# SPDX-License-Identifier: Apache-2.0
"""Child processes of the lab, which exchange JSON lines with their parent and end with it.

A child runs a module of this folder as its program. It reads commands on stdin and answers on stdout, one per line.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self

from cwndtrace import _libc, errors, isolated
from cwndtrace.errors import CwndtraceError
from cwndtrace.kernel import setns

_PR_SET_TIMERSLACK: Final = 29

Message = dict[str, Any]


START_AGAIN: Final = "run the command again; if the kernel killed the process, dmesg says why"


class Child:
    """A child process as its parent sees it, and a context manager that ends the process on exit.

    The thread that starts a child has to outlive it, because the kernel ends the child when that thread ends.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self.what = module
        self._process = subprocess.Popen(
            isolated.python("-m", f"cwndtrace.lab.{module}", str(os.getpid()), *arguments),
            env=isolated.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # Ctrl-C at the terminal has to reach only the parent, which ends its children in order.
            start_new_session=True,
        )  # fmt: skip
        self._messages: queue.Queue[Message | None] = queue.Queue()
        self._stderr: list[bytes] = []
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._read, self._read_errors)]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):
                self._messages.put(json.loads(line))
        self._messages.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._stderr += self._process.stderr.readlines()

    def send(self, message: Message) -> None:
        """Send a command. Raises CwndtraceError if the process has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._gone() from None

    def receive(self, timeout_s: float) -> Message:
        """Return the next message.

        Raises CwndtraceError if the process ends, sends no message for ``timeout_s`` seconds, or reports an error,
        whose cause and remedy the exception then has.
        """
        try:
            message = self._messages.get(timeout=timeout_s)
        except queue.Empty:
            raise CwndtraceError(f"the lab's {self.what} process sent no message for {timeout_s:.0f} s") from None
        if message is None:
            self._messages.put(None)
            raise self._gone()
        if "error" in message:
            error_class = getattr(errors, str(message.get("kind")), CwndtraceError)
            raise error_class(str(message["error"]), str(message.get("remedy", "")))
        return message

    def ask(self, message: Message, timeout_s: float = 10) -> Message:
        """Send a command and return the next message."""
        self.send(message)
        return self.receive(timeout_s)

    def _gone(self) -> CwndtraceError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._threads[1].join(1)
        lines = b"".join(self._stderr).decode("utf-8", "replace").strip().splitlines()
        reason = f": {lines[-1]}" if lines else ""
        return CwndtraceError(f"the lab's {self.what} process ended ({self._process.returncode}){reason}", START_AGAIN)

    def close(self) -> None:
        """Close the process's stdin, which ends it; send SIGKILL if it is still there after two seconds."""
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):
            self._process.stdin.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join()
        for reader in (self._process.stdout, self._process.stderr):
            assert reader is not None
            reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


# ---- inside the child -----------------------------------------------------------------------------


def live_with(parent: int) -> None:
    """Make the kernel end this process when its parent ends; exit at once if the parent has ended already."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not _libc.end_with_parent(parent):
        raise SystemExit(1)


def be_punctual() -> None:
    """Make the kernel wake this process on time: least timer slack, and SCHED_FIFO or else nice -10.

    Settings that the kernel refuses are left as they are.
    """
    with suppress(OSError):
        _libc.prctl(_PR_SET_TIMERSLACK, 1)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, -10)


def enter(address: str) -> None:
    """Move this single-threaded process into the network namespace with this ``Namespace.address``. Raises OSError."""
    inode, _, path = address.partition(":")
    setns.enter(path, int(inode))


def end_with_stdin() -> None:
    """End this process when its parent closes the pipe to it; for a child that takes no commands."""

    def watch() -> None:
        sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


_say_lock = threading.Lock()


def say(message: Message) -> None:
    """Send a message to the parent. Safe to call from any thread."""
    line = json.dumps(message) + "\n"
    with _say_lock:
        sys.stdout.write(line)
        sys.stdout.flush()


def say_error(e: CwndtraceError) -> None:
    """Send an error to the parent, whose ``receive`` then raises it."""
    say({"error": e.cause, "remedy": e.remedy, "kind": type(e).__name__})
