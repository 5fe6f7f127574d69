# SPDX-License-Identifier: Apache-2.0
"""The conclusion from two captures in words: whether a change between them cured the idle resets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from cwndtrace import format as fmt
from cwndtrace import tcp
from cwndtrace.analysis.cured import Affected, Change, Evidence, Finding, Side
from cwndtrace.format import plural, span
from cwndtrace.present import html

LABELS: Final = {"cured": "Cured", "not_cured": "Not cured", "unknown": "Can't tell"}
"""The conclusions, with the words that begin their texts."""

_NAMED: Final = 3  # the most programs and changes that a sentence names


@dataclass(frozen=True)
class Conclusion:
    """Whether a change cured the idle resets: one of ``LABELS`` as ``verdict``, and why as ``text``.

    ``changes`` are the settings that differ between the captures. ``before`` and ``after`` are what the captures show
    of the programs whose resets cost time in the first one; without such a program, of all that is in the first one.
    """

    verdict: str
    text: str
    changes: tuple[Change, ...]
    before: Side
    after: Side

    def __str__(self) -> str:
        return fmt.clean(f"{LABELS[self.verdict]}: {self.text}")

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html.verdict(
            LABELS[self.verdict], self.text, harmful=self.verdict == "not_cured", known=self.verdict != "unknown"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, for JSON; spans are in us."""
        return asdict(self)


def conclude(finding: Finding, before: Evidence, after: Evidence) -> Conclusion:
    """Return the conclusion from what ``analysis.cured.compared`` found in two captures."""
    programs = finding.programs
    changes = tuple(dict.fromkeys(change for program in programs for change in program.changes))
    sides = (sum((p.before for p in programs), Side()), sum((p.after for p in programs), Side()))
    if not programs:
        sides = finding.whole, finding.others
    verdict, text = _verdict(finding, before, after)
    known = verdict != "unknown"
    text = f"before, {_cost(sides[0])}; after, {text}." if known else f"{text}."
    if changes:
        text += f" What changed: {_changed(changes)}."
    elif known:
        text += " No setting that the captures hold has changed."
    if programs and finding.others.costly:
        text += f" Other programs had resets that cost time in the second capture: {_cost(finding.others)}."
    return Conclusion(verdict, text, changes, *sides)


def _verdict(finding: Finding, before: Evidence, after: Evidence) -> tuple[str, str]:
    """Return the verdict, and what the second capture shows or why it can't be told."""
    programs = finding.programs
    if before.about.host != after.about.host:
        return "unknown", "the captures are of different hosts"
    if not programs:
        return "unknown", _nothing_to_cure(finding.whole, before)
    if ill := [program for program in programs if program.outcome == "not_cured"]:
        return "not_cured", _still(ill)
    if after.gaps:
        return "unknown", f"the second capture isn't whole: {after.gaps[0]}"
    if unsure := [program for program in programs if program.outcome != "cured"]:
        more = f" (and {plural(len(unsure) - 1, 'more program')})" if len(unsure) > 1 else ""
        return "unknown", _unsure(unsure[0]) + more
    return "cured", _cured(sum((program.after for program in programs), Side()))


def _nothing_to_cure(whole: Side, before: Evidence) -> str:
    if before.gaps:
        return f"the first capture isn't whole: {before.gaps[0]}"
    if whole.unknown:
        return f"the first capture doesn't show what {_resets(whole.unknown)} cost"
    if whole.resets:
        return f"none of the first capture's {_resets(whole.resets)} cost time, so there was nothing to cure"
    return "the first capture has no idle reset, so there was nothing to cure"


def _unsure(program: Affected) -> str:
    name, after = program.name, program.after
    if program.outcome == "unknown_cost":
        return f"the second capture doesn't show what {_resets(after.unknown)} of {name} cost"
    if program.outcome == "smaller_bursts":
        return (
            f"{_resets(after.resets)} of {name} in the second capture cost nothing, and too few of them came before "
            "bursts as large as those that had cost time"
        )
    if program.outcome == "unexplained":
        return (
            f"{_periods(after)} of {name} in the second capture ended without a reset, and no setting that the "
            "captures hold explains it"
        )
    return (
        f"the second capture shows no idle period of {name} longer than its RTO that ended in a burst, with a window "
        "above the initial one; trace for longer, or under the load of the first capture"
    )


def _cost(side: Side, of: str = "") -> str:
    return f"{side.costly:,} of {_resets(side.resets)}{of} cost {span(side.lost_us)} in all (measured)"


def _still(ill: list[Affected]) -> str:
    side = sum((program.after for program in ill), Side())
    names = _some(list(dict.fromkeys(program.name for program in ill)))
    on = sorted({name for program in ill for name in program.still_on})
    still = f"; {tcp.IDLE_SYSCTL} was 1 in namespace {_some(on)} when the second capture began" if on else ""
    quiet = f", and {_periods(side)} ended without one" if side.quiet else ""
    return f"{_cost(side, f' of {names}')}{quiet}{still}"


def _cured(side: Side) -> str:
    resets = f"{_resets(side.resets)} cost nothing" if side.resets else "there was no idle reset"
    quiet = f", and {_periods(side)} ended without one" if side.quiet else ""
    return f"{resets}{quiet}"


def _changed(changes: tuple[Change, ...]) -> str:
    texts = [f"{c.setting} was {c.before} before and {c.after} after {c.where}" for c in changes]
    more = [f"{len(texts) - _NAMED:,} more"] if len(texts) > _NAMED else []
    return "; ".join(texts[:_NAMED] + more)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _resets(number: int) -> str:
    return plural(number, "idle reset")


def _periods(side: Side) -> str:
    return f"at least {plural(side.quiet, 'idle period')} longer than the RTO"
