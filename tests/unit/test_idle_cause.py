# SPDX-License-Identifier: Apache-2.0
"""The cause of idle time is right for idle times whose cause is known; overlaps equal counting each moment."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cwndtrace.analysis import block_io, idle_cause
from tests.unit import frames

# ---- overlap of intervals --------------------------------------------------------------------------

SPAN = st.tuples(st.integers(0, 40), st.integers(0, 15)).map(lambda t: (t[0], t[0] + t[1]))
SPANS = st.lists(SPAN, max_size=12)


def columns(rows: list[tuple[int, int]]) -> list[np.ndarray]:
    return [np.array([row[i] for row in rows], dtype=np.int64) for i in range(2)]


@given(SPANS.map(sorted), SPANS)
@example([(0, 10), (2, 3), (8, 12), (12, 14)], [(1, 12), (3, 13), (12, 12)])
def test_covered_equals_counting_each_moment(intervals: list[tuple[int, int]], spans: list[tuple[int, int]]) -> None:
    result = idle_cause.covered(*columns(intervals), *columns(spans))
    truth = [sum(any(b <= t < e for b, e in intervals) for t in range(since, until)) for since, until in spans]
    assert result.tolist() == truth


# ---- causes ----------------------------------------------------------------------------------------


def causes(resets: list[Any], blocks: list[Any], **options: Any) -> list[dict[Any, Any]]:
    r = frames.pandas(frames.table("cwnd_reset", *resets))
    b = block_io.with_latency(frames.pandas(frames.table("block_io", *blocks)), {"7:0": "loop0"})
    out = idle_cause.with_cause(r, b, **options)
    assert list(out.columns) == [*r.columns, *idle_cause.COLUMNS]
    assert len(out) == len(resets)
    return out.to_dict("records")


def idle(at_s: float = 10.0, seconds: float = 2.0, since_data_s: float = 9.0, **fields: Any) -> Any:
    """Return a reset after ``seconds`` of idle time; the last data arrived ``since_data_s`` before it."""
    return frames.reset(at_s, idle_us=int(seconds * 1e6), last_rcv_us=int(since_data_s * 1e6), **fields)


def read(at_s: float, seconds: float, **fields: Any) -> Any:
    return frames.block(at_s, seconds * 1e6, **({"tgid": 4242, "tid": 1} | fields))


def test_reads_of_the_process_in_any_thread_are_disk_time() -> None:
    (row,) = causes([idle()], [read(8.1, 0.9, tid=1), read(8.5, 1.2, tid=2), read(9.2, 0.1, tid=3)])
    assert (row["cause"], row["disk_device"], row["disk_requests"]) == ("disk", "loop0", 3)
    assert row["disk_us"] == 1_600_000
    assert (row["peer_us"], row["application_us"]) == (0, 400_000)


@pytest.mark.parametrize("changes", [{"tgid": 777}, {"start": 4.0}, {"start": 10.5}])
def test_reads_of_other_processes_and_at_other_times_are_not_disk_time(changes: dict[str, Any]) -> None:
    start = changes.pop("start", 8.1)
    (row,) = causes([idle()], [read(start, 1.8, **changes)])
    assert (row["cause"], row["disk_us"], row["disk_device"], row["disk_requests"]) == ("application", 0, "", 0)


def test_time_until_the_request_is_the_peers() -> None:
    (row,) = causes([idle(since_data_s=0.004)], [read(8.1, 1.8)])
    assert (row["cause"], row["peer_us"], row["disk_us"]) == ("peer", 1_996_000, 0)


def test_reads_before_the_request_are_not_disk_time() -> None:
    # The request came 1.5 s before the reset, at 8.5 s; a read for another connection lasted until 9 s.
    (row,) = causes([idle(since_data_s=1.5)], [read(8.0, 1.0)])
    assert (row["peer_us"], row["disk_us"], row["application_us"]) == (500_000, 500_000, 1_000_000)
    assert row["cause"] == "application"


def test_only_reads_of_the_process_that_sends_are_disk_time() -> None:
    mine, other = causes([idle(10, tgid=1), idle(20, tgid=2)], [read(8, 2, tgid=1), read(18, 1.9, tgid=1)])
    assert (mine["cause"], other["cause"]) == ("disk", "application")


def test_the_device_that_was_busy_longest_is_named() -> None:
    blocks = [read(9.9, 0.05, dev=8 << 20), read(7.9, 0.5, dev=8 << 20), read(8.0, 1.2), read(8.2, 1.0)]
    (row,) = causes([idle()], blocks)
    assert (row["disk_device"], row["disk_requests"], row["disk_us"]) == ("loop0", 3, 1_250_000)


def test_idle_time_with_a_closed_receive_window_is_the_peers() -> None:
    reopened = idle(tgid=0, tid=0, comm=b"", unsent_bytes=5000)
    (row,) = causes([reopened], [read(8.0, 2.0, tgid=0)])
    assert (row["cause"], row["peer_us"]) == ("peer", 2_000_000)


def test_resets_for_other_reasons_than_idle_time_have_no_cause() -> None:
    rows = causes([idle(reason="rto_loss"), idle(reason="app_limited")], [read(8, 2)])
    assert [(row["cause"], row["peer_us"], row["disk_us"]) for row in rows] == [("", 0, 0)] * 2


def test_without_block_io_the_cause_is_never_the_application() -> None:
    rows = causes([idle(), idle(20, since_data_s=0.1)], [], recorded=False)
    assert [row["cause"] for row in rows] == ["unknown", "peer"]


def test_impossible_process_ids_change_no_other_cause() -> None:
    rows = causes([idle(tgid=2**32 - 1), idle(20)], [read(8, 2, tgid=2**32 - 1), read(18, 2)])
    assert [row["cause"] for row in rows] == ["application", "disk"]


def test_no_resets_have_no_causes() -> None:
    assert causes([], []) == []
    assert causes([], [read(1, 1)]) == []


def test_the_causes_of_many_resets_equal_those_of_each_alone() -> None:
    rng = np.random.default_rng(1)
    resets = pd.concat([frames.pandas(frames.table("cwnd_reset", idle()))] * 10_000, ignore_index=True)
    resets["ts_ns"] = np.sort(rng.integers(0, 10**12, len(resets))).astype(np.uint64) + np.uint64(frames.MONO)
    resets["tgid"] = rng.integers(1, 50, len(resets)).astype(np.uint32)
    start = np.sort(rng.integers(0, 10**12, 1_000_000)) + frames.MONO
    blocks = pd.DataFrame(
        {
            "start_ns": start.astype(np.uint64),
            "done_ns": (start + rng.integers(10**5, 10**8, len(start))).astype(np.uint64),
            "tgid": rng.integers(1, 100, len(start)).astype(np.uint32),
            "device": pd.Categorical(np.array(["a", "b", "c"])[rng.integers(0, 3, len(start))]),
        }
    )
    out = idle_cause.with_cause(resets, blocks)
    sample = out.sample(20, random_state=1)
    for row in sample.to_dict("records"):
        mine = blocks[blocks["tgid"] == row["tgid"]]
        since, until = int(row["ts_ns"]) - 2 * 10**9, int(row["ts_ns"])
        spans = mine[(mine["start_ns"] < until) & (mine["done_ns"] > since)].astype({"start_ns": int, "done_ns": int})
        reach, total = since, 0
        for begin, end in zip(spans["start_ns"], spans["done_ns"], strict=True):
            total += max(0, min(end, until) - max(begin, reach))
            reach = max(reach, min(end, until))
        assert row["disk_us"] == pytest.approx(total / 1000)
