# SPDX-License-Identifier: Apache-2.0
"""Pictures of latency show the measurements and what the setting cost, and every text is readable.

The figures are drawn, so that errors that only drawing raises are found.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cwndtrace.lab import statistics
from cwndtrace.plot.latency import latency
from tests.unit import drawing, experiments
from tests.unit.experiments import STORY

SUMMARY = STORY.summary


def both(measured: pd.DataFrame) -> Figure:
    return latency(measured, statistics.summarise(measured))


def spread_out(measured: pd.DataFrame) -> pd.DataFrame:
    """Return the measurements with latencies that swing from round to round by far more than the setting costs."""
    return measured.assign(latency_ms=measured["latency_ms"] * (1 + 9 * (measured["round"] % 2)))


def swapped(measured: pd.DataFrame) -> pd.DataFrame:
    """Return the measurements with the settings exchanged, so that "on" is the faster one."""
    return measured.assign(setting=measured["setting"].map({"on": "off", "off": "on"}))


CASES: dict[str, Callable[[], Figure]] = {
    "plain": lambda: latency(STORY.measured, SUMMARY),
    "one cell": lambda: both(experiments.experiment(rounds=3, bursts=(1_000_000,), idle_times=(0.8,)).measured),
    "many": lambda: both(
        experiments.experiment(
            rounds=3, bursts=tuple(n * 100_000 for n in range(1, 9)), idle_times=(0.1, 0.5, 1.0, 2.0, 5.0)
        ).measured
    ),
    "on alone": lambda: both(STORY.measured[STORY.measured["setting"] == "on"]),
    "one round": lambda: both(STORY.measured[STORY.measured["round"] == 1]),
    "nothing": lambda: latency(experiments.NOTHING.measured, experiments.NOTHING.summary),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", CASES)
def test_every_text_is_readable_and_the_legend_shows_what_is_drawn(name: str) -> None:
    figure = CASES[name]()
    drawing.check_texts(figure)
    drawing.check_legends(figure)


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_colours_are_used_and_settings_restored(dark: bool) -> None:
    drawing.check_colours(CASES["plain"], dark=dark)


def test_a_picture_without_data_says_so() -> None:
    assert "nothing was measured" in drawing.texts(CASES["nothing"]())


def test_medians_dots_and_spreads_equal_the_measurements() -> None:
    figure = latency(STORY.measured, SUMMARY)
    bursts = sorted(experiments.ON_MS)
    assert len(figure.axes) == len(bursts)
    for axes, burst in zip(figure.axes, bursts, strict=True):
        mine = STORY.measured[STORY.measured["burst_bytes"] == burst]
        for setting, marker in (("on", "o"), ("off", "s")):
            values = mine[mine["setting"] == setting].groupby("idle_s")["latency_ms"]
            drawn = drawing.points(axes, marker)
            assert [y for _, y in drawn] == pytest.approx(values.median().tolist())
            assert [round(x) for x, _ in drawn] == [0, 1, 2]
        assert sorted(y for _, y in drawing.points(axes, ".")) == pytest.approx(sorted(mine["latency_ms"]))
        paths = [np.asarray(path.vertices, float) for collection in axes.collections for path in collection.get_paths()]
        spans = sorted(tuple(path[:, 1]) for path in paths if len(path) == 2)
        groups = mine.groupby(["setting", "idle_s"])["latency_ms"]
        expected = sorted(zip(groups.quantile(0.05), groups.quantile(0.95), strict=True))
        assert np.asarray(spans) == pytest.approx(np.asarray(expected))
        heights = sorted(patch.get_height() for patch in axes.patches if isinstance(patch, Rectangle))
        assert heights == pytest.approx(sorted(groups.median()))
        assert axes.get_ylim()[0] == 0
        # The medians are over all that they stand for.
        medians = {line for line in axes.lines if line.get_marker() in ("o", "s")}
        others = {*axes.lines, *axes.collections, *axes.patches} - medians
        assert min(line.get_zorder() for line in medians) > max(other.get_zorder() for other in others)
    assert len({axes.get_ylim() for axes in figure.axes}) == 1


@pytest.mark.quick(2)
@pytest.mark.parametrize("number", range(1, 7))
def test_panels_have_the_same_size_and_take_the_whole_width(number: int) -> None:
    sizes = tuple(100_000 * n for n in range(1, number + 1))
    figure = both(experiments.experiment(rounds=1, bursts=sizes, idle_times=(0.8,)).measured)
    boxes = [axes.get_position() for axes in figure.axes]
    assert len(boxes) == number
    assert len({(round(box.width, 6), round(box.height, 6)) for box in boxes}) == 1
    left, right = min(box.x0 for box in boxes), max(box.x1 for box in boxes)
    assert left == pytest.approx(1 - right)
    assert left * 7.2 == pytest.approx(0.68)
    # Each panel at the foot names its axis, and those at the left theirs.
    for axes, box in zip(figure.axes, boxes, strict=True):
        last = not any(other.x0 == box.x0 and other.y0 < box.y0 for other in boxes)
        assert axes.get_xlabel().startswith("idle") is last
        assert (axes.get_ylabel() == "latency (ms)") is bool(box.x0 == left)


def test_costs_are_above_each_pair_and_the_highest_is_in_the_title() -> None:
    figure = latency(STORY.measured, SUMMARY)
    cell = SUMMARY[(SUMMARY["burst_bytes"] == 2e6) & (SUMMARY["idle_s"] == 2)].iloc[0]
    labels = [text.get_text() for text in figure.axes[3].texts]
    assert f"+{cell['cost_ms']:.0f} ms" in labels
    assert f"{cell['cost_low_ms']:.0f} to {cell['cost_high_ms']:.0f}" in labels
    took = f"{cell['median_on_ms']:.0f} ms instead of {cell['median_off_ms']:.0f} ms"
    assert f"After 2 s of idle time, 2 MB took {took}" in drawing.texts(figure)
    assert any(f"{cell['cost_rtts']:.1f} round trips" in text for text in drawing.texts(figure))


def test_the_right_axis_is_in_round_trips() -> None:
    figure = latency(STORY.measured, SUMMARY)
    drawing.draw(figure)
    (right,) = figure.axes[1].child_axes
    assert right.get_ylim()[1] == pytest.approx(figure.axes[1].get_ylim()[1] / experiments.RTT_MS)
    assert not figure.axes[0].child_axes


def test_a_line_separates_idle_times_below_the_rto_from_longer_ones() -> None:
    figure = latency(STORY.measured, SUMMARY)
    (line,) = [item for item in figure.axes[0].lines if item.get_linestyle() == "--" and item.get_color() != "none"]
    assert list(np.asarray(line.get_xdata())) == [0.5, 0.5]
    above = both(STORY.measured[STORY.measured["idle_s"] > 1])
    assert not [item for item in above.axes[0].lines if item.get_linestyle() == "--"]


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("measured", "title"),
    [
        (STORY.measured[STORY.measured["idle_s"] < 1], "The setting cost nothing here"),
        (spread_out(STORY.measured), "Inconclusive: more rounds are needed"),
        (swapped(STORY.measured), "After 2 s of idle time, 2 MB took 114 ms instead of 618 ms"),
        (STORY.measured[STORY.measured["round"] < 3], "Too few rounds to be sure of a difference"),
        (STORY.measured[STORY.measured["setting"] == "on"], "Latency with the setting on; nothing to compare with"),
        (STORY.measured[STORY.measured["setting"] == "off"], "Latency with the setting off; nothing to compare with"),
    ],
)
def test_the_title_claims_no_more_than_was_measured(measured: pd.DataFrame, title: str) -> None:
    shown = drawing.texts(both(measured))
    assert title in shown
    assert not any("nan" in text for text in shown)


def test_the_largest_of_many_sizes_are_shown_and_counted() -> None:
    figure = CASES["many"]()
    assert len(figure.axes) == 6
    assert "300 kB bursts" in drawing.texts(figure)
    assert "200 kB bursts" not in drawing.texts(figure)
    assert any("the largest 6 of 8 sizes" in text for text in drawing.texts(figure))


@pytest.mark.slow
def test_costs_without_room_have_no_labels() -> None:
    for number, labelled in ((3, True), (5, True), (16, False)):
        idle_times = tuple(round(0.4 + n / 100, 2) for n in range(number))
        figure = both(experiments.experiment(rounds=3, bursts=(1, 2, 3, 4, 5), idle_times=idle_times).measured)
        assert bool(figure.axes[0].texts) is labelled
