# SPDX-License-Identifier: Apache-2.0
"""Block I/O: how long requests took, by device and operation and by who submitted them, and how that went over time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pandas as pd

_QUANTILES: Final = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
_FIGURES: Final = {
    "count": "finished requests",
    "bytes": "bytes, summed",
    "errors": "requests that finished with another status than ok",
    "latency_p50_us": "us from entering the block layer to finished, median",
    "latency_p95_us": "us, 95th percentile",
    "latency_p99_us": "us, 99th percentile",
    "latency_max_us": "us, the slowest",
    "latency_total_us": "us, summed over requests; they may overlap",
    "queue_p50_us": "us from entering the block layer to being given to the driver, median; missing where none was",
    "queue_p95_us": "us, 95th percentile",
    "queue_p99_us": "us, 99th percentile",
    "service_p50_us": "us from being given to the driver to finished, median; missing where none was",
    "service_p95_us": "us, 95th percentile",
    "service_p99_us": "us, 99th percentile",
}

COLUMNS: Final = {"device": "disk", "op": "operation", **_FIGURES}
"""The columns of ``summary``, in order, with what they hold and in which unit."""

SUBMITTER_COLUMNS: Final = {"comm": "name of the submitter", "tgid": "its process", **_FIGURES}
"""The columns of ``by_submitter``."""


NEEDS: Final = {
    "device": ("dev",),
    "latency_us": ("start_ns", "done_ns"),
    "queue_us": ("start_ns", "issue_ns"),
}
"""What ``with_latency`` adds, and of which columns it makes that."""

USED: Final = ("start_ns", "done_ns", "bytes", "tgid", "op", "error", "comm", *NEEDS)
"""What the analyses of this package use of ``with_latency``."""


_TABLE: Final = 1 << 22
"""PID_MAX_LIMIT of include/linux/threads.h, the most that processes are numbered."""


def with_latency(block_io: pd.DataFrame, devices: Mapping[str, str]) -> pd.DataFrame:
    """The table ``block_io`` with three more columns.

    ``device`` is the disk's name from ``devices`` (``{"7:0": "loop0"}``), or major:minor where it has none;
    ``latency_us`` is done - start, ``queue_us`` issue - start, in microseconds with their fraction, the
    latter missing where the request never reached a driver.
    """
    return add(block_io, devices, tuple(NEEDS))


def add(block_io: pd.DataFrame, devices: Mapping[str, str], columns: Sequence[str]) -> pd.DataFrame:
    """``block_io`` with those of ``NEEDS`` that ``columns`` names."""
    new: dict[str, Any] = {}
    if "device" in columns:
        dev = block_io["dev"].astype("category").cat
        # By name: there are few of them, and millions of requests.
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
    """``frames``, at least one and ``rows`` rows at most, behind each other in order of ``start_ns``.

    There may be many millions of rows. Fresh memory is dear, so each column is filled in place and categories have the
    smallest codes; each frame is ordered by itself, which leaves few rows to move where two of them meet.
    """
    whole: dict[str, Any] = {}
    labels: dict[str, dict[object, int]] = {}
    filled = 0
    for frame in _ahead(iter(frames)):
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


def _ahead(frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """``frames``, the next one made on another CPU while one is worked on."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            following = pool.submit(next, frames, None)
        except RuntimeError:  # no room for another thread: nothing was begun
            yield from frames
            return
        while (frame := following.result()) is not None:
            following = pool.submit(next, frames, None)
            yield frame


def _out_of_order(start: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Where rows have to go so that ``start`` is in order, equal ones as they are, and where each comes from."""
    if not (start[1:] < start[:-1]).any():
        return []
    order = np.argsort(start, kind="stable")
    place = np.flatnonzero(order != np.arange(len(order)))
    return [(place, order[place])]


def summary(block_io: pd.DataFrame) -> pd.DataFrame:
    """One row a device and operation, the slowest in sum first; the columns are ``COLUMNS``.

    Takes a frame from ``with_latency``.
    """
    return _figures(block_io, ["device", "op"])[list(COLUMNS)]


def by_submitter(block_io: pd.DataFrame) -> pd.DataFrame:
    """One row a submitting process and name, the slowest in sum first; the columns are ``SUBMITTER_COLUMNS``.

    Takes a frame from ``with_latency``. Write-back is shown under the kernel thread that did it.
    """
    return _figures(block_io, ["comm", "tgid"])[list(SUBMITTER_COLUMNS)]


def heat_map(block_io: pd.DataFrame, *, slots: int = 160) -> pd.DataFrame:
    """How many requests of which latency began when: a row a latency, a column a slot of time, both labelled below.

    The index ``latency_us`` holds each row's least latency in us, rising by a factor of the square root of two; the
    columns ``start_ns`` each slot's begin on CLOCK_MONOTONIC. Empty where there is no request. Takes a frame from
    ``with_latency``.
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
    of = len(labels)
    order = np.argsort(number, kind="stable").astype(np.uint32 if len(number) < 1 << 32 else np.int64)
    count = np.bincount(number, minlength=of)
    bounds = np.concatenate([[0], np.cumsum(count)])
    latency, queue, size = (block_io[name].to_numpy() for name in ("latency_us", "queue_us", "bytes"))
    failed = (block_io["error"] != "ok").to_numpy()
    figures = []
    # Group by group, so that no second copy of all is needed.
    for begin, end in pairwise(bounds.tolist()):
        rows = order[begin:end]
        took, waited = latency[rows], queue[rows]
        row = {"bytes": int(size[rows].sum(dtype=np.int64)), "errors": int(np.count_nonzero(failed[rows]))}
        row |= {"latency_max_us": took.max(), "latency_total_us": took.sum()}
        for name, values in (("latency", took), ("queue", waited), ("service", took - waited)):
            known = values if name == "latency" else values[~np.isnan(values)]
            at = np.quantile(known, list(_QUANTILES.values()), overwrite_input=True) if len(known) else [np.nan] * 3
            row |= {f"{name}_{q}_us": value for q, value in zip(_QUANTILES, at, strict=True)}
        figures.append(row)
    kinds = {name: "int64" if name in ("bytes", "errors") else "float64" for name in _FIGURES if name != "count"}
    out = labels.assign(count=count, **pd.DataFrame(figures, columns=list(kinds)).astype(kinds))
    return out.sort_values(["latency_total_us", *keys], ascending=[False, True, True], ignore_index=True)


def _groups(block_io: pd.DataFrame, keys: list[str]) -> tuple[np.ndarray, pd.DataFrame]:
    """A number for each row, equal where all ``keys`` are; and what the keys are for each number.

    The numbers are of the smallest type, because those are sorted by radix.
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
    """``pd.factorize``, of numbers that may have a table of their own: that takes a third of the time."""
    if len(values) < _TABLE or values.min() < 0 or values.max() >= _TABLE:
        return pd.factorize(values)
    table = np.zeros(int(values.max()) + 1, dtype=np.int32)
    table[values] = 1
    known = np.flatnonzero(table)
    table[known] = np.arange(len(known))
    return table.astype(np.min_scalar_type(len(known)))[values], known.astype(values.dtype)
