# SPDX-License-Identifier: Apache-2.0
"""In the panels of a timeline, marks are where the records say, and what is left out is counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from cwndtrace.errors import UsageError
from cwndtrace.plot import panels
from tests.unit import drawing, frames
from tests.unit.drawing import LOSSY, legend, story, timeline_of
from tests.unit.examples import FEWEST


def labels(axes: Axes) -> list[Text]:
    return [text for text in axes.texts if "→" in text.get_text() and "after" in text.get_text()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.cwnd"


def test_marks_are_where_the_records_say(path: Path) -> None:
    resets = frames.table("cwnd_reset", frames.reset(12.5, idle_us=2_500_000, srtt_us=500_000))
    seen = frames.snapshots(frames.snapshot(5, cwnd=100), frames.snapshot(20, cwnd=900))
    figure = timeline_of(
        frames.capture(path, resets=resets, connections=seen, block_io=frames.table("block_io", frames.block(7)))
    )
    drawing.draw(figure)
    window, disk = figure.axes
    assert window.get_xlim() == disk.get_xlim() == (0, 60)
    line = next(item for item in window.lines if len(np.asarray(item.get_xdata())) == 5)
    # The window is known at the snapshots, from a round trip and a jiffy into the idle time to its end, and then.
    points = list(zip(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist(), strict=True))
    assert points == [(5, 100), (10.51, 2827), (12.5, 2827), (12.5, 44), (20, 900)]
    arrows = [item for item in window.lines if item.get_marker() == "v"]
    assert [(list(item.get_xdata()), list(item.get_ydata())) for item in arrows] == [([12.5], [44])]  # type: ignore[arg-type]
    spans = [
        patch for collection in window.collections for patch in collection.get_paths() if collection.get_zorder() == 0.5
    ]
    (extents,) = [span.get_extents() for span in spans]
    assert (extents.x0, extents.x1) == (10, 12.5)
    assert [text.get_text() for text in labels(window)] == ["2827 → 44 after 2.5 s"]
    (dots,) = [
        collection
        for collection in disk.collections
        if len(np.asarray(collection.get_offsets())) == 1 and collection.get_zorder() == 3
    ]
    assert np.asarray(dots.get_offsets()).tolist() == [[7.0, 0.25]]


def test_of_many_resets_some_are_labelled_and_counted(path: Path) -> None:
    resets, connections = frames.story(seconds=600)
    trace = frames.capture(path, resets=resets, connections=connections)
    figure = timeline_of(trace, span=(0, 600))
    number = len(labels(figure.axes[0]))
    assert 5 <= number < len(trace.resets)
    assert any(f"{len(trace.resets)} resets, {number} labelled" in text for text in drawing.texts(figure))


def test_lossy_spans_are_hatched_and_counted(path: Path) -> None:
    figure = timeline_of(story(path, lossy=LOSSY))
    window, disk = figure.axes
    (short,) = [patch.get_extents().transformed(window.transData.inverted()) for patch in window.patches]
    (long,) = [patch.get_extents().transformed(disk.transData.inverted()) for patch in disk.patches]
    assert (round(long.x0, 6), round(long.x1, 6)) == (46, 48)
    assert round(short.x0, 6) == 20
    assert short.x1 - short.x0 > 0.05  # wide enough to be seen
    assert all(patch.get_hatch() for patch in [*window.patches, *disk.patches])
    assert "records lost: 1,237" in legend(figure)
    assert not any("lost" in text for text in legend(timeline_of(story(path.with_name("b.cwnd")))))


def test_many_requests_are_shown_as_percentiles(path: Path) -> None:
    figure = timeline_of(story(path, block_io=frames.disk(panels.SCATTER_MAX + 1)))
    assert f"median of {panels.SCATTER_MAX + 1:,} I/Os" in legend(figure)
    disk = figure.axes[1]
    median = next(line for line in disk.lines if line.get_marker() == "None" and len(np.asarray(line.get_xdata())) > 9)
    x, y = np.asarray(median.get_xdata()), np.asarray(median.get_ydata())
    slow = (x > 34.5) & (x < 38.5)
    quiet = (x < 33.5) | (x > 39.5)
    assert y[slow].min() > 3 > 0.6 > y[quiet].max()
    few = timeline_of(story(path.with_name("b.cwnd"), block_io=frames.disk(panels.SCATTER_MAX)))
    assert "read" in legend(few)


def test_failed_requests_are_marked_and_counted(path: Path) -> None:
    block_io = frames.table("block_io", frames.block(1), frames.block(2, 500, error="medium"))
    figure = timeline_of(story(path, block_io=block_io))
    assert "I/O error: 1" in legend(figure)
    crosses = next(line for line in figure.axes[1].lines if line.get_marker() == "x")
    assert (list(crosses.get_xdata()), list(crosses.get_ydata())) == ([2.0], [0.5])  # type: ignore[arg-type]


def test_the_window_axis_is_logarithmic_only_for_a_wide_range(path: Path) -> None:
    assert timeline_of(story(path)).axes[0].get_yscale() == "log"
    narrow = frames.table("cwnd_reset", frames.reset(1, cwnd_before=68, cwnd_after=10))
    figure = timeline_of(frames.capture(path.with_name("b.cwnd"), resets=narrow))
    assert figure.axes[0].get_yscale() == "linear"
    assert figure.axes[0].get_ylim()[0] == 0


@FEWEST
@given(data=st.data())
def test_records_of_any_values_can_be_drawn(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    seconds, number = st.floats(0, 60), st.integers(0, 2**32 - 1)
    rows = [
        frames.reset(
            data.draw(seconds), cwnd_before=data.draw(number), cwnd_after=data.draw(number), srtt_us=data.draw(number),
            idle_us=data.draw(st.integers(0, 2**63)), reason=data.draw(st.integers(0, 255)), tgid=data.draw(number),
        )
        for _ in range(data.draw(st.integers(0, 4)))
    ]  # fmt: skip
    requests = [
        frames.block(data.draw(seconds), data.draw(st.floats(0, 1e9))) for _ in range(data.draw(st.integers(0, 3)))
    ]
    seen = [frames.snapshot(data.draw(seconds), cwnd=data.draw(number)) for _ in range(data.draw(st.integers(0, 2)))]
    trace = frames.capture(
        tmp_path_factory.mktemp("any") / "a.cwnd", resets=frames.table("cwnd_reset", *rows),
        block_io=frames.table("block_io", *requests), connections=frames.snapshots(*seen),
    )  # fmt: skip
    drawing.draw(timeline_of(trace))


def test_a_span_shows_only_the_resets_within_it(path: Path) -> None:
    trace = story(path)
    figure = timeline_of(trace, span=(30, 42))
    drawing.draw(figure)
    assert figure.axes[0].get_xlim() == (30, 42)
    inside = trace.resets[(trace.resets["ts_ns"] - frames.MONO).astype("int64").between(30 * 10**9, 42 * 10**9)]
    assert any(f"  {len(inside)} resets" in text for text in drawing.texts(figure))
    for text in labels(figure.axes[0]):
        assert int(text.get_text().split(" → ")[0]) in set(inside["cwnd_before"])
    with pytest.raises(UsageError, match="empty"):
        timeline_of(trace, span=(3, 3))


@pytest.mark.parametrize("span", [(12.5, 20.0), (5.0, 12.5)])
def test_a_reset_at_the_edge_of_a_span_has_its_label(path: Path, span: tuple[float, float]) -> None:
    resets = frames.table("cwnd_reset", frames.reset(12.5), frames.reset(30))
    figure = timeline_of(frames.capture(path, resets=resets), span=span)
    assert len(labels(figure.axes[0])) == 1


@pytest.mark.parametrize("latencies_us", [[250.0], [250.0, 260.0], [90.0, 2_000_000.0]])
def test_the_latency_axis_has_room_for_all_requests_and_at_least_a_decade(
    path: Path, latencies_us: list[float]
) -> None:
    blocks = frames.table("block_io", *(frames.block(at, us) for at, us in enumerate(latencies_us, start=1)))
    low, high = timeline_of(story(path, block_io=blocks)).axes[1].get_ylim()
    assert low < min(latencies_us) / 1000 <= max(latencies_us) / 1000 < high
    assert high / low >= 9.999


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.5, 2000.0, [1, 10, 100, 1000]),
        (1.0, 100.0, [1, 10, 100]),
        (2.0, 400.0, [3, 10, 30, 100, 300]),
        (15.0, 60.0, [20, 50]),
        (1.5, 12.0, [2, 5, 10]),
    ],
)
def test_a_logarithmic_axis_has_finer_steps_where_it_has_few_decades(
    low: float, high: float, ticks: list[float]
) -> None:
    axes = Figure().add_subplot()
    panels.plain_log(axes, low, high)
    assert np.asarray(axes.yaxis.get_major_locator()()).tolist() == ticks
