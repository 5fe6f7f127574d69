# SPDX-License-Identifier: Apache-2.0
"""A picture of the cost of resets by the records against that by the receiver's clock, one point per burst."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from cwndtrace.format import nominal_size, plural
from cwndtrace.plot import layout, style
from cwndtrace.plot.panels import Legend
from cwndtrace.plot.style import Palette, plain

SIZES: Final = 6
"""Up to this many burst sizes have a colour each; with more, the sizes of a decade share one."""
MARKERS: Final = ("o", "s", "^", "D", "v", "P")
"""The shapes of congestion controls; from the sixth on, they share the last one."""

_SIDE, _LEFT, _BOTTOM = 3.6, 0.78, 0.86
_ALIKE: Final = 1.25  # up to this ratio of longest to shortest round trip, one band in ms is right for all

Values = npt.NDArray[np.float64]


def cost(pairs: pd.DataFrame) -> Figure:
    """Return a figure of the extra time of each burst by the records against that by the receiver's clock.

    ``pairs`` has one row per burst: ``recorded_ms``, ``predicted_ms``, ``measured_ms``, ``rtt_ms``, ``burst_bytes``,
    ``ca_name``. Rows with a missing value are skipped. On the line both agree; in the band they are within one round
    trip. Crosses show the prediction in place of what was recorded. The axes are in milliseconds, or, where the paths'
    round-trip times differ, in round trips, so that the band holds for all. Colours show the size of bursts, shapes the
    congestion control.
    """
    names = ["recorded_ms", "predicted_ms", "measured_ms", "rtt_ms"]
    used = pairs.dropna(subset=[*names, "burst_bytes"])
    used = used[used["rtt_ms"] > 0]
    recorded, predicted, measured, rtt = (used[n].to_numpy(np.float64) for n in names)
    within = np.abs(recorded - measured) <= rtt
    alike = not len(used) or rtt.max() <= _ALIKE * rtt.min()
    trip = float(np.median(rtt)) if len(used) else 100.0
    unit, band = ("ms", trip) if alike else ("round trips", 1.0)
    x, crosses, y = (values if alike else values / rtt for values in (recorded, predicted, measured))
    with style.drawing() as colours:
        figure = layout.sheet(_BOTTOM + _SIDE + (0.42 if alike else 0.05))
        axes = layout.add(figure, _LEFT, _BOTTOM, _SIDE, _SIDE)
        axes.set_xlabel(f"cost by the records ({unit})", fontsize=10)
        axes.set_ylabel(f"cost by the receiver's clock ({unit})", fontsize=10)
        values = np.concatenate([x, crosses, y, [0.0]])
        low, high = float(values.min()), float(values.max())
        high = max(high, low + 2 * band)
        pad = 0.07 * (high - low)
        low, high = low - pad, high + pad
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6))
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        axes.grid()
        legend = _agreement(axes, low, high, band, colours)
        axes.plot(crosses, y, "+", color=colours.faint, markersize=6, zorder=3)
        if alike and len(used):
            _round_trips(axes, trip, colours)
        if len(used):
            _points(axes, used, x, y, colours)
        else:
            layout.say(axes, "no burst with both costs", colours)
        layout.finish(figure, *_titles(within), legend, _caption(used), colours)
    return figure


def _agreement(axes: Axes, low: float, high: float, band: float, colours: Palette) -> Legend:
    ends = np.array([low, high])
    axes.fill_between(ends, ends - band, ends + band, color=colours.idle_shade, linewidth=0, zorder=0.5)
    axes.plot(ends, ends, color=colours.faint, linewidth=1.2, zorder=2)
    return {
        "equal": Line2D([], [], color=colours.faint, linewidth=1.2),
        "within one round trip": Patch(facecolor=colours.idle_shade),
        "predicted": Line2D([], [], marker="+", linestyle="", color=colours.faint, markersize=6),
    }


def _round_trips(axes: Axes, trip: float, colours: Palette) -> None:
    functions = (lambda ms: ms / trip, lambda trips: trips * trip)
    top, right = axes.secondary_xaxis("top", functions=functions), axes.secondary_yaxis("right", functions=functions)
    top.set_xlabel("round trips", fontsize=9.5)
    right.set_ylabel("round trips", fontsize=9.5)
    for side, axis, name in ((top, top.xaxis, "top"), (right, right.yaxis, "right")):
        axis.set_major_locator(MaxNLocator(6, integer=True))
        side.spines[name].set_visible(True)
        side.tick_params(color=colours.faint, labelcolor=colours.ink, labelsize=8.5)


def _points(axes: Axes, used: pd.DataFrame, x: Values, y: Values, colours: Palette) -> None:
    """Draw the points, and beside the axes the legend of their colours and shapes."""
    label, order = _classes(used["burst_bytes"].to_numpy(np.float64))
    hues = dict(zip(order, colours.steps(len(order)), strict=True))
    names = used["ca_name"].astype(str)
    shapes = {name: MARKERS[min(n, len(MARKERS) - 1)] for n, name in enumerate(names.value_counts().index)}
    for size in order:
        for name, marker in shapes.items():
            mine = (label == size) & (names == name).to_numpy()
            if mine.any():
                axes.plot(
                    x[mine], y[mine], marker, color=hues[size], markersize=6, markeredgecolor=colours.paper,
                    markeredgewidth=0.5, alpha=0.8, zorder=4,
                )  # fmt: skip
    sizes = [Line2D([], [], marker="o", linestyle="", color=hues[size], markersize=6.5, label=size) for size in order]
    kinds = [
        Line2D([], [], marker=marker, linestyle="", color=colours.faint, markersize=6.5, label=plain(name, 16))
        for name, marker in list(shapes.items())[: len(MARKERS)]
    ]
    shape: dict[str, Any] = {
        "loc": "upper left", "borderaxespad": 0, "borderpad": 0, "fontsize": 9, "title_fontsize": 9,
        "alignment": "left", "labelspacing": 0.4, "handlelength": 1.0, "handletextpad": 0.5,
    }  # fmt: skip
    beside = 1 + 0.72 / _SIDE
    first = axes.legend(handles=sizes, title="burst", bbox_to_anchor=(beside, 1.0), **shape)
    axes.add_artist(first)
    down = 1 - (0.182 * (len(sizes) + 1) + 0.16) / _SIDE
    axes.legend(handles=kinds, title="congestion control", bbox_to_anchor=(beside, down), **shape)


def _classes(bursts: Values) -> tuple[npt.NDArray[Any], list[str]]:
    """Return the size class of each burst, and all classes from small to large."""
    if len(np.unique(bursts)) <= SIZES:
        texts = np.array([nominal_size(burst) for burst in bursts])
    else:
        decades = np.clip(np.floor(np.log10(np.maximum(bursts, 1))), 3, 9).astype(int)
        texts = np.array([_decade(int(decade)) for decade in decades])
    ordered = [str(texts[n]) for n in np.argsort(bursts, kind="stable")]
    return texts, list(dict.fromkeys(ordered))


def _decade(decade: int) -> str:
    if decade == 3:
        return "below 10 kB"
    if decade == 9:
        return "1 GB and more"
    return f"{nominal_size(10.0**decade)} to {nominal_size(10.0 ** (decade + 1))}"


def _titles(within: npt.NDArray[np.bool_]) -> tuple[str, str]:
    second = "extra time of each burst that a reset began, by the records and by the receiver's clock"
    number, good = len(within), int(within.sum())
    if not number:
        return "No burst has a cost by the records and by the receiver's clock", second
    if good == number:
        whole = "The burst was" if number == 1 else f"All {plural(number, 'burst')} were"
        return f"{whole} within one round trip of the records", second
    were = "was" if 1 in (good, number) else "were"
    return f"{good:,} of {plural(number, 'burst')} {were} within one round trip of the records", second


def _caption(used: pd.DataFrame) -> str:
    if used.empty:
        return "receiver's clock: latency with the setting on less the median with it off"
    off = (used["recorded_ms"] - used["measured_ms"]).abs()
    rtt = used["rtt_ms"]
    span = f"{rtt.min():.0f} ms" if math.ceil(rtt.max()) - math.floor(rtt.min()) <= 1 else (
        f"{rtt.min():.0f} to {rtt.max():.0f} ms"
    )  # fmt: skip
    apart = f"apart by {off.median():.0f} ms at the median and {off.max():.0f} ms at most"
    return f"RTT {span}  ·  {apart}  ·  clock: on less the median with the setting off"
