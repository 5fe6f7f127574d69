# SPDX-License-Identifier: Apache-2.0
"""Pictures of cost show each burst by both clocks, and every text is readable.

The figures are drawn, so that errors that only drawing raises are found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from cwndtrace.plot import style
from cwndtrace.plot.cost import _titles as titles_of_cost
from cwndtrace.plot.cost import cost
from tests.unit import drawing
from tests.unit.experiments import STORY


def pairs(**values: Any) -> pd.DataFrame:
    row = {
        "recorded_ms": 100.0,
        "predicted_ms": 120.0,
        "measured_ms": 103.0,
        "rtt_ms": 50.0,
        "burst_bytes": 1_000_000,
        "ca_name": "cubic",
    }
    return pd.DataFrame(
        row | values, index=range(max(len(v) if isinstance(v, list) else 1 for v in [1, *values.values()]))
    )


CASES: dict[str, Callable[[], Figure]] = {
    "plain": lambda: cost(STORY.pairs),
    "mixed": lambda: cost(
        pairs(
            rtt_ms=[20.0, 200.0] * 8,
            ca_name=["cubic", "reno", "bbr", "vegas", "htcp", "bic", "dctcp", "westwood"] * 2,
            burst_bytes=[10**n for n in range(2, 10)] * 2,
        )
    ),
    "below nothing": lambda: cost(pairs(recorded_ms=[0.0, -50.0], measured_ms=[-30.0, 2.0])),
    "nothing": lambda: cost(pairs().iloc[:0]),
}


@pytest.mark.parametrize("name", CASES)
def test_every_text_is_readable_and_the_legend_shows_what_is_drawn(name: str) -> None:
    figure = CASES[name]()
    drawing.check_texts(figure)
    drawing.check_legends(figure)


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_colours_are_used_and_settings_restored(dark: bool) -> None:
    drawing.check_colours(CASES["plain"], dark=dark)


@pytest.mark.quick(2)
@pytest.mark.parametrize("evil", drawing.HOSTILE_TEXTS)
def test_hostile_names_are_drawn_character_by_character(evil: str) -> None:
    drawing.check_literal(cost(pairs(ca_name=[evil, "reno"])), style.plain(evil, 16))


def test_a_picture_without_data_says_so() -> None:
    assert "no burst with both costs" in drawing.texts(CASES["nothing"]())


def test_points_equal_the_pairs_and_the_band_is_one_round_trip_wide() -> None:
    given = STORY.pairs
    figure = cost(given)
    (axes,) = figure.axes
    expected = sorted(zip(given["recorded_ms"], given["measured_ms"], strict=True))
    assert np.asarray(drawing.points(axes, "o")) == pytest.approx(np.asarray(expected))
    (line,) = [item for item in axes.lines if item.get_marker() == "None"]
    assert list(np.asarray(line.get_xdata())) == list(np.asarray(line.get_ydata()))
    band = np.asarray(axes.collections[0].get_paths()[0].vertices, float)
    assert set(np.round(np.abs(band[:, 1] - band[:, 0]), 6)) == {100.4}
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.get_window_extent().width == pytest.approx(axes.get_window_extent().height)
    within = int(((given["recorded_ms"] - given["measured_ms"]).abs() <= given["rtt_ms"]).sum())
    assert any(
        text.startswith(f"{within} of {len(given)}") or f"All {within}" in text for text in drawing.texts(figure)
    )


@pytest.mark.parametrize(
    ("rtts", "shown"),
    [([100.2, 101.2], "RTT 100 to 101 ms"), ([100.0, 100.4], "RTT 100 ms"), ([20.0, 90.0], "RTT 20 to 90 ms")],
)
def test_the_caption_has_the_round_trip_time_and_how_far_the_clocks_are_apart(rtts: list[float], shown: str) -> None:
    figure = cost(pairs(rtt_ms=rtts, recorded_ms=[10.0, 20.0], measured_ms=[13.0, 19.0]))
    apart = "apart by 2 ms at the median and 3 ms at most"
    assert f"{shown}  ·  {apart}  ·  clock: on less the median with the setting off" in drawing.texts(figure)


def test_paths_of_different_rtt_are_compared_in_round_trips() -> None:
    figure = cost(pairs(rtt_ms=[20.0, 200.0], recorded_ms=[40.0, 400.0], measured_ms=[50.0, 900.0]))
    (axes,) = figure.axes
    assert drawing.points(axes, "o") == [(2.0, 2.0 + 0.5), (2.0, 4.5)]
    assert axes.get_xlabel() == "cost by the records (round trips)"
    assert "1 of 2 bursts was within one round trip of the records" in drawing.texts(figure)


def test_titles_of_costs_have_the_right_number() -> None:
    assert titles_of_cost(np.zeros(0, np.bool_))[0].startswith("No burst has a cost")
    assert "0 of 1 burst was within one" in titles_of_cost(np.zeros(1, np.bool_))[0]
    assert "The burst was within one" in titles_of_cost(np.ones(1, np.bool_))[0]
    assert "All 2 bursts were within one" in titles_of_cost(np.ones(2, np.bool_))[0]


def test_colours_show_sizes_and_shapes_show_congestion_controls() -> None:
    figure = cost(pairs(burst_bytes=[1e5, 2e6, 2e6], ca_name=["cubic", "cubic", "reno"], measured_ms=[1.0, 2.0, 3.0]))
    drawn = {
        float(np.asarray(line.get_ydata())[0]): line for line in figure.axes[0].lines if line.get_marker() != "None"
    }
    assert drawn[1.0].get_color() != drawn[2.0].get_color() == drawn[3.0].get_color()
    assert drawn[1.0].get_marker() == drawn[2.0].get_marker() != drawn[3.0].get_marker()
    assert {"100 kB", "2 MB", "cubic", "reno"} <= set(drawing.texts(figure))
    # The sizes can be distinguished by lightness alone.
    for dark in (False, True):
        with style.use(dark) as colours:
            light = [float(np.dot(mpl.colors.to_rgb(c), (0.2126, 0.7152, 0.0722))) for c in colours.steps(5)]
        assert np.diff(light).min() > 0.05


def test_rows_without_a_value_are_ignored() -> None:
    figure = cost(pairs(recorded_ms=[1.0, float("nan"), 3.0], measured_ms=[1.0, 2.0, float("nan")]))
    assert len(drawing.points(figure.axes[0], "o")) == 1


def test_many_sizes_share_a_colour_by_decade() -> None:
    figure = cost(pairs(burst_bytes=[15_000 * n for n in range(1, 41)]))
    assert {"10 kB to 100 kB", "100 kB to 1 MB"} <= set(drawing.texts(figure))
