# SPDX-License-Identifier: Apache-2.0
"""What ``run`` says while it records: a view's lines on stdout, warnings on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click

from cwndtrace import format as fmt
from cwndtrace.capture.session import Batch, Session
from cwndtrace.capture.source import Filters
from cwndtrace.cli import preflight, systemd
from cwndtrace.cli.live import JsonView, TextView
from cwndtrace.cli.output import OutputError, output_closed, printing
from cwndtrace.cli.table import echo_prose
from cwndtrace.errors import CaptureError
from cwndtrace.format import clean
from cwndtrace.recorder import Observer

_LOOK_S: Final = 2.0


class Console(Observer):
    """Shows what a recorder records by ``view``, and warns of what may keep it from recording anything.

    ``what`` names what is traced. The recording goes on while the disk refuses rows, unless ``stop_when_refused``.
    ``failed`` says whether something couldn't be printed although somebody was there to read it.
    """

    def __init__(
        self,
        view: TextView | JsonView,
        session: Session,
        interface: InterfaceWatch,
        *,
        what: str,
        quiet: bool,
        stop_when_refused: bool,
    ) -> None:
        self.failed = False
        self._view = view
        self._session = session
        self._interface = interface
        self._what = what
        self._quiet = quiet
        self._stop_when_refused = stop_when_refused
        self._ended = False
        self._refused = False
        self._lacking = False
        self._left_out: set[str] = set()
        self._warned: list[str] = []

    def begin(self, capture: Path) -> None:
        """Tracing has begun, into ``capture``."""
        with self._printing():
            self._view.begin(self._what, capture)
        systemd.tell("READY=1")

    def turn(self, batches: list[Batch]) -> bool:
        """Show what came in; returns False where nobody can read it any more."""
        with self._printing():
            for batch in batches:
                self._view.batch(batch)
                if batch.event == "connections" and not self._session.tally.kept["cwnd_reset"]:
                    self._warn_of_settings(batch)
            if news := self._interface.news():
                self._warn(news)
            for kind, number in self._session.tally.left_out.items():
                if kind not in self._left_out:
                    self._left_out.add(kind)
                    self._warn(fmt.left_out(kind, number))
            self.say_lacking()
            self._view.tick(f"waiting for idle time longer than the RTO on {clean(self._what)}")
        # A script that started this one and has ended is a Ctrl-C.
        return not self._ended and not output_closed()

    def refused(self, error: CaptureError) -> None:
        """Say once that the disk refuses rows, or end the recording."""
        if self._stop_when_refused:
            raise error
        if not self._refused:
            self._refused = True
            self._error(error.cause, error.remedy)

    def stopping(self) -> None:
        """Tell a service manager."""
        systemd.tell("STOPPING=1")

    def finish(self, batches: list[Batch]) -> None:
        """Show the last batches, and leave the cursor on a clean line."""
        with self._printing():
            for batch in batches:
                self._view.batch(batch)
            self._view.tick("", last=True)
            self._view.end()

    def say_lacking(self) -> None:
        """Say once what the trace goes on without."""
        if self._session.lacking and not self._lacking:
            self._lacking = True
            self._error(clean(self._session.lacking))

    def _error(self, cause: str, *remedy: str) -> None:
        with self._printing():
            click.echo(err=True)
            for line in (f"cwndtrace: {cause}", *(f"  {line}" for line in remedy)):
                echo_prose(line, err=True)

    def _warn(self, text: str) -> None:
        if not self._quiet:
            self._view.end()
            echo_prose(f"warning: {clean(text)}", err=True)

    def _warn_of_settings(self, connections: Batch) -> None:
        if self._quiet:
            return
        controls = {clean(name) for name in connections.table["ca_name"].unique().to_pylist()}
        found = preflight.warnings(controls, self._session.helper.idle_sysctls(), self._what)
        for line in found:
            if line not in self._warned:
                self._warn(line)
        self._warned = found

    @contextmanager
    def _printing(self) -> Iterator[None]:
        try:
            with printing():
                yield
        except OutputError as e:
            self._ended = True
            self.failed = self.failed or e.failed


class InterfaceWatch:
    """Says when the interface or the namespace that was asked for by name is gone, or has another name."""

    def __init__(self, session: Session, filters: Filters, interface: str | None) -> None:
        self._session = session
        self._filters = filters
        self._known: tuple[bool, str | None] = (True, interface)
        self._next = 0.0

    def news(self) -> str | None:
        """What changed since the last call, if anything did; looks every two seconds."""
        if self._filters.netns is None or time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + _LOOK_S
        if (now := self._session.helper.watched()) is None or now == self._known:
            return None
        (_, before), self._known = self._known, now
        there, name = now
        if not there:
            return "the network namespace that is traced has no name and no process any more; the trace goes on"
        if name == before:  # the namespace is back
            return None
        if name is None:
            return f"interface {before} is gone, removed or moved to another network namespace; the trace goes on"
        return f"interface {before} is called {name} now; the trace goes on" if before else f"interface {name} is back"
