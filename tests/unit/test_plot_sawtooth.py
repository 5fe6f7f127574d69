# SPDX-License-Identifier: Apache-2.0
"""The saw tooth shows the windows of both settings as the frames have them, and every text is readable.

The figures are drawn, so that errors that only drawing raises are found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from cwndtrace.plot import style
from cwndtrace.plot.sawtooth import sawtooth
from cwndtrace.store.meta import Meta
from tests.unit import drawing, experiments, frames
from tests.unit.experiments import STORY


def saw(story: experiments.Experiment = STORY, **options: Any) -> Figure:
    given: dict[str, Any] = {"about": frames.about(), "measurements": story.measured} | options
    return sawtooth(story.resets["on"], story.observed["on"], story.resets["off"], story.observed["off"], **given)


CASES: dict[str, Callable[[], Figure]] = {
    "plain": saw,
    "quick": lambda: saw(experiments.experiment(rounds=1, bursts=(100_000, 1_000_000), idle_times=(0.8,))),
    "many": lambda: saw(experiments.experiment(rounds=1, idle_times=(0.15, 0.5, 1.0, 2.0, 5.0))),
    "records alone": lambda: saw(measurements=None),
    "on alone": lambda: saw(measurements=STORY.measured[STORY.measured["setting"] == "on"]),
    "nothing": lambda: saw(experiments.NOTHING),
    "long names": lambda: saw(about=frames.about(host="h" * 300, kernel="k" * 300)),
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


@pytest.mark.quick(2)
@pytest.mark.parametrize("evil", drawing.HOSTILE_TEXTS)
def test_hostile_names_are_drawn_character_by_character(evil: str) -> None:
    figure = saw(about=frames.about(host=evil, kernel=evil * 40))
    drawing.check_literal(figure, style.plain(f"on {evil}, Linux")[:-1])


def test_a_picture_without_data_says_so() -> None:
    assert "nothing was recorded with the setting on" in drawing.texts(CASES["nothing"]())
    assert "nothing was recorded with the setting off" in drawing.texts(CASES["nothing"]())


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
    arrows = drawing.points(on, "v")
    assert [y for _, y in arrows] == fell["cwnd_after"].tolist()
    expected = ((fell["start_ns"] + 60_000 - zero["on"]) / 1e9).tolist()
    assert [x for x, _ in arrows] == pytest.approx(expected, abs=1e-6)
    assert drawing.points(off, "v") == []
    drawing.draw(figure)
    assert [bool(list(drawing.shown_ticks(axes.xaxis))) for axes in (on, off)] == [False, True]
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
    assert [x for x, _ in drawing.points(on, "v")] == pytest.approx(inside.tolist())
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
        assert (777 in [y for _, y in drawing.points(figure.axes[1], "o")]) is drawn


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
    more = [pd.concat([recorded, experiments.resets(*others[:number])], ignore_index=True) for number in (1, 2)]
    cases: list[tuple[pd.DataFrame, str]] = [
        (more[0], "On, 2 of 2 idle times shrank the window and 1 other reset"),
        (more[1], "On, 2 of 2 idle times shrank the window and 2 other resets"),
        (recorded.iloc[:1], "On, 2 of 2 idle times shrank the window and 1 of them not recorded"),
    ]
    for on, title in cases:
        story.resets["on"] = on
        figure = saw(story)
        assert len(drawing.points(figure.axes[0], "v")) == len(on)
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
