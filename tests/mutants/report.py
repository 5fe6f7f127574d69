# SPDX-License-Identifier: Apache-2.0
"""The table of mutants in docs/testing.md, and the reasons of those that stay, in survivors.toml."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

PAGE: Final = Path("docs/testing.md")
REASONS: Final = Path("tests/mutants/survivors.toml")
BEGIN: Final = "<!-- make mutants writes this table -->"
END: Final = "<!-- end of the table -->"
_HEAD: Final = (
    "| package | mutants | tried | equivalent | noticed | share (95 % interval) | stay with a reason |\n"
    "|---|---|---|---|---|---|---|\n"
)
_Z: Final = 1.96
"""Standard deviations on each side of the mean that hold 95 % of a normal distribution."""


@dataclass
class Reasons:
    """Why mutants stay. ``equivalent`` ones change nothing that anybody could see, ``accepted`` ones do.

    A key is a mutant's name, or a module and a function with " *" after it for all mutants of that function.
    """

    equivalent: dict[str, str] = field(default_factory=dict)
    accepted: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def load() -> Reasons:
        """Read survivors.toml."""
        return Reasons(**tomllib.loads(REASONS.read_text(encoding="utf-8")))

    def stale(self, names: set[str]) -> list[str]:
        """Return the keys that none of the names has."""
        keys = names | {f"{name.split(': ', 1)[0]} *" for name in names}
        return sorted((self.equivalent.keys() | self.accepted.keys()) - keys)


def reason(reasons: dict[str, str], name: str) -> str | None:
    """Return the reason of a mutant, or of its whole function."""
    return reasons.get(name) or reasons.get(f"{name.split(': ', 1)[0]} *")


def interval(noticed: int, tried: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, in percent. It holds for small samples too."""
    if not tried:
        return 0.0, 100.0
    share, z2 = noticed / tried, _Z * _Z / tried
    middle = share + z2 / 2
    half = _Z * math.sqrt(share * (1 - share) / tried + z2 / tried / 4)
    return 100 * max(0.0, middle - half) / (1 + z2), 100 * min(1 + z2, middle + half) / (1 + z2)


def row(package: str, everything: int, outcomes: dict[str, str], reasons: Reasons) -> str:
    """Return a package's row. ``outcomes`` has those that were tried, by name."""
    noticed = sum(outcome == "noticed" for outcome in outcomes.values())
    stayed = [name for name, outcome in outcomes.items() if outcome != "noticed"]
    equivalent = sum(bool(reason(reasons.equivalent, name)) for name in stayed)
    argued = sum(bool(reason(reasons.accepted, name)) for name in stayed)
    could = len(outcomes) - equivalent
    low, high = interval(noticed, could)
    share = f"{100 * noticed / could:.0f} % ({low:.0f} to {high:.0f} %)" if could else "-"
    left = f"{argued} of {len(stayed) - equivalent}"
    return f"| {package} | {everything:,} | {len(outcomes):,} | {equivalent} | {noticed:,} | {share} | {left} |"


def update(rows: dict[str, str], order: tuple[str, ...], page: str) -> str:
    """Return a page with new rows. Rows of packages that weren't tried this time stay."""
    before, _, rest = page.partition(BEGIN)
    table, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{PAGE} lacks the lines between which the table is: {BEGIN} and {END}")
    kept = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| ")}
    lines = kept | rows
    body = "".join(f"{lines[package]}\n" for package in order if package in lines)
    return f"{before}{BEGIN}\n{_HEAD}{body}{END}{after}"
