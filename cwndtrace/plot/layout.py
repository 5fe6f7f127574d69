# SPDX-License-Identifier: Apache-2.0
"""The layout that the pictures of an experiment share: a sheet with the finding as headline, a legend and a caption.

Everything is placed in inches from the bottom left, so that nothing moves when the headline is added on top.
"""

from __future__ import annotations

from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cwndtrace.plot.labels import extent, fit
from cwndtrace.plot.panels import Legend
from cwndtrace.plot.style import Palette

WIDTH: Final = 7.2
"""Width in inches, less than that of a page, so that letters stay legible at half a page."""
SYSCTL: Final = "tcp_slow_start_after_idle"

_LEFT, _RIGHT = 0.12, 0.12
_HEADING, _ROW, _SPACE = 0.62, 0.2, 0.14


def sheet(height: float) -> Figure:
    """Return a figure for axes up to ``height`` inches; ``finish`` adds headline and legend above them."""
    return Figure(figsize=(WIDTH, height), dpi=150)


def add(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Add axes at a place in inches."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def finish(figure: Figure, first: str, second: str, legend: Legend, caption: str, colours: Palette) -> None:
    """Make the sheet higher, and write the headline, the line below it, the legend, and the caption at the foot.

    The texts have to be plain (see ``style.plain``).
    """
    room = WIDTH - _LEFT - _RIGHT
    shape: dict[str, Any] = {
        "borderaxespad": 0, "borderpad": 0, "columnspacing": 1.4, "handletextpad": 0.5, "handlelength": 1.5,
        "labelspacing": 0.35, "fontsize": 9,
    }  # fmt: skip
    rows, columns = _columns(figure, legend, shape, room)
    before = float(figure.get_size_inches()[1])
    after = before + _HEADING + rows * _ROW + _SPACE
    boxes = [axes.get_position() for axes in figure.axes]
    figure.set_size_inches(WIDTH, after)
    for axes, box in zip(figure.axes, boxes, strict=True):
        axes.set_position((box.x0, box.y0 * before / after, box.width, box.height * before / after))
    left = _LEFT / WIDTH
    top, below = (figure.text(left, 1 - inches / after, "") for inches in (0.28, 0.5))
    top.set(text=first, fontsize=12.5, fontweight="bold", color=colours.ink)
    below.set(text=second, fontsize=9.5, color=colours.faint)
    foot = figure.text(left, 0.1 / after, caption, fontsize=8, color=colours.faint, va="bottom")
    for text in (top, below, foot):
        fit(text, room * 72)
    if legend:
        anchor = (left, 1 - _HEADING / after)
        figure.legend(
            list(legend.values()), list(legend), ncols=columns, loc="upper left", bbox_to_anchor=anchor, **shape
        )


def _columns(figure: Figure, legend: Legend, shape: dict[str, Any], room: float) -> tuple[int, int]:
    """Return the rows and columns in which the legend is no wider than ``room`` inches."""
    for columns in range(len(legend), 0, -1):
        trial = figure.legend(list(legend.values()), list(legend), ncols=columns, loc="upper left", **shape)
        width = extent(trial).width / figure.dpi
        trial.remove()
        if width <= room or columns == 1:
            return -(-len(legend) // columns), columns
    return 0, 1


def say(axes: Axes, text: str, colours: Palette) -> None:
    """Write in the middle of ``axes`` why nothing is drawn there."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=10.5, color=colours.faint)
