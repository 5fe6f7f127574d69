# SPDX-License-Identifier: Apache-2.0
"""The model of what a reset cost, against growth worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest

from cwndtrace import events
from cwndtrace.analysis import cost
from tests.unit import frames

MSS = 1448
INFINITE = 0x7FFFFFFF


def schedule(segments: int, cwnd: int, ssthresh: int = INFINITE, **more: Any) -> list[int]:
    return cost.schedule(segments * MSS, cwnd, ssthresh, mss=MSS, **more)


# ---- growth ----------------------------------------------------------------------------------------


def test_slow_start_doubles() -> None:
    assert schedule(150, 10) == [10, 20, 40, 80]
    assert schedule(151, 10) == [10, 20, 40, 80, 1]
    assert schedule(10, 10) == [10]
    assert schedule(0, 10) == []


def test_part_of_a_segment_is_a_segment() -> None:
    assert cost.schedule(10 * MSS + 1, 10, INFINITE, mss=MSS) == [10, 1]


def test_from_the_threshold_on_it_is_the_congestion_controls_growth() -> None:
    assert schedule(170, 10, 30, ca="reno", target=40) == [10, 20, 30, 31, 32, 33, 14]
    assert schedule(170, 10, 30, ca="cubic", target=40) == [10, 20, 30, 40, 41, 29]
    # Without a window that its curve is known to reach, cubic is as slow as reno.
    assert schedule(120, 30, 30, ca="cubic") == [30, 31, 32, 27]


def test_the_receivers_window_is_a_limit() -> None:
    assert schedule(60, 10, limit_bytes=25 * MSS) == [10, 20, 25, 5]
    assert schedule(3, 10, limit_bytes=100) == [1, 1, 1]


def test_durations() -> None:
    assert cost.duration_us([10, 20, 40], rtt_us=50_000, mss=MSS) == 150_000
    assert cost.duration_us([], rtt_us=50_000, mss=MSS) == 0
    # 100 segments need 14.48 ms at 10 MB/s: the line is idle in the first two of three round trips of 50 ms.
    by_rate = cost.duration_us([10, 20, 100], rtt_us=50_000, mss=MSS, rate=10e6)
    assert by_rate == pytest.approx(150_000 + 14_480)
    # And a bottleneck in these of 5 ms.
    assert cost.duration_us([100, 100], rtt_us=5000, mss=MSS, rate=10e6) == pytest.approx(5000 + 2 * 14_480)


# ---- until a window is back ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cwnd", "ssthresh", "target", "more", "rounds"),
    [
        (10, INFINITE, 80, {}, 3),
        (10, INFINITE, 81, {}, 4),
        (174, 1044, 1392, {}, 4),
        (10, 30, 40, {"ca": "cubic"}, 3),
        (10, 30, 40, {"ca": "reno"}, 12),
        (40, 30, 40, {}, 0),
        (10, INFINITE, 80, {"limit_bytes": 40 * MSS}, 3),
        (10, INFINITE, 80, {"limit_bytes": 39 * MSS}, -1),
        (1, 1, 0x7FFFFFFF, {"ca": "reno"}, -1),
    ],
)
def test_the_round_trips_until_a_window_is_back(
    cwnd: int, ssthresh: int, target: int, more: dict[str, Any], rounds: int
) -> None:
    assert cost.regain(cwnd, ssthresh, target, mss=MSS, **more) == rounds


# ---- the frames of a trace -------------------------------------------------------------------------


def resets(*rows: events.Records) -> pd.DataFrame:
    return frames.pandas(frames.table("cwnd_reset", *rows)).assign(connection="a")


def recoveries(*rows: tuple[int, int, str, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["skaddr", "reset_ts_ns", "outcome", "duration_us"])


def reset(at_s: float = 1.0, **more: Any) -> events.Records:
    fallen = {"cwnd_before": 80, "cwnd_after": 10, "ssthresh_before": INFINITE, "ssthresh_after": INFINITE}
    path = {"mss": MSS, "srtt_us": 50_000, "snd_wnd": 10_000_000, "ca_name": b"cubic"}
    return frames.reset(at_s, **{**fallen, **path, **more})


def snapshots(bytes_sent: int) -> pd.DataFrame:
    return pd.DataFrame({"connection": ["a"], "bytes_sent": [bytes_sent]})


def test_a_price_is_the_difference_in_round_trips() -> None:
    (row,) = cost.price(resets(reset()).assign(burst_bytes=150 * MSS)).to_dict("records")
    assert (row["rounds_after"], row["rounds_before"]) == (4, 2)
    assert (row["predicted_us"], row["regain_us"]) == (100_000, 150_000)


def test_a_burst_that_fits_costs_nothing() -> None:
    (row,) = cost.price(resets(reset()).assign(burst_bytes=10 * MSS)).to_dict("records")
    assert row["predicted_us"] == 0


def test_what_is_not_known_is_missing() -> None:
    timeout, unknown, closed = cost.price(
        resets(reset(reason="rto_loss"), reset(), reset(snd_wnd=20 * MSS)).assign(burst_bytes=[MSS, math.nan, 10 * MSS])
    ).to_dict("records")
    assert all(math.isnan(timeout[name]) for name in cost.COLUMNS if name != "burst_bytes")
    assert math.isnan(unknown["predicted_us"])
    assert unknown["regain_us"] == 150_000
    assert math.isnan(closed["regain_us"])
    assert closed["predicted_us"] == 0


def test_measured_stands_beside_predicted() -> None:
    first, second = reset(1, skaddr=1, bytes_sent=0), reset(2, skaddr=2, bytes_sent=0)
    began, again = int(first["ts_ns"][0]), int(second["ts_ns"][0])
    known = recoveries(
        (1, began, "regained", 151_000.0),
        (2, again, "reset_again", 9.0),
        # Another reset of the same socket.
        (2, began, "regained", 8.0),
    )
    made = cost.predict(resets(first, second), snapshots(150 * MSS), known)
    assert list(made["regained_us"].fillna(-1)) == [151_000, -1]
    assert list(made["regain_us"]) == [150_000, 150_000]
    assert set(cost.COLUMNS) | set(cost.MEASURED) <= set(made.columns)
    # A trace without any.
    none = cost.predict(resets(first), snapshots(150 * MSS), recoveries())
    assert none["regained_us"].isna().all()


def test_a_bursts_size_is_what_was_sent_until_the_next_reset() -> None:
    rows = [frames.reset(at, bytes_sent=sent) for at, sent in ((1.0, 1000), (2.0, 4000), (3.0, 9000))]
    assert list(cost.bursts(resets(*rows), snapshots(9500))) == [3000, 5000, 500]
    # Nothing later tells.
    assert list(cost.bursts(resets(*rows), snapshots(8000)).fillna(-1)) == [3000, 5000, -1]
