# SPDX-License-Identifier: Apache-2.0
"""What limits the report of a fleet is told in whole sentences that name the first captures and count the others."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from cwndtrace.present import fleet_limits


def captures(*rows: dict[str, Any]) -> pd.DataFrame:
    """Return captures of whole traces that saw idle resets, one of each host, but for the values given."""
    usual = {"status": "ok", "whole": True, "can_see_idle": True, "filters": "iface eth0", "state": "complete"}
    usual |= dict.fromkeys(("lost_records", "absent_records"), 0) | dict.fromkeys(("warnings", "reason"), "")
    named = [usual | {"host": f"h{n}", "capture": f"h{n}/a.cwnd"} | row for n, row in enumerate(rows)]
    return pd.DataFrame(named, columns=None if rows else [*usual]).astype(
        dict.fromkeys(("whole", "can_see_idle"), "boolean")
    )


def clocks(**found: list[dict[str, Any]]) -> list[str]:
    """Return the lines on clocks, with these rows of captures in the findings and none in the others."""
    frames = {name: captures(*found.get(name, [])) for name in ("stepped", "ahead", "undated", "overlaps", "skews")}
    for name, column in (("overlaps", "kind"), ("skews", "host")):
        frames[name] = frames[name] if len(frames[name]) else pd.DataFrame({column: []})
    return fleet_limits.clocks(**frames)


@pytest.mark.parametrize(
    ("host", "capture", "shown"),
    [
        ("web1", "web1/a.cwnd", "web1/a.cwnd"),
        ("web1", "host=web1/a.cwnd", "host=web1/a.cwnd"),
        ("web1", "web12/a.cwnd", "web12/a.cwnd of web1"),
        ("web1", "a.cwnd", "a.cwnd of web1"),
    ],
)
def test_a_capture_is_named_with_its_host_where_its_path_does_not_tell_it(host: str, capture: str, shown: str) -> None:
    assert fleet_limits.capture({"host": host, "capture": capture}) == shown


@pytest.mark.parametrize(
    ("broken", "lines"),
    [
        (0, []),
        (1, ["1 of 2 captures couldn't be read, so no figure here has what is in it.", "h0/a.cwnd: damaged"]),
        (2, ["2 of 3 captures couldn't be read, so no figure here has what is in them.", "h0/a.cwnd: damaged",
             "h1/a.cwnd: damaged"]),
        (4, ["4 of 5 captures couldn't be read, so no figure here has what is in them.", "h0/a.cwnd: damaged",
             "h1/a.cwnd: damaged", "h2/a.cwnd: damaged",
             "and 1 more capture that couldn't be read; --json has them all."]),
    ],
)  # fmt: skip
def test_captures_that_could_not_be_read_are_counted_and_the_first_named(broken: int, lines: list[str]) -> None:
    rows = captures(*[{"status": "failed", "reason": "damaged"}] * broken, {})
    assert fleet_limits.failed(rows) == lines
    assert len(fleet_limits.failed(rows, most=9)) == (broken and broken + 1)
    # The others are neither partly read nor filtered in their way.
    assert fleet_limits.limits(rows) == []


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"state": "cut short"}, "it is cut short"),
        ({"state": ""}, "it is of an unknown state"),
        ({"lost_records": 1}, "1 record was lost"),
        ({"lost_records": 2, "absent_records": 3}, "2 records were lost, 3 records missing or lacking values"),
        ({"warnings": "a part is damaged"}, "a part is damaged"),
        ({}, "its parts aren't as the trace wrote them"),
    ],
)
def test_a_capture_that_is_not_whole_has_its_reasons(values: dict[str, Any], why: str) -> None:
    assert fleet_limits.limits(captures({"whole": False} | values, {})) == [
        f"1 of 2 captures isn't whole, so figures may be too low: h0/a.cwnd ({why})."
    ]


def test_several_captures_that_are_not_whole_are_named_in_part() -> None:
    why = "its parts aren't as the trace wrote them"
    named = "; ".join(f"h{n}/a.cwnd ({why})" for n in range(3))
    rows = captures(*[{"whole": False}] * 3, {"whole": None})
    assert fleet_limits.limits(rows) == [f"4 of 4 captures aren't whole, so figures may be too low: {named}; 1 more."]


def test_captures_that_saw_no_idle_resets_and_other_filters_are_told() -> None:
    rows = captures({"can_see_idle": False}, {"can_see_idle": None, "filters": ""}, {"filters": "port 443"}, {})
    assert fleet_limits.limits(rows) == [
        "No probe could see idle resets in 1 of 4 captures: h0/a.cwnd.",
        "Captures were filtered in different ways, so their figures can't be compared: iface eth0 in 2; no filter in "
        "1; port 443 in 1.",
    ]  # fmt: skip
    assert fleet_limits.limits(captures({"filters": ""}, {"filters": ""})) == []


def test_clocks_that_were_stepped_are_ahead_or_say_nothing_are_told() -> None:
    assert clocks() == []
    stepped = [{"clock_shift_s": shift} for shift in (3600.0, -0.5, float("nan"))]
    assert clocks(stepped=stepped) == [
        "The clock was stepped, suspends included, during 3 captures: h0/a.cwnd (+3,600.0 s), h1/a.cwnd (-0.5 s), "
        "h2/a.cwnd (by an unknown time)."
    ]
    assert clocks(ahead=[{"ahead_s": 90.0}]) == [
        "The clock of the host or of the storage is wrong where a capture ended after it was stored: h0/a.cwnd (90.0 "
        "s)."
    ]
    assert clocks(undated=[{}]) == ["1 capture doesn't say when: h0/a.cwnd."]
    assert clocks(undated=[{}, {}]) == ["2 captures don't say when: h0/a.cwnd, h1/a.cwnd."]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("twice", "so both traced at once, and what both have counts twice"),
        ("set_back", "because the clock was set back in between"),
        ("other_boot", "so the clock was set back, or two hosts have this name"),
        ("unknown", "so both traced at once and what both have counts twice, or the clock was set back, which can't be "
         "told"),
    ],
)  # fmt: skip
def test_captures_of_one_host_that_overlap_are_told_with_what_that_means(kind: str, why: str) -> None:
    overlaps = [{"kind": kind, "other": "b.cwnd", "overlap_s": 2.0}, {"kind": "?", "other": "c.cwnd", "overlap_s": 3.0}]
    assert clocks(overlaps=overlaps) == [
        f"By their times, captures of one host overlap, {why}: h0/a.cwnd and b.cwnd by 2.0 s."
    ]


def test_clocks_of_hosts_that_differ_are_told_for_the_first_pairs() -> None:
    pairs = [
        {"other": "x", "ahead_s": ahead, "connections": n} for n, ahead in enumerate((1.5, -0.5, 2.0, 3.0, 4.0), 1)
    ]
    seen = "that both saw begin and end); which one is right can't be told."
    lines = clocks(skews=pairs)
    assert lines == [
        f"The clock of h0 is 1.5 s ahead of that of x (estimated, from 1 connection {seen}",
        f"The clock of h1 is 0.5 s behind that of x (estimated, from 2 connections {seen}",
        f"The clock of h2 is 2.0 s ahead of that of x (estimated, from 3 connections {seen}",
        "The clocks of 2 more pairs of hosts differ.",
    ]
    assert clocks(skews=pairs[:3]) == lines[:3]
