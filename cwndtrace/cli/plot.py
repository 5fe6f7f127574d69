# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace plot``: pictures of a capture."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final

import click

import cwndtrace
from cwndtrace.cli import files, options
from cwndtrace.errors import UsageError, making_sense
from cwndtrace.format import clean

ENDINGS: Final = ("png", "svg", "pdf")
"""Only these: in PostScript a picture is a program, and its title could be somebody else's text."""


@click.command()
@click.argument("capture", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="PNG, SVG or PDF, by its ending: .png, .svg, .pdf.",
)
@click.option("--connection", metavar="KEY", help="Only this one, by its key in Trace.summary().")
@click.option("--from", "start", type=float, metavar="SECONDS", help="From this second after the start.")
@click.option("--to", "end", type=float, metavar="SECONDS", help="Up to this second after the start.")
@click.option("--dark", is_flag=True, help="For a dark background.")
@options.max_rows
def plot(
    capture: Path,
    output: Path | None,
    connection: str | None,
    start: float | None,
    end: float | None,
    *,
    dark: bool,
    max_rows: int,
) -> None:
    """Draw the timeline of CAPTURE: windows, idle times, resets, and block I/O on the same axis.

    \b
    Examples:
      cwndtrace plot cwndtrace-20260102-030405.cwnd
      cwndtrace plot nginx.cwnd --from 10 --to 25 --dark -o talk.svg
    """
    # Only here, because matplotlib takes longer to load than a probe.
    from cwndtrace.plot import style
    from cwndtrace.plot.timeline import timeline

    file = output or Path(f"{capture.name.removesuffix('.cwnd')}-timeline.png")
    kind = file.suffix[1:].lower()
    if kind not in ENDINGS:
        raise UsageError(
            f"{clean(str(file))} ends in none of .png, .svg and .pdf.", "Give it one of these endings with -o."
        )
    trace = cwndtrace.load(capture, max_rows=max_rows)
    span = None if start is None and end is None else (start or 0.0, end if end is not None else float("inf"))
    with style.use(dark=dark), making_sense():
        figure = timeline(
            trace.resets,
            trace.connections,
            trace.block_io,
            about=trace.about,
            samples=trace.samples,
            connection=connection,
            span=span,
        )
        # By format and with a title of its own, so that the file's name is no part of what is in it.
        files.write(file, partial(figure.savefig, format=kind, metadata={"Title": "cwndtrace timeline"}))
    for line in trace.warnings:
        click.echo(f"warning: {clean(line)}", err=True)
    click.echo(clean(str(file)))
