# SPDX-License-Identifier: Apache-2.0
"""The conditions of ``--dump-on``: a metric, an operator, and a value with its unit."""

from __future__ import annotations

import re
from collections import deque
from typing import Final

import numpy as np

from cwndtrace.capture.session import Batch
from cwndtrace.errors import UsageError
from cwndtrace.records import arrow

METRICS: Final = {"cost": "cwnd_recovery", "resets": "cwnd_reset", "block_latency": "block_io"}
"""The metrics, and the event whose records tell each."""

_TIMES_US: Final = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 6e7, "min": 6e7, "h": 3.6e9}
_PERIODS_S: Final = {"s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}
_STEPS: Final = 60
_GRAMMAR: Final = re.compile(r"\s*(\w+)\s*(>=?)\s*(\d{1,12}(?:\.\d{1,6})?)\s*(/?)\s*([a-z]+)\s*", re.ASCII)
_CURE: Final = "write 'cost > 200ms', 'resets > 100/min' or 'block_latency > 500ms'"


class Condition:
    """A condition on the records as they come in. Raises UsageError for a text that isn't one.

    ``cost > TIME`` holds when a followed window ends that delayed data by more, ``block_latency > TIME`` when a block
    request ends that took longer, and ``resets > NUMBER/min`` (or ``/s``, ``/h``) when more have come in during the
    last minute. ``>=`` is the other operator.
    """

    def __init__(self, text: str) -> None:
        self.text = text.strip()
        match = _GRAMMAR.fullmatch(text)
        if match is None:
            raise UsageError(f"{text!r} isn't a condition", _CURE)
        metric, operator, value, per, unit = match.groups()
        if metric not in METRICS:
            raise UsageError(f"there is no metric {metric}; there are {', '.join(METRICS)}", _CURE)
        units = _PERIODS_S if metric == "resets" else _TIMES_US
        if unit not in units or bool(per) != (metric == "resets"):
            kind = "a number per time" if metric == "resets" else "a time"
            raise UsageError(f"{text!r} doesn't compare {metric} with {kind}", _CURE)
        self.event = METRICS[metric]
        self._metric = metric
        self._or_equal = operator == ">="
        self._limit = float(value) * (1.0 if per else units[unit])
        self._period_s = units[unit]
        self._recent: deque[list[float]] = deque()

    def met(self, batches: list[Batch], now_s: float) -> bool:
        """Return True if the records of one turn, which came in at ``now_s``, meet the condition."""
        mine = [batch.rows for batch in batches if batch.event == self.event and len(batch)]
        if self._metric == "resets":
            return self._exceeds(self._rate(sum(map(len, mine)), now_s))
        timed = (rows for rows in mine if isinstance(rows, arrow.TimedRecords))
        return any(self._exceeds(_greatest_us(rows, self._metric)) for rows in timed)

    def _exceeds(self, value: float) -> bool:
        return value >= self._limit if self._or_equal else value > self._limit

    def _rate(self, number: int, now_s: float) -> int:
        """Return the number of records in the last period, to a sixtieth of it, the new ones included."""
        step = self._period_s / _STEPS
        if number and (not self._recent or now_s - self._recent[-1][0] >= step):
            self._recent.append([now_s, 0])
        if number:
            self._recent[-1][1] += number
        while self._recent and now_s - self._recent[0][0] >= self._period_s:
            self._recent.popleft()
        return int(sum(count for _, count in self._recent))


def _greatest_us(rows: arrow.TimedRecords, metric: str) -> float:
    """Return the greatest value in rows of the metric's event, in microseconds."""
    if metric == "cost":
        return float(rows.records["cost_us"].max())
    return float((rows.records["done_ns"].astype(np.int64) - rows.records["start_ns"].astype(np.int64)).max()) / 1000
