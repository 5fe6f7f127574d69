# SPDX-License-Identifier: Apache-2.0
"""Counts, sums and exact percentiles of groups of block requests, in memory that their number doesn't change.

Requests are read twice. The first time, each latency is counted in a bin that is less than two percent wide; that tells
in which bins the percentiles are. The second time, only the latencies in these bins are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from cwndtrace.analysis import threads
from cwndtrace.analysis.cost import Bools, Ints

FIGURES: Final = {
    "count": "finished requests",
    "bytes": "bytes of these requests, sum",
    "errors": "requests that finished with a status other than ok",
    "latency_p50_us": "time from entering the block layer to completion that half of the requests didn't exceed, us",
    "latency_p95_us": "its 95th percentile, us: the least value that 95 % of the requests didn't exceed",
    "latency_p99_us": "its 99th percentile, us",
    "latency_max_us": "its maximum, us",
    "latency_total_us": "its sum over the requests, us; requests may overlap in time",
    "queue_p50_us": "the same for the time until the driver had it; missing where no request reached a driver",
    "queue_p95_us": "its 95th percentile, us",
    "queue_p99_us": "its 99th percentile, us",
    "service_p50_us": "the same for the time from the driver to completion; missing where no request reached one",
    "service_p95_us": "its 95th percentile, us",
    "service_p99_us": "its 99th percentile, us",
}
"""The figures of a group, with their meanings and units.

A percentile is the least value that such a share of the values doesn't exceed. A value between two of few requests
would be one that no request had, and ``analysis.histogram``, which doesn't keep the values, couldn't give it to one
percent.
"""

_TIMES: Final = ("start_ns", "issue_ns", "done_ns")

NEEDS: Final = (*_TIMES, "bytes", "error")
"""The columns of ``block_io`` from which the figures are computed, besides those of the groups."""

Share = Callable[[Sequence[str]], Iterable[pd.DataFrame]]


@dataclass(frozen=True)
class BlockRequests:
    """Block requests in shares, each of which a thread of its own reads, and about how many there are in all.

    Each call of a share reads its frames from the beginning, and these columns of them.
    """

    shares: tuple[Share, ...]
    rows: int

    @classmethod
    def of(cls, requests: pd.DataFrame | BlockRequests) -> BlockRequests:
        """Return requests that may be in one frame."""
        return cls((lambda _: [requests],), len(requests)) if isinstance(requests, pd.DataFrame) else requests


_QUANTILES: Final = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
_METRICS: Final = ("latency", "queue", "service")
_RANKS: Final = {"latency": 4, "queue": 3, "service": 3}
"""How many percentiles each metric has; the fourth is the maximum."""

_ONE: Final = np.float32(1).view(np.int32)
_FINEST, _COARSEST = 17, 29
"""By how many bits a float32 is shifted to give its bin: 64 bins per power of two, or one bin for all values."""

_CELLS: Final = 1 << 20
"""The most bins of a metric, those of all groups together. With more groups, bins are wider."""

_HELD: Final = 1 << 20
"""The rows that are held as they are, so that they are read only once; and after how many values equal ones are joined.
"""


class _Changed(Exception):
    """The requests aren't those that were counted before: the trace still runs."""


def figures(block_io: pd.DataFrame | BlockRequests, keys: Sequence[str]) -> pd.DataFrame:
    """Return one row per group of requests with equal ``keys``: these columns, and ``FIGURES``.

    The largest total latency comes first.
    """
    requests = BlockRequests.of(block_io)
    if requests.rows > _HELD:
        tally = _together(requests, (*keys, *NEEDS), lambda: _Tally(keys))
        try:
            tally.select(requests)
        except _Changed:
            pass  # what is held as it is read can't change
        else:
            return tally.frame()
    return _together(requests, (*keys, *NEEDS), lambda: _Tally(keys, hold=True)).frame()


class _Tally:
    """The figures of groups, for which frames are added.

    Each group has a number, in the order in which they came. The table of a metric has a count for each bin of each
    group. ``hold`` keeps all values, in one bin for each group.
    """

    def __init__(self, keys: Sequence[str], *, hold: bool = False) -> None:
        self._keys = [*keys]
        self._hold = hold
        self._shift = _COARSEST if hold else _FINEST
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._kinds: dict[str, Any] = dict.fromkeys(keys, "str")
        self._sums = {name: np.zeros(0, np.int64) for name in ("count", "bytes", "errors")}
        # Latencies of a forged capture may have a sum that no integer can hold.
        self._sums["latency_ns"] = np.zeros(0, np.float64)
        self._tables = {name: np.zeros(0, np.int64) for name in _METRICS}
        self._kept = {name: _Kept() for name in _METRICS}

    @property
    def _bits(self) -> int:
        """The number of bits of a bin."""
        return _COARSEST - self._shift

    def add(self, frame: pd.DataFrame) -> None:
        """Count the requests of a frame."""
        local, labels = grouped(frame, self._keys)
        self._kinds |= {key: frame[key].dtype for key in self._keys if not _is_text(frame[key])}
        numbers = self._number(labels)
        self._grow()
        for name, values in (
            ("count", None),
            ("bytes", frame["bytes"].to_numpy()),
            ("errors", (frame["error"] != "ok").to_numpy()),
            ("latency_ns", _took(frame)),
        ):
            # Sums in float64 are exact up to 2**53, for the latencies that are 104 days.
            sums = self._sums[name]
            sums[numbers] += np.bincount(local, values, len(labels)).astype(sums.dtype)
        for name, group, ns in _values(frame, numbers[local]):
            cells = (group << self._bits) + _bins(ns, self._shift)
            if self._hold:
                self._kept[name].add(cells, ns)
            table = self._tables[name]
            if len(table) <= 4 * len(cells):
                table += np.bincount(cells, minlength=len(table))
            else:
                np.add.at(table, cells, 1)

    def merge(self, other: _Tally) -> None:
        """Add what another one of the same keys has counted."""
        self._kinds |= other._kinds
        numbers = self._number(pd.DataFrame(list(other._numbers), columns=self._keys))
        self._grow()
        other._coarsen(self._shift)
        self._coarsen(other._shift)
        for name, sums in self._sums.items():
            sums[numbers] += other._sums[name][: len(numbers)]
        for name, table in self._tables.items():
            size = len(numbers) << self._bits
            table.reshape(-1, 1 << self._bits)[numbers] += other._tables[name][:size].reshape(-1, 1 << self._bits)
            self._kept[name].merge(other._kept[name], numbers)

    def select(self, requests: BlockRequests) -> None:
        """Read the requests again, and keep the values among which the percentiles are. Raises ``_Changed``."""
        wanted = {}
        for name, table in self._tables.items():
            wanted[name] = np.zeros(len(table), np.bool_)
            wanted[name][self._places(name)[0]] = True
        self._kept = _together(requests, (*self._keys, *_TIMES), lambda: _Selection(self, wanted)).kept
        for name, kept in self._kept.items():
            cells, _, counts = kept.joined()
            found = np.bincount(cells, counts, len(self._tables[name])).astype(np.int64)
            if (found != np.where(wanted[name], self._tables[name], 0)).any():
                raise _Changed

    def numbers(self, labels: pd.DataFrame) -> Ints:
        """Return the numbers of groups that have been counted. Raises ``_Changed`` for another one."""
        found = [self._numbers.get(key) for key in labels.itertuples(index=False, name=None)]
        if None in found:
            raise _Changed
        return np.array(found, dtype=np.int64)

    def frame(self) -> pd.DataFrame:
        """Return the figures as ``figures`` does."""
        number = len(self._numbers)
        out = pd.DataFrame(list(self._numbers), columns=self._keys).astype(self._kinds)
        sums = {name: sums[:number] for name, sums in self._sums.items()}
        out = out.assign(**{name: sums[name] for name in ("count", "bytes", "errors")})
        out["latency_total_us"] = sums["latency_ns"] / 1000
        for name in _METRICS:
            found = self._percentiles(name) / 1000
            names = [f"{name}_{which}_us" for which in (*_QUANTILES, "max")]
            out = out.assign(**dict(zip(names, found, strict=False)))
        out = out[[*self._keys, *FIGURES]]
        order = ["latency_total_us", *self._keys]
        return out.sort_values(order, ascending=[False, *(True for _ in self._keys)], ignore_index=True)

    def _percentiles(self, name: str) -> npt.NDArray[np.float64]:
        """Return the percentiles in ns, one row for each and one column for each group; missing without a value."""
        cells, before, there = self._places(name)
        kept, values, counts = self._kept[name].joined()
        upto = np.append(0, np.cumsum(counts))
        # The values of a cell come one after the other, the least first.
        place = np.searchsorted(upto, upto[np.searchsorted(kept, cells)] + before, side="right") - 1
        found = np.full((_RANKS[name], len(there)), np.nan)
        found[:, there] = values[place].reshape(_RANKS[name], np.count_nonzero(there))
        return found

    def _places(self, name: str) -> tuple[Ints, Ints, Bools]:
        """Return where the percentiles are: the cell of each, how many values before it are in it, and the groups."""
        table = self._tables[name][: len(self._numbers) << self._bits]
        upto = np.cumsum(table)
        count = table.reshape(-1, 1 << self._bits).sum(axis=1)
        there = count > 0
        first, count = (np.cumsum(count) - count)[there], count[there]
        # The same floating-point numbers as in numpy.quantile, method inverted_cdf.
        ranks = [np.maximum(np.ceil(count * share - 1), 0).astype(np.int64) for share in _QUANTILES.values()]
        at = np.concatenate([first + rank for rank in (*ranks, count - 1)[: _RANKS[name]]])
        cells = np.searchsorted(upto, at, side="right")
        return cells, at - np.append(0, upto)[cells], there

    def _number(self, labels: pd.DataFrame) -> Ints:
        """Return the numbers of groups, new ones included."""
        known = self._numbers
        found = (known.setdefault(key, len(known)) for key in labels.itertuples(index=False, name=None))
        return np.fromiter(found, np.int64, len(labels))

    def _grow(self) -> None:
        """Make room for all groups."""
        number = len(self._numbers)
        if number <= len(self._sums["count"]):
            return
        room = 1 << (number - 1).bit_length()
        while self._bits and room << self._bits > _CELLS:
            self._coarsen(self._shift + 1)
        self._sums = {name: _longer(sums, room) for name, sums in self._sums.items()}
        self._tables = {name: _longer(table, room << self._bits) for name, table in self._tables.items()}

    def _coarsen(self, shift: int) -> None:
        """Make the bins as wide as at ``shift``, if they aren't."""
        if shift > self._shift:
            each = 1 << (shift - self._shift)
            self._tables = {name: table.reshape(-1, each).sum(axis=1) for name, table in self._tables.items()}
            self._shift = shift


class _Selection:
    """The values in wanted bins of a ``_Tally``."""

    def __init__(self, tally: _Tally, wanted: dict[str, Bools]) -> None:
        self._tally, self._wanted = tally, wanted
        self.kept = {name: _Kept() for name in _METRICS}

    def add(self, frame: pd.DataFrame) -> None:
        """Keep the wanted values of a frame. Raises ``_Changed``."""
        tally = self._tally
        local, labels = grouped(frame, tally._keys)
        numbers = tally.numbers(labels)
        for name, group, ns in _values(frame, numbers[local]):
            cells = (group << tally._bits) + _bins(ns, tally._shift)
            chosen = np.flatnonzero(self._wanted[name][cells])
            self.kept[name].add(cells[chosen], ns[chosen])

    def merge(self, other: _Selection) -> None:
        """Add what another one of the same tally has kept."""
        for name, kept in self.kept.items():
            kept.merge(other.kept[name])


class _Kept:
    """Values of cells, equal ones with their number."""

    def __init__(self) -> None:
        self._pieces: list[tuple[Ints, Ints, Ints]] = []
        self._rows, self._limit = 0, _HELD

    def add(self, cells: Ints, values: Ints) -> None:
        """Add values."""
        self._append(cells, values, np.ones(len(cells), np.int64))

    def merge(self, other: _Kept, numbers: Ints | None = None) -> None:
        """Add the values of another one; its cells have new ``numbers``."""
        for cells, values, counts in other._pieces:
            self._append(cells if numbers is None else numbers[cells], values, counts)

    def joined(self) -> tuple[Ints, Ints, Ints]:
        """Return cells, values and how often each value is there, in order of the cells and then of the values."""
        cells, values, counts = (
            np.concatenate([np.zeros(0, np.int64), *(piece[at] for piece in self._pieces)]) for at in range(3)
        )
        order = np.lexsort((values, cells))
        cells, values, counts = cells[order], values[order], counts[order]
        first = np.flatnonzero(np.append(True, (cells[1:] != cells[:-1]) | (values[1:] != values[:-1]))[: len(cells)])
        counts = np.add.reduceat(counts, first) if len(first) else counts
        self._pieces = [(cells[first], values[first], counts)]
        self._rows = len(first)
        return self._pieces[0]

    def _append(self, *piece: Ints) -> None:
        cells, values, counts = piece
        self._pieces.append((cells, values, counts))
        self._rows += len(cells)
        if self._rows > self._limit:
            self.joined()
            self._limit = max(_HELD, 2 * self._rows)


def _is_text(column: pd.Series[Any]) -> bool:
    return isinstance(column.dtype, pd.CategoricalDtype) or pd.api.types.is_string_dtype(column.dtype)


def _took(frame: pd.DataFrame, since: str = "start_ns", until: str = "done_ns") -> Ints:
    took: Ints = frame[until].to_numpy(np.int64) - frame[since].to_numpy(np.int64)
    return took


def _values(frame: pd.DataFrame, group: Ints) -> Iterable[tuple[str, Ints, Ints]]:
    """Yield each metric with its values in ns, and the groups of the requests that have one."""
    yield "latency", group, _took(frame)
    issued = frame["issue_ns"].to_numpy() != 0
    if not issued.all():
        frame, group = frame.loc[issued, [*_TIMES]], group[issued]
    yield "queue", group, _took(frame, "start_ns", "issue_ns")
    yield "service", group, _took(frame, "issue_ns", "done_ns")


def _bins(ns: Ints, shift: int) -> npt.NDArray[np.int32]:
    """Return the bin of each value: a larger value is never in a lower bin, and all below 1 are in the first."""
    bits = np.maximum(ns, 1).astype(np.float32).view(np.int32)
    bits -= _ONE
    bits >>= shift
    return bits


def _longer(array: Ints, size: int) -> Ints:
    return np.concatenate([array, np.zeros(size - len(array), array.dtype)])


_Tallied = TypeVar("_Tallied", _Tally, _Selection)


def _together(requests: BlockRequests, columns: Sequence[str], make: Callable[[], _Tallied]) -> _Tallied:
    """Return what the frames of all shares add up to, each share in a thread of its own."""

    def one(share: Share) -> _Tallied:
        made = make()
        for frame in share(columns):
            made.add(frame)
        return made

    first, *others = threads.each([partial(one, share) for share in requests.shares])
    for other in others:
        first.merge(other)  # type: ignore[arg-type]  # of the same type
    return first


def grouped(block_io: pd.DataFrame, keys: Sequence[str]) -> tuple[Ints, pd.DataFrame]:
    """Return a group number for each row, equal where all ``keys`` are equal, and the keys of each group."""
    number: Ints = np.zeros(len(block_io), dtype=np.int64)
    values: list[Any] = []
    for key in keys:
        column = block_io[key]
        if isinstance(column.dtype, pd.CategoricalDtype):
            codes, known = column.cat.codes.to_numpy(), column.cat.categories.astype(str).to_numpy()
        else:
            codes, known = pd.factorize(column.to_numpy())
        number = number * len(known) + codes
        values.append(known)
    number, used = pd.factorize(number)
    places = np.unravel_index(used, [max(len(known), 1) for known in values])
    labels = pd.DataFrame({key: known[place] for key, known, place in zip(keys, values, places, strict=True)})
    return number, labels
