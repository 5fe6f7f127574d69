# SPDX-License-Identifier: Apache-2.0
"""The figures of a fleet: they add up, and what isn't known is said to be unknown."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwndtrace.fleet import change, clocks, summary
from cwndtrace.fleet.summary import BY, FleetReport
from cwndtrace.present import fleet as in_words
from cwndtrace.present import fleet_limits
from cwndtrace.report import content
from cwndtrace.report import fleet as fleet_content
from cwndtrace.trace import load
from tests.unit import fleets
from tests.unit.examples import FEW
from tests.unit.fleets import AFTER, BEFORE, SINCE, capture, connection, fleet, harmful, setting

DATA = Path(__file__).parents[1] / "data"
SUMS = ("resets", "resets_harmful", "resets_unknown", "lost_us", "predicted_us")
PROGRAMS: list[dict[str, Any]] = [
    {"workload": "nginx.service", "service": "nginx:443", "process": "nginx"},
    {"workload": "default/web-7d9c/nginx", "service": "nginx:443", "process": "worker"},
    {"workload": "default/web-9f3b/nginx", "service": "nginx:443", "process": "nginx"},
    {"workload": "", "service": "", "outgoing": None, "process": ""},
    {"workload": "", "service": "", "outgoing": True, "process": "curl"},
]
CONNECTION = st.fixed_dictionaries(
    {
        "host": st.sampled_from(["web1", "web2", "unknown"]),
        "name": st.sampled_from(["a.cwnd", "b.cwnd"]),
        "kernel": st.sampled_from(["", "6.1.0", "6.12.0"]),
        "program": st.sampled_from(PROGRAMS),
        "daddr": st.sampled_from(["10.2.0.9", "10.2.1.9", "::ffff:10.2.0.7", "2001:db8::1", "not one", ""]),
        "verdict": st.sampled_from(["harmful", "unknown", "no_reset", "slight"]),
        **{name: st.integers(0, 10**6) for name in SUMS[:3]},
        # Costs are whole microseconds, which float64 adds up exactly.
        **{name: st.integers(0, 10**12).map(float) for name in SUMS[3:]},
        "busy_us": st.none() | st.integers(0, 10**12).map(float),
    }
)


def one(found: pd.DataFrame) -> dict[str, Any]:
    (row,) = found.to_dict("records")
    return {str(name): value for name, value in row.items()}


# ---- costs ------------------------------------------------------------------------------------------


@FEW
@given(st.lists(CONNECTION, max_size=25))
def test_costs_by_anything_add_up_to_the_connections_to_the_last_digit(rows: list[dict[str, Any]]) -> None:
    made = [connection(**{k: v for k, v in row.items() if k != "program"}, **row["program"]) for row in rows]
    captures = [capture(host, name) for host in ("web1", "web2", "unknown") for name in ("a.cwnd", "b.cwnd")]
    tables = fleet(captures, made)
    known = summary.named(tables.connections)
    for by in BY:
        costs = summary.cost(known, tables.captures, by)
        assert not costs.duplicated(list(BY[by])).any()
        assert costs["connections"].sum() == len(rows)
        for name in SUMS:
            assert costs[name].sum() == sum(row[name] for row in rows)
        if None not in (row["busy_us"] for row in rows):
            assert costs["busy_us"].sum() == sum(row["busy_us"] for row in rows)
        assert costs["lost_us"].is_monotonic_decreasing
        assert list(costs.columns) == [name for name in summary.COLUMNS if name in {*BY[by], *costs.columns}]
        for row in costs.to_dict("records"):
            assert sum(each["lost_us"] for each in row["worst"]) <= row["lost_us"]
            assert len(row["worst"]) <= min(row["hosts"], summary.WORST)


@pytest.mark.slow
def test_a_fleets_figures_are_those_of_the_reports_of_its_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    once = functools.cache(load)
    monkeypatch.setattr("cwndtrace.fleet.extract.load", lambda path, **_: once(path))
    paths = {path: (f"h{n % 3}", path.name) for n, path in enumerate(sorted(DATA.glob("*.cwnd")))}
    found = fleet_content.as_json(summary.report(fleets.extracted(paths)))
    reports = [content.as_json(content.report(once(path), "service")) for path in paths]
    for ours, theirs in (("by_service", "groups"), ("by_host", "connections"), ("by_peer", "connections")):
        for name in SUMS:
            whole = sum(row[name] for report in reports for row in report[theirs])
            assert sum(row[name] for row in found[ours]) == found["answer"][name] == whole
    assert found["answer"]["lost_us"] == sum(report["answer"]["lost_us"] for report in reports) > 0
    assert found["answer"]["resets_harmful"] == sum(report["answer"]["harmful"] for report in reports)


def test_pods_of_one_container_are_one_workload_on_all_hosts() -> None:
    assert summary.across_pods("default/web-7d9c/nginx") == "default/*/nginx"
    # A pod whose container isn't known, a container, a unit, and a cgroup's path keep their names.
    for name in ("default/web-7d9c", "web", "nginx.service", "/custom/path/deep", ""):
        assert summary.across_pods(name) == name
    rows = [connection("web1", **PROGRAMS[1]), connection("web2", **PROGRAMS[2])]
    row = one(summary.report(fleet([capture("web1"), capture("web2")], rows)).costs["service"])
    assert (row["workload"], row["hosts"], row["connections"]) == ("default/*/nginx", 2, 2)


def test_the_hosts_that_lost_most_are_named() -> None:
    hosts = {f"web{n}": n * 1e6 for n in range(6)}
    rows = [harmful(host, lost_us=lost) for host, lost in hosts.items()] * 2
    row = one(summary.report(fleet([capture(host) for host in hosts], rows)).costs["service"])
    assert row["worst"] == [{"host": f"web{n}", "lost_us": n * 2e6} for n in (5, 4, 3)]
    assert in_words.worst(row) == "web5 (10.0 s), web4 (8.00 s), web3 (6.00 s)"


def test_a_rate_is_that_of_the_captures_whose_length_is_known() -> None:
    captures = [capture("web1"), capture("web2", seconds=float("nan")), capture("web3")]
    found = summary.report(fleet(captures, [harmful("web1", lost_us=7.2e6), harmful("web2")]))
    row = one(found.costs["service"])
    # The capture of web3 doesn't show the service.
    assert (row["traced_s"], row["lost_rate_us"]) == (3600, 2000)
    assert in_words.rate(row) == "2.00 ms/s"
    assert in_words.rate(row | {"resets_unknown": 1}) == ">2.00 ms/s"
    assert in_words.rate(row | {"resets_unknown": 1, "lost_rate_us": 0.0}) == "unknown"
    assert found.costs["host"].set_index("host")["lost_rate_us"].isna()["web2"]


def test_a_share_of_the_busy_time_needs_that_of_all_connections() -> None:
    rows = [harmful("web1"), harmful("web2"), harmful("web2", busy_us=None)]
    found = summary.report(fleet([capture("web1"), capture("web2")], rows))
    assert [in_words.busy(row) for row in found.costs["host"].to_dict("records")] == ["-", "10 %"]
    assert "busy time" not in in_words.answer(found.connections, found.captures)[1]


# ---- settings ---------------------------------------------------------------------------------------


def said(values: dict[str, int | None], rows: list[dict[str, Any]] | None = None) -> list[str]:
    """Return what is said of hosts with these values of the sysctl."""
    made = [connection(host) for host in values] if rows is None else rows
    spaces = [setting(host, idle=value) for host, value in values.items()]
    return fleet_content.settings(summary.report(fleet([capture(host) for host in values], made, spaces)))


SUBJECT = "net.ipv4.tcp_slow_start_after_idle of nginx:443 in nginx.service"


@pytest.mark.slow
def test_the_hosts_whose_sysctl_differs_are_named_and_unknown_ones_too() -> None:
    assert said({"a": 1, "b": 1}) == []
    assert said({"a": 1}) == []
    assert said({"a": 0, "b": 0, "c": 1}) == [f"{SUBJECT} is 0 on 2 of 3 hosts and 1 on 1 (c)."]
    assert said({"a": 0, "b": 0, "c": 1, "d": None}) == [
        f"{SUBJECT} is 0 on 2 of 4 hosts and 1 on 1 (c); can't tell for 1 (d), whose captures don't say it of each "
        "connection."
    ]
    assert said({"a": 0, "b": None}) == [
        f"{SUBJECT} is 0 on 1 of 2 hosts; can't tell for 1 (b), whose captures don't say it of each connection."
    ]
    assert said({"a": None, "b": None}) == [
        f"Can't tell what {SUBJECT} is: no capture of its 2 hosts says it of each connection."
    ]


def test_a_tie_has_no_majority() -> None:
    (line,) = said({"a": 1, "b": 1, "c": 0, "d": 0})
    assert (
        line
        == f"{SUBJECT} is 0 on 2 of 4 hosts (c, d) and 1 on 2 (a, b); it is a tie, so that none of these is "
        + ("the odd one.")
    )


def test_congestion_controls_are_those_of_the_connections() -> None:
    rows = [
        connection(host, ca_name=name) for host, name in (("a", "cubic"), ("b", "cubic"), ("c", "bbr"), ("c", "cubic"))
    ]
    (line,) = said(dict.fromkeys("abc", 1), rows)
    assert line.endswith("is cubic on 2 of 3 hosts and bbr and cubic on 1 (c).")
    # A connection whose congestion control isn't known makes its host unknown.
    assert (
        "can't tell for 1 (b)"
        in said(dict.fromkeys("ab", 1), [connection("a"), connection("b"), connection("b", ca_name="")])[0]
    )


def test_hosts_are_compared_within_a_service_only_and_by_their_last_captures() -> None:
    rows = [connection("a"), connection("b", service="redis:6379", process="redis")]
    assert said({"a": 0, "b": 1}, rows) == []
    nameless = {"workload": "", "service": "", "process": ""}
    assert said({"a": 0, "b": 1}, [connection("a", **nameless), connection("b", **nameless)]) == []
    captures = [capture("a", "new", AFTER), capture("a", "old"), capture("b", "new", AFTER)]
    spaces = [setting("a", "old", 1), setting("a", "new", 0), setting("b", "new", 0)]
    shown = [connection("a", "old"), connection("a", "new"), connection("b", "new")]
    assert fleet_content.settings(summary.report(fleet(captures, shown, spaces))) == []
    # What was set while a host was traced counts from then on.
    spaces = [setting("a", "new", 1, slow_start_after_idle_end=0), setting("b", "new", 0)]
    assert fleet_content.settings(summary.report(fleet(captures, shown, spaces))) == []


# ---- before and after -------------------------------------------------------------------------------


def changed(before: dict[str, float], after: dict[str, float], **values: Any) -> FleetReport:
    """Return the report of hosts that lost so many us in an hour before and after the date."""
    captures = [capture(host, BEFORE) for host in before] + [capture(host, AFTER, AFTER) for host in after]
    rows = [harmful(host, BEFORE, lost, **values) for host, lost in before.items()]
    rows += [harmful(host, AFTER, lost) for host, lost in after.items()]
    return summary.report(fleet(captures, rows), since=SINCE)


def hosts(*lost_us: float) -> dict[str, float]:
    return {f"web{n}": lost for n, lost in enumerate(lost_us)}


def conclusion(found: FleetReport) -> str:
    assert found.change is not None
    return in_words.changed(one(found.change), change.ENOUGH)


@pytest.mark.slow
def test_a_change_has_the_ratio_of_the_rates_and_an_interval_that_holds_it() -> None:
    found = changed(hosts(10e6, 11e6, 12e6, 13e6, 14e6), hosts(5e6, 6e6, 6e6, 6e6, 7e6))
    row = one(found.change) if found.change is not None else {}
    assert (row["lost_before_us"], row["lost_after_us"], row["ratio"]) == (60e6, 30e6, 0.5)
    assert row["rate_before_us"] == 60e6 / (5 * 3600)
    assert 0.4 < row["low"] < 0.5 < row["high"] < 0.6
    assert (row["outcome"], row["sent_ratio"], row["hosts_both"]) == ("less", 1, 5)
    assert conclusion(found) == "costs less"
    # Twice as much was sent before.
    assert conclusion(changed(hosts(*[1e7] * 5), hosts(*[5e6] * 5), sent_bytes=2_000_000)) == (
        "costs less; but it sent 0.5 times as much"
    )
    assert conclusion(changed(hosts(*[1e6] * 5), hosts(*[2e6] * 5))) == "costs more"
    assert conclusion(changed(hosts(1e6, 2e6, 9e6, 1e6, 3e6), hosts(2e6, 1e6, 1e6, 9e6, 3e6))) == (
        "can't tell: the interval holds 1"
    )


@pytest.mark.slow
def test_what_allows_no_ratio_is_said() -> None:
    five, none = hosts(*[1e6] * 5), hosts(*[0.0] * 5)
    assert conclusion(changed(hosts(*[1e6] * 4), hosts(1e6))) == (
        "can't tell, because only 4 hosts show it before and only 1 host shows it after"
    )
    assert conclusion(changed(five, {})) == "can't tell, because no capture of known length from after shows it"
    assert conclusion(changed(five, none)) == "nothing was lost after"
    assert conclusion(changed(none, five)) == "nothing was lost before"
    assert conclusion(changed(none, none)) == "nothing was lost on either side"
    assert conclusion(changed(five, five, resets=4, resets_unknown=1)) == (
        "can't tell, because the cost of 5 of 20 resets before isn't known"
    )
    assert conclusion(changed(none, five, resets=20, resets_unknown=1)) == (
        "can't tell, because the cost of 5 of 100 resets before isn't known"
    )
    for found in (changed(five, none), changed(hosts(1e6), hosts(1e6)), changed(five, {})):
        assert found.change is not None
        assert math.isnan(one(found.change)["low"])
        assert in_words.interval(one(found.change)) == "-"


def test_captures_that_span_the_date_or_have_no_date_are_left_out_and_named() -> None:
    begun = pd.Timestamp("2026-11-17T23:30:00Z")
    noon: dict[str, Any] = {"started": begun, "ended": begun + pd.Timedelta(hours=1)}
    captures = [
        capture(name="before"), capture(name="after", day=AFTER), capture(name="spans", **noon),
        capture(name="undated", started=None, ended=None), capture(name="stepped", clock_steps=1, clock_shift_s=1e6),
        capture(name="broken", status="failed", started=None, ended=None),
    ]  # fmt: skip
    found = summary.report(fleet(captures, [harmful(name=row["capture"]) for row in captures[:5]]), since=SINCE)
    sides = dict(zip(found.captures["capture"], found.captures["side"], strict=True))
    assert sides == {
        "before": "before", "after": "after", "spans": "spans", "undated": "undated", "stepped": "unsure", "broken": "",
    }  # fmt: skip
    assert found.change is not None
    assert (one(found.change)["lost_before_us"], one(found.change)["lost_after_us"]) == (1e6, 1e6)
    assert in_words.sides(found.captures, SINCE) == [
        "2026-11-18 00:00:00 UTC: 1 capture of 1 host before and 1 capture of 1 host after.",
        "Left out: 1 capture that spans the date: spans of web1.",
        "Left out: 1 capture that doesn't say when it traced: undated of web1.",
        "Left out: 1 capture that may be on either side, as its clock isn't sure: stepped of web1.",
    ]


@pytest.mark.quick(1)
@pytest.mark.parametrize(("number", "paired"), [(5, True), (5, False), (20, True), (20, False)])
def test_the_interval_holds_the_true_ratio_as_often_as_it_says(number: int, paired: bool) -> None:
    """Hosts differ by a factor of about three and hours by up to four; the true ratio of all hosts' rates is 0.5."""
    random, held = np.random.default_rng(7), 0
    for _ in range(200):
        of_host = random.lognormal(0, 1, number)
        sides = []
        for ratio in (1.0, 0.5):
            rate = of_host if paired else random.lognormal(0, 1, number)
            hours = random.uniform(0.5, 2, number)
            sides += [ratio * rate * random.lognormal(0, 0.3, number) * hours, hours]
        if not paired:
            # Other hosts than before: none of them is on both sides.
            nothing = np.zeros(number)
            sides = [np.concatenate(pair) for pair in zip(
                (sides[0], sides[1], nothing, nothing), (nothing, nothing, sides[2], sides[3]), strict=True
            )]  # fmt: skip
        low, high = change.interval(sides[0], sides[1], sides[2], sides[3])
        held += low <= 0.5 <= high
    assert 0.9 <= held / 200 <= 0.995, held


def test_an_interval_without_a_bound_says_so() -> None:
    # Most resamples have no host that lost anything before.
    found = changed(hosts(0, 0, 0, 0, 1e6), hosts(*[1e6] * 5))
    assert found.change is not None
    assert math.isnan(one(found.change)["high"])
    assert in_words.interval(one(found.change)).endswith(" to any")
    assert one(found.change)["outcome"] in ("more", "unsure")


# ---- clocks -----------------------------------------------------------------------------------------


def test_clocks_that_were_stepped_or_are_ahead_of_the_storage_are_said() -> None:
    captures = [
        capture("a", clock_steps=1, clock_shift_s=-90.0), capture("b", ahead_s=70.0),
        # Suspends and steps of less than a second aren't worth a word, and storing takes a while.
        capture("c", clock_steps=2, clock_shift_s=0.2), capture("d", ahead_s=-5e6),
    ]  # fmt: skip
    told = fleet_content.caveats(summary.report(fleet(captures)), 5)["limits"]
    assert told == [
        "The clock was stepped, suspends included, during 1 capture: a.cwnd of a (-90.0 s).",
        "The clock of the host or of the storage is wrong where a capture ended after it was stored: a.cwnd of b "
        "(70.0 s).",
    ]


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({}, "unknown"),
        ({"boot_id": "x", "begin_ns": 0.0, "end_ns": 3600e9}, "twice"),
        ({"boot_id": "x", "begin_ns": 4000e9, "end_ns": 7600e9}, "set_back"),
        ({"boot_id": "y", "begin_ns": 0.0, "end_ns": 3600e9}, "other_boot"),
    ],
)
def test_captures_of_one_host_that_overlap_count_twice_or_its_clock_was_set_back(values: Any, kind: str) -> None:
    first: dict[str, Any] = {"boot_id": "x", "begin_ns": 100e9, "end_ns": 3700e9} if values else {}
    begun = pd.Timestamp(f"{BEFORE}T12:30:00Z")
    later: dict[str, Any] = {"started": begun, "ended": begun + pd.Timedelta(hours=1)}
    rows = [capture(name="a", **first), capture(name="b", **(later | values)), capture("web2", "c", **first)]
    told = summary.report(fleet(rows)).clocks
    row = one(told.overlaps)
    assert (row["host"], row["capture"], row["other"], row["overlap_s"], row["kind"]) == ("web1", "a", "b", 1800, kind)
    (line,) = fleet_limits.clocks(told.stepped, told.ahead, told.undated, told.overlaps, told.skews)
    assert ("counts twice" in line) == (kind in ("twice", "unknown"))
    assert ("set back" in line) == (kind != "twice")


def both_ends(skew_s: float, number: int, **values: Any) -> list[dict[str, Any]]:
    """Return connections of two hosts as both of them see them; the second one's clock is ahead by ``skew_s``."""
    rows = []
    for n in range(number):
        begun = pd.Timestamp(f"{BEFORE}T12:10:00Z") + pd.Timedelta(minutes=n)
        for host, ahead, ends in (
            ("a", 0, ("10.1.0.1", 443, "10.1.0.2", 5000 + n)),
            ("b", skew_s, ("10.1.0.2", 5000 + n, "10.1.0.1", 443)),
        ):
            names: dict[str, Any] = dict(zip(("saddr", "sport", "daddr", "dport"), ends, strict=True))
            first = begun + pd.Timedelta(seconds=ahead)
            seen = {"first_seen": first, "last_seen": first + pd.Timedelta(minutes=5)}
            rows.append(connection(host, **(names | seen | values)))
    return rows


def test_hosts_that_see_both_ends_of_connections_tell_that_their_clocks_differ() -> None:
    captures = [capture("a"), capture("b")]

    def skews(captures: list[dict[str, Any]], rows: list[dict[str, Any]]) -> pd.DataFrame:
        made = fleet(captures, rows)
        return clocks.findings(made.captures, summary.named(made.connections)).skews

    told = summary.report(fleet(captures, both_ends(120, 3))).clocks.skews
    assert one(told) == {"host": "a", "other": "b", "ahead_s": -120, "connections": 3}
    lines = fleet_content.caveats(summary.report(fleet(captures, both_ends(120, 3))), 5)["limits"]
    assert lines == [
        "The clock of a is 120.0 s behind that of b (estimated, from 3 connections that both saw begin and end); which "
        "one is right can't be told."
    ]
    # Snapshots may be this far apart, two connections are too few, and a connection may be older than both captures.
    assert skews(captures, both_ends(20, 3)).empty
    assert skews(captures, both_ends(120, 2)).empty
    old = both_ends(120, 3, first_seen=pd.Timestamp(f"{BEFORE}T12:00:10Z"))
    assert skews(captures, old).empty
    # Connections that had the same ends at different times, as those from a fixed port, are apart by different times.
    reused = [
        row
        | {name: row[name] + pd.Timedelta(minutes=n * n) for name in ("first_seen", "last_seen") if row["host"] == "b"}
        for n, row in enumerate(both_ends(120, 4))
    ]
    assert skews(captures, reused).empty
    longer = [row | {"last_seen": row["last_seen"] + pd.Timedelta(minutes=5)} for row in both_ends(120, 3)[::2]]
    assert skews(captures, longer + both_ends(120, 3)[1::2]).empty
    # A third host with the same private addresses leaves nothing to compare.
    third = [row | {"host": "c"} for row in both_ends(120, 3) if row["host"] == "b"]
    assert skews([*captures, capture("c")], both_ends(120, 3) + third).empty


def test_a_date_that_is_nearer_than_the_clocks_agree_leaves_the_side_open() -> None:
    rows = both_ends(7200, 3)
    captures = [
        capture(
            "a", ended=SINCE - pd.Timedelta(hours=1), started=pd.Timestamp(f"{BEFORE}T12:00:00Z"), seconds=11 * 3600.0
        ),
        capture(
            "b", ended=SINCE - pd.Timedelta(hours=1), started=pd.Timestamp(f"{BEFORE}T12:00:00Z"), seconds=11 * 3600.0
        ),
        capture("c"),
    ]
    found = summary.report(fleet(captures, rows), since=SINCE)
    assert list(found.captures["side"]) == ["unsure", "unsure", "before"]


# ---- edges ------------------------------------------------------------------------------------------


def test_a_clock_that_was_set_by_an_unknown_time_leaves_the_side_open() -> None:
    cut = capture(clock_steps=1, clock_shift_s=None, ended=None)
    assert list(summary.report(fleet([cut]), since=SINCE).captures["side"]) == ["unsure"]


def test_captures_of_unknown_length_are_left_out_of_a_comparison_and_named() -> None:
    captures = [capture("a"), capture("b", AFTER, AFTER, seconds=None)]
    found = summary.report(fleet(captures, [harmful("a"), harmful("b", AFTER)]), since=SINCE)
    assert in_words.sides(found.captures, SINCE) == [
        "2026-11-18 00:00:00 UTC: 1 capture of 1 host before and 1 capture of 1 host after.",
        f"Left out of the figures: 1 capture whose length isn't known: {AFTER} of b.",
    ]
    assert conclusion(found) == "can't tell, because no capture of known length from after shows it"


def test_an_unknown_way_to_group_is_refused() -> None:
    with pytest.raises(ValueError, match="by is one of service, workload, host, peer, kernel"):
        summary.report(fleet([]), "color")
