# SPDX-License-Identifier: Apache-2.0
"""Spans that overlap get lanes of their own, and are counted, in whatever order they come."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cwndtrace.export.lanes import Depth, Lanes

SPAN = st.tuples(st.integers(0, 40), st.integers(0, 15)).map(lambda t: (t[0], t[0] + t[1]))
BATCHES = st.lists(st.lists(SPAN, max_size=8), max_size=5)


def columns(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    both = np.array(rows, dtype=np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


@given(BATCHES)
def test_no_two_spans_of_a_lane_overlap(batches: list[list[tuple[int, int]]]) -> None:
    lanes, ends = Lanes(), dict[int, int]()
    for rows in map(sorted, batches):
        for lane, (begin, end) in zip(lanes.place(*columns(rows)), rows, strict=True):
            assert ends.get(lane, 0) <= begin
            ends[lane] = end
    assert ends.keys() == set(range(len(ends)))


@given(st.lists(SPAN, min_size=1, max_size=20).map(sorted))
def test_one_batch_has_as_many_lanes_as_spans_at_once(rows: list[tuple[int, int]]) -> None:
    at_once = [sum(b <= at < e for b, e in rows) for at in range(60)]
    # A span without a length needs a lane, too, which later ones can share.
    moments = [sum(b < at < e for b, e in rows) + 1 for at, end in rows if at == end]
    assert Lanes().place(*columns(rows)).max() + 1 == max([*at_once, *moments])


@given(BATCHES)
def test_the_depth_equals_counting_the_spans_at_each_moment(batches: list[list[tuple[int, int]]]) -> None:
    depth, changes = Depth(), list[tuple[int, int]]()
    for number, rows in enumerate(batches, start=1):
        later = [begin for batch in batches[number:] for begin, _ in batch]
        changes += depth.add(*columns(rows), min(later, default=1 << 40))
    spans = [span for rows in batches for span in rows]
    truth = [(at, sum(b <= at < e for b, e in spans)) for at in range(60)]
    before = [0, *(number for _, number in truth)]
    assert changes == [(at, number) for (at, number), last in zip(truth, before, strict=False) if number != last]
