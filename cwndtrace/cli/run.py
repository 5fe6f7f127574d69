# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace run``, which traces the running kernel."""

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
from cwndtrace.capture.bcc import silent
from cwndtrace.capture.session import Session, describe
from cwndtrace.capture.source import Source
from cwndtrace.capture.stream import open_session
from cwndtrace.cli import options, preflight, user
from cwndtrace.cli.console import Console, InterfaceWatch
from cwndtrace.cli.interrupt import Interrupt
from cwndtrace.cli.live import JsonView, TextView
from cwndtrace.cli.output import OutputError, buffered_output, printing
from cwndtrace.cli.summary import print_summary, summary_object
from cwndtrace.cli.table import echo_prose
from cwndtrace.format import clean
from cwndtrace.kernel import siblings
from cwndtrace.recorder import Recorder
from cwndtrace.store import CaptureWriter, ThreadedWriter
from cwndtrace.store.writer import refuse_place


@dataclass(frozen=True)
class RunOptions:
    """The options of ``run``. Times are in seconds."""

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
@click.option(
    "-d",
    "--duration",
    type=options.Span(),
    metavar="TIME",
    help="Stop after this time, for example 90s or 10m (default: at Ctrl-C).",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="NAME.cwnd",
    help="Write the capture to this new directory (default: cwndtrace-DATE-TIME.cwnd).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line on stdout.")
@click.option(
    "--block/--no-block",
    default=None,
    help="Print each block I/O request, or don't trace block I/O (default: if possible, trace it without printing).",
)
@click.option(
    "--unwritable",
    type=click.Choice(["wait", "stop"]),
    default="wait",
    help="If the disk refuses rows, keep them in memory until it accepts them (wait, the default), or stop.",
)
@click.option("--stay-root", is_flag=True, help="Keep root privileges while tracing, in a single process.")
@click.option("-q", "--quiet", is_flag=True, help="Print only errors on stderr.")
@click.option("-v", "--verbose", is_flag=True, help="Print why each better probe isn't used.")
def run(**values: Any) -> None:
    """Trace congestion-window resets and block I/O, and write a capture.

    The command prints a line for each reset, and a summary at the end. The kernel applies the filters; a connection
    must match all of them.

    \b
    Examples:
      sudo cwndtrace run --iface eth0
      sudo cwndtrace run -c system.slice/nginx.service --min-idle 1s -d 10m -o nginx.cwnd
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
    # An unusable place is refused at once, and not after seconds of attaching.
    refuse_place(output, owner)
    what = target.named(filters, asked.iface)
    # Other processes' sockets can be seen only as root.
    others = siblings.of(filters.pid) if filters.pid is not None else None
    privsep = not asked.stay_root
    with Interrupt() as interrupt:
        announce = silent if asked.quiet else _announce
        with open_session(filters, probe=asked.probe, block=asked.block, privsep=privsep, announce=announce) as session:
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
                        _drop_privileges(session, owner, quiet=asked.quiet)
                    if not asked.quiet:
                        _print_probes(session.source, what, verbose=asked.verbose)
                        _print_left_out(filters.pid, others)
                    console.begin(output)
                    try:
                        Recorder(session, writer, console).run(lambda: interrupt.requested, asked.duration)
                    finally:
                        console.say_lacking()
            except OutputError as e:
                failed = e.failed
            finally:
                writer.close("failed")  # this does nothing if the writer is already closed
        if asked.stay_root:
            # Nothing needs the privileges any more, and the owner of the capture could redirect reads elsewhere.
            privileges.drop(owner)
        with suppress(OutputError), printing():
            if not interrupt.hurried:
                # This import is delayed, because pandas would slow down the start.
                from cwndtrace.trace import Trace

                trace = Trace(writer.capture())
                if asked.as_json:
                    JsonView.write(summary_object(trace, session, view.block))
                else:
                    print_summary(trace, session, view.block)
        with suppress(OutputError), printing():
            if not asked.quiet:
                _print_next_steps(output)
    if failed or console.failed:
        sys.exit(1)


def _announce(what: str) -> None:
    with suppress(OutputError), printing():
        echo_prose(f"{what} ...", err=True)


def _print_next_steps(output: Path) -> None:
    click.echo(f"\nThe capture is in {clean(str(output))}. These commands read it:", err=True)
    click.echo(f"  cwndtrace report {clean(str(output))}", err=True)
    click.echo(f"  cwndtrace plot {clean(str(output))}", err=True)
    click.echo(f'  {sys.executable} -I -c "import cwndtrace; print(cwndtrace.load({clean(str(output))!r}))"', err=True)


def _print_probes(source: Source, what: str, *, verbose: bool) -> None:
    seen = ", ".join(f"{reason} by {probe}" for reason, probe in source.probes.items() if probe)
    unseen = ", ".join(reason for reason, probe in source.probes.items() if not probe)
    rest = f"; {unseen} can't be seen on this kernel" if unseen else ""
    with suppress(OutputError), printing():
        echo_prose(f"Tracing {clean(what)}: {seen or 'block I/O alone'}{rest}.", err=True)
        if source.lacking:
            echo_prose(f"warning: {clean(source.lacking)}", err=True)
        if verbose:
            if source.block_probe:
                echo_prose(f"  block I/O: from {source.block_probe} on", err=True)
            for reason, tried in source.tried.items():
                for probe, why in tried.items():
                    echo_prose(f"  {reason}: not {probe}: {clean(why)}", err=True)


def _print_left_out(pid: int | None, others: siblings.Siblings | None) -> None:
    if pid is not None and others is not None:
        with suppress(OutputError), printing():
            echo_prose(f"warning: {clean(preflight.left_out(pid, others))}", err=True)


def _drop_privileges(session: Session, owner: privileges.User | None, *, quiet: bool) -> None:
    """Drop the privileges that tracing doesn't need once everything is attached and open."""
    needed = session.source.capabilities_needed(owner)
    privileges.drop(owner, needed)
    if (threads := privileges.still_privileged(needed)) and not quiet:
        echo_prose(f"warning: these library threads keep root privileges: {clean(', '.join(threads))}", err=True)
