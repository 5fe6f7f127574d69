# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace report``, which explains a capture."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click

import cwndtrace
from cwndtrace import format as fmt
from cwndtrace.analysis.groups import BY, PREFIX
from cwndtrace.cli import files, malloc, options
from cwndtrace.cli import groups as groups_on_screen
from cwndtrace.cli.table import IPV4, Column, cells, cut, cut_connection, cut_process, prose, room, table
from cwndtrace.errors import making_sense
from cwndtrace.format import clean
from cwndtrace.present import ahead as ahead_in_words
from cwndtrace.present import groups as groups_in_words
from cwndtrace.present import idle
from cwndtrace.present import remedies as remedies_in_words
from cwndtrace.present import text as in_words
from cwndtrace.report import content

_GROUPS: Final = 8
_CONNECTIONS: Final = 8
_CHAINS: Final = 2
_DEVICES: Final = 4
_REMEDIES: Final = 3
_AHEAD: Final = 2
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


class Prefix(click.ParamType[tuple[int, int]]):
    """The lengths of an IPv4 and of an IPv6 prefix, such as 16 or 24,64. The latter is 48 unless given."""

    name = "prefix"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return both lengths in bits."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"/?(\d{1,3})(?:,/?(\d{1,3}))?", str(value), re.ASCII)
        four, six = (int(match[1]), int(match[2] or PREFIX[1])) if match else (0, 0)
        if match is None or four > 32 or six > 128:
            self.fail(
                f"{value!r} isn't a prefix for IPv4 (at most 32 bits) and, after a comma, for IPv6 (at most 128): "
                "write 16, or 24,64",
                param,
                ctx,
            )
        return four, six


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
@click.option(
    "--by",
    type=click.Choice([*BY]),
    help="Group connections by workload, by service of a workload, by the network of the peer, or not at all "
    "(default: by service, where that says more than the connections).",
)
@click.option(
    "--prefix",
    type=Prefix(),
    metavar="BITS[,BITS]",
    help="With --by peer: the bits that addresses of a network share, for IPv4 and, after the comma, for IPv6; 32,128 "
    f"is each address (default: {PREFIX[0]},{PREFIX[1]}).",
)
@options.max_rows
def report(
    capture: Path,
    *,
    as_json: bool,
    file: Path | None,
    by: str | None,
    prefix: tuple[int, int] | None,
    max_rows: int,
) -> None:
    """Report whether the resets in CAPTURE mattered, why connections were idle, and what to do.

    \b
    Examples:
      cwndtrace report cwndtrace-20260102-030405.cwnd
      cwndtrace report nginx.cwnd --html nginx.html
      cwndtrace report nginx.cwnd --by peer --prefix 16
      cwndtrace report nginx.cwnd --json | jq '.remedies[0].action'
    """
    if prefix is not None and by != "peer":
        raise click.UsageError("--prefix is for the networks of peers: add --by peer")
    malloc.keep_freed()
    # Threads that compute with arrays want the interpreter's lock every tenth of a millisecond, and get it at once.
    sys.setswitchinterval(0.0005)
    result = content.report(cwndtrace.load(capture, max_rows=max_rows), by, prefix or PREFIX)
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
    if found.grouped:
        yield from groups_on_screen.lines(found.groups, found.connections, found.by, _GROUPS)
        yield ""
    elif sentence := groups_in_words.single(found.groups):
        yield from prose(sentence, room(), indent=2)
    if len(found.connections):
        rows: list[tuple[str, ...]] = []
        for row in found.connections.head(_CONNECTIONS).to_dict("records"):
            rows.append(
                (
                    clean(fmt.connection(row)),
                    fmt.holder(row),
                    clean(row["ca_name"]),
                    str(row["resets"]),
                    str(row["resets_harmful"]),
                    in_words.cost(row),
                    fmt.span(row["idle_longest_us"]) if row["resets_idle"] else "-",
                    fmt.span(row["rtt_us"]),
                    in_words.LABELS[row["verdict"]],
                )
            )
        briefs = {label: in_words.brief(name) for name, label in in_words.LABELS.items()}
        least = max(cells(briefs[row[-1]]) for row in rows)
        labels = Column("VERDICT", least=least, shorten=lambda label, most: cut(briefs.get(label, label), most))
        yield from table((*_OF_CONNECTIONS, labels), rows)
        if len(found.connections) > _CONNECTIONS:
            left_out = found.connections.iloc[_CONNECTIONS:]
            yield from prose(groups_in_words.more(left_out, "connection"), room(), indent=2)
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
