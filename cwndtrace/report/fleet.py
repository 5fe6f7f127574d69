# SPDX-License-Identifier: Apache-2.0
"""The report of a fleet as one object for JSON, and as one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from itertools import groupby
from typing import Any, Final

import pandas as pd

from cwndtrace.fleet import change
from cwndtrace.fleet.summary import BY, FleetReport
from cwndtrace.format import plural
from cwndtrace.present import fleet as in_words
from cwndtrace.present import fleet_limits, text
from cwndtrace.present import groups as groups_in_words
from cwndtrace.report import shell
from cwndtrace.report.content import records

GROUPS: Final = 100
"""The most rows in each table of the page."""

SETTINGS: Final = "Settings that hosts of the same service don't share, or that aren't known"
"""The title of the list of settings."""

_FAILED: Final = 100


def caveats(found: FleetReport, most_failed: int) -> dict[str, list[str]]:
    """Return the lines that limit a report: ``missing`` on captures that couldn't be read, ``limits`` on the others."""
    clocks = {field.name: getattr(found.clocks, field.name) for field in fields(found.clocks)}
    return {
        "missing": fleet_limits.failed(found.captures, most_failed),
        "limits": [*fleet_limits.limits(found.captures), *fleet_limits.clocks(**clocks)],
    }


def settings(found: FleetReport) -> list[str]:
    """Return a sentence on each setting that differs between hosts of a service, or isn't known of all of them.

    Those that differ come first.
    """
    keys = [*BY["service"], "setting"]
    rows = found.settings.to_dict("records")
    same = [list(mine) for _, mine in groupby(rows, key=lambda row: [str(row[name]) for name in keys])]
    same.sort(key=lambda mine: sum(row["standing"] != "unknown" for row in mine) < 2)
    return [in_words.setting(mine) for mine in same]


def as_json(found: FleetReport) -> dict[str, Any]:
    """Return the report as one object for JSON: missing figures are null, times are ISO 8601 in UTC."""
    verdict, answer = in_words.answer(found.connections, found.captures)
    rows = found.connections
    totals: dict[str, Any] = {name: int(rows[name].sum()) for name in ("resets", "resets_harmful", "resets_unknown")}
    totals |= {name: float(rows[name].sum()) for name in ("lost_us", "predicted_us")}
    clocks = {field.name: _plain(getattr(found.clocks, field.name)) for field in fields(found.clocks)}
    return {
        "event": "fleet",
        "answer": {"verdict": verdict, "text": answer, "connections": len(found.connections), **totals},
        "caveats": [line for lines in caveats(found, len(found.captures)).values() for line in lines],
        "captures": _plain(found.captures),
        "grouped_by": found.by,
        **{f"by_{name}": records(frame) for name, frame in found.costs.items()},
        "settings": records(found.settings),
        "settings_in_words": settings(found),
        "clocks": clocks,
        "since": None if found.since is None else found.since.isoformat(),
        "change": None if found.change is None else _changes(found.change),
    }


def _changes(frame: pd.DataFrame) -> list[dict[str, Any]]:
    rows = records(frame)
    # The words are made of the frame's values, because those that are missing are null here.
    words = [in_words.changed(row, change.ENOUGH) for row in frame.to_dict("records")]
    return [row | {"text": said} for row, said in zip(rows, words, strict=True)]


def _plain(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return one dict per row as ``records`` does, with times as text."""
    moments = [name for name in frame if isinstance(frame[name].dtype, pd.DatetimeTZDtype)]
    as_text: dict[str, Any] = {
        str(name): [None if each is pd.NaT else each.isoformat() for each in frame[name]] for name in moments
    }
    return records(frame.assign(**as_text))


def page(found: FleetReport) -> str:
    """Return the HTML of a report."""
    verdict, answer = in_words.answer(found.connections, found.captures)
    filters: dict[str, Callable[..., Any]] = {
        "named": lambda row: [*in_words.names(row).values()],
        "judged": groups_in_words.verdict,
        "cost": text.cost,
        "rate": in_words.rate,
        "side_rate": in_words.side_rate,
        "worst_hosts": in_words.worst,
        "busy": in_words.busy,
        "busy_share": in_words.busy_share,
        "ratio": in_words.ratio,
        "interval": in_words.interval,
        "changed": lambda row: in_words.changed(row, change.ENOUGH),
    }
    groups = {name: frame.head(GROUPS).to_dict("records") for name, frame in found.costs.items()}
    changes = [] if found.change is None else found.change.head(GROUPS).to_dict("records")
    return shell.render(
        shell.environment(filters),
        "fleet.html.j2",
        title=f"a fleet of {plural(found.captures['host'].nunique(), 'host')}",
        verdict=verdict,
        answer=answer,
        caveats=caveats(found, _FAILED),
        groups=groups,
        more={
            name: groups_in_words.more(frame.iloc[GROUPS:], in_words.NOUNS[name]) if len(frame) > GROUPS else ""
            for name, frame in found.costs.items()
        },
        titles=in_words.TITLES,
        heads={name: [title for key, title in in_words.HEADS.items() if key in BY[name]] for name in BY},
        settings_title=SETTINGS,
        settings=settings(found)[:GROUPS],
        sides=[] if found.since is None else in_words.sides(found.captures, found.since),
        changes=changes,
        change_heads=[title for key, title in in_words.HEADS.items() if key in BY[found.by]],
        read=len(found.read),
    )
