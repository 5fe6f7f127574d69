# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML file with its pictures and styles inside, for light and dark screens and for print.

The page makes no outside request. All text goes through Jinja2's escaping and ``format.clean``. Its content security
policy allows only its own script and style, by their hashes, and pictures in data URLs.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from importlib import resources
from io import BytesIO
from typing import Any, Final

import cwndtrace.plot  # noqa: F401  # first, because it decides which settings matplotlib reads

# isort: split

import matplotlib as mpl
import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from cwndtrace import format as fmt
from cwndtrace.analysis.verdict import CANT_TELL
from cwndtrace.errors import making_sense
from cwndtrace.format import clean
from cwndtrace.plot import style
from cwndtrace.plot.heat import heat
from cwndtrace.plot.timeline import timeline
from cwndtrace.present import ahead as ahead_in_words
from cwndtrace.present import idle
from cwndtrace.present import text as in_words
from cwndtrace.report.content import Report, records

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
    files = {name: _file(f"page.{name}") for name in ("css", "js", "html.j2")}
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters |= {
        "clean": lambda text: clean(str(text)),
        "pair": lambda text: _unbroken(clean(text).replace(" > ", "\u00a0> ")),
        "prose": lambda text: _unbroken(fmt.unbroken(clean(str(text)))),
        "counted": fmt.plural,
        "span": lambda us: fmt.span(us) if us is not None else "unknown",
        "size": fmt.size,
        "times": lambda ratio: f"{ratio:.1f}" if ratio is not None else "",
        "ends": fmt.connection,
        "process": lambda row: fmt.process(row["comm"], row["pid"]),
        "words": lambda label: in_words.LABELS[label],
        "colour": lambda label: "bad" if label == "harmful" else "open" if label in CANT_TELL else "good",
        "chained": in_words.chain,
        "cost": in_words.cost,
        "explained": in_words.reset,
        "because": idle.because,
        "moment": lambda time: f"{time:%H:%M:%S.%f} UTC",
    }
    rows = records(report.connections.head(CONNECTIONS))
    text: str = environment.from_string(files["html.j2"]).render(
        report=report,
        name=report.trace.path.name,
        facts=dict(report.trace.facts()),
        connections=rows,
        remedies=records(report.remedies),
        coming={
            "Will be reset at their next burst, as of the last snapshot": ahead_in_words.due(report.due, _AHEAD),
            "Messages slower than the RTO": ahead_in_words.beats(report.heartbeats, _AHEAD),
        },
        causes=records(report.causes),
        devices=records(report.devices),
        processes=records(report.processes.head(_PROCESSES)),
        audit=records(report.audit),
        chains=records(report.chains.head(CHAINS)),
        timelines=_timelines(report, rows),
        heat=_heat(report) if len(report.devices) else None,
        # These two are files of this package, so they need no escaping.
        style=Markup(files["css"]),  # noqa: S704
        script=Markup(files["js"]),  # noqa: S704
        style_hash=_hash(files["css"]),
        script_hash=_hash(files["js"]),
    )
    return text


def _unbroken(text: str) -> Markup:
    """Return HTML for a text, with no-break spaces as entities, because the character itself counts as unprintable."""
    return escape(text).replace("\u00a0", Markup("&nbsp;"))


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


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
