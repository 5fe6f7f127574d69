# SPDX-License-Identifier: Apache-2.0
"""Processes of the lab: started in a namespace, talked to in JSON lines, never outliving who started them.

A child runs a module of this folder as its program; it reads commands on stdin and answers on stdout, a line each.
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


START_AGAIN: Final = "start again; if the kernel killed it, dmesg says why"


class Child:
    """One process, seen by its parent. A context manager: leaving it ends the process.

    The thread that starts a child has to outlive it: the kernel ends the child with that thread.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self.what = module
        self._process = subprocess.Popen(
            isolated.python("-m", f"cwndtrace.lab.{module}", str(os.getpid()), *arguments),
            env=isolated.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # A Ctrl-C at the terminal is for the parent, which ends its children itself, in order.
            start_new_session=True,
        )  # fmt: skip
        self._messages: queue.Queue[Message | None] = queue.Queue()
        self._stderr: list[bytes] = []
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._read, self._read_errors)]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """Its process id."""
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
        """Send a command. Raises CwndtraceError if the process is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._gone() from None

    def receive(self, timeout_s: float) -> Message:
        """The next message.

        Raises CwndtraceError if the process ends, reports an error of its own (with its cause and remedy),
        or says nothing for ``timeout_s`` seconds.
        """
        try:
            message = self._messages.get(timeout=timeout_s)
        except queue.Empty:
            raise CwndtraceError(f"the lab's {self.what} process said nothing for {timeout_s:.0f} s") from None
        if message is None:
            self._messages.put(None)
            raise self._gone()
        if "error" in message:
            kind = getattr(errors, str(message.get("kind")), CwndtraceError)
            raise kind(str(message["error"]), str(message.get("remedy", "")))
        return message

    def ask(self, message: Message, timeout_s: float = 10) -> Message:
        """``send`` and then ``receive``."""
        self.send(message)
        return self.receive(timeout_s)

    def _gone(self) -> CwndtraceError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._threads[1].join(1)
        lines = b"".join(self._stderr).decode("utf-8", "replace").strip().splitlines()
        said = f": {lines[-1]}" if lines else ""
        return CwndtraceError(f"the lab's {self.what} process ended ({self._process.returncode}){said}", START_AGAIN)

    def close(self) -> None:
        """End it: by the end of its stdin, or after two seconds by SIGKILL."""
        for pipe in (self._process.stdin,):
            with suppress(OSError, ValueError):
                assert pipe is not None
                pipe.close()
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
    """Have the kernel end this process when its parent ends; end at once if that has happened already."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not _libc.end_with_parent(parent):
        raise SystemExit(1)


def be_punctual() -> None:
    """Wake this process as exactly as the kernel allows, ahead of others; where that is refused, go on without."""
    with suppress(OSError):
        _libc.prctl(_PR_SET_TIMERSLACK, 1)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, -10)


def enter(address: str) -> None:
    """Move this (single-threaded) process into a network namespace, by its ``Namespace.address``. Raises OSError."""
    inode, _, path = address.partition(":")
    setns.enter(path, int(inode))


def end_with_stdin() -> None:
    """End this process once its parent closes the pipe to it; for a child that takes no commands."""

    def watch() -> None:
        sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


_say_lock = threading.Lock()


def say(message: Message) -> None:
    """Send a message to the parent; from any thread."""
    line = json.dumps(message) + "\n"
    with _say_lock:
        sys.stdout.write(line)
        sys.stdout.flush()


def say_error(e: CwndtraceError) -> None:
    """Have the parent's ``receive`` raise this error."""
    say({"error": e.cause, "remedy": e.remedy, "kind": type(e).__name__})
