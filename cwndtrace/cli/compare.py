# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace compare``, which compares two captures, before and after a change."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import click

import cwndtrace
from cwndtrace import format as fmt
from cwndtrace.analysis.compare import MEASURES
from cwndtrace.cli import options
from cwndtrace.cli.table import Column, echo_prose, table
from cwndtrace.format import clean, json_line, signed, span
from cwndtrace.records.arrow import TABLES

_COLUMNS: Final = (
    Column("MEASURE", least=16),
    Column("BEFORE", right=True),
    Column("AFTER", right=True),
    Column("DIFFERENCE", 1, right=True),
    Column("95 % INTERVAL", 2),
    Column("EFFECT"),
    Column("VALUES", 3),
)


@click.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines: the conclusion, then one for each measure.")
@options.max_rows
def compare(before: Path, after: Path, *, as_json: bool, max_rows: int) -> None:
    """Compare two captures, taken BEFORE and AFTER a change.

    The first line says whether the change cured the idle resets that cost time, or why that can't be told. For each
    measure, the table shows the difference, its 95 % bootstrap interval and the size of the effect.

    \b
    Examples:
      cwndtrace compare monday.cwnd tuesday.cwnd
      cwndtrace compare on.cwnd off.cwnd --json | jq -r 'select(.event == "conclusion") | .verdict'
    """
    traces = tuple(cwndtrace.load(path, max_rows=max_rows) for path in (before, after))
    rows = traces[0].compare(traces[1]).to_dict("records")
    conclusion = traces[0].conclude(traces[1])
    if as_json:
        click.echo(json_line({"event": "conclusion"} | conclusion.to_dict()))
        for row in rows:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            click.echo(json_line({"event": "compare"} | finite))
    else:
        echo_prose(str(conclusion))
        for trace in traces:
            echo_prose(f"{clean(str(trace.path))}: {clean(trace.host().text)}")
        _print(rows)
    for trace in traces:
        lost = {name: trace.lost(name) for name in TABLES}
        lines = [fmt.lost(number, "record", name) for name, number in lost.items() if number]
        for line in [*trace.warnings, *lines]:
            click.echo(f"warning: {clean(str(trace.path))}: {clean(line)}", err=True)


def _print(rows: list[dict[Any, Any]]) -> None:
    texts: list[tuple[str, ...]] = []
    for row in rows:
        ends = [_value(row[end], row["unit"], sign=True) for end in ("low", "high")]
        texts.append(
            (
                clean(row["measure"]),
                *(_value(row[side], row["unit"]) for side in ("before", "after")),
                _value(row["difference"], row["unit"], sign=True),
                "-" if math.isnan(row["low"]) else f"{ends[0]} to {ends[1]}",
                row["effect"],
                f"{row['n_before']:,} and {row['n_after']:,}",
            )
        )
    click.echo()
    for line in table(_COLUMNS, texts):
        click.echo(line)
    click.echo()
    for name, (_, centre, meaning) in MEASURES.items():
        if any(row["measure"] == name for row in rows):
            echo_prose(f"{name}: {meaning} ({centre})")


def _value(value: float, unit: str, *, sign: bool = False) -> str:
    if math.isnan(value):
        return "-"

    def show(size: float) -> str:
        return f"{span(size)}{unit[2:]}" if unit.startswith("us") else f"{size:,.3g} {unit}"

    return signed(value, show) if sign else show(value)
