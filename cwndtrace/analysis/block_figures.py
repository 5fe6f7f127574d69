# SPDX-License-Identifier: Apache-2.0
"""Counts, sums and exact percentiles of groups of block requests, in memory that their number doesn't change.

Each latency is counted in a bin that is less than two percent wide. That tells in which bins the percentiles are, and
of all latencies only those in bins where the percentiles may yet be are kept. Where they turn out to be in others, all
requests are read a second time, for the latencies in these.
"""

from __future__ import annotations

import math
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

_HELD: Final = 1 << 16
"""The rows that are held as they are. Putting more in order takes longer than counting them."""

_JOINED: Final = 1 << 20
"""After how many values equal ones are joined."""

_MOST_KEPT: Final = 1 << 21
"""With more values than this that may yet be wanted, 24 bytes each, none are kept while the requests are counted."""

_SURE: Final = 4
"""By how many standard deviations the ranks of a percentile may be off, for requests that come in no order."""

_FEW_GROUPS: Final = 1 << 16
"""With no more groups than this that could be, the ones that are there are found without sorting or hashing."""


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
            if not tally.complete():
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
        self._keeping, self._near = True, dict[str, Bools]()
        self._looked = np.zeros(0, np.int64)

    @property
    def _bits(self) -> int:
        """The number of bits of a bin."""
        return _COARSEST - self._shift

    def add(self, frame: pd.DataFrame) -> None:
        """Count the requests of a frame."""
        self._kinds |= {key: frame[key].dtype for key in self._keys if not _is_text(frame[key])}
        if frame.empty:
            return
        local, labels = grouped(frame, self._keys)
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
        found = [(name, _cells(numbers, group, ns, self._shift), ns) for name, group, ns in _values(frame, local)]
        for name, cells, _ in found:
            table = self._tables[name]
            if len(table) <= 4 * len(cells):
                table += np.bincount(cells, minlength=len(table))
            else:
                np.add.at(table, cells, 1)
        if self._hold:
            for name, cells, ns in found:
                self._kept[name].add(cells, ns)
        elif self._keeping:
            self._look()
            for name, cells, ns in found:
                chosen = np.flatnonzero(self._near[name][cells])
                self._kept[name].add(cells[chosen], ns[chosen])
            if sum(map(len, self._kept.values())) > _MOST_KEPT:
                self._keeping, self._kept = False, {name: _Kept() for name in _METRICS}

    def _look(self) -> None:
        """Find the bins where the percentiles may yet be, if there are new groups or twice the requests of one."""
        count = self._sums["count"][: len(self._numbers)]
        if len(count) > len(self._looked) or (count >= 2 * self._looked).any():
            self._near = {name: self._places(name).near() for name in _METRICS}
            self._looked = count.copy()

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
            self._kept[name].merge(other._kept[name], numbers, self._bits)

    def complete(self) -> bool:
        """Return whether all values have been kept of the bins in which the percentiles are."""
        return all(self._has(name, self._places(name).cells) for name in _METRICS)

    def _has(self, name: str, cells: Ints) -> bool:
        kept, _, counts = self._kept[name].joined()
        found = np.bincount(kept, counts, len(self._tables[name]))
        return bool((found[cells] == self._tables[name][cells]).all())

    def select(self, requests: BlockRequests) -> None:
        """Read the requests again, and keep the values among which the percentiles are. Raises ``_Changed``."""
        wanted = {}
        for name, table in self._tables.items():
            wanted[name] = np.zeros(len(table), np.bool_)
            wanted[name][self._places(name).cells] = True
        self._kept = _together(requests, (*self._keys, *_TIMES), lambda: _Selection(self, wanted)).kept
        if not self.complete():
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
        places = self._places(name)
        kept, values, counts = self._kept[name].joined()
        upto = np.append(0, np.cumsum(counts))
        # The values of a cell come one after the other, the least first.
        at = np.searchsorted(upto, upto[np.searchsorted(kept, places.cells)] + places.before, side="right") - 1
        found = np.full((_RANKS[name], len(places.there)), np.nan)
        found[:, places.there] = values[at].reshape(_RANKS[name], np.count_nonzero(places.there))
        return found

    def _places(self, name: str) -> _Places:
        return _Places(self._tables[name][: len(self._numbers) << self._bits], self._bits, _RANKS[name])

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
            wider = shift - self._shift
            self._tables = {name: table.reshape(-1, 1 << wider).sum(axis=1) for name, table in self._tables.items()}
            for kept in self._kept.values():
                kept.coarsen(wider)
            self._shift, self._looked = shift, self._looked[:0]


class _Places:
    """Where the percentiles are in the ``table`` of a metric, as ``_Tally`` has it.

    For each one there are its cell, how many values ``before`` it are in that, and its group, one of those ``there``.
    """

    def __init__(self, table: Ints, bits: int, number: int) -> None:
        self._bits, self._upto = bits, np.cumsum(table)
        count = table.reshape(-1, 1 << bits).sum(axis=1)
        self.there: Bools = count > 0
        self._first, self._count = (np.cumsum(count) - count)[self.there], count[self.there]
        # The same floating-point numbers as in numpy.quantile, method inverted_cdf.
        ranks = [np.maximum(np.ceil(self._count * share - 1), 0).astype(np.int64) for share in _QUANTILES.values()]
        self._ranks = [*ranks, self._count - 1][:number]
        at = np.concatenate([self._first + rank for rank in self._ranks])
        self.cells = np.searchsorted(self._upto, at, side="right")
        self.before = at - np.append(0, self._upto)[self.cells]

    def near(self) -> Bools:
        """Return the cells in which the percentiles may be once there are more requests, if these are like those."""
        size = len(self._upto)
        edges = np.zeros(size + 1, np.int64)

        def add(since: Ints, until: Ints) -> None:
            np.add.at(edges, since, 1)
            np.add.at(edges, until + 1, -1)

        for share, rank in zip(_QUANTILES.values(), self._ranks, strict=False):
            off = np.ceil(_SURE * np.sqrt(self._count * share * (1 - share))).astype(np.int64)
            low, high = np.maximum(rank - off, 0), np.minimum(rank + off, self._count - 1)
            add(*(np.searchsorted(self._upto, self._first + at, side="right") for at in (low, high)))
        # Any later value may be the greatest one, or the first one of its group.
        groups = np.arange(len(self.there)) << self._bits
        last = groups + (1 << self._bits) - 1
        most = np.searchsorted(self._upto, self._first + self._count - 1, side="right")
        add(most, last[self.there])
        add(groups[~self.there], last[~self.there])
        near: Bools = np.cumsum(edges[:-1]) > 0
        return near


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
        for name, group, ns in _values(frame, local):
            cells = _cells(numbers, group, ns, tally._shift)
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
        self._rows, self._limit = 0, _JOINED

    def __len__(self) -> int:
        return self._rows

    def add(self, cells: Ints, values: Ints) -> None:
        """Add values."""
        self._append(cells, values, np.ones(len(cells), np.int64))

    def merge(self, other: _Kept, numbers: Ints | None = None, bits: int = 0) -> None:
        """Add the values of another one, the groups of which get new ``numbers``."""
        for cells, values, counts in other._pieces:
            if numbers is not None:
                cells = (numbers[cells >> bits] << bits) + (cells & (1 << bits) - 1)
            self._append(cells, values, counts)

    def coarsen(self, bits: int) -> None:
        """Make cells of so many bits less."""
        self._pieces = [(cells >> bits, values, counts) for cells, values, counts in self._pieces]

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
            self._limit = max(_JOINED, 2 * self._rows)


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


def _cells(numbers: Ints, group: Ints, ns: Ints, shift: int) -> Ints:
    """Return the cell of each value, which has one of these ``numbers`` as its group."""
    return (numbers << (_COARSEST - shift))[group] + _bins(ns, shift)


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
    size = math.prod(len(known) for known in values)
    if size <= _FEW_GROUPS:
        used = np.flatnonzero(np.bincount(number, minlength=size))
        place = np.zeros(size, np.int64)
        place[used] = np.arange(len(used))
        number = place[number]
    else:
        number, used = pd.factorize(number)
    places = np.unravel_index(used, [max(len(known), 1) for known in values])
    labels = pd.DataFrame({key: known[place] for key, known, place in zip(keys, values, places, strict=True)})
    return number, labels
