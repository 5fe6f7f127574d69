# SPDX-License-Identifier: Apache-2.0
"""In pictures of a capture, marks are where the records say, texts don't overlap, and no text is taken for markup.

The figures are drawn, so that errors that only drawing raises are found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from cwndtrace.analysis.block_io import heat_map
from cwndtrace.errors import UsageError
from cwndtrace.plot import panels, style
from cwndtrace.plot.heat import heat
from cwndtrace.plot.labels import extent
from cwndtrace.plot.timeline import timeline
from cwndtrace.trace import Trace
from tests.unit import drawing, frames
from tests.unit.examples import FEW

LOSSY = [
    {"event": "block_io", "start_ns": frames.MONO + 46 * 10**9, "end_ns": frames.MONO + 48 * 10**9, "lost": 1234},
    {"event": "cwnd_reset", "start_ns": frames.MONO + 20 * 10**9, "end_ns": frames.MONO + 20 * 10**9 + 1, "lost": 3},
]


def timeline_of(trace: Trace, **options: Any) -> Figure:
    return timeline(trace.resets, trace.connections, trace.block_io, about=trace.about, **options)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for box in figure.legends for text in box.get_texts()]


def labels(axes: Axes) -> list[Text]:
    return [text for text in axes.texts if "→" in text.get_text() and "after" in text.get_text()]


def story(path: Path, **values: Any) -> Trace:
    resets, connections = frames.story()
    return frames.capture(path, **({"resets": resets, "connections": connections, "block_io": frames.disk()} | values))


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
    pixels = drawing.draw(figure)
    assert to_hex(pixels[2, 2]) == paper
    # There is enough contrast between text and background.
    assert abs(float(np.mean(pixels[2, 2, :3])) - float(np.mean(mpl.colors.to_rgb(colours.ink)))) > 0.7
    assert dict(mpl.rcParams) == before
    assert style.palette() is style.LIGHT


def everything(figure: Figure) -> list[Bbox]:
    boxes = [extent(text) for axes in figure.axes for text in axes.texts]
    boxes += [extent(text) for text in figure.texts]
    return boxes + [extent(box) for box in figure.legends]


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


@pytest.mark.parametrize("name", CASES)
def test_no_text_leaves_the_picture_or_covers_another_one(path: Path, name: str) -> None:
    figure = timeline_of(story(path, **CASES[name]))
    drawing.draw(figure)
    boxes = everything(figure)
    width, height = figure.bbox.width, figure.bbox.height
    for box in boxes:
        assert -0.5 <= box.x0 < box.x1 <= width + 0.5
        assert -0.5 <= box.y0 < box.y1 <= height + 0.5
    for n, box in enumerate(boxes):
        for other in boxes[:n]:
            # A line's box is higher than its letters, so two boxes may overlap by two points.
            slack = 2 * figure.dpi / 72
            side_by_side = box.x1 <= other.x0 or other.x1 <= box.x0
            assert side_by_side or box.y1 - slack <= other.y0 or other.y1 - slack <= box.y0


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
    assert "no connection was seen" in drawing.texts(timeline_of(frames.capture(path.with_name("b.cwnd"))))
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


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=300))
def test_plain_text_is_never_mathtext_and_has_a_limited_length(text: str) -> None:
    line = style.plain(text, 50)
    shown, math = Text()._preprocess_math(line)  # type: ignore[attr-defined]
    assert math is False
    assert len(shown) <= 50
    assert len(shown) == min(len(text), 50)
    ascii_only = "".join(c if c.isprintable() else "?" for c in text if c.isascii())
    if text.isascii():
        assert shown in (ascii_only, ascii_only[:49] + "…")


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


@FEW
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


# ---- the heat map ---------------------------------------------------------------------------------


def test_the_heat_map_draws_every_request_and_hatches_losses(path: Path) -> None:
    trace = story(path, lossy=LOSSY)
    cells = heat_map(trace.block_io)
    figure = heat(cells, zero_ns=frames.MONO, about=trace.about)
    drawing.draw(figure)
    (mesh,) = figure.axes[0].collections
    assert np.ma.sum(np.ma.asarray(mesh.get_array())) == len(trace.block_io) == 3000
    assert figure.axes[0].get_xlim()[0] == pytest.approx((trace.block_io["start_ns"].min() - frames.MONO) / 1e9)
    assert any("3,000 requests" in text for text in drawing.texts(figure))
    assert any("1,234 requests lost" in text for text in drawing.texts(figure))


def test_a_heat_map_without_requests_says_so(path: Path) -> None:
    trace = frames.capture(path, host="<b>\x1b[1m$x^2$")
    figure = heat(heat_map(trace.block_io), zero_ns=0, about=trace.about)
    drawing.draw(figure)
    assert "no block I/O recorded" in drawing.texts(figure)
    assert any(r"on <b>?[1m\$x^2\$" in text for text in drawing.texts(figure))
