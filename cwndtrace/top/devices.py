# SPDX-License-Identifier: Apache-2.0
"""Figures of block devices: latency and rates, over the whole trace and in each of the last seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cwndtrace.analysis.histogram import LatencyHistogram

SECONDS: Final = 60
"""The seconds of which each device has a figure of its own."""

RATE_SECONDS: Final = 10
"""The seconds over which a rate is a mean."""

MOST: Final = 500
"""The most pairs of device and operation; the requests of others are counted as one more."""

OTHERS: Final = ("others", "")
_NS: Final = 1_000_000_000
_Ints = npt.NDArray[np.int64]


@dataclass
class OneDevice:
    """The requests of one device and operation.

    ``second`` holds the second of CLOCK_MONOTONIC that each slot of ``number``, ``size`` (bytes) and ``worst_us``
    stands for.
    """

    bytes: int = 0
    errors: int = 0
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)
    second: _Ints = field(default_factory=lambda: np.full(SECONDS, -1, np.int64))
    number: _Ints = field(default_factory=lambda: np.zeros(SECONDS, np.int64))
    size: _Ints = field(default_factory=lambda: np.zeros(SECONDS, np.int64))
    worst_us: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(SECONDS))

    def add(self, done_ns: _Ints, us: npt.NDArray[np.float64], size: _Ints, failed: npt.NDArray[np.bool_]) -> None:
        """Count requests by when they ended, with their latencies in us and their bytes."""
        self.latency.add(us)
        self.bytes += int(size.sum())
        self.errors += int(failed.sum())
        seconds, of = np.unique(done_ns // _NS, return_inverse=True)
        number, total = np.bincount(of), np.bincount(of, weights=size)
        worst = np.zeros(len(seconds))
        np.maximum.at(worst, of, us)
        recent = seconds > seconds.max() - SECONDS
        for at, n, byte_count, most in zip(
            seconds[recent].tolist(), number[recent].tolist(), total[recent].tolist(), worst[recent].tolist(),
            strict=True,
        ):  # fmt: skip
            slot = at % SECONDS
            if self.second[slot] > at:  # a late row of a second that is no longer shown
                continue
            if self.second[slot] < at:
                self.second[slot], self.number[slot], self.size[slot], self.worst_us[slot] = at, 0, 0, 0.0
            self.number[slot] += n
            self.size[slot] += int(byte_count)
            self.worst_us[slot] = max(self.worst_us[slot], most)

    def worst(self, now_ns: int) -> list[float]:
        """Return the longest latency in us of each of the last ``SECONDS`` that are over; 0 for none."""
        seconds = np.arange(now_ns // _NS - SECONDS, now_ns // _NS)
        slots = seconds % SECONDS
        return [float(us) for us in np.where(self.second[slots] == seconds, self.worst_us[slots], 0.0)]

    def rates(self, now_ns: int) -> tuple[float, float]:
        """Return requests and bytes per second, the means of the last ``RATE_SECONDS`` that are over."""
        last = now_ns // _NS - 1  # rows of the second before may still be on their way
        mine = (self.second < last) & (self.second >= last - RATE_SECONDS)
        return float(self.number[mine].sum()) / RATE_SECONDS, float(self.size[mine].sum()) / RATE_SECONDS


class Devices:
    """The figures of all devices; ``by_pair`` has them by device (major:minor) and operation."""

    def __init__(self) -> None:
        self.by_pair: dict[tuple[str, str], OneDevice] = {}
        self.names: Mapping[str, str] = {}

    def add(self, table: pa.Table) -> None:
        """Count rows of ``block_io``, none of which lacks a value."""
        table = table.combine_chunks()
        start, done, size = (table[name].to_numpy().astype(np.int64) for name in ("start_ns", "done_ns", "bytes"))
        dev, op, error = (table[name].combine_chunks() for name in ("dev", "op", "error"))
        failed = _differs(error, "ok")
        ops = op.dictionary.to_pylist()
        devs = dev.dictionary.to_pylist()
        pairs, of = np.unique(
            dev.indices.to_numpy().astype(np.int64) * len(ops) + op.indices.to_numpy(), return_inverse=True
        )
        for number, pair in enumerate(pairs.tolist()):
            rows = np.flatnonzero(of == number)
            key = str(devs[pair // len(ops)]), str(ops[pair % len(ops)])
            if key not in self.by_pair and len(self.by_pair) >= MOST:
                key = OTHERS
            figures = self.by_pair.setdefault(key, OneDevice())
            figures.add(done[rows], (done[rows] - start[rows]) / 1000, size[rows], failed[rows])

    def name(self, device: str) -> str:
        """Return the name of a device, such as sda, or its number where that isn't known."""
        return self.names.get(device, device)


def _differs(column: pa.DictionaryArray, text: str) -> npt.NDArray[np.bool_]:
    differs = np.array([value != text for value in column.dictionary.to_pylist()], dtype=np.bool_)
    indices: _Ints = column.indices.to_numpy()
    return differs[indices]
