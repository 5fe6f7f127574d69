# SPDX-License-Identifier: Apache-2.0
"""Clocks, spans and the choice of connections, computed from the frames of a picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from cwndtrace import format as fmt
from cwndtrace.errors import UsageError
from cwndtrace.records import arrow
from cwndtrace.store.meta import Meta

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Clock:
    """The time axis of a picture.

    ``zero_ns`` of CLOCK_MONOTONIC is 0 s of the picture; ``begin`` and ``end`` are its edges in seconds.
    """

    zero_ns: int
    begin: float
    end: float
    started: str

    def seconds(self, ns: pd.Series) -> Seconds:
        """Return times of records in seconds of the picture."""
        return (ns.to_numpy(np.int64) - self.zero_ns) / 1e9

    def shown(self, frame: pd.DataFrame, first: str, last: str) -> pd.DataFrame:
        """Return the rows that reach into the picture, each from its time ``first`` to ``last`` (column names, ns)."""
        inside = (self.seconds(frame[last]) >= self.begin) & (self.seconds(frame[first]) <= self.end)
        return frame[inside]


@dataclass(frozen=True)
class LossBand:
    """A span in seconds of the picture during which ``lost`` records of ``event`` were lost."""

    event: str
    begin: float
    end: float
    lost: int


def clock(
    resets: pd.DataFrame,
    connections: pd.DataFrame,
    block_io: pd.DataFrame,
    about: Meta,
    span: tuple[float, float] | None,
) -> Clock:
    """Return the picture's clock, from the capture's metadata, or from its records where the metadata has no times.

    Raises UsageError for a span that ends before it begins.
    """
    stamps = [int(frame[name].min()) for frame, name in _timed(resets, connections, block_io)]
    zero = about.begin.mono_ns if about.begin else min(stamps, default=0)
    stamps = [int(frame[name].max()) for frame, name in _timed(resets, connections, block_io)]
    last = max([about.end.mono_ns if about.end else zero, *stamps])
    if span and not span[0] < span[1]:
        raise UsageError(f"The span from {span[0]:g} s to {span[1]:g} s is empty.", "Give the earlier second first.")
    edges = span or (0.0, max((last - zero) / 1e9, 0.001))
    offset = about.begin.utc_offset_ns if about.begin else None
    started = arrow.iso_time(zero + offset) if offset is not None else ""
    return Clock(zero, float(edges[0]), float(edges[1]), started[:23].replace("T", " "))


def losses(about: Meta, at: Clock) -> list[LossBand]:
    """Return the spans with losses that reach into the picture."""
    bands = []
    for span in about.lossy:
        loss = LossBand(span.event, (span.start_ns - at.zero_ns) / 1e9, (span.end_ns - at.zero_ns) / 1e9, span.lost)
        if loss.lost > 0 and loss.end >= at.begin and loss.begin <= at.end:
            bands.append(loss)
    return bands


def choose(resets: pd.DataFrame, connections: pd.DataFrame, wanted: str | None, most: int) -> tuple[list[str], int]:
    """Return the keys of the connections to show, and the number of connections that they were chosen from.

    These are ``wanted`` alone, if given; otherwise the ``most`` connections with most resets, or, if none has a reset,
    the ``most`` that sent most. Raises UsageError if ``wanted`` isn't there.
    """
    counts = resets["connection"].value_counts(sort=False)
    sent = pd.concat([connections[["connection", "bytes_sent"]], resets[["connection", "bytes_sent"]]])
    most_sent = sent.groupby("connection")["bytes_sent"].max()
    keys = sorted(most_sent.index, key=lambda key: (-int(counts.get(key, 0)), -int(most_sent[key]), str(key)))
    if wanted is not None:
        if wanted not in most_sent.index:
            cause = f"There is no connection {fmt.clean(wanted)} in this capture."
            raise UsageError(cause, f"Choose one of those with most resets: {', '.join(keys[:5]) or 'none'}.")
        return [wanted], len(keys)
    with_resets = [key for key in keys if counts.get(key, 0)]
    return (with_resets or keys)[:most], len(keys)


def _timed(*frames: pd.DataFrame) -> list[tuple[pd.DataFrame, str]]:
    return [(f, "ts_ns" if "ts_ns" in f else "start_ns") for f in frames if len(f)]
