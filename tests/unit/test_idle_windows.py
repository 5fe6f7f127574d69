# SPDX-License-Identifier: Apache-2.0
"""Causes of idle time that are found part by part equal those found from all block requests at once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import cwndtrace
from cwndtrace import trace as trace_module
from cwndtrace.analysis import block_io, idle_cause, idle_windows
from cwndtrace.records import arrow, layout
from cwndtrace.store import Capture, CaptureWriter
from cwndtrace.trace import Trace
from tests.unit import frames
from tests.unit.examples import FEW

SECONDS = 20


def story(seed: int, number: int, resets: int) -> tuple[layout.Records, layout.Records]:
    """Return requests of a few processes, journals and kernel threads as they ended, and resets of these processes."""
    rng = np.random.default_rng(seed)
    blocks = np.repeat(frames.block(), number)
    start = frames.MONO + np.sort(rng.integers(0, SECONDS * 10, number)) * (frames.SECOND // 10)
    blocks["start_ns"] = start
    # Some take seconds, so that they come in a part long after their start.
    blocks["done_ns"] = start + rng.choice([10**5, 10**8, 9 * 10**8, 5 * 10**9], number, p=[0.3, 0.4, 0.25, 0.05])
    blocks["dev"] = np.array([7 << 20, 8 << 20], np.uint32)[rng.integers(0, 2, number)]
    whose = rng.integers(1, 6, number)
    blocks["tgid"], blocks["tid"] = whose, whose * 10 + rng.integers(0, 2, number)
    blocks["cgroup_id"], blocks["owner_cgroup_id"] = rng.integers(0, 4, number), rng.integers(0, 4, number)
    blocks["op"] = np.array([layout.code("op", name) for name in ("read", "write", "flush")])[
        rng.choice(3, number, p=[0.45, 0.5, 0.05])
    ]
    blocks["comm"] = rng.choice([b"web", b"jbd2/sda-8", b"kworker/u8:1"], number, p=[0.8, 0.1, 0.1])
    made = [
        frames.reset(
            at / 10, idle_us=int(rng.choice([100_000, 900_000, 4_000_000])),
            last_rcv_us=int(rng.choice([50_000, 800_000, 9_000_000])), tgid=int(rng.integers(1, 7)),
            tid=int(rng.integers(1, 7)) * 10 + int(rng.integers(0, 2)), cgroup_id=int(rng.integers(0, 4)),
            reason=str(rng.choice(["idle", "rto_loss"], p=[0.9, 0.1])), sock_cookie=int(rng.integers(1, 5)),
        )
        for at in np.sort(rng.integers(10, SECONDS * 10, resets)).tolist()
    ]  # fmt: skip
    return blocks[np.argsort(blocks["done_ns"], kind="stable")], np.concatenate(made)


def written(path: Path, blocks: layout.Records, resets: layout.Records, rows: int) -> Trace:
    """Write a capture with parts of so many requests."""
    writer = CaptureWriter.create(path, {"devices": {"7:0": "loop0", "8:0": "sda"}})
    writer.add("cwnd_reset", arrow.to_arrow("cwnd_reset", resets, frames.OFFSET))
    for since in range(0, len(blocks), rows):
        writer.add("block_io", arrow.to_arrow("block_io", blocks[since : since + rows], frames.OFFSET))
        writer.flush(force=True)
    writer.close()
    return cwndtrace.load(path)


def at_once(trace: Trace) -> pd.DataFrame:
    """Return the verdicts from all requests in one frame."""
    requests = trace.block_io.assign(owner_cgroup_id=lambda rows: rows["owner_cgroup_id"].astype("float64"))
    return idle_cause.with_cause(trace._judged, requests, trace.recoveries, started_ns=trace.started_ns)


def equal(found: pd.DataFrame, truth: pd.DataFrame) -> None:
    columns = [*idle_cause.COLUMNS]
    pd.testing.assert_frame_equal(found[columns], truth[columns], check_dtype=False, rtol=0, atol=0)


NUMBERS = count()


@given(
    st.lists(st.integers(0, 9), max_size=40), st.sets(st.integers(1, 40), max_size=6),
    st.lists(st.integers(0, 39), max_size=8),
)  # fmt: skip
@example([7, 7, 7, 7], {1}, [0])
def test_ranks_are_the_places_in_a_stable_order(starts: list[int], cuts: set[int], rows: list[int]) -> None:
    times = np.array(starts, dtype=np.int64)
    place = np.argsort(np.argsort(times, kind="stable"), kind="stable")
    numbers = np.array([row % len(starts) for row in rows if starts], dtype=np.int64)
    parts = np.split(times, sorted(cuts))
    assert idle_windows.ranks(parts, numbers, times[numbers]).tolist() == place[numbers].tolist()


def test_requests_of_nobody_are_not_kept_for_a_reset_of_nobody() -> None:
    resets = frames.pandas(frames.table("cwnd_reset", frames.reset(10, tgid=0, tid=0, cgroup_id=0)))
    requests = frames.pandas(frames.table("block_io", frames.block(9.5, tgid=0, tid=0, cgroup_id=0)))
    relevant = idle_windows.Relevant(resets)
    assert "cgroup_id" not in relevant.needs
    assert not relevant(requests.drop(columns=["cgroup_id", "owner_cgroup_id"])).any()


@pytest.mark.slow
@settings(FEW, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32), number=st.integers(1, 150), resets=st.integers(1, 12), rows=st.integers(5, 60),
    footers=st.sampled_from(["true", "too late", "none"]), held=st.sampled_from([1, 20, 1 << 19]),
)  # fmt: skip
def test_causes_found_part_by_part_equal_those_from_all_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    seed: int, number: int, resets: int, rows: int, footers: str, held: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(idle_windows, "BATCH", held)
    monkeypatch.setattr(trace_module, "_GATHERED", 1)
    real = Capture.pieces_and_rest

    def changed(self: Capture, *arguments: Any) -> Iterator[tuple[pa.Table, int | None]]:
        for piece, rest in real(self, *arguments):
            yield piece, None if footers == "none" or rest is None else rest + 10**9

    with monkeypatch.context() as patched:
        if footers != "true":
            patched.setattr(Capture, "pieces_and_rest", changed)
        trace = written(tmp_path / f"{next(NUMBERS)}.cwnd", *story(seed, number, resets), rows)
        equal(trace.verdicts, at_once(trace))


@pytest.mark.slow
def test_few_requests_are_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture of four times as many requests needs no more of them at once, but for those of long idle times."""
    monkeypatch.setattr(idle_windows, "BATCH", 200)
    monkeypatch.setattr(trace_module, "_GATHERED", 1)
    most: dict[int, int] = {}
    real = block_io.joined

    def joined(held: list[pd.DataFrame], columns: tuple[str, ...], rows: int, **how: bool) -> pd.DataFrame:
        most[number] = max(most.get(number, 0), rows)
        return real(held, columns, rows, **how)

    monkeypatch.setattr(idle_windows, "joined", joined)
    for number in (2_000, 8_000):
        blocks = np.repeat(frames.block(tgid=4242), number)
        blocks["start_ns"] += np.arange(number, dtype=np.uint64) * 10_000_000
        blocks["done_ns"] += np.arange(number, dtype=np.uint64) * 10_000_000
        resets = [frames.reset(at, idle_us=500_000) for at in range(2, number // 100)]
        trace = written(tmp_path / f"{number}.cwnd", blocks, np.concatenate(resets), 100)
        equal(trace.verdicts, at_once(trace))
    assert most[2_000] == most[8_000] < 500
