# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace run``: trace live."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

import cwndtrace
from cwndtrace import privileges
from cwndtrace.capture import target
from cwndtrace.capture.session import Session, describe
from cwndtrace.capture.stream import open_session
from cwndtrace.cli import options, user
from cwndtrace.cli.console import Console, InterfaceWatch
from cwndtrace.cli.interrupt import Interrupt
from cwndtrace.cli.live import JsonView, TextView
from cwndtrace.cli.output import OutputError, buffered_output, printing
from cwndtrace.cli.summary import print_summary, summary_object
from cwndtrace.cli.table import echo_prose
from cwndtrace.format import clean
from cwndtrace.recorder import Recorder
from cwndtrace.store import CaptureWriter, ThreadedWriter
from cwndtrace.store.writer import refuse_place


@dataclass(frozen=True)
class RunOptions:
    """What ``run`` was asked for; times in seconds."""

    iface: str | None
    pid: int | None
    port: int | None
    namespace: str | None
    cgroup: str | None
    family: Literal[4, 6] | None
    min_idle: float | None
    probe: str | None
    duration: float | None
    output: Path | None
    as_json: bool
    block: bool | None
    unwritable: Literal["wait", "stop"]
    stay_root: bool
    quiet: bool
    verbose: bool


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
def run(**values: Any) -> None:
    """Trace congestion-window resets, a line each, and block I/O, into a capture.

    \b
    Examples:
      sudo cwndtrace run --iface eth0
      sudo cwndtrace run -p $(pidof -s nginx) --min-idle 1s -d 10m -o nginx.cwnd
      sudo cwndtrace run -P 443 --json | jq -r 'select(.cwnd_after) | [.comm, .cwnd_before, .cwnd_after] | @tsv'
    """
    _run(RunOptions(**values))


def _run(asked: RunOptions) -> None:
    target.need_root("tracing")
    filters = target.resolve(
        iface=asked.iface,
        pid=asked.pid,
        port=asked.port,
        namespace=asked.namespace,
        cgroup=asked.cgroup,
        family=asked.family,
        min_idle_s=asked.min_idle,
    )
    output = asked.output or Path(time.strftime("cwndtrace-%Y%m%d-%H%M%S.cwnd"))
    owner = user.invoking()
    # At once, and not after seconds of attaching.
    refuse_place(output, owner)
    what = target.named(filters, asked.iface)
    block, privsep = asked.block is not False, not asked.stay_root
    with Interrupt() as interrupt:
        with open_session(filters, probe=asked.probe, block=block, privsep=privsep) as session:
            about = describe(session, filters, cwndtrace.__version__)
            writer = ThreadedWriter(CaptureWriter.create(output, about, user=owner))
            view: TextView | JsonView
            if asked.as_json:
                view = JsonView(session, print_block=bool(asked.block))
            else:
                view = TextView(session, print_block=bool(asked.block), quiet=asked.quiet)
            console = Console(
                view,
                session,
                InterfaceWatch(session, filters, asked.iface),
                what=what,
                quiet=asked.quiet,
                stop_when_refused=asked.unwritable == "stop",
            )
            failed = False
            try:
                with buffered_output(view.output_dropped, lambda: interrupt.hurried):
                    if privsep:
                        _drop(session, owner, quiet=asked.quiet)
                    if not asked.quiet:
                        _say_what(session, what, verbose=asked.verbose)
                    console.begin(output)
                    try:
                        Recorder(session, writer, console).run(lambda: interrupt.requested, asked.duration)
                    finally:
                        console.say_lacking()
            except OutputError as e:
                failed = e.failed
            finally:
                writer.close("failed")  # does nothing if it is closed already
        if asked.stay_root:
            # Nothing needs it any more, and the capture's owner could lead its reading elsewhere.
            privileges.drop(owner)
        with suppress(OutputError), printing():
            if not interrupt.hurried:
                # Here and not above: it takes pandas, which would hold up the start.
                from cwndtrace.trace import Trace

                trace = Trace(writer.capture())
                if asked.as_json:
                    JsonView.write(summary_object(trace, session, view.block))
                else:
                    print_summary(trace, session, view.block)
        with suppress(OutputError), printing():
            if not asked.quiet:
                _say_what_next(output)
    if failed or console.failed:
        sys.exit(1)


def _say_what_next(output: Path) -> None:
    click.echo(f"\nThe capture is in {clean(str(output))}. What to do with it:", err=True)
    click.echo(f"  cwndtrace report {clean(str(output))}", err=True)
    click.echo(f"  cwndtrace plot {clean(str(output))}", err=True)
    click.echo(f'  {sys.executable} -I -c "import cwndtrace; print(cwndtrace.load({clean(str(output))!r}))"', err=True)


def _say_what(session: Session, what: str, *, verbose: bool) -> None:
    seen = ", ".join(f"{reason} by {probe}" for reason, probe in session.source.probes.items() if probe)
    unseen = ", ".join(reason for reason, probe in session.source.probes.items() if not probe)
    with suppress(OutputError), printing():
        echo_prose(f"Tracing {clean(what)}: {seen}{f'; this kernel hides {unseen}' if unseen else ''}.", err=True)
        if verbose:
            for reason, tried in session.source.tried.items():
                for probe, why in tried.items():
                    echo_prose(f"  {reason}: not {probe}: {clean(why)}", err=True)


def _drop(session: Session, owner: privileges.User | None, *, quiet: bool) -> None:
    """Give up what tracing needs no longer, now that all is attached and open."""
    needed = session.source.power_needed(owner)
    privileges.drop(owner, needed)
    if (left := privileges.still_powerful(needed)) and not quiet:
        echo_prose(f"warning: root's power stays with threads of libraries: {clean(', '.join(left))}", err=True)
