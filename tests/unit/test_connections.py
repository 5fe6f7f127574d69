# SPDX-License-Identifier: Apache-2.0
"""Summaries of connections equal figures that are computed by hand from a few records.

Above all, records of one socket get the same key, and records of two sockets never do.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwndtrace.analysis import connections
from tests.unit import frames
from tests.unit.examples import FEW

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


@FEW
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
    seen = [frames.snapshot(at, cwnd=cwnd) for at, cwnd in ((0, 44), (5, 12), (10, 90), (15, 60))]
    (row,) = connections.summary(NO_RESET, snapshots(*seen)).to_dict("records")
    assert (row["resets"], row["idle_total_us"], row["idle_longest_us"]) == (0, 0, 0)
    assert [row[f"cwnd_{which}_segments"] for which in ("min", "max", "last")] == [12, 90, 60]


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


# ---- who a connection belongs to --------------------------------------------------------------------


def named_rows(*rows: dict[str, Any], **columns: list[Any]) -> pd.DataFrame:
    """Return one row of ``summary`` per snapshot, with ``columns`` that a Trace of this version adds."""
    return connections.summary(NO_RESET, snapshots(*rows).assign(**columns))


def test_names_are_those_of_the_newest_record_that_has_them() -> None:
    seen = [frames.snapshot(at, pid=pid, comm=f"now{pid}") for at, pid in ((0, 7), (2, 8), (4, 8))]
    columns: dict[str, list[Any]] = {
        "workload": ["a.service", "b.service", ""], "process": ["sshd", "nginx", ""], "cmdline": ["x", "nginx -g", ""],
    }  # fmt: skip
    (row,) = named_rows(*seen, **columns).to_dict("records")
    assert {name: row[name] for name in ("workload", "process", "cmdline")} == {
        "workload": "b.service", "process": "now8", "cmdline": "nginx -g",
    }  # fmt: skip


def test_the_thread_is_that_of_the_last_reset_of_the_process() -> None:
    rows = [
        frames.reset(1, comm=b"event_engine"),
        frames.reset(2, tgid=0, comm=b"swapper/0"),
        frames.reset(3, tgid=99, comm=b"other"),
    ]
    (row,) = connections.summary(resets(*rows), snapshots(frames.snapshot(9, comm="grpc"))).to_dict("records")
    assert (row["process"], row["thread"], row["pid"]) == ("grpc", "event_engine", 4242)


@pytest.mark.parametrize("nothing", [None, "", float("nan")])
def test_old_records_and_missing_values_give_no_name_and_no_direction(nothing: object) -> None:
    columns: dict[str, Any] = {n: [nothing] for n in ("workload", "process", "cmdline", "listener", "listener_pid")}
    columns["listener_pid"] = [float("nan")]
    seen = snapshots(frames.snapshot())
    old = seen.drop(columns=[*columns], errors="ignore")
    for rows in (old, seen.assign(**columns)):
        (row,) = connections.summary(NO_RESET, rows).to_dict("records")
        assert (row["workload"], row["cmdline"], row["service"], row["service_port"]) == ("", "", "", 0)
        assert row["process"] == row["comm"] == "replica"
        assert pd.isna(row["outgoing"])


def test_a_service_is_a_port_on_which_a_process_listens() -> None:
    seen = [frames.snapshot(0, sock_cookie=n) for n in (1, 2, 3, 4)]
    out = named_rows(*seen, listener_pid=[10, 0, None, 11], listener=["nginx", "", "", ""])
    assert out["service"].tolist() == ["nginx:443", "", "nginx:443", "nginx:443"]
    assert out["service_port"].tolist() == [443, 0, 443, 443]
    assert out["outgoing"].tolist() == [False, True, False, False]


def test_a_service_stays_one_when_its_listener_is_gone() -> None:
    out = named_rows(frames.snapshot(0), frames.snapshot(5), listener_pid=[10, 0], listener=["nc", ""])
    assert out["service"].tolist() == ["nc:443"]
    # A listener without a name is still one.
    assert named_rows(frames.snapshot(0), listener_pid=[10])["service"].tolist() == [":443"]


@pytest.mark.parametrize("other", [{"netns_ino": 7}, {"saddr": "10.1.0.2"}, {"sport": 444}])
def test_a_connection_of_unknown_direction_gets_no_service_of_another_socket(other: dict[str, Any]) -> None:
    rows = resets(frames.reset(1, sock_cookie=9, **other))
    out = connections.summary(rows, snapshots(frames.snapshot(0)).assign(listener_pid=[10], listener=["nginx"]))
    assert sorted(out["service"]) == ["", "nginx:443"]
    same = connections.summary(
        resets(frames.reset(1, sock_cookie=9)),
        snapshots(frames.snapshot(0)).assign(listener_pid=[10], listener="nginx"),
    )
    assert same["service"].tolist() == ["nginx:443"] * 2
