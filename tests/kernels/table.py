# SPDX-License-Identifier: Apache-2.0
"""The results of the checks on stock kernels, as the table of docs/kernels.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tests.kernels.stock import Stock

BEGIN: Final = "<!-- make kernels-test writes from here -->"
END: Final = "<!-- to here -->"
_HEAD: Final = ("kernel", "idle resets", "timeouts", "block I/O", "filters", "capture", "kill -9", "demo", "all of it")


@dataclass
class Outcome:
    """What came out of one kernel's checks; ``error`` says why there is nothing, or not all."""

    stock: Stock
    version: str = ""
    results: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""

    def failures(self) -> list[str]:
        """Return a line for each check that failed."""
        lines = [f"{r['check']}: {r['said']}" for r in self.results if not r["ok"]]
        return [*lines, *([self.error] if self.error else [])]

    def summary(self) -> str:
        """Return how many checks held."""
        return f"{sum(r['ok'] for r in self.results)} of {len(self.results)} held" + (
            f", {self.error}" if self.error else ""
        )


def short(said: str) -> str:
    """Return the first part of what a check found."""
    return re.split(r"[;,:]", " ".join(said.split()))[0].replace("|", "/").strip()


def cell(outcome: Outcome, *names: str) -> str:
    """Return the cell for a check; what failed is marked."""
    found = [r for r in outcome.results if r["check"] in names]
    if not found:
        return "-"
    return ", ".join(short(r["said"]) if r["ok"] else f"**failed**: {short(r['said'])}" for r in found)


def by_probe(outcome: Outcome, reason: str) -> str:
    """Return the cell with what each probe saw."""
    found = [r for r in outcome.results if r["check"].startswith(f"{reason} ")]
    cells = [f"{r['check'].partition(' ')[2]} {'' if r['ok'] else '**failed**: '}{short(r['said'])}" for r in found]
    return "<br>".join(cells) or "-"


def row(outcome: Outcome) -> list[str]:
    """Return the cells of a kernel."""
    stock = outcome.stock
    name = f"{outcome.version or stock.name} {stock.architecture}"
    if "cloud" in stock.package:
        name += " cloud"
    if not outcome.results:
        return [name, f"**{outcome.error}**", *[""] * (len(_HEAD) - 2)]
    ends = {
        name: "yes" if all(r["ok"] for r in outcome.results if r["check"] == name) else "**failed**"
        for name in ("kill -9", "demo")
        if any(r["check"].startswith(name) for r in outcome.results)
    }
    held = f"{sum(r['ok'] for r in outcome.results)} of {len(outcome.results)}, {outcome.seconds / 60:.0f} min"
    return [
        f"{name}, {stock.root}'s root",
        by_probe(outcome, "idle"),
        by_probe(outcome, "rto_loss"),
        cell(outcome, "block I/O", "block"),
        cell(outcome, "filters"),
        cell(outcome, "capture"),
        ends.get("kill -9", "-"),
        ends.get("demo", "-"),
        f"{held}{f'; {outcome.error}' if outcome.error else ''}",
    ]


def text(outcomes: Sequence[Outcome]) -> str:
    """Return the table in Markdown."""
    rows = [list(_HEAD), ["---"] * len(_HEAD), *(row(outcome) for outcome in outcomes)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def replaced(page: str, outcomes: Sequence[Outcome]) -> str:
    """Return a page with the table between its two markers. Raises ValueError if it has them not."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page must have {BEGIN} and {END}")
    before, _, after = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{text(outcomes)}\n\n{END}{after.partition(END)[2]}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text with columns of equal width."""
    widths = [max(len(cells[n]) for cells in rows) for n in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{text:<{width}}" for text, width in zip(cells, widths, strict=True)).rstrip() for cells in rows
    )
