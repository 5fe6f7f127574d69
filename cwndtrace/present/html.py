# SPDX-License-Identifier: Apache-2.0
"""Verdicts and facts as HTML, which Jupyter shows."""

from __future__ import annotations

import html

from cwndtrace.format import clean


def verdict(label: str, text: str, *, harmful: bool, known: bool) -> str:
    """Return a verdict and its evidence as a block of HTML."""
    colour = "#c04a00" if harmful else "#00805a" if known else "#6a6a6a"
    return (
        f"<div><b style='color:{colour}'>{html.escape(clean(label))}</b><br><bdi>{html.escape(clean(text))}</bdi></div>"
    )


def facts(kind: str, title: str, rows: list[tuple[str, str]], note: str = "") -> str:
    """Return a table of (name, value) pairs with a caption; every text is clean already."""
    left = "style='text-align:left'"
    cells = "".join(
        f"<tr><th {left}>{html.escape(name)}</th><td {left}>{html.escape(value)}</td></tr>" for name, value in rows
    )
    caption = f"<b>{kind}</b> <code>{html.escape(title)}</code>{html.escape(note)}"
    return f"<div>{caption}<table>{cells}</table></div>"
