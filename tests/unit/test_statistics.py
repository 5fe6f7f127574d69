# SPDX-License-Identifier: Apache-2.0
"""Medians, intervals and verdicts are right for measurements whose answer is known."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwndtrace.analysis import bootstrap
from cwndtrace.cli import reproduce
from cwndtrace.kernel.tcp_info import TcpInfo
from cwndtrace.lab import statistics
from cwndtrace.lab.measurement import Measurement, Setting, frame, limits, measured
from cwndtrace.lab.wire import Sent


def row(setting: Setting, latency_ms: float, burst: int = 1_000_000, idle: float = 1.0, **over: Any) -> Measurement:
    """Return one burst over an RTT of 50 ms; with the setting on, idle time has reset its window."""
    before = TcpInfo(snd_cwnd=1392, rtt=51_000, min_rtt=50_000, rto=252_000, snd_mss=1448, snd_wnd=2_000_000)
    after = TcpInfo(snd_cwnd=174 if setting == "on" else 1392)
    end = TcpInfo(snd_cwnd=1392, sndbuf_limited=over.get("sndbuf_limited", 0), rwnd_limited=over.get("rwnd_limited", 0))
    sent = Sent(before, after, end, 1, 2, 3, over.get("first", burst), True, 4_000_000, 9, 5001)
    return measured(
        round=1,
        setting=setting,
        idle_s=idle,
        burst_bytes=burst,
        latency_ms=latency_ms,
        end_ns=3,
        sent=sent,
        netns_ino=4,
    )


def table(on: list[float], off: list[float], **over: Any) -> pd.DataFrame:
    return frame([row("on", v, **over) for v in on] + [row("off", v, **over) for v in off])


def test_a_clear_cost_has_an_interval_and_a_verdict() -> None:
    summary = statistics.summarise(table([150, 152, 151, 153], [50, 51, 52, 50]))
    assert len(summary) == 1
    cell = summary.iloc[0]
    assert cell["median_on_ms"] == 151.5
    assert cell["median_off_ms"] == 50.5
    assert cell["cost_ms"] == 101
    assert cell["cost_rtts"] == pytest.approx(101 / 50)
    assert 97 < cell["cost_low_ms"] <= 101 <= cell["cost_high_ms"] < 104
    assert cell["resets_on"] == 1
    assert cell["verdict"].startswith("1 MB after 1 s: the setting cost 101 ms (2.0 round trips), 95 % interval")
    assert "cost up to 101 ms" in statistics.overall(summary)


def test_equal_latencies_cost_nothing() -> None:
    summary = statistics.summarise(table([50, 51, 52, 53], [50, 51, 52, 53]))
    (cell,) = summary.to_dict("records")
    most = math.ceil(max(-cell["cost_low_ms"], cell["cost_high_ms"]))
    assert cell["verdict"].startswith(f"1 MB after 1 s: the setting cost nothing, to within {most} ms (95 % interval -")
    assert statistics.overall(summary) == f"tcp_slow_start_after_idle cost nothing here, to within {most} ms"


def test_a_wide_interval_around_nothing_is_inconclusive() -> None:
    wide = table([200, 1000, 500, 250], [600, 50, 300, 150])
    (cell,) = statistics.summarise(wide).to_dict("records")
    assert cell["cost_low_ms"] < 0 < cell["cost_ms"] < cell["cost_high_ms"]
    spread = f"95 % interval -{-cell['cost_low_ms']:.0f} to +{cell['cost_high_ms']:.0f} ms"
    assert cell["verdict"] == f"1 MB after 1 s: inconclusive, +{cell['cost_ms']:.0f} ms ({spread})"
    both = statistics.summarise(pd.concat([wide, table([50, 51, 52], [50, 51, 52], burst=100_000)]))
    assert statistics.overall(both) == (
        f"{cell['verdict']}; measure more rounds (--rounds); inconclusive: 1 of 2 comparisons"
    )
    sure = statistics.summarise(pd.concat([wide, table([150, 151, 152], [50, 51, 52], burst=100_000)]))
    assert statistics.overall(sure).startswith("tcp_slow_start_after_idle cost up to 100 ms (2.0 round trips): 100 kB")
    assert statistics.overall(sure).endswith("; inconclusive: 1 of 2 comparisons")


@pytest.mark.parametrize(
    ("low", "high", "rtt_ms", "expected"),
    [
        (-367, 611, 100, "inconclusive"),
        (-49, 50, 100, "none"),
        (-49, 51, 100, "inconclusive"),
        (-51, 49, 100, "inconclusive"),
        (0, 60, 100, "inconclusive"),
        (1, 60, 100, "cost"),
        (-60, -1, 100, "saved"),
        # A cost that is certain and far below a round trip is no reset's.
        (0.2, 3, 100, "none"),
        # The round trip of loopback is shorter than what a busy machine adds.
        (-0.9, 0.8, 0.02, "none"),
        (-1.1, 0.8, 0.02, "inconclusive"),
        (1.1, 1.3, 0.02, "cost"),
    ],
)
def test_an_interval_means_a_cost_none_or_nothing_sure(low: float, high: float, rtt_ms: float, expected: str) -> None:
    assert statistics.outcome((low + high) / 2, low, high, rtt_ms) == expected
    # With the settings swapped the same is told of the other one.
    other = {"cost": "saved", "saved": "cost"}.get(expected, expected)
    assert statistics.outcome(-(low + high) / 2, -high, -low, rtt_ms) == other


@given(st.lists(st.floats(49, 53), min_size=3, max_size=6), st.lists(st.floats(49, 53), min_size=3, max_size=6))
def test_no_difference_is_shown_as_minus_nothing(on: list[float], off: list[float]) -> None:
    summary = statistics.summarise(table(on, off))
    (_, line) = reproduce.costs_of(summary)
    priced = pd.DataFrame(
        {"recorded_ms": [0.0] * len(on), "predicted_ms": [0.0] * len(on), "measured_ms": np.array(on) - 51}
    )
    for text in (line, *summary["verdict"], statistics.overall(summary), reproduce._agreement(priced)):
        assert not re.search(r"[+-]0(\.0)?(?![\d.])", text), text


def test_what_is_said_of_predictions_agrees_with_itself() -> None:
    priced = pd.DataFrame(
        {
            "recorded_ms": [100.0, 333.0, 500.0],
            "predicted_ms": [90.0, 300.0, 600.0],
            "measured_ms": [101.0, 369.0, 501.0],
        }
    )
    assert reproduce._agreement(priced) == (
        "Cost by the records: +311 ms a burst on average, by the receiver's clock +324 ms; of each burst the two "
        "differ by 1 ms at the median and 36 ms at most. Predicted from the windows alone (estimate): +330 ms."
    )


def test_the_interval_is_repeatable_and_covers_the_difference() -> None:
    random = np.random.default_rng(5)
    hits = 0
    for _ in range(100):
        on, off = random.normal(110, 5, 15), random.normal(100, 5, 15)
        low, high = bootstrap.interval(on, off, resamples=500)
        hits += low <= 10 <= high
    assert (low, high) == bootstrap.interval(on, off, resamples=500)
    # 95 of 100 intervals should cover the difference; fewer than 85 would be a chance of one in thousands.
    assert hits >= 85


def test_too_few_rounds_give_no_interval() -> None:
    summary = statistics.summarise(table([150, 150], [50, 50]))
    assert np.isnan(summary.iloc[0]["cost_low_ms"])
    assert "too few rounds" in summary.iloc[0]["verdict"]
    assert "too few rounds" in statistics.overall(summary)


def test_measurements_with_one_setting_give_no_cost() -> None:
    summary = statistics.summarise(table([150, 150, 150], []))
    assert summary.iloc[0]["verdict"].endswith("measured with one setting only")
    assert "only one setting" in statistics.overall(summary)


def test_bursts_and_idle_times_are_separate_and_sorted() -> None:
    both = pd.concat([table([9, 9, 9], [9, 9, 9], burst=b, idle=r) for r in (2.0, 0.5) for b in (300_000, 100_000)])
    summary = statistics.summarise(both)
    cells = list(zip(summary["burst_bytes"], summary["idle_s"], strict=True))
    assert cells == [(100_000, 0.5), (100_000, 2.0), (300_000, 0.5), (300_000, 2.0)]


def test_a_negative_cost_is_called_a_saving() -> None:
    summary = statistics.summarise(table([50, 50, 50], [100, 100, 100]))
    assert "saved 50 ms" in summary.iloc[0]["verdict"]
    assert statistics.overall(summary) == (
        "tcp_slow_start_after_idle saved up to 50 ms (1.0 round trips): 1 MB after 1 s took 50 ms with it and"
        " 100 ms without"
    )


def test_an_empty_frame_has_the_same_columns() -> None:
    assert list(frame([]).columns) == list(frame([row("on", 1)]).columns)


def test_other_limits_than_the_congestion_window_are_named() -> None:
    assert limits([row("on", 100)]) == []
    reasons = limits([row("on", 100, first=400_000, sndbuf_limited=70_000), row("off", 100, rwnd_limited=60_000)])
    assert len(reasons) == 2
    assert "bigger than the send buffer, which took 400,000 bytes at once and delayed it for 70 ms" in reasons[0]
    assert "receiver's window of 2,000,000 bytes for 60 ms" in reasons[1]
