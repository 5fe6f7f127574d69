# SPDX-License-Identifier: Apache-2.0
"""The figures of the sample capture equal those that plain Python computes from the rows, as --json prints them."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

import cwndtrace
from cwndtrace.records import arrow
from cwndtrace.store import open_capture
from cwndtrace.trace import Trace

SAMPLE = Path(__file__).parents[1] / "data" / "sample.cwnd"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def trace() -> Trace:
    return cwndtrace.load(SAMPLE)


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    capture = open_capture(SAMPLE)
    return {name: arrow.table_to_dicts(name, capture.table(name)) for name in arrow.TABLES}


def by_socket(rows: list[Row]) -> dict[tuple[int, int, int], list[Row]]:
    """Group rows by connection, in order of time. In this capture no ports of a namespace are used twice."""
    groups: dict[tuple[int, int, int], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: int(row["ts_ns"])):
        groups[row["netns_ino"], row["sport"], row["dport"]].append(row)
    return groups


def round_trips(burst: float, cwnd: int, ssthresh: int, reset: Row, whole: int) -> int:
    """Return the round trips of a burst, simulated by the kernel's rules."""
    left, window, trips = math.ceil(burst / reset["mss"]), float(cwnd), 0
    most = max(1, int(reset["snd_wnd"] // reset["mss"]))
    while left > 0:
        sent = min(left, int(window), most)
        trips, left = trips + 1, left - sent
        if sent < int(window):
            continue
        if window < ssthresh:
            window = min(window + sent, float(ssthresh))
        else:
            window = min(window * 1.5, float(whole)) if window < whole else window + 1
    return trips


def predicted_us(reset: Row, following: Row | None, snapshots: list[Row], recovery: Row | None) -> float:
    """Return the estimated cost of one reset, in us."""
    last = snapshots[-1] if snapshots and not snapshots[-1]["unsent_bytes"] else None
    end = (
        following["bytes_sent"] if following else last["bytes_sent"] if last and last["ts_ns"] >= reset["ts_ns"] else -1
    )
    burst = max(end - reset["bytes_sent"], recovery["bytes_acked"] if recovery else -1)
    assert burst >= 0
    whole = recovery["chain_window"] if recovery else reset["cwnd_before"]
    after = round_trips(burst, reset["cwnd_after"], reset["ssthresh_after"], reset, whole)
    before = round_trips(burst, whole, reset["ssthresh_before"], reset, whole)
    return float((after - before) * reset["min_rtt_us"])


def test_the_predicted_cost_of_each_reset_equals_a_simulation(trace: Trace, rows: dict[str, list[Row]]) -> None:
    recoveries = {(r["skaddr"], r["reset_ts_ns"]): r for r in rows["cwnd_recovery"]}
    snapshots = by_socket(rows["connections"])
    expected: dict[int, float] = {}
    for key, resets in by_socket(rows["cwnd_reset"]).items():
        for reset, following in zip(resets, [*resets[1:], None], strict=True):
            recovery = recoveries.get((reset["skaddr"], reset["ts_ns"]))
            expected[reset["ts_ns"]] = predicted_us(reset, following, snapshots[key], recovery)
    predicted = dict(zip(trace.costs()["ts_ns"], trace.costs()["predicted_us"], strict=True))
    assert predicted == pytest.approx(expected)
    assert sum(expected.values()) > 5e6


def test_the_cost_of_each_connection_is_what_was_measured(trace: Trace, rows: dict[str, list[Row]]) -> None:
    assert {row["outcome"] for row in rows["cwnd_recovery"]} <= {"regained", "reset_again", "closed"}
    followed = {(r["skaddr"], r["reset_ts_ns"]): r["cost_us"] for r in rows["cwnd_recovery"]}
    expected = {
        key: sum(followed[reset["skaddr"], reset["ts_ns"]] for reset in resets)
        for key, resets in by_socket(rows["cwnd_reset"]).items()
    }
    summary = trace.summary().to_dict("records")
    by_connection = {(r["netns_ino"], r["sport"], r["dport"]): r["lost_us"] for r in summary}
    assert {key: by_connection[key] for key in expected} == expected
    assert {lost for key, lost in by_connection.items() if key not in expected} == {0.0}
    assert trace.host().lost_us == sum(expected.values()) > 5e6


def test_the_cause_of_idle_time_of_each_reset_equals_a_simulation(trace: Trace, rows: dict[str, list[Row]]) -> None:
    expected = []
    for reset in sorted(rows["cwnd_reset"], key=lambda row: int(row["ts_ns"])):
        own = min(reset["last_rcv_us"], reset["idle_us"])
        since = reset["ts_ns"] - own * 1000
        mine = [b for b in rows["block_io"] if b["tgid"] == reset["tgid"]]
        reach, total = 0, 0
        for block in sorted(mine, key=lambda b: int(b["start_ns"])):
            begin = reach if block["start_ns"] - reach <= 100_000 else block["start_ns"]
            total += max(0, min(block["done_ns"], reset["ts_ns"]) - max(begin, since))
            reach = max(reach, block["done_ns"])
        disk = total / 1000
        parts = {"peer": reset["idle_us"] - own, "disk": disk, "application": own - disk}
        expected.append((max(parts, key=lambda name: parts[name]), pytest.approx(disk)))
    assert list(zip(trace.verdicts["cause"], trace.verdicts["disk_us"], strict=True)) == expected
    assert {cause for cause, _ in expected} == {"peer", "disk"}


def test_block_io_percentiles_equal_those_computed_by_hand(trace: Trace, rows: dict[str, list[Row]]) -> None:
    (row,) = trace.block_summary().to_dict("records")
    for part, first, last in (("latency", "start_ns", "done_ns"), ("service", "issue_ns", "done_ns")):
        values = sorted((b[last] - b[first]) / 1000 for b in rows["block_io"])
        assert row[f"{part}_p95_us"] == next(v for v in values if sum(w <= v for w in values) >= 0.95 * len(values))
    assert row["count"] == len(rows["block_io"])
