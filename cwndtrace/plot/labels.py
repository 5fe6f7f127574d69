# SPDX-License-Identifier: Apache-2.0
"""The placing of text that must neither overlap nor leave the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

LANES = 2
_LANE_POINTS = 11.5
_GAP_POINTS = 5.0


@dataclass(frozen=True)
class Label:
    """A text for the data point (x, y); of two that collide, the one with the higher rank stays."""

    x: float
    y: float
    text: str
    rank: float
    colour: str


def headroom(height_points: float) -> float:
    """Return the share of a panel of this height that its lanes of labels take at the top."""
    return (LANES * _LANE_POINTS + 10) / height_points


def place(axes: Axes, labels: list[Label], size: float = 8.0) -> int:
    """Put labels into the lanes at the top of ``axes``, each with a line down to its point; return how many fitted.

    The limits of ``axes`` and its place in the figure have to be final.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    point = figure.dpi / 72
    widths = [_width(figure, label.text, size) for label in labels]
    stems = [float(axes.transData.transform((label.x, label.y))[0]) for label in labels]
    edges = (axes.bbox.x0, axes.bbox.x1)
    by_rank = sorted(range(len(labels)), key=lambda n: -labels[n].rank)
    across = sorted(range(len(labels)), key=lambda n: stems[n])
    # Where labels don't all fit by rank, another order may have room for all of them.
    tries = [_arranged(order, widths, stems, edges, _GAP_POINTS * point) for order in (by_rank, across, across[::-1])]
    places = next((each for each in tries if len(each) == len(labels)), tries[0])
    for n, (lane, centre) in places.items():
        label = labels[n]
        top = axes.bbox.y1 - lane * _LANE_POINTS * point
        x, y = axes.transData.inverted().transform((centre, top))
        axes.text(x, y, label.text, ha="center", va="top", fontsize=size, color=label.colour, zorder=6)
        foot = axes.transData.inverted().transform((centre, top - 10 * point))[1]
        axes.plot([label.x, label.x], [foot, label.y], color=label.colour, linewidth=0.6, alpha=0.55, zorder=2)
    return len(places)


def _arranged(
    order: list[int], widths: list[float], stems: list[float], edges: tuple[float, float], gap: float
) -> dict[int, tuple[int, float]]:
    """Return the lane and the centre of each label that fits if they are placed in this order; in pixels."""
    left, right = edges
    lanes: list[list[tuple[float, float, float]]] = [[] for _ in range(LANES)]
    places: dict[int, tuple[int, float]] = {}
    for n in order:
        half, stem = widths[n] / 2, stems[n]
        if 2 * half > right - left:
            continue
        # A label goes over its point if there is room, otherwise beside it, and into the upper lane first.
        tries = (
            (lane, centre)
            for lane in range(LANES)
            for centre in (min(max(stem + half * shift, left + half), right - half) for shift in (0, 0.9, -0.9))
        )
        fits = (t for t in tries if _free(lanes, t[0], t[1] - half - gap, t[1] + half + gap, stem))
        if found := next(fits, None):
            lane, centre = places[n] = found
            lanes[lane].append((centre - half - gap, centre + half + gap, stem))
    return places


def _free(lanes: list[list[tuple[float, float, float]]], lane: int, begin: float, end: float, stem: float) -> bool:
    """Return whether a label has room beside its neighbours in a lane, with no line to a point through any text."""
    beside = all(end <= b or begin >= e for b, e, _ in lanes[lane])
    under = all(not begin < s < end for upper in lanes[:lane] for _, _, s in upper)
    over = all(not b < stem < e for lower in lanes[lane + 1 :] for b, e, _ in lower)
    return beside and under and over


def fit(text: Text, points: float, least: float = 6.5) -> None:
    """Make ``text`` no wider than ``points``, by smaller letters first, then by an ellipsis in its middle."""
    figure = text.get_figure(root=True)
    assert figure is not None
    content = text.get_text()
    limit = points * figure.dpi / 72
    while (size := float(text.get_fontsize())) > least and _width(figure, content, size, text) > limit:
        text.set_fontsize(max(least, size - 0.25))
    plain = content.replace(r"\$", "$")
    keep = len(plain)
    while keep > 8 and _width(figure, text.get_text(), size, text) > limit:
        keep -= 2
        shorter = f"{plain[: keep // 2]}…{plain[-(keep // 2) :]}"
        text.set_text(shorter.replace("$", r"\$"))


def extent(artist: Artist) -> Bbox:
    """Return the box in which an artist of a figure will be drawn, in pixels."""
    figure = artist.get_figure(root=True)
    assert figure is not None
    canvas = figure.canvas if isinstance(figure.canvas, FigureCanvasAgg) else FigureCanvasAgg(figure)
    renderer: Any = canvas.get_renderer()  # type: ignore[no-untyped-call]
    return artist.get_window_extent(renderer)


def _width(figure: Figure, content: str, size: float, like: Text | None = None) -> float:
    """Return the width of a text in pixels."""
    probe = Text(0, 0, content, figure=figure)
    if like is not None:
        probe.set_fontproperties(like.get_fontproperties())
    probe.set_fontsize(size)
    return float(extent(probe).width)
