# SPDX-License-Identifier: Apache-2.0
"""The views of ``run`` while it traces: text, with a line for each reset and a status line, or JSON."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click
import numpy as np

from cwndtrace import format as fmt
from cwndtrace.analysis import peer_window
from cwndtrace.analysis.histogram import LatencyHistogram
from cwndtrace.capture.session import Batch, Session
from cwndtrace.cli.table import Column, FittedTable, cut, cut_connection, cut_process, echo_prose, room
from cwndtrace.lazy import pa
from cwndtrace.records import arrow, layout

_COLOURS: Final = {"idle": "yellow", "rto_loss": "red", "app_limited": "cyan", "tlp_loss": "magenta"}
_STATUS_EVERY_S: Final = 0.5
_LOST_EVERY_S: Final = 10.0
"""Least interval between two reports of lost records. A busy machine may lose some in each turn, and reports of all of
them would hide the resets."""
_PRINTED: Final = 10_000
"""The most records of one event and turn that are printed. That takes half a second, for which the rings wait."""
_COUNT_AT_ROWS: Final = 16_384
"""The number of waiting block requests at which they are counted, which bounds the memory that they take."""
_TIME: Final = Column("TIME", least=8, shorten=lambda text, most: text[:most])
RESETS_SHOWN: Final = (
    _TIME,
    Column("REASON", least=8),
    Column("PROCESS", 2, least=10, shorten=cut_process),
    Column("CONNECTION", least=41, shorten=cut_connection),
    Column("IDLE", 1, right=True),
    Column("RTO", 3, right=True),
    Column("CWND (segments)", right=True),
    Column("SSTHRESH", 4, right=True),
    Column("SRTT", 5, right=True),
)
_RESET_WIDTHS: Final = (15, 11, 20, 41, 8, 8, 15, 8, 8)
_REQUESTS: Final = (
    _TIME,
    Column("EVENT"),
    Column("PROCESS", least=10, shorten=cut_process),
    Column("REQUEST", least=45),
)
_REQUEST_WIDTHS: Final = (15, 11, 20, 45)


class BlockFigures:
    """Statistics of block I/O by device and operation: latency, bytes, errors. Call ``count`` before reading them."""

    def __init__(self) -> None:
        self.latency: dict[tuple[str, str], LatencyHistogram] = {}
        self.bytes: dict[tuple[str, str], int] = {}
        self.errors: dict[tuple[str, str], int] = {}
        self._waiting: list[arrow.TimedRecords] = []
        self._rows = 0

    def add(self, batch: Batch) -> None:
        """Add a batch of ``block_io``."""
        self._waiting.append(batch.rows)
        self._rows += len(batch)
        if self._rows >= _COUNT_AT_ROWS:
            self.count()

    def count(self) -> None:
        """Count all batches added so far. To count many requests at once takes hardly more work than a few."""
        if not self._waiting:
            return
        records = arrow.TimedRecords.joined(self._waiting).records
        self._waiting, self._rows = [], 0
        us = (records["done_ns"].astype(np.int64) - records["start_ns"].astype(np.int64)) / 1000
        size, failed = records["bytes"], records["error"] != layout.code("blk_sts", "ok")
        pairs = arrow.numbers(pa.uint64(), records["dev"].astype(np.uint64) << 8 | records["op"]).dictionary_encode()
        numbers = arrow.values(pairs.indices)
        for number, raw in enumerate(pairs.dictionary.to_pylist()):
            pair = arrow.label("block_io", "dev", raw >> 8), arrow.label("block_io", "op", raw & 0xFF)
            rows = slice(None) if len(pairs.dictionary) == 1 else np.flatnonzero(numbers == number)
            self.latency.setdefault(pair, LatencyHistogram()).add(us[rows])
            self.bytes[pair] = self.bytes.get(pair, 0) + int(size[rows].sum())
            self.errors[pair] = self.errors.get(pair, 0) + int(failed[rows].sum())

    def all(self) -> LatencyHistogram:
        """Return the latencies of all devices and operations."""
        return LatencyHistogram.joined(self.latency.values())


class ConnectionHolders:
    """The process that holds each connection, for resets by a timer or an ACK, which happen in no process.

    The processes come from the last two snapshots. Older ones are dropped, because a server may make thousands of
    connections a second, and a trace may last for days.
    """

    def __init__(self) -> None:
        self._snapshots: list[pa.Table] = []
        self._held: list[dict[tuple[Any, ...], tuple[str, int]]] | None = None

    def add(self, batch: Batch) -> None:
        """Add a batch of ``connections``, which is one snapshot."""
        self._snapshots = [batch.table, *self._snapshots[:1]]
        self._held = None

    def of(self, row: dict[str, Any]) -> tuple[str, int] | tuple[str, int, str]:
        """Return the name and pid of the process that holds a reset's connection, or ("", 0) if it is unknown.

        The name of the thread follows where the reset happened in one.
        """
        if row["tgid"]:
            return row.get("process") or row["comm"], row["tgid"], row["comm"]
        # The keys are made only when they are needed, because this runs Python code for each connection.
        if self._held is None:
            self._held = [self._by_key(table) for table in self._snapshots]
        key = self._key(row)
        return next((held[key] for held in self._held if held.get(key)), ("", 0))

    def _by_key(self, table: pa.Table) -> dict[tuple[Any, ...], tuple[str, int]]:
        rows = table.select(["netns_ino", "saddr", "sport", "daddr", "dport", "comm", "pid"]).to_pylist()
        return {self._key(row): (row["comm"], row["pid"]) for row in rows}

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("netns_ino", "saddr", "sport", "daddr", "dport"))


class TextView:
    """A view that prints aligned lines on stdout, and rewrites a status line on stderr if that is a terminal."""

    def __init__(self, session: Session, *, print_block: bool, quiet: bool) -> None:
        self._session = session
        self._print_block = print_block
        self._quiet = quiet
        self._terminal = sys.stderr.isatty() and not quiet
        self._room = room()
        self._lay_out()
        self._resets = 0
        self._status_at = 0.0
        self._status_shown = False
        self._lost = 0
        self._lost_at = -math.inf
        self._holders = ConnectionHolders()
        self.block = BlockFigures()
        self.unprinted = 0

    def begin(self, what: str, capture: Path) -> None:  # noqa: ARG002
        """Print the header."""
        self._header()

    def _header(self) -> None:
        for line in (self._layout.header(), *self._layout.left_out()):
            click.echo(line)

    def _lay_out(self) -> None:
        self._layout = FittedTable(RESETS_SHOWN, _RESET_WIDTHS, self._room)
        self._requests = FittedTable(_REQUESTS, _REQUEST_WIDTHS, self._room)

    def _follow_terminal(self) -> None:
        """Print a new header if the width of the terminal has changed."""
        if self._room != (now := room()):
            self._room = now
            self._lay_out()
            self._header()

    def batch(self, batch: Batch) -> None:
        """Print resets, and block requests if ``print_block`` is set; count the rest."""
        if batch.event == "cwnd_reset":
            self._resets += len(batch)
            self._print(batch, self._reset)
        elif batch.event == "block_io":
            self.block.add(batch)
            if self._print_block:
                self._print(batch, self._request)
        elif batch.event == "connections":
            self._holders.add(batch)

    def _print(self, batch: Batch, line: Callable[[dict[str, Any]], None]) -> None:
        self._clear_status()
        self._follow_terminal()
        self.unprinted += _print_rows(self, batch, line)

    def _reset(self, row: dict[str, Any]) -> None:
        cells = (
            row["time"][11:26],
            peer_window.reason(row),
            fmt.process(*self._holders.of(row)),
            fmt.connection(row),
            fmt.span(row["idle_us"]),
            fmt.span(row["rto_us"]),
            f"{row['cwnd_before']} -> {row['cwnd_after']}",
            fmt.threshold(row["ssthresh_after"]),
            fmt.span(row["srtt_us"]),
        )
        colour = _COLOURS.get(row["reason"])
        click.echo(self._layout.line(cells, {6: lambda text: click.style(text, fg=colour)} if colour else None))

    def _request(self, row: dict[str, Any]) -> None:
        latency = fmt.span((row["done_ns"] - row["start_ns"]) / 1000)
        error = "" if row["error"] == "ok" else f" {row['error'].upper()}"
        request = f"{row['dev']} {row['op']} sector {row['sector']} {fmt.size(row['bytes'])} in {latency}{error}"
        cells = (row["time"][11:26], "block_io", fmt.process(row["comm"], row["tgid"]), request)
        click.echo(self._requests.line(cells))

    def tick(self, waiting: str, *, last: bool = False) -> None:
        """Rewrite the status line every half second, and report lost records.

        Losses are reported every ten seconds at most, and at the end (``last``). ``waiting`` is shown until the first
        reset.
        """
        lost, now = sum(self._session.tally.lost.values()), time.monotonic()
        if lost > self._lost and not self._quiet and (last or now - self._lost_at >= _LOST_EVERY_S):
            self._clear_status()
            losses = ", ".join(f"{n:,} {event}" for event, n in self._session.tally.lost.items() if n)
            echo_prose(f"lost so far: {losses} (counted in the kernel)", err=True)
            self._lost, self._lost_at = lost, now
        if not self._terminal or now - self._status_at < _STATUS_EVERY_S:
            return
        self._status_at = now
        parts = [waiting if not self._resets else fmt.plural(self._resets, "reset")]
        if self._session.tally.unchanged:
            parts.append(f"{fmt.plural(self._session.tally.unchanged, 'restart')} left the window as it was")
        self.block.count()
        latency = self.block.all()
        if latency.count:
            p50, p95, p99 = (fmt.span(latency.percentile(p)) for p in (50, 95, 99))
            parts.append(f"block I/O {latency.count:,}: p50 {p50}, p95 {p95}, p99 {p99} (within 1 %)")
        parts.append(f"lost {lost:,}")
        text = cut(" | ".join(parts), (room(err=True) or 80) - 1)
        click.echo(f"\r\x1b[K{text}", err=True, nl=False)
        self._status_shown = True

    def _clear_status(self) -> None:
        if self._status_shown:
            click.echo("\r\x1b[K", err=True, nl=False)
            self._status_shown = False
            self._status_at = 0.0

    def end(self) -> None:
        """Leave the cursor on an empty line."""
        self._clear_status()

    @staticmethod
    def output_dropped(lines: int) -> str:
        """Return the line that replaces ``lines`` lines that came too fast to be printed."""
        said = f"{fmt.plural(lines, 'line')} {'was' if lines == 1 else 'were'} not printed"
        return f"{said}, because they came too fast for this output; the capture has every record"


class JsonView:
    """A view that prints one JSON object per line on stdout, and nothing else there."""

    def __init__(self, session: Session, *, print_block: bool) -> None:
        self._session = session
        self._print_block = print_block
        self._lost: dict[str, int] = {}
        self._reported_ns: dict[str, int] = {}
        self._lost_at = -math.inf
        self.block = BlockFigures()
        self.unprinted = 0

    def begin(self, what: str, capture: Path) -> None:
        """Print that tracing has begun, with the target, the capture and the probes."""
        start = self._session.start
        when = arrow.iso_time(start["mono_ns"] + start["utc_offset_ns"])
        source = self._session.source
        how = {"probes": source.probes, "block_probe": source.block_probe}
        self.write({"event": "started", "time": when, "capture": str(capture), "traced": what, **how})

    def batch(self, batch: Batch) -> None:
        """Print resets, recoveries and names of workloads, and block requests if ``print_block`` is set."""
        if batch.event == "block_io":
            self.block.add(batch)
        if batch.event in ("cwnd_reset", "cwnd_recovery", "workloads") or (
            batch.event == "block_io" and self._print_block
        ):
            self.unprinted += _print_rows(self, batch, self.write)

    def tick(self, waiting: str, *, last: bool = False) -> None:  # noqa: ARG002
        """Print new losses, every ten seconds at most and at the end (``last``)."""
        now = time.monotonic()
        if not last and now - self._lost_at < _LOST_EVERY_S:
            return
        tally = self._session.tally
        for event, lost in tally.lost.items():
            more = lost - self._lost.get(event, 0)
            if more <= 0:
                continue
            self._lost[event], self._lost_at = lost, now
            reported = self._reported_ns.get(event, 0)
            losses = [loss for loss in tally.lossy if loss.event == event and loss.end_ns > reported]
            # A loss that continues is one span in the capture. Here each line holds what was added since the last.
            start, end = max(losses[0].start_ns, reported), losses[-1].end_ns
            self._reported_ns[event] = end
            when = arrow.iso_time(end + self._session.clock.offset_ns)
            self.write({"event": "lost", "time": when, "of": event, "start_ns": start, "end_ns": end, "lost": more})

    @staticmethod
    def write(row: dict[str, Any]) -> None:
        """Print one object."""
        click.echo(fmt.json_line(row))

    def end(self) -> None:
        """Do nothing: there is no status line."""

    @staticmethod
    def output_dropped(lines: int) -> str:
        """Return the object that replaces ``lines`` lines that came too fast to be printed."""
        return fmt.json_line({"event": "output_dropped", "lines": lines})


def _print_rows(view: TextView | JsonView, batch: Batch, line: Callable[[dict[str, Any]], None]) -> int:
    """Print a line for each record of a batch, or for the first ones and how many are left. Returns that number."""
    for row in batch.head(_PRINTED).to_dicts():
        line(row)
    left = max(0, len(batch) - _PRINTED)
    if left:
        click.echo(view.output_dropped(left))
    return left
