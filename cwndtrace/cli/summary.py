# SPDX-License-Identifier: Apache-2.0
"""The summary at the end of a trace: a table of connections, a table of block devices, and totals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from cwndtrace import format as fmt
from cwndtrace.capture.session import Session
from cwndtrace.cli.live import BlockFigures
from cwndtrace.cli.table import IPV4, Column, cut_connection, cut_process, echo_prose, table
from cwndtrace.format import clean

if TYPE_CHECKING:
    import pandas as pd

    from cwndtrace.trace import Trace

_GROUPS_SHOWN: Final = 12
_CONNECTIONS_SHOWN: Final = 20
_CONNECTIONS_BESIDE_GROUPS: Final = 8
_MOST_REQUESTS: Final = 500_000
"""The most block requests that are read for the causes of idle time, which takes a second or two. ``report`` has the
causes in any case."""
_CONNECTIONS: Final = (
    Column("CONNECTION", least=IPV4, shorten=cut_connection),
    Column("PROCESS", 2, least=10, shorten=cut_process),
    Column("CC", 8),
    Column("RESETS", 1, right=True),
    Column("IDLE", 5, right=True),
    Column("LOSS", 6, right=True),
    Column("APP", 7, right=True),
    Column("LONGEST IDLE", 3, right=True),
    Column("LEAST CWND", 4, right=True),
    Column("LAST CWND", 9, right=True),
)
_DEVICES: Final = (
    Column("DEVICE", least=8),
    Column("OP"),
    Column("REQUESTS", 1, right=True),
    Column("BYTES", 7, right=True),
    Column("P50", 5, right=True),
    Column("P95", 6, right=True),
    Column("P99", 2, right=True),
    Column("MAX", 3, right=True),
    Column("ERRORS", 4, right=True),
)


def print_summary(trace: Trace, session: Session, block: BlockFigures) -> None:
    """Print the summary on stdout."""
    # This import is delayed, because pandas would slow down the start.
    from cwndtrace.present.groups import more
    from cwndtrace.present.text import window

    block.count()
    summary = trace.summary()
    tally = session.tally
    click.echo()
    most = _CONNECTIONS_BESIDE_GROUPS if _print_groups(_groups(trace, block), summary) else _CONNECTIONS_SHOWN
    rows: list[tuple[str, ...]] = []
    for row in summary.head(most).to_dict("records"):
        rows.append(
            (
                fmt.connection(row),
                fmt.holder(row),
                clean(row["ca_name"]),
                str(row["resets"]),
                str(row["resets_idle"]),
                str(row["resets_rto_loss"] + row["resets_tlp_loss"]),
                str(row["resets_app_limited"]),
                fmt.span(row["idle_longest_us"]) if row["resets_idle"] else "-",
                fmt.plural(row["cwnd_min_segments"], "segment"),
                fmt.plural(row["cwnd_last_segments"], "segment"),
            )
        )
    if rows:
        for line in table(_CONNECTIONS, rows):
            click.echo(line)
        if len(summary) > most:
            echo_prose(more(summary.iloc[most:], "connection"))
    else:
        click.echo("No TCP connection was seen.")
    if block.latency:
        _print_block(trace, block)
    kept, lost = tally.kept, tally.lost
    click.echo()
    counted = {"cwnd_reset": "reset"} | ({"block_io": "block I/O"} if "block_io" in kept else {})
    number = {
        name: ", ".join(fmt.plural(counts.get(event, 0), noun) for event, noun in counted.items())
        for name, counts in (("kept", kept), ("lost", lost))
    }
    echo_prose(
        f"kept {number['kept']}; lost {number['lost']}; "
        f"{fmt.plural(tally.unchanged, 'restart')} left the window as it was"
    )
    if trace.about.kept_from is not None:
        echo_prose(clean(f"{window(trace.about)}. The numbers of kept and lost records are of the whole trace."))
    if tally.guessed:
        echo_prose(fmt.guessed(tally.guessed))


def _print_groups(groups: pd.DataFrame, connections: pd.DataFrame) -> bool:
    """Print the connections by workload and service; returns whether that took a table."""
    # These imports are delayed, because pandas would slow down the start.
    from cwndtrace.cli.groups import lines
    from cwndtrace.present.groups import single, telling

    if sentence := single(groups):
        echo_prose(sentence)
    if not telling(groups):
        return False
    for line in lines(groups, connections, "service", _GROUPS_SHOWN):
        click.echo(line)
    click.echo()
    return True


def _groups(trace: Trace, block: BlockFigures) -> pd.DataFrame:
    return trace.groups(causes=sum(latency.count for latency in block.latency.values()) <= _MOST_REQUESTS)


def _print_block(trace: Trace, block: BlockFigures) -> None:
    names = trace.about.devices
    rows: list[tuple[str, ...]] = []
    for (dev, op), latency in sorted(block.latency.items(), key=lambda item: -item[1].count):
        percentiles = (fmt.span(latency.percentile(p)) for p in (50, 95, 99))
        rows.append(
            (
                clean(names.get(dev, dev)),
                op,
                f"{latency.count:,}",
                fmt.size(block.bytes[dev, op]),
                *percentiles,
                fmt.span(latency.max_us),
                str(block.errors[dev, op]),
            )
        )
    click.echo()
    for line in table(_DEVICES, rows):
        click.echo(line)
    click.echo("(percentiles are at most 1 % too high)")


def summary_object(trace: Trace, session: Session, block: BlockFigures) -> dict[str, Any]:
    """Return the summary as one JSON object."""
    # This import is delayed, because pandas would slow down the start.
    from cwndtrace.report.content import records

    block.count()
    tally = session.tally
    names = ["connection", "saddr", "sport", "daddr", "dport", "pid", "comm", "process", "thread", "workload"]
    names += ["service", "ca_name", "resets", "resets_idle"]
    names += ["resets_rto_loss", "resets_app_limited", "resets_tlp_loss"]
    names += ["idle_longest_us", "cwnd_min_segments", "cwnd_last_segments"]
    devices = [
        {
            "dev": dev,
            "op": op,
            "count": latency.count,
            "bytes": block.bytes[dev, op],
            "errors": block.errors[dev, op],
            "max_us": latency.max_us,
            **{f"p{p}_us_to_1_percent": latency.percentile(p) for p in (50, 95, 99)},
        }
        for (dev, op), latency in sorted(block.latency.items())
    ]
    return {
        "event": "summary",
        "time": trace.about.ended,
        "capture": str(trace.path),
        "kept": tally.kept,
        "lost": tally.lost,
        "unchanged": tally.unchanged,
        "guessed": tally.guessed,
        "groups": records(_groups(trace, block)),
        "connections": trace.summary()[names].to_dict("records"),
        "block_io": devices,
    }
