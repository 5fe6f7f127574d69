# SPDX-License-Identifier: Apache-2.0
"""Figures drawn to pixels, what is drawn in them, and texts that matplotlib could take for markup."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import Collection, LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from cwndtrace.plot import style
from cwndtrace.plot.labels import extent
from cwndtrace.plot.timeline import timeline
from cwndtrace.trace import Trace
from tests.unit import frames

HOSTILE_TEXTS = [
    "a$b_c^{x}$", "$\\frac{1}{", r"\$x$", "$$", "\x1b[31mred\x07", "\u202eright", "长连接", "{}%s<b>", "$" * 15,
]  # fmt: skip


PICTURE = "data:image/svg+xml;base64,PHN2ZyB4bWxucz0iaHR0cDovL3d3dy53My5vcmcvMjAwMC9zdmciLz4="
"""An empty picture, as a page has pictures."""


def leave_undrawn(patch: pytest.MonkeyPatch) -> None:
    """Let pages have empty pictures, for tests of what else is on a page: drawing takes most of a page's time."""
    patch.setattr("cwndtrace.report.page._pair", lambda _: {"light": PICTURE, "dark": PICTURE})


def draw(figure: Figure) -> np.ndarray:
    """Return the pixels of the figure, from 0 to 255: those of its PNG, without the time that packing it takes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]


def texts(figure: Figure) -> list[str]:
    """Return all texts of the figure that aren't empty."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def points(axes: Axes, *markers: str) -> list[tuple[float, float]]:
    """Return the points that are drawn with these markers, sorted by x and y."""
    drawn = [
        (float(x), float(y))
        for line in axes.lines
        if line.get_marker() in markers
        for x, y in zip(np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), strict=True)
    ]
    return sorted(drawn)


def shown_ticks(axis: Axis) -> Iterator[Text]:
    """Yield the labels of an axis that are seen."""
    low, high = sorted(axis.get_view_interval())
    slack = 1e-9 * (high - low)
    for tick in axis.get_major_ticks():
        if low - slack <= tick.get_loc() <= high + slack:
            yield from (text for text in (tick.label1, tick.label2) if text.get_visible() and text.get_text())


def all_axes(figure: Figure) -> list[Any]:
    """Return all axes of a figure, with those at the other side of a panel."""
    return [*figure.axes, *(child for parent in figure.axes for child in parent.child_axes)]


def legends(figure: Figure) -> list[Legend]:
    """Return the legends of a figure and of its axes."""
    inner = [child for axes in all_axes(figure) for child in axes.get_children() if isinstance(child, Legend)]
    return [*figure.legends, *inner]


def all_text(figure: Figure) -> list[tuple[str, Bbox]]:
    """Return each visible text of a figure with its box; a legend counts as one text."""
    visible_texts: list[Text] = [*figure.texts]
    for axes in all_axes(figure):
        visible_texts += [*axes.texts, axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title]
        visible_texts += [*shown_ticks(axes.xaxis), *shown_ticks(axes.yaxis)]
    named = [(text.get_text(), extent(text)) for text in visible_texts if text.get_visible() and text.get_text()]
    return named + [("legend", extent(legend)) for legend in legends(figure)]


def check_texts(figure: Figure) -> None:
    """Check that no text leaves the picture or covers another one."""
    draw(figure)
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


def _rows(colours: Any) -> list[Any]:
    return list(np.reshape(colours, (-1, 4)))


def looks(artist: Any) -> set[tuple[str, ...]]:
    """Return by what a mark is recognised: a line's colour and stroke, a marker's colour and shape, or a hatch."""
    found: set[tuple[str, ...]] = set()
    if isinstance(artist, Line2D):
        colour = to_hex(artist.get_color())
        if artist.get_linestyle() != "None":
            stroke = (f"{artist.get_linewidth():g}", str(artist.get_linestyle()), str(artist.get_alpha()))
            found.add(("line", colour, *stroke))
        if artist.get_marker() != "None":
            shape = MarkerStyle(artist.get_marker())
            path = shape.get_path().transformed(shape.get_transform())
            found |= {("marker", colour), ("shape", str(path.vertices))}
    elif isinstance(artist, LineCollection):
        colours = {to_hex(colour) for colour in _rows(artist.get_edgecolor())}
        found |= {("line", c, f"{width:g}", "-", "None") for c in colours for width in np.ravel(artist.get_linewidth())}
    elif isinstance(artist, PathCollection):
        found |= {("marker", to_hex(colour)) for colour in _rows(artist.get_facecolor())}
        found |= {("shape", str(path.vertices)) for path in artist.get_paths()}
    elif isinstance(artist, Patch) and artist.get_hatch():
        found.add(("hatch", to_hex(artist.get_edgecolor()), str(artist.get_hatch()), f"{artist.get_linewidth():g}"))
    elif isinstance(artist, Patch | Collection):
        colours = {to_hex(c, keep_alpha=True) for c in _rows(artist.get_facecolor())}
        found |= {("area", colour) for colour in colours}
    return found


def check_legends(figure: Figure) -> None:
    """Check that what a legend shows looks like something that is drawn."""
    drawn = {
        look for axes in figure.axes for each in (*axes.lines, *axes.collections, *axes.patches) for look in looks(each)
    }
    for legend in legends(figure):
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True):
            assert handle is not None
            assert looks(handle)
            assert looks(handle) <= drawn, text.get_text()


def check_colours(make: Callable[[], Figure], *, dark: bool) -> None:
    """Check that a picture has the colours of the palette alone, and that matplotlib's settings are restored."""
    before = dict(mpl.rcParams)
    with style.use(dark) as colours:
        figure = make()
    pixels = draw(figure) / 255
    assert to_hex(pixels[2, 2]) == colours.paper
    assert dict(mpl.rcParams) == before
    # No text has a colour of the user's settings, not even the ticks that are created while drawing.
    allowed = {colours.ink, colours.faint, colours.idle, colours.window}
    for axes in all_axes(figure):
        for text in [*shown_ticks(axes.xaxis), *shown_ticks(axes.yaxis), axes.xaxis.label, axes.yaxis.label]:
            assert to_hex(text.get_color()) == colours.ink
        assert {to_hex(text.get_color()) for text in axes.texts} <= allowed
    assert {to_hex(text.get_color()) for text in figure.texts} <= allowed


def check_literal(figure: Figure, expected: str) -> None:
    """Check that ``expected`` is drawn, character by character, and no text as mathematics."""
    draw(figure)
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if any("$" in part for part in text.get_text().split("\\$")):
            assert text._preprocess_math(text.get_text())[1] is False  # type: ignore[attr-defined]
    assert all(text.isprintable() for text in texts(figure))
    assert any(expected[:8] in text for text in texts(figure))


LOSSY = [
    {"event": "block_io", "start_ns": frames.MONO + 46 * 10**9, "end_ns": frames.MONO + 48 * 10**9, "lost": 1234},
    {"event": "cwnd_reset", "start_ns": frames.MONO + 20 * 10**9, "end_ns": frames.MONO + 20 * 10**9 + 1, "lost": 3},
]
"""Spans with losses of 1,237 records, of requests and of resets."""


def story(path: Path, **values: Any) -> Trace:
    """Write a capture of one connection and of block I/O, and load it."""
    resets, connections = frames.story()
    return frames.capture(path, **({"resets": resets, "connections": connections, "block_io": frames.disk()} | values))


def timeline_of(trace: Trace, **options: Any) -> Figure:
    """Return the timeline of a capture."""
    return timeline(trace.resets, trace.connections, trace.block_io, about=trace.about, **options)


def legend(figure: Figure) -> list[str]:
    """Return the texts of the figure's legends."""
    return [text.get_text() for box in figure.legends for text in box.get_texts()]
