# SPDX-License-Identifier: Apache-2.0
"""A picture's clock, its spans with losses and its connections; and that labels and headlines keep their places."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.artist import Artist
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cwndtrace.errors import UsageError
from cwndtrace.plot import frames as of_plot
from cwndtrace.plot import heat, labels, layout, style
from cwndtrace.plot.frames import Clock, LossBand
from cwndtrace.plot.labels import Label
from tests.unit import frames

SECOND = frames.SECOND


def at(name: str, *seconds: float) -> pd.DataFrame:
    return pd.DataFrame({name: [frames.MONO + int(second * SECOND) for second in seconds]})


NONE = at("ts_ns")


def clock(about: Any, *records: pd.DataFrame, span: tuple[float, float] | None = None) -> Clock:
    resets, connections, blocks = (*records, NONE, NONE, NONE)[:3]
    return of_plot.clock(resets, connections, blocks, about, span)


def test_a_picture_begins_and_ends_with_its_trace() -> None:
    made = clock(frames.about(), at("ts_ns", 5), at("ts_ns", 7))
    assert (made.zero_ns, made.begin, made.end, made.started) == (frames.MONO, 0, 60, "2026-11-18 12:30:00.000")
    # A record from after the end is in the picture too.
    assert clock(frames.about(), at("ts_ns", 5, 61), NONE, at("start_ns", 63)).end == 63
    assert clock(frames.about(), span=(2, 7.5)).end == 7.5
    assert clock(frames.about(), span=(2, 7.5)).begin == 2


def test_without_times_in_the_metadata_those_of_the_records_count() -> None:
    untold = frames.about(clock=None)
    made = clock(untold, at("ts_ns", 5, 9), at("ts_ns", 3), at("start_ns", 4, 12))
    assert (made.zero_ns, made.begin, made.end, made.started) == (frames.MONO + 3 * SECOND, 0, 9, "")
    assert (clock(untold).zero_ns, clock(untold).end) == (0, 0.001)
    assert clock(untold, at("ts_ns", 5)).end == 0.001


@pytest.mark.parametrize("span", [(5.0, 5.0), (7.5, 2.0)])
def test_an_empty_span_is_refused(span: tuple[float, float]) -> None:
    with pytest.raises(UsageError) as caught:
        clock(frames.about(), span=span)
    assert caught.value.cause == f"The span from {span[0]:g} s to {span[1]:g} s is empty."
    assert caught.value.remedy == "Give the earlier second first."


def test_what_reaches_into_a_picture_is_shown() -> None:
    made = clock(frames.about(), span=(10, 20))
    spans = pd.concat(
        [at("begin", 1, 1, 15, 20, 20.5, 5), at("end", 9.9, 10, 16, 25, 21, 30).rename(columns={"begin": "end"})],
        axis=1,
    )
    assert made.shown(spans, "begin", "end").index.tolist() == [1, 2, 3, 5]
    assert made.seconds(spans["begin"]).tolist() == [1, 1, 15, 20, 20.5, 5]


def test_losses_that_reach_into_the_picture() -> None:
    def loss(begin: float, end: float, lost: int = 3) -> dict[str, Any]:
        return {
            "event": "block_io", "lost": lost,
            "start_ns": frames.MONO + int(begin * SECOND), "end_ns": frames.MONO + int(end * SECOND),
        }  # fmt: skip

    about = frames.about(lossy=[loss(1, 9), loss(2, 10), loss(12, 13), loss(12, 13, 0), loss(20, 30), loss(21, 30)])
    bands = of_plot.losses(about, clock(about, span=(10, 20)))
    assert bands == [LossBand("block_io", begin, end, 3) for begin, end in ((2, 10), (12, 13), (20, 30))]


def sent(**numbers: int) -> pd.DataFrame:
    return pd.DataFrame({"connection": list(numbers), "bytes_sent": list(numbers.values())})


def test_the_connections_with_most_resets_are_chosen() -> None:
    resets = pd.concat([sent(b=5), sent(a=1), sent(b=6), sent(c=9)])
    seen = sent(a=10, b=10, c=20, d=1000)
    assert of_plot.choose(resets, seen, None, 2) == (["b", "c"], 4)
    assert of_plot.choose(resets, seen, None, 9) == (["b", "c", "a"], 4)
    assert of_plot.choose(resets, seen, "d", 2) == (["d"], 4)
    # Without resets those that sent most are, and of equals the first by name.
    assert of_plot.choose(sent(), sent(x=5, b=7, a=7, c=6), None, 3) == (["a", "b", "c"], 4)
    assert of_plot.choose(sent(), sent(), None, 3) == ([], 0)


def test_an_unknown_connection_is_refused_with_those_that_there_are() -> None:
    for seen, remedy in ((sent(**dict.fromkeys("abcdefg", 1)), "a, b, c, d, e"), (sent(), "none")):
        with pytest.raises(UsageError) as caught:
            of_plot.choose(sent(), seen, "x\x1b", 3)
        assert caught.value.cause == "There is no connection x? in this capture."
        assert caught.value.remedy == f"Choose one of those with most resets: {remedy}."


# ---- labels -----------------------------------------------------------------------------------------


Point = tuple[float, str, float]
POINTS = st.lists(
    st.tuples(st.floats(0, 60), st.sampled_from(["1 s", "2827 -> 44", "x" * 60, "x" * 200]), st.floats(0, 9))
)


def x_of(line: Line2D) -> float:
    return float(np.asarray(line.get_xdata())[0])


def y_of(line: Line2D) -> list[float]:
    return [float(y) for y in np.asarray(line.get_ydata())]


def placed(points: list[Point]) -> tuple[int, Figure]:
    figure = layout.sheet(3)
    axes = layout.add(figure, 0.75, 0.5, 5.5, 2)
    axes.set_xlim(0, 60)
    axes.set_ylim(0, 100)
    return labels.place(axes, [Label(x, 10, text, rank, "black") for x, text, rank in points]), figure


@given(POINTS)
def test_labels_lie_within_their_panel_and_never_over_each_other_or_a_line(points: list[Point]) -> None:
    number, figure = placed(points)
    (axes,) = figure.axes
    boxes = [labels.extent(text) for text in axes.texts]
    assert number == len(boxes) == len(axes.lines) <= len(points)
    for box in boxes:
        assert axes.bbox.x0 - 1 <= box.x0 <= box.x1 <= axes.bbox.x1 + 1
        assert box.y1 <= axes.bbox.y1 + 1
    for one, two in itertools.combinations(boxes, 2):
        assert not one.overlaps(two)
    stems = [float(axes.transData.transform((x_of(line), 0))[0]) for line in axes.lines]
    for (stem, line), (box, text) in itertools.product(
        zip(stems, axes.lines, strict=True), zip(boxes, axes.texts, strict=True)
    ):
        top = float(axes.transData.transform((0, y_of(line)[0]))[1])
        assert not (box.x0 < stem < box.x1 and top > box.y1), (text, stem)


def test_of_labels_that_collide_the_one_of_higher_rank_stays() -> None:
    many = [(30.0 + number / 1000, f"number {number:02d} of many labels", float(number)) for number in range(30)]
    number, figure = placed(many)
    assert 1 <= number < 30
    assert "number 29 of many labels" in [text.get_text() for text in figure.axes[0].texts]
    assert placed([(10, "a", 1), (50, "b", 0)])[0] == 2
    assert placed([(30, "x" * 200, 1)])[0] == 0
    assert placed([(30, "x" * 200, 1), (50, "b", 0)])[0] == 1


def test_a_line_leads_from_each_label_to_its_point() -> None:
    _, figure = placed([(20, "one", 1)])
    (text,), (line,) = figure.axes[0].texts, figure.axes[0].lines
    assert np.asarray(line.get_xdata()).tolist() == [20, 20]
    assert y_of(line)[1] == 10
    assert line.get_linewidth() < 1
    box = labels.extent(text)
    foot = figure.axes[0].transData.transform((20, y_of(line)[0]))
    assert box.x0 < foot[0] < box.x1
    assert foot[1] <= box.y1


@pytest.mark.parametrize("text", ["short", "a connection with a long name " * 5, "costs $5 " * 30])
def test_a_text_is_made_to_fit_and_keeps_both_ends(text: str) -> None:
    figure = Figure(dpi=150)
    drawn = figure.text(0, 0, text.replace("$", r"\$"), fontsize=12)
    labels.fit(drawn, 200)
    assert labels.extent(drawn).width <= 200 * 150 / 72
    content = drawn.get_text().replace(r"\$", "$")
    assert content[:4] == text[:4]
    assert content[-4:] == text[-4:]
    assert drawn.get_fontsize() == (12 if text == "short" else 6.5)
    assert ("…" in content) == (text != "short")


# ---- sheets and the heat map ------------------------------------------------------------------------


def test_a_sheet_grows_for_its_headline_and_axes_keep_their_size() -> None:
    figure = layout.sheet(3)
    axes = layout.add(figure, 0.75, 0.5, 5.5, 2)
    (line,) = axes.plot([0, 1], [0, 1])
    with style.drawing() as colours:
        layout.finish(figure, "First", "Second", {"a line": line}, "caption", colours)
    width, height = figure.get_size_inches()
    assert width == 7.2
    assert height == pytest.approx(3 + 0.62 + 0.2 + 0.14)
    box = axes.get_position()
    inches = [box.x0 * width, box.y0 * height, box.width * width, box.height * height]
    assert inches == pytest.approx([0.75, 0.5, 5.5, 2])
    first, second, caption = figure.texts
    assert [text.get_text() for text in figure.texts] == ["First", "Second", "caption"]
    boxes = [labels.extent(text) for text in (first, second, caption)]
    assert boxes[0].y0 > boxes[1].y1 > boxes[1].y0 > labels.extent(figure.legends[0]).y1
    assert labels.extent(figure.legends[0]).y0 > axes.bbox.y1
    assert 0 < boxes[2].y0 < boxes[2].y1 < axes.bbox.y0
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a line"]


def test_a_legend_takes_as_many_rows_as_it_needs() -> None:
    def rows(*names: str) -> float:
        figure = layout.sheet(3)
        axes = layout.add(figure, 0.75, 0.5, 5.5, 2)
        lines: dict[str, Artist] = {name: axes.plot([0, 1])[0] for name in names}
        with style.drawing() as colours:
            layout.finish(figure, "First", "Second", lines, "", colours)
        if figure.legends:
            assert labels.extent(figure.legends[0]).x1 <= 7.2 * figure.dpi
        return round((float(figure.get_size_inches()[1]) - 3.76) / 0.2, 6)

    assert rows() == 0
    assert rows("a", "b") == 1
    assert rows(*(f"{letter} name of thirty letters or more" for letter in "abc")) == 2
    assert rows(*(f"{letter} name of {'very ' * 12} many letters" for letter in "abc")) == 3


def test_the_heat_map_draws_each_cell_at_its_time_and_latency() -> None:
    starts = [frames.MONO + second * SECOND for second in (2, 4, 6)]
    cells = pd.DataFrame([[0, 5, 1], [7, 0, 0]], index=[100.0, 200.0], columns=starts)
    lossy = [
        {"event": event, "start_ns": starts[0], "end_ns": starts[1], "lost": 3} for event in ("block_io", "cwnd_reset")
    ]
    figure = heat.heat(cells, zero_ns=frames.MONO, about=frames.about(lossy=lossy))
    axes, bar = figure.axes
    (mesh,) = (each for each in axes.collections if isinstance(each, QuadMesh))
    array = mesh.get_array()
    assert array is not None
    assert np.ma.filled(np.ma.asarray(array).reshape(2, 3), 0).tolist() == [[0, 5, 1], [7, 0, 0]]
    corners = np.asarray(mesh.get_coordinates())
    assert corners[0, :, 0].tolist() == [2, 4, 6, 8]
    assert corners[:, 0, 1].tolist() == pytest.approx([0.1, 0.2, 0.2 * 2**0.5])
    assert (axes.get_xlim(), axes.get_yscale()) == ((2, 8), "log")
    assert (axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel()) == (
        "seconds since the start", "block I/O (ms)", "requests",
    )  # fmt: skip
    texts = [text.get_text() for text in figure.texts]
    assert texts == ["Latency of block I/O over time", "13 requests", "on web1  ·  hatched: 3 requests lost"]
    assert mesh.norm.vmin == 1
    assert mesh.norm.vmax == 7


def test_an_empty_heat_map_says_so() -> None:
    figure = heat.heat(pd.DataFrame(), zero_ns=frames.MONO, about=frames.about(host=""))
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["no block I/O recorded"]
    assert [text.get_text() for text in figure.texts][1:] == ["0 requests", "on unknown host"]
    one = heat.heat(
        pd.DataFrame([[1]], index=[100.0], columns=[frames.MONO]), zero_ns=frames.MONO, about=frames.about()
    )
    assert one.axes[0].get_xlim() == (0, 1)
