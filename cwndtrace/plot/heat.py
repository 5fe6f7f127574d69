# SPDX-License-Identifier: Apache-2.0
"""The heat map of block I/O: the number of requests by latency and start time."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from cwndtrace.format import plural
from cwndtrace.plot import layout, panels, style
from cwndtrace.plot.frames import Clock, losses
from cwndtrace.plot.style import plain
from cwndtrace.store.meta import Meta

_LEFT, _BOTTOM, _WIDTH, _HEIGHT = 0.75, 0.85, 5.55, 2.2


def heat(cells: pd.DataFrame, *, zero_ns: int, about: Meta) -> Figure:
    """Return a figure of ``analysis.block_io.heat_map``: seconds since ``zero_ns`` against latency in ms.

    ``zero_ns`` is on CLOCK_MONOTONIC. Spans in which requests were lost, by the capture's metadata ``about``, are
    hatched. Colours come from ``style.use``.
    """
    starts = cells.columns.to_numpy(np.float64)
    width = starts[1] - starts[0] if len(starts) > 1 else 1e9
    edges = (np.append(starts, starts[-1] + width) - zero_ns) / 1e9 if len(starts) else np.array([0.0, 1.0])
    at = Clock(zero_ns, float(edges[0]), float(edges[-1]), "")
    total = int(cells.to_numpy().sum())
    with style.drawing() as colours:
        figure = layout.sheet(_BOTTOM + _HEIGHT)
        axes = layout.add(figure, _LEFT, _BOTTOM, _WIDTH, _HEIGHT)
        axes.set_xlim(at.begin, at.end)
        axes.set_xlabel("seconds since the start")
        axes.set_ylabel("block I/O (ms)")
        if total:
            lows = cells.index.to_numpy(np.float64) / 1000
            rows = np.append(lows, lows[-1] * 2**0.5)
            counts = np.ma.masked_equal(cells.to_numpy(), 0)
            drawn = axes.pcolormesh(
                edges, rows, counts, norm=LogNorm(1, max(int(counts.max()), 2)), cmap="viridis", rasterized=True
            )
            axes.set_yscale("log")
            panels.plain_log(axes, float(rows[0]), float(rows[-1]))
            bar = layout.add(figure, _LEFT + _WIDTH + 0.12, _BOTTOM, 0.12, _HEIGHT)
            figure.colorbar(drawn, cax=bar, format=FuncFormatter(lambda value, _: f"{value:,.0f}")).set_label(
                "requests"
            )
            bar.yaxis.set_minor_formatter(NullFormatter())
        else:
            layout.say(axes, "no block I/O recorded", colours)
        lost = [loss for loss in losses(about, at) if loss.event == "block_io"]
        panels.hatch(axes, lost, at, colours)
        caption = f"on {about.host or 'unknown host'}"
        if lost:
            caption += f"  ·  hatched: {plural(sum(loss.lost for loss in lost), 'request')} lost"
        layout.finish(figure, "Latency of block I/O over time", plural(total, "request"), {}, plain(caption), colours)
    return figure
