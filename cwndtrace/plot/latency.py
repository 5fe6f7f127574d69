# SPDX-License-Identifier: Apache-2.0
"""A picture of burst latency by idle time, with the setting on and off, and a panel for each burst size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator

from cwndtrace.format import nominal_size, plural, signed
from cwndtrace.plot import layout, style
from cwndtrace.plot.labels import extent
from cwndtrace.plot.panels import Legend
from cwndtrace.plot.style import Palette

MOST_PANELS: Final = 6
"""The most burst sizes in one picture; the largest ones are shown."""

_LEFT, _RIGHT, _BOTTOM, _FOOT, _TITLE, _GAP = 0.68, 0.68, 0.48, 0.3, 0.28, 0.22
_HEIGHTS: Final = {1: 3.0, 2: 1.95}  # inches of a panel, by the number of rows of panels
_ASIDE: Final = {"on": -0.17, "off": 0.17}
_WIDE, _SPREAD = 0.3, 0.1
_MINUS: Final = "\N{MINUS SIGN}"
_MARKERS: Final = {"on": "o", "off": "s"}


def latency(measurements: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """Return a figure of burst latency by idle time, on beside off: ms on the left axis, round trips on the right.

    ``measurements`` has one row per burst: ``setting`` (on, off), ``idle_s``, ``burst_bytes``, ``latency_ms``,
    ``min_rtt_ms``, ``rto_ms``. Each is a faint dot. ``summary`` has one row per burst size and idle time:
    ``burst_bytes``, ``idle_s``, ``median_on_ms``, ``median_off_ms``, ``cost_ms``, ``cost_low_ms``, ``cost_high_ms``,
    ``cost_rtts``, with NaN for values that weren't measured, and ``outcome`` (see lab.statistics.outcome). Markers and
    bars are medians, and lines run from the 5th to the 95th percentile of the measurements. The cost of the setting and
    its 95 % interval are above each pair, where there is room.
    """
    bursts = sorted(measurements["burst_bytes"].unique().tolist())
    shown = bursts[-MOST_PANELS:]
    used = measurements[measurements["burst_bytes"].isin(shown)]
    rtt = float(measurements["min_rtt_ms"].median()) if len(measurements) else float("nan")
    with style.drawing() as colours:
        figure, grid = _grid(max(len(shown), 1))
        high = float(used["latency_ms"].max()) if len(used) else 100.0
        rows, across = len(grid), len(grid[0])
        drawn = [axes for row in grid for axes in row if axes is not None]
        for axes in drawn:
            # The top of each panel has room for two lines of text.
            axes.set_ylim(0, high / (1 - 0.44 / _HEIGHTS[rows]))
            axes.yaxis.set_major_locator(MaxNLocator(5 if rows > 1 else 7))
            axes.grid(axis="y")
        legend = Legend()
        for axes, burst in zip(drawn, shown, strict=False):
            cells = summary[summary["burst_bytes"] == burst]
            legend |= _panel(axes, used[used["burst_bytes"] == burst], cells, colours)
            axes.set_title(f"{nominal_size(burst)} bursts", loc="left", fontsize=10, fontweight="bold", pad=5)
        if not shown:
            layout.say(drawn[0], "nothing was measured", colours)
            drawn[0].set_xticks([])
        for n, row in enumerate(grid):
            if row[0] is not None:
                row[0].set_ylabel("latency (ms)", fontsize=10)
            last = [axes for axes in row if axes is not None][-1]
            _round_trips(last, rtt, colours)
            for column, panel in enumerate(row):
                if panel is None:
                    continue
                panel.tick_params(labelleft=column == 0)
                if n == rows - 1 or grid[n + 1][column] is None:
                    panel.set_xlabel("idle before the burst (s)" if across < 3 else "idle (s)", fontsize=10)
        layout.finish(figure, *_titles(summary), legend, _caption(used, len(shown), len(bursts), rtt), colours)
    return figure


def _grid(number: int) -> tuple[Figure, list[list[Axes | None]]]:
    across = {1: 1, 2: 2, 3: 3, 4: 2}.get(number, 3)
    rows = -(-number // across)
    height = _HEIGHTS[rows] + _TITLE + _BOTTOM
    figure = layout.sheet(_FOOT + rows * height)
    wide = (layout.WIDTH - _LEFT - _RIGHT - (across - 1) * _GAP) / across
    grid: list[list[Axes | None]] = []
    for n in range(rows):
        bottom = _FOOT + (rows - 1 - n) * height + _BOTTOM
        places = [_LEFT + column * (wide + _GAP) for column in range(across)]
        grid.append(
            [
                layout.add(figure, left, bottom, wide, _HEIGHTS[rows]) if n * across + column < number else None
                for column, left in enumerate(places)
            ]
        )
    return figure, grid


def _panel(axes: Axes, measured: pd.DataFrame, cells: pd.DataFrame, colours: Palette) -> Legend:
    idle_times = sorted(measured["idle_s"].unique().tolist())
    edge = 0.5 if len(idle_times) > 1 else 0.8
    axes.set_xlim(-edge, len(idle_times) - 1 + edge)
    axes.xaxis.set_major_locator(FixedLocator(list(range(len(idle_times)))))
    axes.set_xticklabels([f"{idle:g}" for idle in idle_times])
    legend = Legend()
    tops = [0.0] * len(idle_times)
    for setting, colour in (("on", colours.idle), ("off", colours.window)):
        mine = measured[measured["setting"].astype(str) == setting]
        if mine.empty:
            continue
        medians = cells.set_index("idle_s")[f"median_{setting}_ms"].reindex(idle_times).to_numpy(np.float64)
        aside = np.arange(len(idle_times)) + _ASIDE[setting]
        axes.bar(aside, medians, _WIDE, color=colour, alpha=0.27, linewidth=0, zorder=1.5)
        axes.plot(
            aside, medians, _MARKERS[setting], color=colour, markersize=6.5, markeredgecolor=colours.paper, zorder=5
        )
        for n, idle in enumerate(idle_times):
            values = np.sort(mine.loc[mine["idle_s"] == idle, "latency_ms"].to_numpy(np.float64))
            if not len(values):
                continue
            spread = np.linspace(-_SPREAD, _SPREAD, len(values)) if len(values) > 1 else np.zeros(1)
            axes.plot(
                aside[n] + spread, values, ".", color=colour, markersize=5, alpha=0.4, markeredgewidth=0, zorder=2
            )
            low, high = np.quantile(values, (0.05, 0.95))
            axes.vlines(aside[n], low, high, color=colour, linewidth=2.2, alpha=0.85, zorder=4)
            tops[n] = max(tops[n], float(values.max()))
        legend[f"{layout.SYSCTL} {setting}"] = Line2D(
            [], [], color=colour, marker=_MARKERS[setting], markersize=6.5, markeredgewidth=0, linestyle=""
        )
    if _mark_rto(axes, idle_times, float(measured["rto_ms"].median()), colours):
        legend["idle = RTO"] = Line2D([], [], color=colours.faint, linestyle=(0, (2, 2)), linewidth=1)
    _say_costs(axes, idle_times, tops, cells, colours)
    return legend


def _mark_rto(axes: Axes, idle_times: list[float], rto_ms: float, colours: Palette) -> bool:
    """Draw a line between the idle times up to the RTO and the longer ones; return whether there is one."""
    shorter = sum(idle * 1000 <= rto_ms for idle in idle_times)
    if not 0 < shorter < len(idle_times):
        return False
    axes.axvline(shorter - 0.5, color=colours.faint, linestyle=(0, (2, 2)), linewidth=1, zorder=1)
    return True


def _say_costs(axes: Axes, idle_times: list[float], tops: list[float], cells: pd.DataFrame, colours: Palette) -> None:
    """Write the cost of the setting above each pair, with its interval below, as large as there is room for."""
    costs: list[tuple[int, str, str]] = []
    for cell in cells.to_dict("records"):
        cost, low, high = (float(cell[name]) for name in ("cost_ms", "cost_low_ms", "cost_high_ms"))
        if cell["idle_s"] in idle_times and np.isfinite(cost):
            interval = _interval(low, high) if np.isfinite(low) else ""
            costs.append((idle_times.index(cell["idle_s"]), f"{_signed(cost)} ms", interval))
    bold: dict[str, Any] = {"fontsize": 9, "fontweight": "bold", "color": colours.ink}
    faint: dict[str, Any] = {"fontsize": 8, "color": colours.faint}
    slot = axes.bbox.width / max(len(idle_times), 1) - 3 * axes.figure.dpi / 72

    def fits(texts: list[str], shape: dict[str, Any]) -> bool:
        return all(_width(axes, text, shape) <= slot for text in texts)

    intervals = fits([interval for _, _, interval in costs], faint)
    if not fits([text for _, text, _ in costs], bold):
        costs = [(n, text.removesuffix(" ms"), interval) for n, text, interval in costs]
    if not fits([text for _, text, _ in costs], bold):
        bold |= {"fontsize": 7.5, "fontweight": "normal"}
    if not fits([text for _, text, _ in costs], bold):
        return  # there is no room, and the axis shows the values
    place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom", "zorder": 6}
    for n, text, interval in costs:
        both = bool(interval) and intervals
        axes.annotate(text, (n, tops[n]), (0, 15.0 if both else 5.0), **place, **bold)
        if both:
            axes.annotate(interval, (n, tops[n]), (0, 5.0), **place, **faint)


def _signed(value: float) -> str:
    """Return a whole number with its sign, a real minus sign or a plus; zero has no sign."""
    return signed(value, "{:.0f}".format).replace("-", _MINUS)


def _interval(low: float, high: float) -> str:
    return " to ".join(_signed(end).removeprefix("+") for end in (low, high))


def _width(axes: Axes, content: str, shape: dict[str, Any]) -> float:
    probe = axes.text(0, 0, content, **shape)
    width = float(extent(probe).width)
    probe.remove()
    return width


def _scaled(factor: float) -> Callable[[Any], Any]:
    return lambda values: values * factor


def _round_trips(axes: Axes, rtt: float, colours: Palette) -> None:
    if not rtt > 0:
        return
    right = axes.secondary_yaxis("right", functions=(_scaled(1 / rtt), _scaled(rtt)))
    right.set_ylabel("round trips", fontsize=10)
    right.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    right.spines["right"].set_visible(True)
    right.tick_params(color=colours.faint, labelcolor=colours.ink, labelsize=8.5)


def _titles(summary: pd.DataFrame) -> tuple[str, str]:
    """Return both titles: the burst and idle time with the highest cost that is certain, or why there is none."""
    second = f"net.ipv4.{layout.SYSCTL}"
    if summary.empty:
        return "Nothing was measured", f"{second} on and off"
    cells: dict[str, list[dict[Any, Any]]] = {}
    for cell in summary.sort_values("cost_ms").to_dict("records"):
        cells.setdefault(cell["outcome"], []).append(cell)
    if "cost" in cells:
        worst = cells["cost"][-1]
        trips = f"{worst['cost_rtts']:.1f} round trips"
        return _took(worst), f"{second} = 1 cost up to {worst['cost_ms']:.0f} ms, or {trips}"
    if cells.keys() == {"one_setting"}:
        only = "on" if summary["median_on_ms"].notna().any() else "off"
        return f"Latency with the setting {only}; nothing to compare with", f"{second} {only}"
    if "few_rounds" in cells:
        return "Too few rounds to be sure of a difference", f"{second} on and off; at least three rounds are needed"
    second = f"{second} on and off"
    if "inconclusive" in cells:
        widest = max(cells["inconclusive"], key=lambda cell: float(cell["cost_high_ms"] - cell["cost_low_ms"]))
        ends = _interval(widest["cost_low_ms"], widest["cost_high_ms"])
        return "Inconclusive: more rounds are needed", f"{second}: the difference may be anything from {ends} ms (95 %)"
    if "saved" in cells:
        best = cells["saved"][0]
        return _took(best), f"{second}: the setting saved up to {-best['cost_ms']:.0f} ms"
    most = math.ceil(max(abs(float(cell[end])) for cell in cells["none"] for end in ("cost_low_ms", "cost_high_ms")))
    return "The setting cost nothing here", f"{second}: each 95 % interval is within {max(1, most)} ms of 0"


def _took(cell: dict[Any, Any]) -> str:
    took = f"{cell['median_on_ms']:.0f} ms instead of {cell['median_off_ms']:.0f} ms"
    return f"After {cell['idle_s']:g} s of idle time, {nominal_size(cell['burst_bytes'])} took {took}"


def _caption(used: pd.DataFrame, shown: int, of: int, rtt: float) -> str:
    if used.empty:
        return "no burst was measured"
    counts = used.groupby(["burst_bytes", "idle_s", "setting"], observed=True).size()
    least, most = int(counts.min()), int(counts.max())
    number = f"{most}" if least == most else f"{least} to {most}"
    parts = [f"medians of {number}, lines 5th to 95th percentile, + ms: cost of on, with 95 % interval"]
    parts.append(f"RTT {rtt:.0f} ms, RTO {used['rto_ms'].median():.0f} ms")
    if shown < of:
        parts.append(f"the largest {shown} of {plural(of, 'size')}")
    return "  ·  ".join(parts)
