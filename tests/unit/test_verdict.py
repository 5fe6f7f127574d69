# SPDX-License-Identifier: Apache-2.0
"""The verdicts on resets, connections and the host are right for records whose answer is known."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwndtrace import tcp
from cwndtrace.analysis import connections, verdict
from cwndtrace.present import text as in_words
from cwndtrace.store.meta import Meta
from cwndtrace.trace import Trace, load
from tests.unit import frames
from tests.unit.examples import FEW

SENT = 40_100_000
"""bytes_sent of ``frames.reset``."""


def capture(path: Path, resets: list[Any], snapshots: list[Any], **options: Any) -> Trace:
    options |= {"resets": frames.table("cwnd_reset", *resets), "connections": frames.snapshots(*snapshots)}
    return frames.capture(Path(mkdtemp(dir=path)) / "a.cwnd", **options)


def snapshots(burst: int, **last: Any) -> list[dict[str, Any]]:
    """Return the snapshots before and after a reset at 10 s that preceded a burst of ``burst`` bytes."""
    return [frames.snapshot(0, bytes_sent=SENT), frames.snapshot(20, bytes_sent=SENT + burst, **last)]


NONE: dict[str, Any] = dict.fromkeys(("cost_us", "held_us", "waiting_bytes"), 0)
FOLLOWED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "harmful": ({}, {}),
    "slight": ({}, {"cost_us": 999}),
    "nothing_waited": ({}, NONE),
    "as_before": ({}, NONE | {"waiting_bytes": 1_000_000}),
    "receiver_window": ({}, NONE | {"rwnd_limited_us": 60_000, "sndbuf_limited_us": 50_000}),
    "send_buffer": ({}, NONE | {"rwnd_limited_us": 50_000, "sndbuf_limited_us": 60_000}),
    "paced": ({}, NONE | {"other_us": 1_000}),
    "loss": ({}, NONE | {"after_loss_us": 60_000, "outcome": "loss"}),
    "unknown": ({}, NONE | {"outcome": "capture_end"}),
}
"""Fields of a reset and of its recovery, by verdict."""


def followed(tmp_path: Path, fields: dict[str, Any], record: dict[str, Any], sent: int = 1_000_000) -> Trace:
    recoveries = frames.table("cwnd_recovery", frames.recovered(10, **record))
    return capture(tmp_path, [frames.reset(10, **fields)], snapshots(sent), recoveries=recoveries)


def check(trace: Trace, label: str) -> dict[Any, Any]:
    """Assert that the reset, the connection and the host have this verdict; return the row of the reset."""
    (row,) = trace.verdicts.to_dict("records")
    assert (row["verdict"], trace.summary()["verdict"].tolist(), trace.host().verdict) == (label, [label], label)
    assert trace.host().text.startswith("Can't tell ") == (label == "unknown")
    assert "nan" not in trace.host().text
    (connection,) = trace.summary().to_dict("records")
    check_words(row, connection)
    return row


def check_words(row: dict[Any, Any], connection: dict[Any, Any]) -> None:
    """Assert that the sentences on a reset and its connection have all figures."""
    sentence = in_words.reset(row)
    assert sentence.startswith(f"{row['cwnd_before']} -> 44 segments")
    assert "1 of 1" not in connection["why"]
    assert "nan" not in sentence + connection["why"]


def test_a_small_cost_says_nothing_where_data_waited_after_a_loss(tmp_path: Path) -> None:
    record = NONE | {"cost_us": 900, "waiting_bytes": 1_000_000, "after_loss_us": 200_000, "outcome": "loss"}
    check(followed(tmp_path, {}, record), "loss")


@pytest.mark.quick(3)
@pytest.mark.parametrize("label", FOLLOWED)
def test_a_followed_reset_is_judged_by_what_its_data_waited_for(tmp_path: Path, label: str) -> None:
    row = check(followed(tmp_path, *FOLLOWED[label]), label)
    cost = {"harmful": 4 * 106_500, "slight": 999}.get(label, 0)
    assert row["lost_us"] == cost or (label == "unknown" and math.isnan(row["lost_us"]))


UNFOLLOWED: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "burst_fits": ({}, snapshots(44 * 1448)),
    "loss": ({"reason": "rto_loss"}, snapshots(1_000_000)),
    "handshake": ({"reason": "rto_loss", "tcp_state": "syn_sent", "snd_wnd": 0}, snapshots(1_000_000)),
    "receiver_window": ({"reason": "rto_loss", "snd_wnd": 0, "unacked_bytes": 5_000}, snapshots(1_000_000)),
    "nothing_sent": ({}, snapshots(0)),
    "unknown": ({}, snapshots(44 * 1448 + 1)),
}


@pytest.mark.parametrize("label", UNFOLLOWED)
def test_a_reset_that_was_not_followed_is_judged_where_nothing_can_have_waited(tmp_path: Path, label: str) -> None:
    fields, seen = UNFOLLOWED[label]
    trace = capture(tmp_path, [frames.reset(10, **fields)], seen, recoveries=frames.table("cwnd_recovery"))
    row = check(trace, label)
    assert row["lost_us"] == 0 or (label == "unknown" and math.isnan(row["lost_us"]))


LIMITED = {"reason": "app_limited", "unsent_bytes": 1, "unacked_bytes": 100_000, "snd_wnd": 101_447}
LIMITED_TOO = {"reason": "app_limited"}


EDGES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    *((*fields, label) for label, fields in FOLLOWED.items()),
    # A closed window that opens again isn't the congestion window's doing.
    ({"tgid": 0, "unsent_bytes": 1}, NONE, "receiver_window"),
    ({"tgid": 0, "unsent_bytes": 0}, NONE, "nothing_waited"),
    ({"tgid": 0, "unsent_bytes": 1}, {}, "harmful"),
    # A process that writes more into a closed window; or more to less than a segment of corked data.
    ({"unsent_bytes": 1448}, NONE, "receiver_window"),
    ({"unsent_bytes": 1, "snd_wnd": 0}, NONE, "receiver_window"),
    ({"unsent_bytes": 1447}, NONE, "nothing_waited"),
    # Of the peer's window, less than a segment is left, and data waits for more.
    (LIMITED, NONE | LIMITED_TOO, "receiver_window"),
    (LIMITED | {"snd_wnd": 101_448}, NONE | LIMITED_TOO, "nothing_waited"),
    (LIMITED | {"unsent_bytes": 0}, NONE | LIMITED_TOO, "nothing_waited"),
    (LIMITED, LIMITED_TOO, "harmful"),
    # What was measured until the capture ended is a lower bound.
    ({}, {"outcome": "capture_end", "cost_us": 1_000, "busy_us": 100_000}, "harmful"),
    ({}, {"outcome": "capture_end", "cost_us": 999}, "unknown"),
    ({}, {"outcome": "capture_end_idle", "cost_us": 999}, "slight"),
    ({}, NONE | {"rwnd_limited_us": 999}, "nothing_waited"),
    ({"srtt_us": 0, "min_rtt_us": 2**32 - 1}, {}, "harmful"),
]
"""Fields of a reset and of its recovery, and the verdict on them."""


@pytest.fixture(scope="module")
def edges(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A capture with a connection for each of them."""
    resets, recoveries, seen = [], [], []
    for number, (fields, record, _) in enumerate(EDGES):
        cookie = {"sock_cookie": 1 + number}
        socket = cookie | {"skaddr": 4096 * (1 + number)}
        resets.append(frames.reset(10, **fields, **socket))
        recoveries.append(frames.recovered(10, **record, **socket))
        seen += [row | cookie | {"dport": 20_000 + number} for row in snapshots(1_000_000)]
    recovered = frames.table("cwnd_recovery", *recoveries)
    return capture(tmp_path_factory.mktemp("edges"), resets, seen, recoveries=recovered)


@pytest.mark.parametrize("number", range(len(EDGES)))
def test_edges_of_the_verdicts(edges: Trace, number: int) -> None:
    (row,) = edges.verdicts.query("sock_cookie == @number + 1").to_dict("records")
    (connection,) = edges.summary().query("connection == @row['connection']").to_dict("records")
    assert (row["verdict"], connection["verdict"]) == (EDGES[number][2], EDGES[number][2])
    check_words(row, connection)


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"reason": "tlp_loss"}, "loss"),
        ({"reason": "rto_loss", "tcp_state": "syn_recv"}, "handshake"),
        ({"reason": "rto_loss", "tcp_state": "last_ack", "snd_wnd": 0}, "receiver_window"),
        ({"reason": "rto_loss", "tcp_state": "established", "snd_wnd": 1}, "loss"),
    ],
)
def test_losses_and_what_the_kernel_takes_for_one(tmp_path: Path, fields: dict[str, Any], label: str) -> None:
    trace = capture(tmp_path, [frames.reset(10, **fields)], snapshots(1_000_000))
    row = check(trace, label)
    assert (row["lost_us"], row["predicted_us"]) == (0, pytest.approx(math.nan, nan_ok=True))


def test_what_an_older_capture_does_not_say_is_not_taken_for_zero(tmp_path: Path) -> None:
    """It lacks tcp_state and unacked_bytes; its unsent_bytes may be the new data, if a process sent."""
    kinds: list[tuple[dict[str, Any], str]] = [
        ({"reason": "rto_loss", "snd_wnd": 0}, "loss"),
        ({"reason": "app_limited", "snd_wnd": 0, "unsent_bytes": 5_000}, "nothing_sent"),
        ({"unsent_bytes": 5_000}, "nothing_sent"),
        ({"unsent_bytes": 5_000, "snd_wnd": 0}, "nothing_sent"),
    ]
    for fields, label in kinds:
        trace = capture(tmp_path, [frames.reset(10, **fields)], snapshots(0), recoveries=frames.table("cwnd_recovery"))
        part = trace.path / "cwnd_reset" / "part-000001.parquet"
        pq.write_table(pq.read_table(part).drop_columns(["tcp_state", "unacked_bytes"]), part)
        (row,) = load(trace.path).verdicts.to_dict("records")
        assert row["verdict"] == label
        assert row["cause"] in ("", "application")
        assert "window" not in in_words.reset(row)


def test_an_older_version_did_not_measure_what_waited(tmp_path: Path) -> None:
    trace = followed(tmp_path, {}, {"bytes_acked": 1_000_000})
    r, c = trace.resets, trace.connections
    old = trace.recoveries.assign(cost_us=math.nan, chain_resets=math.nan, chain_window=math.nan)
    from cwndtrace.analysis import cost

    (row,) = verdict.resets(cost.predict(r, c, old)).to_dict("records")
    assert (row["verdict"], row["predicted_us"]) == ("unknown", 4 * 106_500)
    assert "an older version recorded it" in in_words.reset(row)
    assert "426 ms (estimated)" in in_words.reset(row)


def test_the_resets_of_a_harmful_connection_cost_one_percent_of_its_busy_time(tmp_path: Path) -> None:
    for busy_us, label in ((42_600_000, "harmful"), (42_700_000, "slight")):
        seen = [frames.snapshot(0, bytes_sent=SENT), frames.snapshot(60, bytes_sent=SENT + 10**6, busy_us=busy_us)]
        trace = capture(tmp_path, [frames.reset(10)], seen)
        assert (trace.verdicts["verdict"].tolist(), trace.host().verdict) == (["harmful"], label)
        assert trace.host().text.endswith("too little to matter: less than 1% of each connection's busy time.") == (
            label == "slight"
        )


def test_one_unknown_reset_leaves_the_question_open(tmp_path: Path) -> None:
    resets = [frames.reset(at, bytes_sent=SENT + at * 100_000) for at in range(1, 20)]
    measured = [frames.recovered(at, **NONE) for at in range(1, 19)]
    tables = {"recoveries": frames.table("cwnd_recovery", *measured)}
    trace = capture(tmp_path, resets, [frames.snapshot(30, bytes_sent=SENT + 10**7)], **tables)
    assert trace.host().verdict == "unknown"
    assert "the cost of 1 of 19 resets wasn't measured" in trace.host().text


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("meta", "why"),
    [
        ({"counts": {"cwnd_reset": {"kept": 1, "lost": 7}}}, "7 resets were lost"),
        ({"probes": {"idle": None}}, "no probe could see idle resets"),
        ({"left_out": {"cgroups": 3}}, "the filter"),
        ({"filters": {"min_idle_us": 2_000_000}}, "resets after less than 2.00 s of idle time were filtered out"),
    ],
)
def test_resets_that_the_trace_may_not_have_seen_leave_the_question_open(
    tmp_path: Path, meta: dict[str, Any], why: str
) -> None:
    quiet = {"recoveries": frames.table("cwnd_recovery", frames.recovered(10, **NONE))}
    assert capture(tmp_path, [frames.reset(10)], snapshots(9), **quiet).host().verdict == "nothing_waited"
    host = capture(tmp_path, [frames.reset(10)], snapshots(9), **quiet, **meta).host()
    assert host.verdict == "unknown"
    assert why in host.text
    late = capture(tmp_path, [frames.reset(10)], snapshots(1_000_000), **meta).host()
    assert late.verdict == "harmful"


def test_a_minority_of_the_connections_says_nothing_about_the_host(tmp_path: Path) -> None:
    seen = [frames.snapshot(at, sock_cookie=1, bytes_sent=SENT + at) for at in (0, 9)]
    few = [frames.snapshot(0, sock_cookie=2, bytes_sent=0)]
    many = [frames.snapshot(0, sock_cookie=n, bytes_sent=0) for n in (2, 3)]
    assert capture(tmp_path, [], [*seen, *few]).host().verdict == "no_reset"
    host = capture(tmp_path, [], [*seen, *many]).host()
    assert host.verdict == "unknown"
    assert "can't be told for 2 of 3 connections" in host.text


def test_all_traffic_of_a_connection_that_began_later_counts(tmp_path: Path) -> None:
    seen = [
        frames.snapshot(0, sock_cookie=1, bytes_sent=5_000, busy_us=50),
        frames.snapshot(2, sock_cookie=2, bytes_sent=7_000, busy_us=70, total_retrans=1),
        frames.snapshot(4, sock_cookie=2, bytes_sent=7_000, busy_us=70, total_retrans=1),
        frames.snapshot(4, sock_cookie=3, bytes_sent=9_000, ca_name="bbr"),
    ]
    rows = capture(tmp_path, [], seen).summary().set_index("sock_cookie")
    assert rows["sent_bytes"].to_dict() == {1: 0, 2: 7_000, 3: 9_000}
    assert rows["bursts"].to_dict() == {1: 0, 2: 1, 3: 1}
    assert (rows.loc[2, "busy_us"], rows.loc[2, "retrans_segments"]) == (70, 1)
    assert rows["busy_us"].isna().tolist() == [key == 1 for key in rows.index]
    assert rows["verdict"].to_dict() == {1: "unknown", 2: "loss", 3: "exempt"}


# ---- connections without a reset --------------------------------------------------------------------


@pytest.mark.quick(4)
@pytest.mark.parametrize(
    ("label", "fields", "meta"),
    [
        ("exempt", {"ca_name": "bbr"}, {}),
        ("sysctl_off", {}, {"sysctls": {str(frames.NETNS): {"name": "pod", tcp.IDLE_SYSCTL: 0}}}),
        ("nothing_sent", {"bytes_sent": SENT}, {}),
        ("send_buffer", {"busy_us": 10, "sndbuf_limited_us": 6}, {}),
        ("receiver_window", {"busy_us": 10, "rwnd_limited_us": 6}, {}),
        ("loss", {"total_retrans": 3}, {}),
        ("unknown", {}, {"probes": {"idle": None}}),
        ("no_reset", {}, {"sysctls": {str(frames.NETNS): {"name": "pod", tcp.IDLE_SYSCTL: None}, "7": 3}}),
    ],
)
def test_each_verdict_is_given_to_a_connection_without_resets(
    tmp_path: Path, label: str, fields: dict[str, Any], meta: dict[str, Any]
) -> None:
    trace = capture(
        tmp_path,
        [],
        [frames.snapshot(0, bytes_sent=SENT), frames.snapshot(9, **{"bytes_sent": SENT + 5} | fields)],
        **meta,
    )
    (row,) = trace.summary().to_dict("records")
    assert (row["verdict"], row["lost_us"], row["resets_harmful"]) == (label, 0, 0)
    assert "nan" not in row["why"]
    answer = "Can't tell whether window resets " if label == "unknown" else "No window was reset on 1 connection "
    assert trace.host().text.startswith(answer)


# ---- connections ------------------------------------------------------------------------------------


def test_a_connection_without_snapshots_has_sent_its_known_bursts(tmp_path: Path) -> None:
    resets = [frames.reset(at, bytes_sent=SENT + sent) for at, sent in ((10, 0), (20, 300_000), (30, 700_000))]
    trace = capture(tmp_path, resets, [])
    assert trace.summary()["sent_bytes"].tolist() == [700_000]


def test_the_figures_of_a_connection_equal_those_computed_by_hand(tmp_path: Path) -> None:
    resets = [
        frames.reset(10, bytes_sent=SENT, idle_us=616_000),
        frames.reset(21, bytes_sent=SENT + 1_000_000, idle_us=308_000 * 4),
        frames.reset(25, bytes_sent=SENT + 1_000_000 + 9),
    ]
    seen = [
        frames.snapshot(at, bytes_sent=SENT + sent, busy_us=busy, total_retrans=retrans)
        for at, sent, busy, retrans in (
            (0, -900, 0, 2), (5, 0, 1_000, 2), (12, 500_000, 2_000, 2), (19, 1_000_000, 1_000_000, 3),
            (30, 1_000_019, 2_000_000, 3), (40, 1_000_019, 2_000_000, 3),
        )
    ]  # fmt: skip
    (row,) = capture(tmp_path, resets, seen).summary().to_dict("records")
    # The bursts are three after idle resets, and those of the spans up to 5 s and 19 s; up to 40 s nothing was sent.
    assert (row["bursts"], row["after_reset_share"]) == (5, 0.6)
    assert (row["idle_per_rto_p50"], row["idle_per_rto_max"]) == (4.0, pytest.approx(2_100_000 / 308_000))
    assert (row["sent_bytes"], row["busy_us"], row["retrans_segments"]) == (1_000_919, 2_000_000, 1)
    assert (row["resets_harmful"], row["lost_us"], row["verdict"]) == (1, 426_000, "harmful")
    late = "1 of 3 resets made what was sent late, by 426 ms in all (measured)"
    assert row["why"] == f"{late}, 21 % of the connection's busy time"
    assert list(row) == [*connections.COLUMNS, *verdict.CONNECTION_COLUMNS, "why"]


def test_connections_are_sorted_by_lost_time_and_the_host_adds_them_up(tmp_path: Path) -> None:
    resets = [frames.reset(10, sock_cookie=c, skaddr=c, bytes_sent=SENT) for c in (1, 2, 3)]
    resets += [frames.reset(20, sock_cookie=3, skaddr=3, bytes_sent=SENT)]
    seen = [
        frames.snapshot(at, sock_cookie=c, bytes_sent=SENT + sent * (at > 0), busy_us=at * 100_000)
        for c, sent in ((1, 500_000), (2, 2_000_000), (3, 50), (4, 7))
        for at in (0, 30)
    ]
    trace = capture(tmp_path, resets, seen)
    rows, host = trace.summary(), trace.host()
    assert rows["sock_cookie"].tolist() == [2, 1, 3, 4]
    assert (host.resets, host.harmful, host.connections, host.connections_seen) == (4, 2, 2, 4)
    assert (host.lost_us, host.busy_us) == (rows["lost_us"].sum(), 12_000_000)
    assert (
        host.text
        == str(host)
        == (
            f"Idle resets made 2 bursts late on 2 of 4 connections, by {host.lost_us / 1000:.0f} ms in all (measured), "
            f"{100 * host.lost_us / 12e6:.1f} % of the 12.0 s of busy time."
        )
    )


def test_an_empty_capture_has_no_verdicts(tmp_path: Path) -> None:
    trace = capture(tmp_path, [], [])
    assert trace.host().text == "No TCP connection was seen."
    assert (len(trace.verdicts), len(trace.summary())) == (0, 0)
    full = capture(tmp_path, [frames.reset(10)], snapshots(9)).summary()
    assert list(trace.summary().columns) == list(full.columns)


@FEW
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_every_reset_has_a_verdict_and_connections_add_them_up(seed: int, peers: int) -> None:
    tables = frames.story(seed, seconds=20, peers=peers)
    measured = frames.pandas(frames.followed(*tables))
    r, c = connections.identify(*(frames.pandas(t) for t in tables))
    from cwndtrace.analysis import cost, recovery

    judged = verdict.resets(cost.predict(r, c, recovery.with_duration(measured, r)))
    rows = verdict.connections(connections.summary(r, c), judged, c, Meta())
    assert set(judged["verdict"]) <= set(verdict.VERDICTS)
    assert ((judged["lost_us"] > 0) == (judged["verdict"] == "harmful")).all()
    assert judged["lost_us"].notna().any()
    assert rows["lost_us"].sum() == pytest.approx(judged["lost_us"].sum())
    assert rows["resets_harmful"].sum() == (judged["verdict"] == "harmful").sum()
    assert all("nan" not in in_words.reset(row) for row in judged.to_dict("records"))


def test_verdicts_keep_the_order_of_resets(tmp_path: Path) -> None:
    trace = capture(tmp_path, [frames.reset(at, sock_cookie=c) for at, c in ((3, 2), (1, 1), (2, 2))], snapshots(5))
    pd.testing.assert_frame_equal(trace.verdicts[trace.resets.columns], trace.resets)


def test_a_congestion_control_that_never_resets_comes_before_the_sysctl(tmp_path: Path) -> None:
    off = {"sysctls": {str(frames.NETNS): {"name": "pod", tcp.IDLE_SYSCTL: 0}}}
    rows = [frames.snapshot(at, ca_name="bbr", bytes_sent=SENT + at) for at in (0, 20)]
    assert capture(tmp_path, [], rows, **off).summary()["verdict"].tolist() == ["exempt"]
