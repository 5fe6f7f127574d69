# SPDX-License-Identifier: Apache-2.0
"""The saw tooth: a window over time with the setting on and, below it on the same scale, with it off."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from cwndtrace.format import nominal_size, plural
from cwndtrace.plot import layout, panels, style
from cwndtrace.plot.frames import Clock, clock
from cwndtrace.plot.labels import Label, headroom, place
from cwndtrace.plot.style import Palette, plain
from cwndtrace.records.frames import whole
from cwndtrace.store.meta import Meta

_HEIGHT, _LEFT, _RIGHT, _BOTTOM, _GAP = 1.85, 0.78, 0.2, 0.8, 0.42
_LOG_FROM: Final = 20.0  # from this ratio of largest to smallest, the axis is logarithmic, as in the timeline
_JIFFY_NS: Final = 10_000_000  # the longest jiffy, at HZ=100
_COLUMNS: Final = ["setting", "round", "start_ns", "end_ns", "acked_ns", "idle_ms", "srtt_ms", "idle_s", "burst_bytes",
                   "latency_ms", "cwnd_before", "cwnd_after", "cwnd_end"]  # fmt: skip


def sawtooth(
    resets_on: pd.DataFrame,
    observed_on: pd.DataFrame,
    resets_off: pd.DataFrame,
    observed_off: pd.DataFrame,
    *,
    about: Meta,
    measurements: pd.DataFrame | None = None,
    round: int | None = None,
) -> Figure:
    """Return a figure of the window (segments) of one connection with the sysctl on, above one with it off.

    ``resets_*`` are the rows of a Trace's ``resets`` that belong to the connection. ``observed_*`` (``ts_ns``,
    ``cwnd``) are its window at other times: snapshots, samples. ``about`` is the capture's metadata.

    ``measurements`` has one row per burst, of both settings, with the columns ``setting``, ``round``, ``start_ns``,
    ``end_ns``, ``acked_ns``, ``idle_ms``, ``srtt_ms``, ``idle_s``, ``burst_bytes``, ``latency_ms``, ``cwnd_before``,
    ``cwnd_after`` and ``cwnd_end``, the window at ``acked_ns``. With it, the figure shows one ``round`` (None: the
    first that both settings finished), each panel from its own first idle time on, because the settings take turns.
    Idle times without a reset are then shaded too, and each burst is marked along the foot and labelled with its
    window, size and latency, where there is room. Without it, both panels show the whole capture on its clock.
    """
    resets = {"on": whole(resets_on, "cwnd_reset"), "off": whole(resets_off, "cwnd_reset")}
    observed = {"on": observed_on, "off": observed_off}
    bursts = {setting: _none() for setting in resets}
    rounds = 0
    if measurements is not None and len(measurements):
        rounds = int(measurements["round"].nunique())
        chosen = measurements[measurements["round"] == (_whole(measurements) if round is None else round)]
        bursts = {setting: chosen[chosen["setting"].astype(str) == setting] for setting in resets}
    clocks = _clocks(resets, observed, bursts, about)
    with style.drawing() as colours:
        figure = layout.sheet(_BOTTOM + 2 * _HEIGHT + _GAP + 0.25)
        wide = layout.WIDTH - _LEFT - _RIGHT
        axes = {
            "on": layout.add(figure, _LEFT, _BOTTOM + _HEIGHT + _GAP, wide, _HEIGHT),
            "off": layout.add(figure, _LEFT, _BOTTOM, wide, _HEIGHT),
        }
        legend = panels.Legend()
        for setting, each in axes.items():
            at = clocks[setting]
            each.set_xlim(at.begin, at.end)
            known = _known(observed[setting], bursts[setting], at)
            shown = at.shown(resets[setting], "ts_ns", "ts_ns")
            legend |= panels.window(each, shown, known, at, colours)
            legend |= _shade_and_mark(each, bursts[setting], shown, at, colours)
            each.set_title(f"{layout.SYSCTL} {setting}", loc="left", fontsize=10, fontweight="bold", pad=5)
            each.set_ylabel("window (segments)", fontsize=10)
            each.grid(axis="y")
            each.tick_params(labelbottom=setting == "off")
            if known.empty and shown.empty:
                layout.say(each, f"nothing was recorded with the setting {setting}", colours)
        _same_scale(list(axes.values()), resets, observed, bursts, clocks)
        labelled = 0
        for setting, each in axes.items():
            at = clocks[setting]
            if len(bursts[setting]):
                hue = colours.idle if setting == "on" else colours.window
                labelled += _label_bursts(each, bursts[setting], at, hue)
            else:
                panels.label_resets(each, at.shown(resets[setting], "ts_ns", "ts_ns"), at, colours)
        since = "the first idle time began" if rounds else "the start"
        axes["off"].set_xlabel(f"seconds since {since}", fontsize=10)
        shown_round = int(next(iter(f["round"].iloc[0] for f in bursts.values() if len(f)), 0))
        caption = _caption(about, clocks["on"], shown_round, rounds, labelled, sum(map(len, bursts.values())))
        layout.finish(figure, *_titles(resets, bursts, clocks), legend, caption, colours)
    return figure


def _none() -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(dtype="object" if name == "setting" else "float64") for name in _COLUMNS})


def _whole(measurements: pd.DataFrame) -> int:
    """Return the first of the rounds in which most bursts were measured with both settings."""
    counts = measurements.groupby(["round", "setting"], observed=True).size().unstack(fill_value=0)
    best: Any = counts.min(axis=1).idxmax()
    return int(best)


def _clocks(
    resets: dict[str, pd.DataFrame], observed: dict[str, pd.DataFrame], bursts: dict[str, pd.DataFrame],
    about: Meta,
) -> dict[str, Clock]:  # fmt: skip
    """Return a clock for each panel: both equally long, and with bursts each from its first idle time on."""
    both = pd.concat([frame[["ts_ns"]] for frame in [*resets.values(), *observed.values()]])
    whole = clock(both, both.iloc[:0], both.iloc[:0], about, None)
    zeros = {s: int((b["start_ns"] - (b["idle_ms"] * 1e6).astype("int64")).min()) for s, b in bursts.items() if len(b)}
    if not zeros:
        return dict.fromkeys(resets, whole)
    ends = {s: max(int(bursts[s][name].max()) for name in ("end_ns", "acked_ns")) for s in zeros}
    end = max([*((ends[s] - zero) / 1e9 for s, zero in zeros.items()), 0.01])
    return {s: replace(whole, zero_ns=zeros.get(s, whole.zero_ns), begin=-0.02 * end, end=1.03 * end) for s in resets}


def _known(observed: pd.DataFrame, bursts: pd.DataFrame, at: Clock) -> pd.DataFrame:
    """Return the known windows (``ts_ns``, ``cwnd``) besides those at resets: observed ones and those around bursts."""
    seen = at.shown(observed, "ts_ns", "ts_ns")[["ts_ns", "cwnd"]]
    when = seen["ts_ns"].to_numpy(np.int64)
    for start, idle, srtt in zip(bursts["start_ns"], bursts["idle_ms"], bursts["srtt_ms"], strict=True):
        # The idle time is known to a jiffy, so a window seen just as it began may still grow by the last
        # acknowledgements.
        settled = int(start) - int((idle - srtt) * 1e6)
        seen = seen[(when < settled) | (when > settled + _JIFFY_NS)]
        when = seen["ts_ns"].to_numpy(np.int64)
    frames = [seen]
    # The last byte arrives half a round trip before its ACK, and each ACK until then may open the window: cwnd_end is
    # the window at acked_ns, not at end_ns.
    for time, cwnd in (("start_ns", "cwnd_before"), ("acked_ns", "cwnd_end")):
        frames.append(bursts[[time, cwnd]].set_axis(["ts_ns", "cwnd"], axis=1))
    known = pd.concat([frame.astype("int64") for frame in frames]).drop_duplicates()
    return known.sort_values("ts_ns", kind="stable", ignore_index=True)


def _shade_and_mark(
    axes: Axes, bursts: pd.DataFrame, resets: pd.DataFrame, at: Clock, colours: Palette
) -> panels.Legend:
    """Draw the idle times that ended without a reset, with their window, and the bursts."""
    if bursts.empty:
        return {}
    starts, ends = at.seconds(bursts["start_ns"]), at.seconds(bursts["end_ns"])
    fell = at.seconds(resets["ts_ns"])
    # A reset comes during the burst that ends the idle time.
    held = [not ((fell >= begin) & (fell <= end)).any() for begin, end in zip(starts, ends, strict=True)]
    quiet, upto = bursts[held], starts[held]
    begins = upto - quiet["idle_ms"].to_numpy(np.float64) / 1e3
    across = axes.get_xaxis_transform()
    axes.broken_barh(
        list(zip(begins, upto - begins, strict=True)), (0, 1), transform=across, facecolor=colours.idle_shade,
        edgecolor="none", zorder=0.5,
    )  # fmt: skip
    settled = np.minimum(begins + quiet["srtt_ms"].to_numpy(np.float64) / 1e3, upto)
    flats = [[(a, y), (b, y)] for a, b, y in zip(settled, upto, quiet["cwnd_before"].tolist(), strict=True)]
    axes.add_collection(LineCollection(flats, colors=colours.window, linewidths=2.0, zorder=4), autolim=False)
    axes.broken_barh(
        list(zip(starts, ends - starts, strict=True)), (0, 0.05), transform=across, facecolor=colours.read,
        edgecolor="none", zorder=3,
    )  # fmt: skip
    return {
        "window": Line2D([], [], color=colours.window, linewidth=2),
        "idle": Patch(facecolor=colours.idle_shade),
        "measured burst": Patch(facecolor=colours.read),
    }


def _same_scale(
    both: list[Axes], resets: dict[str, pd.DataFrame], observed: dict[str, pd.DataFrame],
    bursts: dict[str, pd.DataFrame], clocks: dict[str, Clock],
) -> None:  # fmt: skip
    """Give both panels one scale of windows, logarithmic where that shows more."""
    sizes: list[float] = []
    for setting, at in clocks.items():
        shown = at.shown(resets[setting], "ts_ns", "ts_ns")
        sizes += [*shown["cwnd_before"].tolist(), *shown["cwnd_after"].tolist()]
        sizes += _known(observed[setting], bursts[setting], at)["cwnd"].tolist()
    low, high = max(min(sizes, default=1.0), 1.0), max(sizes, default=10.0)
    high = max(high, low * 1.5)
    room = headroom(_HEIGHT * 72)
    logarithmic = high / low >= _LOG_FROM
    for axes in both:
        if logarithmic:
            axes.set_yscale("log")
            bottom = low / 1.9
            axes.set_ylim(bottom, bottom * (high * 1.1 / bottom) ** (1 / (1 - room)))
            decades = range(math.floor(math.log10(bottom)), math.ceil(math.log10(high * 1.1)) + 1)
            steps = [(1,), (1, 3)][high / bottom < 1000]
            ticks = [step * 10.0**n for n in decades for step in steps if bottom <= step * 10.0**n <= high * 1.1]
            axes.yaxis.set_major_locator(FixedLocator(ticks))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_yscale("linear")
            axes.set_ylim(0, high * 1.05 / (1 - room))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _label_bursts(axes: Axes, bursts: pd.DataFrame, at: Clock, colour: str) -> int:
    """Label bursts with their latency, and return how many.

    Where not all fit, the largest ones after the longest idle times get a label.
    """
    labels = []
    columns = (bursts[n].tolist() for n in ("cwnd_before", "cwnd_after", "burst_bytes", "latency_ms", "idle_s"))
    for x, before, after, size, ms, idle in zip(at.seconds(bursts["start_ns"]).tolist(), *columns, strict=True):
        window = f"{before:,.0f} → {after:,.0f}" if after < before else f"{before:,.0f} kept"
        labels.append(Label(x, before, f"{window}: {nominal_size(size)} in {ms:.0f} ms", size * idle, colour))
    return place(axes, sorted(labels, key=lambda label: -label.rank)[:80], 8.5)


def _titles(
    resets: dict[str, pd.DataFrame], bursts: dict[str, pd.DataFrame], clocks: dict[str, Clock]
) -> tuple[str, str]:
    second = f"net.ipv4.{layout.SYSCTL} on (above) and off (below)"
    if any(len(frame) for frame in bursts.values()):
        second += ", the same idle times and bursts"
        parts: list[str] = []
        for setting, frame in bursts.items():
            if len(frame):
                shown = clocks[setting].shown(resets[setting], "ts_ns", "ts_ns")
                parts.append(f"{setting}, {_shrunk(frame, shown, first=not parts)}")
        text = "; ".join(parts)
        return f"{text[0].upper()}{text[1:]}", second
    counts = []
    for setting, frame in resets.items():
        idle = frame[frame["reason"].astype(str) == "idle"]
        number = len(clocks[setting].shown(idle, "ts_ns", "ts_ns"))
        counts.append(f"{setting}, {plural(number, 'reset') if number else 'no reset'} after idle time")
    text = "; ".join(counts)
    return f"{text[0].upper()}{text[1:]}", second


def _shrunk(bursts: pd.DataFrame, resets: pd.DataFrame, *, first: bool) -> str:
    """Return how many idle times shrank the window, and the resets among those drawn that none of them explains."""
    fell, number = int((bursts["cwnd_after"] < bursts["cwnd_before"]).sum()), len(bursts)
    at = resets.loc[resets["reason"].astype(str) == "idle", "ts_ns"].to_numpy(np.int64)
    spans = zip(bursts["start_ns"], bursts["end_ns"], strict=True)
    recorded = sum(bool(((at >= start) & (at <= end)).any()) for start, end in spans)
    share = f"{fell:,} of {number:,}" if fell or first else "none"
    parts = [f"{share} idle times shrank the window" if first else share]
    if recorded < fell:
        parts.append(f"{fell - recorded:,} of them not recorded")
    if recorded < len(resets):
        parts.append(plural(len(resets) - recorded, "other reset"))
    return " and ".join(parts)


def _caption(about: Meta, at: Clock, shown: int, rounds: int, labelled: int, bursts: int) -> str:
    parts = [f"on {about.host or 'unknown host'}, Linux {about.kernel or '?'}"]
    if labelled < bursts:
        parts.insert(0, f"{labelled} of {plural(bursts, 'burst')} labelled")
    if rounds:
        parts.insert(0, f"round {shown} of {rounds}")
    elif at.started:
        parts.insert(0, f"0 s is {at.started} UTC")
    return plain("  ·  ".join(parts))
