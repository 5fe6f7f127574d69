# SPDX-License-Identifier: Apache-2.0
"""The rows of a capture on their way to what ``top`` shows, and one page of that as plain lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa

from cwndtrace.cli.table import FittedTable, cut, prose, room
from cwndtrace.cli.top_pages import PAGES, Now, Shown, bars, headline, now_ns
from cwndtrace.format import clean
from cwndtrace.store.follow import Follower
from cwndtrace.top.model import WANTED, Model

BUDGET_S: Final = 0.3
"""The time that reading may take before what has been read is shown, in seconds."""


class Feed:
    """A capture that is followed, and the model of it.

    ``said`` has the last lines that the trace printed, if this command runs it. Raises CaptureError where ``path``
    isn't a capture.
    """

    def __init__(self, path: Path, said: Sequence[str] = ()) -> None:
        self.follower = Follower(path, WANTED, newest=frozenset({"connections"}))
        self.model = Model(self.follower.about)
        self.said = said
        self.name = path.name or str(path)

    def rows(self) -> list[tuple[str, pa.Table]]:
        """Return new rows by table, for ``add``. Another thread may call this, as it doesn't touch the model."""
        return list(self.follower.new_rows(BUDGET_S))

    def add(self, rows: list[tuple[str, pa.Table]]) -> None:
        """Add rows to the model."""
        self.model.describe(self.follower.about)
        for name, table in rows:
            self.model.add(name, table)

    def read(self) -> None:
        """Read new rows into the model."""
        self.add(self.rows())

    def now(self, characters: str) -> Now:
        """Return what is to be shown now, with these characters for bars."""
        return Now(self.model, now_ns(self.model, self.follower.status), characters)

    def headline(self, now: Now) -> str:
        """Return one line on the whole."""
        behind = "; still reading what is there" if self.follower.behind else ""
        return headline(now, self.follower.status, self.name) + behind

    def warning(self) -> str:
        """Return the last thing that went wrong; empty where all is well."""
        lines = [*self.follower.warnings, *self.said, *self.model.about.lacking[:1]]
        return clean(lines[0]) if lines else ""


def layout(page: str, width: int | None) -> FittedTable:
    """Return the layout of a page for a terminal of this width; None for a pipe."""
    figures = PAGES[page].figures
    # The title of the column that orders the rows has a mark behind it.
    widths = [max(figure.width, len(figure.column.title) + 1) for figure in figures]
    return FittedTable(PAGES[page].columns(), widths, width)


def lines(feed: Feed, page: str, most: int) -> Iterator[str]:
    """Yield a page as plain lines, with at most ``most`` rows."""
    width = room()
    now = feed.now(bars())
    fitted = layout(page, width)
    yield from prose(feed.headline(now), width, indent=2)
    if warning := feed.warning():
        yield from prose(f"warning: {warning}", width, indent=2)
    yield fitted.line([column.title for column in PAGES[page].columns()])
    rows = Shown(PAGES[page]).rows(now)
    for row in rows[:most]:
        yield fitted.line(PAGES[page].texts(now, row))
    if len(rows) > most:
        yield cut(f"and {len(rows) - most:,} more", width or 80)
