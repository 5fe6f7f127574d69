# SPDX-License-Identifier: Apache-2.0
"""The two kinds of panels of a timeline: the window of a connection, and the latency of block I/O."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from cwndtrace.plot.frames import Clock, LossBand
from cwndtrace.plot.labels import Label, fit, headroom, place
from cwndtrace.plot.style import Palette, plain

SCATTER_MAX: Final = 20_000
"""The most requests that are drawn as a dot each; of more, percentiles over time are drawn."""

_LOG_FROM = 20.0  # from this ratio of largest to smallest, a logarithmic axis shows more
_BINS = 160
_JIFFY_S = 0.01  # the longest jiffy, at HZ=100
_REASONS: Final = {
    "idle": "reset after idle",
    "rto_loss": "reset by RTO loss",
    "app_limited": "reset, application-limited",
    "tlp_loss": "reset, tail loss probe",
}

Legend = dict[str, Artist]
"""Legend entries by their text, so that panels with the same entry show it once."""


def window(axes: Axes, resets: pd.DataFrame, observed: pd.DataFrame, at: Clock, colours: Palette) -> Legend:
    """Draw a connection's congestion window over time. The frames hold the rows of this connection only."""
    resets, legend = resets.sort_values("ts_ns"), Legend()
    when, before, after = at.seconds(resets["ts_ns"]), resets["cwnd_before"], resets["cwnd_after"]
    reasons = resets["reason"].astype(str).to_numpy()
    idle = reasons == "idle"
    began = when - resets["idle_us"].to_numpy(np.float64) / 1e6
    # The acknowledgements of the last data may still open the window; after that, it holds until the reset. They may
    # come as late as srtt plus a jiffy, the precision of the idle time.
    held = np.minimum(began + resets["srtt_us"].to_numpy(np.float64) / 1e6 + _JIFFY_S, when)
    levels = before.to_numpy(np.float64)

    seen, sizes = at.seconds(observed["ts_ns"]), observed["cwnd"].to_numpy(np.float64)
    known = pd.DataFrame(
        {
            "x": np.concatenate([np.where(idle, held, when), when, when, seen]),
            "y": np.concatenate([levels, levels, after.to_numpy(np.float64), sizes]),
            "order": np.repeat([0, 1, 2, -1], [len(when), len(when), len(when), len(seen)]),
        }
    ).sort_values(["x", "order"], kind="stable")
    _limits(axes, at, known)
    if known.empty:
        return legend
    axes.plot(known["x"], known["y"], color=colours.window, linewidth=0.8, alpha=0.6, zorder=3)
    flats = [[(a, y), (b, y)] for a, b, y in zip(held[idle], when[idle], levels[idle], strict=True)]
    if flats:
        axes.add_collection(LineCollection(flats, colors=colours.window, linewidths=2.0, zorder=4), autolim=False)
        legend["window"] = Line2D([], [], color=colours.window, linewidth=2)
    legend["not observed"] = Line2D([], [], color=colours.window, linewidth=0.8, alpha=0.6)
    if len(seen):
        axes.plot(seen, sizes, "o", color=colours.window, markersize=3.2, zorder=4)
        legend["observed"] = Line2D([], [], color=colours.window, marker="o", markersize=3.2, linestyle="")
    if idle.any():
        shade_idle(axes, resets, at, colours)
        legend["idle"] = Patch(facecolor=colours.idle_shade)
    for reason in sorted(set(reasons)):
        # Markers aren't clipped at the axis, so those outside the span have to be left out.
        mine = (reasons == reason) & (when >= at.begin) & (when <= at.end)
        colour = colours.reason(reason)
        axes.vlines(when[mine], after[mine], before[mine], color=colour, linewidth=1.4, zorder=5)
        axes.plot(
            when[mine], after[mine], "v", color=colour, markersize=5.5, markeredgewidth=0, zorder=5, clip_on=False
        )
        text = _REASONS.get(reason, f"reset: {plain(reason, 20)}")
        legend[text] = Line2D([], [], color=colour, marker="v", markersize=5.5, markeredgewidth=0, linewidth=1.4)
    return legend


def shade_idle(axes: Axes, resets: pd.DataFrame, at: Clock, colours: Palette) -> None:
    """Shade the idle times that ended in a reset over the whole height of ``axes``."""
    idle_resets = resets[resets["reason"].astype(str) == "idle"]
    ends, lengths = at.seconds(idle_resets["ts_ns"]), idle_resets["idle_us"].to_numpy(np.float64) / 1e6
    bars = list(zip(ends - lengths, lengths, strict=True))
    axes.broken_barh(
        bars, (0, 1), transform=axes.get_xaxis_transform(), facecolor=colours.idle_shade, edgecolor="none", zorder=0.5
    )


def label_resets(axes: Axes, resets: pd.DataFrame, at: Clock, colours: Palette) -> int:
    """Write ``2827 → 44 after 2.1 s`` over the largest drops that there is room for; return the number of labels."""
    labels = []
    columns = (resets[name].tolist() for name in ("cwnd_before", "cwnd_after", "idle_us", "reason"))
    for x, before, after, idle_us, reason in zip(at.seconds(resets["ts_ns"]).tolist(), *columns, strict=True):
        text = f"{before} → {after}" + (f" after {_idle(idle_us)}" if reason == "idle" else "")
        if at.begin <= x <= at.end:
            labels.append(Label(x, before, text, before - after, colours.reason(reason)))
    # Measuring text is slow, so labels far beyond those that fit are not tried.
    return place(axes, sorted(labels, key=lambda label: -label.rank)[:80])


def _idle(us: int) -> str:
    if us < 1_000_000:
        return f"{us / 1000:.0f} ms"
    return f"{us / 1e6:.1f} s" if us < 100_000_000 else f"{us / 1e6:.0f} s"


def heading(axes: Axes, first: str, second: str, colours: Palette) -> None:
    """Write two lines above a panel, the first bold; both have to be plain text (see ``style.plain``)."""
    width = axes.bbox.width * 72 / axes.figure.dpi
    for text, up, weight, colour in ((first, 18, "bold", colours.ink), (second, 6.5, "normal", colours.faint)):
        line = axes.annotate(
            text, (0, 1), (0, up), xycoords="axes fraction", textcoords="offset points", fontsize=9,
            fontweight=weight, color=colour, annotation_clip=False,
        )  # fmt: skip
        fit(line, width)


def _limits(axes: Axes, at: Clock, known: pd.DataFrame) -> None:
    shown = known[(known["x"] >= at.begin) & (known["x"] <= at.end)]
    shown = known if shown.empty else shown
    low, high = (float(shown["y"].min()), float(shown["y"].max())) if len(shown) else (1.0, 10.0)
    low, high = max(low, 1.0), max(high, 1.0)
    room = headroom(axes.bbox.height * 72 / axes.figure.dpi)
    if high / low >= _LOG_FROM:
        axes.set_yscale("log")
        bottom = low / 1.6
        axes.set_ylim(bottom, bottom * (high * 1.1 / bottom) ** (1 / (1 - room)))
        plain_log(axes, bottom, high * 1.1)
    else:
        axes.set_ylim(0, high * 1.05 / (1 - room))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def plain_log(axes: Axes, low: float, high: float) -> None:
    """Put plain numbers on a logarithmic axis, none above ``high``, in finer steps where it has few decades."""
    for steps in ((1,), (1, 3), (1, 2, 5)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**n for n in decades for step in steps if low <= step * 10.0**n <= high]
        if len(ticks) >= 3:
            break
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def latency(axes: Axes, block_io: pd.DataFrame, at: Clock, colours: Palette) -> Legend:
    """Draw the latency of block I/O in ms at its start: a dot per request, or percentiles if there are too many."""
    when = at.seconds(block_io["start_ns"])
    ms = np.maximum(block_io["done_ns"].to_numpy(np.int64) - block_io["start_ns"].to_numpy(np.int64), 1000) / 1e6
    failed = (block_io["error"] != "ok").to_numpy()
    if len(block_io) > SCATTER_MAX:
        legend = _percentiles(axes, when, ms, at, colours)
    else:
        legend = _dots(axes, when, ms, block_io["op"].astype(str).to_numpy(), colours)
    if failed.any():
        axes.plot(when[failed], ms[failed], "x", color=colours.error, markersize=6, markeredgewidth=1.5, zorder=5)
        legend[f"I/O error: {failed.sum():,}"] = Line2D([], [], color=colours.error, marker="x", linestyle="")
    axes.set_yscale("log")
    low, high = float(ms.min()) / 1.5, float(ms.max()) * 1.5
    widen = max(1.0, (10 / (high / low)) ** 0.5)
    low, high = low / widen, high * widen
    axes.set_ylim(low, high)
    plain_log(axes, low, high)
    return legend


def _dots(axes: Axes, when: np.ndarray, ms: np.ndarray, ops: np.ndarray, colours: Palette) -> Legend:
    legend = Legend()
    alpha = 0.85 if len(when) < 500 else 0.5
    size = float(np.clip(14 - 2.6 * np.log10(max(len(when), 1)), 3, 14))
    kinds = {"read": ("o", colours.read), "write": ("^", colours.write), "other": ("s", colours.other)}
    kind = np.where(np.isin(ops, ["read", "write"]), ops, "other")
    for name, (marker, colour) in kinds.items():
        mine = kind == name
        if mine.any():
            axes.scatter(when[mine], ms[mine], s=size, marker=marker, color=colour, alpha=alpha, linewidths=0, zorder=3)
            text = "other I/O" if name == "other" else name
            legend[text] = Line2D([], [], color=colour, marker=marker, markersize=4, linestyle="", markeredgewidth=0)
    return legend


def _percentiles(axes: Axes, when: np.ndarray, ms: np.ndarray, at: Clock, colours: Palette) -> Legend:
    edges = np.linspace(at.begin, at.end, _BINS + 1)
    slot = np.clip(np.digitize(when, edges) - 1, 0, _BINS - 1)
    groups = pd.Series(ms).groupby(slot)
    # Bins without a request stay missing, so that lines and bands break there.
    low, middle, high, top = (
        series.reindex(range(_BINS)).to_numpy()
        for series in (groups.quantile(0.05), groups.median(), groups.quantile(0.95), groups.max())
    )
    x = (edges[:-1] + edges[1:]) / 2
    axes.fill_between(x, low, high, color=colours.read, alpha=0.28, linewidth=0, zorder=2)
    axes.plot(x, middle, color=colours.read, linewidth=1.5, zorder=4)
    axes.plot(x, top, ".", color=colours.write, markersize=3, zorder=3)
    return {
        f"median of {len(when):,} I/Os": Line2D([], [], color=colours.read, linewidth=1.5),
        "5th to 95th percentile": Patch(facecolor=colours.read, alpha=0.28),
        "slowest": Line2D([], [], color=colours.write, marker=".", linestyle=""),
    }


def hatch(axes: Axes, losses: list[LossBand], at: Clock, colours: Palette) -> None:
    """Hatch the spans in which records were lost; one that is too short to see is widened to 2.5 pixels."""
    least = 2.5 * (at.end - at.begin) / axes.bbox.width
    for loss in losses:
        axes.axvspan(
            loss.begin, max(loss.end, loss.begin + least), facecolor="none", edgecolor=colours.lost, hatch="/////",
            linewidth=0.6, zorder=1.5,
        )  # fmt: skip
