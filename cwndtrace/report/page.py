# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML file with its pictures and styles inside, for light and dark screens and for print.

``shell`` says what keeps texts from outside from doing harm.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from io import BytesIO
from typing import Any, Final

import cwndtrace.plot  # noqa: F401  # first, because it decides which settings matplotlib reads

# isort: split

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from cwndtrace import format as fmt
from cwndtrace.errors import making_sense
from cwndtrace.plot import style
from cwndtrace.plot.heat import heat
from cwndtrace.plot.timeline import timeline
from cwndtrace.present import ahead as ahead_in_words
from cwndtrace.present import groups as groups_in_words
from cwndtrace.present import idle
from cwndtrace.present import text as in_words
from cwndtrace.report import shell
from cwndtrace.report.content import Report, records

GROUPS: Final = 100
"""The most rows in the table of groups of connections."""
CONNECTIONS: Final = 200
"""The most rows in the table of connections."""
CHAINS: Final = 20
"""The most chains of resets that are listed."""
TIMELINES: Final = 6
"""The most connections with a timeline: those that lost most, or else those with most resets."""
_RESETS: Final = 8
_PROCESSES: Final = 20
_AHEAD: Final = 20
# Above this number of dots, a bitmap inside the SVG is smaller than the dots as paths.
_DOTS: Final = 1000


@making_sense()
def page(report: Report) -> str:
    """Return the HTML of a report."""
    filters: dict[str, Callable[..., Any]] = {
        "times": lambda ratio: f"{ratio:.1f}" if ratio is not None else "",
        "ends": fmt.connection,
        "process": fmt.holder,
        "named": lambda row: [*groups_in_words.names(row).values()],
        "judged": groups_in_words.verdict,
        "cause": groups_in_words.cause,
        "left_out": lambda rest: groups_in_words.more(rest, groups_in_words.NOUNS[report.by]),
        "words": lambda label: in_words.LABELS[label],
        "chained": in_words.chain,
        "cost": in_words.cost,
        "explained": in_words.reset,
        "because": idle.because,
        "moment": lambda time: f"{time:%H:%M:%S.%f} UTC",
    }
    rows = records(report.connections.head(CONNECTIONS))
    groups = records(report.groups.head(GROUPS)) if report.grouped else []
    worst = report.connections[report.connections["connection"].isin([row["worst"] for row in groups])]
    return shell.render(
        shell.environment(filters),
        "page.html.j2",
        report=report,
        title=report.trace.path.name,
        facts=dict(report.trace.facts()),
        groups=groups,
        heads={name: title for name, title in groups_in_words.HEADS.items() if name in report.groups},
        grouped_by=groups_in_words.TITLES.get(report.by, ""),
        by_key={row["connection"]: row for row in records(worst)},
        single="" if report.grouped else groups_in_words.single(report.groups),
        connections=rows,
        remedies=records(report.remedies),
        coming={
            "Will be reset at their next burst, as of the last snapshot": ahead_in_words.due(report.due, _AHEAD),
            "Messages slower than the RTO": ahead_in_words.beats(report.heartbeats, _AHEAD),
        },
        causes=records(report.causes),
        devices=records(report.devices),
        processes=records(report.processes.head(_PROCESSES)),
        owners=records(report.owners[report.owners["owner"] != ""].head(_PROCESSES)),
        audit=records(report.audit),
        chains=records(report.chains.head(CHAINS)),
        timelines=_timelines(report, rows),
        heat=_heat(report) if len(report.devices) else None,
    )


def _timelines(report: Report, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the content of the timeline sections, by connection key."""
    trace, shown = report.trace, {}
    for number, row in enumerate([row for row in rows if row["resets"]][:TIMELINES]):
        key = row["connection"]
        mine = report.resets[report.resets["connection"] == key]

        def draw(key: str = key) -> Figure:
            return timeline(
                trace.resets,
                trace.connections,
                trace.block_io,
                about=trace.about,
                samples=trace.samples,
                connection=key,
                span=_seen(report, key),
            )

        worst = mine.sort_values("lost_us", ascending=False, kind="stable").head(_RESETS).sort_values("ts_ns")
        shown[key] = {"id": number, "row": row, "picture": _pair(draw), "resets": worst.to_dict("records")}
    return shown


def _seen(report: Report, key: str) -> tuple[float, float]:
    """Return when a connection was watched, including the idle time before its first reset, in s since the start."""
    trace, mine = report.trace, report.resets[report.resets["connection"] == key]
    stamps = pd.concat([mine["ts_ns"], trace.connections.loc[trace.connections["connection"] == key, "ts_ns"]])
    begin = min(int(stamps.min()), int((mine["ts_ns"].astype("int64") - mine["idle_us"].astype("int64") * 1000).min()))
    span = (begin - trace.started_ns) / 1e9, (int(stamps.max()) - trace.started_ns) / 1e9
    margin = max(0.02 * (span[1] - span[0]), 0.1)
    return span[0] - margin, span[1] + margin


def _heat(report: Report) -> dict[str, str]:
    trace = report.trace
    cells, start = trace.block_heat_map(), trace.started_ns
    return _pair(lambda: heat(cells, zero_ns=start, about=trace.about))


def _pair(draw: Callable[[], Figure]) -> dict[str, str]:
    """Return a picture for light and one for dark screens, as data URLs."""
    pair = {}
    for name in ("light", "dark"):
        with style.use(dark=name == "dark"):
            pair[name] = _svg(draw())
    return pair


def _svg(figure: Figure) -> str:
    for dots in figure.findobj(PathCollection):
        dots.set_rasterized(np.size(dots.get_offsets()) > 2 * _DOTS)
    file = BytesIO()
    # A fixed salt and no date make the page the same each time for one capture.
    with mpl.rc_context({"svg.hashsalt": "cwndtrace"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
