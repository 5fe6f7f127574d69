# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace plot``: pictures of a capture."""

from __future__ import annotations

from pathlib import Path

import click

import cwndtrace
from cwndtrace.errors import CwndtraceError, making_sense
from cwndtrace.events import clean


@click.command()
@click.argument("capture", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="PNG, SVG or PDF by its ending.",
)
@click.option("--connection", metavar="KEY", help="Only this one, by its key in Trace.summary().")
@click.option("--from", "start", type=float, metavar="SECONDS", help="From this second after the start.")
@click.option("--to", "end", type=float, metavar="SECONDS", help="Up to this second after the start.")
@click.option("--dark", is_flag=True, help="For a dark background.")
def plot(
    capture: Path, output: Path | None, connection: str | None, start: float | None, end: float | None, *, dark: bool
) -> None:
    """Draw the timeline of CAPTURE: windows, rests, resets, and block I/O on the same axis.

    \b
    Examples:
      cwndtrace plot cwndtrace-20260102-030405.cwnd
      cwndtrace plot nginx.cwnd --from 10 --to 25 --dark -o talk.svg
    """
    # Only here, because matplotlib takes longer to load than a probe.
    from cwndtrace.plot import style
    from cwndtrace.plot.timeline import timeline

    trace = cwndtrace.load(capture)
    file = output or Path(f"{capture.name.removesuffix('.cwnd')}-timeline.png")
    span = None if start is None and end is None else (start or 0.0, end if end is not None else float("inf"))
    with style.use(dark=dark), making_sense():
        figure = timeline(
            trace.resets,
            trace.connections,
            trace.block_io,
            meta=trace.meta,
            samples=trace.samples,
            connection=connection,
            span=span,
        )
        try:
            figure.savefig(file)
        except (OSError, ValueError) as e:
            raise CwndtraceError(f"{clean(str(file))} can't be written: {e}", "choose another file with -o") from e
    for line in trace.warnings:
        click.echo(f"warning: {clean(line)}", err=True)
    click.echo(clean(str(file)))
