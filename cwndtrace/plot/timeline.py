# SPDX-License-Identifier: Apache-2.0
"""The timeline: each connection's congestion window above, block I/O below, on one axis of time."""

from __future__ import annotations

from typing import Any, Final

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cwndtrace.format import plural
from cwndtrace.plot import panels, style
from cwndtrace.plot.frames import Clock, LossBand, choose, clock, losses
from cwndtrace.plot.labels import extent, fit
from cwndtrace.plot.style import Palette, plain
from cwndtrace.records.frames import whole
from cwndtrace.store.meta import Meta

MOST_PANELS: Final = 4
"""The most connections in one picture."""

# In inches. The figure is as wide as a page with 9 point letters, so that it is still legible at half a page.
_WIDTH, _LEFT, _RIGHT = 8.6, 0.78, 0.18
_WINDOW, _WINDOW_OF_MANY, _BLOCK, _HEADING, _GAP = 1.95, 1.5, 1.3, 0.47, 0.16
_AXIS, _FOOT, _ROW = 0.48, 0.52, 0.18


def timeline(
    resets: pd.DataFrame,
    connections: pd.DataFrame,
    block_io: pd.DataFrame | None,
    *,
    about: Meta,
    samples: pd.DataFrame | None = None,
    connection: str | None = None,
    span: tuple[float, float] | None = None,
) -> Figure:
    """Return a figure with one panel per connection and, if there is any, block I/O latency below.

    ``resets``, ``connections``, ``block_io`` and ``samples`` are the frames of a Trace (all but ``block_io`` with
    the column ``connection``); ``about`` is the capture's metadata. ``connection`` is one key, or None for the at most
    four connections with most resets. ``span`` is (begin, end) in seconds since the capture started.

    The x axis is in seconds since the start, windows are in segments, latencies in milliseconds. The window
    is exact at each reset, during the idle time before it, and where a snapshot or a sample was taken; the thin line
    between these only joins them. Spans in which records were lost are hatched. Colours come from ``style.use``.

    Raises UsageError for a connection that isn't there and for an empty span.
    """
    block_io = block_io if block_io is not None else pd.DataFrame(columns=["start_ns", "done_ns", "op", "error"])
    resets, connections = whole(resets, "cwnd_reset"), whole(connections, "connections")
    block_io = whole(block_io, "block_io")
    samples = None if samples is None else whole(samples, "cwnd_sample")
    seen = ["connection", "ts_ns", "cwnd"]
    windows_seen = connections[seen] if samples is None else pd.concat([connections[seen], samples[seen]])
    at = clock(resets, connections, block_io, about, span)
    keys, of = choose(resets, connections, connection, MOST_PANELS)
    block_io = at.shown(block_io, "start_ns", "done_ns")
    lost = losses(about, at)
    with style.drawing() as colours:
        windows, disk = _axes(max(len(keys), 1), bool(len(block_io)))
        axes = [*windows, disk] if disk is not None else windows
        for each in axes:
            each.set_xlim(at.begin, at.end)
        legend = _draw_windows(windows, keys, resets, connections, windows_seen, about, at, colours)
        if disk is not None:
            legend |= panels.latency(disk, block_io, at, colours)
            disk.set_ylabel("block I/O (ms)")
            if len(keys) == 1:
                panels.shade_idle(disk, resets[resets["connection"] == keys[0]], at, colours)
        legend |= _draw_losses(windows, disk, lost, at, colours)
        for each in axes:
            each.grid(axis="y")
            each.tick_params(labelbottom=each is axes[-1])
        axes[-1].set_xlabel("seconds since the start")
        figure = axes[0].figure
        assert isinstance(figure, Figure)
        figure.align_ylabels(axes)
        _foot(figure, legend, _caption(about, at, len(keys), of, disk is None), colours)
    return figure


def _axes(number: int, with_disk: bool) -> tuple[list[Axes], Axes | None]:
    window = _WINDOW if number == 1 else _WINDOW_OF_MANY
    disk = (_GAP + _BLOCK) if with_disk else 0
    total = number * (_HEADING + window) + (number - 1) * _GAP + disk + _AXIS + _FOOT
    figure = Figure(figsize=(_WIDTH, total), dpi=150)
    bottoms = [total - (n + 1) * (_HEADING + window) - n * _GAP for n in range(number)]
    made = [_add(figure, bottom, window, total) for bottom in bottoms]
    return made, _add(figure, bottoms[-1] - disk, _BLOCK, total) if with_disk else None


def _add(figure: Figure, bottom: float, height: float, total: float) -> Axes:
    return figure.add_axes((_LEFT / _WIDTH, bottom / total, (_WIDTH - _LEFT - _RIGHT) / _WIDTH, height / total))


def _draw_windows(
    windows: list[Axes],
    keys: list[str],
    resets: pd.DataFrame,
    connections: pd.DataFrame,
    windows_seen: pd.DataFrame,
    about: Meta,
    at: Clock,
    colours: Palette,
) -> panels.Legend:
    legend = panels.Legend()
    for axes, key in zip(windows, keys, strict=False):
        mine, snapshots = resets[resets["connection"] == key], connections[connections["connection"] == key]
        legend |= panels.window(axes, mine, windows_seen[windows_seen["connection"] == key], at, colours)
        labelled = panels.label_resets(axes, mine, at, colours)
        panels.heading(axes, *_titles(mine, snapshots, labelled, about, at), colours)
        axes.set_ylabel("window (segments)")
        if mine.empty:
            _say(axes, "no reset in this capture", 0.93, colours)
    if not keys:
        _say(windows[0], "no connection was seen", 0.6, colours)
        windows[0].spines["left"].set_visible(False)
        windows[0].set_yticks([])
    return legend


def _titles(resets: pd.DataFrame, snapshots: pd.DataFrame, labelled: int, about: Meta, at: Clock) -> tuple[str, str]:
    last = (resets if len(resets) else snapshots).iloc[-1]
    ends = [f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}" for host, port in (
        (last["saddr"], last["sport"]), (last["daddr"], last["dport"])
    )]  # fmt: skip
    parts = [str(last["ca_name"])]
    users = [
        (row["comm"], row[pid]) for f, pid in ((resets, "tgid"), (snapshots, "pid")) for _, row in f.tail(1).iterrows()
    ]
    parts += [f"{comm} (pid {pid})" for comm, pid in users if comm][:1]
    shown = at.shown(resets, "ts_ns", "ts_ns")
    number = len(shown)
    if number:
        parts.append(
            f"{number} reset{'s' if number > 1 else ''}" + (f", {labelled} labelled" if labelled < number else "")
        )
        parts.append("seen by " + ", ".join(sorted(set(shown["probe"].astype(str)))))
    else:
        probe = about.probes.get("idle")
        parts.append(f"watched by {probe}" if probe else "no probe saw idle resets here")
    return plain("  →  ".join(ends)), plain("  ·  ".join(part for part in parts if part))


def _say(axes: Axes, text: str, y: float, colours: Palette) -> None:
    axes.text(0.5, y, text, transform=axes.transAxes, ha="center", va="center", fontsize=10, color=colours.faint)


def _draw_losses(
    windows: list[Axes], disk: Axes | None, lost: list[LossBand], at: Clock, colours: Palette
) -> panels.Legend:
    shown = [loss for loss in lost if loss.event != "block_io" or disk is not None]
    for axes in windows:
        panels.hatch(axes, [loss for loss in shown if loss.event != "block_io"], at, colours)
    if disk is not None:
        panels.hatch(disk, [loss for loss in shown if loss.event == "block_io"], at, colours)
    if not shown:
        return {}
    text = f"records lost: {sum(loss.lost for loss in shown):,}"
    return {text: Patch(facecolor="none", edgecolor=colours.lost, hatch="/////", linewidth=0.6)}


def _caption(about: Meta, at: Clock, shown: int, of: int, no_disk: bool) -> str:
    where = f"{about.host or 'unknown host'}, Linux {about.kernel or '?'}"
    parts = [f"0 s is {at.started} UTC on {where}" if at.started else f"on {where}"]
    if shown < of:
        parts.append(f"{shown:,} of {plural(of, 'connection')}")
    if no_disk:
        parts.append("no block I/O recorded")
    return plain("  ·  ".join(parts))


def _foot(figure: Figure, legend: panels.Legend, caption: str, colours: Palette) -> None:
    """Add the legend in as many rows as it needs, with the caption below; the figure grows by their height."""
    room, left = _WIDTH - _LEFT - _RIGHT, _LEFT / _WIDTH
    shape: dict[str, Any] = {
        "loc": "lower left", "borderaxespad": 0, "borderpad": 0, "columnspacing": 1.4, "handletextpad": 0.5,
        "handlelength": 1.5, "labelspacing": 0.35,
    }  # fmt: skip
    rows, columns = 0, len(legend)
    for columns in range(len(legend), 0, -1):
        rows = -(-len(legend) // columns)
        trial = figure.legend(list(legend.values()), list(legend), ncols=columns, **shape)
        width = extent(trial).width / figure.dpi
        trial.remove()
        if width <= room:
            break
    before = figure.get_size_inches()[1]
    after = before + max(rows - 1, 0) * _ROW
    figure.set_size_inches(_WIDTH, after)
    for axes in figure.axes:
        box = axes.get_position()
        up, height = box.y0 * before + after - before, box.height * before
        axes.set_position((box.x0, up / after, box.width, height / after))
    if legend:
        anchor = (left, 0.3 / after)
        figure.legend(list(legend.values()), list(legend), ncols=columns, bbox_to_anchor=anchor, **shape)
    fit(figure.text(left, 0.1 / after, caption, fontsize=8, color=colours.faint), room * 72)
