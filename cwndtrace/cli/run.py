# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace run``: trace live."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal, cast

import click

import cwndtrace
from cwndtrace import format as fmt
from cwndtrace import privileges
from cwndtrace.capture import session as sessions
from cwndtrace.capture import stream, target
from cwndtrace.capture.session import Batch, Session
from cwndtrace.capture.source import TICK_SECONDS, Filters
from cwndtrace.cli import options, preflight, systemd, user
from cwndtrace.cli.live import JsonView, TextView
from cwndtrace.cli.output import OutputError, buffered_output, output_closed, printing
from cwndtrace.cli.summary import print_summary, summary_object
from cwndtrace.cli.table import echo_prose
from cwndtrace.errors import CaptureError
from cwndtrace.format import clean
from cwndtrace.store import CaptureWriter, ThreadedWriter
from cwndtrace.store.writer import FLUSH_SECONDS, refuse_place


@click.command()
@options.filters
@click.option("-d", "--duration", type=options.Span(), metavar="TIME", help="Stop after this long; else at Ctrl-C.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="NAME.cwnd", help="Where the capture goes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout.")
@click.option("--block/--no-block", default=None, help="Print each block request; or don't trace them at all.")
@click.option(
    "--unwritable",
    type=click.Choice(["wait", "stop"]),
    default="wait",
    help="When the disk refuses rows: hold them until it takes them (default), or stop.",
)
@click.option("--stay-root", is_flag=True, help="Keep root's power while it traces, in one process.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
@click.option("-v", "--verbose", is_flag=True, help="Say why each better probe was not used.")
def run(
    *,
    iface: str | None,
    pid: int | None,
    port: int | None,
    namespace: str | None,
    cgroup: str | None,
    family: int | None,
    min_idle: float | None,
    probe: str | None,
    duration: float | None,
    output: Path | None,
    as_json: bool,
    block: bool | None,
    unwritable: str,
    stay_root: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Trace congestion-window resets, a line each, and block I/O, into a capture.

    \b
    Examples:
      sudo cwndtrace run --iface eth0
      sudo cwndtrace run -p $(pidof -s nginx) --min-idle 1s -d 10m -o nginx.cwnd
      sudo cwndtrace run -P 443 --json | jq -r 'select(.cwnd_after) | [.comm, .cwnd_before, .cwnd_after] | @tsv'
    """
    target.need_root("tracing")
    filters = target.resolve(
        iface=iface,
        pid=pid,
        port=port,
        namespace=namespace,
        cgroup=cgroup,
        family=cast(Literal[4, 6] | None, family),
        min_idle_s=min_idle,
    )
    output = output or Path(time.strftime("cwndtrace-%Y%m%d-%H%M%S.cwnd"))
    owner = user.invoking()
    # At once, and not after seconds of attaching.
    refuse_place(output, owner)
    what = target.named(filters, iface)
    with sessions.Interrupt() as interrupt:
        with stream.open_session(filters, probe=probe, block=block is not False, privsep=not stay_root) as session:
            about = sessions.describe(session, filters, cwndtrace.__version__)
            writer = ThreadedWriter(CaptureWriter.create(output, about, user=owner))
            view: TextView | JsonView
            if as_json:
                view = JsonView(session, print_block=bool(block))
            else:
                view = TextView(session, print_block=bool(block), quiet=quiet)
            try:
                with buffered_output(view.output_dropped, lambda: interrupt.hurried):
                    if not stay_root:
                        _drop(session, owner, quiet=quiet)
                    if not quiet:
                        _say_what(session, what, verbose=verbose)
                    watch = Watch(session, filters, iface)
                    saver = Saver(writer, session, stop=unwritable == "stop")
                    failed = trace(session, saver, view, interrupt, watch, duration=duration, what=what, quiet=quiet)
            except OutputError as e:
                failed = e.failed
            finally:
                writer.close("failed")  # does nothing if it is closed already
        if stay_root:
            # Nothing needs it any more, and the capture's owner could lead its reading elsewhere.
            privileges.drop(owner)
        with suppress(OutputError), printing():
            if not interrupt.hurried:
                # Here and not above: it takes pandas, which would hold up the start.
                from cwndtrace.trace import Trace

                trace_file = Trace(writer.capture())
                if as_json:
                    JsonView.write(summary_object(trace_file, session, view.block))
                else:
                    print_summary(trace_file, session, view.block)
        with suppress(OutputError), printing():
            if not quiet:
                _say_what_next(output)
    if failed:
        sys.exit(1)


def _say_what_next(output: Path) -> None:
    click.echo(f"\nThe capture is in {clean(str(output))}. What to do with it:", err=True)
    click.echo(f"  cwndtrace report {clean(str(output))}", err=True)
    click.echo(f"  cwndtrace plot {clean(str(output))}", err=True)
    click.echo(f'  {sys.executable} -I -c "import cwndtrace; print(cwndtrace.load({clean(str(output))!r}))"', err=True)


def _say_what(session: Session, what: str, *, verbose: bool) -> None:
    seen = ", ".join(f"{reason} by {rung}" for reason, rung in session.source.rungs.items() if rung)
    unseen = ", ".join(reason for reason, rung in session.source.rungs.items() if not rung)
    with suppress(OutputError), printing():
        echo_prose(f"Tracing {clean(what)}: {seen}{f'; this kernel hides {unseen}' if unseen else ''}.", err=True)
        if verbose:
            for reason, tried in session.source.tried.items():
                for rung, why in tried.items():
                    echo_prose(f"  {reason}: not {rung}: {clean(why)}", err=True)


def _drop(session: Session, owner: privileges.User | None, *, quiet: bool) -> None:
    """Give up what tracing needs no longer, now that all is attached and open."""
    needed = session.source.power_needed(owner)
    privileges.drop(owner, needed)
    if (left := privileges.still_powerful(needed)) and not quiet:
        echo_prose(f"warning: root's power stays with threads of libraries: {clean(', '.join(left))}", err=True)


class Saver:
    """Writes what is due. A disk that refuses is said once, and ends the trace only if ``stop``."""

    def __init__(self, writer: ThreadedWriter | CaptureWriter, session: Session, *, stop: bool) -> None:
        self.writer = writer
        self._session = session
        self._stop = stop
        self._told: tuple[object, ...] = self._news()
        self._failed = False
        self._next = 0.0
        self._lacking_told = False

    def _news(self) -> tuple[object, ...]:
        tally = self._session.tally
        lost, left_out = sum(tally.lost.values()), sum(tally.left_out.values())
        return lost, left_out, len(self._session.clock.all), self._session.lacking

    def save(self) -> None:
        """Write rows that are due, and, should this process be killed, what has been lost until now."""
        self.say_lacking()
        try:
            self.writer.flush()
            now = time.monotonic()
            # Not each time: losses come where there is no time to spare.
            if now >= self._next and (news := self._news()) != self._told:
                self._next = now + FLUSH_SECONDS
                self.writer.update_meta(**sessions.so_far(self._session))
                self._told = news
        except CaptureError as e:
            if self._stop:
                raise
            if not self._failed:
                click.echo(err=True)
                for line in (f"cwndtrace: {e.cause}", f"  {e.remedy}"):
                    echo_prose(line, err=True)
            self._failed = True

    def say_lacking(self) -> None:
        """Say, once, what the trace goes on without."""
        if self._session.lacking and not self._lacking_told:
            self._lacking_told = True
            click.echo(err=True)
            echo_prose(f"cwndtrace: {clean(self._session.lacking)}", err=True)


def trace(
    session: Session,
    saver: Saver,
    view: TextView | JsonView,
    interrupt: sessions.Interrupt,
    watch: Watch,
    *,
    duration: float | None,
    what: str,
    quiet: bool,
) -> bool:
    """Drive a session until it ends, saving and showing; the capture is closed whatever happens.

    Says whether what was to be printed couldn't be, though somebody was there to read it.
    """
    end = None if duration is None else time.monotonic() + duration
    warned: list[str] = []
    told: set[str] = set()
    status, output_failed = "failed", False
    try:
        with printing():
            view.begin(what, saver.writer.path)
        systemd.tell("READY=1")
        while not interrupt.requested and (end is None or time.monotonic() < end) and not session.source.exhausted():
            left = TICK_SECONDS if end is None else max(0.0, min(TICK_SECONDS, end - time.monotonic()))
            batches = session.step(left)
            for batch in batches:
                saver.writer.add(batch.event, batch.rows)
            with printing():
                for batch in batches:
                    view.batch(batch)
                    if batch.event == "connections" and not session.tally.kept["cwnd_reset"] and not quiet:
                        warned = _warn(batch, session, what, warned, view)
                if not quiet and (news := watch.news()):
                    view.end()
                    echo_prose(f"warning: {clean(news)}", err=True)
                for kind, number in session.tally.left_out.items() if not quiet else ():
                    if kind not in told:
                        told.add(kind)
                        view.end()
                        echo_prose(f"warning: {fmt.left_out(kind, number)}", err=True)
                saver.save()
                view.tick(f"waiting for idle time longer than the RTO on {clean(what)}")
            if output_closed():
                # As at the end of a script that started this one: that ends the trace like Ctrl-C.
                break
        status = "complete"
    except OutputError as e:
        status, output_failed = "complete", e.failed
    finally:
        systemd.tell("STOPPING=1")
        try:
            last = session.finish()
            for batch in last:
                saver.writer.add(batch.event, batch.rows)
            with suppress(OutputError), printing():
                for batch in last:
                    view.batch(batch)
                view.tick("", last=True)
                view.end()
        except BaseException:
            status = "failed"
            raise
        finally:
            saver.writer.close(status, **sessions.ending(session))
            with suppress(OutputError), printing():
                saver.say_lacking()
    return output_failed


_LOOK_S: Final = 2.0


class Watch:
    """Says when what was asked for by name is there no more, or has another name; the trace goes on."""

    def __init__(self, session: Session, filters: Filters, iface: str | None) -> None:
        self._session = session
        self._filters = filters
        self._known: tuple[bool, str | None] = (True, iface)
        self._next = 0.0

    def news(self) -> str | None:
        """What changed since the last call, if anything did."""
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


def _warn(connections: Batch, session: Session, what: str, before: list[str], view: TextView | JsonView) -> list[str]:
    controls = {clean(name) for name in connections.table["ca_name"].unique().to_pylist()}
    found = preflight.warnings(controls, session.helper.idle_sysctls(), what)
    new = [line for line in found if line not in before]
    if new:
        view.end()
    for line in new:
        echo_prose(f"warning: {clean(line)}", err=True)
    return found
