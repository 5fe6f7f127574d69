# SPDX-License-Identifier: Apache-2.0
"""The trace that ``top`` runs where it is given no capture: ``cwndtrace run``, as a child with its own privileges."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import IO, Final, Self

import click

from cwndtrace import isolated, privileges
from cwndtrace.capture import target
from cwndtrace.cli import user
from cwndtrace.errors import CaptureError
from cwndtrace.format import clean

_ENDS_WITHIN_S: Final = 20.0
_CHUNK: Final = 1 << 16


KEEP: Final = "15m"
"""The window of the capture that ``top`` makes where none is asked for."""


class Tracing:
    """A context manager in which ``cwndtrace run`` traces into ``path``; this process has no privileges in it.

    ``options`` are those of ``run``. Without ``output``, the capture is in a new folder of the invoking user in the
    folder for temporary files, and is deleted at the end. The trace ends with this process, however that ends, because
    nobody reads the trace's output then. Raises the errors of becoming the invoking user, and SystemExit with the exit
    code of ``run`` where that doesn't begin; what it printed on stderr has been printed then.
    """

    def __init__(self, options: list[str], output: Path | None) -> None:
        self._options = options
        self._output = output
        self._folder: Path | None = None
        self._begun = threading.Event()
        self.said: deque[str] = deque(maxlen=3)
        """What the trace printed on stderr last, since it began."""

    @property
    def path(self) -> Path:
        """The capture."""
        assert self._output is not None
        return self._output

    def __enter__(self) -> Self:
        target.need_root("tracing")
        if self._output is None:
            try:
                with privileges.acting_as(user.invoking()):
                    self._folder = Path(tempfile.mkdtemp(prefix="cwndtrace-top-"))
            except OSError as error:
                cause = f"No folder for the capture can be made: {error.strerror}."
                raise CaptureError(cause, "Name a place for it with -o.") from error
            self._output = self._folder / "top.cwnd"
            # Nobody asked for this capture. It holds what the key d dumps, so that it doesn't fill the disk in a day.
            self._options = ["--keep", KEEP, *self._options]
        command = isolated.python("-m", "cwndtrace", "run", "--json", "-o", str(self._output), *self._options)
        self._child = subprocess.Popen(
            command,
            env=isolated.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            # Only now, because the child gets this process's privileges. It drops its own as soon as it has begun.
            user.drop_privileges()
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self) -> None:
        """Wait until the trace has begun, and start to read away what it prints."""
        assert self._child.stdout is not None
        assert self._child.stderr is not None
        errors = threading.Thread(target=self._listen, args=(self._child.stderr,), daemon=True)
        errors.start()
        if b'"started"' not in self._child.stdout.readline(_CHUNK):
            errors.join()
            sys.exit(self._child.wait() or 1)
        self._begun.set()
        threading.Thread(target=self._discard, args=(self._child.stdout,), daemon=True).start()

    def _listen(self, stream: IO[bytes]) -> None:
        for raw in stream:
            line = clean(raw.decode(errors="replace").rstrip("\n"))
            if not self._begun.is_set():
                click.echo(line, err=True)
            elif line:
                self.said.append(line)

    @staticmethod
    def _discard(stream: IO[bytes]) -> None:
        while stream.read(_CHUNK):
            pass

    def __exit__(self, *exc: object) -> None:
        """End the trace, wait for it, and delete a capture that nobody asked for."""
        # Until it has dropped its privileges, this process may not signal it; then the signal of the terminal does it.
        with suppress(PermissionError):
            self._child.send_signal(signal.SIGTERM)
        try:
            self._child.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            with suppress(PermissionError):
                self._child.kill()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
