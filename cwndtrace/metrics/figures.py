# SPDX-License-Identifier: Apache-2.0
"""The values of the metrics, which one thread counts and others read."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from cwndtrace.analysis.histogram import LatencyHistogram
from cwndtrace.metrics.families import Buckets, Family, Series, Snapshot

_S_PER_US = 1e-6


class Figures:
    """Counters, gauges and histograms by family and labels."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: Snapshot = {}

    def add(self, family: Family, labels: tuple[str, ...], value: float) -> None:
        """Add to a counter."""
        with self._lock:
            series = self._all.setdefault(family, {})
            before = series.get(labels, 0)
            assert not isinstance(before, Buckets)
            series[labels] = before + value

    def set(self, family: Family, value: float) -> None:
        """Set a gauge without labels."""
        with self._lock:
            self._all[family] = {(): value}

    def observe(self, family: Family, labels: tuple[str, ...], values: npt.NDArray[np.float64]) -> None:
        """Count values in a histogram."""
        place = np.searchsorted(family.edges, values)
        counts = np.bincount(place, minlength=len(family.edges) + 1).tolist()
        with self._lock:
            series = self._all.setdefault(family, {})
            series[labels] = merged(series.get(labels), Buckets(tuple(counts), float(values.sum())))

    def drop(self, label: str, value: str) -> None:
        """Remove all series in which ``label`` has this value."""
        with self._lock:
            for family, series in self._all.items():
                if label in family.labels:
                    place = family.labels.index(label)
                    self._all[family] = {key: each for key, each in series.items() if key[place] != value}

    def snapshot(self) -> Snapshot:
        """Return a copy."""
        with self._lock:
            return {family: dict(series) for family, series in self._all.items()}


def merged(a: float | Buckets | None, b: Buckets) -> Buckets:
    """Return the sum of two histograms."""
    if not isinstance(a, Buckets):
        return b
    return Buckets(tuple(x + y for x, y in zip(a.counts, b.counts, strict=True)), a.sum + b.sum)


def summed(series: Series, key: tuple[str, ...], value: float | Buckets) -> None:
    """Add a value to what ``series`` has for ``key``."""
    before = series.get(key, 0)
    if isinstance(value, Buckets):
        series[key] = merged(before, value)
    else:
        assert not isinstance(before, Buckets)
        series[key] = before + value


def seconds(histogram: LatencyHistogram, family: Family) -> Buckets:
    """Return a histogram of latencies with the edges of ``family``, in seconds, to one percent of an edge."""
    below = histogram.below([edge / _S_PER_US for edge in family.edges])
    counts: Any = np.diff([0, *below, histogram.count])
    return Buckets(tuple(counts.tolist()), histogram.total_us * _S_PER_US)
