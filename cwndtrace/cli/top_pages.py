# SPDX-License-Identifier: Apache-2.0
"""The tables of ``top``: which rows each has, and how they are ordered, found and written."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from cwndtrace import format as fmt
from cwndtrace.cli.table import Column, cut_connection, cut_middle, cut_process, cut_service
from cwndtrace.format import clean
from cwndtrace.records.arrow import iso_time
from cwndtrace.top.devices import OneDevice
from cwndtrace.top.history import BARS, PLAIN_BARS, plot, spark
from cwndtrace.top.model import Model, Watched

STATUS: Final = {
    "running": "running",
    "complete": "the trace is complete",
    "interrupted": "the trace was cut short: its process is gone",
    "failed": "the trace failed",
    "gone": "the capture was deleted: this is what it held",
}
"""What is said of a capture's status."""


_PLOTTED_NS: Final = 300_000_000_000
"""The longest time that is plotted, in ns."""


@dataclass(frozen=True)
class Now:
    """A model, and the time for which it is shown (ns of CLOCK_MONOTONIC); ``bars`` are the characters of bars."""

    model: Model
    ns: int
    bars: str = BARS


@dataclass(frozen=True)
class Figure:
    """A column of a page: its layout, its width where there is room, its text, and what it is ordered by.

    Numbers begin with the largest, texts with the first.
    """

    column: Column
    width: int
    text: Callable[[Now, Any], str]
    order: Callable[[Now, Any], Any]

    @property
    def largest_first(self) -> bool:
        """True for numbers."""
        return self.column.right


@dataclass(frozen=True)
class Page:
    """A table of ``top``. ``words`` are the texts of a row that a filter looks at."""

    title: str
    figures: tuple[Figure, ...]
    rows: Callable[[Model], Iterable[Any]]
    words: Callable[[Now, Any], Iterable[str]]
    first_order: int
    connection: Callable[[Any], Watched | None] = lambda _: None

    def columns(self) -> list[Column]:
        """Return the columns, for a FittedTable."""
        return [figure.column for figure in self.figures]

    def texts(self, now: Now, row: Any) -> list[str]:
        """Return the texts of a row, which are safe to print to a terminal."""
        return [clean(figure.text(now, row)) for figure in self.figures]


@dataclass
class Shown:
    """What of a page is shown, and in which order: the index of a column, and whether it is turned round."""

    page: Page
    order: int = -1
    turned: bool = False
    filter: str = ""
    _kept: tuple[Any, list[Any]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.order < 0:
            self.order = self.page.first_order

    def rows(self, now: Now) -> list[Any]:
        """Return the rows in order. They are ordered again only where something has changed."""
        state = (now.model.version, now.model.names.version, self.order, self.turned, self.filter)
        if self._kept is None or self._kept[0] != state:
            figure, wanted = self.page.figures[self.order], self.filter.casefold()
            rows = list(self.page.rows(now.model))
            if wanted:
                rows = [row for row in rows if any(wanted in word.casefold() for word in self.page.words(now, row))]
            rows.sort(key=lambda row: figure.order(now, row), reverse=figure.largest_first != self.turned)
            self._kept = state, rows
        return self._kept[1]


def bars() -> str:
    """Return the characters of bars that stdout can print."""
    return BARS if (sys.stdout.encoding or "").lower().startswith("utf") else PLAIN_BARS


def headline(now: Now, status: str, name: str) -> str:
    """Return one line on the whole: the capture, its status, and sums."""
    model = now.model
    begin = model.about.begin.mono_ns if model.about.begin else now.ns
    lasted = max(now.ns - begin, 0) / 1e9
    parts = [
        f"{clean(name)}: {STATUS[status]}, {_lasted(lasted)}",
        fmt.plural(model.resets, "reset"),
        f"cost {fmt.span(model.cost_us)} (measured)",
    ]
    lost = sum(count.lost for count in (model.about.counts or {}).values()) + sum(model.about.unwritten.values())
    if lost:
        parts.append(fmt.lost(lost, "record"))
    parts.append(f"{sum(map(model.is_open, model.connections)):,} open")
    if model.left_out:
        parts.append(f"{fmt.plural(model.left_out, 'connection')} left out")
    return "; ".join(parts)


def window(now: Now, one: Watched, size: tuple[int, int]) -> list[str]:
    """Return a head and the plot of a connection's window over the last minutes, in ``size`` (columns, rows)."""
    times, windows = now.model.history.of(one.cookie, one.skaddr)
    recent = times > now.ns - _PLOTTED_NS
    head = (
        f"{_ends(one)}  {_process(now, one)}  {fmt.plural(one.resets, 'reset')}, cost {_cost(one.cost_us, one.costs)}"
    )
    if not recent.any():
        return [clean(head), "No window of it was seen in the last minutes."]
    times, windows = times[recent], windows[recent]
    label = max(len(str(windows.max())), len("segments")) + 1
    begin = int(times[0])
    lines = plot(times, windows, (begin, now.ns), (size[0] - label, size[1] - 1), now.bars)
    marks = {0: str(windows.max()), len(lines) // 2: str(round(windows.max() / 2)), len(lines) - 1: "0", 1: "segments"}
    rows = [f"{marks.get(number, ''):>{label - 1}} {line}" for number, line in enumerate(lines)]
    ago = f"{(now.ns - begin) / 1e9:,.0f} s ago"
    now_text = "now" if now.ns - begin else ""
    axis = " " * label + ago + " " * max(size[0] - label - len(ago) - len(now_text), 1) + now_text
    return [clean(head), *rows, axis]


def _lasted(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {second:02} s"


def now_ns(model: Model, status: str) -> int:
    """Return the time for which a model is shown: that of a running trace, or the end of another one."""
    if status == "running":
        return time.monotonic_ns()
    return model.about.end.mono_ns if model.about.end else model.newest_ns


def _cost(cost_us: float, measured: int) -> str:
    return fmt.span(cost_us) if measured else "-"


def _ends(one: Watched) -> str:
    _, saddr, sport, daddr, dport = one.ends
    return fmt.connection({"saddr": saddr, "sport": sport, "daddr": daddr, "dport": dport})


def _process(now: Now, one: Watched) -> str:
    return fmt.process(now.model.process(one), one.pid)


_CONNECTION: Final = Column("CONNECTION", least=41, shorten=cut_connection)
_PROCESS: Final = Column("PROCESS", 2, least=10, shorten=cut_process)
_WORKLOAD: Final = Column("WORKLOAD", 3, least=14, shorten=cut_middle)


def _state(now: Now, one: Watched) -> str:
    return one.state if now.model.is_open(one) else "closed"


CONNECTIONS: Final = Page(
    "Connections",
    (
        Figure(_CONNECTION, 41, lambda _, c: _ends(c), lambda _, c: _ends(c)),
        Figure(_PROCESS, 20, _process, lambda n, c: (n.model.process(c), c.pid)),
        Figure(_WORKLOAD, 24, lambda n, c: n.model.workload(c) or "-", lambda n, c: n.model.workload(c)),
        Figure(Column("SERVICE", 6, least=10, shorten=cut_service), 16, lambda _, c: c.service or "-",
               lambda _, c: c.service),
        Figure(Column("STATE", 9), 10, _state, _state),
        Figure(Column("CWND (segments)", 8, right=True), 15, lambda _, c: str(c.cwnd), lambda _, c: c.cwnd),
        Figure(Column("RTT", 7, right=True), 7, lambda _, c: fmt.span(c.srtt_us) if c.srtt_us else "-",
               lambda _, c: c.srtt_us),
        Figure(Column("LONGEST IDLE", 4, right=True), 12,
               lambda _, c: fmt.span(c.idle_longest_us) if c.idle_longest_us else "-",
               lambda _, c: c.idle_longest_us),
        Figure(Column("RESETS", right=True), 6, lambda _, c: f"{c.resets:,}", lambda _, c: (c.resets, c.cost_us)),
        Figure(Column("COST", right=True), 8, lambda _, c: _cost(c.cost_us, c.costs),
               lambda _, c: (c.cost_us, c.resets)),
    ),
    lambda model: model.connections,
    lambda n, c: (_ends(c), n.model.process(c), n.model.workload(c), c.service, c.ca_name),
    9,
    connection=lambda c: c,
)  # fmt: skip

WORKLOADS: Final = Page(
    "Workloads",
    (
        Figure(Column("WORKLOAD", least=20, shorten=cut_middle), 40, lambda _, w: w[0] or "(unknown)",
               lambda _, w: w[0]),
        Figure(Column("OPEN", 4, right=True), 7, lambda _, w: f"{w[1].open:,}", lambda _, w: w[1].open),
        Figure(Column("CONNECTIONS", 3, right=True), 11, lambda _, w: f"{w[1].connections:,}",
               lambda _, w: w[1].connections),
        Figure(Column("RESETS", right=True), 7, lambda _, w: f"{w[1].resets:,}", lambda _, w: w[1].resets),
        Figure(Column("COST", right=True), 8, lambda _, w: _cost(w[1].cost_us, w[1].costs),
               lambda _, w: (w[1].cost_us, w[1].resets, w[1].open)),
        Figure(Column("WORST CONNECTION", 5, least=41, shorten=cut_connection), 41,
               lambda _, w: _ends(w[1].worst) if w[1].worst else "-",
               lambda _, w: _ends(w[1].worst) if w[1].worst else ""),
    ),
    lambda model: model.workloads().items(),
    lambda _, w: (w[0],),
    4,
    connection=lambda w: w[1].worst,
)  # fmt: skip

_Device = tuple[tuple[str, str], OneDevice]


def _percentile(percent: int) -> Callable[[Now, _Device], str]:
    return lambda _, d: fmt.span(d[1].latency.percentile(percent))


DEVICES: Final = Page(
    "Devices",
    (
        Figure(Column("DEVICE", least=8), 12, lambda n, d: n.model.devices.name(d[0][0]),
               lambda n, d: n.model.devices.name(d[0][0])),
        Figure(Column("OP"), 8, lambda _, d: d[0][1], lambda _, d: d[0][1]),
        Figure(Column("REQUESTS", 5, right=True), 11, lambda _, d: f"{d[1].latency.count:,}",
               lambda _, d: d[1].latency.count),
        Figure(Column("NOW", right=True), 8, lambda n, d: f"{d[1].rates(n.ns)[0]:,.0f}/s",
               lambda n, d: d[1].rates(n.ns)[0]),
        Figure(Column("BYTES NOW", 6, right=True), 10, lambda n, d: f"{fmt.size(d[1].rates(n.ns)[1])}/s",
               lambda n, d: d[1].rates(n.ns)[1]),
        Figure(Column("P50", 4, right=True), 7, _percentile(50), lambda _, d: d[1].latency.percentile(50)),
        Figure(Column("P99", right=True), 7, _percentile(99), lambda _, d: d[1].latency.percentile(99)),
        Figure(Column("MAX", right=True), 7, lambda _, d: fmt.span(d[1].latency.max_us),
               lambda _, d: d[1].latency.max_us),
        Figure(Column("ERRORS", 3, right=True), 6, lambda _, d: f"{d[1].errors:,}", lambda _, d: d[1].errors),
        Figure(Column("SLOWEST PER SECOND", least=20, shorten=lambda text, most: text[-most:]), 60,
               lambda n, d: spark(d[1].worst(n.ns), n.bars), lambda n, d: -max(d[1].worst(n.ns))),
    ),
    lambda model: model.devices.by_pair.items(),
    lambda n, d: (n.model.devices.name(d[0][0]), d[0][1]),
    2,
)  # fmt: skip


RESETS: Final = Page(
    "Resets",
    (
        Figure(Column("UTC", least=8, right=True, shorten=lambda text, _: text[:8]), 12,
               lambda _, f: iso_time(f.row["utc_ns"])[11:23],
               lambda _, f: f.row["ts_ns"]),
        Figure(Column("REASON", least=8), 11, lambda _, f: f.row["label"], lambda _, f: f.row["label"]),
        Figure(Column("PROCESS", 2, least=10, shorten=cut_process), 20, lambda n, f: _process(n, f.of),
               lambda n, f: (n.model.process(f.of), f.of.pid)),
        Figure(Column("WORKLOAD", 6, least=14, shorten=cut_middle), 24, lambda n, f: n.model.workload(f.of) or "-",
               lambda n, f: n.model.workload(f.of)),
        Figure(_CONNECTION, 41, lambda _, f: _ends(f.of), lambda _, f: _ends(f.of)),
        Figure(Column("IDLE", 1, right=True), 8, lambda _, f: fmt.span(f.row["idle_us"]),
               lambda _, f: f.row["idle_us"]),
        Figure(Column("RTO", 3, right=True), 8, lambda _, f: fmt.span(f.row["rto_us"]), lambda _, f: f.row["rto_us"]),
        Figure(Column("CWND (segments)", right=True), 15,
               lambda _, f: f"{f.row['cwnd_before']} -> {f.row['cwnd_after']}", lambda _, f: f.row["cwnd_before"]),
    ),
    lambda model: model.falls,
    lambda n, f: (_ends(f.of), n.model.process(f.of), n.model.workload(f.of), f.row["label"]),
    0,
    connection=lambda f: f.of,
)  # fmt: skip

PAGES: Final = {"connections": CONNECTIONS, "workloads": WORKLOADS, "devices": DEVICES, "resets": RESETS}
"""The pages by the names of --page."""
