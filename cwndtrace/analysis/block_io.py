# SPDX-License-Identifier: Apache-2.0
"""The latency of block I/O: by device and operation, by submitter, and over time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pandas as pd

_QUANTILES: Final = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
_METHOD: Final = "inverted_cdf"
"""The least value that such a share of the values doesn't exceed. A value between two of few requests would be one that
no request had, and ``analysis.histogram``, which doesn't keep the values, couldn't give it to one percent."""
_FIGURES: Final = {
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

COLUMNS: Final = {"device": "disk", "op": "operation", **_FIGURES}
"""The columns of ``summary``, in order, with their meanings and units."""

SUBMITTER_COLUMNS: Final = {"comm": "name of the submitter", "tgid": "process id of the submitter", **_FIGURES}
"""The columns of ``by_submitter``."""


NEEDS: Final = {
    "device": ("dev",),
    "latency_us": ("start_ns", "done_ns"),
    "queue_us": ("start_ns", "issue_ns"),
}
"""The columns that ``with_latency`` adds, each with the columns that it is computed from."""

USED: Final = ("start_ns", "done_ns", "bytes", "tgid", "op", "error", "comm", *NEEDS)
"""The columns of ``with_latency`` that the analyses of this package use."""


_PID_LIMIT: Final = 1 << 22
"""PID_MAX_LIMIT of include/linux/threads.h: the largest limit for process ids."""


def with_latency(block_io: pd.DataFrame, devices: Mapping[str, str]) -> pd.DataFrame:
    """Return the table ``block_io`` with the columns of ``NEEDS``.

    ``device`` is the disk's name from ``devices`` (``{"7:0": "loop0"}``), or major:minor where it has none there.
    ``latency_us`` is done - start and ``queue_us`` is issue - start, both in microseconds with their fraction.
    ``queue_us`` is missing where the request never reached a driver.
    """
    return add(block_io, devices, tuple(NEEDS))


def add(block_io: pd.DataFrame, devices: Mapping[str, str], columns: Sequence[str]) -> pd.DataFrame:
    """Return ``block_io`` with those columns of ``NEEDS`` that ``columns`` names."""
    new: dict[str, Any] = {}
    if "device" in columns:
        dev = block_io["dev"].astype("category").cat
        # There are few devices and millions of requests, so each name is looked up only once.
        codes, names = pd.factorize(np.array([devices.get(d, d) for d in dev.categories.astype(str)], dtype=object))
        new["device"] = pd.Categorical.from_codes(np.append(codes, -1).astype(np.int16)[dev.codes], names.tolist())  # type: ignore[call-overload]
    for name, until in (("latency_us", "done_ns"), ("queue_us", "issue_ns")):
        if name in columns:
            end = block_io[until].to_numpy()
            us = (end - block_io["start_ns"].to_numpy()).view(np.int64) / 1000
            if name == "queue_us":
                us[end == 0] = np.nan
            new[name] = us
    return block_io.assign(**new)


def joined(frames: Iterable[pd.DataFrame], columns: Sequence[str], rows: int) -> pd.DataFrame:
    """Return ``frames`` as one frame in order of ``start_ns``.

    There is at least one frame, with at most ``rows`` rows in all. There may be many millions of rows. Fresh memory is
    expensive, so each column is filled in place and categories have the smallest codes. Each frame is sorted alone,
    which leaves few rows to move where two frames overlap.
    """
    whole: dict[str, Any] = {}
    labels: dict[str, dict[object, int]] = {}
    filled = 0
    for frame in _prefetched(iter(frames)):
        start = frame["start_ns"].to_numpy()
        order = np.argsort(start, kind="stable")
        for name in columns:
            column = frame[name]
            if isinstance(column.dtype, pd.CategoricalDtype):
                known = labels.setdefault(name, {})
                places = [known.setdefault(label, len(known)) for label in column.cat.categories]
                values = np.array([*places, -1], dtype=np.int8 if len(known) < 128 else np.int32)[column.cat.codes]
            else:
                values = column.to_numpy()
            if name not in whole:
                whole[name] = np.empty(rows, values.dtype)
            elif values.dtype.itemsize > whole[name].dtype.itemsize:
                whole[name] = whole[name].astype(values.dtype)
            whole[name][filled : filled + len(values)] = values[order]
        filled += len(frame)
    moved = _out_of_order(whole["start_ns"][:filled])
    for name in whole:
        values = whole[name][:filled]
        for place, order in moved:
            values[place] = values[order]
        whole[name] = pd.Categorical.from_codes(values, list(labels[name])) if name in labels else values  # type: ignore[call-overload]
    return pd.DataFrame(whole, copy=False)


def _prefetched(frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """Yield ``frames``, and make the next one in another thread while the caller works on the current one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            following = pool.submit(next, frames, None)
        except RuntimeError:  # no thread could be started, so no frame was taken
            yield from frames
            return
        while (frame := following.result()) is not None:
            following = pool.submit(next, frames, None)
            yield frame


def _out_of_order(start: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the rows that have to change for ``start`` to be in order, with the rows that their values come from.

    Rows with an equal ``start`` keep their order. The list is empty if ``start`` is in order already.
    """
    if not (start[1:] < start[:-1]).any():
        return []
    order = np.argsort(start, kind="stable")
    place = np.flatnonzero(order != np.arange(len(order)))
    return [(place, order[place])]


def summary(block_io: pd.DataFrame) -> pd.DataFrame:
    """Return one row per device and operation, the largest total latency first; the columns are ``COLUMNS``.

    Takes a frame from ``with_latency``.
    """
    return _figures(block_io, ["device", "op"])[list(COLUMNS)]


def by_submitter(block_io: pd.DataFrame) -> pd.DataFrame:
    """Return one row per submitting process and name, the largest total latency first.

    The columns are ``SUBMITTER_COLUMNS``. Takes a frame from ``with_latency``. Write-back counts for the kernel thread
    that submitted it.
    """
    return _figures(block_io, ["comm", "tgid"])[list(SUBMITTER_COLUMNS)]


def heat_map(block_io: pd.DataFrame, *, slots: int = 160) -> pd.DataFrame:
    """Return the number of requests by latency (rows) and start time (columns).

    The index ``latency_us`` holds the lower bound of each row in us, rising by a factor of the square root of two. The
    columns ``start_ns`` hold the start of each slot in ns of CLOCK_MONOTONIC. The frame is empty if there are no
    requests. Takes a frame from ``with_latency``.
    """
    if block_io.empty:
        return pd.DataFrame(index=pd.Index([], name="latency_us"), columns=pd.Index([], name="start_ns"), dtype="int64")
    start = block_io["start_ns"].to_numpy(np.int64)
    steps = np.floor(2 * np.log2(np.maximum(block_io["latency_us"].to_numpy(), 1.0))).astype(np.int64)
    begin, low = int(start.min()), int(steps.min())
    width = (int(start.max()) - begin) // slots + 1
    rows = int(steps.max()) - low + 1
    cells = np.bincount((steps - low) * slots + (start - begin) // width, minlength=rows * slots)
    return pd.DataFrame(
        cells.reshape(rows, slots),
        index=pd.Index(2.0 ** ((np.arange(rows) + low) / 2), name="latency_us"),
        columns=pd.Index(begin + np.arange(slots) * width, name="start_ns"),
    )


def _figures(block_io: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    number, labels = _groups(block_io, keys)
    groups = len(labels)
    order = np.argsort(number, kind="stable").astype(np.uint32 if len(number) < 1 << 32 else np.int64)
    count = np.bincount(number, minlength=groups)
    bounds = np.concatenate([[0], np.cumsum(count)])
    latency, queue, size = (block_io[name].to_numpy() for name in ("latency_us", "queue_us", "bytes"))
    failed = (block_io["error"] != "ok").to_numpy()
    figures = []
    # One group at a time, so that no second copy of all rows is needed.
    for begin, end in pairwise(bounds.tolist()):
        rows = order[begin:end]
        took, waited = latency[rows], queue[rows]
        row = {"bytes": int(size[rows].sum(dtype=np.int64)), "errors": int(np.count_nonzero(failed[rows]))}
        row |= {"latency_max_us": took.max(), "latency_total_us": took.sum()}
        for name, values in (("latency", took), ("queue", waited), ("service", took - waited)):
            known = values if name == "latency" else values[~np.isnan(values)]
            shares = list(_QUANTILES.values())
            at = np.quantile(known, shares, overwrite_input=True, method=_METHOD) if len(known) else [np.nan] * 3
            row |= {f"{name}_{q}_us": value for q, value in zip(_QUANTILES, at, strict=True)}
        figures.append(row)
    kinds = {name: "int64" if name in ("bytes", "errors") else "float64" for name in _FIGURES if name != "count"}
    out = labels.assign(count=count, **pd.DataFrame(figures, columns=list(kinds)).astype(kinds))
    return out.sort_values(["latency_total_us", *keys], ascending=[False, True, True], ignore_index=True)


def _groups(block_io: pd.DataFrame, keys: list[str]) -> tuple[np.ndarray, pd.DataFrame]:
    """Return a group number for each row, equal where all ``keys`` are equal, and the keys of each group.

    The numbers have the smallest integer type, because NumPy sorts small integers by radix.
    """
    number: np.ndarray = np.zeros(len(block_io), dtype=np.int32)
    values: list[Any] = []
    span = 1
    for key in keys:
        column = block_io[key]
        if isinstance(column.dtype, pd.CategoricalDtype):
            codes, known = column.cat.codes.to_numpy(), column.cat.categories.astype(str).to_numpy()
        else:
            codes, known = _numbered(column.to_numpy())
        span *= len(known)
        number = number.astype(np.int64 if span >= 1 << 31 else np.int32, copy=False)
        number *= len(known)
        np.add(number, codes, out=number, casting="unsafe")
        del codes
        values.append(known)
    number, used = _numbered(number)
    places = np.unravel_index(used, [max(len(known), 1) for known in values])
    labels = pd.DataFrame({key: known[place] for key, known, place in zip(keys, values, places, strict=True)})
    return number.astype(np.min_scalar_type(len(labels)), copy=False), labels


def _numbered(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and distinct values as ``pd.factorize`` does, with the distinct values in any order.

    Many numbers below ``_PID_LIMIT`` go through a lookup table instead, which takes a third of the time.
    """
    if len(values) < _PID_LIMIT or values.min() < 0 or values.max() >= _PID_LIMIT:
        return pd.factorize(values)
    table = np.zeros(int(values.max()) + 1, dtype=np.int32)
    table[values] = 1
    known = np.flatnonzero(table)
    table[known] = np.arange(len(known))
    return table.astype(np.min_scalar_type(len(known)))[values], known.astype(values.dtype)
