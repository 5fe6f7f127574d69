# SPDX-License-Identifier: Apache-2.0
"""The staircase: the share of the window that is left after idle time, against the idle time in RTOs."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from cwndtrace.format import plural
from cwndtrace.plot import layout, style
from cwndtrace.plot.labels import fit
from cwndtrace.plot.panels import Legend
from cwndtrace.plot.style import Palette
from cwndtrace.records.frames import whole

FLOORS: Final = 4
"""The most sizes of windows whose floor is drawn; more lines would only be noise."""

_JIFFY_US: Final = 10_000.0  # the longest jiffy, at HZ=100: idle times and timeouts are recorded to one jiffy
_HEIGHT, _LEFT, _RIGHT, _BOTTOM = 3.3, 0.78, 1.12, 0.82
_STAIRS: Final = 14.0
_LABEL_GAP: Final = 0.19  # inches between the floors' labels

Values = npt.NDArray[np.float64]


def staircase(resets: pd.DataFrame) -> Figure:
    """Return a figure of the window after each reset as a share of the window before it, against idle time in RTOs.

    ``resets`` is that frame of a Trace; its columns ``reason`` (only ``idle`` is drawn), ``idle_us``, ``rto_us``,
    ``cwnd_before``, ``cwnd_after`` and ``init_cwnd`` are used. The line is the rule of tcp_cwnd_restart() in
    net/ipv4/tcp_output.c: one halving for each whole RTO of idle time, down to the initial window. As a share that
    floor is higher the smaller the window was, so it is drawn for the four most frequent sizes of windows. A point is
    on the staircase if the rule, for an idle time within a jiffy (10 ms at most) of the recorded one, gives it to the
    segment. Idle times that are too long for the axis are at its right edge.
    """
    resets = whole(resets, "cwnd_reset")
    usable = (resets["reason"].astype(str) == "idle") & (resets["rto_us"] > 0) & (resets["cwnd_before"] > 0)
    used = resets[usable]
    idle, rto, before, after, initial = (
        used[name].to_numpy(np.float64) for name in ("idle_us", "rto_us", "cwnd_before", "cwnd_after", "init_cwnd")
    )
    floor = np.maximum(np.minimum(initial, before), 1)
    after = np.maximum(after, 1)
    by_rule = [np.maximum(_halved(before, (idle + shift) / rto), floor) for shift in (0, -_JIFFY_US, _JIFFY_US)]
    kept = np.any([after == expected for expected in by_rule], axis=0) if len(used) else np.zeros(0, bool)
    with style.drawing() as colours:
        figure = layout.sheet(_BOTTOM + _HEIGHT)
        axes = layout.add(figure, _LEFT, _BOTTOM, layout.WIDTH - _LEFT - _RIGHT, _HEIGHT)
        axes.set_xlabel("idle before the reset (RTOs)", fontsize=10)
        axes.set_ylabel("window after (share of the window before)", fontsize=10)
        limit, depth = _scales(axes, idle / rto, floor / before, after / before)
        legend = Legend()
        if len(used):
            legend = _theory(axes, before, floor, limit, depth, colours)
            legend |= _points(axes, idle / rto, after / before, after == floor, kept, limit, colours)
        else:
            layout.say(axes, "no reset after idle time in this capture", colours)
        layout.finish(figure, *_titles(len(used), int(kept.sum())), legend, _caption(used), colours)
    return figure


def _halved(before: Values, rtos: Values) -> Values:
    """Return the windows halved by the kernel's rule: ``while ((delta -= rto) > 0) cwnd >>= 1``."""
    times = np.clip(np.ceil(rtos) - 1, 0, 32)
    halved: Values = np.floor(before / 2.0**times)
    return halved


def _scales(axes: Axes, rtos: Values, floors: Values, shares: Values) -> tuple[float, float]:
    """Set both axes up; return the last RTO and the smallest share (as -log2) that they show."""
    depth = math.ceil(-math.log2(min(floors.min(), shares.min(), 0.5))) if len(rtos) else 6
    # Show all steps, unless there are too many, and the floor as far as there are records, unless that is too far.
    limit = float(np.clip(rtos.max() * 1.04 + 0.3, min(depth + 1.5, _STAIRS), depth + 4.0)) if len(rtos) else 8.0
    depth = min(depth, max(math.ceil(limit), math.ceil(-math.log2(shares.min())))) if len(rtos) else depth
    top = max(1.0, float(shares.max())) if len(rtos) else 1.0
    axes.set_xlim(0, limit)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set_yscale("log", base=2)
    axes.set_ylim(2.0 ** -(depth + 0.5), top * 2**0.5)
    every = 1 if depth <= 10 else math.ceil(depth / 8)
    axes.yaxis.set_major_locator(FixedLocator([2.0**-n for n in range(0, depth + 1, every)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: _fraction(share)))
    axes.grid(axis="both")
    return limit, depth


def _fraction(share: float) -> str:
    """Return a power of 1/2 as a fraction, the smallest ones in powers of 1024."""
    parts = 1 / share
    for unit, name in ((2**30, "G"), (2**20, "M"), (2**10, "k")):
        if parts >= 8 * unit:
            return f"1/{parts / unit:.0f}{name}"
    return f"1/{parts:,.0f}" if parts > 1 else "1"


def _theory(axes: Axes, before: Values, floor: Values, limit: float, depth: float, colours: Palette) -> Legend:
    """Draw the steps of the windows with the lowest floor, and the other floors from where they leave the steps."""
    groups = _groups(before, floor)
    deepest = groups[0]
    size, least = (float(np.median(values[deepest])) for values in (before, floor))
    edges = np.arange(0, min(math.ceil(limit), depth + 1) + 1)
    steps = np.maximum(np.floor(size / 2.0 ** np.arange(len(edges))), least) / size
    x, y = np.repeat(np.append(edges, limit), 2)[1:-1], np.repeat(steps, 2)
    axes.plot(x, y, color=colours.window, linewidth=2.2, alpha=0.75, solid_joinstyle="miter", zorder=2)
    legend: Legend = {"the kernel's rule": Line2D([], [], color=colours.window, linewidth=2.2, alpha=0.75)}
    dashed: dict[str, Any] = {"color": colours.window, "linewidth": 1.1, "linestyle": (0, (4, 2))}
    used = -math.inf
    for group in groups:
        sizes = np.unique(before[group])
        initial, typical = float(np.median(floor[group])), float(np.median(sizes))
        share = initial / typical
        if share >= 1:
            continue
        if group is not deepest:
            axes.plot([max(1.0, math.ceil(-math.log2(share))), limit], [share, share], zorder=1.9, **dashed)
            legend["floor: the initial window"] = Line2D([], [], **dashed)
        # Labels go upwards from the lowest floor, and one that would touch the label below it is left out.
        up = axes.transAxes.inverted().transform(axes.transData.transform((limit, share)))[1] * _HEIGHT
        if up >= 0 and up - used >= _LABEL_GAP:
            used = up
            text = f"{initial:,.0f} of {'~' if len(sizes) > 1 else ''}{typical:,.0f}"
            label = axes.annotate(
                text, (limit, share), (7, 0), textcoords="offset points", va="center", fontsize=8.5,
                color=colours.window, annotation_clip=False,
            )  # fmt: skip
            fit(label, (_RIGHT - 0.16) * 72)
    return legend


def _groups(before: Values, floor: Values) -> list[list[int]]:
    """Return the records of the most frequent floors, lowest first; floors within 20 % count as one."""
    shares = floor / before
    groups: list[list[int]] = []
    for n in np.argsort(shares, kind="stable").tolist():
        if groups and shares[n] <= 1.2 * shares[groups[-1][0]]:
            groups[-1].append(n)
        else:
            groups.append([n])
    often = sorted(range(len(groups)), key=lambda n: -len(groups[n]))[:FLOORS]
    return [groups[n] for n in sorted(often)]


def _points(
    axes: Axes, rtos: Values, shares: Values, at_floor: npt.NDArray[np.bool_], kept: npt.NDArray[np.bool_],
    limit: float, colours: Palette,
) -> Legend:  # fmt: skip
    legend = Legend()
    inside = rtos <= limit
    kinds: list[tuple[str, Any, str, str]] = [
        ("halved", inside & kept & ~at_floor, "o", colours.idle),
        ("at the floor", inside & kept & at_floor, "s", colours.idle),
        ("off the staircase", inside & ~kept, "X", colours.error),
        (f"idle over {limit:.0f} RTOs", ~inside, ">", colours.idle),
    ]
    for name, mine, marker, colour in kinds:
        if not mine.any():
            continue
        style_of: dict[str, Any] = {
            "marker": marker, "color": colour, "markersize": 9 if marker == "X" else 6, "linestyle": "",
            "markeredgecolor": colours.paper, "markeredgewidth": 0.6,
        }  # fmt: skip
        axes.plot(np.minimum(rtos[mine], limit), shares[mine], zorder=4, clip_on=False, alpha=0.85, **style_of)
        legend[f"{name}: {mine.sum():,}"] = Line2D([], [], **style_of)
    return legend


def _titles(number: int, kept: int) -> tuple[str, str]:
    second = "idle times in retransmission timeouts (RTO), windows as a share of the one before, each step a halving"
    if not number:
        return "No window fell after idle time", second
    share = f"{kept:,} of {plural(number, 'record')}"
    if kept == number:
        share = "the one record" if number == 1 else f"all {plural(number, 'record')}"
    fit = "fits" if 1 in (kept, number) else "fit"
    return f"Each RTO of idle time halves the window: {share} {fit} to the segment", second


def _caption(used: pd.DataFrame) -> str:
    if used.empty:
        return "only resets after idle time are drawn here"
    rto = used["rto_us"].to_numpy(np.float64) / 1000
    span = f"{rto.min():.0f} ms" if rto.max() - rto.min() < 1 else f"{rto.min():.0f} to {rto.max():.0f} ms"
    return f"RTO {span}  ·  rule: tcp_cwnd_restart() in net/ipv4/tcp_output.c"
