# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace report``, which explains a capture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

import cwndtrace
from cwndtrace import format as fmt
from cwndtrace.cli import files, malloc, options
from cwndtrace.cli.table import IPV4, Column, cells, cut, cut_connection, cut_process, prose, room, table
from cwndtrace.errors import making_sense
from cwndtrace.format import clean
from cwndtrace.present import ahead as ahead_in_words
from cwndtrace.present import idle
from cwndtrace.present import remedies as remedies_in_words
from cwndtrace.present import text as in_words
from cwndtrace.report import content

_CONNECTIONS: Final = 8
_CHAINS: Final = 2
_DEVICES: Final = 4
_REMEDIES: Final = 3
_AHEAD: Final = 2
_BRIEF: Final = {
    "other_end": "sent by the other end",
    "exempt": "exempt",
    "sysctl_off": "resets are off",
    "no_reset": "never reset",
}
"""Short verdicts for a table that is too narrow for the labels. Any other label is cut at its colon."""
_OF_CONNECTIONS: Final = (
    Column("CONNECTION", least=IPV4, shorten=cut_connection),
    Column("PROCESS", 1, least=10, shorten=cut_process),
    Column("CC", 6),
    Column("RESETS", 2, right=True),
    Column("HARMFUL", 3, right=True),
    Column("COST", right=True),
    Column("LONGEST IDLE", 4, right=True),
    Column("RTT", 5, right=True),
)
_OF_DEVICES: Final = (
    Column("DEVICE", least=8),
    Column("OP"),
    Column("REQUESTS", 1, right=True),
    Column("P50", 5, right=True),
    Column("P95", 6, right=True),
    Column("P99", 2, right=True),
    Column("MAX", 3, right=True),
    Column("QUEUE P95", 7, right=True),
    Column("SERVICE P95", 8, right=True),
    Column("ERRORS", 4, right=True),
)


@click.command()
@click.argument("capture", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as one JSON object on stdout.")
@click.option(
    "--html",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write the whole report, with pictures, to this self-contained HTML page.",
)
@options.max_rows
def report(capture: Path, *, as_json: bool, file: Path | None, max_rows: int) -> None:
    """Report whether the resets in CAPTURE mattered, why connections were idle, and what to do.

    \b
    Examples:
      cwndtrace report cwndtrace-20260102-030405.cwnd
      cwndtrace report nginx.cwnd --html nginx.html
      cwndtrace report nginx.cwnd --json | jq '.remedies[0].action'
    """
    malloc.keep_freed()
    result = content.report(cwndtrace.load(capture, max_rows=max_rows))
    if file is not None:
        # This import is delayed, because matplotlib takes longer to load than everything else.
        from cwndtrace.report.page import page

        text = page(result).encode()
        files.write(file, lambda opened: opened.write(text))
    if as_json:
        click.echo(fmt.json_line(content.as_json(result), allow_nan=False))
    else:
        for line in lines(result):
            click.echo(line)
    if file is not None:
        click.echo(f"The page is in {clean(str(file))}.", err=True)


def lines(found: content.Report) -> list[str]:
    """Return one screen of text that begins with the answer. Raises CaptureError if the rows contradict each other."""
    with making_sense():
        return list(_lines(found))


def _lines(found: content.Report) -> Iterator[str]:
    # Missing data comes first, because it may reverse everything that follows.
    for line in found.caveats["missing"]:
        yield from (click.style(part, bold=True) for part in prose(f"! {clean(line)}", room(), indent=2))
    for line in prose(clean(found.host.text), room()):
        yield click.style(line, bold=True)
    for line in found.caveats["limits"]:
        yield from prose(f"! {clean(line)}", room(), indent=2)
    yield ""
    if len(found.connections):
        rows: list[tuple[str, ...]] = []
        for row in found.connections.head(_CONNECTIONS).to_dict("records"):
            rows.append(
                (
                    clean(fmt.connection(row)),
                    fmt.process(row["comm"], row["pid"]),
                    clean(row["ca_name"]),
                    str(row["resets"]),
                    str(row["resets_harmful"]),
                    in_words.cost(row),
                    fmt.span(row["idle_longest_us"]) if row["resets_idle"] else "-",
                    fmt.span(row["rtt_us"]),
                    in_words.LABELS[row["verdict"]],
                )
            )
        briefs = {label: _BRIEF.get(name, label.partition(":")[0]) for name, label in in_words.LABELS.items()}
        least = max(cells(briefs[row[-1]]) for row in rows)
        labels = Column("VERDICT", least=least, shorten=lambda label, most: cut(briefs.get(label, label), most))
        yield from table((*_OF_CONNECTIONS, labels), rows)
        if len(found.connections) > _CONNECTIONS:
            yield f"and {fmt.plural(len(found.connections) - _CONNECTIONS, 'more connection')}"
        yield ""
    for row in found.chains.head(_CHAINS).to_dict("records"):
        yield from prose(clean(f"{in_words.chain(row)}."), room(), indent=2)
    for row in found.causes.to_dict("records"):
        disk = f", {fmt.span(row['disk_us'])} of it during block I/O on {clean(row['disk_device'])}"
        resets = f"{fmt.plural(row['resets'], 'reset')} after {fmt.span(row['idle_us'])} in total"
        line = (
            f"{idle.LABELS[row['cause']]}: {resets}{disk if row['disk_us'] else ''}; {row['harmful']} of them harmful"
        )
        yield from prose(line, room(), indent=2)
    if len(found.devices):
        rows = []
        for row in found.devices.head(_DEVICES).to_dict("records"):
            figures = ("latency_p50_us", "latency_p95_us", "latency_p99_us", "latency_max_us")
            parts = (row["queue_p95_us"], row["service_p95_us"])
            rows.append(
                (
                    clean(row["device"]),
                    clean(row["op"]),
                    f"{row['count']:,}",
                    *(fmt.span(row[name]) for name in figures),
                    *(fmt.span(value) if value == value else "-" for value in parts),
                    str(row["errors"]),
                )
            )
        yield ""
        yield from table(_OF_DEVICES, rows)
    coming = {
        "Will be reset, as of the last snapshot": ahead_in_words.due(found.due, _AHEAD),
        "Messages slower than the RTO": ahead_in_words.beats(found.heartbeats, _AHEAD),
    }
    for subject, texts in coming.items():
        if texts:
            yield ""
            yield click.style(subject, bold=True)
        for text in texts:
            yield from prose(text, room(), indent=2)
    yield ""
    yield click.style("What to do", bold=True)
    for number, row in enumerate(found.remedies.head(_REMEDIES).to_dict("records"), start=1):
        yield from prose(f"{number}. {clean(remedies_in_words.remedy(row))}", room(), indent=3)
