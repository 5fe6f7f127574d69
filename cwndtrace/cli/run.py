# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace run``, which traces the running kernel."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

import cwndtrace
from cwndtrace import privileges
from cwndtrace.capture import priority, target
from cwndtrace.capture.bcc import silent
from cwndtrace.capture.session import Session, describe
from cwndtrace.capture.source import Source
from cwndtrace.capture.stream import open_session
from cwndtrace.cli import metrics, options, preflight, user
from cwndtrace.cli.conditions import Condition
from cwndtrace.cli.console import Console, InterfaceWatch
from cwndtrace.cli.interrupt import DumpSignal, Interrupt, Patience
from cwndtrace.cli.live import JsonView, TextView
from cwndtrace.cli.output import OutputError, buffered_output, output_discarded, printing
from cwndtrace.cli.summary import print_summary, summary_object
from cwndtrace.cli.table import echo_prose
from cwndtrace.cli.triggers import Triggers
from cwndtrace.format import clean
from cwndtrace.kernel import host, siblings
from cwndtrace.recorder import Observers, Recorder
from cwndtrace.store import CaptureWriter, ThreadedWriter
from cwndtrace.store.window import window
from cwndtrace.store.writer import refuse_place


@dataclass(frozen=True)
class RunOptions:
    """The options of ``run``. Times are in seconds."""

    iface: str | None
    pid: int | None
    port: int | None
    namespace: str | None
    cgroup: str | None
    container: str | None
    pod: str | None
    unit: str | None
    family: Literal[4, 6] | None
    min_idle: float | None
    probe: str | None
    duration: float | None
    keep: float | None
    keep_size: int | None
    dump_on: tuple[str, ...]
    dump_every: float
    dump_keep: int
    output: Path | None
    as_json: bool
    block: bool | None
    cmdline: bool
    metrics: tuple[str, int] | None
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
@click.option(
    "--keep",
    type=options.Span(),
    metavar="TIME",
    help="Keep only a window of the past, for example 15m or 24h, and delete older records (default: keep all).",
)
@click.option(
    "--keep-size",
    type=options.Bytes(),
    metavar="SIZE",
    help="Keep only as much of the past as fits into this, for example 500M or 2G.",
)
@click.option(
    "--dump-on",
    multiple=True,
    metavar="CONDITION",
    help="Dump what is kept when 'cost > 200ms', 'resets > 100/min' or 'block_latency > 500ms', as SIGUSR1 does.",
)
@click.option(
    "--dump-every",
    type=options.Span(),
    default="10m",
    show_default=True,
    metavar="TIME",
    help="Let conditions cause one dump in this time at most.",
)
@click.option(
    "--dump-keep",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    metavar="N",
    help="Keep this many dumps of the trace, and remove older ones.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line on stdout.")
@click.option(
    "--block/--no-block",
    default=None,
    help="Print each block I/O request, or don't trace block I/O (default: if possible, trace it without printing).",
)
@click.option(
    "--metrics",
    type=metrics.Address(),
    metavar="[ADDRESS:]PORT",
    help="Serve metrics for Prometheus there by HTTP, for example 9464, which is 127.0.0.1:9464 (default: don't).",
)
@click.option(
    "--unwritable",
    type=click.Choice(["wait", "stop"]),
    default="wait",
    help="If the disk refuses rows, keep them in memory until it accepts them (wait, the default), or stop.",
)
@click.option(
    "--cmdline/--no-cmdline",
    default=True,
    help="Keep, or don't keep, the first 200 bytes of processes' command lines in the capture (default: keep).",
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
      sudo cwndtrace run --keep 15m --keep-size 2G --dump-on 'cost > 200ms' -o now.cwnd
      sudo cwndtrace run -P 443 --json | jq -r 'select(.cwnd_after) | [.comm, .cwnd_before, .cwnd_after] | @tsv'
    """
    _run(RunOptions(**values))


def _run(asked: RunOptions) -> None:
    kept = window(asked.keep, asked.keep_size)
    conditions = [Condition(text) for text in asked.dump_on]
    target.need_root("tracing")
    host.enter_cgroup_namespace()  # before threads start, and before the helper does, so that all of them are in it
    unseen = preflight.container()
    filters = target.resolve(
        iface=asked.iface,
        pid=asked.pid,
        port=asked.port,
        namespace=asked.namespace,
        cgroup=asked.cgroup,
        container=asked.container,
        pod=asked.pod,
        unit=asked.unit,
        family=asked.family,
        min_idle_s=asked.min_idle,
    )
    output = asked.output or Path(time.strftime("cwndtrace-%Y%m%d-%H%M%S.cwnd"))
    owner = user.invoking()
    # An unusable place is refused at once, and not after seconds of attaching.
    refuse_place(output, owner)
    telemetry = metrics.asked(asked.metrics, os.environ)
    what = target.named(filters, asked.iface)
    # Other processes' sockets can be seen only as root.
    others = siblings.of(filters.pid) if filters.pid is not None else None
    privsep = not asked.stay_root
    with Interrupt() as interrupt, DumpSignal() as dump_signal:
        announce = silent if asked.quiet else _announce
        with (
            open_session(
                filters,
                probe=asked.probe,
                block=asked.block,
                privsep=privsep,
                cmdline=asked.cmdline,
                announce=announce,
            ) as session,
            priority.raised(),
        ):
            about = describe(session, filters, cwndtrace.__version__)
            capture_writer = CaptureWriter.create(output, about, user=owner, window=kept)
            capture_writer.go_on = Patience(interrupt, announce).left
            writer = ThreadedWriter(capture_writer)
            if kept is not None:
                session.names.repeat_s = kept.repeat_s
            view: TextView | JsonView
            if asked.as_json:
                view = JsonView(session, print_block=bool(asked.block))
            else:
                view = TextView(session, print_block=bool(asked.block), quiet=asked.quiet)
            if telemetry is not None:
                telemetry.prepare(session, view.block)
            console = Console(
                view,
                session,
                InterfaceWatch(session, filters, asked.iface),
                what=what,
                quiet=asked.quiet,
                stop_when_refused=asked.unwritable == "stop",
                telemetry=telemetry,
            )
            triggers = Triggers(
                writer,
                read_ns=lambda: session.read_ns,
                asked=dump_signal.taken,
                conditions=conditions,
                every_s=asked.dump_every,
                most=asked.dump_keep,
                window_s=asked.keep,
                user=owner,
                say=console.say,
                hurried=lambda: interrupt.hurried,
            )
            failed = False
            try:
                with buffered_output(view.output_dropped, lambda: interrupt.hurried) as dropped:
                    if privsep:
                        _drop_privileges(session, owner, quiet=asked.quiet)
                    if not asked.quiet:
                        _print_probes(session.source, what, verbose=asked.verbose)
                        _print_left_out(filters.pid, others)
                        _print_unseen(unseen)
                    if telemetry is not None:
                        telemetry.start(lambda: dropped() + view.unprinted)
                        if not asked.quiet:
                            _print_metrics(telemetry)
                    console.begin(output)
                    try:
                        observer = Observers(console, triggers)
                        Recorder(session, writer, observer).run(lambda: interrupt.requested, asked.duration)
                    finally:
                        console.say_lacking()
            except OutputError as e:
                failed = e.failed
            finally:
                if telemetry is not None:
                    telemetry.close()
                writer.close("failed")  # this does nothing if the writer is already closed
        if asked.stay_root:
            # Nothing needs the privileges any more, and the owner of the capture could redirect reads elsewhere.
            privileges.drop(owner)
        with suppress(OutputError), printing():
            # A service's stdout may be /dev/null, and its memory too little to read a long capture.
            if not interrupt.hurried and not output_discarded():
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
            echo_prose(f"  the thread that empties the buffers runs at nice {priority.nice()}", err=True)
            for reason, tried in source.tried.items():
                for probe, why in tried.items():
                    echo_prose(f"  {reason}: not {probe}: {clean(why)}", err=True)


def _print_left_out(pid: int | None, others: siblings.Siblings | None) -> None:
    if pid is not None and others is not None:
        with suppress(OutputError), printing():
            echo_prose(f"warning: {clean(preflight.left_out(pid, others))}", err=True)


def _print_unseen(unseen: list[tuple[str, str]]) -> None:
    with suppress(OutputError), printing():
        for cause, remedy in unseen:
            echo_prose(f"warning: {clean(cause)} ({clean(remedy)})", err=True)


def _print_metrics(telemetry: metrics.Telemetry) -> None:
    with suppress(OutputError), printing():
        for line in telemetry.describe():
            echo_prose(clean(line), err=True)


def _drop_privileges(session: Session, owner: privileges.User | None, *, quiet: bool) -> None:
    """Drop the privileges that tracing doesn't need once everything is attached and open."""
    needed = session.source.capabilities_needed(owner)
    privileges.drop(owner, needed)
    if (threads := privileges.still_privileged(needed)) and not quiet:
        echo_prose(f"warning: these library threads keep root privileges: {clean(', '.join(threads))}", err=True)
