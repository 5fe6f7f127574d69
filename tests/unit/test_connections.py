# SPDX-License-Identifier: Apache-2.0
"""Summaries of connections equal figures that are computed by hand from a few records.

Above all, records of one socket get the same key, and records of two sockets never do.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cwndtrace.analysis import connections
from tests.unit import frames

NONE = frames.pandas(frames.snapshots())
NO_RESET = frames.pandas(frames.table("cwnd_reset"))


def resets(*rows: Any) -> pd.DataFrame:
    return frames.pandas(frames.table("cwnd_reset", *rows))


def snapshots(*rows: dict[str, Any]) -> pd.DataFrame:
    return frames.pandas(frames.snapshots(*rows))


# ---- which records belong together ----------------------------------------------------------------


def keys(r: pd.DataFrame, c: pd.DataFrame) -> tuple[list[str], list[str]]:
    a, b = connections.identify(r, c)
    return a["connection"].tolist(), b["connection"].tolist()


def test_a_cookie_and_a_namespace_identify_a_connection() -> None:
    r = resets(frames.reset(1), frames.reset(2, sock_cookie=0x60), frames.reset(3, netns_ino=7))
    c = snapshots(frames.snapshot(0), frames.snapshot(0, netns_ino=7, sock_cookie=0x60))
    assert keys(r, c) == (["4026531840:5f", "4026531840:60", "7:5f"], ["4026531840:5f", "7:60"])


def test_a_reset_without_a_cookie_joins_the_connection_that_got_one_later() -> None:
    by_reset = resets(frames.reset(1, sock_cookie=0), frames.reset(2))
    assert keys(by_reset, NONE)[0] == ["4026531840:5f"] * 2
    by_snapshot = resets(frames.reset(1, sock_cookie=0))
    assert keys(by_snapshot, snapshots(frames.snapshot(2)))[0] == ["4026531840:5f"]


@pytest.mark.parametrize(
    "other", [{"netns_ino": 7}, {"sport": 444}, {"dport": 1}, {"saddr": "10.1.0.2"}, {"daddr": "10.2.0.8"}]
)
def test_a_reset_without_a_cookie_joins_no_connection_with_other_endpoints(other: dict[str, Any]) -> None:
    (key,), _ = keys(resets(frames.reset(1, sock_cookie=0)), snapshots(frames.snapshot(2, **other)))
    assert key == "4026531840:10.1.0.1:443-10.2.0.9:51324@ffff888012345600"


def test_a_reset_without_a_cookie_joins_no_connection_that_was_last_seen_before_it() -> None:
    # A socket keeps its cookie, so a socket without one can't have had one before.
    (key,), _ = keys(resets(frames.reset(5, sock_cookie=0)), snapshots(frames.snapshot(2)))
    assert "@" in key


def test_two_sockets_that_use_the_same_ports_in_turn_stay_separate() -> None:
    r = resets(frames.reset(1, sock_cookie=0, skaddr=0x1000), frames.reset(9, sock_cookie=0x77, skaddr=0x2000))
    first, second = keys(r, snapshots(frames.snapshot(8, sock_cookie=0x77)))[0]
    assert first.endswith("@1000")
    assert second == "4026531840:77"
    # The second reset, which comes after the other socket's snapshot, has the first one's skaddr.
    r = resets(frames.reset(1, sock_cookie=0, skaddr=0x1000), frames.reset(3, sock_cookie=0x5F, skaddr=0x1000))
    assert keys(r, snapshots(frames.snapshot(2, sock_cookie=0x77)))[0] == ["4026531840:5f"] * 2


def test_identify_keeps_the_order_of_rows_and_is_idempotent() -> None:
    r, c = frames.story(peers=3, seconds=20)
    once = connections.identify(frames.pandas(r), frames.pandas(c))
    twice = connections.identify(*once)
    for a, b, raw in zip(once, twice, (r, c), strict=True):
        pd.testing.assert_frame_equal(a, b)
        pd.testing.assert_frame_equal(a.drop(columns="connection"), frames.pandas(raw))


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 12))
def test_the_key_of_a_record_does_not_depend_on_the_order_of_records(random: Any, number: int) -> None:
    # A cookie belongs to one socket; a record without a cookie may belong to any.
    sockets = [(5, 0x1000), (0, 0x1000), (0, 0x2000)]
    picked = [(random.randrange(9), *random.choice(sockets)) for _ in range(number)]
    rows = [frames.reset(at, sock_cookie=cookie, skaddr=skaddr) for at, cookie, skaddr in picked]
    seen = [frames.snapshot(random.randrange(9), sock_cookie=random.choice([5, 6]))]
    order = list(range(number))
    random.shuffle(order)
    straight, _ = keys(resets(*rows), snapshots(*seen))
    shuffled, _ = keys(resets(*(rows[i] for i in order)), snapshots(*seen))
    assert [straight[i] for i in order] == shuffled


# ---- summary of connections -----------------------------------------------------------------------


def test_the_summary_of_a_connection_equals_figures_computed_by_hand() -> None:
    r = resets(
        frames.reset(10, idle_us=2_100_000, cwnd_before=2827, cwnd_after=44, tgid=4242),
        frames.reset(20, idle_us=900_000, cwnd_before=300, cwnd_after=150),
        frames.reset(21, reason="rto_loss", idle_us=700_000, cwnd_before=150, cwnd_after=3, tgid=0, comm=b""),
        frames.reset(25, reason="app_limited", idle_us=1, cwnd_before=100, cwnd_after=60, rto_us=400_000),
    )
    c = snapshots(
        frames.snapshot(0, cwnd=10, ca_name="reno"), frames.snapshot(30, cwnd=90, bytes_sent=7, comm="", pid=0)
    )
    (row,) = connections.summary(r, c).to_dict("records")
    expected = {
        "connection": "4026531840:5f", "netns_ino": frames.NETNS, "sock_cookie": 0x5F, "family": 2,
        "saddr": "10.1.0.1", "sport": 443, "daddr": "10.2.0.9", "dport": 51324, "pid": 4242, "comm": "replica",
        "ca_name": "cubic", "state": "ESTAB", "seen_s": 30.0, "snapshots": 2, "resets": 4, "resets_idle": 2,
        "resets_rto_loss": 1, "resets_app_limited": 1, "idle_total_us": 3_000_000, "idle_longest_us": 2_100_000,
        "cwnd_min_segments": 3, "cwnd_max_segments": 2827, "cwnd_last_segments": 90, "srtt_us": 107_000,
        "rto_us": 308_000, "bytes_sent": 7, "bytes_acked": 30_000_000, "total_retrans_segments": 0,
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected
    assert row["first_seen"] == pd.Timestamp("2026-11-18T12:30:00Z")
    assert row["last_seen"] == pd.Timestamp("2026-11-18T12:30:30Z")
    assert list(row) == list(connections.COLUMNS)


def test_a_connection_without_resets_is_in_the_summary() -> None:
    (row,) = connections.summary(NO_RESET, snapshots(frames.snapshot(0))).to_dict("records")
    assert (row["resets"], row["idle_total_us"], row["idle_longest_us"], row["cwnd_last_segments"]) == (0, 0, 0, 2827)


def test_a_connection_without_snapshots_is_in_the_summary() -> None:
    (row,) = connections.summary(resets(frames.reset(1, sock_cookie=0)), NONE).to_dict("records")
    assert (row["sock_cookie"], row["snapshots"], row["state"], row["resets"]) == (0, 0, "", 1)
    assert row["comm"] == "replica"


def test_connections_with_the_most_resets_and_idle_time_come_first() -> None:
    r = resets(
        frames.reset(1, sock_cookie=1), frames.reset(2, sock_cookie=1),
        frames.reset(3, sock_cookie=2, idle_us=9_000_000), frames.reset(4, sock_cookie=3, idle_us=8_000_000),
    )  # fmt: skip
    out = connections.summary(r, snapshots(frames.snapshot(0, sock_cookie=4)))
    assert out["sock_cookie"].tolist() == [1, 2, 3, 4]


def test_the_largest_cookies_and_byte_counts_are_exact() -> None:
    top = 2**64 - 1
    out = connections.summary(resets(frames.reset(1, sock_cookie=top, bytes_sent=2**62 + 1)), NONE)
    assert out["sock_cookie"].tolist() == [top]
    assert out["bytes_sent"].tolist() == [2**62 + 1]


def test_no_records_give_an_empty_frame_with_the_same_columns_and_types() -> None:
    empty = connections.summary(NO_RESET, NONE)
    full = connections.summary(resets(frames.reset(1)), snapshots(frames.snapshot(0)))
    assert (len(empty), list(empty.columns)) == (0, list(connections.COLUMNS))
    assert empty.dtypes.to_dict() == full.dtypes.to_dict()


def test_summary_does_not_change_its_arguments() -> None:
    r, c = resets(frames.reset(1)), snapshots(frames.snapshot(0))
    before = r.copy(), c.copy()
    connections.summary(r, c)
    pd.testing.assert_frame_equal(r, before[0])
    pd.testing.assert_frame_equal(c, before[1])
