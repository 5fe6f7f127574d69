# SPDX-License-Identifier: Apache-2.0
"""Connections that an idle reset waits for are named, with the window that it will leave, and no others are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cwndtrace import tcp
from cwndtrace.analysis import ahead
from cwndtrace.present import ahead as in_words
from cwndtrace.trace import Trace
from tests.unit import frames

ON = {frames.NETNS: 1}
IDLE = {"last_snd_us": 700_000, "rto_us": 300_000, "srtt_us": 100_000, "cwnd": 160}


def snapshot(**fields: Any) -> pd.DataFrame:
    return frames.pandas(frames.snapshots(frames.snapshot(**IDLE | fields)))


@pytest.mark.parametrize(
    ("fields", "cwnd", "rounds"),
    [
        ({}, 40, 2),  # two whole RTOs
        ({"last_snd_us": 301_000}, 80, 1),
        ({"last_snd_us": 900_000}, 40, 2),  # the kernel compares strictly
        ({"last_snd_us": 901_000}, 20, 3),
        ({"last_snd_us": 3_600_000_000}, 10, 4),
        ({"cwnd": 11}, 10, 1),
    ],
)
def test_the_next_window_follows_the_kernels_rule(fields: dict[str, Any], cwnd: int, rounds: int) -> None:
    (row,) = ahead.due(snapshot(**fields), ON).to_dict("records")
    assert (row["cwnd_next"], row["rounds"]) == (cwnd, rounds)


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"last_snd_us": 300_000}, ON),
        ({"cwnd": 10}, ON),
        ({"unacked": 1}, ON),
        ({"ca_name": "bbr"}, ON),
        ({"state": "LAST-ACK"}, ON),
        ({"srtt_us": 50}, ON),  # four round trips of 50 us
        ({}, {frames.NETNS: 0}),
        ({}, {frames.NETNS: None}),
        ({}, {}),
    ],
)
def test_a_connection_that_keeps_its_window_is_not_named(
    fields: dict[str, Any], settings: dict[int, int | None]
) -> None:
    assert ahead.due(snapshot(**fields), settings).empty
    assert ahead.due(snapshot(), settings | ON).shape == (1, len(ahead.DUE))


def test_a_known_initial_window_counts() -> None:
    (row,) = ahead.due(snapshot(), ON, {0x5F: 100}).to_dict("records")
    assert row["cwnd_next"] == 100
    assert ahead.due(snapshot(), ON, {0x5F: 160}).empty
    (row,) = ahead.due(snapshot(last_snd_us=10**9), ON, {0x5F: 0}).to_dict("records")
    assert row["cwnd_next"] == 10


def test_the_lines_have_units_and_say_how_many_more_there_are() -> None:
    fields: dict[str, Any] = IDLE | {"comm": "a\x1bb"}
    seen = [frames.snapshot(sock_cookie=n, dport=n, **fields) for n in range(1, 4)]
    seen[2]["srtt_us"] = 100_001
    first, more = in_words.due(ahead.due(frames.pandas(frames.snapshots(*seen)), ON), 1)
    assert first == (
        "10.1.0.1:443 > 10.2.0.9:3 (a?b[4242]): idle for 700 ms, longer than its RTO of 300 ms; a send takes its "
        "window from 160 to 40 segments, and a burst of a whole window then needs up to 2 round trips more, 200 ms "
        "(estimated)"
    )
    assert more == "and 2 more connections"


# ---- heartbeats -------------------------------------------------------------------------------------


def beating(path: Path, *steps: tuple[int, int, int], **fields: Any) -> Trace:
    """Write a capture with idle resets 450 ms apart; each step is the window before, after, and the bytes sent next."""
    resets, sent = [], 1_000_000
    for number, (before, after, size) in enumerate(steps):
        values = {"cwnd_before": before, "cwnd_after": after, "bytes_sent": sent, "idle_us": 448_000} | fields
        resets.append(frames.reset(1 + 0.45 * number, **values))
        sent += size
    return frames.capture(path / "a.cwnd", resets=frames.table("cwnd_reset", *resets))


DOWN = ((151, 75, 20), (75, 37, 20), (37, 18, 20), (18, 10, 100_000))


def test_messages_slower_than_the_rto_are_one_row(tmp_path: Path) -> None:
    rows = beating(tmp_path, *DOWN, (151, 75, 20), (75, 37, 20)).heartbeats()
    assert list(rows.columns) == list(ahead.BEATS)
    assert in_words.beats(rows, 2) == [
        "10.1.0.1:443 > 10.2.0.9:51324 (replica[4242]): about 20 B each 448 ms, less often than its RTO of 308 ms: "
        "6 resets, and the window went from 151 to 10 segments"
    ]


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("steps", "fields"),
    [
        (DOWN[:1], {}),
        (((151, 75, 400_000), (120, 60, 400_000)), {}),  # bursts, not heartbeats
        (((151, 75, 20), (151, 75, 20)), {}),  # the window was back
        (((151, 75, 0), (75, 37, 0)), {}),  # nothing was sent
        (DOWN, {"reason": "rto_loss"}),
        (DOWN, {"idle_us": 200_000}),  # other sends in between
        (DOWN, {"srtt_us": 50}),
    ],
)
def test_other_resets_are_no_heartbeats(tmp_path: Path, steps: tuple[tuple[int, int, int]], fields: Any) -> None:
    assert beating(tmp_path, *steps, **fields).heartbeats().empty


def test_heartbeats_are_seen_live_between_two_snapshots() -> None:
    first, last = snapshot(bytes_sent=900_000), snapshot(bytes_sent=900_040, cwnd=10)
    (line,) = in_words.beats(ahead.live_beats(first, last, ON), 3)
    assert line == (
        "10.1.0.1:443 > 10.2.0.9:51324 (replica[4242]): sent 40 B while it was watched and was idle for 700 ms in "
        "between, longer than its RTO of 300 ms; its window is 10 segments"
    )
    for then, now in (
        ({}, {"bytes_sent": 900_000}),  # nothing sent
        ({}, {"bytes_sent": 1_000_000}),  # a burst
        ({"last_snd_us": 0}, {"last_snd_us": 100_000}),  # often enough
        ({"sock_cookie": 7}, {}),  # a new connection
        ({"bytes_sent": 100}, {"bytes_sent": 140}),  # never more than the initial window
        ({}, {"srtt_us": 50}),
        ({}, {"ca_name": "bbr"}),
    ):
        before = snapshot(**{"bytes_sent": 900_000} | then)
        assert ahead.live_beats(before, snapshot(**{"bytes_sent": 900_040} | now), ON).empty, now


# ---- in a capture -----------------------------------------------------------------------------------


def test_a_capture_names_connections_of_its_last_snapshot(tmp_path: Path) -> None:
    ends = [(50, 1), (60, 2), (60, 3)]
    seen = [frames.snapshot(at, sock_cookie=n, dport=n, **IDLE) for at, n in ends]
    seen[-1] |= {"netns_ino": 7}
    settings = {str(inode): {"name": "pod", tcp.IDLE_SYSCTL: 1} for inode in (frames.NETNS, 7)}
    off = {"7": settings["7"] | {tcp.IDLE_SYSCTL: 0}}
    options = {"connections": frames.snapshots(*seen), "sysctls": settings}
    trace = frames.capture(tmp_path / "a.cwnd", **options, sysctls_end=settings | off)
    assert trace.due()["dport"].tolist() == [2]
    older = frames.capture(tmp_path / "b.cwnd", **options)
    assert older.due()["dport"].tolist() == [2, 3]


def test_connections_that_were_gone_before_the_end_are_not_named(tmp_path: Path) -> None:
    seen = frames.snapshots(frames.snapshot(40, **IDLE))
    assert frames.capture(tmp_path / "a.cwnd", connections=seen).due().empty
    assert frames.capture(tmp_path / "b.cwnd").due().empty
