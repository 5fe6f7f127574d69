# SPDX-License-Identifier: Apache-2.0
"""The cost of a reset equals a simulation of one burst, and is bounded by what the window did afterwards."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cwndtrace.analysis import cost, recovery
from tests.unit import frames

INF = 2_147_483_647


def simulated(burst: int, cwnd: int, ssthresh: int, limit_bytes: int, mss: int, target: int, reno: bool) -> int:
    """Return the round trips that one burst takes, simulated one at a time."""
    left, limit = math.ceil(burst / mss), max(1, limit_bytes // mss)
    window, trips = float(max(cwnd, 1)), 0
    while left > 0:
        sent = min(left, int(window), limit)
        trips, left = trips + 1, left - sent
        if sent < int(window):
            continue
        if window < ssthresh:
            window = max(min(window + sent, float(ssthresh)), avoided(window, target, reno))
        else:
            window = avoided(window, target, reno)
    return trips


def avoided(window: float, target: int, reno: bool) -> float:
    """Return the window after a round trip of congestion avoidance."""
    return window + 1 if reno or window >= target else min(window * 1.5, float(target))


BURST = st.tuples(
    st.integers(0, 3_000_000), st.integers(0, 500), st.one_of(st.integers(2, 600), st.just(INF)),
    st.integers(0, 1_000_000), st.sampled_from([536, 1448]), st.integers(0, 600), st.booleans(),
)  # fmt: skip


@given(st.lists(BURST, max_size=8))
@example([(16 * 536, 7, 8, 10**6, 536, 9, False)])
def test_rounds_equal_those_of_a_simulation(rows: list[tuple[Any, ...]]) -> None:
    names = ("burst", "cwnd", "ssthresh", "limit_bytes", "mss", "target", "reno")
    columns = {n: np.array([row[i] for row in rows], dtype=bool if n == "reno" else int) for i, n in enumerate(names)}
    assert cost.rounds(**columns).tolist() == [simulated(*row) for row in rows]


def test_rounds_does_not_change_its_arguments() -> None:
    one = {n: np.array([5]) for n in ("cwnd", "ssthresh", "limit_bytes", "mss", "target")}
    burst = np.array([1000])
    cost.rounds(burst, **one, reno=np.array([True]))
    assert (burst.tolist(), {v.item() for v in one.values()}) == ([1000], {5})


def regained(cwnd: int, ssthresh: int, limit_bytes: int, mss: int, target: int, reno: bool) -> int:
    """Return the round trips in which a window grows to its target, -1 if it never does."""
    limit, window, trips = max(1, limit_bytes // mss), float(max(cwnd, 1)), 0
    while window < target:
        if int(window) > limit or trips == 10_000:
            return -1
        if window < ssthresh:
            window = max(min(window + int(window), float(ssthresh)), avoided(window, target, reno))
        else:
            window = avoided(window, target, reno)
        trips += 1
    return trips


@given(st.lists(BURST, max_size=8))
@example([(0, 10, INF, 40 * 1448, 1448, 80, False), (0, 10, INF, 39 * 1448, 1448, 80, False)])
@example([(0, 0, 17, 8576, 536, 18, False)])
@example([(0, 1, 1, 10**13, 1448, INF, True), (0, 40, 30, 10**6, 1448, 40, True)])
def test_regain_equals_a_simulation(rows: list[tuple[Any, ...]]) -> None:
    names = ("cwnd", "ssthresh", "limit_bytes", "mss", "target", "reno")
    columns = {
        n: np.array([row[i + 1] for row in rows], dtype=bool if n == "reno" else int) for i, n in enumerate(names)
    }
    assert cost.regain(**columns).tolist() == [regained(*row[1:]) for row in rows]


@pytest.mark.parametrize(
    ("segments", "cwnd", "ssthresh", "more", "trips"),
    [
        (150, 10, INF, {}, 4),
        (151, 10, INF, {}, 5),
        (10, 10, INF, {}, 1),
        (0, 10, INF, {}, 0),
        # reno sends 10, 20, 30, 31, 32, 33 and then 13 segments, cubic 10, 20, 30, 40, 41 and then 29.
        (170, 10, 30, {"reno": True, "target": 40}, 7),
        (170, 10, 30, {"target": 40}, 6),
        (141, 10, 30, {"target": 40}, 5),
        # 10, 20, 25 and the remaining 5.
        (60, 10, INF, {"limit_bytes": 25 * 1448}, 4),
        (3, 10, INF, {"limit_bytes": 100}, 3),
    ],
)
def test_rounds_equal_those_computed_by_hand(
    segments: int, cwnd: int, ssthresh: int, more: dict[str, Any], trips: int
) -> None:
    path = {"cwnd": cwnd, "ssthresh": ssthresh, "limit_bytes": 10**9, "mss": 1448, "target": 0, "reno": False} | more
    arrays = {name: np.array([value]) for name, value in path.items()}
    assert cost.rounds(np.array([segments * 1448]), **arrays).tolist() == [trips]


def priced(*resets: Any, recoveries: Any = (), bytes_sent: int = 40_100_000 + 1_000_000) -> list[dict[Any, Any]]:
    r = frames.pandas(frames.table("cwnd_reset", *resets)).assign(connection="a")
    followed = recovery.with_duration(frames.pandas(frames.table("cwnd_recovery", *recoveries)), r)
    snapshots = frames.pandas(frames.snapshots(frames.snapshot(50, bytes_sent=bytes_sent))).assign(connection="a")
    out = cost.predict(r, snapshots, followed)
    names = [*cost.COLUMNS, *recovery.FOLLOWED]
    assert list(out.columns)[-len(names) :] == names
    return out.to_dict("records")


def test_the_cost_of_a_burst_equals_that_computed_by_hand() -> None:
    # 691 segments take five round trips of 44, 88, 176, 352 and 31, but only one with the window from before the reset.
    (row,) = priced(frames.reset(1))
    assert (row["burst_bytes"], row["rounds_after"], row["rounds_before"]) == (1_000_000, 5, 1)
    assert (row["rounds_lost"], row["predicted_us"]) == (4, 4 * 106_500)
    # The window grows from 44 to 88, 176, 352, 704, 1408, 2120 (ssthresh) and 2827 in seven round trips.
    assert row["regain_us"] == 7 * 107_000
    assert row["outcome"] == ""
    assert all(math.isnan(row[name]) for name in recovery.FOLLOWED if name not in ("outcome", "chain"))


def test_a_burst_ends_at_the_next_reset() -> None:
    first, last = priced(frames.reset(1), frames.reset(9, bytes_sent=40_100_000 + 5000))
    assert (first["burst_bytes"], first["rounds_lost"]) == (5000, 0)
    assert last["burst_bytes"] == 995_000


def test_a_timeout_has_no_predicted_cost() -> None:
    (row,) = priced(frames.reset(1, reason="rto_loss"))
    assert math.isnan(row["predicted_us"])
    assert math.isnan(row["regain_us"])


def test_an_unknown_burst_has_no_predicted_cost() -> None:
    (row,) = priced(frames.reset(1), bytes_sent=5)
    assert all(math.isnan(row[name]) for name in ("burst_bytes", "rounds_after", "rounds_lost", "predicted_us"))


def test_bytes_acknowledged_during_the_recovery_are_a_lower_bound_of_the_burst() -> None:
    followed = frames.recovered(1, outcome="closed", bytes_acked=1_000_000)
    (row,) = priced(frames.reset(1), recoveries=[followed], bytes_sent=5)
    assert (row["burst_bytes"], row["rounds_lost"]) == (1_000_000, 4)
    (row,) = priced(frames.reset(1), recoveries=[followed], bytes_sent=40_100_000 + 2_000_000)
    assert row["burst_bytes"] == 2_000_000


@pytest.mark.parametrize("late", [{"unsent_bytes": 1}, {"ts_ns": frames.MONO}])
def test_a_snapshot_that_does_not_show_the_whole_burst_is_not_used(late: dict[str, Any]) -> None:
    r = frames.pandas(frames.table("cwnd_reset", frames.reset(1))).assign(connection="a")
    seen = frames.snapshot(2, bytes_sent=40_200_000) | late
    snapshots = frames.pandas(frames.snapshots(seen)).assign(connection="a")
    assert cost.bursts(r, snapshots).isna().tolist() == [True]


def test_a_prediction_is_from_the_window_before_the_chain() -> None:
    followed = frames.recovered(1, outcome="reset_again", chain_window=2827, chain_resets=4, bytes_acked=9)
    (row,) = priced(frames.reset(1, cwnd_before=60), recoveries=[followed])
    assert (row["cwnd_before"], row["rounds_before"], row["rounds_lost"]) == (60, 1, 4)
    (row,) = priced(frames.reset(1, cwnd_before=60))
    assert row["rounds_before"] > 1


def test_what_was_measured_stands_beside_the_prediction() -> None:
    followed = frames.recovered(1, took_s=0.9, bytes_acked=3_000_000, cost_us=400_000, other_us=7)
    (row,) = priced(frames.reset(1), recoveries=[followed])
    assert (row["outcome"], row["cost_us"], row["other_us"], row["regained_us"]) == ("regained", 400_000, 7, 900_000)


def test_waiting_that_two_reasons_followed_at_once_counts_once() -> None:
    resets = [frames.reset(1), frames.reset(1.5, reason="app_limited"), frames.reset(3)]
    spans = [
        frames.recovered(1, took_s=1),
        frames.recovered(1.5, took_s=0.4, reason="app_limited"),
        frames.recovered(3, cost_us=5),
    ]
    rows = priced(*resets, recoveries=spans)
    assert [row["cost_us"] for row in rows] == [4 * 106_500, 0, 5]


def test_chains_are_told_apart_by_their_first_reset() -> None:
    number = (1, 2, 3, 1, 1, 2)
    resets = [frames.reset(at) for at in range(1, 7)]
    rows = priced(*resets, recoveries=[frames.recovered(at, chain_resets=n) for at, n in enumerate(number, start=1)])
    first = (1, 1, 1, 4, 5, 5)
    assert [row["chain"] for row in rows] == [frames.MONO + at * frames.SECOND for at in first]
    chains = recovery.chains(pd.DataFrame(rows).assign(lost_us=1.0))
    assert chains["resets"].tolist() == [3, 2]
    assert chains["every_us"].tolist() == [1e6, 1e6]


def test_a_count_of_an_older_version_below_zero_is_not_known() -> None:
    (row,) = priced(frames.reset(1), recoveries=[frames.recovered(1, outcome="closed", bytes_acked=2**64 - 5)])
    assert math.isnan(row["acked_bytes"])
    assert row["burst_bytes"] == 1_000_000


def test_a_window_that_is_as_large_as_before_is_regained_at_once() -> None:
    (row,) = priced(frames.reset(1, cwnd_before=44, cwnd_after=44))
    assert (row["regain_us"], row["rounds_lost"]) == (0, 0)


def test_a_window_above_the_receivers_window_is_never_regained() -> None:
    (row,) = priced(frames.reset(1, snd_wnd=1448 * 2000))
    assert math.isnan(row["regain_us"])


@pytest.mark.parametrize(("least", "counted"), [(100_000, 100_000), (2**32 - 1, 150_000)])
def test_costs_are_in_minimum_round_trips_where_they_are_known(least: int, counted: int) -> None:
    """srtt may include the queue that the burst before the idle time built up."""
    (row,) = priced(frames.reset(1, srtt_us=150_000, min_rtt_us=least))
    assert (row["round_us"], row["rounds_lost"], row["predicted_us"]) == (counted, 4, 4 * counted)
    assert row["regain_us"] == 7 * 150_000


def test_a_recovery_of_another_reset_or_socket_is_not_used() -> None:
    again, other = frames.recovered(2, took_s=0.1), frames.recovered(1, took_s=0.3, skaddr=7)
    (row,) = priced(frames.reset(1), recoveries=[again, other])
    assert math.isnan(row["regained_us"])


def test_price_keeps_other_columns_and_all_rows() -> None:
    r = frames.pandas(frames.story(seed=5)[0]).assign(burst_bytes=5.0)
    out = cost.price(r.sample(frac=1, random_state=1))
    pd.testing.assert_frame_equal(out[r.columns].sort_index(), r)


def test_no_resets_have_no_costs() -> None:
    assert priced() == []


def test_a_recovery_that_was_recorded_twice_costs_once() -> None:
    resets = frames.pandas(frames.table("cwnd_reset", frames.reset(1), frames.reset(9)))
    twice = frames.table("cwnd_recovery", *[frames.recovered(1)] * 2, frames.recovered(9))
    followed = recovery.with_duration(frames.pandas(twice), resets.assign(connection="a"))
    out = recovery.of_resets(resets, followed)
    assert len(out) == 2
    assert out["cost_us"].tolist() == [4 * 106_500] * 2


def test_a_reset_that_was_recorded_twice_gives_each_recovery_one_row() -> None:
    twice = frames.pandas(frames.table("cwnd_reset", *[frames.reset(1)] * 2)).assign(connection="a")
    followed = recovery.identify(frames.pandas(frames.table("cwnd_recovery", frames.recovered(1))), twice)
    assert followed["connection"].tolist() == ["a"]


def test_of_two_recoveries_that_overlap_only_the_first_has_a_cost() -> None:
    resets = frames.pandas(frames.table("cwnd_reset", *(frames.reset(at) for at in (1, 2, 3, 4))))
    spans = frames.table(
        "cwnd_recovery", *(frames.recovered(at, took) for at, took in ((1, 2.5), (2, 0.1), (3, 1), (4, 1)))
    )
    followed = recovery.with_duration(frames.pandas(spans), resets.assign(connection="a"))
    assert (recovery.of_resets(resets, followed)["cost_us"] > 0).tolist() == [True, False, False, True]


def test_round_trips_of_a_recovery_are_missing_where_no_round_trip_time_is_known() -> None:
    records = frames.table("cwnd_recovery", frames.recovered(1, srtt_us=0), frames.recovered(2, 0.5, srtt_us=100_000))
    resets = frames.pandas(frames.table("cwnd_reset", frames.reset(1), frames.reset(2))).assign(connection="a")
    out = recovery.with_duration(frames.pandas(records), resets)
    assert out["duration_us"].tolist() == [500_000, 500_000]
    assert math.isnan(out["round_trips"][0])
    assert out["round_trips"][1] == 5
