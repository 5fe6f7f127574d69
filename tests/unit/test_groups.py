# SPDX-License-Identifier: Apache-2.0
"""Groups of connections add up to the connections exactly, and claim no more than these."""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cwndtrace
from cwndtrace.analysis import groups
from cwndtrace.analysis.idle_cause import CAUSES
from cwndtrace.analysis.verdict import CANT_TELL, VERDICTS
from cwndtrace.present import groups as in_words
from tests.unit import frames

DATA = Path(__file__).parents[1] / "data"
HARMLESS = {
    "slight", "nothing_waited", "as_before", "burst_fits", "nothing_sent", "exempt", "sysctl_off", "no_reset",
}  # fmt: skip
SUMS = ("resets", "resets_harmful", "resets_unknown", "lost_us", "predicted_us")


def connections(*rows: dict[str, Any]) -> pd.DataFrame:
    """Return a summary with the columns that grouping uses."""
    plain: dict[str, Any] = {
        "workload": "", "service": "", "outgoing": None, "process": "", "daddr": "10.2.0.9", "resets": 0,
        "resets_harmful": 0, "resets_unknown": 0, "lost_us": 0.0, "predicted_us": 0.0, "verdict": "no_reset",
    }  # fmt: skip
    whole = [{"connection": f"1:{number:x}", **plain, **row} for number, row in enumerate(rows)]
    return pd.DataFrame(whole, columns=["connection", *plain]).astype({"outgoing": "boolean", "lost_us": "float64"})


def judged(*rows: tuple[int, str, float | None, int]) -> pd.DataFrame:
    """Return resets of connections by their numbers: cause, cost in us (None if unknown), idle time in us."""
    made = [{"connection": f"1:{n:x}", "cause": c, "lost_us": lost, "idle_us": idle} for n, c, lost, idle in rows]
    return pd.DataFrame(made, columns=["connection", "cause", "lost_us", "idle_us"]).astype({"lost_us": "float64"})


def one(*rows: dict[str, Any], resets: pd.DataFrame | None = None, by: str = "workload") -> dict[str, Any]:
    """Return the only group of these connections."""
    (row,) = groups.groups(connections(*rows), judged() if resets is None else resets, by).to_dict("records")
    return {str(name): value for name, value in row.items()}


# ---- sums, verdicts ---------------------------------------------------------------------------------


ADDRESSES = ["10.2.0.9", "10.2.0.200", "10.2.1.9", "::ffff:10.2.0.7", "2001:db8:0:1::1", "2001:db8:1::1", "not one", ""]
COUNTS = st.integers(0, 10**6)
CONNECTION = st.fixed_dictionaries(
    {
        "workload": st.sampled_from(["", "nginx.service", "a/b/c"]),
        "service": st.sampled_from(["", "nginx:443", "nginx:80"]),
        "outgoing": st.sampled_from([True, False, None]),
        "process": st.sampled_from(["", "nginx", "curl"]),
        "daddr": st.sampled_from(ADDRESSES),
        "verdict": st.sampled_from(VERDICTS),
        "resets": COUNTS,
        "resets_harmful": COUNTS,
        "resets_unknown": COUNTS,
        # Costs are whole microseconds, which float64 adds up exactly.
        "lost_us": st.integers(0, 10**12).map(float),
        "predicted_us": st.integers(0, 10**12).map(float),
    }
)
RESET = st.tuples(
    st.integers(0, 30), st.sampled_from(["", *CAUSES]), st.none() | st.integers(0, 10**9), st.integers(0, 10**9)
)


@given(st.lists(CONNECTION, max_size=30), st.lists(RESET, max_size=30), st.sampled_from([*groups.BY]))
def test_groups_add_up_to_the_connections(rows: list[dict[str, Any]], resets: list[Any], by: str) -> None:
    summary, found = connections(*rows), groups.groups(connections(*rows), judged(*resets), by)
    assert found["connections"].sum() == len(rows)
    for name in SUMS:
        assert found[name].sum() == sum(row[name] for row in rows)
    assert list(found.columns) == [name for name in groups.COLUMNS if name in {*groups.BY[by], *found.columns}]
    assert found["lost_us"].is_monotonic_decreasing
    assert not found.duplicated(list(groups.BY[by])).any()
    by_key = summary.set_index("connection")
    for row in found.to_dict("records"):
        worst = by_key.loc[row["worst"]]
        assert row["worst_us"] == worst["lost_us"] <= row["lost_us"]
        assert row["verdict_connections"] <= row["connections"]
        assert (row["cause"] == "") == pd.isna(row["cause_share"])
    assert len(groups.groups(summary, judged(*resets), "connection")) == len(rows)


@given(st.lists(CONNECTION, min_size=1, max_size=12))
def test_a_groups_verdict_is_never_more_certain_than_those_of_its_connections(rows: list[dict[str, Any]]) -> None:
    verdicts = [row["verdict"] for row in rows]
    found = one(*({"verdict": verdict} for verdict in verdicts))
    assert found["verdict_connections"] == verdicts.count(found["verdict"]) > 0
    if "harmful" in verdicts:
        assert found["verdict"] == "harmful"
    elif {*verdicts} & {*CANT_TELL}:
        assert found["verdict"] in CANT_TELL
    if found["verdict"] in HARMLESS:
        assert {*verdicts} <= HARMLESS


def test_every_verdict_has_its_weight_in_a_group() -> None:
    assert sorted(name for line in groups._WEIGHTS for name in line) == sorted(VERDICTS)


def test_a_verdict_says_how_many_connections_have_it() -> None:
    both = one({"verdict": "no_reset"}, {"verdict": "harmful"}, {"verdict": "unknown"})
    assert in_words.verdict(both) == "harmful: its burst was late (1 of 3)"
    assert in_words.verdict(one({"verdict": "unknown"}, {"verdict": "unknown"})) == "can't tell"


# ---- what belongs together --------------------------------------------------------------------------


def test_a_service_of_a_workload_is_one_row_and_outgoing_connections_are_one_a_process() -> None:
    served: dict[str, Any] = {"service": "nginx:443", "outgoing": False}
    found = groups.groups(
        connections(
            # The process that holds a connection may be another than the one that listens.
            {"workload": "web", **served, "process": "nginx"}, {"workload": "web", **served, "process": "worker"},
            {"workload": "web2", **served}, {"workload": "web", "service": "nginx:80", "outgoing": False},
            {"workload": "web", "outgoing": True, "process": "nginx"},
            {"workload": "web", "outgoing": True, "process": "curl"}, {"workload": "web", "process": "curl"}, {},
        ),
        judged(),
    )  # fmt: skip
    named = [in_words.names(row) for row in found.to_dict("records")]
    assert sorted((row["workload"], row["service"]) for row in named) == [
        ("-", "-"), ("web", "curl"), ("web", "nginx:443"), ("web", "nginx:80"), ("web", "outgoing curl"),
        ("web", "outgoing nginx"), ("web2", "nginx:443"),
    ]  # fmt: skip
    assert found["connections"].tolist() == [2, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("prefix", "networks"),
    [
        ((24, 48), ["10.2.0.0/24", "10.2.0.0/24", "10.2.1.0/24", "10.2.0.0/24", "2001:db8::/48", "2001:db8:1::/48"]),
        ((16, 32), ["10.2.0.0/16"] * 4 + ["2001:db8::/32"] * 2),
        ((0, 0), ["0.0.0.0/0"] * 4 + ["::/0"] * 2),
        ((32, 128), ["10.2.0.9", "10.2.0.200", "10.2.1.9", "10.2.0.7", "2001:db8:0:1::1", "2001:db8:1::1"]),
    ],
)
def test_peers_are_grouped_by_network(prefix: tuple[int, int], networks: list[str]) -> None:
    assert groups.networks(pd.Series(ADDRESSES), prefix).tolist() == [*networks, "not one", ""]


@given(st.ip_addresses().map(str), st.integers(0, 32), st.integers(0, 128))
def test_an_address_is_in_its_network(address: str, four: int, six: int) -> None:
    (network,) = groups.networks(pd.Series([address]), (four, six))
    parsed = ipaddress.ip_address(address)
    if parsed.version == 6 and parsed.ipv4_mapped:
        parsed = parsed.ipv4_mapped
    assert parsed in ipaddress.ip_network(network)


def test_the_number_of_addresses_is_that_of_different_ones() -> None:
    rows = [{"daddr": address} for address in ("10.2.0.9", "10.2.0.9", "10.2.0.8")]
    assert one(*rows, by="peer")["addresses"] == 2


@pytest.mark.parametrize("prefix", [(33, 48), (24, 129), (-1, 48)])
def test_prefixes_that_no_address_has_are_refused(prefix: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="isn't within"):
        groups.groups(connections(), judged(), "peer", prefix)
    with pytest.raises(ValueError, match="by is one of workload, service"):
        groups.groups(connections(), judged(), "pod")


# ---- causes and the worst connection ----------------------------------------------------------------


def test_the_cause_is_that_of_most_of_the_cost() -> None:
    resets = judged((0, "peer", 100.0, 9), (1, "disk", 200.0, 1), (1, "disk", 100.0, 1), (1, "", 900.0, 0))
    found = one({}, {}, resets=resets)
    assert (found["cause"], found["cause_share"], found["cause_of"]) == ("disk", 0.75, "cost")
    assert in_words.cause(found) == "disk (75 % of cost)"


def test_without_a_known_cost_the_cause_is_that_of_most_of_the_idle_time() -> None:
    found = one({}, resets=judged((0, "peer", None, 9_990), (0, "unknown", 0.0, 10), (7, "disk", 5.0, 10**9)))
    assert (found["cause"], found["cause_of"]) == ("peer", "idle time")
    # A share that isn't all of it never reads so.
    assert in_words.cause(found) == "peer (99 % of idle time)"
    assert in_words.cause(one({}, resets=judged((0, "peer", 0.0, 1)))) == "peer"


def test_a_group_without_idle_resets_has_no_cause() -> None:
    for resets in (judged(), judged((0, "", 1.0, 0)), judged((0, "peer", 1.0, 1)).drop(columns="cause")):
        assert in_words.cause(one({}, resets=resets)) == "-"


def test_the_worst_connection_is_the_one_that_lost_most_or_the_first() -> None:
    assert one({"lost_us": 1.0}, {"lost_us": 5.0}, {"lost_us": 5.0})["worst"] == "1:1"
    assert one({"resets": 3}, {"resets": 2})["worst"] == "1:0"


# ---- captures ---------------------------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["sample", "older", "heartbeats", "receiver-side", "closed-by-rst"])
def test_captures_of_older_versions_are_grouped_without_names(name: str) -> None:
    trace = cwndtrace.load(DATA / f"{name}.cwnd")
    for by in groups.BY:
        found = trace.groups(by)
        assert found["connections"].sum() == len(trace.summary())
        assert found["lost_us"].sum() == trace.summary()["lost_us"].sum()
        assert not in_words.telling(found)
        assert in_words.single(found) == ""
    assert trace.groups()["outgoing"].isna().all()


def test_groups_of_a_trace_have_its_names_and_causes(tmp_path: Path) -> None:
    names = {"workload": "web.service", "listener": "nginx", "listener_pid": 7}, {"listener_pid": 0, "process": "curl"}
    trace = frames.named(frames.two_idle_connections(tmp_path / "a.cwnd"), *names)
    found = trace.groups()
    assert {tuple(in_words.names(row).values()) for row in found.to_dict("records")} == {
        ("web.service", "nginx:443"), ("-", "outgoing curl"),
    }  # fmt: skip
    assert set(found["cause"]) == {"application"}
    assert in_words.telling(found)
    assert found.attrs["units"]["worst_us"] == "us"
    # Without causes no block request is read.
    quick = frames.named(cwndtrace.load(tmp_path / "a.cwnd"), *names)
    assert set(quick.groups(causes=False)["cause"]) == {""}
    assert "_requests" not in quick.__dict__


@pytest.mark.slow
def test_an_empty_capture_has_no_groups_and_all_columns(tmp_path: Path) -> None:
    empty = frames.capture(tmp_path / "a.cwnd")
    full = frames.two_idle_connections(tmp_path / "b.cwnd")
    for by in groups.BY:
        assert empty.groups(by).empty
        assert empty.groups(by).dtypes.to_dict() == full.groups(by).dtypes.to_dict()


def calls(number: int, by: str) -> int:
    """Return how many Python functions grouping ``number`` connections of four networks calls."""
    rows = [
        {"daddr": f"10.2.{n % 4}.9", "service": f"s:{n % 3}", "workload": f"w{n % 5}", "lost_us": float(n)}
        for n in range(number)
    ]
    summary, resets = connections(*rows), judged(*((n, "peer", 1.0, 1) for n in range(number)))
    counted = 0

    def count(_frame: FrameType, event: str, _arg: object) -> None:
        nonlocal counted
        counted += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        groups.groups(summary, resets, by)
    finally:
        sys.setprofile(before)
    return counted


@pytest.mark.quick(1)
@pytest.mark.parametrize("by", ["workload", "service", "peer"])
def test_grouping_runs_no_python_function_for_each_connection(by: str) -> None:
    calls(100, by)  # the first call imports and caches
    assert calls(20_000, by) < calls(100, by) + 2_000


def test_twenty_thousand_addresses_are_parsed_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    parse = ipaddress.ip_address

    def noted(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        parsed.append(text)
        return parse(text)

    monkeypatch.setattr(ipaddress, "ip_address", noted)
    rows = [{"daddr": f"10.{n // 256 % 40}.{n % 256}.1"} for n in range(20_000)]
    found = groups.groups(connections(*rows), judged(), "peer", (16, 48))
    assert len(found) == 40
    assert len(parsed) == len({*parsed}) == 40 * 256


@pytest.mark.parametrize(
    ("by", "noun"),
    [("workload", "workloads"), ("service", "services"), ("peer", "networks"), ("connection", "connections")],
)
def test_a_table_counts_what_it_leaves_out(by: str, noun: str) -> None:
    rest = pd.DataFrame(
        {
            "connections": [1, 2], "resets": [3, 2], "resets_harmful": [1, 0], "resets_unknown": [0, 1],
            "lost_us": [426_000.0, 0.0],
        }
    )  # fmt: skip
    line = f"and 2 more {noun} with 3 connections: 5 resets, 1 of them harmful; cost >426 ms"
    assert in_words.more(rest, in_words.NOUNS[by]) == line
    rows = rest.drop(columns="connections").assign(resets=0, resets_harmful=0, resets_unknown=0, lost_us=0.0)
    assert in_words.more(rows.iloc[:1], in_words.NOUNS[by]) == f"and 1 more {noun[:-1]}: no reset"


def test_a_single_group_is_told_in_a_sentence() -> None:
    group = {"workload": "web.service", "service": "nginx:443", "connections": 1}
    assert in_words.single(pd.DataFrame([group])) == "The connection is of nginx:443 in web.service."
    several = {"workload": "web.service", "service": "", "connections": 3}
    assert in_words.single(pd.DataFrame([several])) == "All 3 connections are of web.service."
    assert in_words.single(pd.DataFrame([group, several])) == ""
    assert in_words.single(pd.DataFrame([group | {"workload": "", "service": ""}])) == ""
