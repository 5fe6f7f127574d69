# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace run``: trace live."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import click

import cwndtrace
from cwndtrace.capture import session as sessions
from cwndtrace.capture import stream, target
from cwndtrace.capture.session import Session
from cwndtrace.capture.source import Filters
from cwndtrace.cli import options
from cwndtrace.cli.live import JsonView, TextView
from cwndtrace.cli.summary import print_summary, summary_object
from cwndtrace.errors import CaptureError
from cwndtrace.events import clean
from cwndtrace.kernel import netns
from cwndtrace.store import Behind, CaptureWriter

if TYPE_CHECKING:
    import pandas as pd


@click.command()
@options.filters
@click.option("-d", "--duration", type=options.Span(), metavar="TIME", help="Stop after this long; else at Ctrl-C.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="NAME.cwnd", help="Where the capture goes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout.")
@click.option("--block/--no-block", default=None, help="Print each block request; or don't trace them at all.")
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
    quiet: bool,
    verbose: bool,
) -> None:
    """Trace congestion-window resets, a line each, and block I/O, into a capture.

    \b
    Examples:
      sudo cwndtrace run --iface eth0
      sudo cwndtrace run -p $(pidof -s nginx) --min-idle 1s -d 10m -o nginx.cwnd
      sudo cwndtrace run -P 443 --json | jq -r '[.comm, .cwnd_before, .cwnd_after] | @tsv'
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
    if output.exists():
        raise CaptureError(f"{clean(str(output))} exists already.", "Choose another name with -o.")
    if not output.parent.is_dir():
        cause = f"The folder {clean(str(output.parent))} doesn't exist."
        raise CaptureError(cause, "Make it, or choose another place with -o.")
    what = iface or (f"port {port}" if port else f"process {pid}" if pid else "this machine")
    with (
        sessions.Interrupt() as interrupt,
        stream.open_session(filters, probe=probe, block=block is not False) as session,
    ):
        about = sessions.describe(session, filters, cwndtrace.__version__)
        writer = Behind(CaptureWriter.create(output, about))
        view: TextView | JsonView
        if as_json:
            view = JsonView(session, print_block=bool(block))
        else:
            view = TextView(session, print_block=bool(block), quiet=quiet)
        try:
            if not quiet:
                _say_what(session, what, verbose=verbose)
            trace(session, writer, view, filters, interrupt, duration=duration, what=what, quiet=quiet)
        finally:
            writer.close("failed")  # does nothing if it is closed already
    trace_file = cwndtrace.load(output)
    try:
        if as_json:
            JsonView.write(summary_object(trace_file, session, view.block))
        else:
            print_summary(trace_file, session, view.block)
    except BrokenPipeError:
        _nobody_reads()
    if not quiet:
        click.echo(f"\nThe capture is in {clean(str(output))}. What to do with it:", err=True)
        click.echo(f"  cwndtrace report {clean(str(output))}", err=True)
        click.echo(f"  cwndtrace plot {clean(str(output))}", err=True)
        click.echo(f'  {sys.executable} -c "import cwndtrace; print(cwndtrace.load({clean(str(output))!r}))"', err=True)


def _say_what(session: Session, what: str, *, verbose: bool) -> None:
    seen = ", ".join(f"{reason} by {rung}" for reason, rung in session.source.rungs.items() if rung)
    unseen = ", ".join(reason for reason, rung in session.source.rungs.items() if not rung)
    click.echo(f"Tracing {clean(what)}: {seen}{f'; this kernel hides {unseen}' if unseen else ''}.", err=True)
    if verbose:
        for reason, tried in session.source.tried.items():
            for rung, why in tried.items():
                click.echo(f"  {reason}: not {rung}: {clean(why)}", err=True)


def trace(
    session: Session,
    writer: Behind | CaptureWriter,
    view: TextView | JsonView,
    filters: Filters,
    interrupt: sessions.Interrupt,
    *,
    duration: float | None,
    what: str,
    quiet: bool,
) -> None:
    """Drive a session until it ends, into ``writer`` and ``view``; the capture is closed whatever happens."""
    end = None if duration is None else time.monotonic() + duration
    warned: list[str] = []
    status, error = "failed", None
    try:
        view.begin()
        while not interrupt.requested and (end is None or time.monotonic() < end) and not session.source.exhausted():
            left = 0.1 if end is None else max(0.0, min(0.1, end - time.monotonic()))
            for batch in session.step(left):
                writer.add(batch.event, batch.table)
                view.batch(batch)
                if batch.event == "connections" and not session.tally.kept["cwnd_reset"] and not quiet:
                    warned = _warn(batch.to_pandas(), filters, what, warned, view)
            error = _flush(writer, error)
            view.tick(f"waiting for a rest longer than the RTO on {clean(what)}")
        status = "complete"
    except BrokenPipeError:
        # Whoever read our output has gone: that ends the trace like Ctrl-C, without the last words.
        status = "complete"
        _nobody_reads()
    finally:
        try:
            last = session.finish()
            for batch in last:
                writer.add(batch.event, batch.table)
            for batch in last:
                view.batch(batch)
            view.tick("")
            view.end()
        except BrokenPipeError:
            _nobody_reads()
        except BaseException:
            status = "failed"
            raise
        finally:
            writer.close(status, **sessions.ending(session))


def _nobody_reads() -> None:
    """What is still printed, and what Python flushes at its exit, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush(writer: Behind | CaptureWriter, before: CaptureError | None) -> CaptureError | None:
    """Write what is due. A full disk doesn't end the trace: the rows wait in memory, and it is said once."""
    try:
        writer.flush()
    except CaptureError as e:
        if before is None:
            click.echo(f"\ncwndtrace: {e.cause}\n  {e.remedy}", err=True)
        return e
    return before


def _warn(
    connections: pd.DataFrame, filters: Filters, what: str, before: list[str], view: TextView | JsonView
) -> list[str]:
    # Here and not above: it takes pandas, which would hold up the start.
    from cwndtrace.cli import waiting

    namespaces = [n for n in netns.all_reachable() if n.inode == (filters.netns or netns.own().inode)]
    found = waiting.warnings(connections, namespaces, what)
    new = [line for line in found if line not in before]
    if new:
        view.end()
    for line in new:
        click.echo(f"warning: {clean(line)}", err=True)
    return found
