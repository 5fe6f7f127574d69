# SPDX-License-Identifier: Apache-2.0
"""What must be true of all figures, whatever was recorded: costs, idle periods, bursts, and captures put together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cwndtrace.analysis import block_io, cost, idle_cause, recovery, verdict
from cwndtrace.trace import Trace
from tests.unit import frames
from tests.unit.examples import FEW

INF = 2_147_483_647
MOST_US = 2**32 - 1
RESET = st.fixed_dictionaries(
    {
        "at_s": st.floats(0, 50),
        "reason": st.sampled_from(["idle", "rto_loss", "app_limited"]),
        "cwnd_before": st.integers(1, 5000),
        "cwnd_after": st.integers(1, 5000),
        "ssthresh_before": st.just(INF) | st.integers(2, 5000),
        "ssthresh_after": st.just(INF) | st.integers(2, 5000),
        "idle_us": st.integers(0, 10**8),
        "last_rcv_us": st.integers(0, 10**8),
        "srtt_us": st.integers(0, 10**7),
        "min_rtt_us": st.just(MOST_US) | st.integers(0, 10**7),
        "mss": st.integers(0, 9000),
        "snd_wnd": st.integers(0, 10**8),
        "bytes_sent": st.integers(0, 10**9),
        "ca_name": st.sampled_from([b"cubic", b"reno", b"bbr"]),
    }
)
"""A reset of any values, also of those that no kernel would give together."""


def table_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return resets as a Trace has them, each of a connection "a" or "b"."""
    made = frames.pandas(frames.table("cwnd_reset", *(frames.reset(**row) for row in rows)))
    return made.assign(connection=["ab"[n % 2] for n in range(len(made))])


# ---- costs ------------------------------------------------------------------------------------------


@FEW
@given(st.lists(RESET, max_size=6), st.lists(st.tuples(st.integers(0, 5), st.floats(0, 9), st.integers(0, 10**7))))
def test_no_cost_is_negative(rows: list[dict[str, Any]], followed: list[tuple[int, float, int]]) -> None:
    resets = table_of(rows)
    known = [(rows[n]["at_s"], took, late) for n, took, late in followed if n < len(rows)]
    spans = [frames.recovered(at, took, cost_us=late, other_us=late // 3) for at, took, late in known]
    windows = recovery.with_duration(frames.pandas(frames.table("cwnd_recovery", *spans)), resets)
    seen = frames.pandas(frames.snapshots(frames.snapshot(55, bytes_sent=10**9))).assign(connection="a")
    judged = verdict.resets(cost.predict(resets, seen, windows))
    assert len(judged) == len(rows)
    for name in ("cost_us", "other_us", "lost_us", "regain_us", "burst_bytes", "rounds_after", "rounds_before"):
        assert not (judged[name] < 0).any(), name


@FEW
@given(RESET, st.integers(0, 10**8))
def test_a_window_that_fell_never_saves_time(row: dict[str, Any], burst: int) -> None:
    """Where a reset leaves the threshold as it was, a smaller window takes as many round trips, or more."""
    fallen = min(row["cwnd_before"], row["cwnd_after"])
    reset = row | {"cwnd_after": fallen, "ssthresh_after": row["ssthresh_before"], "reason": "idle"}
    (priced,) = cost.price(table_of([reset]).assign(burst_bytes=float(burst))).to_dict("records")
    assert priced["rounds_lost"] >= 0
    assert not priced["predicted_us"] < 0


PATH = st.fixed_dictionaries(
    {
        "cwnd": st.integers(0, 3000),
        "ssthresh": st.just(INF) | st.integers(2, 3000),
        "limit_bytes": st.integers(0, 10**7),
        "mss": st.sampled_from([1, 536, 1448, 8948]),
        "target": st.integers(0, 3000),
        "reno": st.booleans(),
    }
)


@given(PATH, st.integers(0, 10**7))
def test_twice_the_burst_is_never_cheaper_and_never_more_than_twice_as_dear(path: dict[str, Any], burst: int) -> None:
    both = {name: np.array([value] * 2) for name, value in path.items()}
    one, two = cost.rounds(np.array([burst, 2 * burst]), **both).tolist()
    assert one <= two <= 2 * one


# Slow start that ended at 8 lost the rest of its ACKs, so that avoidance from 7 was faster.
SOON_OVER = {"cwnd": 7, "ssthresh": 2, "limit_bytes": 9, "mss": 1, "target": 9, "reno": False}


@given(PATH, st.integers(0, 10**7), st.sampled_from(["cwnd", "ssthresh", "limit_bytes"]), st.integers(0, 3000))
@example(SOON_OVER, 16, "ssthresh", 6)
def test_more_room_never_takes_longer(path: dict[str, Any], burst: int, name: str, more: int) -> None:
    roomy = path | {name: path[name] + more * (path["mss"] if name == "limit_bytes" else 1)}
    both = {key: np.array([path[key], roomy[key]]) for key in path}
    before, after = cost.rounds(np.array([burst, burst]), **both).tolist()
    assert after <= before


# ---- idle periods -----------------------------------------------------------------------------------

BLOCK = st.fixed_dictionaries(
    {
        "at_s": st.floats(0, 60),
        "latency_us": st.floats(0, 10**7),
        "tgid": st.sampled_from([4242, 777]),
        "tid": st.sampled_from([4243, 778]),
        "cgroup_id": st.sampled_from([1, 2]),
        "op": st.sampled_from(["read", "write"]),
    }
)


@FEW
@given(st.lists(RESET, max_size=5), st.lists(BLOCK, max_size=8), st.booleans())
def test_the_parts_of_an_idle_period_add_up_to_it(
    rows: list[dict[str, Any]], blocks: list[dict[str, Any]], recorded: bool
) -> None:
    resets = table_of(rows)
    requests = block_io.with_latency(
        frames.pandas(frames.table("block_io", *(frames.block(**each) for each in blocks))), {}
    )
    ordered = requests.sort_values("start_ns", kind="stable", ignore_index=True)
    windows = recovery.with_duration(frames.pandas(frames.table("cwnd_recovery")), resets)
    caused = idle_cause.with_cause(resets, ordered, windows, recorded=recorded)
    parts = caused[["peer_us", "unclear_us", "disk_us", "application_us"]]
    assert (parts >= 0).all(axis=None)
    idle = (resets["reason"].astype(str) == "idle").to_numpy()
    wanted = np.where(idle, resets["idle_us"].to_numpy(np.float64), 0)
    assert parts.sum(axis=1).to_numpy() == pytest.approx(wanted, abs=0.01)
    assert ((caused["cause"] != "") == idle).all()


# ---- captures put together --------------------------------------------------------------------------


def half(seed: int, number: int) -> dict[str, pa.Table]:
    """Return the tables of some connections, of other processes and addresses for each ``number``."""
    ends = f"10.1.0.{number}", f"10.2.0.{number}"
    resets, seen = frames.story(seed, seconds=20, number=number, peers=2, ends=ends, comm=f"app{number}")
    at = resets.schema.get_field_index("skaddr")
    field = resets.schema.field(at)
    moved = pa.array([address + 2**20 * number for address in resets["skaddr"].to_pylist()], field.type)
    resets = resets.set_column(at, field, moved)
    requests = frames.disk(40, seed, seconds=20)
    return {
        "resets": resets, "connections": seen, "recoveries": frames.followed(resets, seen), "block_io": requests,
    }  # fmt: skip


def figures(trace: Trace) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the verdict on each reset and the figures of each connection, in an order that all captures share."""
    judged = trace.verdicts.drop(columns=["disk_last", "row"], errors="ignore")
    rows = trace.summary()
    return (
        judged.sort_values(["connection", "ts_ns"], ignore_index=True),
        rows.sort_values("connection", ignore_index=True),
    )


@settings(max_examples=max(1, settings().max_examples // 12))
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_report_of_two_captures_joined_is_that_of_both(
    tmp_path_factory: pytest.TempPathFactory, first: int, second: int
) -> None:
    folder = tmp_path_factory.mktemp("joined")
    halves = half(first, 1), half(second, 2)
    whole = {name: pa.concat_tables([each[name] for each in halves]) for name in halves[0]}
    one, two = (frames.capture(folder / f"{n}.cwnd", **tables) for n, tables in enumerate(halves))
    both = frames.capture(folder / "both.cwnd", **whole)
    for got, wanted in zip(figures(both), zip(figures(one), figures(two), strict=True), strict=True):
        expected = pd.concat(wanted).sort_values([*("connection", "ts_ns")][: 1 + ("ts_ns" in got)], ignore_index=True)
        pd.testing.assert_frame_equal(got, expected, check_dtype=False)
    for name in ("resets", "harmful", "lost_us", "predicted_us", "connections_seen"):
        assert getattr(both.host(), name) == getattr(one.host(), name) + getattr(two.host(), name), name
    counted = [each.block_summary().set_index("op")["count"] for each in (both, one, two)]
    pd.testing.assert_series_equal(counted[0], counted[1].add(counted[2], fill_value=0), check_dtype=False)
