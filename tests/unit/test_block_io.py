# SPDX-License-Identifier: Apache-2.0
"""Figures of block I/O equal those that are computed by hand from a few records."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwndtrace.analysis import block_io, workloads
from cwndtrace.analysis.histogram import LatencyHistogram
from tests.unit import frames


def blocks(*rows: Any) -> pd.DataFrame:
    return block_io.with_latency(frames.pandas(frames.table("block_io", *rows)), {"7:0": "loop0"})


def test_latencies_keep_fractions_of_a_microsecond() -> None:
    row = frames.block(1, 250.5)
    never_issued = frames.block(2, 10, issue_ns=0, dev=8 << 20 | 17)
    out = blocks(row, never_issued)
    assert out["latency_us"].tolist() == [250.5, 10.0]
    assert out["queue_us"].iloc[0] == 4.0
    assert np.isnan(out["queue_us"].iloc[1])
    assert out["device"].tolist() == ["loop0", "8:17"]


def test_block_figures_equal_those_computed_by_hand() -> None:
    reads = [frames.block(n, latency, bytes=4096) for n, latency in enumerate(range(100, 201))]
    rows = [*reads, frames.block(200, 5000, op="write", bytes=512, error="ioerr"), frames.block(201, 1, dev=8 << 20)]
    out = block_io.summary(blocks(*rows))
    assert list(out.columns) == list(block_io.COLUMNS)
    assert out[["device", "op", "count", "bytes", "errors"]].to_numpy().tolist() == [
        ["loop0", "read", 101, 101 * 4096, 0],
        ["loop0", "write", 1, 512, 1],
        ["8:0", "read", 1, 4096, 0],
    ]
    figures = out.iloc[0]
    assert [figures[f"latency_{name}_us"] for name in ("p50", "p95", "p99", "max")] == [150.0, 195.0, 199.0, 200.0]
    assert figures["latency_total_us"] == sum(range(100, 201))


def test_block_figures_by_submitter() -> None:
    out = block_io.by_submitter(
        blocks(
            frames.block(1, 10, comm=b"a", tgid=1), frames.block(2, 30, comm=b"a", tgid=2), frames.block(3, 5, tgid=1)
        )
    )
    assert list(out.columns) == list(block_io.SUBMITTER_COLUMNS)
    assert out[["comm", "tgid", "count", "latency_max_us"]].to_numpy().tolist() == [
        ["a", 2, 1, 30.0], ["a", 1, 1, 10.0], ["fio", 1, 1, 5.0],
    ]  # fmt: skip


def test_no_block_io_gives_empty_frames() -> None:
    assert list(block_io.summary(blocks()).columns) == list(block_io.COLUMNS)
    assert len(block_io.summary(blocks())) == len(block_io.by_submitter(blocks())) == 0


def test_queue_and_service_times_are_separate() -> None:
    late = frames.block(3, 900, issue_ns=frames.MONO + 3 * frames.SECOND + 800_000)
    out = block_io.summary(blocks(frames.block(1, 104), late, frames.block(5, 50, issue_ns=0)))
    assert out["count"].tolist() == [3]
    assert [out[f"{part}_p50_us"].item() for part in ("latency", "queue", "service")] == [104, 4, 100]
    (never,) = block_io.summary(blocks(frames.block(5, 50, issue_ns=0))).to_dict("records")
    assert np.isnan(never["queue_p99_us"])
    assert np.isnan(never["service_p50_us"])


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["read", "write"]), st.integers(5, 9)), max_size=20))
def test_block_figures_equal_those_of_grouping_by_hand(rows: list[tuple[int, str, int]]) -> None:
    frame = blocks(*(frames.block(i, us, dev=dev << 20, op=op) for i, (dev, op, us) in enumerate(rows)))
    rows_by_key = {(r["device"], r["op"]): r for r in block_io.summary(frame).to_dict("records")}
    assert rows_by_key.keys() == {(f"{dev}:0", op) if dev != 7 else ("loop0", op) for dev, op, _ in rows}
    for (device, op), row in rows_by_key.items():
        mine = [us for dev, o, us in rows if (f"{dev}:0", o) == (device, op)]
        assert (row["count"], row["bytes"], row["latency_total_us"]) == (len(mine), 4096 * len(mine), sum(mine))
        assert row["latency_p95_us"] == np.quantile(mine, 0.95, method="inverted_cdf")
        assert row["latency_max_us"] == max(mine)


def requests(number: int, seed: int, spread: float) -> np.ndarray:
    """Return latencies in us to the nanosecond, with ties, from below 1 us to hours where ``spread`` is large."""
    latencies: np.ndarray = np.random.default_rng(seed).lognormal(np.log(250), spread, number).clip(0.002, 2e10)
    return latencies.round(3)


@given(st.integers(1, 3000), st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 1.0, 5.0]))
def test_live_percentiles_are_within_one_percent_of_the_reports(number: int, seed: int, spread: float) -> None:
    latencies = requests(number, seed, spread)
    live = LatencyHistogram()
    for piece in np.array_split(latencies, 3):
        live.add(piece)
    ns = (latencies * 1000).round().astype(np.uint64)
    records = np.repeat(frames.block(1), number)
    records["done_ns"], records["issue_ns"] = records["start_ns"] + ns, 0
    (row,) = block_io.summary(blocks(records)).to_dict("records")
    for percent in (50, 95, 99):
        exact = np.percentile(ns / 1000, percent, method="inverted_cdf")
        assert row[f"latency_p{percent}_us"] == exact
        assert exact * (1 - 1e-9) <= live.percentile(percent) <= exact * 1.01 * (1 + 1e-9)


def test_a_percentile_of_few_requests_is_one_of_them() -> None:
    live = LatencyHistogram()
    # The 110th of 111 is the 99th percentile; the next one takes ten times as long.
    live.add(np.append(np.arange(1.0, 111.0), 1100.0))
    assert 110 <= live.percentile(99) <= 111.1
    assert (live.count, live.max_us) == (111, 1100)
    assert LatencyHistogram().percentile(99) == 0


def test_the_heat_map_counts_each_request_once_in_its_own_cell() -> None:
    frame = blocks(*(frames.block(second, us) for second, us in ((0, 10), (0, 11), (5, 300), (9.99, 5000))))
    cells = block_io.heat_map(frame, slots=10)
    assert cells.to_numpy().sum() == 4
    assert cells.shape[1] == 10
    for second, us in ((0, 10), (5, 300), (9.99, 5000)):
        row = np.flatnonzero(cells.index.to_numpy(float) <= us)[-1]
        column = np.flatnonzero(cells.columns.to_numpy(float) <= frames.MONO + second * frames.SECOND)[-1]
        assert cells.iloc[row, column] == (2 if us == 10 else 1)
    assert block_io.heat_map(blocks()).shape == (0, 0)


@pytest.mark.parametrize("number", [127, 128, 129, 255, 256, 300])
def test_joined_frames_keep_the_names_of_any_number_of_devices(number: int) -> None:
    first = blocks(*(frames.block(at, 10, dev=at << 20) for at in range(number)))
    second = blocks(*(frames.block(at + 0.5, 10, dev=at << 20) for at in range(number, number + 3)))
    columns = ["device", "start_ns"]
    whole = block_io.joined([first[columns], second[columns]], columns, number + 3)
    devices = ["loop0" if at == 7 else f"{at}:0" for at in range(number + 3)]
    assert whole["device"].tolist() == devices
    assert whole["start_ns"].is_monotonic_increasing


def test_the_columns_that_name_workloads_need_no_others_than_they_say() -> None:
    known = workloads.workloads(frames.workloads({}).to_pandas())
    naming = workloads.Naming(known, workloads.processes(frames.processes().to_pandas(), known))
    requests = frames.pandas(frames.table("block_io", frames.block(cgroup_id=1)))
    assert list(block_io.WORKLOADS) == ["submitter", "owner"]
    for name, needs in block_io.WORKLOADS.items():
        assert list(block_io.with_workloads(requests[[*needs]], naming, [name])[name]) == ["web"]


def test_the_columns_that_are_computed_need_no_others_than_they_say() -> None:
    requests = frames.pandas(frames.table("block_io", frames.block(1, 250.5)))
    expected = {"device": "loop0", "latency_us": 250.5, "queue_us": 4.0}
    assert list(block_io.NEEDS) == list(expected)
    for name, needs in block_io.NEEDS.items():
        assert list(block_io.add(requests[[*needs]], {"7:0": "loop0"}, [name])[name]) == [expected[name]]
