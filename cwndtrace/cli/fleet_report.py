# SPDX-License-Identifier: Apache-2.0
"""The report of a fleet on the screen, as JSON and as a page, with the options of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import pandas as pd

from cwndtrace import format as fmt
from cwndtrace.analysis.groups import PREFIX
from cwndtrace.cli import files
from cwndtrace.cli.report import Prefix
from cwndtrace.cli.table import Column, cells, cut, cut_middle, cut_service, prose, room, table
from cwndtrace.errors import making_sense
from cwndtrace.fleet import change, summary
from cwndtrace.fleet.summary import BY, FleetReport
from cwndtrace.fleet.tables import Frames
from cwndtrace.format import clean
from cwndtrace.present import fleet as in_words
from cwndtrace.present import groups as groups_in_words
from cwndtrace.present import text
from cwndtrace.report import fleet as content

F = TypeVar("F", bound=Callable[..., Any])
TOP: Final = 5
_FAILED: Final = 5
_NAMES: Final = {
    "workload": Column("WORKLOAD", least=16, shorten=cut_middle),
    "service": Column("SERVICE", least=14, shorten=cut_service),
    "peer": Column("PEERS", least=18),
    "host": Column("HOST", least=16, shorten=cut_middle),
    "kernel": Column("KERNEL", least=16, shorten=cut_middle),
}
_FIGURES: Final = (
    Column("HOSTS", 1, right=True),
    Column("CONNECTIONS", 4, right=True),
    Column("RESETS", 2, right=True),
    Column("HARMFUL", 8, right=True),
    Column("COST", right=True),
    Column("OF BUSY", 6, right=True),
    Column("PER SECOND", 7, right=True),
    Column("WORST HOSTS", 3, least=22, shorten=lambda hosts, most: _fewer(hosts, most)),
)
_OF_CHANGES: Final = (
    Column("HOSTS", 3),
    Column("BEFORE AND AFTER", 2),
    Column("RATIO", right=True),
    Column("95 % INTERVAL", 1),
    Column("SENT", 4, right=True),
    Column("CONCLUSION", least=11, shorten=lambda said, most: cut(said if cells(said) <= most else _brief(said), most)),
)


def options(command: F) -> F:
    """Add the options of the report to a command: ``by``, ``top`` and ``prefix``."""
    for option in reversed(
        (
            click.option(
                "--by",
                type=click.Choice([*BY]),
                help="Show the cost by service of a workload, by workload, host, network of the peer or kernel alone "
                "(default: all of them). --since compares these groups too (default: services).",
            ),
            click.option(
                "--top",
                type=click.IntRange(min=1),
                default=TOP,
                show_default=True,
                metavar="N",
                help="Show so many rows of each table; --json has all.",
            ),
            click.option(
                "--prefix",
                type=Prefix(),
                metavar="BITS[,BITS]",
                help="The bits that addresses of a network share, for IPv4 and, after the comma, for IPv6 "
                f"(default: {PREFIX[0]},{PREFIX[1]}).",
            ),
        )
    ):
        command = option(command)
    return command


def show(
    frames: Frames,
    *,
    as_json: bool,
    html: Path | None,
    since: datetime | None,
    by: str | None = None,
    top: int = TOP,
    prefix: tuple[int, int] | None = None,
) -> None:
    """Print the report of a fleet, or its JSON, and write its page to ``html``.

    ``since`` is an aware time. Raises CwndtraceError if the page can't be written or rows contradict each other.
    """
    with making_sense():
        moment = None if since is None else pd.Timestamp(since).tz_convert("UTC")
        found = summary.report(frames, by or "service", moment, prefix or PREFIX)
        written = "" if html is None else content.page(found)
        printed = [fmt.json_line(content.as_json(found), allow_nan=False)] if as_json else list(lines(found, by, top))
    if html is not None:
        files.write(html, lambda opened: opened.write(written.encode()))
    for line in printed:
        click.echo(line)
    if html is not None:
        click.echo(f"The page is in {clean(str(html))}.", err=True)


def lines(found: FleetReport, by: str | None, top: int) -> Iterator[str]:
    """Yield the report as text that fits the terminal, with ``top`` rows in each table.

    ``by`` is one of ``BY`` for its table alone, or None for all.
    """
    caveats = content.caveats(found, _FAILED)
    for line in caveats["missing"]:
        yield from (click.style(part, bold=True) for part in prose(f"! {clean(line)}", room(), indent=2))
    for line in prose(clean(in_words.answer(found.connections, found.captures)[1]), room()):
        yield click.style(line, bold=True)
    for line in caveats["limits"]:
        yield from prose(f"! {clean(line)}", room(), indent=2)
    for name in [by] if by else _telling(found):
        if len(found.costs[name]):
            yield from _table(found.costs[name], name, top)
    said = content.settings(found)
    if said:
        yield from _head(content.SETTINGS)
        for line in said[:top]:
            yield from prose(clean(line), room(), indent=2)
        if len(said) > top:
            yield f"and {len(said) - top:,} more"
    if found.since is not None and found.change is not None:
        yield from _head("Before and after")
        for line in in_words.sides(found.captures, found.since):
            yield from prose(clean(line), room(), indent=2)
        if len(found.change):
            yield from _changes(found.change, found.by, top)


def _telling(found: FleetReport) -> list[str]:
    """Return the ways to group that tell something: workloads only where a table of them differs from the services."""
    workloads = found.costs["workload"]
    same = len(workloads) == len(found.costs["service"]) or not groups_in_words.telling(workloads)
    return [name for name in BY if name != "workload" or not same]


def _head(title: str) -> Iterator[str]:
    yield ""
    for line in prose(title, room(), indent=2):
        yield click.style(line, bold=True)


def _table(costs: pd.DataFrame, by: str, top: int) -> Iterator[str]:
    yield from _head(f"Cost by {in_words.TITLES[by]}")
    shown = costs.head(top).to_dict("records")
    rows = [
        (
            *in_words.names(row).values(),
            f"{row['hosts']:,}",
            f"{row['connections']:,}",
            f"{row['resets']:,}",
            f"{row['resets_harmful']:,}",
            text.cost(row),
            in_words.busy(row),
            in_words.rate(row),
            in_words.worst(row),
            groups_in_words.verdict(row),
        )
        for row in shown
    ]
    briefs = {groups_in_words.verdict(row): groups_in_words.verdict(row, text.brief(row["verdict"])) for row in shown}
    least = max(map(cells, briefs.values()))
    verdicts = Column("VERDICT", 5, least=least, shorten=lambda label, most: cut(briefs.get(label, label), most))
    columns = (*(_NAMES[name] for name in in_words.names(shown[0])), *_FIGURES, verdicts)
    # A host is the worst one of itself.
    kept = [n for n, column in enumerate(columns) if by != "host" or column.title not in ("HOSTS", "WORST HOSTS")]
    yield from table([columns[n] for n in kept], [[row[n] for n in kept] for row in rows])
    if len(costs) > top:
        yield from prose(groups_in_words.more(costs.iloc[top:], in_words.NOUNS[by]), room(), indent=2)


def _changes(found: pd.DataFrame, by: str, top: int) -> Iterator[str]:
    shown = found.head(top).to_dict("records")
    rows = [
        (
            *in_words.names(row).values(),
            f"{row['hosts_before']:,} and {row['hosts_after']:,}",
            f"{in_words.side_rate(row, 'before')} and {in_words.side_rate(row, 'after')}",
            in_words.ratio(row["ratio"]),
            in_words.interval(row),
            in_words.ratio(row["sent_ratio"]),
            in_words.changed(row, change.ENOUGH),
        )
        for row in shown
    ]
    yield from table((*(_NAMES[name] for name in in_words.names(shown[0])), *_OF_CHANGES), rows)
    if len(found) > top:
        yield f"and {fmt.plural(len(found) - top, f'more {in_words.NOUNS[by]}')}"
    note = (
        "BEFORE AND AFTER are the measured cost per second that these hosts traced, and RATIO is the latter by the "
        "former; its interval is a bootstrap over hosts. SENT is the same ratio of the bytes sent: where it isn't near "
        "1, the load has changed too, and the captures don't tell how much of the change is due to it."
    )
    yield from prose(note, room(), indent=2)


def _fewer(hosts: str, most: int) -> str:
    """Return as many of the hosts as fit with their costs whole, because half a figure would be another figure."""
    kept = hosts
    while cells(f"{kept}, ..") > most and ", " in kept:
        kept = kept.rpartition(", ")[0]
    return cut(f"{kept}, ..", most)


def _brief(said: str) -> str:
    return said.partition(":")[0].partition(",")[0].partition(";")[0]
