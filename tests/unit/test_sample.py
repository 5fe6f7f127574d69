# SPDX-License-Identifier: Apache-2.0
"""The sample capture (tools/vm sample) against what the lab's own TCP_INFO and clocks said beside it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import cwndtrace
from cwndtrace.lab import recording, statistics
from cwndtrace.trace import Trace

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def trace() -> Trace:
    return cwndtrace.load(DATA / "sample.cwnd")


@pytest.fixture(scope="module")
def measured() -> pd.DataFrame:
    return pd.read_parquet(DATA / "sample-measurements.parquet")


def test_it_is_whole(trace: Trace) -> None:
    assert trace.meta["status"] == "complete"
    assert set(trace.resets["probe"].astype(str)) == {"tracepoint"}
    assert not trace.block_io.empty
    assert not trace.connections.empty


def test_every_fall_is_recorded_with_its_windows(trace: Trace, measured: pd.DataFrame) -> None:
    fell = measured[measured["cwnd_after"] < measured["cwnd_before"]]
    assert len(fell) == len(measured[measured["setting"] == "on"])
    matched = recording.matched(measured, trace.resets)
    assert matched.attrs["missing"] == 0
    assert len(matched) == len(fell)
    for name in ("cwnd_before", "cwnd_after"):
        assert (matched[name] == matched[f"{name}_info"]).all()


def test_predictions_beside_measurements(trace: Trace, measured: pd.DataFrame) -> None:
    priced = pd.concat(recording.costs(group, trace.resets) for _, group in measured.groupby("mode"))
    apart = (priced["predicted_ms"] - priced["measured_ms"]).abs()
    # Both are in steps of one round trip, and the machine was an emulated one.
    assert (apart < priced["rtt_ms"] * 0.9).all()
    assert apart.median() < 10


def test_a_burst_is_compared_with_those_from_a_like_window(trace: Trace, measured: pd.DataFrame) -> None:
    reply = measured[measured["mode"] == "reply"]
    plain = recording.beside_baseline(reply, trace.resets)
    assert plain["baseline_ms"].notna().all()
    off = reply["setting"] == "off"
    # Others that began with less, as after a loss, are no measure.
    cut = reply[off].assign(cwnd_before=1, latency_ms=9e9)
    beside = recording.beside_baseline(pd.concat([reply, cut], ignore_index=True), trace.resets)
    pd.testing.assert_series_equal(beside["baseline_ms"], plain["baseline_ms"])
    apart = reply.assign(cwnd_before=reply["cwnd_before"].where(~off, 1))
    assert recording.beside_baseline(apart, trace.resets)["baseline_ms"].isna().all()
    assert recording.costs(apart, trace.resets).empty


def test_rests_that_disk_reads_fill(trace: Trace, measured: pd.DataFrame) -> None:
    disk = measured[measured["mode"] == "disk"]
    served = trace.resets[trace.resets["netns_ino"].isin(disk["netns_ino"])]
    reads = trace.block_io[trace.block_io["tgid"].isin(served["tgid"])]
    assert set(reads["op"].astype(str)) == {"read"}
    # 20 reads a second, one after the other, for 1.1 s before each reply.
    assert len(reads) == pytest.approx(len(disk) * 22, rel=0.2)


def test_what_it_says(measured: pd.DataFrame) -> None:
    said = statistics.summarise(measured[measured["mode"] == "disk"])
    assert said["verdict"].iloc[0].startswith("1 MB after 1.1 s: the setting cost 1")
