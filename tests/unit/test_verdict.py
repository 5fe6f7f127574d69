# SPDX-License-Identifier: Apache-2.0
"""The verdicts on resets, connections and the host are right for records whose answer is known."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cwndtrace import tcp
from cwndtrace.analysis import connections, verdict
from cwndtrace.present import text as in_words
from cwndtrace.store.meta import Meta
from cwndtrace.trace import Trace
from tests.unit import frames

SENT = 40_100_000
"""bytes_sent of ``frames.reset``."""


def capture(path: Path, resets: list[Any], snapshots: list[Any], **options: Any) -> Trace:
    options |= {"resets": frames.table("cwnd_reset", *resets), "connections": frames.snapshots(*snapshots)}
    return frames.capture(Path(mkdtemp(dir=path)) / "a.cwnd", **options)


def snapshots(burst: int, **last: Any) -> list[dict[str, Any]]:
    """Return the snapshots before and after a reset at 10 s that preceded a burst of ``burst`` bytes."""
    return [frames.snapshot(0, bytes_sent=SENT), frames.snapshot(20, bytes_sent=SENT + burst, **last)]


SLOW = {"busy_us": 1_000_000}
RESETS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "harmful": ({}, snapshots(1_000_000)),
    "burst_fits": ({}, snapshots(44 * 1448)),
    "same_rounds": ({"cwnd_before": 60, "ssthresh_after": 45}, snapshots(80 * 1448)),
    "receiver_window": ({"snd_wnd": 44 * 1448}, snapshots(1_000_000)),
    "send_buffer": ({}, snapshots(1_000_000, **SLOW, sndbuf_limited_us=600_000)),
    "loss": ({"reason": "rto_loss"}, snapshots(1_000_000)),
    "nothing_sent": ({}, snapshots(0)),
    "unknown": ({}, []),
}


@pytest.mark.parametrize("label", RESETS)
def test_each_verdict_is_given_to_one_reset(tmp_path: Path, label: str) -> None:
    fields, seen = RESETS[label]
    trace = capture(tmp_path, [frames.reset(10, **fields)], seen)
    (row,) = trace.verdicts.to_dict("records")
    assert row["verdict"] == label
    assert row["lost_us"] == (4 * 106_500 if label == "harmful" else 0)
    assert (trace.summary()["verdict"].tolist(), trace.host().verdict) == ([label], label)
    assert trace.host().text.startswith("Can't tell ") == (label == "unknown")
    assert "1 of 1" not in trace.summary()["why"].item()
    sentence = in_words.reset(row)
    assert sentence.startswith(f"{row['cwnd_before']} -> 44 segments")
    assert "nan" not in sentence
    assert "nan" not in trace.summary()["why"].item()


@pytest.mark.parametrize(
    ("fields", "last", "label"),
    [
        ({}, {"rwnd_limited_us": 600_000}, "receiver_window"),
        ({}, {"rwnd_limited_us": 500_000}, "harmful"),
        ({}, {"sndbuf_limited_us": 500_000}, "harmful"),
        ({"tgid": 0, "unsent_bytes": 1}, {}, "receiver_window"),
        # 691 segments take 9 round trips of at most 100, 2 of them due to the reset, or 5 of at most 400, 3 due to it.
        ({}, {"sndbuf": 144_800}, "send_buffer"),
        ({}, {"sndbuf": 579_200}, "harmful"),
        ({"snd_wnd": 144_800}, {}, "receiver_window"),
        ({"snd_wnd": 144_800}, {"sndbuf": 579_200}, "receiver_window"),
        ({"snd_wnd": 1_100_000}, {"sndbuf": 2_000_000}, "harmful"),
        ({"tgid": 0, "unsent_bytes": 0}, {}, "harmful"),
        ({"srtt_us": 0}, {}, "unknown"),
        ({"cwnd_after": 1000}, {}, "burst_fits"),
    ],
)
def test_limits_and_windows_decide_the_verdict(
    tmp_path: Path, fields: dict[str, Any], last: dict[str, Any], label: str
) -> None:
    trace = capture(tmp_path, [frames.reset(10, **fields)], snapshots(1_000_000, **SLOW, **last))
    assert trace.verdicts["verdict"].tolist() == [label]


def test_a_window_that_did_not_grow_was_never_full(tmp_path: Path) -> None:
    followed = frames.table("cwnd_recovery", frames.recovered(10, outcome="capture_end", cwnd_end=44))
    trace = capture(tmp_path, [frames.reset(10)], snapshots(1_000_000), recoveries=followed)
    assert trace.verdicts["verdict"].tolist() == ["never_full"]


def test_limited_shares_are_of_the_time_around_the_reset(tmp_path: Path) -> None:
    seen = [
        frames.snapshot(at, busy_us=busy, rwnd_limited_us=limited, bytes_sent=SENT + sent)
        for at, busy, limited, sent in (
            (0, 0, 0, 0),
            (9, 9_000, 9_000, 0),
            (12, 10_000, 9_250, 10),
            (30, 90_000, 80_000, 20),
        )
    ]
    trace = capture(tmp_path, [frames.reset(10)], seen)
    assert trace.verdicts["rwnd_limited_share"].tolist() == [0.25]
    assert trace.summary()["rwnd_limited_share"].item() == pytest.approx(80 / 90)


def test_a_capture_of_an_older_version_has_no_shares(tmp_path: Path) -> None:
    trace = capture(tmp_path, [frames.reset(10)], snapshots(1_000_000))
    clocks = ["busy_us", "rwnd_limited_us", "sndbuf_limited_us"]
    old = trace.connections.assign(**dict.fromkeys(clocks, None))
    out = verdict.resets(trace.costs(), old)
    assert (out["verdict"].tolist(), math.isnan(out["rwnd_limited_share"].item())) == (["harmful"], True)
    rows = verdict.connections(connections.summary(trace.resets, old), out, old, trace.about)
    assert math.isnan(rows["busy_us"].item())
    assert "busy time" not in in_words.connection(rows.iloc[0].to_dict())


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
    unclear = "Can't tell whether the congestion window is the cause"
    answer = unclear if label == "unknown" else "The congestion window is not the cause"
    assert trace.host().text.startswith(f"{answer}: no reset on 1 connection ")


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
    assert row["why"] == "1 of 3 resets cost their bursts 426 ms in all (estimated), 21 % of the connection's busy time"
    assert list(row) == [*connections.COLUMNS, *verdict.CONNECTION_COLUMNS, "why"]


def test_connections_are_sorted_by_lost_time_and_the_host_adds_them_up(tmp_path: Path) -> None:
    resets = [frames.reset(10, sock_cookie=c, bytes_sent=SENT) for c in (1, 2, 3)]
    resets += [frames.reset(20, sock_cookie=3, bytes_sent=SENT)]
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
            f"Idle resets cost {host.lost_us / 1000:.0f} ms (estimated) over 2 bursts on 2 of 4 connections, "
            f"{100 * host.lost_us / 12e6:.1f} % of the 12.0 s of busy time."
        )
    )


def test_an_empty_capture_has_no_verdicts(tmp_path: Path) -> None:
    trace = capture(tmp_path, [], [])
    assert trace.host().text == "No TCP connection was seen."
    assert (len(trace.verdicts), len(trace.summary())) == (0, 0)
    full = capture(tmp_path, [frames.reset(10)], snapshots(9)).summary()
    assert list(trace.summary().columns) == list(full.columns)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_every_reset_has_a_verdict_and_connections_add_them_up(seed: int, peers: int) -> None:
    r, c = (frames.pandas(t) for t in frames.story(seed, seconds=20, peers=peers))
    r, c = connections.identify(r, c)
    from cwndtrace.analysis import cost

    judged = verdict.resets(cost.predict(r, c), c)
    rows = verdict.connections(connections.summary(r, c), judged, c, Meta())
    assert set(judged["verdict"]) <= set(verdict.VERDICTS)
    assert ((judged["lost_us"] > 0) == (judged["verdict"] == "harmful")).all()
    assert rows["lost_us"].sum() == pytest.approx(judged["lost_us"].sum())
    assert rows["resets_harmful"].sum() == (judged["verdict"] == "harmful").sum()
    assert all("nan" not in in_words.reset(row) for row in judged.to_dict("records"))


def test_verdicts_keep_the_order_of_resets(tmp_path: Path) -> None:
    trace = capture(tmp_path, [frames.reset(at, sock_cookie=c) for at, c in ((3, 2), (1, 1), (2, 2))], snapshots(5))
    pd.testing.assert_frame_equal(trace.verdicts[trace.resets.columns], trace.resets)
