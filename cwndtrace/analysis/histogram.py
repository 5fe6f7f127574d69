# SPDX-License-Identifier: Apache-2.0
"""A latency histogram of fixed size, for percentiles of any number of requests to one percent."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

_GROWTH: Final = 1.01
_BINS: Final = 2400  # from 1 us to more than six hours


class LatencyHistogram:
    """A histogram of latencies in microseconds, with bins that are one percent wide.

    A percentile is the upper edge of its bin, so at most one percent too high. ``count`` and ``max_us`` are exact.
    """

    def __init__(self) -> None:
        self._bins = np.zeros(_BINS, dtype=np.int64)
        self.count = 0
        self.max_us = 0.0

    def add(self, latencies_us: npt.NDArray[Any]) -> None:
        """Count an array of latencies in microseconds."""
        if not len(latencies_us):
            return
        index = np.log(np.maximum(latencies_us, 1.0)) / np.log(_GROWTH)
        self._bins += np.bincount(np.minimum(index.astype(np.int64), _BINS - 1), minlength=_BINS)
        self.count += len(latencies_us)
        self.max_us = max(self.max_us, float(latencies_us.max()))

    def percentile(self, percent: float) -> float:
        """Return the latency in microseconds below which ``percent`` of the requests stayed; 0 if there are none."""
        if not self.count:
            return 0.0
        rank = np.searchsorted(np.cumsum(self._bins), self.count * percent / 100)
        return float(min(_GROWTH ** (int(rank) + 1), self.max_us))
