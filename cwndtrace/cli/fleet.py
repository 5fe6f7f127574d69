# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace fleet``, which reports on the captures of many hosts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import click

from cwndtrace.cli import fleet_report
from cwndtrace.fleet.extract import MOST_ROWS
from cwndtrace.fleet.result import Fleet, compute, stored


@click.group()
def fleet() -> None:
    """Report on the captures of many hosts.

    \b
    Example:
      cwndtrace fleet report captures/
    """


@fleet.command()
@click.argument("places", nargs=-1, required=True, metavar="PLACE...")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write the result to this folder, as Parquet (default: to none).",
)
@click.option("--resume", is_flag=True, help="With -o: compute only captures that aren't in the result or changed.")
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Start so many processes (default: as many as there are CPUs).",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Use the workers of this Dask scheduler, such as tcp://10.0.0.1:8786. It and its workers are trusted with all "
    "that you may do.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object on stdout.")
@click.option(
    "--html",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write the report to this self-contained HTML page.",
)
@click.option(
    "--since",
    type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]),
    metavar="DATE",
    help="Compare the captures from before and after this moment, UTC, such as 2026-01-31.",
)
@fleet_report.options
@click.option(
    "--max-rows",
    type=click.IntRange(min=1),
    default=MOST_ROWS,
    show_default=True,
    metavar="N",
    help="Refuse captures with more rows than this; each takes 100 to 1,000 bytes of a worker's memory.",
)
def report(
    places: tuple[str, ...],
    *,
    output: Path | None,
    resume: bool,
    workers: int | None,
    scheduler: str | None,
    as_json: bool,
    file: Path | None,
    since: datetime | None,
    by: str | None,
    top: int,
    prefix: tuple[int, int] | None,
    max_rows: int,
) -> None:
    """Report on the captures in each PLACE: a folder, a glob in quotes, or a URL such as s3://BUCKET/FOLDER.

    Captures are folders NAME.cwnd, or files NAME.cwnd.tar, .tar.gz or .tar.zst, at any depth. A folder host=NAME around
    them gives the host's name. PLACE may also be the folder of an earlier -o.

    \b
    Examples:
      cwndtrace fleet report captures/
      cwndtrace fleet report captures/ -o result --resume
      cwndtrace fleet report 's3://bucket/host=web*' --since 2026-01-31
      cwndtrace fleet report result --by peer --html peers.html
    """
    if resume and output is None:
        raise click.UsageError("--resume goes on with a result: say where it is, with -o DIR")
    if workers and scheduler:
        raise click.UsageError("--workers is for processes of this machine, and --scheduler has its own")
    result = _result(places, output, resume, workers, scheduler, max_rows)
    moment = since and since.replace(tzinfo=UTC)
    fleet_report.show(result.frames(), as_json=as_json, html=file, since=moment, by=by, top=top, prefix=prefix)
    if not (result.captures["status"] == "ok").any():
        sys.exit(1)


def _result(
    places: tuple[str, ...],
    output: Path | None,
    resume: bool,
    workers: int | None,
    scheduler: str | None,
    max_rows: int,
) -> Fleet:
    if found := stored(places, output):
        return found
    with _progress() as progress:
        return compute(
            places, output, workers=workers, scheduler=scheduler, resume=resume, max_rows=max_rows, progress=progress
        )


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Yield a function that takes how many captures are done, and how many there are, and draws a bar on a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, of: None  # noqa: ARG005
        return
    with click.progressbar(length=1, label="captures", file=sys.stderr, show_pos=True) as bar:

        def show(done: int, of: int) -> None:
            bar.length = of
            bar.update(done - bar.pos)

        yield show
