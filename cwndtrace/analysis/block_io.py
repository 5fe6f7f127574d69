# SPDX-License-Identifier: Apache-2.0
"""The latency of block I/O: by device and operation, by submitter, and over time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd

from cwndtrace.analysis.block_figures import FIGURES, BlockRequests, figures
from cwndtrace.analysis.workloads import Naming

COLUMNS: Final = {"device": "disk", "op": "operation", **FIGURES}
"""The columns of ``summary``, in order, with their meanings and units."""

WORKLOADS: Final = {"submitter": ("cgroup_id", "tgid"), "owner": ("cgroup_id", "owner_cgroup_id", "tgid")}
"""The columns that ``with_workloads`` adds, each with the columns that it is computed from."""

OWNER_COLUMNS: Final = {"owner": "the workload to which the kernel charges it; empty where unknown", **FIGURES}
"""The columns of ``by_owner``."""

SUBMITTER_COLUMNS: Final = {"comm": "name of the submitter", "tgid": "process id of the submitter", **FIGURES}
"""The columns of ``by_submitter``."""


NEEDS: Final = {
    "device": ("dev",),
    "latency_us": ("start_ns", "done_ns"),
    "queue_us": ("start_ns", "issue_ns"),
}
"""The columns that ``with_latency`` adds, each with the columns that it is computed from."""

USED: Final = ("start_ns", "done_ns", "issue_ns", "bytes", "tgid", "op", "error", "comm", "dev")
"""The columns without which the analyses leave a request out."""


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
        names = [devices.get(d, d) for d in dev.categories.astype(str)]
        place = {name: at for at, name in enumerate(dict.fromkeys(names))}
        codes: Any = dev.codes.to_numpy()
        if len(place) < len(names):  # two have the same name
            codes = np.array([*(place[name] for name in names), -1], dtype=codes.dtype)[codes]
        new["device"] = pd.Categorical.from_codes(codes, [*place], validate=False)  # type: ignore[call-overload]
    for name, until in (("latency_us", "done_ns"), ("queue_us", "issue_ns")):
        if name in columns:
            end = block_io[until].to_numpy()
            us = (end - block_io["start_ns"].to_numpy()).view(np.int64) / 1000
            if name == "queue_us":
                us[end == 0] = np.nan
            new[name] = us
    return block_io.assign(**new)


def with_workloads(block_io: pd.DataFrame, naming: Naming, columns: Sequence[str] = tuple(WORKLOADS)) -> pd.DataFrame:
    """Return ``block_io`` with those columns of ``WORKLOADS`` that ``columns`` names.

    ``submitter`` is the name of the workload of the task that submitted the request, and ``owner`` of the one to which
    the kernel charges it; in captures of older versions that is the submitter's.
    """
    pids, groups = block_io["tgid"].to_numpy(np.int64), block_io["cgroup_id"].to_numpy(np.uint64)
    new: dict[str, Any] = {}
    if "submitter" in columns:
        new["submitter"] = naming.of_requests(groups, pids)
    if "owner" in columns:
        owner = block_io["owner_cgroup_id"].to_numpy()
        known = np.where(pd.isna(owner) | (owner == 0), groups, owner).astype(np.uint64)
        new["owner"] = naming.of_requests(known, pids)
    return block_io.assign(**new)


def joined(frames: Iterable[pd.DataFrame], columns: Sequence[str], rows: int, *, in_order: bool = True) -> pd.DataFrame:
    """Return ``frames`` as one frame in order of ``start_ns``, or as they come.

    There is at least one frame, with at most ``rows`` rows in all. There may be many millions of rows. Fresh memory is
    expensive, so each column is filled in place and categories have the smallest codes. Each frame is sorted alone,
    which leaves few rows to move where two frames overlap.
    """
    whole: dict[str, Any] = {}
    labels: dict[str, dict[object, int]] = {}
    filled = 0
    for frame in frames:
        order = np.argsort(frame["start_ns"].to_numpy(), kind="stable") if in_order else slice(None)
        for name in columns:
            column = frame[name]
            if isinstance(column.dtype, pd.CategoricalDtype):
                known = labels.setdefault(name, {})
                places = [known.setdefault(label, len(known)) for label in column.cat.categories]
                values: Any = column.cat.codes.to_numpy()
                if places != [*range(len(places))] or values.dtype != np.int8:
                    values = np.array([*places, -1], dtype=np.int8 if len(known) < 128 else np.int32)[values]
            else:
                values = column.to_numpy()
            if name not in whole:
                whole[name] = np.empty(rows, values.dtype)
            elif (kind := np.promote_types(whole[name].dtype, values.dtype)) != whole[name].dtype:
                whole[name] = whole[name].astype(kind)
            whole[name][filled : filled + len(values)] = values[order]
        filled += len(frame)
    moved = _out_of_order(whole["start_ns"][:filled]) if in_order else []
    for name in whole:
        values = whole[name][:filled]
        for place, order in moved:
            values[place] = values[order]
        whole[name] = pd.Categorical.from_codes(values, list(labels[name])) if name in labels else values  # type: ignore[call-overload]
    return pd.DataFrame(whole, copy=False)


def _out_of_order(start: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the rows that have to change for ``start`` to be in order, with the rows that their values come from.

    Rows with an equal ``start`` keep their order. The list is empty if ``start`` is in order already.
    """
    if not (start[1:] < start[:-1]).any():
        return []
    order = np.argsort(start, kind="stable")
    place = np.flatnonzero(order != np.arange(len(order)))
    return [(place, order[place])]


def summary(block_io: pd.DataFrame | BlockRequests) -> pd.DataFrame:
    """Return one row per device and operation, the largest total latency first; the columns are ``COLUMNS``.

    Takes requests with ``device``, as ``with_latency`` adds it.
    """
    return figures(block_io, ["device", "op"])


def by_submitter(block_io: pd.DataFrame | BlockRequests) -> pd.DataFrame:
    """Return one row per submitting process and name, the largest total latency first.

    The columns are ``SUBMITTER_COLUMNS``. Write-back counts for the kernel thread
    that submitted it; whose it was is in ``owner_cgroup_id``.
    """
    return figures(block_io, ["comm", "tgid"])


def by_owner(block_io: pd.DataFrame | BlockRequests) -> pd.DataFrame:
    """Return one row per workload, the largest total latency first; the columns are ``OWNER_COLUMNS``.

    Takes requests with ``owner``, as ``with_workloads`` adds it. Write-back counts for the workload that dirtied the
    pages.
    """
    return figures(block_io, ["owner"])


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
