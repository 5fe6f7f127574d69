# SPDX-License-Identifier: Apache-2.0
"""Figures that are counted part by part equal those that pandas and numpy compute from all requests at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cwndtrace.analysis import block_figures
from cwndtrace.analysis.block_figures import BlockRequests, figures

QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}


def requests(number: int, seed: int, spread: float, groups: int) -> pd.DataFrame:
    """Return requests of several groups, from below 1 us to hours where ``spread`` is large, some never issued."""
    rng = np.random.default_rng(seed)
    took = rng.lognormal(np.log(250_000), spread, number).clip(0, 2e13).astype(np.int64)
    start = np.sort(rng.integers(10**9, 10**13, number))
    issue = start + (took * rng.random(number)).astype(np.int64)
    return pd.DataFrame(
        {
            "start_ns": start,
            "issue_ns": np.where(rng.random(number) < 0.1, 0, issue),
            "done_ns": start + took,
            "bytes": rng.integers(0, 1 << 31, number, dtype=np.int32),
            "error": pd.Categorical(rng.choice(["ok", "ioerr"], number, p=[0.9, 0.1])),
            "comm": pd.Categorical(rng.choice(["fio", "nginx", "x"], number)),
            "tgid": rng.integers(1, groups + 1, number).astype(np.uint32),
        }
    )


def by_hand(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    rows = []
    for labels, mine in frame.astype({"comm": str}).groupby(keys):
        took, issued = mine["done_ns"] - mine["start_ns"], mine[mine["issue_ns"] != 0]
        row = dict(zip(keys, labels, strict=True))
        row |= {"count": len(mine), "bytes": mine["bytes"].sum(), "errors": (mine["error"] != "ok").sum()}
        row |= {"latency_max_us": took.max() / 1000, "latency_total_us": took.sum() / 1000}
        for name, values in (
            ("latency", took),
            ("queue", issued["issue_ns"] - issued["start_ns"]),
            ("service", issued["done_ns"] - issued["issue_ns"]),
        ):
            for which, share in QUANTILES.items():
                there = len(values) > 0
                row[f"{name}_{which}_us"] = (
                    np.quantile(values, share, method="inverted_cdf") / 1000 if there else np.nan
                )
        rows.append(row)
    out = pd.DataFrame(rows, columns=[*keys, *block_figures.FIGURES])
    order = ["latency_total_us", *keys]
    return out.sort_values(order, ascending=[False, *(True for _ in keys)], ignore_index=True)


def shared(frame: pd.DataFrame, pieces: int) -> BlockRequests:
    """Return the requests in two shares of several frames each, the first of which is empty."""
    cuts = np.linspace(0, len(frame), pieces + 1).astype(int)
    parts = [frame.iloc[since:until].reset_index(drop=True) for since, until in pairwise(cuts)]

    def share(which: int, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
        yield frame.iloc[:0][list(columns)]
        yield from (part[list(columns)] for part in parts[which::2])

    return BlockRequests((lambda columns: share(0, columns), lambda columns: share(1, columns)), len(frame))


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    number=st.integers(0, 2000), seed=st.integers(0, 2**32), spread=st.sampled_from([0.0, 0.05, 1.0, 6.0]),
    groups=st.integers(1, 30), pieces=st.integers(1, 9), held=st.sampled_from([0, 50, 1 << 20]),
    cells=st.sampled_from([1, 3000, 1 << 20]), kept=st.sampled_from([0, 200, 1 << 20]), slowest_first=st.booleans(),
)  # fmt: skip
def test_figures_equal_those_of_all_requests_at_once(
    monkeypatch: pytest.MonkeyPatch,
    number: int, seed: int, spread: float, groups: int, pieces: int, held: int, cells: int, kept: int,
    slowest_first: bool,
) -> None:  # fmt: skip
    for name, value in (("_HELD", held), ("_JOINED", held), ("_CELLS", cells), ("_MOST_KEPT", kept)):
        monkeypatch.setattr(block_figures, name, value)
    frame = requests(number, seed, spread, groups)
    if slowest_first:
        frame = frame.iloc[np.argsort(frame["start_ns"] - frame["done_ns"], kind="stable")]
    for keys in (["comm", "tgid"], ["comm"]):
        found = figures(shared(frame, pieces), keys)
        assert found.columns.tolist() == [*keys, *block_figures.FIGURES]
        assert found.get("tgid", frame["tgid"]).dtype == np.uint32
        pd.testing.assert_frame_equal(found, by_hand(frame, keys), check_dtype=False, rtol=0, atol=0)


@pytest.mark.parametrize("changed", ["all slower", "a group more", "a request more"])
def test_figures_of_requests_that_change_between_two_readings_are_those_of_one_of_them(
    monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    monkeypatch.setattr(block_figures, "_HELD", 0)
    monkeypatch.setattr(block_figures, "_MOST_KEPT", 0)
    before, readings = requests(500, 1, 1.0, 3), 0
    after = {
        "all slower": before.assign(done_ns=before["done_ns"] + 10**9),
        "a group more": before.assign(tgid=before["tgid"].where(before.index != 7, np.uint32(9))),
        "a request more": pd.concat([before, before.tail(1)], ignore_index=True),
    }[changed]

    def share(columns: Sequence[str]) -> list[pd.DataFrame]:
        nonlocal readings
        readings += 1
        return [(before if readings == 1 else after)[list(columns)]]

    found = figures(BlockRequests((share,), 500), ["comm", "tgid"])
    truth = before if readings == 2 else after
    pd.testing.assert_frame_equal(found, by_hand(truth, ["comm", "tgid"]), check_dtype=False, rtol=0, atol=0)
    assert readings == 3 or changed == "a request more"


def test_clocks_of_a_forged_capture_give_figures_or_an_arithmetic_error() -> None:
    frame = requests(50, 1, 1.0, 2)
    frame.loc[3, "done_ns"], frame.loc[4, "start_ns"] = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    frame.loc[5, "done_ns"] = -7
    with np.errstate(all="raise"):
        assert figures(frame, ["comm"])["count"].sum() == 50


@pytest.mark.parametrize("slowest_first", [False, True])
def test_requests_are_read_again_only_where_their_percentiles_moved(
    monkeypatch: pytest.MonkeyPatch, slowest_first: bool
) -> None:
    monkeypatch.setattr(block_figures, "_HELD", 1000)
    frame, readings = requests(20_000, 1, 1.0, 1), 0
    if slowest_first:
        frame = frame.iloc[np.argsort(frame["start_ns"] - frame["done_ns"], kind="stable")]

    def share(columns: Sequence[str]) -> Iterator[pd.DataFrame]:
        nonlocal readings
        readings += 1
        yield from (frame[list(columns)].iloc[since : since + 1000] for since in range(0, len(frame), 1000))

    found = figures(BlockRequests((share,), len(frame)), ["comm"])
    pd.testing.assert_frame_equal(found, by_hand(frame, ["comm"]), check_dtype=False, rtol=0, atol=0)
    assert readings == 1 + slowest_first


def test_two_shares_of_several_groups_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_figures, "_HELD", 1000)
    frame, readings = requests(40_000, 1, 1.0, 3), 0

    def share(columns: Sequence[str], first: int) -> Iterator[pd.DataFrame]:
        nonlocal readings
        readings += 1
        yield from (frame[list(columns)].iloc[since : since + 1000] for since in range(first, len(frame), 2000))

    shares = tuple(partial(share, first=first) for first in (0, 1000))
    found = figures(BlockRequests(shares, len(frame)), ["comm"])
    pd.testing.assert_frame_equal(found, by_hand(frame, ["comm"]), check_dtype=False, rtol=0, atol=0)
    assert readings == len(shares)


@pytest.mark.parametrize("kept", [0, 1 << 20])
def test_little_is_kept_of_many_requests(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """Of many requests, those in memory are the ones of a frame, and few values near percentiles."""
    monkeypatch.setattr(block_figures, "_HELD", 1000)
    monkeypatch.setattr(block_figures, "_JOINED", 1000)
    monkeypatch.setattr(block_figures, "_MOST_KEPT", kept)
    held: list[int] = []
    real = block_figures._Kept._append

    def append(self: block_figures._Kept, *piece: np.ndarray) -> None:
        real(self, *piece)
        held.append(len(self))

    monkeypatch.setattr(block_figures._Kept, "_append", append)
    most = {}
    for number in (20_000, 80_000):
        held.clear()
        frame = requests(number, 1, 1.0, 1)
        figures(shared(frame, number // 2000), ["comm"])
        most[number] = max(held)
    # A percentile that was estimated from four times as many requests is twice as certain, and bins have a width.
    assert most[80_000] < (80_000 / 8 if kept else 2000)
    assert most[80_000] < 3 * most[20_000]
