# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace plot``, which draws the timeline of a capture."""

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
"""The picture formats. PostScript isn't one: such a picture is a program, and its title could be untrusted text."""


@click.command()
@click.argument("capture", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the picture to this .png, .svg or .pdf file (default: CAPTURE-timeline.png).",
)
@click.option(
    "--connection",
    metavar="KEY",
    help="Draw only this connection, by its key in Trace.summary() (default: the four with most resets).",
)
@click.option(
    "--from", "start", type=float, metavar="SECONDS", help="Begin this many seconds after the start of the capture."
)
@click.option(
    "--to", "end", type=float, metavar="SECONDS", help="End this many seconds after the start of the capture."
)
@click.option("--dark", is_flag=True, help="Draw for a dark background.")
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
    """Draw the timeline of CAPTURE.

    The picture shows congestion windows, idle times, resets and block I/O on one time axis.

    \b
    Examples:
      cwndtrace plot cwndtrace-20260102-030405.cwnd
      cwndtrace plot nginx.cwnd --from 10 --to 25 --dark -o talk.svg
    """
    # This import is delayed, because matplotlib takes longer to load than a probe.
    from cwndtrace.plot import style
    from cwndtrace.plot.timeline import timeline

    file = output or Path(f"{capture.name.removesuffix('.cwnd')}-timeline.png")
    ending = file.suffix[1:].lower()
    if ending not in ENDINGS:
        raise UsageError(
            f"{clean(str(file))} doesn't end in .png, .svg or .pdf.", "Give it one of these endings with -o."
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
        # The format and the title are given, so that the name of the file doesn't become part of its content.
        files.write(file, partial(figure.savefig, format=ending, metadata={"Title": "cwndtrace timeline"}))
    for line in trace.warnings:
        click.echo(f"warning: {clean(line)}", err=True)
    click.echo(clean(str(file)))
