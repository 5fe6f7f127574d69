# SPDX-License-Identifier: Apache-2.0
"""compare finds and sizes real differences between two captures, and calls others unsure."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from cwndtrace.analysis import bootstrap, compare
from cwndtrace.cli import main
from cwndtrace.trace import Trace
from tests.unit import frames


def values(*numbers: float) -> np.ndarray:
    return np.array(numbers, dtype=np.float64)


# ---- effect size and interval -----------------------------------------------------------------------

NUMBERS = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=9)


@given(NUMBERS, NUMBERS)
def test_cliffs_delta_equals_comparing_each_pair(first: list[float], second: list[float]) -> None:
    pairs = [(a > b) - (a < b) for a in first for b in second]
    assert bootstrap.cliffs_delta(values(*first), values(*second)) == pytest.approx(np.mean(pairs))


GROUPS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(100, 15, n),
    "skewed": lambda rng, n: rng.lognormal(0, 3, n),
    "two values": lambda rng, n: rng.choice([0.1, 0.7], n, p=[0.97, 0.03]),
    "one outlier": lambda rng, n: np.append(np.full(n - 1, 0.3), 1e6 * rng.random()),
    "few": lambda rng, n: rng.integers(0, 4, n) / 3,
}


@given(
    st.integers(0, 2**32),
    st.sampled_from(sorted(GROUPS)),
    st.sampled_from(sorted(GROUPS)),
    st.sampled_from([3, 4, 5, 10, 99, 300, 1001, 2000, 30_000]),
    st.sampled_from([3, 4, 6, 100, 300, 1500, 20_001]),
)
def test_the_interval_holds_the_estimate(seed: int, one: str, other: str, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    before, after = GROUPS[one](rng, n), GROUPS[other](rng, m)
    both = [("median", "srtt")] + ([("mean", "reset_rate")] if n <= 300 and m <= 300 else [])
    for centre, measure in both:
        (row,) = compare.compare({measure: before}, {measure: after}).to_dict("records")
        assert row["centre"] == centre
        assert row["low"] <= row["difference"] <= row["high"]


@pytest.mark.parametrize("number", [9, 10])
def test_medians_are_distributed_as_those_of_resamples_in_full(number: int) -> None:
    group, rng = np.arange(float(number)) ** 2, np.random.default_rng(4)
    full = np.median(rng.choice(group, (200_000, number)), axis=1)
    drawn = bootstrap._medians(group, 200_000, rng)
    for value in np.unique(np.append(full, drawn)):
        # The standard error of the difference is at most 0.0016.
        assert abs((full <= value).mean() - (drawn <= value).mean()) < 0.007


def test_a_million_values_are_compared_in_seconds() -> None:
    many = np.random.default_rng(1).lognormal(5, 1, 1_000_000)
    begin = time.process_time()
    (row,) = compare.compare({"srtt": many}, {"srtt": many * 1.01}).to_dict("records")
    assert time.process_time() - begin < 5
    assert row["low"] <= row["difference"] <= row["high"]
    # The 95 % interval of a difference of two such medians is 3.92 * sqrt(2) standard errors wide.
    error = 1.2533 * np.exp(5) / 1000
    assert row["high"] - row["low"] == pytest.approx(3.92 * 2**0.5 * error, rel=0.1)


def test_the_interval_of_means_differs_from_that_of_medians() -> None:
    rare, none = values(*[0.0] * 95, *[100.0] * 5), np.zeros(100)
    assert bootstrap.interval(rare, none, resamples=500) == (0, 0)
    low, high = bootstrap.interval(rare, none, resamples=500, of="mean")
    assert 0 < low < 5 < high < 12
    assert np.isnan(bootstrap.interval(values(1, 2), none)).all()


def test_the_interval_covers_the_true_difference_as_often_as_it_claims() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for seed in range(60):
        low, high = bootstrap.interval(rng.normal(10, 2, 40), rng.normal(7, 2, 40), seed, 300, "mean")
        hits += low <= 3 <= high
    assert 51 <= hits <= 60


# ---- captures ---------------------------------------------------------------------------------------


def capture(path: Path, number: int = 20, idle_us: int = 2_000_000, cwnd_after: int = 44, **options: Any) -> Trace:
    """Write a capture of a connection with ``number`` resets in a minute, each before a burst of 1 MB."""
    sent = [40_100_000 + n * 1_000_000 for n in range(number + 1)]
    resets = [
        frames.reset(2 * n + 1, cwnd_after=cwnd_after + n % 3, bytes_sent=sent[n], idle_us=idle_us)
        for n in range(number)
    ]
    seen = [
        frames.snapshot(2 * n, bytes_sent=sent[0] + n * 1_000_000, busy_us=n * (150_000 + 100_000 * (number > 0)))
        for n in range(22)
    ]
    options = {"resets": frames.table("cwnd_reset", *resets), "connections": frames.snapshots(*seen)} | options
    return frames.capture(path, **options)


def by_measure(before: Trace, after: Trace) -> dict[str, dict[Any, Any]]:
    out = before.compare(after)
    assert list(out.columns) == list(compare.COLUMNS)
    return {row["measure"]: row for row in out.to_dict("records")}


def test_a_capture_without_resets_shows_less_lost_and_less_busy_time(tmp_path: Path) -> None:
    rows = by_measure(capture(tmp_path / "a.cwnd"), capture(tmp_path / "b.cwnd", number=0))
    assert (rows["reset_rate"]["before"], rows["reset_rate"]["after"]) == (pytest.approx(20), 0)
    assert rows["lost_rate"]["before"] == pytest.approx(20 * 4 * 106_500 / 60)
    assert rows["lost_rate"]["high"] < 0
    busy = rows["busy_per_mb"]
    assert (busy["before"], busy["after"], busy["difference"]) == (250_000, 150_000, -100_000)
    assert (busy["cliffs_delta"], busy["effect"]) == (-1, "large")
    assert (rows["lost"]["n_after"], rows["lost"]["effect"]) == (0, "unsure")


def test_equal_captures_do_not_differ(tmp_path: Path) -> None:
    rows = by_measure(capture(tmp_path / "a.cwnd"), capture(tmp_path / "b.cwnd"))
    assert {row["difference"] for row in rows.values()} == {0}
    assert {row["cliffs_delta"] for row in rows.values() if row["centre"] == "median"} == {0}
    assert {row["effect"] for row in rows.values()} <= {"unsure", "none"}


def test_block_io_latency_is_compared_by_operation(tmp_path: Path) -> None:
    slow, fast = (
        frames.table("block_io", *(frames.block(n, us + n) for n in range(20)), frames.block(30, 5, op="write"))
        for us in (500, 100)
    )
    rows = by_measure(capture(tmp_path / "a.cwnd", block_io=slow), capture(tmp_path / "b.cwnd", block_io=fast))
    read = rows["latency of read"]
    assert (read["before"], read["after"], read["effect"]) == (509.5, 109.5, "large")
    assert read["low"] <= -400 <= read["high"] < 0
    assert (rows["latency of write"]["n_before"], rows["latency of write"]["effect"]) == (1, "unsure")


def test_resets_of_unknown_cost_leave_the_others_comparable(tmp_path: Path) -> None:
    records = [frames.reset(2 * n + 1, bytes_sent=40_100_000 + n * 1_000_000) for n in range(9)]
    some = frames.followed(frames.table("cwnd_reset", *records)).slice(0, 4)
    a, b = capture(tmp_path / "a.cwnd", recoveries=some), capture(tmp_path / "b.cwnd")
    rows = by_measure(a, b)
    assert (rows["lost"]["n_before"], rows["lost"]["before"], rows["lost"]["difference"]) == (4, 4 * 106_500, 0)
    assert rows["lost_rate"]["before"] == pytest.approx(4 * 4 * 106_500 / 60)


def test_empty_captures_do_not_differ(tmp_path: Path) -> None:
    empty = [frames.capture(tmp_path / name) for name in ("a.cwnd", "b.cwnd")]
    assert set(by_measure(*empty)) == {"reset_rate", "lost_rate"}
    assert by_measure(empty[0], capture(tmp_path / "c.cwnd"))["reset_rate"]["effect"] == "large"


def test_a_large_difference_between_large_groups_is_found() -> None:
    many = np.random.default_rng(1).normal(0, 1, 200_000)
    (row,) = compare.compare({"srtt": many}, {"srtt": many + 10}).to_dict("records")
    assert (row["n_before"], row["effect"]) == (200_000, "large")
    assert row["low"] < 10 < row["high"]


# ---- the command ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_prints_both_answers_and_a_table(tmp_path: Path) -> None:
    a, b = capture(tmp_path / "a.cwnd"), capture(tmp_path / "b.cwnd", number=0)
    result = CliRunner().invoke(main, ["compare", str(a.path), str(b.path)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == str(a.conclude(b))
    assert lines[1].startswith(f"{a.path}: Idle resets made 20 bursts late ")
    assert lines[2].startswith(f"{b.path}: No window was reset on 1 connection")
    (busy,) = (line for line in lines if line.startswith("busy_per_mb "))
    assert busy.split()[1:] == [
        "250",
        "ms/MB",
        "150",
        "ms/MB",
        "-100",
        "ms/MB",
        "-100",
        "ms/MB",
        "to",
        "-100",
        "ms/MB",
        "large",
        "21",
        "and",
        "21",
    ]
    assert "\nlost_rate " in result.stdout
    assert result.stderr == ""


def test_lost_records_are_a_warning(tmp_path: Path) -> None:
    a, b = capture(tmp_path / "a.cwnd"), capture(tmp_path / "b.cwnd", counts={"cwnd_reset": {"kept": 20, "lost": 3}})
    result = CliRunner().invoke(main, ["compare", str(a.path), str(b.path)])
    assert result.stderr == f"warning: {b.path}: 3 records of cwnd_reset were lost\n"


def test_json_has_a_line_for_the_conclusion_and_for_each_measure(tmp_path: Path) -> None:
    a, b = capture(tmp_path / "a.cwnd"), capture(tmp_path / "b.cwnd", number=0)
    result = CliRunner().invoke(main, ["compare", "--json", str(a.path), str(b.path)])
    rows = [json.loads(line, parse_constant=lambda text: pytest.fail(text)) for line in result.stdout.splitlines()]
    assert [row["event"] for row in rows] == ["conclusion"] + ["compare"] * (len(rows) - 1)
    assert rows[0] == {"event": "conclusion"} | json.loads(json.dumps(a.conclude(b).to_dict()))
    rows = rows[1:]
    (lost,) = (row for row in rows if row["measure"] == "lost")
    assert (lost["after"], lost["n_before"]) == (None, 20)
