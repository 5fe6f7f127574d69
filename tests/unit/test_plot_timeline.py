# SPDX-License-Identifier: Apache-2.0
"""Timelines of a capture say what they show, texts don't overlap, and no text is taken for markup.

The figures are drawn, so that errors that only drawing raises are found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from cwndtrace.errors import UsageError
from cwndtrace.plot import panels, style
from cwndtrace.plot.labels import extent
from cwndtrace.plot.timeline import timeline
from tests.unit import drawing, frames
from tests.unit.drawing import LOSSY, legend, story, timeline_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.cwnd"


def test_titles_name_the_endpoints_the_congestion_control_and_the_probe(path: Path) -> None:
    figure = timeline_of(story(path))
    text = " ".join(drawing.texts(figure))
    for part in ("10.1.0.1:443  →  10.2.0.9:20000", "cubic", "replica (pid 4242)", "21 resets", "seen by sendmsg"):
        assert part in text
    assert "0 s is 2026-11-18 12:30:00.000 UTC on web1, Linux 6.18.0" in text


@pytest.mark.parametrize(("dark", "paper"), [(False, style.LIGHT.paper), (True, style.DARK.paper)])
def test_light_and_dark_colours_are_used_and_settings_restored(path: Path, dark: bool, paper: str) -> None:
    trace = story(path, lossy=LOSSY)
    before = dict(mpl.rcParams)
    with style.use(dark) as colours:
        figure = timeline_of(trace)
    assert colours.paper == paper
    pixels = drawing.draw(figure) / 255
    assert to_hex(pixels[2, 2]) == paper
    # There is enough contrast between text and background.
    assert abs(float(np.mean(pixels[2, 2, :3])) - float(np.mean(mpl.colors.to_rgb(colours.ink)))) > 0.7
    assert dict(mpl.rcParams) == before
    assert style.palette() is style.LIGHT


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "lossy": {"lossy": LOSSY},
    "no block I/O": {"block_io": None},
    "no resets": {"resets": None},
    "nothing": {"resets": None, "connections": None, "block_io": None},
    "dense": {"block_io": frames.disk(panels.SCATTER_MAX + 1), "lossy": LOSSY},
    "one reset": {"resets": frames.table("cwnd_reset", frames.reset(1)), "connections": None},
    "all kinds": {
        "resets": frames.table(
            "cwnd_reset",
            frames.reset(5, reason="rto_loss", cwnd_before=60, cwnd_after=12),
            frames.reset(25, reason="app_limited", cwnd_before=80, cwnd_after=40),
            frames.reset(40, cwnd_before=68, cwnd_after=10, idle_us=900_000),
            frames.reset(48, reason="tlp_loss", cwnd_before=40, cwnd_after=28),
            frames.reset(50, reason=9),
        ),
        "block_io": frames.table("block_io", frames.block(1, error="ioerr"), frames.block(2, op="flush")),
        "lossy": LOSSY,
    },
}


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", CASES)
def test_every_text_is_readable_and_the_legend_shows_what_is_drawn(path: Path, name: str) -> None:
    figure = timeline_of(story(path, **CASES[name]))
    drawing.check_texts(figure)
    drawing.check_legends(figure)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "lossy", [None, 5, "x", [1], [{}], [{"start_ns": "a", "end_ns": 2, "lost": 1}], [{**LOSSY[0], "lost": 0}]]
)
def test_invalid_lossy_spans_are_ignored(path: Path, lossy: object) -> None:
    assert not any("lost" in text for text in legend(timeline_of(story(path, lossy=lossy))))


def test_without_block_io_there_is_no_panel_for_it(path: Path) -> None:
    trace = story(path, block_io=None)
    for block_io in (trace.block_io, None):
        figure = timeline(trace.resets, trace.connections, block_io, about=trace.about)
        assert len(figure.axes) == 1
        assert any("no block I/O recorded" in text for text in drawing.texts(figure))


def test_a_picture_without_resets_or_connections_says_so(path: Path) -> None:
    figure = timeline_of(story(path, resets=None))
    assert "no reset in this capture" in drawing.texts(figure)
    assert any("watched by sendmsg" in text for text in drawing.texts(figure))
    figure = timeline_of(frames.capture(path.with_name("b.cwnd")))
    ((axes,), (text,)) = figure.axes, figure.axes[0].texts
    assert text.get_text() == "no connection was seen"
    assert axes.bbox.y0 < extent(text).y0 < extent(text).y1 < axes.bbox.y1
    blind = story(path.with_name("c.cwnd"), resets=None, probes={"idle": None})
    assert any("no probe saw idle resets here" in text for text in drawing.texts(timeline_of(blind)))


def test_the_four_connections_with_most_resets_are_shown(path: Path) -> None:
    resets, connections = frames.story(peers=200, seconds=20)
    trace = frames.capture(path, resets=resets, connections=connections)
    figure = timeline_of(trace)
    assert len(figure.axes) == 4
    counts = trace.resets["connection"].value_counts()
    ports = [int(text.rsplit(":", 1)[1]) for text in drawing.texts(figure) if text.startswith("10.1.0.1:443")]
    shown = [counts[trace.resets.set_index("dport")["connection"].loc[[port]].iloc[0]] for port in ports]
    assert shown == sorted(counts, reverse=True)[:4]
    assert any("4 of 200 connections" in text for text in drawing.texts(figure))


def test_one_connection_is_shown_by_its_key(path: Path) -> None:
    resets, connections = frames.story(peers=5, seconds=20)
    trace = frames.capture(path, resets=resets, connections=connections)
    key = trace.resets.loc[trace.resets["dport"] == 20003, "connection"].iloc[0]
    figure = timeline_of(trace, connection=key)
    assert len(figure.axes) == 1
    assert any(":20003" in text for text in drawing.texts(figure))
    with pytest.raises(UsageError, match="There is no connection 1:2") as caught:
        timeline_of(trace, connection="1:2")
    assert key in caught.value.remedy


@pytest.mark.quick(2)
@pytest.mark.parametrize("evil", drawing.HOSTILE_TEXTS)
def test_hostile_names_are_drawn_character_by_character(path: Path, evil: str) -> None:
    resets, connections = frames.story(comm=evil, seconds=20)
    trace = frames.capture(
        path, resets=resets, connections=connections, host=evil, kernel=evil * 40, probes={"idle": evil},
        lossy=[{**LOSSY[0], "event": evil}],
    )  # fmt: skip
    with mpl.rc_context({"text.usetex": True}):
        figure = timeline_of(trace)
    drawing.draw(figure)
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        assert not text.get_usetex()
        if any("$" in part for part in text.get_text().split("\\$")):
            assert text._preprocess_math(text.get_text())[1] is False  # type: ignore[attr-defined]
    assert all(text.isprintable() for text in drawing.texts(figure))
    shown = evil.encode()[:16].decode("utf-8", "ignore")
    expected = style.plain(shown)
    assert any(expected in text for text in drawing.texts(figure))


def test_long_addresses_fit_into_the_picture(path: Path) -> None:
    ends = ("2001:db8:85a3:1234:5678:8a2e:3700:7334", "fd12:3456:789a:bcde:f012:3456:789a:bcde")
    resets, connections = frames.story(ends=ends, comm="W" * 15)
    figure = timeline_of(frames.capture(path, resets=resets, connections=connections, kernel="6.18" + "y" * 400))
    drawing.draw(figure)
    for text in [*figure.axes[0].texts, *figure.texts]:
        box = extent(text)
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
    assert any(f"[{ends[0]}]:443  →  [{ends[1]}]:20000" in text for text in drawing.texts(figure))


def test_a_capture_without_its_clock_starts_with_its_first_record(path: Path) -> None:
    resets = frames.table("cwnd_reset", frames.reset(7), frames.reset(9))
    figure = timeline_of(frames.capture(path, resets=resets, clock={}))
    assert figure.axes[0].get_xlim() == (0, 2)
    assert any(text.startswith("on web1") for text in drawing.texts(figure))


def test_frames_with_categories_can_be_drawn(path: Path) -> None:
    # Arrow's own frames have categories where a Trace has text.
    resets, connections = frames.story(seconds=20)
    key = pa.array(["k"] * len(resets))
    a = frames.pandas(resets.append_column("connection", key))
    b = frames.pandas(connections.append_column("connection", pa.array(["k"] * len(connections))))
    drawing.draw(timeline(a, b, frames.pandas(frames.disk(50)), about=frames.about()))
    assert not path.exists()
