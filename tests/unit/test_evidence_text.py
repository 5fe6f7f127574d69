# SPDX-License-Identifier: Apache-2.0
"""Each verdict gives its evidence in a whole sentence, with the figures that it rests on."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cwndtrace.analysis.verdict import VERDICTS, Totals
from cwndtrace.present import text
from tests.unit import frames

NAN = math.nan

RESET: dict[str, Any] = {
    "cwnd_before": 80, "cwnd_after": 10, "reason": "idle", "idle_us": 2_100_000, "rto_us": 308_000, "chain_resets": 1,
    "chain_window": 80, "burst_bytes": 43_000, "outcome": "regained", "lost_us": 426_000, "round_us": 106_500,
    "waiting_bytes": 30_000, "acked_bytes": 50_000, "bursts": 3, "mss": 1448, "busy_us": 700_000, "unsent_bytes": 0,
    "unacked_bytes": 0, "snd_wnd": 60_000, "tgid": 7, "tcp_state": "established", "ssthresh_after": 60,
    "rwnd_limited_us": 60_000, "sndbuf_limited_us": 70_000, "other_us": 80_000, "after_loss_us": 90_000,
    "predicted_us": 213_000,
}  # fmt: skip
IDLE = "80 -> 10 segments after 2.10 s of idle time (RTO 308 ms)"
HELD = "nothing waited for the congestion window; "


@pytest.mark.parametrize(
    ("verdict", "values", "sentence"),
    [
        ("harmful", {}, f"{IDLE}: the window made what was sent late by 426 ms (measured), 4.0 round trips of 106 ms; "
         "up to 30.0 kB waited for it"),
        ("harmful", {"outcome": "capture_end", "lost_us": 106_500},
         f"{IDLE}: the window made what was sent late by at least 106 ms (measured), 1.0 round trip of 106 ms; "
         "up to 30.0 kB waited for it"),
        ("harmful", {"round_us": NAN},
         f"{IDLE}: the window made what was sent late by 426 ms (measured), with no round-trip time known; "
         "up to 30.0 kB waited for it"),
        ("harmful", {"chain_resets": 2, "chain_window": 1},
         f"{IDLE}, reset 2 of a chain from 1 segment: the window made what was sent late by 426 ms (measured), "
         "4.0 round trips of 106 ms; up to 30.0 kB waited for it"),
        ("slight", {"lost_us": 900}, f"{IDLE}: the window made what was sent late by 900 us (measured)"),
        ("nothing_waited", {}, f"{IDLE}: 50.0 kB were acknowledged in 3 bursts, and nothing of it waited"),
        ("nothing_waited", {"acked_bytes": 1, "bursts": 1},
         f"{IDLE}: 1 B was acknowledged in 1 burst, and nothing of it waited"),
        ("nothing_waited", {"bursts": NAN},
         f"{IDLE}: 50.0 kB were acknowledged in an unknown number of bursts, and nothing of it waited"),
        ("as_before", {}, f"{IDLE}: up to 30.0 kB waited for the window, as long as for 80 segments"),
        ("burst_fits", {"burst_bytes": 9_000}, f"{IDLE}: all that was sent until the next record (9.00 kB) fits into "
         "the window after the reset (14.5 kB)"),
        ("receiver_window", {},
         f"{IDLE}: {HELD}the peer's window held data back for 60.0 ms of 700 ms of busy time (measured)"),
        ("receiver_window", {"tgid": 0, "unsent_bytes": 5_000},
         f"{IDLE}: the peer's window was closed, and 5.00 kB waited for it to open"),
        ("receiver_window", {"reason": "app_limited", "unsent_bytes": 5_000, "snd_wnd": 900, "cwnd_after": 1},
         "80 -> 1 segment: the peer's window was full, and 5.00 kB waited for room in it"),
        ("receiver_window", {"reason": "rto_loss", "unacked_bytes": 2_000, "snd_wnd": 0},
         "80 -> 10 segments: the peer closed its window while 2.00 kB were unacknowledged, and the timeout was a probe "
         "of that window; nothing need have been lost"),
        ("send_buffer", {},
         f"{IDLE}: {HELD}the send buffer held data back for 70.0 ms of 700 ms of busy time (measured)"),
        ("paced", {}, f"{IDLE}: {HELD}pacing, Nagle's algorithm or a small queue held data back for 80.0 ms of 700 ms "
         "of busy time (measured)"),
        ("loss", {}, f"{IDLE}: {HELD}a loss held data back for 90.0 ms of 700 ms of busy time (measured)"),
        ("loss", {"reason": "rto_loss"}, "80 -> 10 segments: a retransmission timeout caused the reset, not idle "
         "time; ssthresh was 60 segments after it"),
        ("loss", {"reason": "tlp_loss", "ssthresh_after": math.inf}, "80 -> 10 segments: a loss that a tail loss "
         "probe repaired caused the reset, not idle time; ssthresh was inf segments after it"),
        ("handshake", {"reason": "rto_loss"}, "80 -> 10 segments: the SYN or SYN-ACK was sent again after 308 ms; the "
         "connection then begins with its initial window, or with 1 segment after more than one such timeout"),
        ("nothing_sent", {},
         f"{IDLE}: no data was sent between the reset and the connection's next record"),
        ("unknown", {"outcome": "capture_end"}, f"{IDLE}: the capture ended before all that was sent had been "
         "acknowledged. If the 43.0 kB that followed were one burst, and nothing else held it back, it was late by "
         "about 213 ms (estimated)"),
        ("unknown", {"outcome": "", "burst_bytes": NAN, "predicted_us": NAN}, f"{IDLE}: its window wasn't followed, "
         "or the record of that was lost, and an unknown number of bytes followed"),
        ("unknown", {"predicted_us": NAN}, f"{IDLE}: an older version recorded it, which didn't measure what waited, "
         "and 43.0 kB followed"),
    ],
)  # fmt: skip
def test_a_reset_has_its_evidence(verdict: str, values: dict[str, Any], sentence: str) -> None:
    assert text.reset(RESET | values | {"verdict": verdict}) == sentence


CONNECTION: dict[str, Any] = {
    "resets": 0, "resets_harmful": 0, "resets_unknown": 0, "verdict_resets": 0, "lost_us": 0.0, "predicted_us": 0.0,
    "busy_us": 8_000_000, "ca_name": "bbr", "netns_ino": 4026531840, "seen_s": 59.6, "sndbuf_limited_share": 0.6,
    "rwnd_limited_share": 0.7, "retrans_segments": 2, "sent_bytes": 5_000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("verdict", "values", "sentence"),
    [
        ("harmful", {"resets": 1, "resets_harmful": 1, "lost_us": 426_000},
         "its reset made what was sent late, by 426 ms in all (measured), 5.3 % of the connection's busy time"),
        ("slight", {"resets": 4, "resets_harmful": 2, "lost_us": 8_000_000},
         "2 of 4 resets made what was sent late, by 8.00 s in all (measured), 100 % of the connection's busy time"),
        ("harmful", {"resets": 1, "resets_harmful": 1, "lost_us": 9_000_000},
         "its reset made what was sent late, by 9.00 s in all (measured)"),
        ("slight", {"resets": 3, "verdict_resets": 2}, "harmless: late by too little to matter (2 of 3 resets)"),
        ("nothing_waited", {"resets": 1, "verdict_resets": 1}, "harmless: nothing that was sent waited"),
        ("unknown", {"resets": 1, "resets_unknown": 1, "predicted_us": 213_000},
         "the cost of its reset wasn't measured; about 213 ms (estimated)"),
        ("unknown", {"resets": 3, "resets_unknown": 2, "predicted_us": 213_000},
         "the cost of 2 of 3 resets wasn't measured; about 213 ms (estimated)"),
        ("other_end", {"resets": 1},
         "it mostly receives: the window that delays what it waits for is kept at the other end"),
        ("exempt", {}, "bbr never resets its window after idle time"),
        ("sysctl_off", {},
         "net.ipv4.tcp_slow_start_after_idle was 0 in namespace 4026531840 when the capture began"),
        ("nothing_sent", {}, "no data was sent in the 60 s that it was watched"),
        ("send_buffer", {}, "no reset; the send buffer held it back for 60 % of its 8.00 s of busy time"),
        ("receiver_window", {}, "no reset; the peer's window held it back for 70 % of its 8.00 s of busy time"),
        ("loss", {}, "no reset, but 2 retransmitted segments"),
        ("unknown", {}, "only one snapshot shows it, no probe could see idle resets, some of its records are missing, "
         "or it sent little and nothing says how much it received"),
        ("no_reset", {}, "no reset while it sent 5.00 kB"),
    ],
)  # fmt: skip
def test_a_connection_has_its_evidence(verdict: str, values: dict[str, Any], sentence: str) -> None:
    assert text.connection(CONNECTION | values | {"verdict": verdict}) == sentence


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"lost_us": 426_000}, "426 ms"),
        ({}, "0 us"),
        ({"lost_us": 426_000, "resets_unknown": 1}, ">426 ms"),
        ({"resets_unknown": 1}, "unknown"),
    ],
)
def test_a_cost_of_which_a_part_is_unknown_is_a_lower_bound(values: dict[str, Any], shown: str) -> None:
    assert text.cost(CONNECTION | values) == shown


def totals(verdict: str, **values: Any) -> Totals:
    """Return the totals of a capture with four connections, and with no reset but for the values given."""
    numbers = dict.fromkeys(("resets", "harmful", "unknown", "connections", "connections_unknown"), 0)
    costs = dict.fromkeys(("lost_us", "predicted_us"), 0.0) | {"busy_us": 8_000_000.0}
    given: dict[str, Any] = {"verdicts": {"no_reset": 4}, "idle_only": True, "connections_seen": 4}
    return Totals(**{"verdict": verdict} | numbers | costs | given | values)


HARMFUL: dict[str, Any] = {"resets": 9, "harmful": 3, "connections": 2, "lost_us": 426_000.0}
LATE = (
    "Idle resets made 3 bursts late on 2 of 4 connections, by 426 ms in all (measured), 5.3 % of the 8.00 s of busy "
    "time."
)
OPEN = "Can't tell whether window resets delayed anything, because "


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (totals("harmful", **HARMFUL), LATE),
        (totals("harmful", **HARMFUL | {"idle_only": False, "unknown": 1, "busy_us": NAN}),
         "Window resets made 3 bursts late on 2 of 4 connections, by 426 ms in all (measured). The cost of 1 more "
         "reset isn't known."),
        (totals("slight", **HARMFUL),
         f"{LATE} That is too little to matter: less than 1% of each connection's busy time."),
        (totals("slight", resets=2, verdicts={"slight": 2}), "No reset delayed anything: 2 resets, each followed to "
         'its end or too small to matter (2 times "harmless: late by too little to matter").'),
        (totals("no_reset"), 'No window was reset on 4 connections (4 times "its window was never reset").'),
        (totals("unknown", resets=9, unknown=2, predicted_us=213_000.0, lost_us=426_000.0), f"{OPEN}the cost of 2 of 9 "
         "resets wasn't measured (about 213 ms, estimated); 426 ms were measured for the others."),
        (totals("unknown", resets=9, unknown=2), f"{OPEN}the cost of 2 of 9 resets wasn't measured."),
        (totals("unknown", connections_unknown=3, verdicts={"unknown": 3, "exempt": 1}), f"{OPEN}it can't be told for "
         '3 of 4 connections (3 times "can\'t tell", 1 time "its congestion control is exempt from idle resets").'),
    ],
)  # fmt: skip
def test_a_capture_has_its_answer(found: Totals, sentence: str) -> None:
    answer = text.host(found)
    assert str(answer) == answer.text == sentence
    assert answer.verdict == found.verdict
    for name in ("resets", "harmful", "unknown", "connections", "connections_seen", "lost_us", "predicted_us"):
        assert getattr(answer, name) == getattr(found, name)


def test_a_capture_without_connections_or_records_has_no_answer() -> None:
    nothing = text.host(totals("no_reset", connections_seen=0, verdicts={}), hidden="a probe was missing")
    assert (nothing.verdict, nothing.text) == ("unknown", "No TCP connection was seen.")
    late = f"{LATE[0].lower()}{LATE[1:]}"
    seen = f" By the records that are there, {late}"
    for found, there in ((totals("harmful", **HARMFUL), seen), (totals("no_reset"), "")):
        answer = text.host(found, lacking="one part is gone")
        assert (answer.verdict, answer.text) == ("unknown", f"{OPEN}one part is gone.{there}")


def test_resets_that_the_trace_may_not_have_seen_leave_only_harm_certain() -> None:
    assert text.host(totals("harmful", **HARMFUL), hidden="a probe was missing").text == LATE
    answer = text.host(totals("no_reset"), hidden="a probe was missing")
    assert answer.verdict == "unknown"
    assert answer.text == (
        f"{OPEN}a probe was missing. Of those that were seen, no window was reset on 4 connections "
        '(4 times "its window was never reset").'
    )


def test_a_chain_of_resets_is_told_in_a_line() -> None:
    row = {"resets": 3, "saddr": "10.1.0.1", "sport": 443, "daddr": "fd00::1", "dport": 5, "window_segments": 80.0}
    row |= {"least_segments": 10, "every_us": 900_000, "lost_us": 426_000.0}
    line = "3 resets in a row on 10.1.0.1:443 > [fd00::1]:5, 80 -> 10 segments, by sends 900 ms apart at the median; "
    assert text.chain(row) == f"{line}what was sent was late by 426 ms (measured)"
    assert text.chain(row | {"lost_us": 0.0}) == f"{line}nothing was late"


def test_a_window_of_a_trace_begins_at_a_time_of_day_or_of_the_clock() -> None:
    kept = {"kept_from": frames.MONO + 5 * frames.SECOND}
    line = "The capture holds a window of the trace, from {} on; older records were deleted"
    assert text.window(frames.about(**kept)) == line.format("2026-11-18 12:30:05 UTC")
    assert text.window(frames.about(**kept, clock={"start": {"mono_ns": frames.MONO}})) == line.format(
        "5,005.0 s of CLOCK_MONOTONIC"
    )
    assert text.window(frames.about()) == ""
    assert text.window(frames.about(dump={"capture": "all.cwnd"})) == "the capture is a dump of all.cwnd"


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.0, "0.0 %"), (0.0312, "3.1 %"), (0.0949, "9.5 %"), (0.095, "10 %"), (1, "100 %")],
)
def test_small_shares_have_two_digits(share: float, shown: str) -> None:
    assert text.percent(share) == shown


def test_each_verdict_has_a_label_and_a_brief_one() -> None:
    assert tuple(text.LABELS) == VERDICTS
    short = {verdict: text.brief(verdict) for verdict in VERDICTS}
    assert (short["harmful"], short["slight"], short["paced"]) == ("harmful", "harmless", "not the reset")
    assert {name: short[name] for name in ("other_end", "exempt", "sysctl_off", "no_reset")} == {
        "other_end": "sent by the other end", "exempt": "exempt", "sysctl_off": "resets are off",
        "no_reset": "never reset",
    }  # fmt: skip
