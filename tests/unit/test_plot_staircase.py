# SPDX-License-Identifier: Apache-2.0
"""Staircases show each record at its share of the window, and every text is readable.

The figures are drawn, so that errors that only drawing raises are found.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from cwndtrace.plot.staircase import _titles as titles_of_staircase
from cwndtrace.plot.staircase import staircase
from tests.unit import drawing, experiments
from tests.unit.experiments import STORY


def steps(*sizes: int, number: int = 10, top_s: float = 5.0) -> pd.DataFrame:
    """Return resets by the kernel's rule from windows of these sizes, after idle times of up to ``top_s`` seconds."""
    idle_times = np.linspace(0.32, top_s, number)
    return experiments.resets(
        *(
            {"idle_us": int(idle * 1e6), "cwnd_before": size, "cwnd_after": experiments.halved(size, idle * 1e3)}
            for size in sizes
            for idle in idle_times
        )
    )


CASES: dict[str, Callable[[], Figure]] = {
    "plain": lambda: staircase(STORY.resets["on"]),
    "mixed": lambda: staircase(steps(30, 120, 700, 2800, 2900)),
    "close floors": lambda: staircase(steps(100, 125, 160, 200)),
    "many floors": lambda: staircase(steps(*(2**n for n in range(4, 20)), number=4, top_s=600)),
    "huge": lambda: staircase(steps(2**32 - 1, top_s=40)),
    "off it": lambda: staircase(experiments.resets({"cwnd_before": 100, "cwnd_after": 77}, {"cwnd_after": 0})),
    "nothing": lambda: staircase(STORY.resets["off"]),
}


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", CASES)
def test_every_text_is_readable_and_the_legend_shows_what_is_drawn(name: str) -> None:
    figure = CASES[name]()
    drawing.check_texts(figure)
    drawing.check_legends(figure)


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_colours_are_used_and_settings_restored(dark: bool) -> None:
    drawing.check_colours(CASES["plain"], dark=dark)


def test_a_picture_without_data_says_so() -> None:
    assert "no reset after idle time in this capture" in drawing.texts(CASES["nothing"]())


def test_records_are_at_their_share_and_the_line_follows_the_kernels_rule() -> None:
    given = steps(2800, number=30, top_s=3.0)
    figure = staircase(given)
    (axes,) = figure.axes
    expected = sorted(zip(given["idle_us"] / given["rto_us"], given["cwnd_after"] / given["cwnd_before"], strict=True))
    assert np.asarray(drawing.points(axes, "o", "s")) == pytest.approx(np.asarray(expected))
    (line,) = [item for item in axes.lines if item.get_marker() == "None" and item.get_linestyle() == "-"]
    x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
    for rtos in np.arange(0.05, axes.get_xlim()[1], 0.1):
        if abs(rtos - round(rtos)) > 0.01:
            drawn = y[np.searchsorted(x, rtos)]
            assert drawn * 2800 == pytest.approx(experiments.halved(2800, rtos * experiments.RTO_MS))
    assert "Each RTO of idle time halves the window: all 30 records fit to the segment" in drawing.texts(figure)
    assert axes.get_yscale() == "log"
    drawing.draw(figure)
    ticks = [text.get_text() for text in drawing.shown_ticks(axes.yaxis)]
    assert ticks == ["1", *(f"1/{2**n}" for n in range(1, len(ticks)))]
    assert axes.get_ylim()[0] < min(expected, key=lambda at: at[1])[1] < 1 < axes.get_ylim()[1]
    assert any(text.startswith("RTO 308 ms  ·  ") for text in drawing.texts(figure))


def test_the_rto_is_in_the_caption_or_its_span() -> None:
    figure = staircase(experiments.resets({"rto_us": 200_000}, {"rto_us": 3_000_000}))
    assert any(text.startswith("RTO 200 to 3000 ms  ·  ") for text in drawing.texts(figure))


def test_the_initial_windows_of_different_windows_are_drawn_and_named() -> None:
    figure = staircase(steps(30, 120, 700, 2800))
    (axes,) = figure.axes
    dashed = [item for item in axes.lines if item.get_marker() == "None" and item.get_linestyle() == "--"]
    assert sorted(float(np.asarray(line.get_ydata())[0]) for line in dashed) == pytest.approx(
        [10 / 700, 10 / 120, 1 / 3]
    )
    assert {"10 of 30", "10 of 120", "10 of 700", "10 of 2,800"} <= set(drawing.texts(figure))
    squares = drawing.points(axes, "s")
    assert squares
    assert all(any(abs(y - 10 / size) < 1e-9 for size in (30, 120, 700, 2800)) for _, y in squares)


def test_a_record_that_does_not_fit_is_marked_and_counted() -> None:
    # 2.27 RTOs leave a quarter. Within a jiffy of a step, the value on either side fits. A timeout has another rule.
    figure = staircase(
        experiments.resets(
            {"idle_us": 700_000, "cwnd_before": 800, "cwnd_after": 200},
            {"idle_us": 700_000, "cwnd_before": 800, "cwnd_after": 300},
            {"idle_us": 612_000, "cwnd_before": 800, "cwnd_after": 200},
            {"idle_us": 700_000, "cwnd_before": 800, "cwnd_after": 1, "reason": "rto_loss"},
        )
    )
    assert np.asarray(drawing.points(figure.axes[0], "X")) == pytest.approx(np.asarray([(700 / 308, 0.375)]))
    assert len(drawing.points(figure.axes[0], "o")) == 2
    assert any("2 of 3 records fit" in text for text in drawing.texts(figure))
    assert {"off the staircase: 1", "halved: 2"} <= set(drawing.texts(figure))


@pytest.mark.parametrize(
    ("number", "kept", "share"),
    [(1, 0, "0 of 1 record fits"), (1, 1, "the one record fits"), (3, 1, "1 of 3 records fits"),
     (3, 0, "0 of 3 records fit"), (3, 3, "all 3 records fit")],
)  # fmt: skip
def test_titles_of_records_have_the_right_number(number: int, kept: int, share: str) -> None:
    assert f": {share} to the segment" in titles_of_staircase(number, kept)[0]


def test_very_long_idle_times_are_at_the_edge_and_counted() -> None:
    figure = staircase(steps(100, number=5, top_s=3600))
    (axes,) = figure.axes
    edge = axes.get_xlim()[1]
    assert edge < 12
    assert drawing.points(axes, ">") == [(edge, 0.1)] * 4
    assert any(text.startswith("idle over") and text.endswith(": 4") for text in drawing.texts(figure))


def test_records_without_an_rto_are_ignored() -> None:
    figure = staircase(experiments.resets({"rto_us": 0}, {"cwnd_before": 0, "cwnd_after": 0}))
    assert "no reset after idle time in this capture" in drawing.texts(figure)
    assert not list(figure.axes[0].lines)
