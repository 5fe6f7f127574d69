# SPDX-License-Identifier: Apache-2.0
"""Pictures of an experiment: what is drawn is what the frames say, and every text can be read.

The figures are really drawn, so that what only fails while drawing fails here.
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
from tests.unit import experiments, frames
from tests.unit.test_plot import EVIL, draw, texts

STORY = experiments.experiment()
SUMMARY = STORY.summary
NOTHING = experiments.experiment(rounds=0)


def saw(story: experiments.Experiment = STORY, **options: Any) -> Figure:
    given: dict[str, Any] = {"about": frames.about(), "measurements": story.taken} | options
    return sawtooth(story.resets["on"], story.observed["on"], story.resets["off"], story.observed["off"], **given)


def both(taken: pd.DataFrame) -> Figure:
    return latency(taken, statistics.summarise(taken))


def resets(*rows: dict[str, Any]) -> pd.DataFrame:
    return frames.pandas(frames.table("cwnd_reset", *(frames.reset(**row) for row in rows)))


def ladder(*sizes: int, number: int = 10, top_s: float = 5.0) -> pd.DataFrame:
    """Resets by the kernel's rule from windows of these sizes, after idle times of up to ``top_s``."""
    idle_times = np.linspace(0.32, top_s, number)
    return resets(
        *(
            {"idle_us": int(idle * 1e6), "cwnd_before": size, "cwnd_after": experiments.halved(size, idle * 1e3)}
            for size in sizes
            for idle in idle_times
        )
    )


def pairs(**values: Any) -> pd.DataFrame:
    row = {"predicted_ms": 100.0, "measured_ms": 103.0, "rtt_ms": 50.0, "burst_bytes": 1_000_000, "ca_name": "cubic"}
    return pd.DataFrame(
        row | values, index=range(max(len(v) if isinstance(v, list) else 1 for v in [1, *values.values()]))
    )


def points(axes: Axes, *markers: str) -> list[tuple[float, float]]:
    """What is drawn with these markers, in order of x and y."""
    found = [
        (float(x), float(y))
        for line in axes.lines
        if line.get_marker() in markers
        for x, y in zip(np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), strict=True)
    ]
    return sorted(found)


# --- each can be read ------------------------------------------------------------------------------------------


CASES: dict[str, Callable[[], Figure]] = {
    "sawtooth": saw,
    "sawtooth, quick": lambda: saw(experiments.experiment(rounds=1, bursts=(100_000, 1_000_000), idle_times=(0.8,))),
    "sawtooth, many": lambda: saw(experiments.experiment(rounds=1, idle_times=(0.15, 0.5, 1.0, 2.0, 5.0))),
    "sawtooth, records alone": lambda: saw(measurements=None),
    "sawtooth, on alone": lambda: saw(measurements=STORY.taken[STORY.taken["setting"] == "on"]),
    "sawtooth, nothing": lambda: saw(NOTHING),
    "sawtooth, long names": lambda: saw(about=frames.about(host="h" * 300, kernel="k" * 300)),
    "latency": lambda: latency(STORY.taken, SUMMARY),
    "latency, one cell": lambda: both(experiments.experiment(rounds=3, bursts=(1_000_000,), idle_times=(0.8,)).taken),
    "latency, many": lambda: both(
        experiments.experiment(
            rounds=3, bursts=tuple(n * 100_000 for n in range(1, 9)), idle_times=(0.1, 0.5, 1.0, 2.0, 5.0)
        ).taken
    ),
    "latency, on alone": lambda: both(STORY.taken[STORY.taken["setting"] == "on"]),
    "latency, one round": lambda: both(STORY.taken[STORY.taken["round"] == 1]),
    "latency, nothing": lambda: latency(NOTHING.taken, NOTHING.summary),
    "cost": lambda: cost(STORY.pairs),
    "cost, mixed": lambda: cost(
        pairs(
            rtt_ms=[20.0, 200.0] * 8,
            ca_name=["cubic", "reno", "bbr", "vegas", "htcp", "bic", "dctcp", "westwood"] * 2,
            burst_bytes=[10**n for n in range(2, 10)] * 2,
        )
    ),
    "cost, below nothing": lambda: cost(pairs(predicted_ms=[0.0, -50.0], measured_ms=[-30.0, 2.0])),
    "cost, nothing": lambda: cost(pairs().iloc[:0]),
    "staircase": lambda: staircase(STORY.resets["on"]),
    "staircase, mixed": lambda: staircase(ladder(30, 120, 700, 2800, 2900)),
    "staircase, close floors": lambda: staircase(ladder(100, 125, 160, 200)),
    "staircase, many floors": lambda: staircase(ladder(*(2**n for n in range(4, 20)), number=4, top_s=600)),
    "staircase, huge": lambda: staircase(ladder(2**32 - 1, top_s=40)),
    "staircase, off it": lambda: staircase(resets({"cwnd_before": 100, "cwnd_after": 77}, {"cwnd_after": 0})),
    "staircase, nothing": lambda: staircase(STORY.resets["off"]),
}


def shown_ticks(axis: Axis) -> Iterator[Text]:
    low, high = sorted(axis.get_view_interval())
    slack = 1e-9 * (high - low)
    for tick in axis.get_major_ticks():
        if low - slack <= tick.get_loc() <= high + slack:
            yield from (text for text in (tick.label1, tick.label2) if text.get_visible() and text.get_text())


def all_text(made: Figure) -> list[tuple[str, Bbox]]:
    """Every text of a figure that can be seen, with its place; a legend counts as one."""
    found: list[Text] = [*made.texts]
    legends: list[Legend] = [*made.legends]
    for axes in [*made.axes, *(child for parent in made.axes for child in parent.child_axes)]:
        found += [*axes.texts, axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title]  # type: ignore[attr-defined]
        found += [*shown_ticks(axes.xaxis), *shown_ticks(axes.yaxis)]
        legends += [child for child in axes.get_children() if isinstance(child, Legend)]
    named = [(text.get_text(), extent(text)) for text in found if text.get_visible() and text.get_text()]
    return named + [("legend", extent(each)) for each in legends]


@pytest.mark.parametrize("name", CASES)
def test_no_text_leaves_the_picture_or_covers_another(name: str) -> None:
    made = CASES[name]()
    draw(made)
    width, height = made.bbox.width, made.bbox.height
    seen = all_text(made)
    assert len(seen) > 4
    for n, (text, box) in enumerate(seen):
        assert -0.5 <= box.x0 < box.x1 <= width + 0.5, text
        assert -0.5 <= box.y0 < box.y1 <= height + 0.5, text
        for other, place in seen[:n]:
            # A line's box has slack above and below its letters: two points of it may meet.
            slack = 2 * made.dpi / 72
            apart = box.x1 <= place.x0 or place.x1 <= box.x0
            assert apart or box.y1 - slack <= place.y0 or place.y1 - slack <= box.y0, (text, other)


@pytest.mark.parametrize("name", ["sawtooth", "latency", "cost", "staircase"])
@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark(name: str, dark: bool) -> None:
    before = dict(mpl.rcParams)
    with style.use(dark) as colours:
        made = CASES[name]()
    pixels = draw(made)
    assert to_hex(pixels[2, 2]) == colours.paper
    assert dict(mpl.rcParams) == before
    # Nothing was left to be coloured by the user's own settings, also the ticks that only drawing makes.
    allowed = {colours.ink, colours.faint, colours.idle, colours.window}
    for axes in [*made.axes, *(child for parent in made.axes for child in parent.child_axes)]:
        for text in [*shown_ticks(axes.xaxis), *shown_ticks(axes.yaxis), axes.xaxis.label, axes.yaxis.label]:
            assert to_hex(text.get_color()) == colours.ink
        assert {to_hex(text.get_color()) for text in axes.texts} <= allowed
    assert {to_hex(text.get_color()) for text in made.texts} <= allowed


@pytest.mark.parametrize("evil", EVIL)
def test_hostile_names_are_drawn_to_the_letter(evil: str) -> None:
    drawn = [
        (saw(about=frames.about(host=evil, kernel=evil * 40)), style.plain(f"on {evil}, Linux")[:-1]),
        (cost(pairs(ca_name=[evil, "reno"])), style.plain(evil, 16)),
    ]
    for made, expected in drawn:
        draw(made)
        for text in made.findobj(Text):
            assert isinstance(text, Text)
            if any("$" in part for part in text.get_text().split("\\$")):
                assert text._preprocess_math(text.get_text())[1] is False  # type: ignore[attr-defined]
        assert all(text.isprintable() for text in texts(made))
        assert any(expected[:8] in text for text in texts(made))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sawtooth, nothing", "nothing was recorded with the setting on"),
        ("sawtooth, nothing", "nothing was recorded with the setting off"),
        ("latency, nothing", "nothing was measured"),
        ("cost, nothing", "no burst with both costs"),
        ("staircase, nothing", "no reset after idle time in this capture"),
    ],
)
def test_where_there_is_nothing_it_says_so(name: str, said: str) -> None:
    assert said in texts(CASES[name]())


# --- the saw tooth ---------------------------------------------------------------------------------------------


def test_a_round_is_shown_on_one_scale_each_setting_from_its_first_rest() -> None:
    made = saw(round=2)
    on, off = made.axes
    assert on.get_xlim() == off.get_xlim()
    assert on.get_ylim() == off.get_ylim()
    assert on.get_yscale() == off.get_yscale() == "log"
    taken = STORY.taken[STORY.taken["round"] == 2]
    zero = {}
    for axes, setting in ((on, "on"), (off, "off")):
        mine = taken[taken["setting"] == setting]
        zero[setting] = (mine["start_ns"] - mine["idle_ms"] * 1e6).min()
        assert axes.get_xlim()[0] < 0 < (mine["end_ns"].max() - zero[setting]) / 1e9 < axes.get_xlim()[1]
    fell = taken[taken["cwnd_after"] < taken["cwnd_before"]]
    assert 0 < len(fell) < len(taken) / 2
    arrows = points(on, "v")
    assert [y for _, y in arrows] == fell["cwnd_after"].tolist()
    expected = ((fell["start_ns"] + 60_000 - zero["on"]) / 1e9).tolist()
    assert [x for x, _ in arrows] == pytest.approx(expected, abs=1e-6)
    assert points(off, "v") == []
    assert "round 2 of 5" in " ".join(texts(made))
    assert "On, 8 of 12 idle times shrank the window; off, none" in texts(made)


def test_each_rest_is_shaded_and_each_burst_marked() -> None:
    made = saw(round=1)
    taken = STORY.taken[STORY.taken["round"] == 1]
    for axes, setting in zip(made.axes, ("on", "off"), strict=True):
        mine = taken[taken["setting"] == setting]
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


def test_the_same_bursts_are_labelled_with_what_they_took() -> None:
    made = saw(round=1)
    taken = STORY.taken[
        (STORY.taken["round"] == 1) & (STORY.taken["idle_s"] == 2) & (STORY.taken["burst_bytes"] == 2e6)
    ]
    on, off = (taken[taken["setting"] == setting].iloc[0] for setting in ("on", "off"))
    first, second = ([text.get_text() for text in axes.texts] for axes in made.axes)
    assert f"{on['cwnd_before']:,} → {on['cwnd_after']}: 2 MB in {on['latency_ms']:.0f} ms" in first
    assert f"{off['cwnd_before']:,} kept: 2 MB in {off['latency_ms']:.0f} ms" in second


def test_without_measurements_both_are_on_the_clock_of_the_capture() -> None:
    made = saw(measurements=None)
    on, off = made.axes
    assert on.get_xlim() == off.get_xlim()
    at = (STORY.resets["on"]["ts_ns"].astype("int64") - frames.MONO) / 1e9
    inside = at[at <= on.get_xlim()[1]]
    assert [x for x, _ in points(on, "v")] == pytest.approx(inside.tolist())
    assert f"On, {len(inside)} resets after idle time; off, no reset after idle time" in texts(made)


def test_the_first_round_that_both_settings_finished_is_shown() -> None:
    taken = STORY.taken[~((STORY.taken["round"] == 1) & (STORY.taken["setting"] == "off"))]
    assert "round 2 of 5" in " ".join(texts(saw(measurements=taken)))


def test_what_was_seen_as_a_rest_set_in_draws_no_tooth() -> None:
    taken = STORY.taken[STORY.taken["round"] == 1]
    row = taken[taken["setting"] == "off"].iloc[5]
    settled = int(row["start_ns"] - (row["idle_ms"] - row["srtt_ms"]) * 1e6)
    for late, drawn in ((2_000_000, False), (50_000_000, True)):
        odd = pd.DataFrame({"ts_ns": [settled + late], "cwnd": [777]})
        made = sawtooth(
            STORY.resets["on"], STORY.observed["on"], STORY.resets["off"], odd, about=Meta(), measurements=STORY.taken
        )
        assert (777 in [y for _, y in points(made.axes[1], "o")]) is drawn


# --- latency ---------------------------------------------------------------------------------------------------


def test_medians_dots_and_spreads_are_those_of_the_measurements() -> None:
    made = latency(STORY.taken, SUMMARY)
    bursts = sorted(experiments.ON_MS)
    assert len(made.axes) == len(bursts)
    for axes, burst in zip(made.axes, bursts, strict=True):
        mine = STORY.taken[STORY.taken["burst_bytes"] == burst]
        for setting, marker in (("on", "o"), ("off", "s")):
            values = mine[mine["setting"] == setting].groupby("idle_s")["latency_ms"]
            drawn = points(axes, marker)
            assert [y for _, y in drawn] == pytest.approx(values.median().tolist())
            assert [round(x) for x, _ in drawn] == [0, 1, 2]
        assert sorted(y for _, y in points(axes, ".")) == pytest.approx(sorted(mine["latency_ms"]))
        paths = [np.asarray(path.vertices, float) for each in axes.collections for path in each.get_paths()]
        spans = sorted(tuple(path[:, 1]) for path in paths if len(path) == 2)
        groups = mine.groupby(["setting", "idle_s"])["latency_ms"]
        expected = sorted(zip(groups.quantile(0.05), groups.quantile(0.95), strict=True))
        assert np.asarray(spans) == pytest.approx(np.asarray(expected))
        heights = sorted(patch.get_height() for patch in axes.patches if isinstance(patch, Rectangle))
        assert heights == pytest.approx(sorted(groups.median()))
        assert axes.get_ylim()[0] == 0
    assert len({axes.get_ylim() for axes in made.axes}) == 1


def test_the_cost_and_its_interval_stand_above_each_pair_and_the_dearest_in_the_title() -> None:
    made = latency(STORY.taken, SUMMARY)
    cell = SUMMARY[(SUMMARY["burst_bytes"] == 2e6) & (SUMMARY["idle_s"] == 2)].iloc[0]
    said = [text.get_text() for text in made.axes[3].texts]
    assert f"+{cell['cost_ms']:.0f} ms" in said
    assert f"{cell['cost_low_ms']:.0f} to {cell['cost_high_ms']:.0f}" in said
    took = f"{cell['median_on_ms']:.0f} ms instead of {cell['median_off_ms']:.0f} ms"
    assert f"After 2 s of idle time, 2 MB took {took}" in texts(made)
    assert any(f"{cell['cost_rtts']:.1f} round trips" in text for text in texts(made))


def test_the_right_axis_counts_round_trips() -> None:
    made = latency(STORY.taken, SUMMARY)
    draw(made)
    (right,) = made.axes[1].child_axes
    assert right.get_ylim()[1] == pytest.approx(made.axes[1].get_ylim()[1] / experiments.RTT_MS)
    assert not made.axes[0].child_axes


def test_a_line_parts_rests_below_the_rto_from_those_above() -> None:
    made = latency(STORY.taken, SUMMARY)
    (line,) = [item for item in made.axes[0].lines if item.get_linestyle() == "--" and item.get_color() != "none"]
    assert list(np.asarray(line.get_xdata())) == [0.5, 0.5]
    above = both(STORY.taken[STORY.taken["idle_s"] > 1])
    assert not [item for item in above.axes[0].lines if item.get_linestyle() == "--"]


@pytest.mark.parametrize(
    ("taken", "title"),
    [
        (STORY.taken[STORY.taken["idle_s"] < 1], "The setting cost nothing here"),
        (STORY.taken[STORY.taken["round"] < 3], "Too few rounds to be sure of a difference"),
        (STORY.taken[STORY.taken["setting"] == "on"], "Latency with the setting on; nothing to compare with"),
        (STORY.taken[STORY.taken["setting"] == "off"], "Latency with the setting off; nothing to compare with"),
    ],
)
def test_the_title_claims_no_more_than_was_found(taken: pd.DataFrame, title: str) -> None:
    assert title in texts(both(taken))


def test_of_many_sizes_the_largest_are_shown_and_that_is_said() -> None:
    made = CASES["latency, many"]()
    assert len(made.axes) == 6
    assert "300 kB bursts" in texts(made)
    assert "200 kB bursts" not in texts(made)
    assert any("the largest 6 of 8 sizes" in text for text in texts(made))


def test_costs_without_room_are_written_small_or_left_to_the_axis() -> None:
    for number, said in ((3, True), (5, True), (16, False)):
        idle_times = tuple(round(0.4 + n / 100, 2) for n in range(number))
        made = both(experiments.experiment(rounds=3, bursts=(1, 2, 3, 4, 5), idle_times=idle_times).taken)
        assert bool(made.axes[0].texts) is said


# --- cost ------------------------------------------------------------------------------------------------------


def test_points_are_the_pairs_and_the_band_is_one_round_trip_wide() -> None:
    given = STORY.pairs
    made = cost(given)
    (axes,) = made.axes
    expected = sorted(zip(given["predicted_ms"], given["measured_ms"], strict=True))
    assert np.asarray(points(axes, "o")) == pytest.approx(np.asarray(expected))
    (line,) = [item for item in axes.lines if item.get_marker() == "None"]
    assert list(np.asarray(line.get_xdata())) == list(np.asarray(line.get_ydata()))
    band = np.asarray(axes.collections[0].get_paths()[0].vertices, float)
    assert set(np.round(np.abs(band[:, 1] - band[:, 0]), 6)) == {100.4}
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.get_window_extent().width == pytest.approx(axes.get_window_extent().height)
    within = int(((given["predicted_ms"] - given["measured_ms"]).abs() <= given["rtt_ms"]).sum())
    assert any(text.startswith(f"{within} of {len(given)}") or f"All {within}" in text for text in texts(made))


def test_paths_of_different_length_are_compared_in_round_trips() -> None:
    made = cost(pairs(rtt_ms=[20.0, 200.0], predicted_ms=[40.0, 400.0], measured_ms=[50.0, 900.0]))
    (axes,) = made.axes
    assert points(axes, "o") == [(2.0, 2.0 + 0.5), (2.0, 4.5)]
    assert axes.get_xlabel() == "predicted cost (round trips)"
    assert "1 of 2 bursts was within one round trip of the prediction" in texts(made)


def test_one_burst_is_no_bursts() -> None:
    assert "0 of 1 burst was within one" in titles_of_cost(np.zeros(1, np.bool_))[0]
    assert "The burst was within one" in titles_of_cost(np.ones(1, np.bool_))[0]
    assert "All 2 bursts were within one" in titles_of_cost(np.ones(2, np.bool_))[0]


def test_colours_are_sizes_and_shapes_congestion_controls() -> None:
    made = cost(pairs(burst_bytes=[1e5, 2e6, 2e6], ca_name=["cubic", "cubic", "reno"], measured_ms=[1.0, 2.0, 3.0]))
    drawn = {float(np.asarray(line.get_ydata())[0]): line for line in made.axes[0].lines if line.get_marker() != "None"}
    assert drawn[1.0].get_color() != drawn[2.0].get_color() == drawn[3.0].get_color()
    assert drawn[1.0].get_marker() == drawn[2.0].get_marker() != drawn[3.0].get_marker()
    assert {"100 kB", "2 MB", "cubic", "reno"} <= set(texts(made))
    # Lightness alone tells the sizes apart.
    for dark in (False, True):
        with style.use(dark) as colours:
            light = [float(np.dot(mpl.colors.to_rgb(c), (0.2126, 0.7152, 0.0722))) for c in colours.steps(5)]
        assert np.diff(light).min() > 0.05


def test_rows_without_a_value_are_passed_over() -> None:
    made = cost(pairs(predicted_ms=[1.0, float("nan"), 3.0], measured_ms=[1.0, 2.0, float("nan")]))
    assert len(points(made.axes[0], "o")) == 1


def test_many_sizes_share_a_colour_by_decade() -> None:
    made = cost(pairs(burst_bytes=[15_000 * n for n in range(1, 41)]))
    assert {"10 kB to 100 kB", "100 kB to 1 MB"} <= set(texts(made))


# --- the staircase ---------------------------------------------------------------------------------------------


def test_records_stand_at_their_share_and_the_line_is_the_rule_of_the_kernel() -> None:
    given = ladder(2800, number=30, top_s=3.0)
    made = staircase(given)
    (axes,) = made.axes
    expected = sorted(zip(given["idle_us"] / given["rto_us"], given["cwnd_after"] / given["cwnd_before"], strict=True))
    assert np.asarray(points(axes, "o", "s")) == pytest.approx(np.asarray(expected))
    (line,) = [item for item in axes.lines if item.get_marker() == "None" and item.get_linestyle() == "-"]
    x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
    for rtos in np.arange(0.05, axes.get_xlim()[1], 0.1):
        if abs(rtos - round(rtos)) > 0.01:
            drawn = y[np.searchsorted(x, rtos)]
            assert drawn * 2800 == pytest.approx(experiments.halved(2800, rtos * experiments.RTO_MS))
    assert "Each RTO of idle time halves the window: all 30 records fit to the segment" in texts(made)
    assert axes.get_yscale() == "log"


def test_floors_of_mixed_windows_are_drawn_and_named() -> None:
    made = staircase(ladder(30, 120, 700, 2800))
    (axes,) = made.axes
    dashed = [item for item in axes.lines if item.get_marker() == "None" and item.get_linestyle() == "--"]
    assert sorted(float(np.asarray(line.get_ydata())[0]) for line in dashed) == pytest.approx(
        [10 / 700, 10 / 120, 1 / 3]
    )
    assert {"10 of 30", "10 of 120", "10 of 700", "10 of 2,800"} <= set(texts(made))
    squares = points(axes, "s")
    assert squares
    assert all(any(abs(y - 10 / size) < 1e-9 for size in (30, 120, 700, 2800)) for _, y in squares)


def test_a_record_off_the_staircase_is_marked_and_counted() -> None:
    # 2.27 RTOs: a quarter; within a jiffy of a step either side of it will do; a timeout has another rule.
    made = staircase(
        resets(
            {"idle_us": 700_000, "cwnd_before": 800, "cwnd_after": 200},
            {"idle_us": 700_000, "cwnd_before": 800, "cwnd_after": 300},
            {"idle_us": 612_000, "cwnd_before": 800, "cwnd_after": 200},
            {"idle_us": 700_000, "cwnd_before": 800, "cwnd_after": 1, "reason": "rto_loss"},
        )
    )
    assert np.asarray(points(made.axes[0], "X")) == pytest.approx(np.asarray([(700 / 308, 0.375)]))
    assert len(points(made.axes[0], "o")) == 2
    assert any("2 of 3 records fit" in text for text in texts(made))
    assert {"off the staircase: 1", "halved: 2"} <= set(texts(made))


@pytest.mark.parametrize(
    ("number", "kept", "share"),
    [(1, 0, "0 of 1 record fits"), (1, 1, "the one record fits"), (3, 1, "1 of 3 records fits"),
     (3, 0, "0 of 3 records fit"), (3, 3, "all 3 records fit")],
)  # fmt: skip
def test_one_record_is_no_records(number: int, kept: int, share: str) -> None:
    assert f": {share} to the segment" in titles_of_staircase(number, kept)[0]


def test_very_long_rests_stand_at_the_edge_and_are_counted() -> None:
    made = staircase(ladder(100, number=5, top_s=3600))
    (axes,) = made.axes
    edge = axes.get_xlim()[1]
    assert edge < 12
    assert points(axes, ">") == [(edge, 0.1)] * 4
    assert any(text.startswith("idle over") and text.endswith(": 4") for text in texts(made))


def test_records_without_a_timeout_are_passed_over() -> None:
    made = staircase(resets({"rto_us": 0}, {"cwnd_before": 0, "cwnd_after": 0}))
    assert "no reset after idle time in this capture" in texts(made)
    assert not list(made.axes[0].lines)
