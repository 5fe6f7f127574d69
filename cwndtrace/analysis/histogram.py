# SPDX-License-Identifier: Apache-2.0
"""A latency histogram of fixed size, for percentiles of any number of requests to one percent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_GROWTH: Final = 1.01
_BINS: Final = 3100  # from 1 ns to more than six hours
_NS_PER_US: Final = 1000.0


class LatencyHistogram:
    """A histogram of latencies in microseconds, with bins that are one percent wide.

    A percentile is that of ``analysis.block_io``: the least latency that so many percent of the requests didn't exceed,
    which is one of the latencies and never a value between two. The histogram returns the upper edge of its bin, so it
    is at most one percent too high. ``count``, ``total_us`` and ``max_us`` are exact. A latency below 1 ns, which is
    the kernel's clock not having moved, counts as 1 ns.
    """

    def __init__(self) -> None:
        self._bins = np.zeros(_BINS, dtype=np.int64)
        self.count = 0
        self.total_us = 0.0
        self.max_us = 0.0

    def add(self, latencies_us: npt.NDArray[Any]) -> None:
        """Count an array of latencies in microseconds."""
        if not len(latencies_us):
            return
        index = np.log(np.maximum(latencies_us * _NS_PER_US, 1.0)) / np.log(_GROWTH)
        self._bins += np.bincount(np.minimum(index.astype(np.int64), _BINS - 1), minlength=_BINS)
        self.count += len(latencies_us)
        self.total_us += float(latencies_us.sum())
        self.max_us = max(self.max_us, float(latencies_us.max()))

    @classmethod
    def joined(cls, histograms: Iterable[LatencyHistogram]) -> LatencyHistogram:
        """Return one histogram with all that several counted."""
        all_of_them = cls()
        for each in histograms:
            all_of_them._bins += each._bins
            all_of_them.count += each.count
            all_of_them.total_us += each.total_us
            all_of_them.max_us = max(all_of_them.max_us, each.max_us)
        return all_of_them

    def pack(self) -> str:
        """Return the bins that aren't empty, as ``BIN:COUNT BIN:COUNT ...``, for ``join``."""
        bins = np.flatnonzero(self._bins)
        return " ".join(f"{place}:{count}" for place, count in zip(bins, self._bins[bins], strict=True))

    def join(self, packed: str, total_us: float, max_us: float) -> None:
        """Add what another histogram counted: its ``pack()``, total and maximum.

        Raises ValueError or IndexError for a text that isn't one.
        """
        pairs = np.array([pair.split(":") for pair in packed.split()], dtype=np.int64).reshape(-1, 2)
        if (pairs < 0).any():
            raise ValueError("a histogram has no negative numbers")
        np.add.at(self._bins, pairs[:, 0], pairs[:, 1])
        self.count += int(pairs[:, 1].sum())
        self.total_us += total_us
        self.max_us = max(self.max_us, max_us)

    def percentile(self, percent: int) -> float:
        """Return the least latency in us that ``percent`` of the requests didn't exceed; 0 if there are none."""
        if not self.count:
            return 0.0
        # In integers, because 0.99 * 100 may be more than 99 as a float, and the next request may be far slower.
        rank = max(-(-self.count * percent // 100), 1)
        place = int(np.searchsorted(np.cumsum(self._bins), rank))
        return float(min(_GROWTH ** (place + 1) / _NS_PER_US, self.max_us))

    def below(self, edges_us: Sequence[float]) -> list[int]:
        """Return how many latencies don't exceed each edge, in microseconds; those of its last percent may lack."""
        # An edge that is one of the bins' must not lose its bin to rounding.
        places = np.floor(np.log(np.array(edges_us) * _NS_PER_US) / np.log(_GROWTH) + 1e-9).astype(np.int64)
        totals: list[int] = np.append(0, np.cumsum(self._bins))[np.clip(places, 0, _BINS)].tolist()
        return totals
