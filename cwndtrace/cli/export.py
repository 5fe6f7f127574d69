# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace export``, which writes a capture in the formats of other tools."""

from __future__ import annotations

import gzip
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

import click

import cwndtrace
from cwndtrace.cli import files, options
from cwndtrace.errors import UsageError, need
from cwndtrace.export import annotate, packet_file, pcapng, text
from cwndtrace.format import clean, plural
from cwndtrace.trace import Trace

_FORMS: Final = {"csv": text.CSV, "jsonl": text.JSON_LINES}


class TableFile(click.ParamType[tuple[str, Path]]):
    """A table and the file for it, such as block_io=io.csv."""

    name = "table and file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        """Return the table's name and the path."""
        if isinstance(value, tuple):
            return value
        table, equals, file = str(value).partition("=")
        if not equals or not file:
            self.fail(f"{value!r} names no file: write verdicts=resets.csv", param, ctx)
        if table not in text.TABLES:
            self.fail(f"there is no table {table!r}, the tables are {', '.join(text.TABLES)}", param, ctx)
        return table, Path(file)


@click.command()
@click.argument("capture", type=click.Path(path_type=Path))
@click.option(
    "--csv",
    type=TableFile(),
    multiple=True,
    metavar="TABLE=FILE",
    help="Write this table as CSV, compressed if the name ends in .gz; - is stdout. Give it again for another table: "
    f"{', '.join(text.TABLES)}.",
)
@click.option(
    "--jsonl", type=TableFile(), multiple=True, metavar="TABLE=FILE", help="The same as JSON, one object a line."
)
@click.option(
    "--annotate",
    "packets",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Copy this pcap or pcapng file with a comment on the first packet after each reset; needs -o.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="With --annotate: write the copy to this file, in the format pcapng.",
)
@click.option(
    "--perfetto",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Write a trace that https://ui.perfetto.dev shows, compressed if the name ends in .gz; - is stdout.",
)
@options.max_rows
def export(
    capture: Path,
    *,
    csv: tuple[tuple[str, Path], ...],
    jsonl: tuple[tuple[str, Path], ...],
    packets: Path | None,
    output: Path | None,
    perfetto: Path | None,
    max_rows: int,
) -> None:
    """Write CAPTURE in the formats of other tools.

    \b
    Examples:
      cwndtrace export nginx.cwnd --csv verdicts=resets.csv --csv block_io=io.csv.gz
      cwndtrace export nginx.cwnd --jsonl summary=- | jq .workload
      cwndtrace export nginx.cwnd --annotate eth0.pcapng -o resets.pcapng
      cwndtrace export nginx.cwnd --perfetto nginx.pftrace.gz
    """
    tables = [(form, table, file) for form, asked in (("csv", csv), ("jsonl", jsonl)) for table, file in asked]
    if not tables and packets is None and perfetto is None:
        raise click.UsageError("there is nothing to write: give --csv, --jsonl, --annotate or --perfetto")
    if (packets is None) != (output is None):
        raise click.UsageError("--annotate and -o need each other")
    _refuse_clashes(capture, packets, [*(file for _, _, file in tables), *filter(None, (output, perfetto))])
    if perfetto is not None:
        need("perfetto.trace_builder", "perfetto", "--perfetto")
    trace = cwndtrace.load(capture, max_rows=max_rows)
    for form, table, file in tables:
        rows = _write_table(trace, _FORMS[form], table, file)
        click.echo(f"{_name(file)} has {plural(rows, 'row')} of {table}.", err=True)
    if packets is not None and output is not None:
        for line in _annotate(trace, packets, output):
            click.echo(line, err=True)
    if perfetto is not None:
        click.echo(f"{_name(perfetto)} has {plural(_write_perfetto(trace, perfetto), 'event')}.", err=True)
    for line in trace.warnings:
        click.echo(f"warning: {clean(line)}", err=True)


def _refuse_clashes(capture: Path, packets: Path | None, outputs: list[Path]) -> None:
    """Raise UsageError where an output is an input or a part of one, or where two are the same file."""
    # Unlike Path.resolve(), this takes a place that can't be reached as it is: writing to it says why.
    places = [Path(os.path.realpath(file)) for file in outputs if not _is_stdout(file)]
    if packets is not None and any(_same(file, packets) for file in places):
        raise UsageError(f"{_name(packets)} would be written onto itself.", "Choose another file for the output.")
    for file in places:
        if file.is_relative_to(os.path.realpath(capture)):
            raise UsageError(f"{_name(file)} is in the capture itself.", "Choose a file outside of it.")
    if len({*places}) < len(places) or len(outputs) - len(places) > 1:
        raise UsageError("Two outputs would go to one file.", "Give each a file of its own.")


def _same(file: Path, other: Path) -> bool:
    with suppress(OSError):
        return file.samefile(other)
    return False


def _write_table(trace: Trace, form: text.Form, table: str, file: Path) -> int:
    """Write a table, and return the number of its rows."""
    rows: list[int] = []

    def fill(opened: text.Writable) -> None:
        rows.append(text.write(opened, trace, table, form))

    _write(file, fill)
    return rows[0]


def _write_perfetto(trace: Trace, file: Path) -> int:
    """Write a trace for Perfetto, and return the number of its events."""
    from cwndtrace.export import perfetto  # it needs an extra

    events: list[int] = []
    _write(file, _binary(lambda opened: events.append(perfetto.write(trace, opened))))
    return events[0]


def _write(file: Path, fill: Callable[[text.Writable], object]) -> None:
    if _is_stdout(file):
        # An ASCII stream has no buffer, see encoding.py.
        stdout = getattr(sys.stdout, "buffer", None) or open(sys.stdout.fileno(), "wb", closefd=False)  # noqa: SIM115
        fill(stdout)
        stdout.flush()
    elif file.suffix == ".gz":
        files.write(file, _compressed(fill))
    else:
        files.write(file, fill)


def _binary(fill: Callable[[text.Writable], object]) -> Callable[[Any], object]:
    """Return ``fill``, which refuses a terminal: bytes from outside could control it."""

    def checked(opened: Any) -> None:
        if opened.isatty():
            raise UsageError("The output isn't text, and it would go to a terminal.", "Give a file or a pipe.")
        fill(opened)

    return checked


def _annotate(trace: Trace, packets: Path, output: Path) -> list[str]:
    """Write a copy of a file of packets with comments, and return what became of the resets, in words."""
    resets = trace.verdicts
    with packet_file.opened(packets) as file:
        found = annotate.find(file, resets, trace.about)
        classic = pcapng.is_classic(file)
        _write(output, _binary(partial(annotate.copy, file, found)))
    return [clean(line) for line in _outcome(found, len(resets), output, classic=classic)]


def _outcome(found: annotate.Annotations, resets: int, output: Path, *, classic: bool) -> Iterator[str]:
    done = len(found.comments)
    yield f"{_name(output)} has a comment for {done:,} of {plural(resets, 'reset')}, each on the first packet after it."
    if classic:
        yield "It is pcapng, because the format of the input, classic pcap, has no comments."
    for why, words in annotate.WHY.items():
        if number := found.left[why]:
            yield f"{plural(number, 'reset')} without one {words}."
    for link, number in found.strange_links.most_common():
        yield f"{plural(number, 'packet')} only copied: links of type {link} aren't understood."
    if found.untimed:
        yield f"{plural(found.untimed, 'packet')} only copied: simple packet blocks have no time."


def _compressed(fill: Callable[[text.Writable], object]) -> Callable[[BinaryIO], object]:
    def compress(opened: BinaryIO) -> None:
        # The format has room for a name and a time, which nobody asked for.
        with gzip.GzipFile(filename="", fileobj=opened, mode="wb", compresslevel=6, mtime=0) as zipped:
            fill(zipped)

    return compress


def _is_stdout(file: Path) -> bool:
    return str(file) == "-"


def _name(file: Path) -> str:
    return "stdout" if _is_stdout(file) else clean(str(file))
