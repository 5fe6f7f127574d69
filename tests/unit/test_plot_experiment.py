# SPDX-License-Identifier: Apache-2.0
"""Pictures of an experiment show the values of the frames, and every text is readable.

The figures are drawn, so that errors that only drawing raises are found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from cwndtrace.lab import statistics
from cwndtrace.plot import style
from cwndtrace.plot.cost import _titles as titles_of_cost
from cwndtrace.plot.cost import cost
from cwndtrace.plot.labels import extent
from cwndtrace.plot.latency import latency
from cwndtrace.plot.sawtooth import sawtooth
from cwndtrace.plot.staircase import _titles as titles_of_staircase
from cwndtrace.plot.staircase import staircase
from cwndtrace.store.meta import Meta
from tests.unit import drawing, experiments, frames

STORY = experiments.experiment()
SUMMARY = STORY.summary
NOTHING = experiments.experiment(rounds=0)


def saw(story: experiments.Experiment = STORY, **options: Any) -> Figure:
    given: dict[str, Any] = {"about": frames.about(), "measurements": story.measured} | options
    return sawtooth(story.resets["on"], story.observed["on"], story.resets["off"], story.observed["off"], **given)


def both(measured: pd.DataFrame) -> Figure:
    return latency(measured, statistics.summarise(measured))


def resets(*rows: dict[str, Any]) -> pd.DataFrame:
    return frames.pandas(frames.table("cwnd_reset", *(frames.reset(**row) for row in rows)))


def steps(*sizes: int, number: int = 10, top_s: float = 5.0) -> pd.DataFrame:
    """Return resets by the kernel's rule from windows of these sizes, after idle times of up to ``top_s`` seconds."""
    idle_times = np.linspace(0.32, top_s, number)
    return resets(
        *(
            {"idle_us": int(idle * 1e6), "cwnd_before": size, "cwnd_after": experiments.halved(size, idle * 1e3)}
            for size in sizes
            for idle in idle_times
        )
    )


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


def spread_out(measured: pd.DataFrame) -> pd.DataFrame:
    """Return the measurements with latencies that swing from round to round by far more than the setting costs."""
    return measured.assign(latency_ms=measured["latency_ms"] * (1 + 9 * (measured["round"] % 2)))


def swapped(measured: pd.DataFrame) -> pd.DataFrame:
    """Return the measurements with the settings exchanged, so that "on" is the faster one."""
    return measured.assign(setting=measured["setting"].map({"on": "off", "off": "on"}))


def points(axes: Axes, *markers: str) -> list[tuple[float, float]]:
    """Return the points that are drawn with these markers, sorted by x and y."""
    drawn = [
        (float(x), float(y))
        for line in axes.lines
        if line.get_marker() in markers
        for x, y in zip(np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), strict=True)
    ]
    return sorted(drawn)


# --- every text is readable ------------------------------------------------------------------------------------


CASES: dict[str, Callable[[], Figure]] = {
    "sawtooth": saw,
    "sawtooth, quick": lambda: saw(experiments.experiment(rounds=1, bursts=(100_000, 1_000_000), idle_times=(0.8,))),
    "sawtooth, many": lambda: saw(experiments.experiment(rounds=1, idle_times=(0.15, 0.5, 1.0, 2.0, 5.0))),
    "sawtooth, records alone": lambda: saw(measurements=None),
    "sawtooth, on alone": lambda: saw(measurements=STORY.measured[STORY.measured["setting"] == "on"]),
    "sawtooth, nothing": lambda: saw(NOTHING),
    "sawtooth, long names": lambda: saw(about=frames.about(host="h" * 300, kernel="k" * 300)),
    "latency": lambda: latency(STORY.measured, SUMMARY),
    "latency, one cell": lambda: both(
        experiments.experiment(rounds=3, bursts=(1_000_000,), idle_times=(0.8,)).measured
    ),
    "latency, many": lambda: both(
        experiments.experiment(
            rounds=3, bursts=tuple(n * 100_000 for n in range(1, 9)), idle_times=(0.1, 0.5, 1.0, 2.0, 5.0)
        ).measured
    ),
    "latency, on alone": lambda: both(STORY.measured[STORY.measured["setting"] == "on"]),
    "latency, one round": lambda: both(STORY.measured[STORY.measured["round"] == 1]),
    "latency, nothing": lambda: latency(NOTHING.measured, NOTHING.summary),
    "cost": lambda: cost(STORY.pairs),
    "cost, mixed": lambda: cost(
        pairs(
            rtt_ms=[20.0, 200.0] * 8,
            ca_name=["cubic", "reno", "bbr", "vegas", "htcp", "bic", "dctcp", "westwood"] * 2,
            burst_bytes=[10**n for n in range(2, 10)] * 2,
        )
    ),
    "cost, below nothing": lambda: cost(pairs(recorded_ms=[0.0, -50.0], measured_ms=[-30.0, 2.0])),
    "cost, nothing": lambda: cost(pairs().iloc[:0]),
    "staircase": lambda: staircase(STORY.resets["on"]),
    "staircase, mixed": lambda: staircase(steps(30, 120, 700, 2800, 2900)),
    "staircase, close floors": lambda: staircase(steps(100, 125, 160, 200)),
    "staircase, many floors": lambda: staircase(steps(*(2**n for n in range(4, 20)), number=4, top_s=600)),
    "staircase, huge": lambda: staircase(steps(2**32 - 1, top_s=40)),
    "staircase, off it": lambda: staircase(resets({"cwnd_before": 100, "cwnd_after": 77}, {"cwnd_after": 0})),
    "staircase, nothing": lambda: staircase(STORY.resets["off"]),
}


def shown_ticks(axis: Axis) -> Iterator[Text]:
    low, high = sorted(axis.get_view_interval())
    slack = 1e-9 * (high - low)
    for tick in axis.get_major_ticks():
        if low - slack <= tick.get_loc() <= high + slack:
            yield from (text for text in (tick.label1, tick.label2) if text.get_visible() and text.get_text())


def all_text(figure: Figure) -> list[tuple[str, Bbox]]:
    """Return each visible text of a figure with its box; a legend counts as one text."""
    visible_texts: list[Text] = [*figure.texts]
    legends: list[Legend] = [*figure.legends]
    for axes in [*figure.axes, *(child for parent in figure.axes for child in parent.child_axes)]:
        visible_texts += [*axes.texts, axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title]  # type: ignore[attr-defined]
        visible_texts += [*shown_ticks(axes.xaxis), *shown_ticks(axes.yaxis)]
        legends += [child for child in axes.get_children() if isinstance(child, Legend)]
    named = [(text.get_text(), extent(text)) for text in visible_texts if text.get_visible() and text.get_text()]
    return named + [("legend", extent(legend)) for legend in legends]


@pytest.mark.parametrize("name", CASES)
def test_no_text_leaves_the_picture_or_covers_another_one(name: str) -> None:
    figure = CASES[name]()
    drawing.draw(figure)
    width, height = figure.bbox.width, figure.bbox.height
    seen = all_text(figure)
    assert len(seen) > 4
    for n, (text, box) in enumerate(seen):
        assert -0.5 <= box.x0 < box.x1 <= width + 0.5, text
        assert -0.5 <= box.y0 < box.y1 <= height + 0.5, text
        for other, place in seen[:n]:
            # A line's box is higher than its letters, so two boxes may overlap by two points.
            slack = 2 * figure.dpi / 72
            side_by_side = box.x1 <= place.x0 or place.x1 <= box.x0
            assert side_by_side or box.y1 - slack <= place.y0 or place.y1 - slack <= box.y0, (text, other)


@pytest.mark.parametrize("name", ["sawtooth", "latency", "cost", "staircase"])
@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_colours_are_used_and_settings_restored(name: str, dark: bool) -> None:
    before = dict(mpl.rcParams)
    with style.use(dark) as colours:
        figure = CASES[name]()
    pixels = drawing.draw(figure)
    assert to_hex(pixels[2, 2]) == colours.paper
    assert dict(mpl.rcParams) == before
    # No text has a colour of the user's settings, not even the ticks that are created while drawing.
    allowed = {colours.ink, colours.faint, colours.idle, colours.window}
    for axes in [*figure.axes, *(child for parent in figure.axes for child in parent.child_axes)]:
        for text in [*shown_ticks(axes.xaxis), *shown_ticks(axes.yaxis), axes.xaxis.label, axes.yaxis.label]:
            assert to_hex(text.get_color()) == colours.ink
        assert {to_hex(text.get_color()) for text in axes.texts} <= allowed
    assert {to_hex(text.get_color()) for text in figure.texts} <= allowed


@pytest.mark.parametrize("evil", drawing.HOSTILE_TEXTS)
def test_hostile_names_are_drawn_character_by_character(evil: str) -> None:
    drawn = [
        (saw(about=frames.about(host=evil, kernel=evil * 40)), style.plain(f"on {evil}, Linux")[:-1]),
        (cost(pairs(ca_name=[evil, "reno"])), style.plain(evil, 16)),
    ]
    for figure, expected in drawn:
        drawing.draw(figure)
        for text in figure.findobj(Text):
            assert isinstance(text, Text)
            if any("$" in part for part in text.get_text().split("\\$")):
                assert text._preprocess_math(text.get_text())[1] is False  # type: ignore[attr-defined]
        assert all(text.isprintable() for text in drawing.texts(figure))
        assert any(expected[:8] in text for text in drawing.texts(figure))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sawtooth, nothing", "nothing was recorded with the setting on"),
        ("sawtooth, nothing", "nothing was recorded with the setting off"),
        ("latency, nothing", "nothing was measured"),
        ("cost, nothing", "no burst with both costs"),
        ("staircase, nothing", "no reset after idle time in this capture"),
    ],
)
def test_a_picture_without_data_says_so(name: str, message: str) -> None:
    assert message in drawing.texts(CASES[name]())


# --- the saw tooth ---------------------------------------------------------------------------------------------


def test_both_settings_of_a_round_are_on_one_scale_from_the_first_idle_time() -> None:
    figure = saw(round=2)
    on, off = figure.axes
    assert on.get_xlim() == off.get_xlim()
    assert on.get_ylim() == off.get_ylim()
    assert on.get_yscale() == off.get_yscale() == "log"
    measured = STORY.measured[STORY.measured["round"] == 2]
    zero = {}
    for axes, setting in ((on, "on"), (off, "off")):
        mine = measured[measured["setting"] == setting]
        zero[setting] = (mine["start_ns"] - mine["idle_ms"] * 1e6).min()
        assert axes.get_xlim()[0] < 0 < (mine["end_ns"].max() - zero[setting]) / 1e9 < axes.get_xlim()[1]
    fell = measured[measured["cwnd_after"] < measured["cwnd_before"]]
    assert 0 < len(fell) < len(measured) / 2
    arrows = points(on, "v")
    assert [y for _, y in arrows] == fell["cwnd_after"].tolist()
    expected = ((fell["start_ns"] + 60_000 - zero["on"]) / 1e9).tolist()
    assert [x for x, _ in arrows] == pytest.approx(expected, abs=1e-6)
    assert points(off, "v") == []
    assert "round 2 of 5" in " ".join(drawing.texts(figure))
    assert "On, 8 of 12 idle times shrank the window; off, none" in drawing.texts(figure)


def test_each_idle_time_is_shaded_and_each_burst_marked() -> None:
    figure = saw(round=1)
    measured = STORY.measured[STORY.measured["round"] == 1]
    for axes, setting in zip(figure.axes, ("on", "off"), strict=True):
        mine = measured[measured["setting"] == setting]
        zero = (mine["start_ns"] - mine["idle_ms"] * 1e6).min()
        bars = {z: [p.get_extents() for c in axes.collections if c.get_zorder() == z for p in c.get_paths()]
                for z in (0.5, 3)}  # fmt: skip
        idle_times = sorted(box.width for box in bars[0.5])
        assert idle_times == pytest.approx(sorted(mine["idle_ms"] / 1e3), abs=1e-3)
        marked = sorted((box.x0, box.x1) for box in bars[3] if box.height < 1)
        begins, ends = (((mine[name] - zero) / 1e9).tolist() for name in ("start_ns", "end_ns"))
        assert [x for pair in marked for x in pair] == pytest.approx(
            [x for pair in zip(begins, ends, strict=True) for x in pair], abs=1e-6
        )


def test_the_same_burst_is_labelled_with_its_latency_for_both_settings() -> None:
    figure = saw(round=1)
    measured = STORY.measured[
        (STORY.measured["round"] == 1) & (STORY.measured["idle_s"] == 2) & (STORY.measured["burst_bytes"] == 2e6)
    ]
    on, off = (measured[measured["setting"] == setting].iloc[0] for setting in ("on", "off"))
    first, second = ([text.get_text() for text in axes.texts] for axes in figure.axes)
    assert f"{on['cwnd_before']:,} → {on['cwnd_after']}: 2 MB in {on['latency_ms']:.0f} ms" in first
    assert f"{off['cwnd_before']:,} kept: 2 MB in {off['latency_ms']:.0f} ms" in second


def test_without_measurements_time_is_that_of_the_capture() -> None:
    figure = saw(measurements=None)
    on, off = figure.axes
    assert on.get_xlim() == off.get_xlim()
    at = (STORY.resets["on"]["ts_ns"].astype("int64") - frames.MONO) / 1e9
    inside = at[at <= on.get_xlim()[1]]
    assert [x for x, _ in points(on, "v")] == pytest.approx(inside.tolist())
    assert f"On, {len(inside)} resets after idle time; off, no reset after idle time" in drawing.texts(figure)


def test_the_first_round_that_both_settings_completed_is_shown() -> None:
    measured = STORY.measured[~((STORY.measured["round"] == 1) & (STORY.measured["setting"] == "off"))]
    assert "round 2 of 5" in " ".join(drawing.texts(saw(measurements=measured)))


def test_windows_observed_as_idle_time_begins_are_not_drawn() -> None:
    measured = STORY.measured[STORY.measured["round"] == 1]
    row = measured[measured["setting"] == "off"].iloc[5]
    settled = int(row["start_ns"] - (row["idle_ms"] - row["srtt_ms"]) * 1e6)
    for late, drawn in ((2_000_000, False), (50_000_000, True)):
        odd = pd.DataFrame({"ts_ns": [settled + late], "cwnd": [777]})
        figure = sawtooth(
            STORY.resets["on"],
            STORY.observed["on"],
            STORY.resets["off"],
            odd,
            about=Meta(),
            measurements=STORY.measured,
        )
        assert (777 in [y for _, y in points(figure.axes[1], "o")]) is drawn


def test_a_window_that_grows_is_not_drawn_falling() -> None:
    story = experiments.experiment(rounds=1, bursts=(1_000_000,), idle_times=(2.0,))
    row = story.measured.iloc[0]
    assert row["cwnd_after"] < row["cwnd_before"]
    assert row["end_ns"] < row["acked_ns"]
    # The last byte has arrived, and ACKs that are still on their way will open the window.
    late = pd.DataFrame({"ts_ns": [(row["end_ns"] + row["acked_ns"]) // 2], "cwnd": [int(row["cwnd_end"]) - 1]})
    story.observed["on"] = pd.concat([story.observed["on"], late], ignore_index=True)
    (line,) = (line for line in saw(story).axes[0].lines if line.get_alpha() == 0.6)
    y = np.asarray(line.get_ydata())
    assert y[-2:].tolist() == [row["cwnd_end"] - 1, row["cwnd_end"]]
    (fall,) = np.flatnonzero(np.diff(y) < 0)
    assert y[[fall, fall + 1]].tolist() == row[["cwnd_before", "cwnd_after"]].tolist()


def test_the_title_counts_all_resets_that_are_drawn() -> None:
    story = experiments.experiment(rounds=1, bursts=(1_000_000,), idle_times=(1.0, 2.0))
    first = story.measured.iloc[0]
    others: list[dict[str, Any]] = [
        {"ts_ns": int(first["acked_ns"]) + 1_000_000, "reason": "rto_loss", "cwnd_before": 2000, "cwnd_after": 1},
        {"ts_ns": int(first["acked_ns"]) + 2_000_000, "idle_us": 400_000, "cwnd_before": 2000, "cwnd_after": 1000},
    ]
    recorded = story.resets["on"]
    more = [pd.concat([recorded, resets(*others[:number])], ignore_index=True) for number in (1, 2)]
    cases: list[tuple[pd.DataFrame, str]] = [
        (more[0], "On, 2 of 2 idle times shrank the window and 1 other reset"),
        (more[1], "On, 2 of 2 idle times shrank the window and 2 other resets"),
        (recorded.iloc[:1], "On, 2 of 2 idle times shrank the window and 1 of them not recorded"),
    ]
    for on, title in cases:
        story.resets["on"] = on
        figure = saw(story)
        assert len(points(figure.axes[0], "v")) == len(on)
        assert f"{title}; off, none" in drawing.texts(figure)


def test_each_burst_has_its_label_where_there_is_room() -> None:
    story = experiments.experiment(rounds=1, bursts=(100_000, 1_000_000), idle_times=(0.15, 2.0))
    figure = saw(story)
    for axes, setting in zip(figure.axes, ("on", "off"), strict=True):
        mine = story.measured[story.measured["setting"] == setting]
        labels = [text.get_text().rpartition(" in ")[2] for text in axes.texts]
        assert sorted(labels) == sorted(f"{ms:.0f} ms" for ms in mine["latency_ms"])
    assert not any("labelled" in text for text in drawing.texts(figure))
    assert any("8 of 24 bursts labelled" in text for text in drawing.texts(saw()))


# --- latency ---------------------------------------------------------------------------------------------------


def test_medians_dots_and_spreads_equal_the_measurements() -> None:
    figure = latency(STORY.measured, SUMMARY)
    bursts = sorted(experiments.ON_MS)
    assert len(figure.axes) == len(bursts)
    for axes, burst in zip(figure.axes, bursts, strict=True):
        mine = STORY.measured[STORY.measured["burst_bytes"] == burst]
        for setting, marker in (("on", "o"), ("off", "s")):
            values = mine[mine["setting"] == setting].groupby("idle_s")["latency_ms"]
            drawn = points(axes, marker)
            assert [y for _, y in drawn] == pytest.approx(values.median().tolist())
            assert [round(x) for x, _ in drawn] == [0, 1, 2]
        assert sorted(y for _, y in points(axes, ".")) == pytest.approx(sorted(mine["latency_ms"]))
        paths = [np.asarray(path.vertices, float) for collection in axes.collections for path in collection.get_paths()]
        spans = sorted(tuple(path[:, 1]) for path in paths if len(path) == 2)
        groups = mine.groupby(["setting", "idle_s"])["latency_ms"]
        expected = sorted(zip(groups.quantile(0.05), groups.quantile(0.95), strict=True))
        assert np.asarray(spans) == pytest.approx(np.asarray(expected))
        heights = sorted(patch.get_height() for patch in axes.patches if isinstance(patch, Rectangle))
        assert heights == pytest.approx(sorted(groups.median()))
        assert axes.get_ylim()[0] == 0
    assert len({axes.get_ylim() for axes in figure.axes}) == 1


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
    assert title in drawing.texts(both(measured))


def test_the_largest_of_many_sizes_are_shown_and_counted() -> None:
    figure = CASES["latency, many"]()
    assert len(figure.axes) == 6
    assert "300 kB bursts" in drawing.texts(figure)
    assert "200 kB bursts" not in drawing.texts(figure)
    assert any("the largest 6 of 8 sizes" in text for text in drawing.texts(figure))


def test_costs_without_room_have_no_labels() -> None:
    for number, labelled in ((3, True), (5, True), (16, False)):
        idle_times = tuple(round(0.4 + n / 100, 2) for n in range(number))
        figure = both(experiments.experiment(rounds=3, bursts=(1, 2, 3, 4, 5), idle_times=idle_times).measured)
        assert bool(figure.axes[0].texts) is labelled


# --- cost ------------------------------------------------------------------------------------------------------


def test_points_equal_the_pairs_and_the_band_is_one_round_trip_wide() -> None:
    given = STORY.pairs
    figure = cost(given)
    (axes,) = figure.axes
    expected = sorted(zip(given["recorded_ms"], given["measured_ms"], strict=True))
    assert np.asarray(points(axes, "o")) == pytest.approx(np.asarray(expected))
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


def test_paths_of_different_rtt_are_compared_in_round_trips() -> None:
    figure = cost(pairs(rtt_ms=[20.0, 200.0], recorded_ms=[40.0, 400.0], measured_ms=[50.0, 900.0]))
    (axes,) = figure.axes
    assert points(axes, "o") == [(2.0, 2.0 + 0.5), (2.0, 4.5)]
    assert axes.get_xlabel() == "cost by the records (round trips)"
    assert "1 of 2 bursts was within one round trip of the records" in drawing.texts(figure)


def test_titles_of_costs_have_the_right_number() -> None:
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
    assert len(points(figure.axes[0], "o")) == 1


def test_many_sizes_share_a_colour_by_decade() -> None:
    figure = cost(pairs(burst_bytes=[15_000 * n for n in range(1, 41)]))
    assert {"10 kB to 100 kB", "100 kB to 1 MB"} <= set(drawing.texts(figure))


# --- the staircase ---------------------------------------------------------------------------------------------


def test_records_are_at_their_share_and_the_line_follows_the_kernels_rule() -> None:
    given = steps(2800, number=30, top_s=3.0)
    figure = staircase(given)
    (axes,) = figure.axes
    expected = sorted(zip(given["idle_us"] / given["rto_us"], given["cwnd_after"] / given["cwnd_before"], strict=True))
    assert np.asarray(points(axes, "o", "s")) == pytest.approx(np.asarray(expected))
    (line,) = [item for item in axes.lines if item.get_marker() == "None" and item.get_linestyle() == "-"]
    x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
    for rtos in np.arange(0.05, axes.get_xlim()[1], 0.1):
        if abs(rtos - round(rtos)) > 0.01:
            drawn = y[np.searchsorted(x, rtos)]
            assert drawn * 2800 == pytest.approx(experiments.halved(2800, rtos * experiments.RTO_MS))
    assert "Each RTO of idle time halves the window: all 30 records fit to the segment" in drawing.texts(figure)
    assert axes.get_yscale() == "log"


def test_the_initial_windows_of_different_windows_are_drawn_and_named() -> None:
    figure = staircase(steps(30, 120, 700, 2800))
    (axes,) = figure.axes
    dashed = [item for item in axes.lines if item.get_marker() == "None" and item.get_linestyle() == "--"]
    assert sorted(float(np.asarray(line.get_ydata())[0]) for line in dashed) == pytest.approx(
        [10 / 700, 10 / 120, 1 / 3]
    )
    assert {"10 of 30", "10 of 120", "10 of 700", "10 of 2,800"} <= set(drawing.texts(figure))
    squares = points(axes, "s")
    assert squares
    assert all(any(abs(y - 10 / size) < 1e-9 for size in (30, 120, 700, 2800)) for _, y in squares)


def test_a_record_that_does_not_fit_is_marked_and_counted() -> None:
    # 2.27 RTOs leave a quarter. Within a jiffy of a step, the value on either side fits. A timeout has another rule.
    figure = staircase(
        resets(
            {"idle_us": 700_000, "cwnd_before": 800, "cwnd_after": 200},
            {"idle_us": 700_000, "cwnd_before": 800, "cwnd_after": 300},
            {"idle_us": 612_000, "cwnd_before": 800, "cwnd_after": 200},
            {"idle_us": 700_000, "cwnd_before": 800, "cwnd_after": 1, "reason": "rto_loss"},
        )
    )
    assert np.asarray(points(figure.axes[0], "X")) == pytest.approx(np.asarray([(700 / 308, 0.375)]))
    assert len(points(figure.axes[0], "o")) == 2
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
    assert points(axes, ">") == [(edge, 0.1)] * 4
    assert any(text.startswith("idle over") and text.endswith(": 4") for text in drawing.texts(figure))


def test_records_without_an_rto_are_ignored() -> None:
    figure = staircase(resets({"rto_us": 0}, {"cwnd_before": 0, "cwnd_after": 0}))
    assert "no reset after idle time in this capture" in drawing.texts(figure)
    assert not list(figure.axes[0].lines)
