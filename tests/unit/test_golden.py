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


def round_trips(burst: float, cwnd: int, ssthresh: int, reset: Row, limit: float) -> int:
    """Return the round trips of a burst, simulated by the kernel's rules."""
    left, window, trips = math.ceil(burst / reset["mss"]), float(cwnd), 0
    most = max(1, int(limit // reset["mss"]))
    while left > 0:
        sent = min(left, int(window), most)
        trips, left = trips + 1, left - sent
        if sent < int(window):
            continue
        if window < ssthresh:
            window = min(window + sent, float(ssthresh))
        else:
            window = min(window * 1.5, float(reset["cwnd_before"])) if window < reset["cwnd_before"] else window + 1
    return trips


def lost_us(reset: Row, following: Row | None, snapshots: list[Row], recovery: Row | None) -> float:
    """Return the estimated cost of one reset, in us."""
    last = max((s["bytes_sent"] for s in snapshots), default=-1)
    end = following["bytes_sent"] if following else last
    burst = max(end - reset["bytes_sent"], recovery["bytes_acked"] if recovery else -1)
    assert burst >= 0
    buffers = [s["sndbuf"] for s in snapshots if s["sndbuf"]]
    limit = min(reset["snd_wnd"], max(buffers, default=math.inf))
    after = round_trips(burst, reset["cwnd_after"], reset["ssthresh_after"], reset, limit)
    before = round_trips(burst, reset["cwnd_before"], reset["ssthresh_before"], reset, limit)
    lost = after - before
    if recovery and recovery["outcome"] != "loss" and recovery["cwnd_end"] < recovery["ssthresh_end"]:
        lost = min(lost, math.ceil(math.log2(max(recovery["cwnd_end"] / recovery["cwnd_start"], 1))))
    if burst <= reset["cwnd_after"] * reset["mss"] or lost < 1:
        return 0.0
    return float(lost * reset["min_rtt_us"])


def test_the_lost_time_of_each_connection_equals_a_simulation(trace: Trace, rows: dict[str, list[Row]]) -> None:
    recoveries = {(r["skaddr"], r["reset_ts_ns"]): r for r in rows["cwnd_recovery"]}
    snapshots = by_socket(rows["connections"])
    expected: dict[tuple[int, int, int], float] = {}
    for key, resets in by_socket(rows["cwnd_reset"]).items():
        pairs = zip(resets, [*resets[1:], None], strict=True)
        expected[key] = sum(
            lost_us(reset, following, snapshots[key], recoveries.get((reset["skaddr"], reset["ts_ns"])))
            for reset, following in pairs
        )
    summary = trace.summary()
    by_connection = {(r["netns_ino"], r["sport"], r["dport"]): r["lost_us"] for r in summary.to_dict("records")}
    assert {key: by_connection[key] for key in expected} == pytest.approx(expected)
    assert {lost for key, lost in by_connection.items() if key not in expected} == {0.0}
    assert trace.host().lost_us == pytest.approx(sum(expected.values()))
    assert sum(expected.values()) > 5e6


def test_the_cause_of_idle_time_of_each_reset_equals_a_simulation(trace: Trace, rows: dict[str, list[Row]]) -> None:
    expected = []
    for reset in sorted(rows["cwnd_reset"], key=lambda row: int(row["ts_ns"])):
        own = min(reset["last_rcv_us"], reset["idle_us"])
        since = reset["ts_ns"] - own * 1000
        mine = [b for b in rows["block_io"] if b["tgid"] == reset["tgid"] and b["start_ns"] < reset["ts_ns"]]
        reach, total = since, 0
        for block in sorted(mine, key=lambda b: int(b["start_ns"])):
            end = min(block["done_ns"], reset["ts_ns"])
            total += max(0, end - max(block["start_ns"], reach))
            reach = max(reach, end)
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
