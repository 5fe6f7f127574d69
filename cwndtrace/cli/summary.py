# SPDX-License-Identifier: Apache-2.0
"""The summary at the end of a trace: per connection, per device, what was kept and lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from cwndtrace import words as fmt
from cwndtrace.capture.session import Session
from cwndtrace.cli.live import BlockFigures
from cwndtrace.events import clean

if TYPE_CHECKING:
    from cwndtrace.trace import Trace

_MOST: Final = 20


def columns(rows: list[tuple[str, ...]], right: set[int]) -> list[str]:
    """Rows of text as aligned lines; the first row is the header, columns in ``right`` end flush."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = zip(row, widths, range(len(row)), strict=True)
        lines.append("  ".join(c.rjust(w) if i in right else c.ljust(w) for c, w, i in cells).rstrip())
    return lines


def print_summary(trace: Trace, session: Session, block: BlockFigures) -> None:
    """Print it on stdout."""
    block.count()
    summary = trace.summary()
    tally = session.tally
    click.echo()
    header = "CONNECTION PROCESS CC RESETS IDLE LOSS APP LONGEST-REST LEAST-CWND LAST-CWND"
    rows = [tuple(name.replace("-", " ") for name in header.split())]
    for row in summary.head(_MOST).to_dict("records"):
        rows.append(
            (
                fmt.connection(row),
                fmt.process(row["comm"], row["pid"]),
                clean(row["ca_name"]),
                str(row["resets"]),
                str(row["resets_idle"]),
                str(row["resets_rto_loss"]),
                str(row["resets_app_limited"]),
                fmt.span(row["rest_longest_us"]) if row["resets_idle"] else "-",
                f"{row['cwnd_min_segments']} segments",
                f"{row['cwnd_last_segments']} segments",
            )
        )
    if len(rows) > 1:
        header, *body = columns(rows, {3, 4, 5, 6, 7, 8, 9})
        click.echo(click.style(header, bold=True))
        for line in body:
            click.echo(line)
        if len(summary) > _MOST:
            click.echo(f"and {len(summary) - _MOST:,} more connections")
    else:
        click.echo("No TCP connection was seen.")
    if block.latency:
        _print_block(trace, block)
    kept, lost = tally.kept, tally.lost
    click.echo()
    click.echo(
        f"kept {kept.get('cwnd_reset', 0):,} resets, {kept.get('block_io', 0):,} block I/Os; "
        f"lost {lost.get('cwnd_reset', 0):,} and {lost.get('block_io', 0):,}; "
        f"{tally.unchanged:,} restarts left the window as it was"
    )


def _print_block(trace: Trace, block: BlockFigures) -> None:
    names = trace.meta.get("devices", {})
    rows: list[tuple[str, ...]] = [("DEVICE", "OP", "REQUESTS", "BYTES", "P50", "P95", "P99", "MAX", "ERRORS")]
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
    header, *body = columns(rows, {2, 3, 4, 5, 6, 7, 8})
    click.echo(click.style(header, bold=True))
    for line in body:
        click.echo(line)
    click.echo("(percentiles to 1 %)")


def summary_object(trace: Trace, session: Session, block: BlockFigures) -> dict[str, Any]:
    """The same as one JSON object."""
    block.count()
    tally = session.tally
    names = ["connection", "saddr", "sport", "daddr", "dport", "pid", "comm", "ca_name", "resets", "resets_idle"]
    names += ["resets_rto_loss", "resets_app_limited", "rest_longest_us", "cwnd_min_segments", "cwnd_last_segments"]
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
        "time": trace.meta["ended"],
        "capture": str(trace.path),
        "kept": tally.kept,
        "lost": tally.lost,
        "unchanged": tally.unchanged,
        "connections": trace.summary()[names].to_dict("records"),
        "block_io": devices,
    }
