# SPDX-License-Identifier: Apache-2.0
"""The conclusion from two captures says what both show, what changed, and what is lacking."""

from __future__ import annotations

import html
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from cwndtrace.analysis.cured import Affected, Change, Evidence, Finding, Side
from cwndtrace.present import compared
from tests.unit import frames

SYSCTL = "net.ipv4.tcp_slow_start_after_idle"
COSTLY = Side(resets=4, costly=3, lost_us=426_000.0)
BEFORE = "before, 3 of 4 idle resets cost 426 ms in all (measured); after, "
UNCHANGED = " No setting that the captures hold has changed."


def program(outcome: str, after: Side, name: str = "nginx", **values: Any) -> Affected:
    return Affected(name, outcome, COSTLY, after, **values)  # type: ignore[arg-type]


def change(number: int) -> Change:
    return Change(SYSCTL, f"in namespace {number}", "1", "0")


def evidence(gaps: tuple[str, ...] = (), **about: Any) -> Evidence:
    return Evidence(pd.DataFrame(), pd.DataFrame(), frames.about(**about), gaps)


def concluded(*programs: Affected, gaps: tuple[str, ...] = (), **values: Any) -> compared.Conclusion:
    """Return the conclusion where these programs had costly resets in a first capture that is whole."""
    finding = Finding(programs, **{"whole": Side()} | values)
    return compared.conclude(finding, evidence(), evidence(gaps=gaps))


@pytest.mark.parametrize(
    ("programs", "verdict", "text"),
    [
        ([program("cured", Side(quiet=3))], "cured", f"{BEFORE}there was no idle reset, and at least 3 idle periods "
         f"longer than the RTO ended without one.{UNCHANGED}"),
        ([program("cured", Side(resets=1))], "cured", f"{BEFORE}1 idle reset cost nothing.{UNCHANGED}"),
        ([program("cured", Side(resets=1, quiet=1)), program("cured", Side(resets=1), "redis")], "cured",
         "before, 6 of 8 idle resets cost 852 ms in all (measured); after, 2 idle resets cost nothing, and at least 1 "
         f"idle period longer than the RTO ended without one.{UNCHANGED}"),
        ([program("not_cured", COSTLY)], "not_cured",
         f"{BEFORE}3 of 4 idle resets of nginx cost 426 ms in all (measured).{UNCHANGED}"),
        ([program("not_cured", replace(COSTLY, quiet=2), still_on=("4026531840",)), program("cured", Side(quiet=1))],
         "not_cured", "before, 6 of 8 idle resets cost 852 ms in all (measured); after, 3 of 4 idle resets of nginx "
         "cost 426 ms in all (measured), and at least 2 idle periods longer than the RTO ended without one; "
         f"{SYSCTL} was 1 in namespace 4026531840 when the second capture began.{UNCHANGED}"),
        ([program("not_cured", Side(1, 1, 0, 5.0), name) for name in ("a", "b", "c", "d", "a")], "not_cured",
         "before, 15 of 20 idle resets cost 2.13 s in all (measured); after, 5 of 5 idle resets of a, b, c and 1 more "
         f"cost 25 us in all (measured).{UNCHANGED}"),
        ([program("unknown_cost", Side(unknown=2))], "unknown",
         "the second capture doesn't show what 2 idle resets of nginx cost."),
        ([program("smaller_bursts", Side(resets=1)), program("cured", Side()), program("unexplained", Side())],
         "unknown", "1 idle reset of nginx in the second capture cost nothing, and too few of them came before bursts "
         "as large as those that had cost time (and 1 more program)."),
        ([program("unexplained", Side(quiet=2))], "unknown", "at least 2 idle periods longer than the RTO of nginx in "
         "the second capture ended without a reset, and no setting that the captures hold explains it."),
        ([program("not_idle", Side())], "unknown", "the second capture shows no idle period of nginx longer than its "
         "RTO that ended in a burst, with a window above the initial one; trace for longer, or under the load of the "
         "first capture."),
    ],
)  # fmt: skip
def test_a_conclusion_says_what_both_captures_show(programs: list[Affected], verdict: str, text: str) -> None:
    found = concluded(*programs)
    assert (found.verdict, found.text) == (verdict, text)
    assert str(found) == f"{compared.LABELS[verdict]}: {text}"
    assert found.before == sum((each.before for each in programs), Side())
    assert found.after == sum((each.after for each in programs), Side())


@pytest.mark.parametrize(
    ("whole", "gaps", "text"),
    [
        (Side(), (), "the first capture has no idle reset, so there was nothing to cure."),
        (Side(resets=2), (), "none of the first capture's 2 idle resets cost time, so there was nothing to cure."),
        (Side(resets=2, unknown=1), (), "the first capture doesn't show what 1 idle reset cost."),
        (Side(), ("a part is gone",), "the first capture isn't whole: a part is gone."),
    ],
)
def test_nothing_to_cure_is_told_from_what_is_not_known(whole: Side, gaps: tuple[str, ...], text: str) -> None:
    found = compared.conclude(Finding((), whole, Side(quiet=1)), evidence(gaps=gaps), evidence())
    assert (found.verdict, found.text) == ("unknown", text)
    assert (found.before, found.after) == (whole, Side(quiet=1))


@pytest.mark.parametrize(("number", "more"), [(1, ""), (3, ""), (4, "; 1 more")])
def test_what_changed_is_named_in_part_and_once(number: int, more: str) -> None:
    changes = tuple(change(n) for n in range(number))
    found = concluded(*(program("cured", Side(quiet=1), changes=changes) for _ in range(2)))
    assert found.changes == changes
    named = "; ".join(f"{SYSCTL} was 1 before and 0 after in namespace {n}" for n in range(min(number, 3)))
    assert found.text.endswith(f" ended without one. What changed: {named}{more}.")


def test_other_programs_gaps_and_hosts_are_told() -> None:
    cured = program("cured", Side(quiet=1))
    assert concluded(cured, others=COSTLY).text.endswith(
        " Other programs had resets that cost time in the second capture: 3 of 4 idle resets cost 426 ms in all "
        "(measured)."
    )
    assert "Other programs" not in concluded(cured, others=Side(resets=1)).text
    assert concluded(cured, gaps=("a part is gone",)).text == "the second capture isn't whole: a part is gone."
    assert concluded(program("not_cured", COSTLY), gaps=("a part is gone",)).verdict == "not_cured"
    here, there = evidence(), evidence(host="web2")
    found = compared.conclude(Finding((cured,), Side()), here, there)
    assert (found.verdict, found.text) == ("unknown", "the captures are of different hosts.")


@pytest.mark.parametrize(
    ("outcome", "colour"), [("cured", "#00805a"), ("not_cured", "#c04a00"), ("unknown_cost", "#6a6a6a")]
)
def test_jupyter_shows_each_conclusion_in_its_colour(outcome: str, colour: str) -> None:
    found = concluded(program(outcome, COSTLY))
    label = html.escape(compared.LABELS[found.verdict])
    assert found._repr_html_().startswith(f"<div><b style='color:{colour}'>{label}</b><br><bdi>")
