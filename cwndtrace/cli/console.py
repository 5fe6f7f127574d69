# SPDX-License-Identifier: Apache-2.0
"""The output of ``run`` while it records: a view prints on stdout, and warnings go to stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click

from cwndtrace import format as fmt
from cwndtrace.analysis.direction import ENDS, Receivers
from cwndtrace.capture.session import Batch, Session
from cwndtrace.capture.source import Filters
from cwndtrace.cli import preflight, systemd
from cwndtrace.cli.live import JsonView, TextView
from cwndtrace.cli.metrics import Telemetry
from cwndtrace.cli.output import OutputError, output_closed, printing
from cwndtrace.cli.table import echo_prose
from cwndtrace.errors import CaptureError
from cwndtrace.format import clean
from cwndtrace.present.direction import elsewhere
from cwndtrace.recorder import Observer

_CHECK_INTERVAL_S: Final = 2.0


class Console(Observer):
    """An observer that shows a recorder's batches in ``view``, and warns of settings that prevent idle resets.

    ``what`` names the target of the trace. The recording continues while the disk refuses rows, unless
    ``stop_when_refused`` is set. ``failed`` is true if output failed for another reason than a reader that closed its
    end.
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
        telemetry: Telemetry | None = None,
    ) -> None:
        self.failed = False
        self._view = view
        self._session = session
        self._interface = interface
        self._what = what
        self._quiet = quiet
        self._stop_when_refused = stop_when_refused
        self._telemetry = telemetry
        self._metrics = telemetry and telemetry.metrics
        self._output_ended = False
        self._refusal_reported = False
        self._lacking_reported = False
        self._left_out_reported: set[str] = set()
        self._settings_warned: list[str] = []
        self._receivers: Receivers | None = Receivers()

    def begin(self, capture: Path) -> None:
        """Announce that tracing into ``capture`` has begun, to the user and to a service manager."""
        with self._printing():
            self._view.begin(self._what, capture)
        systemd.tell("READY=1")

    def turn(self, batches: list[Batch]) -> bool:
        """Show new batches and print new warnings; return False once nobody can read the output."""
        with self._printing():
            for batch in batches:
                self._view.batch(batch)
                if batch.event == "connections":
                    self._warn_of_direction(batch)
                    if not self._session.tally.kept["cwnd_reset"]:
                        self._warn_of_settings(batch)
            if news := self._interface.news():
                self._warn(news)
            if self._telemetry and (news := self._telemetry.news()):
                self._warn(news)
            for kind, number in self._session.tally.left_out.items():
                if kind not in self._left_out_reported:
                    self._left_out_reported.add(kind)
                    self._warn(fmt.left_out(kind, number))
            self.say_lacking()
            self._view.tick(f"waiting for idle time longer than the RTO on {clean(self._what)}")
        if self._metrics:
            self._metrics.turn(batches)  # after the view, which counts the block requests
        systemd.alive()
        # If the script that started this process and read its output has ended, the trace ends as with Ctrl-C.
        return not self._output_ended and not output_closed()

    def refused(self, error: CaptureError) -> None:
        """Report once that the disk refuses rows, or raise ``error`` to end the recording."""
        if self._stop_when_refused:
            raise error
        if not self._refusal_reported:
            self._refusal_reported = True
            self._error(error.cause, error.remedy)

    def stopping(self) -> None:
        """Tell a service manager that the trace is stopping."""
        if self._metrics:
            self._metrics.stopping()
        systemd.tell("STOPPING=1")

    def finish(self, batches: list[Batch]) -> None:
        """Show the last batches, and leave the cursor on an empty line."""
        with self._printing():
            for batch in batches:
                self._view.batch(batch)
                if batch.event == "connections":
                    self._warn_of_direction(batch)
            self._view.tick("", last=True)
            self._view.end()
        if self._metrics:
            self._metrics.finish(batches)

    def say(self, news: str, *remedy: str) -> None:
        """Print a line of news, or an error with its remedy; errors even if the trace is quiet."""
        if remedy:
            self._error(news, *filter(None, remedy))
        elif not self._quiet:
            with self._printing():
                self._view.end()
                echo_prose(clean(news), err=True)

    def say_lacking(self) -> None:
        """Report once which part of the trace is missing while the rest continues."""
        if self._session.lacking and not self._lacking_reported:
            self._lacking_reported = True
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
        lines = preflight.warnings(controls, self._session.helper.idle_sysctls(), self._what)
        for line in lines:
            if line not in self._settings_warned:
                self._warn(line)
        self._settings_warned = lines

    def _warn_of_direction(self, connections: Batch) -> None:
        """Say once that all connections that move data mostly receive, and where to trace instead."""
        if self._receivers is None or (found := self._receivers.add(connections.table)) is None:
            return
        self._receivers = None
        self._warn(elsewhere(found.select(ENDS).to_pylist(), len(connections)))

    @contextmanager
    def _printing(self) -> Iterator[None]:
        try:
            with printing():
                yield
        except OutputError as e:
            self._output_ended = True
            self.failed = self.failed or e.failed


class InterfaceWatch:
    """A watch on the network namespace and the interface given by name, which reports that one is gone or renamed."""

    def __init__(self, session: Session, filters: Filters, interface: str | None) -> None:
        self._session = session
        self._filters = filters
        self._known: tuple[bool, str | None] = (True, interface)
        self._next = 0.0

    def news(self) -> str | None:
        """Return a sentence on what has changed since the last check, or None. A check is made every two seconds."""
        if self._filters.netns is None or time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + _CHECK_INTERVAL_S
        if (now := self._session.helper.watched()) is None or now == self._known:
            return None
        (_, before), self._known = self._known, now
        reachable, name = now
        if not reachable:
            return "the traced network namespace has no name and no process left; the trace goes on"
        if name == before:  # the namespace is reachable again
            return None
        if name is None:
            return f"interface {before} is gone, removed or moved to another network namespace; the trace goes on"
        return f"interface {before} is called {name} now; the trace goes on" if before else f"interface {name} is back"
